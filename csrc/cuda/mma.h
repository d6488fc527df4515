// What the trajectory kernels use of a warp: matrix loads, products of bf16 tiles, fast functions.
// On the host, where tests compile the kernels with g++, cuda_runtime.h of theirs has the same words.
#pragma once
#include <cstdint>

#include "device.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>

namespace fmft::cuda {

// {low, high} rounded to bf16, in one register.
FMFT_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

FMFT_DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
FMFT_DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// c += a b for a [16 x 16] and b [16 x 8] in bf16.
FMFT_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
template <bool Transposed>
FMFT_DEVICE void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

template <class Number>
FMFT_DEVICE Number shuffle_xor(Number value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// A barrier that tells every thread of the block whether one of them said yes.
FMFT_DEVICE bool any_thread(bool yes) {
  __syncwarp();
  return __syncthreads_or(yes);
}

// A barrier for all blocks of a kernel that was launched by `launch_together`.
FMFT_DEVICE void meet_all_blocks() { cooperative_groups::this_grid().sync(); }

// Copies a number to shared memory while the thread goes on; wait_for_copies() waits for its own copies.
FMFT_DEVICE void copy_later(float* into, const float* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(into));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}
FMFT_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 1 / x to 1 ulp; exp to 2 + |x| ulp; tanh to 2^-11 of its value. Numbers below 2^-126 count as zero.
FMFT_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FMFT_DEVICE float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.44269504088896341f * x));
  return y;
}
FMFT_DEVICE float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fmft::cuda
#endif
