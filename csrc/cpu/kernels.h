// The loops of the step ops over a range of the state, one table of them per instruction set.
#pragma once
#include "../core/step.h"

namespace fmft {

struct CpuKernels {
  const char* isa;
  void (*combine)(const StepCall&, int64_t begin, int64_t end);
  double (*finish)(const StepCall&, const ErrorCall&, int64_t begin, int64_t end);  // sum of squares
  void (*dense)(const StepCall&, const DenseCall&, int64_t begin, int64_t end);
};

CpuKernels kernels_portable();
CpuKernels kernels_avx2();
CpuKernels kernels_avx512();

}  // namespace fmft
