// KL divergence on the CPU: one read of each pair of rows forward, and one read and one write backward.
//
// A pair of rows is cut into segments, which threads share; the states of the segments are merged in ascending order.
// So the bits of a result depend on neither the number of threads nor on which of them came first.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "allocate.h"
#include "checks.h"
#include "cpu/simd.h"
#include "kl_state.h"

namespace vtw {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kPerUnit = 1 / kUnit;
// The logits of a block share one pair of maxima. It is 2 x 8 KiB of fp32, so that the pass that sums finds it in the
// L1 cache after the pass that looks for the maxima.
constexpr int64_t kBlock = 2048;
// A segment is one thread's piece of work: 2 to 3 microseconds.
constexpr int64_t kSegment = 4 * kBlock;
// If many rows are compared with the same one, the exponentials of that one are computed once for at most so many of
// them: enough to make their cost negligible, and few enough to leave work for every thread.
constexpr int64_t kSharing = 8;
// The least work of a thread, in pairs of logits to read and in rows of states to merge or finish: some 100
// microseconds each. A smaller share gains little if a core is idle; and if another process has the core, the op waits
// milliseconds for that process's turn to end.
constexpr int64_t kGrain = 20 * kSegment;
constexpr int64_t kRows = 1280;
// What a segment costs beside its pairs, in pairs; and what a backward costs, in forwards.
constexpr int64_t kSegmentCost = 128, kBackwardCost = 3;

// KL(p‖q) = a/z_p - (m_p + ln z_p) + (m_q + ln z_q); see vtw_kernels/ops/kl_divergence.py. a is in units of kUnit.
struct State {
  double m_p = -INFINITY, z_p = 0, a = 0, m_q = -INFINITY, z_q = 0;

  void merge(const State& other) {
    const double top_p = larger(m_p, other.m_p);
    const double top_q = larger(m_q, other.m_q);
    const double p_here = rescale(m_p, top_p), p_there = rescale(other.m_p, top_p);
    z_p = z_p * p_here + other.z_p * p_there;
    a = weigh(a, p_here) + weigh(other.a, p_there);
    z_q = z_q * rescale(m_q, top_q) + other.z_q * rescale(other.m_q, top_q);
    m_p = top_p;
    m_q = top_q;
  }

  // Subtracting in fp64 keeps what two log-sum-exps of some tens would round away. Rounding may still leave a hair
  // below 0, which no divergence is; the comparison lets NaN through.
  double divergence() const {
    const double kl = a / z_p * kUnit - (m_p + std::log(z_p)) + (m_q + std::log(z_q));
    return kl < 0 ? 0 : kl;
  }

