// KL divergence on the GPU: one read of each pair of rows forward, and one read and one write backward.
//
// A row is read by one block or by several; the sums of threads, warps and blocks are merged in an order that is fixed
// by their indices. So a result has the same bits in every run, whichever block or thread comes first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cluster.cuh"
#include "kl_state.h"
#include "launch.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#endif

namespace vtw::cuda::kl {

constexpr double kLog2e = 1.4426950408889634;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr unsigned kMaxCluster = 8;  // what every device with clusters can do

// fp64 logits are computed in fp64, all others in fp32.
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

// --- numbers ---------------------------------------------------------------------------------------------------------

// One instruction, with a relative error of 2^-22.5; what would be subnormal is 0.
__device__ inline float power_of_2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}
__device__ inline double power_of_2(double x) { return exp2(x); }

__device__ inline float to_real(float x) { return x; }
__device__ inline double to_real(double x) { return x; }
__device__ inline float to_real(__half x) { return __half2float(x); }
__device__ inline float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void round_to(float& to, float x) { to = x; }
__device__ inline void round_to(double& to, double x) { to = x; }
__device__ inline void round_to(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Rounded here: were the compiler to fuse it into a sum of p and not into that of q, equal rows would not give exactly
// 0.
__device__ inline float product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double product(double x, double y) { return __dmul_rn(x, y); }

// --- states ----------------------------------------------------------------------------------------------------------

// KL(p‖q) = a/z_p - (m_p + ln z_p) + (m_q + ln z_q); see vtw_kernels/ops/kl_divergence.py. While a row is read, m and a
// are those of the logits as they are; the temperature divides them at the end. The sums of p, z_p and a, are in units
// of kUnit everywhere but in a tensor.
template <typename R>
struct State {
  R m_p, z_p, a, m_q, z_q;

  __host__ __device__ static State empty() { return {R(-INFINITY), 0, 0, R(-INFINITY), 0}; }
};

// The weight of sums relative to e^m among those relative to e^top, where e^x is 2^(x·scale). An empty or all -inf part
// has z = 0 and a = 0 and weighs nothing, where -inf - -inf would make it NaN.
template <typename R>
__device__ R weight_of(R m, R top, R scale) {
  return m == R(-INFINITY) ? R(0) : m == top ? R(1) : power_of_2((m - top) * scale);
}

// An infinite divergence stays infinite, however small the probability that carries it has become.
template <typename R>
__device__ R weigh(R a, R weight) {
  return a == R(INFINITY) ? a : a * weight;
}

template <typename R>
__device__ State<R> merge(const State<R>& x, const State<R>& y, R scale) {
  const R m_p = fmax(x.m_p, y.m_p), m_q = fmax(x.m_q, y.m_q);
  const R x_p = weight_of(x.m_p, m_p, scale), y_p = weight_of(y.m_p, m_p, scale);
  const R x_q = weight_of(x.m_q, m_q, scale), y_q = weight_of(y.m_q, m_q, scale);
  return {m_p, product(x.z_p, x_p) + product(y.z_p, y_p), weigh(x.a, x_p) + weigh(y.a, y_p), m_q,
          product(x.z_q, x_q) + product(y.z_q, y_q)};
}

template <typename R>
__device__ R warp_max(R x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

template <typename R>
__device__ R warp_sum(R x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// The states of a warp's lanes as one. The maxima first: then each lane rescales once, and the rest are plain sums.
template <typename R>
__device__ State<R> warp_merge(const State<R>& x, R scale) {
  const R m_p = warp_max(x.m_p), m_q = warp_max(x.m_q);
  const R weight_p = weight_of(x.m_p, m_p, scale), weight_q = weight_of(x.m_q, m_q, scale);
  return {m_p, warp_sum(product(x.z_p, weight_p)), warp_sum(weigh(x.a, weight_p)), m_q,
          warp_sum(product(x.z_q, weight_q))};
}

// The states of a block's threads as one; only warp 0 gets it.
template <typename R>
__device__ State<R> block_merge(State<R> x, R scale) {
  __shared__ State<R> of_warp[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = warp_merge(x, scale);
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  if (warp == 0) x = warp_merge(lane < int(blockDim.x) / kWarp ? of_warp[lane] : State<R>::empty(), scale);
  return x;
}

// The states of a cluster's blocks as one, in warp 0 of each of them.
template <typename R>
__device__ State<R> cluster_merge(State<R> x, R scale) {
#if VTW_CLUSTERS
  __shared__ State<R> of_block;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) of_block = x;
  cluster.sync();  // all states are there
  if (threadIdx.x < kWarp) {
    x = State<R>::empty();
    if (threadIdx.x < cluster.num_blocks()) x = *cluster.map_shared_rank(&of_block, threadIdx.x);
    x = warp_merge(x, scale);
  }
  cluster.sync();  // no block leaves while its state is being read
#endif
  return x;
}

// In fp64, which keeps what the subtraction of two log-sum-exps of some tens would round away. Rounding may still leave
// a hair below 0, which no divergence is; the comparison lets NaN through.
__device__ inline double divergence(const State<double>& s) {
  const double kl = s.a / s.z_p + ((s.m_q - s.m_p) + log(s.z_q / (s.z_p * kUnit)));
  return kl < 0 ? 0 : kl;
}

// --- a thread's sums -------------------------------------------------------------------------------------------------

constexpr int kHeadroom = 6;  // in powers of 2

// e^(x/temperature) is 2^(x·scale).
template <typename R>
struct Exponent {
  R scale, headroom;  // headroom is of the logits: headroom·scale = kHeadroom
  double inverse;     // of the temperature: where a row ends, one thread divides, and all wait for it

  explicit Exponent(double temperature)
      : scale(static_cast<R>(kLog2e / temperature)),
        headroom(static_cast<R>(kHeadroom / kLog2e * temperature)),
        inverse(1 / temperature) {}
};

// One side of the pair. The sum of exponentials is relative to an *origin*, which stays where it is until a logit
// outgrows it: so a new maximum costs nothing. It starts a little above the maximum of the first vector, and what
// exceeds it by as much again moves it; in between, an exponent is small and rounds little.
//
// e^((x - origin)/temperature) is 2^(x·scale - shift)·mend, where shift is origin·scale, rounded, and mend, a number
// next to 1, is what the rounding took; it also brings the sums to their unit. That is one FMA and one exponential per
// logit, and a multiplication per vector.
template <typename R>
struct Side {
  R m = -INFINITY;
  R origin = -INFINITY, shift = NAN, mend = 1;  // the NaN sends the first vector to add_carefully
  R z = 0;
  const R per_unit;

  __device__ explicit Side(double unit) : per_unit(static_cast<R>(1 / unit)) {}

  // Moves the origin above the maximum, if that has outgrown it, and returns the weight of what has been summed so far.
  __device__ R move_origin(R scale, R headroom) {
    if (m <= origin) return 1;
    const R top = m + headroom, weight = weight_of(origin, top, scale);
    z = product(z, weight);
    origin = top;
    shift = top * scale;
    // Beyond this, rounding alone would take the exponential far from where it should be.
    if (!(fabs(shift) < R(1 << 20))) shift = NAN;
    mend = per_unit * power_of_2(-fma(top, scale, -shift));
    return weight;
  }
};

template <typename R>
struct Sums {
  R scale, headroom;
  Side<R> p{kUnit}, q{1};
  R a = 0;

  __device__ explicit Sums(const Exponent<R>& e) : scale(e.scale), headroom(e.headroom) {}

  // The plain way is right as long as all is finite and of a moderate size. If anything is not, it shows in the sums,
  // and the pairs are added again with care.
  template <int count>
  __device__ void add(const R (&x)[count], const R (&y)[count]) {
    R z_p = 0, z_q = 0, weighted = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      p.m = fmax(p.m, x[i]);
      q.m = fmax(q.m, y[i]);
      const R e_p = power_of_2(fma(x[i], scale, -p.shift));
      const R e_q = power_of_2(fma(y[i], scale, -q.shift));
      z_p += e_p;
      z_q += e_q;
      weighted = fma(e_p, x[i] - y[i], weighted);
    }
    weighted = fma(weighted, p.mend, a);
    if (z_p + z_q < R(1 << kHeadroom) && fabs(weighted) < R(0x1p100)) {
      p.z = fma(z_p, p.mend, p.z);
      q.z = fma(z_q, q.mend, q.z);
      a = weighted;
    } else {
      add_carefully(x, y);
    }
  }

  // p = -inf            adds nothing, whatever q is;
  // q = -inf < p        adds +inf, even where e^(p - m_p) has underflowed to 0;
  // e^(p - m_p) = 0     adds nothing to any other q;
  // NaN, +inf           make z NaN, as +inf - +inf is.
  template <int count>
  __device__ void add_carefully(const R (&x)[count], const R (&y)[count]) {
    a = weigh(a, p.move_origin(scale, headroom));
    q.move_origin(scale, headroom);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const R e_p = x[i] == R(-INFINITY) ? R(0) : power_of_2((x[i] - p.origin) * scale);
      const R e_q = y[i] == R(-INFINITY) ? R(0) : power_of_2((y[i] - q.origin) * scale);
      const R difference = x[i] * p.per_unit - y[i] * p.per_unit;  // which would overflow without
      const R term = y[i] == R(-INFINITY) ? R(INFINITY) : e_p == 0 ? R(0) : e_p * difference;
      p.z += e_p * p.per_unit;
      q.z += e_q;
      a += x[i] == R(-INFINITY) ? R(0) : term;
    }
  }

  __device__ State<R> state() const {
    const R weight_p = weight_of(p.origin, p.m, scale), weight_q = weight_of(q.origin, q.m, scale);
    return {p.m, product(p.z, weight_p), weigh(a, weight_p), q.m, product(q.z, weight_q)};
  }
};

// --- rows ------------------------------------------------------------------------------------------------------------

// Two tensors [..., V] whose leading dimensions broadcast, as pairs of rows; nothing is expanded. Strides are in
// elements; offsets are 64-bit, as strides and indices multiply to more than 2^32.
template <typename T>
struct Pairs {
  static constexpr int kDims = 16;
  struct Dim {
    uint32_t size;
    int64_t p_stride, q_stride;
  };

  const T *p, *q;
  int64_t vocabulary, p_step, q_step;
  uint32_t rows;
  int dims;  // leading dimensions, innermost first
  Dim dim[kDims];
};

template <typename T>
struct Row {
  const T *p, *q;
  int64_t p_step, q_step;

  __device__ Row(const Pairs<T>& pairs, uint32_t row)
      : p(pairs.p), q(pairs.q), p_step(pairs.p_step), q_step(pairs.q_step) {
#pragma unroll 1
    for (int d = 0; d < pairs.dims; ++d) {
      const uint32_t index = d + 1 < pairs.dims ? row % pairs.dim[d].size : row;  // most often there is one dimension
      p += index * pairs.dim[d].p_stride;
      q += index * pairs.dim[d].q_stride;
      if (d + 1 < pairs.dims) row /= pairs.dim[d].size;
    }
  }
};

template <typename T>
constexpr int kLanes = sizeof(uint4) / sizeof(T);

template <typename T>
__device__ void unpack(const uint4& bits, Real<T> (&to)[kLanes<T>]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // The upper half of an fp32: one instruction each, where a conversion takes two.
    const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
    }
  } else {
    T x[kLanes<T>];
    memcpy(x, &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) to[i] = to_real(x[i]);
  }
}

