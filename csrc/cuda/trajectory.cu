#include "trajectory.h"

#include "trajectory_launch.h"

namespace fmft::cuda {
namespace {

// Adds up the rows of `partials`, 32 columns per block, in an order that depends on their number alone.
constexpr int kReduceGroups = 16;

FMFT_KERNEL __launch_bounds__(32 * kReduceGroups) reduce_kernel(const float* partials, int rows,
                                                                int64_t size, float* out) {
  FMFT_SHARED float sums[kReduceGroups][32];
  const int group = warp();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane();
  float sum = 0.0f;
  if (column < size) {
#pragma unroll 4
    for (int row = group; row < rows; row += kReduceGroups) sum += partials[row * size + column];
  }
  sums[group][lane()] = sum;
  __syncthreads();
  if (group > 0 || column >= size) return;
  for (int other = 1; other < kReduceGroups; ++other) sum += sums[other][lane()];
  out[column] = sum;
}

// Whether all hidden layers have kCommonTiles tiles, one for every warp of a team, and first of all read the
// layer before, as the layers of a perceptron do.
bool has_common_tiles(const Field& field) {
  const int last = field.layers - 1;
  if (last == 0 || field.state_tiles > 1 || field.warps != kCommonTiles * field.row_tiles) return false;
  for (int i = 0; i < last; ++i) {
    const FieldLayer& layer = field.layer[i];
    if (layer.tiles != kCommonTiles || layer.first_warp > 0 || layer.consumers == 0) return false;
    const int source = field.term[layer.first_term].source;
    const int reader = field.term[field.consumer[layer.first_consumer]].layer;
    if ((source == 0) != (i == 0) || (reader == last) != (i == last - 1)) return false;
  }
  return true;
}

TrajectoryKernel kernel_of(const Field& field, Pass pass) {
  const bool common = has_common_tiles(field);
  switch (field.split) {
    case 1:
      return trajectory_kernel<1>(field.row_tiles, pass, common);
    case 2:
      return trajectory_kernel<2>(field.row_tiles, pass, common);
    default:
      return trajectory_kernel<3>(field.row_tiles, pass, common);
  }
}

AdaptiveKernel adaptive_kernel_of(const Field& field, Pass pass) {
  switch (field.split) {
    case 1:
      return adaptive_kernel_of<1>(field.row_tiles, pass);
    case 2:
      return adaptive_kernel_of<2>(field.row_tiles, pass);
    default:
      return adaptive_kernel_of<3>(field.row_tiles, pass);
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking for a CUDA device's limits");
  return value;
}

void run(const Field& field, const Solve& solve, Pass pass, int blocks, const Queue& queue) {
  launch_with(field.bytes, kernel_of(field, pass), blocks, 32 * field.warps, stream_of(queue), field,
              solve);
  check(cudaGetLastError(),
        pass == Pass::forward ? "launching a solve" : "launching the adjoint of a solve");
}

// Lets a kernel have the shared memory of a device, and asks how many blocks run at once there.
template <class Kernel>
int capacity_of(Kernel kernel, const Field& field, int device) {
  const char* what = "reserving shared memory for a solve";
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             trajectory_shared_memory(device)),
        what);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        what);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 32 * field.warps,
                                                      static_cast<size_t>(field.bytes)),
        what);
  return blocks * multiprocessors(device);
}

}  // namespace

int trajectory_shared_memory(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

int trajectory_capacity(const Field& field, Pass pass, int device) {
  const DeviceGuard guard(device);
  if (pass == Pass::adaptive || pass == Pass::by_row)
    return capacity_of(adaptive_kernel_of(field, pass), field, device);
  return capacity_of(kernel_of(field, pass), field, device);
}

void trajectory_forward(const Field& field, const Solve& solve, int blocks, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  run(field, solve, Pass::forward, blocks, queue);
}

void trajectory_adaptive(const Field& field, const Solve& solve, const Control& control, bool by_row,
                         int blocks, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  const AdaptiveKernel kernel = adaptive_kernel_of(field, by_row ? Pass::by_row : Pass::adaptive);
  const int threads = 32 * field.warps;
  if (by_row)
    launch_with(field.bytes, kernel, blocks, threads, stream_of(queue), field, solve, control);
  else
    launch_together(field.bytes, kernel, blocks, threads, stream_of(queue), field, solve, control);
  check(cudaGetLastError(), "launching an adaptive solve");
}

void trajectory_backward(const Field& field, const Solve& solve, int blocks, float* gradients,
                         const Queue& queue) {
  const DeviceGuard guard(queue.device);
  run(field, solve, solve.row_h == nullptr ? Pass::backward : Pass::by_row_backward, blocks, queue);
  if (solve.partials == nullptr || solve.gradient_size == 0) return;
  launch(reduce_kernel, static_cast<unsigned>((solve.gradient_size + 31) / 32), 32 * kReduceGroups,
         stream_of(queue), static_cast<const float*>(solve.partials), blocks, solve.gradient_size,
         gradients);
  check(cudaGetLastError(), "launching the sum of a solve's gradients");
}

}  // namespace fmft::cuda
