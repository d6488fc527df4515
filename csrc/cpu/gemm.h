// Products on tiles of rows. All have the form C[m, vectors] += A[m, k] B[k, vectors] with A
// broadcast, except where C has fewer columns than half a vector, or A so few rows that laying out B
// would take longer than the product: then rows are dotted with rows.
#pragma once
#include "vector.h"

namespace fmft {
inline namespace FMFT_ISA {

// Depth of a panel of B that stays in the cache while it meets all rows of the tile.
constexpr int64_t kDepth = 256;

// What a product does: C = A B (+ first_row in every row), C += A B, or with A across C += A^T B.
template <class T>
struct Product {
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
  int64_t k;
  T* c;
  int64_t ldc;
  const T* first_row;
  bool add;
  int64_t lost;  // see Sums
};

// MR rows of C and NV vectors of each, in registers. A is [MR, k], or with Across [k, MR].
template <class T, int MR, int NV, bool Across>
__attribute__((noinline)) void block(const Product<T>& x, int64_t row) {
  constexpr int L = Lanes<T>::count;
  const int64_t k = x.k, lda = x.lda, ldb = x.ldb, ldc = x.ldc;
  const T *a = x.a + (Across ? row : row * lda), *b = x.b;
  T* c = x.c + row * ldc;
  Vector<T> sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j)
      sum[i][j] = Across    ? Vector<T>{}
                  : x.add       ? load(c + i * ldc + j * L)
                  : x.first_row ? load(x.first_row + j * L)
                                : Vector<T>{};
  for (int64_t p = 0; p < k; ++p) {
    Vector<T> line[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) line[j] = load(b + p * ldb + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const T factor = Across ? a[p * lda + i] : a[i * lda + p];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] += factor * line[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const int64_t at = i * ldc + j * L;
      if (Across) Sums<T>{c, x.lost}.add(at, sum[i][j], Whole{});
      else store(c + at, sum[i][j]);
    }
}

template <class T, int NV, bool Across>
inline void rows_of(const Product<T>& x, int64_t rows) {
  int64_t row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows) block<T, kBlockRows, NV, Across>(x, row);
  switch (rows - row) {
    case 1: return block<T, 1, NV, Across>(x, row);
    case 2: return block<T, 2, NV, Across>(x, row);
    case 3: return block<T, 3, NV, Across>(x, row);
    case 4: return block<T, 4, NV, Across>(x, row);
    case 5: return block<T, 5, NV, Across>(x, row);
  }
}

template <class T, bool Across>
inline void panel_of(const Product<T>& x, int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1: return rows_of<T, 1, Across>(x, rows);
    case 2: return rows_of<T, 2, Across>(x, rows);
    case 3: return rows_of<T, 3, Across>(x, rows);
    case 4: return rows_of<T, 4, Across>(x, rows);
  }
}

// C[rows, vectors] = A[rows, k] B (+ first_row in every row, or + C with `add`). B is packed: panels
// of kBlockVectors vectors, each [k, panel].
template <class T>
void multiply(const T* a, int64_t lda, const T* b, int64_t k, int64_t vectors, T* c, int64_t ldc,
              int64_t rows, const T* first_row, bool add) {
  constexpr int L = Lanes<T>::count;
  for (int64_t v = 0; v < vectors; v += kBlockVectors) {
    const int64_t width = vectors - v < kBlockVectors ? vectors - v : kBlockVectors;
    for (int64_t p = 0; p < k; p += kDepth) {
      const int64_t depth = k - p < kDepth ? k - p : kDepth;
      const Product<T> x{a + p,
                         lda,
                         b + v * L * k + p * width * L,
                         width * L,
                         depth,
                         c + v * L,
                         ldc,
                         first_row ? first_row + v * L : nullptr,
                         add || p > 0,
                         0};
      panel_of<T, false>(x, rows, width);
    }
  }
}

// Rows that are summed up in registers before they meet the sum of all others.
constexpr int64_t kSummedRows = 128;