// One element, or an aligned vector.
template <typename T, int count>
__device__ void store(T* to, const T (&x)[count]) {
  if constexpr (count == 1) {
    *to = x[0];
  } else {
    uint4 bits;
    memcpy(&bits, x, sizeof(bits));
    __stcg(reinterpret_cast<uint4*>(to), bits);  // an assignment may be taken apart
  }
}

__device__ inline unsigned misalignment(const void* address) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(address) % 16);
}

// 16 bytes that start `skip` bytes into the 32 of `low` and `high`.
__device__ inline uint4 take(uint4 low, uint4 high, unsigned skip) {
  uint32_t words[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (skip & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  }
  if (skip & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  }
  const unsigned bits = skip % 4 * 8;
  return {__funnelshift_r(words[0], words[1], bits), __funnelshift_r(words[1], words[2], bits),
          __funnelshift_r(words[2], words[3], bits), __funnelshift_r(words[3], words[4], bits)};
}

// Vectors on their way, which need no registers until they are there: 16-byte slots in shared memory, some for each
// thread, so that no thread waits for another. In flight per block: 24 KB.
constexpr int kSlots = 8;
__device__ inline uint4* own_slot(unsigned i) {
  __shared__ uint4 slots[kSlots][kMaxThreads];
  return &slots[i][threadIdx.x];
}

// A stretch of a pair of rows as vectors, shared among the threads of the block.
//
// A row of odd size starts anywhere, and p, q and the gradients each at another place. So a vector that isn't aligned
// is cut out of the two aligned ones that it lies in, which takes twice the slots.
template <typename T, bool kAligned>
struct Stream {
  static constexpr int kPerRow = kAligned ? 1 : 2, kStages = kSlots / (2 * kPerRow);

  const T *p, *q;  // the first vectors
  unsigned count;

  __device__ static uint4* slot(unsigned stage, int row) { return own_slot((stage % kStages * 2 + row) * kPerRow); }
  __device__ void fetch(const T* from, unsigned i, uint4* to) const {
    const char* address = reinterpret_cast<const char*>(from + int64_t(i) * kLanes<T>);
    for (int part = 0; part < kPerRow; ++part) {
      __pipeline_memcpy_async(to + part * kMaxThreads, address - misalignment(from) + part * sizeof(uint4),
                              sizeof(uint4));
    }
  }
  // What a thread takes at its stage-th turn. Every turn is one group, though it may be empty, so that they can be
  // counted.
  __device__ void fetch(unsigned stage) const {
    const unsigned i = threadIdx.x + stage * blockDim.x;
    if (i < count) fetch(p, i, slot(stage, 0)), fetch(q, i, slot(stage, 1));
    __pipeline_commit();
  }
  __device__ void read(const uint4* from, unsigned skip, Real<T> (&to)[kLanes<T>]) const {
    unpack<T>(kAligned ? from[0] : take(from[0], from[kMaxThreads], skip), to);
  }

  __device__ void start() const {
    for (unsigned stage = 0; stage + 1 < kStages; ++stage) fetch(stage);
  }
  // Calls visit(i, x, y) for each vector; i counts from its first element.
  template <typename Visit>
  __device__ void run(const Visit& visit) const {
    unsigned stage = 0;
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x, ++stage) {
      fetch(stage + kStages - 1);  // into the slots of the vector that was visited last
      __pipeline_wait_prior(kStages - 1);
      Real<T> x[kLanes<T>], y[kLanes<T>];
      read(slot(stage, 0), misalignment(p), x);
      read(slot(stage, 1), misalignment(q), y);
      visit(int64_t(i) * kLanes<T>, x, y);
    }
  }
};