  // An infinite divergence stays infinite, however small the probability that carries it has become.
  static double weigh(double a, double weight) { return a == INFINITY ? a : a * weight; }
  static double larger(double a, double b) { return a > b || std::isnan(a) ? a : b; }
  // An empty or all -inf part has z = 0 and a = 0 and weighs nothing, where -inf - -inf would make it NaN.
  static double rescale(double m, double top) { return m == -INFINITY ? 0.0 : m == top ? 1.0 : std::exp(m - top); }
};

template <typename R>
State read_state(const R* s) {
  return {s[0], s[1], s[2] / kUnit, s[3], s[4]};
}

template <typename R>
std::array<R, 5> round_state(const State& s) {
  return rounded_state<R, std::array<R, 5>>(s.m_p, s.z_p, s.a, s.m_q, s.z_q);
}

// The same of one block, before the temperature is applied to all but the exponents.
struct Sums {
  float m_p, m_q;
  double z_p, a, z_q;
};

// One vector of pairs. The plain version, in which a is not in units yet, is right as long as all logits are finite and
// a does not overflow; else `a` comes out as an infinity or NaN, and the block is done again by the careful version:
//   p = -inf            adds nothing, whatever q is;
//   q = -inf < p        adds +inf, even where e^(p - m_p) has underflowed to 0;
//   e^(p - m_p) = 0     adds nothing to any other q;
//   NaN, +inf           make the sums NaN: x - x is 0 for every finite x and NaN for these.
template <int Bytes, bool careful>
VTW_INLINE void add_pairs(typename Simd<Bytes>::F p, typename Simd<Bytes>::F q, float m_p, float m_q, float scale,
                          typename Simd<Bytes>::F& z_p, typename Simd<Bytes>::F& a, typename Simd<Bytes>::F& z_q) {
  using V = Simd<Bytes>;
  using F = typename V::F;
  F e_p = V::exp2(p - m_p, scale);
  F e_q = V::exp2(q - m_q, scale);
  F term = e_p * (careful ? p * kPerUnit - q * kPerUnit : p - q);
  if (careful) {
    const F none = V::splat(-kInfinity), zero = V::splat(0.0f);
    e_p = p == none ? zero : e_p + (p - p);
    e_q = q == none ? zero : e_q + (q - q);
    term = e_p == zero ? zero : term;
    term = q == none ? V::splat(kInfinity) : term;
    term = p == none ? zero : term;
  }
  z_p += e_p;
  a += term;
  z_q += e_q;
}

// The last logits, from `i` on, filled up with -inf.
template <int Bytes, typename T>
VTW_INLINE typename Simd<Bytes>::Two load_tail(const T* x, int64_t i, int64_t count) {
  using V = Simd<Bytes>;
  T padded[V::kStep];
  for (int lane = 0; lane < V::kStep; ++lane) padded[lane] = i + lane < count ? x[i + lane] : T(-kInfinity);
  return V::load(padded);
}

// Prefetches what will be read at `next`: its maxima are looked for as soon as this block is done.
template <int Bytes, typename T>
VTW_INLINE void prefetch_step(const T* next) {
  const auto* bytes = reinterpret_cast<const char*>(next);
  for (size_t at = 0; at < Simd<Bytes>::kStep * sizeof(T); at += 64) __builtin_prefetch(bytes + at);
}

template <int Bytes, bool careful, typename T>
VTW_INLINE void add_block(const T* p, const T* q, int64_t count, float scale, Sums& sums) {
  using V = Simd<Bytes>;
  using F = typename V::F;
  // Where all is -inf there is no maximum to subtract; any finite number will do, for every e^x is then set to 0.
  const float m_p = sums.m_p == -kInfinity ? 0.0f : sums.m_p;
  const float m_q = sums.m_q == -kInfinity ? 0.0f : sums.m_q;
  F z_p{}, a{}, z_q{};
  int64_t i = 0;
  for (; i + V::kStep <= count; i += V::kStep) {
    const auto ps = V::load(p + i), qs = V::load(q + i);
    prefetch_step<Bytes>(p + i + kBlock);
    prefetch_step<Bytes>(q + i + kBlock);
    for (int h = 0; h < 2; ++h) add_pairs<Bytes, careful>(ps.half[h], qs.half[h], m_p, m_q, scale, z_p, a, z_q);
  }
  if (!careful) a *= kPerUnit;
  if (i < count) {
    const auto ps = load_tail<Bytes>(p, i, count), qs = load_tail<Bytes>(q, i, count);
    for (int h = 0; h < 2; ++h) add_pairs<Bytes, true>(ps.half[h], qs.half[h], m_p, m_q, scale, z_p, a, z_q);
  }
  sums.z_p = V::reduce_add(z_p);
  sums.a = V::reduce_add(a);
  sums.z_q = V::reduce_add(z_q);
}

template <int Bytes, typename T>
VTW_INLINE float block_max(const T* x, int64_t count) {
  using V = Simd<Bytes>;
  typename V::Two m{V::splat(-kInfinity), V::splat(-kInfinity)};
  for (int64_t i = 0; i < count; i += V::kStep) {
    const auto xs = i + V::kStep <= count ? V::load(x + i) : load_tail<Bytes>(x, i, count);
    for (int h = 0; h < 2; ++h) m.half[h] = V::max(xs.half[h], m.half[h]);
  }
  return V::reduce_max(V::max(m.half[0], m.half[1]));
}

// Σ e^(x - m) of a block that several pairs share, and the exponentials in the order in which add_shared_block takes
// them.
template <int Bytes, typename T>
VTW_INLINE double exponentials(const T* x, int64_t count, float m, float scale, float* e) {
  using V = Simd<Bytes>;
  using F = typename V::F;
  m = m == -kInfinity ? 0.0f : m;
  F z{}, none{};
  int64_t i = 0;
  for (; i + V::kStep <= count; i += V::kStep) {
    auto xs = V::load(x + i);
    for (int h = 0; h < 2; ++h) {
      xs.half[h] = V::exp2(xs.half[h] - m, scale);
      z += xs.half[h];
    }
    V::store(e + i, xs);
  }
  if (i < count) {
    const auto xs = load_tail<Bytes>(x, i, count);
    for (int h = 0; h < 2; ++h) add_pairs<Bytes, true>(xs.half[h], xs.half[h], m, m, scale, z, none, none);
  }
  return V::reduce_add(z);
}

// add_block for one of the pairs that share p or else q, whose sum of exponentials is known. The row of the next pair
// is at `next`.
template <int Bytes, bool of_p, typename T>
VTW_INLINE void add_shared_block(const T* p, const T* q, const float* e_p, const T* next, int64_t count, float scale,
                                 Sums& sums) {
  using V = Simd<Bytes>;
  using F = typename V::F;
  const float m_p = sums.m_p == -kInfinity ? 0.0f : sums.m_p;
  const float m_q = sums.m_q == -kInfinity ? 0.0f : sums.m_q;
  F z_p{}, a{}, z_q{};
  int64_t i = 0;
  for (; i + V::kStep <= count; i += V::kStep) {
    const auto ps = V::load(p + i), qs = V::load(q + i);
    typename V::Two known;
    if (of_p) known = V::load(e_p + i);
    prefetch_step<Bytes>(next + i);
    for (int h = 0; h < 2; ++h) {
      const F weight = of_p ? known.half[h] : V::exp2(ps.half[h] - m_p, scale);
      a += weight * (ps.half[h] - qs.half[h]);
      if (of_p) {
        z_q += V::exp2(qs.half[h] - m_q, scale);
      } else {
        z_p += weight;
      }
    }
  }
  a *= kPerUnit;
  if (i < count) {
    const auto ps = load_tail<Bytes>(p, i, count), qs = load_tail<Bytes>(q, i, count);
    for (int h = 0; h < 2; ++h) add_pairs<Bytes, true>(ps.half[h], qs.half[h], m_p, m_q, scale, z_p, a, z_q);
  }
  sums.a = V::reduce_add(a);
  if (of_p) {
    sums.z_q = V::reduce_add(z_q);
  } else {
    sums.z_p = V::reduce_add(z_p);
  }
}

VTW_INLINE void add_block_to(State& state, const Sums& sums, double inverse_temperature) {
  state.merge({sums.m_p * inverse_temperature, sums.z_p, sums.a * inverse_temperature, sums.m_q * inverse_temperature,
               sums.z_q});
}

// The states of a segment of some pairs of rows, which all have the same p (or else the same q). Their bits are those
// that each would have alone.
template <int Bytes, bool of_p, typename T>
VTW_INLINE void shared_segment_states(const T* const* p, const T* const* q, int64_t pairs, int64_t count,
                                      double inverse_temperature, State* const* states) {
  const float scale = static_cast<float>(kLog2e * inverse_temperature);
  alignas(64) float e[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t length = std::min(kBlock, count - i);
    const float m = block_max<Bytes>((of_p ? p : q)[0] + i, length);
    const double z = exponentials<Bytes>((of_p ? p : q)[0] + i, length, m, scale, e);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const T *x = p[pair] + i, *y = q[pair] + i;
      const float other = block_max<Bytes>(of_p ? y : x, length);
      const T* next = pair + 1 < pairs ? (of_p ? q : p)[pair + 1] + i : (of_p ? q : p)[0] + i + kBlock;
      Sums sums = of_p ? Sums{m, other, z, 0, 0} : Sums{other, m, 0, 0, z};
      add_shared_block<Bytes, of_p>(x, y, e, next, length, scale, sums);
      if (!std::isfinite(sums.a)) add_block<Bytes, true>(x, y, length, scale, sums);
      add_block_to(*states[pair], sums, inverse_temperature);
    }
  }
}

