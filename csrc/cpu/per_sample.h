// Adaptive solves in which every row of the batch has its own steps.
#pragma once
#include "trajectory.h"

namespace fmft::cpu {

// A row of the batch: how its solve ended, and its accepted steps.
struct RowSolve {
  Outcome outcome = Outcome::done;
  int64_t rejected = 0;
  double last_ratio = 0;
  std::vector<double> starts, h;  // signed; after the starts comes the end of the last step
  std::vector<char> inputs;       // [steps, stages but the last, state]: of every stage the input
};

struct PerSample {
  Kept shape;  // kernels, parts and rows of a tile, without memory
  std::vector<double> c;
  std::vector<RowSolve> rows;
};

// The states at t1; the last step of a row ends there. The method is as for trajectory_adaptive.
// Stage inputs are kept unless `keep` is nothing. Throws Interrupted when `asks` tells to.
PerSample per_sample_forward(const Solve& solve, const std::vector<double>& c,
                             const std::vector<double>& b_err, int order, const Control& control,
                             double t0, double t1, Keep keep, void* out, bool (*asks)());

// The exact gradient, the steps being constant, of that of the final states.
void per_sample_backward(const Solve& solve, const PerSample& kept, const void* grad,
                         const Gradients& gradients);

}  // namespace fmft::cpu
