// Compiled once per instruction set with FMFT_ISA naming it. Nothing of the standard library here: its
// inline functions could leak the instruction set into the rest of the module.
#include "kernels.h"

#define FMFT_JOIN_(a, b) a##b
#define FMFT_JOIN(a, b) FMFT_JOIN_(a, b)
#define FMFT_TEXT_(a) #a
#define FMFT_TEXT(a) FMFT_TEXT_(a)

namespace fmft {
inline namespace FMFT_ISA {

constexpr int64_t kErrorBlock = 512;
constexpr int kLanes = 16;

template <int S, class T, class K>
void combine_range(const Step<T, K> step, int64_t begin, int64_t end) {
  const T h = step_size(step);
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) combine_at<S, 1>(step, h, i);
}

void combine(const StepCall& call, int64_t begin, int64_t end) {
  with_types(call, [=](const auto& typed_step) {
    with_count(typed_step, [=](const auto& step, auto count) {
      combine_range<decltype(count)::value>(step, begin, end);
    });
  });
}

// A fixed order of summation: lane j takes every 16th square, the lanes are added at the end.
template <class T>
double sum_of_squares(const T* values, int64_t size) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const double value = values[i + j];
      lanes[j] += value * value;
    }
  double total = 0;
  for (; i < size; ++i) total += static_cast<double>(values[i]) * values[i];
  for (int j = 0; j < kLanes; ++j) total += lanes[j];
  return total;
}

template <int S, class T, class K>
double finish_range(const Step<T, K> step, const ErrorCall& error, int64_t begin, int64_t end) {
  const T h = step_size(step);
  const T rtol = static_cast<T>(error.rtol), atol = static_cast<T>(error.atol);
  T errors[kErrorBlock];
  double total = 0;
  for (int64_t first = begin; first < end; first += kErrorBlock) {
    const int64_t size = end - first < kErrorBlock ? end - first : kErrorBlock;
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i)
      errors[i] = finish_at<S, 1>(step, h, rtol, atol, first + i).at[0];
    total += sum_of_squares(errors, size);
  }
  return total;
}

double finish(const StepCall& call, const ErrorCall& error, int64_t begin, int64_t end) {
  double total = 0;
  with_types(call, [&](const auto& typed_step) {
    with_count(typed_step, [&](const auto& step, auto count) {
      total = finish_range<decltype(count)::value>(step, error, begin, end);
    });
  });
  return total;
}

template <class T, class K>
void dense_range(const Step<T, K> step, const DenseCall& dense, int64_t begin, int64_t end) {
  const T h = step_size(step);
  for (int64_t row = 0; row < dense.thetas; row += kThetaChunk) {
    const int64_t rest = dense.thetas - row;
    const int count = static_cast<int>(rest < kThetaChunk ? rest : kThetaChunk);
    T q[kThetaChunk][kMaxStages] = {};
    for (int m = 0; m < count; ++m)
      for (int s = 0; s < step.stages; ++s)
        q[m][s] = static_cast<T>(stage_weight(dense.p[s], dense.degree, dense.theta[row + m]));
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) dense_at<1>(step, h, q, count, row, i);
  }
}

void dense(const StepCall& call, const DenseCall& dense, int64_t begin, int64_t end) {
  with_types(call, [&](const auto& step) { dense_range(step, dense, begin, end); });
}

}  // namespace FMFT_ISA

CpuKernels FMFT_JOIN(kernels_, FMFT_ISA)() { return {FMFT_TEXT(FMFT_ISA), combine, finish, dense}; }

}  // namespace fmft