// Calls visit(i, x, y) for all pairs of [begin, end), with x and y arrays of one pair or of a vector's. Vectors start
// at multiples of 16 bytes of `anchor`, a row of p or of the gradients; what lies before and behind them, and all of a
// row whose elements are not contiguous, goes one by one.
template <typename T, typename Visit>
__device__ void visit_pairs(const Row<T>& row, const T* anchor, int64_t begin, int64_t end, const Visit& visit) {
  const unsigned count = static_cast<unsigned>(end - begin);
  unsigned head = 0, vectors = 0;
  bool aligned = false;
  if (row.p_step == 1 && row.q_step == 1) {
    head = min((16 - misalignment(anchor + begin)) % 16 / static_cast<unsigned>(sizeof(T)), count);
    vectors = (count - head) / kLanes<T>;
    aligned = misalignment(row.p + begin + head) == 0 && misalignment(row.q + begin + head) == 0;
    // The aligned vector behind the last one may lie beyond the row, and beyond the memory; the one before the first
    // only beyond the row, for memory begins aligned.
    if (!aligned && vectors > 0) --vectors;
  }
  const int64_t first = begin + head;
  const Stream<T, true> stream{row.p + first, row.q + first, vectors};
  const Stream<T, false> any_stream{row.p + first, row.q + first, vectors};
  const auto from_first = [&](int64_t i, const auto& x, const auto& y) { visit(first + i, x, y); };

  aligned ? stream.start() : any_stream.start();
  for (unsigned j = threadIdx.x; j < count - vectors * kLanes<T>; j += blockDim.x) {
    const int64_t i = begin + (j < head ? j : j + vectors * kLanes<T>);
    const Real<T> x[] = {to_real(row.p[i * row.p_step])}, y[] = {to_real(row.q[i * row.q_step])};
    visit(i, x, y);
  }
  aligned ? stream.run(from_first) : any_stream.run(from_first);
}

