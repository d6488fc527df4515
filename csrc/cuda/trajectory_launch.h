// One launcher per number of bf16 terms, each in a source of its own: they compile side by side.
#pragma once
#include "launch.h"
#include "trajectory_adjoint.h"

namespace fmft::cuda {

static_assert(sizeof(Field) + sizeof(Solve) <= 4096, "CUDA before 12.1 passes 4096 bytes to a kernel");

using TrajectoryKernel = void (*)(Field, Solve);

template <int T>
TrajectoryKernel trajectory_kernel(int row_tiles, bool backward);

#define FMFT_TRAJECTORY_KERNELS(T)                                                     \
  template <>                                                                          \
  TrajectoryKernel trajectory_kernel<T>(int row_tiles, bool backward) {                \
    if (backward) return row_tiles == 1 ? backward_kernel<T, 1> : backward_kernel<T, 2>; \
    return row_tiles == 1 ? forward_kernel<T, 1> : forward_kernel<T, 2>;               \
  }

}  // namespace fmft::cuda