template <int Bytes, typename T>
VTW_INLINE void segment_states(const T* const* p, const T* const* q, int64_t pairs, int64_t count,
                               double inverse_temperature, State* const* states) {
  if (pairs > 1 && p[0] == p[1]) {
    return shared_segment_states<Bytes, true>(p, q, pairs, count, inverse_temperature, states);
  }
  if (pairs > 1) return shared_segment_states<Bytes, false>(p, q, pairs, count, inverse_temperature, states);
  const float scale = static_cast<float>(kLog2e * inverse_temperature);
  for (int64_t i = 0; i < count; i += kBlock) {
    const T *x = *p + i, *y = *q + i;
    const int64_t length = std::min(kBlock, count - i);
    Sums sums{block_max<Bytes>(x, length), block_max<Bytes>(y, length), 0, 0, 0};
    add_block<Bytes, false>(x, y, length, scale, sums);
    if (!std::isfinite(sums.a)) add_block<Bytes, true>(x, y, length, scale, sums);
    add_block_to(**states, sums, inverse_temperature);
  }
}

// fp64 is for checks of gradients, not for speed.
template <int Bytes>
VTW_INLINE void segment_states(const double* const* p, const double* const* q, int64_t pairs, int64_t count,
                               double inverse_temperature, State* const* states) {
  for (int64_t i = 0; i < pairs * count; ++i) {
    const int64_t pair = i / count, at = i % count;
    const auto scaled = [&](double logit) {  // what is finite stays finite
      constexpr double kLargest = std::numeric_limits<double>::max();
      return std::isfinite(logit) ? std::clamp(logit * inverse_temperature, -kLargest, kLargest) : logit;
    };
    const double x = scaled(p[pair][at]), y = scaled(q[pair][at]);
    const double nan_p = x == -INFINITY ? 0 : x - x, nan_q = y == -INFINITY ? 0 : y - y;
    const double term = x == -INFINITY ? 0 : y == -INFINITY ? INFINITY : x / kUnit - y / kUnit;
    states[pair]->merge({x, (x == -INFINITY ? 0 : 1) + nan_p, term, y, (y == -INFINITY ? 0 : 1) + nan_q});
  }
}

// Gradient of z_p, a and z_q with respect to the logits, per row; the slopes have the temperature in them:
//   dp = (level + tilt (p - q)) e^(p - m_p),  dq = to_q e^(q - m_q) - to_p e^(p - m_p).
template <typename T>
struct Slope {
  T m_p, m_q, inverse_temperature, level, tilt, to_q, to_p;

  // From a state, whose maxima are those of the scaled logits, and its gradient.
  Slope(const T* state, const T* grad, T temperature)
      : m_p(state[0] * temperature), m_q(state[3] * temperature), inverse_temperature(1 / temperature) {
    to_p = grad[2] * inverse_temperature;
    to_q = grad[4] * inverse_temperature;
    level = (grad[1] + grad[2]) * inverse_temperature;
    tilt = to_p * inverse_temperature;
  }
};