// Blocks per multiprocessor that registers must leave room for: enough for 64 KB in flight. fp64 is for checks.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 1 : 4;

// A grid of rows × chunks.
struct Grid {
  uint32_t chunks;
  int64_t chunk;  // elements
  unsigned threads;
  bool cluster;  // the blocks of a row are a cluster

  struct Part {
    uint32_t row;
    int64_t begin, end;
  };
  __device__ Part part(int64_t vocabulary) const {
    const int64_t begin = min(blockIdx.x % chunks * chunk, vocabulary);
    return {blockIdx.x / chunks, begin, min(begin + chunk, vocabulary)};
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct Forward {
  Pairs<T> pairs;
  Grid grid;
  double temperature;
  Exponent<Real<T>> exponent{temperature};
  Real<T>* kl;            // [rows]
  State<Real<T>>* state;  // [rows]
  // Only where rows are split without clusters.
  State<Real<T>>* partial = nullptr;  // [rows, chunks]
  unsigned* arrived = nullptr;        // [rows], zero
};

// What a row amounts to, once the temperature is applied.
template <typename R>
__device__ State<double> apply(double inverse, const State<R>& s) {
  return {s.m_p * inverse, s.z_p, s.a * inverse, s.m_q * inverse, s.z_q};
}

// As a tensor has it.
template <typename R>
__device__ State<R> rounded(const State<double>& s) {
  return rounded_state<R, State<R>>(s.m_p, s.z_p * kUnit, s.a, s.m_q, s.z_q);
}

template <typename R>
__device__ State<double> from_tensor(const State<R>& s) {
  return {s.m_p, s.z_p / kUnit, s.a / kUnit, s.m_q, s.z_q};
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>) forward_kernel(const __grid_constant__ Forward<T> f) {
  using R = Real<T>;
  const auto [row, begin, end] = f.grid.part(f.pairs.vocabulary);
  const R scale = f.exponent.scale;
  Sums<R> sums(f.exponent);
  const Row<T> logits(f.pairs, row);
  visit_pairs(logits, logits.p, begin, end, [&](int64_t, const auto& x, const auto& y) { sums.add(x, y); });
  State<R> whole = block_merge(sums.state(), scale);

  if (f.grid.cluster) {
    whole = cluster_merge(whole, scale);
    if (begin > 0) return;
  } else if (f.grid.chunks > 1) {
    // Whichever block of the row comes last merges the states of all, in the order of their chunks. The fences order
    // each state before its count, and the last count before the states that are read then.
    __shared__ bool last;
    if (threadIdx.x == 0) {
      f.partial[blockIdx.x] = whole;
      __threadfence();
      last = atomicAdd(&f.arrived[row], 1u) == f.grid.chunks - 1;
    }
    __syncthreads();  // `last` is read by the other threads
    if (!last || threadIdx.x >= kWarp) return;
    __threadfence();
    whole = State<R>::empty();
    const State<R>* partial = f.partial + row * int64_t(f.grid.chunks);
    for (uint32_t i = threadIdx.x; i < f.grid.chunks; i += kWarp) whole = merge(whole, partial[i], scale);
    whole = warp_merge(whole, scale);
  }
  if (threadIdx.x == 0) {
    const State<double> s = apply(f.exponent.inverse, whole);
    f.kl[row] = static_cast<R>(divergence(s));
    f.state[row] = rounded<R>(s);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// What a row's logits need to get their gradients:
//   dp = (g_zp + g_a (p - q + 1)) e^(p - m_p) / temperature,  dq = (g_zq e^(q - m_q) - g_a e^(p - m_p)) / temperature.
//
// All that is the same for a whole row is multiplied beforehand. Exponentials are those of Side, with one FMA each,
// unless the maxima are too large for that.
template <typename R>
struct Slope {
  R m_p, m_q, scale, shift_p, shift_q;
  R constant, per_difference, times_p;  // dp = (constant + per_difference (p - q)) times_p e_p
  R of_q, of_p;                         // dq = of_q e_q - of_p e_p
  bool none;                            // a row that counts for nothing has no gradient, not even that of a NaN
  bool moderate;

  // `gradient` is that of the state.
  __device__ Slope(const State<R>& state, const State<R>& gradient, double temperature)
      : none(gradient.z_p == 0 && gradient.a == 0 && gradient.z_q == 0) {
    const R inverse = 1 / static_cast<R>(temperature);
    scale = static_cast<R>(kLog2e) * inverse;
    // The state's maxima are those of the scaled logits. Where all is -inf any finite number will do: e^x is 0.
    m_p = state.m_p == R(-INFINITY) ? R(0) : state.m_p * static_cast<R>(temperature);
    m_q = state.m_q == R(-INFINITY) ? R(0) : state.m_q * static_cast<R>(temperature);
    shift_p = m_p * scale;
    shift_q = m_q * scale;
    moderate = fabs(shift_p) < R(1 << 20) && fabs(shift_q) < R(1 << 20);
    const R mend_p = moderate ? power_of_2(-fma(m_p, scale, -shift_p)) : R(1);
    const R mend_q = moderate ? power_of_2(-fma(m_q, scale, -shift_q)) : R(1);
    constant = gradient.z_p + gradient.a;
    per_difference = gradient.a * inverse;
    times_p = inverse * mend_p;
    of_q = gradient.z_q * inverse * mend_q;
    of_p = gradient.a * inverse * mend_p;
  }

  // Both gradients, or one: the pointer to the other is not looked at.
  template <bool kOfP, bool kOfQ, typename T, int count>
  __device__ void write(const R (&x)[count], const R (&y)[count], T* to_p, T* to_q) const {
    R e_p[count], e_q[count];
    const auto exponentials = [&](const auto& exponent_of) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        e_p[i] = power_of_2(exponent_of(x[i], m_p, shift_p));
        if constexpr (kOfQ) e_q[i] = power_of_2(exponent_of(y[i], m_q, shift_q));
      }
    };
    if (moderate && !none) {
      exponentials([&](R logit, R, R shift) { return fma(logit, scale, -shift); });
    } else {
      exponentials([&](R logit, R m, R) { return none ? R(-INFINITY) : (logit - m) * scale; });
    }
    T dp[count], dq[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if constexpr (kOfP) {
        const R slope = fma(per_difference, x[i] - y[i], constant);
        round_to(dp[i], e_p[i] == 0 ? R(0) : slope * (times_p * e_p[i]));
      }
      if constexpr (kOfQ) round_to(dq[i], fma(of_q, e_q[i], -(of_p * e_p[i])));
    }
    if constexpr (kOfP) store(to_p, dp);
    if constexpr (kOfQ) store(to_q, dq);
  }
};

// What the rows weigh in the loss.
template <typename R>
struct Weights {
  const R* each = nullptr;  // [rows]; or null, and then
  R all = 0;

  // The gradient of a row's state. The maxima get none: what the divergence gains through them it loses through the
  // exponentials that they scale.
  __device__ State<R> gradient(uint32_t row, const State<R>& s) const {
    const R weight = each ? each[row] : all;
    if (weight == 0) return {0, 0, 0, 0, 0};
    return {0, -weight / s.z_p * (s.a / s.z_p + 1), weight / s.z_p, 0, weight / s.z_q};
  }
};

template <typename T>
struct Backward {
  Pairs<T> pairs;
  Grid grid;
  double temperature;
  const State<Real<T>>* state;     // [rows]
  const State<Real<T>>* gradient;  // [rows], of the state; or null, and then that of the divergence:
  Weights<Real<T>> weights;
  T *grad_p, *grad_q;  // [rows, V], or null
};

// Which gradients are wanted is known when the kernel is compiled: the other one would cost as much again.
template <typename T, bool kOfP, bool kOfQ>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>) backward_kernel(const __grid_constant__ Backward<T> b) {
  const auto [row, begin, end] = b.grid.part(b.pairs.vocabulary);
  const int64_t at = row * b.pairs.vocabulary;
  T* const to_p = b.grad_p + at;
  T* const to_q = b.grad_q + at;
  const State<Real<T>> state = b.state[row];
  const Slope<Real<T>> slope(state, b.gradient ? b.gradient[row] : b.weights.gradient(row, state), b.temperature);
  visit_pairs(Row<T>(b.pairs, row), kOfP ? to_p : to_q, begin, end, [&](int64_t i, const auto& x, const auto& y) {
    slope.template write<kOfP, kOfQ>(x, y, to_p + i, to_q + i);
  });
}

// --- forward and backward at once ------------------------------------------------------------------------------------

constexpr int kFusedThreads = 512;
constexpr unsigned kGroups = 4;  // in which the vectors of a row arrive, so that the first are summed before the last

template <typename T>
struct ForwardBackward {
  Pairs<T> pairs;
  double temperature;
  Exponent<Real<T>> exponent{temperature};
  uint32_t blocks;   // for each row: a cluster
  uint32_t vectors;  // for each block
  Real<T>* kl;       // [rows]
  Weights<Real<T>> weights;
  T *grad_p, *grad_q;  // [rows, V], or null
};

// Reads the logits once: the blocks of a row keep it in their shared memory, from the sums to the gradients. For rows
// of whole and aligned vectors.
template <typename T, bool kOfP, bool kOfQ>
__global__ void __launch_bounds__(kFusedThreads, sizeof(T) == 8 ? 1 : 2)
    forward_backward_kernel(const __grid_constant__ ForwardBackward<T> f) {
  using R = Real<T>;
  VTW_DYNAMIC_SHARED(uint4, slots);  // of p, then of q
  const uint32_t row = blockIdx.x / f.blocks, block = blockIdx.x % f.blocks;
  const int64_t first = block * int64_t(f.vectors), left = f.pairs.vocabulary / kLanes<T> - first;
  const unsigned count = static_cast<unsigned>(max(min(left, int64_t(f.vectors)), int64_t(0)));
  const Row<T> logits(f.pairs, row);
  const T* const p = logits.p + first * kLanes<T>;
  const T* const q = logits.q + first * kLanes<T>;

  // A thread reads only what it has fetched itself, so nobody waits for others.
  const unsigned group = (count + kGroups * blockDim.x - 1) / (kGroups * blockDim.x) * blockDim.x;
  const auto visit_group = [&](unsigned g, const auto& visit) {
    for (unsigned i = g * group + threadIdx.x; i < min((g + 1) * group, count); i += blockDim.x) visit(i);
  };
  for (unsigned g = 0; g < kGroups; ++g) {
    visit_group(g, [&](unsigned i) {
      __pipeline_memcpy_async(&slots[i], p + i * int64_t(kLanes<T>), sizeof(uint4));
      __pipeline_memcpy_async(&slots[f.vectors + i], q + i * int64_t(kLanes<T>), sizeof(uint4));
    });
    __pipeline_commit();
  }
  Sums<R> sums(f.exponent);
  for (unsigned g = 0; g < kGroups; ++g) {
    __pipeline_wait_prior(kGroups - 1 - g);
    visit_group(g, [&](unsigned i) {
      R x[kLanes<T>], y[kLanes<T>];
      unpack<T>(slots[i], x);
      unpack<T>(slots[f.vectors + i], y);
      sums.add(x, y);
    });
  }
  State<R> whole = block_merge(sums.state(), f.exponent.scale);
  if (f.blocks > 1) whole = cluster_merge(whole, f.exponent.scale);

  __shared__ State<R> of_row;
  if (threadIdx.x == 0) {
    const State<double> s = apply(f.exponent.inverse, whole);
    of_row = rounded<R>(s);
    if (block == 0) f.kl[row] = static_cast<R>(divergence(s));
  }
  __syncthreads();  // of_row is there
  const Slope<R> slope(of_row, f.weights.gradient(row, of_row), f.temperature);
  const int64_t at = row * f.pairs.vocabulary + first * kLanes<T>;
  for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
    R x[kLanes<T>], y[kLanes<T>];
    unpack<T>(slots[i], x);
    unpack<T>(slots[f.vectors + i], y);
    const int64_t to = at + i * int64_t(kLanes<T>);
    slope.template write<kOfP, kOfQ>(x, y, f.grad_p + to, f.grad_q + to);
  }
}

