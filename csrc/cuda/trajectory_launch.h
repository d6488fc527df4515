// One launcher per number of bf16 terms, each in sources of its own: they compile side by side.
#pragma once
#include "launch.h"
#include "trajectory_adaptive.h"
#include "trajectory_adjoint.h"
#include "trajectory_forward.h"

namespace fmft::cuda {

static_assert(sizeof(Field) + sizeof(Solve) + sizeof(Control) <= 4096,
              "CUDA before 12.1 passes 4096 bytes to a kernel");

using TrajectoryKernel = void (*)(Field, Solve);
using AdaptiveKernel = void (*)(Field, Solve, Control);

template <int T>
TrajectoryKernel trajectory_kernel(int row_tiles, Pass pass);
template <int T>
AdaptiveKernel adaptive_kernel_of(int row_tiles, Pass pass);

#define FMFT_TRAJECTORY_KERNELS(T)                                                   \
  template <>                                                                        \
  TrajectoryKernel trajectory_kernel<T>(int row_tiles, Pass pass) {                  \
    if (pass == Pass::by_row_backward) return backward_kernel<T, 1, true>;           \
    if (pass == Pass::backward)                                                      \
      return row_tiles == 1 ? backward_kernel<T, 1, false> : backward_kernel<T, 2, false>; \
    return row_tiles == 1 ? forward_kernel<T, 1> : forward_kernel<T, 2>;             \
  }

#define FMFT_ADAPTIVE_KERNELS(T)                                                     \
  template <>                                                                        \
  AdaptiveKernel adaptive_kernel_of<T>(int row_tiles, Pass pass) {                   \
    if (pass == Pass::by_row) return rows_kernel<T>;                                 \
    return row_tiles == 1 ? adaptive_kernel<T, 1> : adaptive_kernel<T, 2>;           \
  }

}  // namespace fmft::cuda
