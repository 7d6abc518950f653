// How a state of the KL divergence is rounded to a tensor, on every device. No torch here: kernels include it.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define VTW_HOST_DEVICE __host__ __device__
#else
#define VTW_HOST_DEVICE
#endif

namespace vtw {

// Kernels sum a = Σ e^(p - m_p)·(p - q) in units of 2^40. Where q is masked by the most negative finite number, p - q
// is close to the largest number, and the sum of a block overflows, although it may weigh nothing in the end, where p
// is low as well. In these units it stays finite, and +inf always means that q is 0 somewhere where p is not.
constexpr double kUnit = 0x1p40;

inline VTW_HOST_DEVICE double within(double x, double largest) {
  if (x > largest && x < INFINITY) return largest;
  return x < -largest && x > -INFINITY ? -largest : x;
}

// The five numbers as a tensor of R holds them; `a` comes in units of kUnit, and a tensor has it without. If it then
// overflows R, the sums of p are made relative to a number above the maximum instead, which describes the same sums.
// For maxima beyond 2^27 or so, numbers are too coarse for that; but there each logit weighs all or nothing, and it is
// enough that a is finite: it is limited to the largest number.
template <typename R, typename State>
VTW_HOST_DEVICE State rounded_state(double m_p, double z_p, double a, double m_q, double z_q) {
  constexpr double kLargest = std::numeric_limits<R>::max(), kStep = 27.7;  // ln 2^40
  double unit = kUnit;
  if (std::fabs(a) > kLargest / kUnit && std::fabs(a) < INFINITY) {
    const double raised = static_cast<R>(m_p + kStep), step = raised - m_p;
    if (std::fabs(step - kStep) < 8) {
      const double weight = std::exp(-step);
      m_p = raised;
      z_p *= weight;
      unit *= weight;
    }
  }
  // By comparison, and not by a product that may itself overflow.
  a = std::fabs(a) > kLargest / unit && std::fabs(a) < INFINITY ? std::copysign(kLargest, a) : a * unit;
  return {R(within(m_p, kLargest)), R(z_p), R(a), R(within(m_q, kLargest)), R(z_q)};
}

}  // namespace vtw