// Multiplies gradients by a factor on the device. Most often it is 1, and then there is nothing to do.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) scale_kernel(T* x, int64_t count, const Real<T>* factor) {
  using R = Real<T>;
  const R by = *factor;
  if (by == 1) return;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  const auto scale = [&](const auto& from, auto* to) {
    constexpr int kCount = std::extent_v<std::remove_reference_t<decltype(from)>>;
    T scaled[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) round_to(scaled[i], from[i] * by);
    store(to, scaled);
  };
  const int64_t vectors = misalignment(x) == 0 ? count / kLanes<T> : 0;
  for (int64_t i = first; i < vectors; i += step) {
    R from[kLanes<T>];
    unpack<T>(__ldcg(reinterpret_cast<const uint4*>(x) + i), from);
    scale(from, x + i * kLanes<T>);
  }
  for (int64_t i = vectors * kLanes<T> + first; i < count; i += step) {
    const R from[] = {to_real(x[i])};
    scale(from, x + i);
  }
}

// --- states as tensors -----------------------------------------------------------------------------------------------

template <typename R>
struct StateList {
  static constexpr int kCapacity = 128;  // 1 KB of a kernel's arguments
  const State<R>* states[kCapacity];
  int count;
};

// The states of the list merged in its order, and in fp64: a row each thread.
template <typename R>
__global__ void __launch_bounds__(kMaxThreads)
    merge_kernel(const __grid_constant__ StateList<R> list, int64_t rows, State<R>* to) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  State<double> whole = State<double>::empty();
  for (int i = 0; i < list.count; ++i) {
    whole = merge(whole, from_tensor(list.states[i][row]), kLog2e);
  }
  to[row] = rounded<R>(whole);
}