// C[n, vectors] += A[m, n]^T B[m, vectors], summed over very many rows m.
template <class T>
void multiply_across(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t m, int64_t n,
                     int64_t vectors, Sums<T> c, int64_t ldc) {
  constexpr int L = Lanes<T>::count;
  for (int64_t v = 0; v < vectors; v += kBlockVectors) {
    const int64_t width = vectors - v < kBlockVectors ? vectors - v : kBlockVectors;
    for (int64_t p = 0; p < m; p += kSummedRows) {
      const int64_t depth = m - p < kSummedRows ? m - p : kSummedRows;
      const Product<T> x{a + p * lda, lda, b + p * ldb + v * L, ldb, depth, c.at + v * L, ldc,
                         nullptr,     true, c.lost};
      panel_of<T, true>(x, n, width);
    }
  }
}

// C[rows, N] (+)= A[rows, vectors] B[N, vectors]^T with C dense; B is packed as in `multiply`.
template <class T, int N>
void dot_rows(const T* a, int64_t lda, const T* b, int64_t vectors, T* c, int64_t rows,
              const T* first_row, bool add) {
  constexpr int L = Lanes<T>::count;
  constexpr int G = L / N;  // rows at a time
  T start[L] = {};
  for (int i = 0; i < G * N; ++i) start[i] = first_row ? first_row[i % N] : T(0);
  const Vector<T> first = load(start);
  for (int64_t row = 0; row < rows; row += G) {
    const int64_t count = rows - row < G ? rows - row : G;
    const T* from[G];
    for (int g = 0; g < G; ++g) from[g] = a + (row + (g < count ? g : 0)) * lda;
    Vector<T> sum[L] = {};
    for (int64_t v = 0; v < vectors; v += kBlockVectors) {
      const int64_t width = vectors - v < kBlockVectors ? vectors - v : kBlockVectors;
      const T* panel = b + v * L * N;
      for (int64_t w = 0; w < width; ++w)
#pragma GCC unroll 16
        for (int g = 0; g < G; ++g) {
          const Vector<T> x = load(from[g] + (v + w) * L);
#pragma GCC unroll 16
          for (int j = 0; j < N; ++j)
            sum[g * N + j] += x * load(panel + (j * width + w) * L);
        }
    }
    Vector<T> y = lane_sums<T>(sum) + first;
    const int size = static_cast<int>(count * N);
    T* to = c + row * N;
    if (add) y += load(to, size);
    store(to, y, size);
  }
}

template <class T>
void dot_products(const T* a, int64_t lda, const T* b, int64_t vectors, int n, T* c, int64_t rows,
                  const T* first_row, bool add) {
  switch (n) {
    case 1: return dot_rows<T, 1>(a, lda, b, vectors, c, rows, first_row, add);
    case 2:
      if constexpr (Lanes<T>::count >= 4)
        return dot_rows<T, 2>(a, lda, b, vectors, c, rows, first_row, add);
      break;
    default:
      if constexpr (Lanes<T>::count >= 8) {
        if (n == 3) return dot_rows<T, 3>(a, lda, b, vectors, c, rows, first_row, add);
        if (n == 4) return dot_rows<T, 4>(a, lda, b, vectors, c, rows, first_row, add);
      }
      if constexpr (Lanes<T>::count >= 16) {
        if (n == 5) return dot_rows<T, 5>(a, lda, b, vectors, c, rows, first_row, add);
        if (n == 6) return dot_rows<T, 6>(a, lda, b, vectors, c, rows, first_row, add);
        if (n == 7) return dot_rows<T, 7>(a, lda, b, vectors, c, rows, first_row, add);
        if (n == 8) return dot_rows<T, 8>(a, lda, b, vectors, c, rows, first_row, add);
      }
  }
}

// The weights [n, k] of a layer as they lie in memory, rows `ld` apart.
template <class T>
struct Weights {
  const T* w;
  int64_t ld, n, k;
};

