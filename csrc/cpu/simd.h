// Vectors of `Bytes` bytes in the compiler's own vector types, so that one source compiles for every vector set.
//
// Everything is force-inlined into functions that carry a target attribute (VTW_AVX512, VTW_AVX2): there, and only
// there, do 64-byte vectors become AVX-512 and 32-byte vectors AVX2.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/capability.h"

#define VTW_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define VTW_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define VTW_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace vtw {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// An op that writes more than this uses stores that go around the caches: little of the result would still be cached
// when it is next read, and a store through a cache first reads the line that it overwrites.
constexpr int64_t kStreamBytes = 10 * 1024 * 1024;

// Makes what this thread has written around the caches visible to the threads that read it next.
inline void finish_streams() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

// Spelt out, because compilers ignore a vector_size that depends on a template parameter.
template <int Bytes>
struct Vectors;
#define VTW_VECTORS(bytes)                                  \
  template <>                                               \
  struct Vectors<bytes> {                                   \
    typedef float F __attribute__((vector_size(bytes)));    \
    typedef uint32_t U __attribute__((vector_size(bytes))); \
  };
VTW_VECTORS(16)
VTW_VECTORS(32)
VTW_VECTORS(64)
#undef VTW_VECTORS

template <int Bytes>
struct Simd {
  static constexpr int kLanes = Bytes / 4;
  using F = typename Vectors<Bytes>::F;  // floats
  using U = typename Vectors<Bytes>::U;  // their bits

  template <typename T>
  static VTW_INLINE T read(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
  }

  // Two vectors of floats, which one vector of 16-bit numbers becomes: the numbers at even places and those at odd
  // ones. For sums the order does not matter, and store() restores it.
  struct Two {
    F half[2];
  };
  static constexpr int kStep = 2 * kLanes;

  static VTW_INLINE Two load(const float* x) { return {read<F>(x), read<F>(x + kLanes)}; }

  static VTW_INLINE Two load(const BFloat16* x) {
    const U bits = read<U>(x);
    return {(F)(bits << 16), (F)(bits & 0xffff0000)};
  }

  static VTW_INLINE Two load(const Half* x) {
    const U bits = read<U>(x);
    return {from_half(bits & 0xffff), from_half(bits >> 16)};
  }

  static VTW_INLINE void store(float* to, Two x) {
    std::memcpy(to, &x.half[0], sizeof(F));
    std::memcpy(to + kLanes, &x.half[1], sizeof(F));
  }

  // Around the caches; `to` is at a multiple of Bytes.
  static VTW_INLINE void stream(void* to, F x) {
#if defined(__x86_64__)
    auto& bytes = *static_cast<char (*)[Bytes]>(to);
    if (Bytes == 16) {
      asm("movntps %1, %0" : "=m"(bytes) : "x"(x));
    } else {
      asm("vmovntps %1, %0" : "=m"(bytes) : "v"(x));
    }
#else
    std::memcpy(to, &x, sizeof(F));
#endif
  }

  static VTW_INLINE void store(BFloat16* to, Two x) {
    const U bits = (round_to_bfloat16(x.half[0]) >> 16) | (round_to_bfloat16(x.half[1]) & 0xffff0000);
    std::memcpy(to, &bits, sizeof(U));
  }

  static VTW_INLINE void store(Half* to, Two x) {
    for (int i = 0; i < kStep; ++i) to[i] = Half(x.half[i % 2][i / 2]);
  }

  // Exponent and fraction move to their places in a float; multiplying by 2^112 mends the bias, and turns subnormals
  // into normal numbers. What was infinity or NaN then has its exponent set to all ones again.
  static VTW_INLINE F from_half(U bits) {
    const U magnitude = (bits & 0x7fff) << 13;
    const U special = (U)(magnitude >= (0x7c00u << 13)) & 0x7f800000;
    const U scaled = (U)((F)magnitude * 0x1p112f);
    return (F)(scaled | special | ((bits & 0x8000) << 16));
  }

  // To nearest even, in the upper 16 bits. A NaN would round to infinity if all its fraction bits were low ones; it
  // stays a NaN.
  static VTW_INLINE U round_to_bfloat16(F x) {
    const U bits = (U)x;
    return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : U{} + 0x7fc00000;
  }

  static VTW_INLINE F splat(float x) {
    F result;
    for (int i = 0; i < kLanes; ++i) result[i] = x;  // one instruction, where x - F{} becomes one for each lane
    return result;
  }
  static VTW_INLINE F max(F a, F b) { return a > b ? a : b; }  // b where either is NaN

  static VTW_INLINE float reduce_max(F x) {
    float result = x[0];
    for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
    return result;
  }

  // By halves, always in this order.
  static VTW_INLINE double reduce_add(F x) {
    double lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = x[i];
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
  }

  // 2^(x * scale) for x <= 0, with a relative error below 1.5e-7, and 0 where that would be below 2^-125.5. Adding
  // 1.5 * 2^23 rounds to an integer, which ends up in the low bits; the rest, within ±1/2, goes through a polynomial
  // of degree 5 (the best one for relative error, 7.5e-8).
  static VTW_INLINE F exp2(F x, float scale) {
    const F shifted = x * scale + 0x1.8p23f;
    const F r = x * scale - (shifted - 0x1.8p23f);
    F power = 1.32764721678e-3f * r + 9.67554133102e-3f;
    power = power * r + 5.55071327288e-2f;
    power = power * r + 2.40221197240e-1f;
    power = power * r + 6.93146967065e-1f;
    power = power * r + 1.00000007165f;
    power = (F)((U)power + ((U)shifted << 23));
    return shifted < 0x1.8p23f - 125.0f ? F{} : power;
  }
};

}  // namespace vtw