template <int Bytes, typename T>
VTW_INLINE void write_step(T* to, typename Simd<Bytes>::Two x, bool around_caches) {
  using V = Simd<Bytes>;
  if constexpr (std::is_same_v<T, float>) {
    if (around_caches) {
      V::stream(to, x.half[0]);
      V::stream(to + V::kLanes, x.half[1]);
      return;
    }
  }
  V::store(to, x);
}

template <int Bytes, typename T>
VTW_INLINE void backward_step(typename Simd<Bytes>::Two p, typename Simd<Bytes>::Two q, const Slope<float>& s,
                              T* grad_p, T* grad_q, bool around_caches) {
  using V = Simd<Bytes>;
  using F = typename V::F;
  const F none = V::splat(-kInfinity), zero = V::splat(0.0f);
  const float scale = static_cast<float>(kLog2e) * s.inverse_temperature;
  typename V::Two to_p, to_q;
  for (int h = 0; h < 2; ++h) {
    const F x = p.half[h], y = q.half[h];
    F e_p = V::exp2(x - s.m_p, scale);
    e_p = x == none ? zero : e_p + (x - x);
    if (grad_p) to_p.half[h] = e_p == zero ? zero : (s.level + s.tilt * (x - y)) * e_p;
    if (grad_q) {
      F e_q = V::exp2(y - s.m_q, scale);
      e_q = y == none ? zero : e_q + (y - y);
      to_q.half[h] = s.to_q * e_q - s.to_p * e_p;
    }
  }
  if (grad_p) write_step<Bytes>(grad_p, to_p, around_caches);
  if (grad_q) write_step<Bytes>(grad_q, to_q, around_caches);
}

// Fewer pairs than a step has.
template <int Bytes, typename T>
VTW_INLINE void backward_part(const T* p, const T* q, int64_t begin, int64_t end, const Slope<float>& slope, T* grad_p,
                              T* grad_q) {
  T part_p[Simd<Bytes>::kStep], part_q[Simd<Bytes>::kStep];
  backward_step<Bytes>(load_tail<Bytes>(p, begin, end), load_tail<Bytes>(q, begin, end), slope,
                       grad_p ? part_p : nullptr, grad_q ? part_q : nullptr, false);
  if (grad_p) std::copy_n(part_p, end - begin, grad_p + begin);
  if (grad_q) std::copy_n(part_q, end - begin, grad_q + begin);
}

template <int Bytes, typename T>
VTW_INLINE void segment_backward(const T* p, const T* q, int64_t count, Slope<float> slope, T* grad_p, T* grad_q,
                                 bool around_caches) {
  using V = Simd<Bytes>;
  int64_t i = 0;
  if (around_caches) {  // from the first whole vector on
    const auto misplaced = reinterpret_cast<uintptr_t>(grad_p ? grad_p : grad_q) % Bytes / sizeof(T);
    if (misplaced) {
      i = std::min<int64_t>(count, Bytes / sizeof(T) - misplaced);
      backward_part<Bytes>(p, q, 0, i, slope, grad_p, grad_q);
    }
  }
  for (; i + V::kStep <= count; i += V::kStep) {
    backward_step<Bytes>(V::load(p + i), V::load(q + i), slope, grad_p ? grad_p + i : nullptr,
                         grad_q ? grad_q + i : nullptr, around_caches);
  }
  if (i < count) backward_part<Bytes>(p, q, i, count, slope, grad_p, grad_q);
}

template <int Bytes>
VTW_INLINE void segment_backward(const double* p, const double* q, int64_t count, Slope<double> s, double* grad_p,
                                 double* grad_q, bool) {
  for (int64_t i = 0; i < count; ++i) {
    const double scale = s.inverse_temperature;
    const double e_p = p[i] == -INFINITY ? 0 : std::exp((p[i] - s.m_p) * scale);
    const double e_q = q[i] == -INFINITY ? 0 : std::exp((q[i] - s.m_q) * scale);
    if (grad_p) grad_p[i] = e_p == 0 ? 0 : (s.level + s.tilt * (p[i] - q[i])) * e_p;
    if (grad_q) grad_q[i] = s.to_q * e_q - s.to_p * e_p;
  }
}

// --- one build, three vector sets ------------------------------------------------------------------------------------

template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
using ForwardFn = void (*)(const T* const*, const T* const*, int64_t, int64_t, double, State* const*);
template <typename T>
using BackwardFn = void (*)(const T*, const T*, int64_t, Slope<Real<T>>, T*, T*, bool);

template <typename T>
void forward_default(const T* const* p, const T* const* q, int64_t pairs, int64_t n, double c, State* const* states) {
  segment_states<16>(p, q, pairs, n, c, states);
}
template <typename T>
void backward_default(const T* p, const T* q, int64_t n, Slope<Real<T>> s, T* grad_p, T* grad_q, bool around) {
  segment_backward<16>(p, q, n, s, grad_p, grad_q, around);
}