template <typename R>
__global__ void __launch_bounds__(kMaxThreads) from_state_kernel(const State<R>* states, int64_t rows, R* kl) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  kl[row] = static_cast<R>(divergence(from_tensor(states[row])));
}

// --- launches --------------------------------------------------------------------------------------------------------

struct Device {
  int multiprocessors;
  bool clusters;
  size_t shared_bytes;  // that a block may have
};

// Rows are split where there are too few of them to fill the device.
//
//   rows            blocks per row       why
//   many            1                    nothing to merge, and each block streams megabytes
//   fewer           enough for 4         a device wants some 25 KB in flight per multiprocessor, and a block has 24 KB:
//                   per multiprocessor   enough for all but the ends of its work
//   very few        a vector per thread  one round trip to memory for all; a thread without a vector would only wait
//
// Where the device has clusters, at most 8: they merge in shared memory, which saves the launch that clears the
// counters and the trip of the states through memory. That is worth more than the last blocks would be.
template <typename T>
Grid choose_grid(int64_t rows, int64_t vocabulary, const Device& device, bool merges) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t vectors = std::max<int64_t>(ceil_div(vocabulary, kLanes<T>), 1);
  const int64_t threads = std::min<int64_t>(ceil_div(vectors, kWarp) * kWarp, kMaxThreads);
  const int64_t least = (vocabulary >> 30) + 1;  // inside a chunk, indices are of 32 bits
  int64_t chunks = ceil_div(4 * device.multiprocessors, std::max<int64_t>(rows, 1));
  chunks = std::min(chunks, ceil_div(vectors, threads));
  const bool cluster = merges && device.clusters && chunks > 1 && least <= 1;
  // Powers of 2 fit into a GPU's processing clusters without waste.
  if (cluster) chunks = chunks >= 8 ? 8 : chunks >= 4 ? 4 : 2;
  chunks = std::max(chunks, least);
  return {static_cast<uint32_t>(chunks), ceil_div(vectors, chunks) * kLanes<T>, static_cast<unsigned>(threads),
          cluster};
}

