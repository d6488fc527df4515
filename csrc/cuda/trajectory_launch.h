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

// The number of tiles of hidden layers for which there are kernels of their own.
constexpr int kCommonTiles = 4;

// `common`: whether the field has such layers.
template <int T>
TrajectoryKernel trajectory_kernel(int row_tiles, Pass pass, bool common);
template <int T>
AdaptiveKernel adaptive_kernel_of(int row_tiles, Pass pass);

template <int T, int M, int W>
TrajectoryKernel kernel_of_pass(Pass pass) {
  return pass == Pass::backward ? backward_kernel<T, M, false, W> : forward_kernel<T, M, W>;
}

#define FMFT_TRAJECTORY_KERNELS(T)                                                        \
  template <>                                                                             \
  TrajectoryKernel trajectory_kernel<T>(int row_tiles, Pass pass, bool common) {          \
    constexpr int kTiles = kCommonTiles;                                                  \
    if (pass == Pass::by_row_backward) return backward_kernel<T, 1, true>;                \
    if (row_tiles == 1)                                                                   \
      return common ? kernel_of_pass<T, 1, kTiles>(pass) : kernel_of_pass<T, 1, 0>(pass); \
    return common ? kernel_of_pass<T, 2, kTiles>(pass) : kernel_of_pass<T, 2, 0>(pass);   \
  }

#define FMFT_ADAPTIVE_KERNELS(T)                                                     \
  template <>                                                                        \
  AdaptiveKernel adaptive_kernel_of<T>(int row_tiles, Pass pass) {                   \
    if (pass == Pass::by_row) return rows_kernel<T>;                                 \
    return row_tiles == 1 ? adaptive_kernel<T, 1> : adaptive_kernel<T, 2>;           \
  }

}  // namespace fmft::cuda
