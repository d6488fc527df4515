#include "launch.h"

namespace fmft::cuda {
namespace {

template <int S, int N, class T, class K>
void run(const Step<T, K>& step, const ErrorCall& error, const Queue& queue) {
  const unsigned blocks = blocks_for(step.size / N, kPartials);
  launch(finish_kernel<S, N, T, K>, blocks, kThreads, stream_of(queue), step,
         static_cast<T>(error.rtol), static_cast<T>(error.atol), error.partials);
  launch(ratio_kernel<T>, 1, kThreads, stream_of(queue), error.partials, static_cast<int>(blocks),
         step.size, static_cast<T*>(error.ratio));
}

}  // namespace

void rk_finish(const StepCall& call, const ErrorCall& error, const Queue& queue) {
  const DeviceGuard guard(queue.device);
  with_types(call, [&]<class T, class K>(const Step<T, K>& typed_step) {
    if (!aligned<kWidth<T>>(typed_step)) return run<0, 1>(typed_step, error, queue);
    with_count(typed_step, [&](const Step<T, K>& step, auto count) {
      run<decltype(count)::value, kWidth<T>>(step, error, queue);
    });
  });
  check(cudaGetLastError(), "launching rk_finish");
}

}  // namespace fmft::cuda
