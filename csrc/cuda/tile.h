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
template <int M = 1>
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

// Row and first column of the pair tile.at[0][n][2 i ..] in the 16 rows `row_tile` and the 16 columns
// `column_tile`.
FMFT_DEVICE int row_of(int row_tile, int i) { return 16 * row_tile + 8 * i + lane() / 4; }
FMFT_DEVICE int column_of(int column_tile, int n) {
  return 16 * column_tile + 8 * n + 2 * (lane() % 4);
}

// Calls f(n, i, row, column) for all pairs of neighbours that the lane holds.
template <class F>
FMFT_DEVICE void for_pairs(int row_tile, int column_tile, F&& f) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) f(n, i, row_of(row_tile, i), column_of(column_tile, n));
}

// Where a lane has its first pair of a tile.
FMFT_DEVICE uint16_t* first_pair(const Staged& of, int row_tile, int column_tile) {
  return of.at + row_of(row_tile, 0) * of.stride + column_of(column_tile, 0);
}

template <int T>
FMFT_DEVICE void store_tile(const Staged& into, uint16_t* first, const Tile<>& tile) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float low = tile.at[0][n][2 * i], high = tile.at[0][n][2 * i + 1];
#pragma unroll
      for (int t = 0; t < T; ++t) {
        const uint32_t pair = pack_bf16(low, high);
        *reinterpret_cast<uint32_t*>(first + 8 * i * into.stride + 8 * n + t * into.term) = pair;
        low -= low_bf16(pair);
        high -= high_bf16(pair);
      }
    }
}

// Tiles in the order of the lanes: 16 bytes of every lane follow each other, and only the warp that
// wrote a tile reads it.
FMFT_DEVICE float4* lane_order(int place, int tile) {
  return reinterpret_cast<float4*>(dynamic_shared() + place) + (tile * 2 * 32 + lane());
}

FMFT_DEVICE void save(float4* into, const float (&v)[2][4]) {
  into[0] = make_float4(v[0][0], v[0][1], v[0][2], v[0][3]);
  into[32] = make_float4(v[1][0], v[1][1], v[1][2], v[1][3]);
}

// Calls f(n, e, number).
template <class F>
FMFT_DEVICE void with_saved(const float4* from, F&& f) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float4 v = from[32 * n];
    f(n, 0, v.x), f(n, 1, v.y), f(n, 2, v.z), f(n, 3, v.w);
  }
}

FMFT_DEVICE void add_saved(Tile<>& tile, const float4* from) {
  with_saved(from, [&](int n, int e, float v) { tile.at[0][n][e] += v; });
}

// A factor of a product as the lanes read it, tile by tile of the inner dimension.
struct Factor {
  const uint16_t* at;
  int next;   // distance of the tiles
  int other;  // of those of the other dimension
  int term;
};

// The factor a of `multiply` from its corner: stored as [rows][inner], or [inner][rows] if Turned.
template <bool Turned>
FMFT_DEVICE Factor left(const Staged& a) {
  const int low = lane() % 8, one = lane() % 16 / 8 * 8, two = lane() / 16 * 8;
  if (Turned) return {a.at + ((low + two) * a.stride + one), 16 * a.stride, 16, a.term};
  return {a.at + ((low + one) * a.stride + two), 16, 16 * a.stride, a.term};
}

// The factor b: stored as [columns][inner], or [inner][columns] if Turned.
template <bool Turned>
FMFT_DEVICE Factor right(const Staged& b) {
  const int low = lane() % 8, one = lane() % 16 / 8 * 8, two = lane() / 16 * 8;
  if (Turned) return {b.at + ((low + one) * b.stride + two), 16 * b.stride, 16, b.term};
  return {b.at + ((low + two) * b.stride + one), 16, 16 * b.stride, b.term};
}

template <int M>
FMFT_DEVICE void add(Tile<M>& sum, const Tile<M>& tile) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < 8; ++i) sum.at[m][i / 4][i % 4] += tile.at[m][i / 4][i % 4];
}

// c += a b over K tiles of the inner dimension. All is loaded before the first product. The smallest
// products are added up on their own: this is more accurate, and an instruction waits for fewer others.
template <int T, int M, bool TurnA, bool TurnB, int K>
FMFT_DEVICE void multiply_tiles(Tile<M>& c, Tile<M>& small, Factor& a, Factor& b) {
  uint32_t x[K][M][T][4], w[K][T][4];
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
      load_matrices<TurnB>(w[k][t], b.at + t * b.term);
#pragma unroll
      for (int m = 0; m < M; ++m)
        load_matrices<TurnA>(x[k][m][t], a.at + (m * a.other + t * a.term));
    }
    a.at += a.next;
    b.at += b.next;
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int order = T - 1; order >= 0; --order)
#pragma unroll
      for (int t = 0; t <= order; ++t)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Tile<M>& into = (T > 1 ? order == T - 1 : M == 1 && k % 2 == 1) ? small : c;
            mma(into.at[m][n], x[k][m][t], w[k][order - t][2 * n], w[k][order - t][2 * n + 1]);
          }
}

// c += a b over `count` tiles of the inner dimension. Products of the relative order 2^(-8 T) are left out:
// they are no larger than what the terms leave out.
template <int T, int M, bool TurnA, bool TurnB>
FMFT_DEVICE void multiply(Tile<M>& c, Factor a, Factor b, int count) {
  constexpr int kMost = T == 1 && M == 1 ? 4 : 2;  // as registers allow
  Tile<M> small;
  fill(small, 0.0f);
#pragma unroll 1
  for (; count > kMost; count -= kMost) multiply_tiles<T, M, TurnA, TurnB, kMost>(c, small, a, b);
  if (count == kMost) {
    multiply_tiles<T, M, TurnA, TurnB, kMost>(c, small, a, b);
  } else {
    if (kMost > 2 && count & 2) multiply_tiles<T, M, TurnA, TurnB, 2>(c, small, a, b);
    if (count & 1) multiply_tiles<T, M, TurnA, TurnB, 1>(c, small, a, b);
  }
  if (T > 1 || M == 1) add(c, small);
}

}  // namespace fmft::cuda
