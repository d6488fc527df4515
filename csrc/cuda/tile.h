// Tiles of matrices in shared memory and in the registers of a warp: T bf16 terms of a float32, M tiles of
// 16 rows.
//
// A lane of a warp holds, of a tile of 16 rows and 8 columns, the rows lane / 4 and that + 8 and the
// columns 2 (lane % 4) and that + 1: this is how the tensor cores return a product.
#pragma once
#include "mma.h"

namespace fmft::cuda {

constexpr int kMaxWarps = 8;

// A matrix in shared memory as T bf16 matrices; rows are padded so that eight of them hit all banks.
struct Staged {
  uint16_t* at;
  int stride;  // of a row
  int term;    // distance of the terms
};

FMFT_DEVICE Staged staged(int place, int rows, int tiles) {
  const int stride = 16 * tiles + 8;
  return {reinterpret_cast<uint16_t*>(dynamic_shared() + place), stride, rows * stride};
}

FMFT_DEVICE float* floats(int place) { return reinterpret_cast<float*>(dynamic_shared() + place); }

FMFT_DEVICE int lane() { return threadIdx.x % 32; }
FMFT_DEVICE int warp() { return threadIdx.x / 32; }
FMFT_DEVICE int warps() { return blockDim.x / 32; }

// The tile that a warp begins with when tile 0 goes to warp `first`.
FMFT_DEVICE int first_item(int first) {
  const int distance = warp() - first;
  return distance < 0 ? distance + warps() : distance;
}

template <int T>
FMFT_DEVICE void store_pair(const Staged& into, int row, int column, float low, float high) {
  uint16_t* at = into.at + row * into.stride + column;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const uint32_t pair = pack_bf16(low, high);
    *reinterpret_cast<uint32_t*>(at + t * into.term) = pair;
    low -= low_bf16(pair);
    high -= high_bf16(pair);
  }
}

template <int T>
FMFT_DEVICE void store_one(const Staged& into, int row, int column, float value) {
  uint16_t* at = into.at + row * into.stride + column;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const uint32_t pair = pack_bf16(value, 0.0f);
    at[t * into.term] = static_cast<uint16_t>(pair);
    value -= low_bf16(pair);
  }
}

// The numbers of one lane in M x 2 tiles of [16 x 8].
template <int M>
struct Tile {
  float at[M][2][4];
};

template <int M>
FMFT_DEVICE void fill(Tile<M>& tile, float value) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < 8; ++i) tile.at[m][i / 4][i % 4] = value;
}

// Row and first column of the pair tile.at[m][n][2 i ..] in a tile of columns 16 `column_tile`.
FMFT_DEVICE int row_of(int m, int i) { return 16 * m + 8 * i + lane() / 4; }
FMFT_DEVICE int column_of(int column_tile, int n) {
  return 16 * column_tile + 8 * n + 2 * (lane() % 4);
}

// Calls f(m, n, i, row, column) for all pairs of neighbours that the lane holds.
template <int M, class F>
FMFT_DEVICE void for_pairs(int column_tile, F&& f) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) f(m, n, i, row_of(m, i), column_of(column_tile, n));
}

// Tiles in the order of the lanes: 16 bytes of every lane follow each other, and only the warp that
// wrote a tile reads it.
template <int M>
FMFT_DEVICE float4* lane_order(int place, int tile) {
  return reinterpret_cast<float4*>(dynamic_shared() + place) + (tile * M * 2 * 32 + lane());
}

template <int M>
FMFT_DEVICE void save(float4* into, const Tile<M>& tile) {
#pragma unroll
  for (int j = 0; j < 2 * M; ++j) {
    const float(&v)[4] = tile.at[j / 2][j % 2];
    into[32 * j] = make_float4(v[0], v[1], v[2], v[3]);
  }
}

template <int M, class F>
FMFT_DEVICE void with_saved(const float4* from, F&& f) {
#pragma unroll
  for (int j = 0; j < 2 * M; ++j) {
    const float4 v = from[32 * j];
    f(j / 2, j % 2, 0, v.x), f(j / 2, j % 2, 1, v.y);
    f(j / 2, j % 2, 2, v.z), f(j / 2, j % 2, 3, v.w);
  }
}

template <int M>
FMFT_DEVICE void add_saved(Tile<M>& tile, const float4* from) {
  with_saved<M>(from, [&](int m, int n, int e, float v) { tile.at[m][n][e] += v; });
}

// c += a b over the tiles first, first + step, ... < count of the inner dimension. a is stored as
// [rows][inner], or [inner][rows] if TurnA; b as [columns][inner], or [inner][columns] if TurnB; both
// begin at their corner. Products of the relative order 2^(-8 T) are left out: they are no larger than
// what the terms leave out. The smallest products are added up on their own: this is more accurate, and an
// instruction waits for fewer others.
template <int T, int M, bool TurnA, bool TurnB>
FMFT_DEVICE void multiply(Tile<M>& c, const Staged& a, const Staged& b, int first, int count,
                          int step = 1) {
  const int l = lane(), low = l % 8;
  const int rows_first = low + l % 16 / 8 * 8, rows_last = low + l / 16 * 8;
  const int column_last = l / 16 * 8, column_first = l % 16 / 8 * 8;
  const uint16_t* from_a =
      a.at + (TurnA ? rows_last * a.stride + column_first : rows_first * a.stride + column_last);
  const uint16_t* from_b =
      b.at + (TurnB ? rows_first * b.stride + column_last : rows_last * b.stride + column_first);
  const int a_m = TurnA ? 16 : 16 * a.stride;
  const int a_k = TurnA ? 16 * a.stride : 16, b_k = TurnB ? 16 * b.stride : 16;
  Tile<M> small;
  fill(small, 0.0f);
#pragma unroll 2
  for (int k = first; k < count; k += step) {
    uint32_t x[M][T][4], w[T][4];
#pragma unroll
    for (int t = 0; t < T; ++t) {
      load_matrices<TurnB>(w[t], from_b + k * b_k + t * b.term);
#pragma unroll
      for (int m = 0; m < M; ++m)
        load_matrices<TurnA>(x[m][t], from_a + k * a_k + m * a_m + t * a.term);
    }
#pragma unroll
    for (int order = T - 1; order >= 0; --order)
#pragma unroll
      for (int t = 0; t <= order; ++t)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Tile<M>& into = T > 1 && order == T - 1 ? small : c;
            mma(into.at[m][n], x[m][t], w[order - t][2 * n], w[order - t][2 * n + 1]);
          }
  }
  if constexpr (T > 1) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i) c.at[m][i / 4][i % 4] += small.at[m][i / 4][i % 4];
  }
}

}  // namespace fmft::cuda