#if defined(__x86_64__)
template <typename T>
VTW_AVX2 void forward_avx2(const T* const* p, const T* const* q, int64_t pairs, int64_t n, double c,
                           State* const* states) {
  segment_states<32>(p, q, pairs, n, c, states);
}
template <typename T>
VTW_AVX2 void backward_avx2(const T* p, const T* q, int64_t n, Slope<Real<T>> s, T* grad_p, T* grad_q, bool around) {
  segment_backward<32>(p, q, n, s, grad_p, grad_q, around);
}
template <typename T>
VTW_AVX512 void forward_avx512(const T* const* p, const T* const* q, int64_t pairs, int64_t n, double c,
                               State* const* states) {
  segment_states<64>(p, q, pairs, n, c, states);
}
template <typename T>
VTW_AVX512 void backward_avx512(const T* p, const T* q, int64_t n, Slope<Real<T>> s, T* grad_p, T* grad_q,
                                bool around) {
  segment_backward<64>(p, q, n, s, grad_p, grad_q, around);
}
#endif

template <typename T>
ForwardFn<T> choose_forward() {
#if defined(__x86_64__)
  if (cpu_capability() == CpuCapability::kAvx512) return forward_avx512<T>;
  if (cpu_capability() == CpuCapability::kAvx2) return forward_avx2<T>;
#endif
  return forward_default<T>;
}

template <typename T>
BackwardFn<T> choose_backward() {
#if defined(__x86_64__)
  if (cpu_capability() == CpuCapability::kAvx512) return backward_avx512<T>;
  if (cpu_capability() == CpuCapability::kAvx2) return backward_avx2<T>;
#endif
  return backward_default<T>;
}

// --- rows ------------------------------------------------------------------------------------------------------------

// Two tensors [..., V] whose leading dimensions broadcast, as pairs of rows; nothing is expanded.
struct RowPairs {
  Tensor p, q;
  std::vector<int64_t> shape;  // leading dimensions
  int64_t rows = 1, vocabulary = 0;
  std::vector<int64_t> p_offsets, q_offsets;  // per row, in elements

  RowPairs(const Tensor& p_logits, const Tensor& q_logits) : p(unit_stride(p_logits)), q(unit_stride(q_logits)) {
    vocabulary = p.size(p.dim() - 1);
    const int64_t rank = std::max(p.dim(), q.dim()) - 1;
    shape.assign(rank, 1);
    for (int64_t d = 0; d < rank; ++d) {
      const int64_t in_p = size_at(p, d, rank), in_q = size_at(q, d, rank);
      shape[d] = in_p == 1 ? in_q : in_p;
      rows *= shape[d];
    }
    p_offsets = offsets(p);
    q_offsets = offsets(q);
  }

  int64_t segments() const { return std::max<int64_t>(1, (vocabulary + kSegment - 1) / kSegment); }

  // Where groups of at most kSharing pairs begin that have one row of p, or one of q, and where the last one ends.
  std::vector<int64_t> sharing() const {
    std::vector<int64_t> first{0};
    first.reserve(rows + 1);
    for (int64_t begin = 0, end; begin < rows; begin = end) {
      end = std::max(end_of_run(p_offsets, begin), end_of_run(q_offsets, begin));
      const int64_t groups = (end - begin + kSharing - 1) / kSharing;  // of like size, as threads take the same number
      for (int64_t i = 1; i <= groups; ++i) first.push_back(begin + (end - begin) * i / groups);
    }
    return first;
  }

 private:
  static Tensor unit_stride(const Tensor& x) {
    return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
  }

  static int64_t end_of_run(const std::vector<int64_t>& offsets, int64_t begin) {
    const auto differs = [&](int64_t offset) { return offset != offsets[begin]; };
    return std::find_if(offsets.begin() + begin, offsets.end(), differs) - offsets.begin();
  }

  static int64_t size_at(const Tensor& x, int64_t d, int64_t rank) {
    const int64_t own = d - (rank - (x.dim() - 1));
    return own < 0 ? 1 : x.size(own);
  }

  std::vector<int64_t> offsets(const Tensor& x) const {
    std::vector<int64_t> result(rows, 0);
    const int64_t rank = static_cast<int64_t>(shape.size());
    int64_t inner = rows;
    for (int64_t d = 0; d < rank && rows > 0; ++d) {
      inner /= shape[d];
      if (size_at(x, d, rank) == 1) continue;
      const int64_t stride = x.stride(d - (rank - (x.dim() - 1)));
      for (int64_t row = 0; row < rows; ++row) result[row] += row / inner % shape[d] * stride;
    }
    return result;
  }
};

// Calls work(i, segment) for every segment of `count` rows, or groups of them, in parallel.
template <typename Work>
void for_each_segment(const RowPairs& pairs, int64_t count, const Work& work) {
  const int64_t segments = pairs.segments();
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(pairs.vocabulary, kSegment) + kSegmentCost));
  torch::stable::parallel_for(0, count * segments, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i / segments, i % segments);
    finish_streams();
  });
}