template <typename T>
void forward(const Forward<T>& f, cudaStream_t stream) {
  if (f.pairs.rows == 0) return;
  const dim3 blocks = f.pairs.rows * f.grid.chunks;
  if (f.grid.cluster) {
    launch_clusters(forward_kernel<T>, blocks, f.grid.threads, f.grid.chunks, 0, stream, f);
  } else {
    if (f.grid.chunks > 1) check(cudaMemsetAsync(f.arrived, 0, f.pairs.rows * sizeof(unsigned), stream), "clear");
    launch(forward_kernel<T>, blocks, f.grid.threads, stream, f);
  }
}

// Calls function(of_p, of_q) with two constants that say which gradients are wanted; one at least is.
template <typename T, typename Function>
void for_wanted(const T* grad_p, const T* grad_q, const Function& function) {
  if (grad_p == nullptr) {
    function(std::false_type(), std::true_type());
  } else if (grad_q == nullptr) {
    function(std::true_type(), std::false_type());
  } else {
    function(std::true_type(), std::true_type());
  }
}

template <typename T>
void backward(const Backward<T>& b, cudaStream_t stream) {
  if (b.pairs.rows == 0 || b.pairs.vocabulary == 0) return;
  for_wanted(b.grad_p, b.grad_q, [&](auto of_p, auto of_q) {
    launch(backward_kernel<T, of_p, of_q>, b.pairs.rows * b.grid.chunks, b.grid.threads, stream, b);
  });
}