// What is left of a row of k numbers behind its whole vectors: in the last lanes of the row's last
// vector, or in the first lanes where the row is shorter than that; the other lanes are zero.
template <class T>
struct RowEnd {
  static constexpr int L = Lanes<T>::count;
  using Mask = typename Lanes<T>::Mask;
  int64_t k;
  Mask kept{};

  explicit RowEnd(int64_t k) : k(k) {
    const int last = static_cast<int>(k < L ? k : L);
    for (int i = last - static_cast<int>(k % L); i < last; ++i) kept[i] = -1;
  }
  Vector<T> operator()(const T* row) const {
    const Vector<T> x = k < L ? load(row, static_cast<int>(k)) : load(row + k - L);
    return reinterpret_cast<Vector<T>>(reinterpret_cast<Mask>(x) & kept);
  }
};

// The products of MR rows of A with G rows of W, lane by lane: those of a row of A lie together, L
// vectors behind those of the row before.
template <class T, int MR, int G>
inline void lane_products(const T* a, int64_t lda, const Weights<T>& x, const T* const* w,
                          Vector<T>* sums) {
  constexpr int L = Lanes<T>::count;
  Vector<T> sum[MR][G] = {};
  int64_t p = 0;
  for (; p + L <= x.k; p += L) {
    Vector<T> from[MR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) from[m] = load(a + m * lda + p);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      __builtin_prefetch(w[g] + G * x.ld + p);  // of the rows that come next
      const Vector<T> weight = load(w[g] + p);
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) sum[m][g] += from[m] * weight;
    }
  }
  if (p < x.k) {
    const RowEnd<T> end(x.k);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const Vector<T> from = end(a + m * lda);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sum[m][g] += from * end(w[g]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) sums[m * L + g] = sum[m][g];
}

// C[MR, n] (+)= A[MR, k] W^T.
template <class T, int MR>
__attribute__((noinline)) void dot_weights_of(const T* a, int64_t lda, const Weights<T>& x, T* c,
                                              int64_t ldc, bool padded, const T* first_row,
                                              bool add) {
  constexpr int L = Lanes<T>::count;
  constexpr int most = kDotSums / MR >= 8 ? 8 : kDotSums / MR >= 4 ? 4 : 2;
  constexpr int G = most < L ? most : L;
  each_vector<T>(x.n, [&](int64_t j, auto part) {
    const int count = count_of<T>(part);
    Vector<T> sums[MR * L];
    for (int g = 0; g < L; g += G) {
      const T* w[G];
      for (int i = 0; i < G; ++i) w[i] = x.w + (j + (g + i < count ? g + i : 0)) * x.ld;
      lane_products<T, MR, G>(a, lda, x, w, sums + g);
    }
    for (int m = 0; m < MR; ++m) {
      T* to = c + m * ldc + j;
      Vector<T> y = lane_sums<T>(sums + m * L);
      if (first_row) y += get(first_row + j, part);
      if (add) y += get(to, part);
      put<T>(to, y, part);
      for (int i = count; i < L && padded; ++i) to[i] = 0;
    }
  });
}

// C[rows, n] (+)= A[rows, k] W^T (+ first_row in every row), where W needs no packing: it is read
// once for every four rows of A. Behind its n columns C is dense, or padded to whole vectors.
template <class T>
void dot_weights(const T* a, int64_t lda, const Weights<T>& x, T* c, int64_t ldc, bool padded,
                 int64_t rows, const T* first_row, bool add) {
  for (; rows >= 4; rows -= 4, a += 4 * lda, c += 4 * ldc)
    dot_weights_of<T, 4>(a, lda, x, c, ldc, padded, first_row, add);
  switch (rows) {
    case 1: return dot_weights_of<T, 1>(a, lda, x, c, ldc, padded, first_row, add);
    case 2: return dot_weights_of<T, 2>(a, lda, x, c, ldc, padded, first_row, add);
    case 3: return dot_weights_of<T, 3>(a, lda, x, c, ldc, padded, first_row, add);
  }
}

}  // namespace FMFT_ISA
}  // namespace fmft