template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& p_logits, const Tensor& q_logits, double temperature,
                                   ScalarType result_type) {
  const RowPairs pairs(p_logits, q_logits);
  std::vector<int64_t> state_shape = pairs.shape;
  state_shape.push_back(5);
  Tensor kl = allocate(p_logits, pairs.shape, result_type);
  Tensor state = allocate(p_logits, state_shape, result_type);
  const auto* p = static_cast<const T*>(pairs.p.const_data_ptr());
  const auto* q = static_cast<const T*>(pairs.q.const_data_ptr());

  const int64_t segments = pairs.segments();
  std::vector<State> partial(pairs.rows * segments);
  const ForwardFn<T> segment_fn = choose_forward<T>();
  const std::vector<int64_t> groups = pairs.sharing();
  for_each_segment(pairs, static_cast<int64_t>(groups.size()) - 1, [&](int64_t group, int64_t segment) {
    const int64_t begin = segment * kSegment, first = groups[group], count = groups[group + 1] - first;
    const T *p_rows[kSharing], *q_rows[kSharing];
    State* states[kSharing];
    for (int64_t i = 0; i < count; ++i) {
      p_rows[i] = p + pairs.p_offsets[first + i] + begin;
      q_rows[i] = q + pairs.q_offsets[first + i] + begin;
      states[i] = &partial[(first + i) * segments + segment];
    }
    segment_fn(p_rows, q_rows, count, std::min(kSegment, pairs.vocabulary - begin), 1.0 / temperature, states);
  });

  auto* kl_data = static_cast<Real<T>*>(kl.mutable_data_ptr());
  auto* state_data = static_cast<Real<T>*>(state.mutable_data_ptr());
  for (int64_t row = 0; row < pairs.rows; ++row) {
    State whole = partial[row * segments];
    for (int64_t i = 1; i < segments; ++i) whole.merge(partial[row * segments + i]);
    kl_data[row] = static_cast<Real<T>>(whole.divergence());
    std::copy_n(round_state<Real<T>>(whole).data(), 5, state_data + row * 5);
  }
  return {kl, state};
}

// Whether gradients are written around the caches: not those of 16 bits, which are limited by arithmetic and not by
// memory. Both tensors have to be aligned alike, so that their rows are; torch aligns its tensors.
template <typename T>
bool go_around_caches(const Tensor& grad_p, const Tensor& grad_q) {
  const auto bytes = [](const Tensor& x) { return x.numel() * static_cast<int64_t>(x.element_size()); };
  const auto aligned = [](const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 64 == 0; };
  return std::is_same_v<T, float> && bytes(grad_p) + bytes(grad_q) > kStreamBytes && aligned(grad_p) && aligned(grad_q);
}

// Whether nothing depends on a row, by the gradient of its state. Such a row has no gradient, even if it holds a NaN.
template <typename R>
bool counts_for_nothing(const R* g) {
  return g[1] == 0 && g[2] == 0 && g[4] == 0;
}

// The gradient of the state `s` of a row whose divergence has the gradient `weight`. The maxima get none: what the
// divergence gains through them it loses through the exponentials that they scale.
template <typename R>
void weigh_row(const R* s, R weight, R* gradient) {
  const R values[5] = {0, -weight / s[1] * (s[2] / s[1] + 1), weight / s[1], 0, weight / s[4]};
  for (int i = 0; i < 5; ++i) gradient[i] = weight == 0 ? R(0) : values[i];
}

// Calls gradient_of(row, to) for the gradient of a row's state.
template <typename T, typename GradientOf>
std::tuple<Tensor, Tensor> backward(const RowPairs& pairs, const Real<T>* states, const GradientOf& gradient_of,
                                    const Tensor& like, double temperature, bool need_p, bool need_q) {
  using R = Real<T>;
  std::vector<int64_t> shape = pairs.shape;
  shape.push_back(pairs.vocabulary);
  const std::vector<int64_t> nothing{0};
  Tensor grad_p = allocate(like, need_p ? shape : nothing);
  Tensor grad_q = allocate(like, need_q ? shape : nothing);
  const auto* p = static_cast<const T*>(pairs.p.const_data_ptr());
  const auto* q = static_cast<const T*>(pairs.q.const_data_ptr());
  auto* to_p = need_p ? static_cast<T*>(grad_p.mutable_data_ptr()) : nullptr;
  auto* to_q = need_q ? static_cast<T*>(grad_q.mutable_data_ptr()) : nullptr;

  const bool around_caches = go_around_caches<T>(grad_p, grad_q);
  const BackwardFn<T> segment_fn = choose_backward<T>();
  for_each_segment(pairs, pairs.rows, [&](int64_t row, int64_t segment) {
    const int64_t begin = segment * kSegment;
    const int64_t count = std::min(kSegment, pairs.vocabulary - begin);
    const int64_t at = row * pairs.vocabulary + begin;
    R gradient[5];
    gradient_of(row, gradient);
    if (counts_for_nothing(gradient)) {
      if (to_p) std::fill_n(to_p + at, count, T(0));
      if (to_q) std::fill_n(to_q + at, count, T(0));
      return;
    }
    const Slope<R> slope(states + row * 5, gradient, static_cast<R>(temperature));
    segment_fn(p + pairs.p_offsets[row] + begin, q + pairs.q_offsets[row] + begin, count, slope,
               to_p ? to_p + at : nullptr, to_q ? to_q + at : nullptr, around_caches);
  });
  return {grad_p, grad_q};
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& p_logits, const Tensor& q_logits,
                                    const Tensor& state, double temperature, bool need_p, bool need_q) {
  using R = Real<T>;
  const RowPairs pairs(p_logits, q_logits);
  std::vector<int64_t> shape = pairs.shape;
  shape.push_back(5);
  check_row_states("state", state, shape, p_logits);
  const bool of_divergence = check_gradient(grad, shape, p_logits);
  const Tensor states = torch::stable::contiguous(state), grads = torch::stable::contiguous(grad);
  const auto* s = static_cast<const R*>(states.const_data_ptr());
  const auto* g = static_cast<const R*>(grads.const_data_ptr());
  const auto gradient_of = [&](int64_t row, R* to) {
    if (of_divergence) {
      weigh_row(s + row * 5, g[row], to);
    } else {
      std::copy_n(g + row * 5, 5, to);
    }
  };
  return backward<T>(pairs, s, gradient_of, p_logits, temperature, need_p, need_q);
}

