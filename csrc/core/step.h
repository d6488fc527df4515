// The arithmetic of the step ops at one place of the state; the CPU and the GPU loop over it.
#pragma once
#include "numbers.h"

namespace fmft {

constexpr int kMaxStages = 16;
constexpr int kMaxDegree = 8;
constexpr int kThetaChunk = 8;

// A call as the bindings receive it: types erased, stages of weight zero still in it.
struct StepCall {
  void* out = nullptr;
  const void* y = nullptr;
  const void* k[kMaxStages] = {};
  double w[kMaxStages] = {};
  double w_err[kMaxStages] = {};
  int stages = 0;
  int64_t size = 0;
  Type type = Type::f32;
  Type k_type = Type::f32;
  double h = 0;                    // the step, unless h_device points to it on the GPU
  const void* h_device = nullptr;
  Type h_type = Type::f64;
};

struct ErrorCall {
  double rtol = 0;
  double atol = 0;
  double* partials = nullptr;      // room for the sums of the blocks
  void* ratio = nullptr;           // one number of the type of y
};

struct DenseCall {
  double p[kMaxStages][kMaxDegree] = {};
  int degree = 0;
  const double* theta = nullptr;   // [thetas]
  int64_t thetas = 0;
};

inline namespace FMFT_ISA {

// The same call with its types, without the stages that no weight reads.
template <class T, class K>
struct Step {
  T* out;
  const T* y;
  const K* k[kMaxStages];
  T w[kMaxStages];
  T w_err[kMaxStages];
  int stages;
  int64_t size;
  double h;
  const void* h_device;
  bool h_is_double;
};

template <class T, class K>
inline Step<T, K> typed(const StepCall& call) {
  Step<T, K> step{};
  step.out = static_cast<T*>(call.out);
  step.y = static_cast<const T*>(call.y);
  step.size = call.size;
  step.h = call.h;
  step.h_device = call.h_device;
  step.h_is_double = call.h_type == Type::f64;
  for (int s = 0; s < call.stages; ++s) {
    if (call.w[s] == 0 && call.w_err[s] == 0) continue;
    step.k[step.stages] = static_cast<const K*>(call.k[s]);
    step.w[step.stages] = static_cast<T>(call.w[s]);
    step.w_err[step.stages++] = static_cast<T>(call.w_err[s]);
  }
  return step;
}

template <class T, class K>
FMFT_HD T step_size(const Step<T, K>& step) {
  if (step.h_device == nullptr) return static_cast<T>(step.h);
  return step.h_is_double ? static_cast<T>(*static_cast<const double*>(step.h_device))
                          : static_cast<T>(*static_cast<const float*>(step.h_device));
}

template <class T, int N>
FMFT_HD Pack<T, N> load(const T* values, int64_t pack) {
  return reinterpret_cast<const Pack<T, N>*>(values)[pack];
}

template <class T, int N>
FMFT_HD void store(T* values, int64_t pack, const Pack<T, N>& value) {
  reinterpret_cast<Pack<T, N>*>(values)[pack] = value;
}

// S > 0 is the number of stages, known at compile time so that all loads are in flight at once.
template <int S, int N, class T, class K>
FMFT_HD void combine_at(const Step<T, K>& step, T h, int64_t pack) {
  Pack<T, N> total{};
#pragma unroll
  for (int s = 0; s < (S > 0 ? S : step.stages); ++s) {
    const Pack<K, N> k = load<K, N>(step.k[s], pack);
#pragma unroll
    for (int j = 0; j < N; ++j) total.at[j] += step.w[s] * widen<T>(k.at[j]);
  }
  Pack<T, N> y = load<T, N>(step.y, pack);
#pragma unroll
  for (int j = 0; j < N; ++j) y.at[j] += h * total.at[j];
  store<T, N>(step.out, pack, y);
}

template <class T>
FMFT_HD T magnitude(T x) {
  return x < 0 ? -x : x;
}

// Writes y1 and returns the scaled errors.
template <int S, int N, class T, class K>
FMFT_HD Pack<T, N> finish_at(const Step<T, K>& step, T h, T rtol, T atol, int64_t pack) {
  Pack<T, N> total{}, error{};
#pragma unroll
  for (int s = 0; s < (S > 0 ? S : step.stages); ++s) {
    const Pack<K, N> k = load<K, N>(step.k[s], pack);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const T value = widen<T>(k.at[j]);
      total.at[j] += step.w[s] * value;
      error.at[j] += step.w_err[s] * value;
    }
  }
  Pack<T, N> y = load<T, N>(step.y, pack);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const T before = magnitude(y.at[j]);
    y.at[j] += h * total.at[j];
    const T after = magnitude(y.at[j]);
    // A NaN in y1 makes the comparison false and so reaches the scale.
    const T scale = atol + rtol * (before > after ? before : after);
    error.at[j] = h * error.at[j] / scale;
  }
  store<T, N>(step.out, pack, y);
  return error;
}

// Writes `count` <= kThetaChunk rows of the dense output; q holds the weight of each stage at each theta.
template <int N, class T, class K>
FMFT_HD void dense_at(const Step<T, K>& step, T h, const T (&q)[kThetaChunk][kMaxStages], int count,
                      int64_t first_row, int64_t pack) {
  Pack<T, N> total[kThetaChunk] = {};
  for (int s = 0; s < step.stages; ++s) {
    const Pack<K, N> k = load<K, N>(step.k[s], pack);
#pragma unroll
    for (int m = 0; m < kThetaChunk; ++m) {
#pragma unroll
      for (int j = 0; j < N; ++j) total[m].at[j] += q[m][s] * widen<T>(k.at[j]);
    }
  }
  const Pack<T, N> y = load<T, N>(step.y, pack);
#pragma unroll
  for (int m = 0; m < kThetaChunk; ++m) {
#pragma unroll
    for (int j = 0; j < N; ++j) total[m].at[j] = y.at[j] + h * total[m].at[j];
    if (m < count) store<T, N>(step.out + (first_row + m) * step.size, pack, total[m]);
  }
}

// The weight of a stage at theta: sum_j p[j] theta^(j + 1).
FMFT_HD double stage_weight(const double* p, int degree, double theta) {
  double weight = 0;
  for (int j = degree - 1; j >= 0; --j) weight = (weight + p[j]) * theta;
  return weight;
}

// Calls run(step) with the types of the call.
template <class Run>
void with_types(const StepCall& call, Run run) {
  if (call.type == Type::f64) return run(typed<double, double>(call));
  if (call.k_type == Type::f16) return run(typed<float, f16>(call));
  if (call.k_type == Type::bf16) return run(typed<float, bf16>(call));
  return run(typed<float, float>(call));
}

// Calls run(step, Count<S>): up to 7 stages, those of Dormand-Prince and Tsitouras, are compiled for
// their number; 0 stands for any number.
template <int S>
struct Count {
  static constexpr int value = S;
};

template <class T, class K, class Run>
inline void with_count(const Step<T, K>& step, Run run) {
  switch (step.stages) {
    case 1: return run(step, Count<1>{});
    case 2: return run(step, Count<2>{});
    case 3: return run(step, Count<3>{});
    case 4: return run(step, Count<4>{});
    case 5: return run(step, Count<5>{});
    case 6: return run(step, Count<6>{});
    case 7: return run(step, Count<7>{});
    default: return run(step, Count<0>{});
  }
}

}  // namespace FMFT_ISA
}  // namespace fmft
