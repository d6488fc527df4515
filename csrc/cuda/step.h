// Launchers of the step ops on a GPU. Nothing here waits for the device.
#pragma once
#include <cstdint>

#include "../core/step.h"

namespace fmft::cuda {

// Numbers that ErrorCall::partials must hold, and the largest grid of rk_finish: it depends on the size
// of the state alone, so that the order of the sum does too.
constexpr int kPartials = 1024;

// Where to launch: `stream` is a cudaStream_t of `device`.
struct Queue {
  int device = 0;
  void* stream = nullptr;
};

void rk_combine(const StepCall& call, const Queue& queue);
void rk_finish(const StepCall& call, const ErrorCall& error, const Queue& queue);
void dense_eval(const StepCall& call, const DenseCall& dense, const Queue& queue);

int runtime_version();
int device_count();  // 0 where there is no GPU or no driver

}  // namespace fmft::cuda