// --- forward and backward at once ------------------------------------------------------------------------------------

// The divergence and the gradients of Σ weight·KL; without weights, of the mean. A thread takes whole rows, so that the
// backward of a row finds it in the cache. If there are fewer rows than threads, threads share the rows instead, in a
// forward of all rows and then a backward of all: so few rows stay in the caches in between.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> with_gradients(const Tensor& p_logits, const Tensor& q_logits,
                                                  const std::optional<Tensor>& weight, double temperature, bool need_p,
                                                  bool need_q) {
  using R = Real<T>;
  const RowPairs pairs(p_logits, q_logits);
  const auto type = real_type(p_logits.scalar_type());
  if (weight) check_row_states("weight", *weight, pairs.shape, p_logits, "kl_divergence_with_gradients");
  const Tensor weights = weight ? torch::stable::contiguous(*weight) : allocate(p_logits, {0}, type);
  const R* each = weight ? static_cast<const R*>(weights.const_data_ptr()) : nullptr;
  const R mean = static_cast<R>(1.0 / pairs.rows);
  const auto weight_of = [&](int64_t row) { return each ? each[row] : mean; };

  if (!(need_p || need_q) || pairs.rows < torch::stable::get_num_threads()) {
    auto [kl, state] = forward<T>(p_logits, q_logits, temperature, type);
    const auto* states = static_cast<const R*>(state.const_data_ptr());
    const auto gradient_of = [&](int64_t row, R* to) { weigh_row(states + row * 5, weight_of(row), to); };
    auto [grad_p, grad_q] = backward<T>(pairs, states, gradient_of, p_logits, temperature, need_p, need_q);
    return {kl, grad_p, grad_q};
  }

  std::vector<int64_t> shape = pairs.shape;
  Tensor kl = allocate(p_logits, shape, type);
  shape.push_back(pairs.vocabulary);
  const std::vector<int64_t> nothing{0};
  Tensor grad_p = allocate(p_logits, need_p ? shape : nothing);
  Tensor grad_q = allocate(q_logits, need_q ? shape : nothing);
  const auto* p_data = static_cast<const T*>(pairs.p.const_data_ptr());
  const auto* q_data = static_cast<const T*>(pairs.q.const_data_ptr());
  auto* kl_data = static_cast<R*>(kl.mutable_data_ptr());
  auto* grad_p_data = need_p ? static_cast<T*>(grad_p.mutable_data_ptr()) : nullptr;
  auto* grad_q_data = need_q ? static_cast<T*>(grad_q.mutable_data_ptr()) : nullptr;
  const bool around_caches = go_around_caches<T>(grad_p, grad_q);
  const ForwardFn<T> forward_fn = choose_forward<T>();
  const BackwardFn<T> backward_fn = choose_backward<T>();

  const auto work = [&](int64_t row) {
    const T *p = p_data + pairs.p_offsets[row], *q = q_data + pairs.q_offsets[row];
    const int64_t n = pairs.vocabulary;
    State whole;
    for (int64_t i = 0; i < n; i += kSegment) {
      State segment, *const state = &segment;
      const T *const x = p + i, *const y = q + i;
      forward_fn(&x, &y, 1, std::min(kSegment, n - i), 1.0 / temperature, &state);
      whole.merge(segment);
    }
    kl_data[row] = static_cast<R>(whole.divergence());
    T* to_p = grad_p_data ? grad_p_data + row * n : nullptr;
    T* to_q = grad_q_data ? grad_q_data + row * n : nullptr;
    const std::array<R, 5> state = round_state<R>(whole);
    R gradient[5];
    weigh_row(state.data(), weight_of(row), gradient);
    if (counts_for_nothing(gradient)) {
      if (to_p) std::fill_n(to_p, n, T(0));
      if (to_q) std::fill_n(to_q, n, T(0));
    } else {
      backward_fn(p, q, n, Slope<R>(state.data(), gradient, static_cast<R>(temperature)), to_p, to_q, around_caches);
    }
  };
  const int64_t grain = std::max<int64_t>(1, kGrain / kBackwardCost / (pairs.vocabulary + kSegmentCost));
  torch::stable::parallel_for(0, pairs.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
    finish_streams();
  });
  return {kl, grad_p, grad_q};
}

