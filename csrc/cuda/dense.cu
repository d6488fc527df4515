#include "launch.h"

namespace fmft::cuda {
namespace {

template <int N, class T, class K>
void run(const Step<T, K>& step, const DenseCall& dense, const Queue& queue) {
  const int64_t chunks = (dense.thetas + kThetaChunk - 1) / kThetaChunk;
  const dim3 grid(blocks_for(step.size / N, kMaxBlocks),
                  static_cast<unsigned>(std::min<int64_t>(chunks, 65535)));
  launch(dense_kernel<N, T, K>, grid, kThreads, stream_of(queue), step, dense);
}

}  // namespace

void dense_eval(const StepCall& call, const DenseCall& dense, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  with_types(call, [&]<class T, class K>(const Step<T, K>& step) {
    // Row m of the output begins at m * size, so that the size decides on its alignment too.
    if (step.size % kWidth<T> == 0 && aligned<kWidth<T>>(step))
      run<kWidth<T>>(step, dense, queue);
    else
      run<1>(step, dense, queue);
  });
  check(cudaGetLastError(), "launching dense_eval");
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "asking for the CUDA runtime's version");
  return version;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace fmft::cuda
