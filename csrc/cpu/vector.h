// Vectors of the instruction set that this file is compiled for, by the vector extension of GCC and
// Clang: one source serves every width.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../core/numbers.h"

namespace fmft {
inline namespace FMFT_ISA {

// kBlockRows x kBlockVectors accumulators fill the registers, with room for a row of B; products of
// rows with rows take up to kDotSums.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kBlockRows = 6, kBlockVectors = 4, kDotSums = 16;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kBlockRows = 6, kBlockVectors = 2, kDotSums = 8;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kBlockRows = 6, kBlockVectors = 4, kDotSums = 16;
#else
constexpr int kVectorBytes = 16, kBlockRows = 4, kBlockVectors = 2, kDotSums = 8;
#endif

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Bits = int32_t;
  static constexpr int count = kVectorBytes / 4;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Lanes<double> {
  using Bits = int64_t;
  static constexpr int count = kVectorBytes / 8;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename Lanes<T>::Vector;

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vector<T> v) {
  memcpy(to, &v, sizeof v);
}

template <class T>
inline Vector<T> load(const T* from, int count) {
  Vector<T> v{};
  memcpy(&v, from, count * sizeof(T));
  return v;
}

template <class T>
inline void store(T* to, Vector<T> v, int count) {
  memcpy(to, &v, count * sizeof(T));
}

// A whole vector or the rest of one, for loops over memory that may end within a vector.
struct Whole {};
struct Rest {
  int count;
};

template <class T>
constexpr int count_of(Whole) {
  return Lanes<T>::count;
}
template <class T>
inline int count_of(Rest rest) {
  return rest.count;
}

template <class T>
inline Vector<T> get(const T* from, Whole) {
  return load(from);
}
template <class T>
inline Vector<T> get(const T* from, Rest rest) {
  return load(from, rest.count);
}
template <class T>
inline void put(T* to, Vector<T> v, Whole) {
  store(to, v);
}
template <class T>
inline void put(T* to, Vector<T> v, Rest rest) {
  store(to, v, rest.count);
}

template <class T, class Run>
inline void each_vector(int64_t size, Run run) {
  constexpr int L = Lanes<T>::count;
  int64_t i = 0;
  for (; i + L <= size; i += L) run(i, Whole{});
  if (i < size) run(i, Rest{static_cast<int>(size - i)});
}

// The sums of many numbers. What they lose by rounding lies `lost` numbers behind them and is added
// later, so that the error does not grow with the number of summands; 0: they are few.
template <class T>
struct Sums {
  T* at;
  int64_t lost;

  Sums operator+(int64_t i) const { return {at + i, lost}; }

  template <class Part>
  void add(int64_t i, Vector<T> x, Part part) const {
    const Vector<T> before = get(at + i, part);
    if (!lost) return put<T>(at + i, before + x, part);
    x += get(at + lost + i, part);
    const Vector<T> after = before + x;
    put<T>(at + i, after, part);
    put<T>(at + lost + i, x - (after - before), part);
  }
};

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // not a sum: x - 0 is x for every x, so that it costs nothing
}

// a < b ? a : b, and a > b ? a : b, by the one instruction that does just this. GCC 12 warns of the
// intrinsics without a mask.
#if defined(__AVX512F__)
#define FMFT_PICK(name, type) _mm512_maskz_##name##_p##type(-1, a, b)
#elif defined(__AVX2__)
#define FMFT_PICK(name, type) _mm256_##name##_p##type(a, b)
#endif
#ifdef FMFT_PICK
inline Vector<float> smaller(Vector<float> a, Vector<float> b) { return FMFT_PICK(min, s); }
inline Vector<double> smaller(Vector<double> a, Vector<double> b) { return FMFT_PICK(min, d); }
inline Vector<float> larger(Vector<float> a, Vector<float> b) { return FMFT_PICK(max, s); }
inline Vector<double> larger(Vector<double> a, Vector<double> b) { return FMFT_PICK(max, d); }
#undef FMFT_PICK
#else
template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
#endif

// A loop that every compiler makes one instruction of: the vector extension of GCC has no square root.
template <class T>
inline Vector<T> sqrt_of(Vector<T> x) {
  T lanes[Lanes<T>::count];
  store<T>(lanes, x);
  for (T& lane : lanes) lane = std::sqrt(lane);
  return load(lanes);
}

// One level of the sum of many vectors: blocks of W lanes of a and of b, each folded to W lanes.
template <class T, int W, int... I>
inline Vector<T> fold(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  constexpr int count = Lanes<T>::count;
#ifdef __clang__
#define FMFT_PICK(shift) \
  __builtin_shufflevector(a, b, (I / (2 * W) * 2 * W + I % W + (shift) + (I % (2 * W) < W ? 0 : count))...)
#else
#define FMFT_PICK(shift) \
  __builtin_shuffle(a, b, typename Lanes<T>::Mask{ \
      (I / (2 * W) * 2 * W + I % W + (shift) + (I % (2 * W) < W ? 0 : count))...})
#endif
  return FMFT_PICK(0) + FMFT_PICK(W);
#undef FMFT_PICK
}

// Lane i of the result is the sum of the lanes of v[i].
template <class T, int W = 1>
inline Vector<T> lane_sums(Vector<T>* v) {
  constexpr int left = Lanes<T>::count / W;
  if constexpr (left == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < left / 2; ++i)
      v[i] = fold<T, W>(v[2 * i], v[2 * i + 1],
                        std::make_integer_sequence<int, Lanes<T>::count>{});
    return lane_sums<T, 2 * W>(v);
  }
}

}  // namespace FMFT_ISA
}  // namespace fmft
