#include "launch.h"

namespace fmft::cuda {
namespace {

template <int S, int N, class T, class K>
void run(const Step<T, K>& step, const Queue& queue) {
  launch(combine_kernel<S, N, T, K>, blocks_for(step.size / N, kMaxBlocks), kThreads,
         stream_of(queue), step);
}

}  // namespace

void rk_combine(const StepCall& call, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  with_types(call, [&]<class T, class K>(const Step<T, K>& typed_step) {
    if (!aligned<kWidth<T>>(typed_step)) return run<0, 1>(typed_step, queue);
    with_count(typed_step, [&](const Step<T, K>& step, auto count) {
      run<decltype(count)::value, kWidth<T>>(step, queue);
    });
  });
  check(cudaGetLastError(), "launching rk_combine");
}

}  // namespace fmft::cuda