// --- ops -------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> kl_divergence_with_state(const Tensor& p_logits, const Tensor& q_logits,
                                                    double temperature) {
  check_logits("kl_divergence", p_logits, q_logits, temperature);
  const auto dtype = p_logits.scalar_type();
  const auto result_type = real_type(dtype);
  VTW_DISPATCH_LOGITS(dtype, Half, BFloat16, forward<T>(p_logits, q_logits, temperature, result_type));
}

std::tuple<Tensor, Tensor> kl_divergence_backward(const Tensor& grad, const Tensor& p_logits, const Tensor& q_logits,
                                                  const Tensor& state, double temperature, bool need_p, bool need_q) {
  check_logits("kl_divergence_backward", p_logits, q_logits, temperature);
  VTW_DISPATCH_LOGITS(p_logits.scalar_type(), Half, BFloat16,
                      backward<T>(grad, p_logits, q_logits, state, temperature, need_p, need_q));
}

std::tuple<Tensor, Tensor, Tensor> kl_divergence_with_gradients(const Tensor& p_logits, const Tensor& q_logits,
                                                                const std::optional<Tensor>& weight, double temperature,
                                                                bool need_p, bool need_q) {
  check_logits("kl_divergence_with_gradients", p_logits, q_logits, temperature);
  VTW_DISPATCH_LOGITS(p_logits.scalar_type(), Half, BFloat16,
                      with_gradients<T>(p_logits, q_logits, weight, temperature, need_p, need_q));
}

template <typename T>
void scale(const Tensor& x, const Tensor& factor) {
  const Real<T> by = *static_cast<const Real<T>*>(factor.const_data_ptr());
  if (by == 1) return;
  auto* data = static_cast<T*>(x.mutable_data_ptr());
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] = static_cast<T>(data[i] * by);
  });
}

void scale_(const std::vector<Tensor>& tensors, const Tensor& factor) {
  check_scaled(tensors, factor);
  for (const Tensor& x : tensors) {
    [&] { VTW_DISPATCH_LOGITS(x.scalar_type(), Half, BFloat16, scale<T>(x, factor)); }();
  }
}

template <typename R>
Tensor merge(const std::vector<Tensor>& states) {
  std::vector<Tensor> parts;
  for (const Tensor& state : states) parts.push_back(torch::stable::contiguous(state));
  const std::vector<int64_t> shape(states[0].sizes().begin(), states[0].sizes().end());
  Tensor result = allocate(states[0], shape);
  auto* to = static_cast<R*>(result.mutable_data_ptr());
  std::vector<const R*> from;
  for (const Tensor& part : parts) from.push_back(static_cast<const R*>(part.const_data_ptr()));
  torch::stable::parallel_for(0, result.numel() / 5, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      State whole;
      for (const R* part : from) whole.merge(read_state(part + row * 5));
      std::copy_n(round_state<R>(whole).data(), 5, to + row * 5);
    }
  });
  return result;
}

Tensor merge_kl_states(const std::vector<Tensor>& states) {
  check_states(states);
  return states[0].scalar_type() == ScalarType::Double ? merge<double>(states) : merge<float>(states);
}

template <typename R>
Tensor from_state(const Tensor& state) {
  const Tensor states = torch::stable::contiguous(state);
  std::vector<int64_t> shape(state.sizes().begin(), state.sizes().end());
  shape.pop_back();
  Tensor kl = allocate(state, shape);
  const auto* from = static_cast<const R*>(states.const_data_ptr());
  auto* to = static_cast<R*>(kl.mutable_data_ptr());
  torch::stable::parallel_for(0, kl.numel(), kRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) to[row] = static_cast<R>(read_state(from + row * 5).divergence());
  });
  return kl;
}

Tensor kl_from_state(const Tensor& state) {
  check_state("kl_from_state", "state", state);
  return state.scalar_type() == ScalarType::Double ? from_state<double>(state) : from_state<float>(state);
}

}  // namespace
}  // namespace vtw

STABLE_TORCH_LIBRARY_IMPL(vtw_kernels, CPU, m) {
  if (!vtw::backend_enabled("cpu")) return;
  m.impl("kl_divergence_with_state", TORCH_BOX(&vtw::kl_divergence_with_state));
  m.impl("kl_divergence_backward", TORCH_BOX(&vtw::kl_divergence_backward));
  m.impl("kl_divergence_with_gradients", TORCH_BOX(&vtw::kl_divergence_with_gradients));
  m.impl("scale_", TORCH_BOX(&vtw::scale_));
  m.impl("merge_kl_states", TORCH_BOX(&vtw::merge_kl_states));
  m.impl("kl_from_state", TORCH_BOX(&vtw::kl_from_state));
}