// The smallest cluster whose shared memory has room for a pair of rows: if possible in half of it, so that two clusters
// fit, and one computes while the other waits for memory. 0 if rows aren't aligned, or are too long; or if they are so
// few that they stay in the L2 cache anyway between a forward and a backward kernel, which use all multiprocessors.
template <typename T>
uint32_t choose_cluster(const Pairs<T>& pairs, const Device& device) {
  int64_t bits = reinterpret_cast<uintptr_t>(pairs.p) | reinterpret_cast<uintptr_t>(pairs.q);
  bits |= pairs.vocabulary * sizeof(T);
  for (int d = 0; d < pairs.dims; ++d) bits |= (pairs.dim[d].p_stride | pairs.dim[d].q_stride) * sizeof(T);
  if (bits % sizeof(uint4) != 0 || pairs.p_step != 1 || pairs.q_step != 1 || pairs.vocabulary == 0) return 0;
  constexpr size_t kStatic = 2048;  // the states of warps and blocks, and what the system takes
  const uint32_t largest = device.clusters ? kMaxCluster : 1;
  for (const size_t room : {device.shared_bytes / 2 - kStatic, device.shared_bytes - kStatic}) {
    for (uint32_t blocks = 1; blocks <= largest; blocks *= 2) {
      if (2 * pairs.vocabulary * sizeof(T) > (room - 2 * sizeof(uint4)) * blocks) continue;
      return int64_t(pairs.rows) * blocks < device.multiprocessors ? 0 : blocks;
    }
  }
  return 0;
}

// For rows and clusters of a size that choose_cluster has given.
template <typename T>
void forward_backward(ForwardBackward<T> f, cudaStream_t stream) {
  if (f.pairs.rows == 0) return;
  const int64_t vectors = f.pairs.vocabulary / kLanes<T>;
  f.vectors = static_cast<uint32_t>((vectors + f.blocks - 1) / f.blocks);
  const unsigned threads = std::min<unsigned>((f.vectors + kWarp - 1) / kWarp * kWarp, kFusedThreads);
  for_wanted(f.grad_p, f.grad_q, [&](auto of_p, auto of_q) {
    launch_clusters(forward_backward_kernel<T, of_p, of_q>, f.pairs.rows * f.blocks, threads, f.blocks,
                    2 * f.vectors * sizeof(uint4), stream, f);
  });
}

template <typename T>
void scale(T* x, int64_t count, const Real<T>* factor, const Device& device, cudaStream_t stream) {
  const int64_t blocks = (count / kLanes<T> + kMaxThreads) / kMaxThreads;
  const int64_t resident = 2048 / kMaxThreads * device.multiprocessors;
  if (count > 0) launch(scale_kernel<T>, unsigned(std::min(blocks, resident)), kMaxThreads, stream, x, count, factor);
}

inline unsigned blocks_for(int64_t rows) { return static_cast<unsigned>((rows + kMaxThreads - 1) / kMaxThreads); }

// `to` may be one of the states: that is how a longer list goes on.
template <typename R>
void merge_states(const StateList<R>& list, int64_t rows, State<R>* to, cudaStream_t stream) {
  if (rows > 0) launch(merge_kernel<R>, blocks_for(rows), kMaxThreads, stream, list, rows, to);
}

template <typename R>
void from_state(const State<R>* states, int64_t rows, R* kl, cudaStream_t stream) {
  if (rows > 0) launch(from_state_kernel<R>, blocks_for(rows), kMaxThreads, stream, states, rows, kl);
}

}  // namespace vtw::cuda::kl
