// Number types and vector packs that g++ and nvcc read alike.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FMFT_HD __host__ __device__ __forceinline__
#else
#define FMFT_HD inline
#endif

// The CPU kernels are compiled once per instruction set. Each compilation names itself, so that the
// linker cannot merge an AVX-512 copy of an inline function into the baseline.
#ifndef FMFT_ISA
#define FMFT_ISA portable
#endif

namespace fmft {

enum class Type : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

inline namespace FMFT_ISA {

struct f16 {
  uint16_t bits;
};

struct bf16 {
  uint16_t bits;
};

FMFT_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
FMFT_HD T widen(float value) {
  return value;
}

template <class T>
FMFT_HD T widen(double value) {
  return static_cast<T>(value);
}

template <class T>
FMFT_HD T widen(bf16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

// Exact for every half, subnormals, infinities and NaN included, and free of branches, so that it
// vectorises without F16C: 2^112 moves the exponent from bias 15 to bias 127.
template <class T>
FMFT_HD T widen(f16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const float scaled = float_from_bits(magnitude) * 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof bits);
  // A mask, not a choice: with ?: GCC leaves the loop over seven stages scalar, 19 times slower.
  const uint32_t special = 0u - static_cast<uint32_t>(magnitude >= 0x0f800000u);
  return float_from_bits(bits | (special & 0x7f800000u) | sign);
#endif
}

// N neighbours moved by one load or store.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

}  // namespace FMFT_ISA
}  // namespace fmft
