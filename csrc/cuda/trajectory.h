// A whole solve of a field made of affine layers, and its exact discrete adjoint, in one launch each.
//
// A block of warps owns 16 or 32 samples for all steps, a team of them each 16. Everything lives in
// shared memory: the weights as 1 to 3 bf16 terms, the values of the layers (staged in the same form,
// where the tensor cores read them), the state and the stages in float32. Where each of these lies, and
// between which layers the block must wait, is planned in fmft_fast/ops/cuda_plan.py; a `Field` is that
// plan.
#pragma once
#include <cstdint>
#include <vector>

#include "step.h"

namespace fmft::cuda {

constexpr int kMaxLayers = 12;
constexpr int kMaxTerms = 24;
constexpr int kMaxSkips = 12;
constexpr int kMaxParameters = 32;
constexpr int kMaxTables = 12;
constexpr int kMaxConds = 4;
constexpr int kMaxSolveStages = 7;

// One matrix: what `layer` adds up of the value `source`. All places are bytes of shared memory.
struct FieldTerm {
  int layer;
  int source;      // a value: 0 is the state, i + 1 the output of layer i
  int weight;      // number of the parameter, -1 for the identity
  int column;
  int packed;      // the weights
  int sums;        // the weights' gradient, in tiles of 16 x 16
  int first_warp;  // where the tiles of the gradient begin, so that all warps have work
};

// Tiles are 16 columns wide; one warp computes a tile for 16 rows.
struct FieldLayer {
  int width;
  int tiles;
  int first_warp;
  int wait;           // whether a value that is read may still be being written
  int wait_backward;  // likewise for the gradients that the gradient of this value reads
  int first_term, terms;
  int first_skip, skips;
  int first_consumer, consumers;  // terms that read the value, in `Field::consumers`
  int first_skipper, skippers;    // layers that add the value after their activation
  int bias, time, time_column, table, cond;  // -1 where there is none
  int activation;
  float slope;
  int vectors;       // float32: bias; the column of the time, if any; two rows of the table, if any
  int value;         // the output, in bf16 terms
  int delta;         // the gradient of the input of the activation, in bf16 terms
  int derivative;    // of the activation, in float32, in the order of the lanes
  int gradient;      // of the output, likewise, if later layers add this one; else -1
  int cond_at;       // the rows of `cond`, likewise
  int cond_sums;     // their gradient, likewise
  int vector_sums;   // a team's gradients of the bias and of the column of the time, and those of a stage
  int kept;          // number among Solve::values and Solve::deltas, -1 where nothing is kept
};

struct Field {
  int split;       // bf16 terms of a float32: 1, 2 or 3
  int row_tiles;   // rows of a block in units of 16: 1 or 2
  int warps;
  int bytes;       // shared memory
  int state;
  int state_tiles;
  int layers, terms;
  int first_consumer, consumers, first_skipper, skippers;  // of the state
  int zero_begin, zero_end;  // what must start as zero
  int state_value;  // the input of a stage, in bf16 terms
  int stages_at;    // float32 [1 + stages][state][rows]: the state and the stages, or their gradients
  int splits;       // parts of an inner dimension whose products with few columns the warps share
  int partial;      // float32 [splits][16 state_tiles][rows + 4]
  int slopes_at;    // float32 [state][rows]: the gradient of a stage (backward only)
  int inputs_at;    // float32 [state][rows]: the input of the next stage (backward only)
  int records_at;   // what steps read of the layers, see trajectory_block.h
  int deferred;     // whether the gradients of the weights are left to the caller
  int row_times_at;  // float32 [rows]: the times of the rows, where they differ
  FieldLayer layer[kMaxLayers];
  FieldTerm term[kMaxTerms];
  int skip[kMaxSkips];       // values
  int skipper[kMaxSkips];    // layers
  int consumer[kMaxTerms];   // terms
};

// The tensors of a solve: float32 and contiguous, 0 where absent.
struct Solve {
  const float* y0;
  float* out;          // [outputs, batch, state]
  float* kept;         // [steps stages, batch, state], the inputs of the stages
  const float* grad;   // of `out`
  float* grad_y0;
  float* partials;     // [blocks, gradient_size]
  const float* times;  // [steps, stages]
  const float* h;      // [steps]
  const int* first;    // [steps + 2], where the outputs of a state, or inside a step, begin
  const float* dense;  // [outputs, stages]
  // [steps stages, batch] and [steps, batch], if the samples have steps of their own: times and h.
  const float* row_times;
  const float* row_h;
  int64_t batch;
  int64_t gradient_size;
  int steps, stages;
  float a[kMaxSolveStages][kMaxSolveStages];
  float b[kMaxSolveStages];
  const float* parameter[kMaxParameters];
  int columns[kMaxParameters];             // of a row of the parameter
  int parameter_at[kMaxParameters];        // of its gradient in a row of `partials`, -1 if unwanted
  const float* table[kMaxTables];
  int64_t table_at[kMaxTables];
  const float* cond[kMaxConds];
  float* grad_cond[kMaxConds];
  float* values[kMaxLayers];               // [steps stages, batch, width], if deferred
  float* deltas[kMaxLayers];
};

// How a solve with step control went on, see fmft_fast/ops/accepted.py.
enum class Outcome : int { done, too_many_steps, underflow, not_finite, begun, on_its_way };

// What step control has come to, in 56 bytes. Times run as s = direction t and grow.
struct Progress {
  double s, h;   // h: of the next step, before it is clamped
  double ratio;  // of the last attempt's error
  int64_t attempts, rejected;  // attempts since the last time of the output
  int accepted;
  int next;      // output
  Outcome outcome;
};

// Step control as in fmft_fast/solvers/adaptive.py, for a method whose last stage is the first of the next
// step.
struct Control {
  double rtol, atol, safety, ifactor, dfactor, min_step, max_step;
  double first_step;  // NaN if it is to be guessed
  double c[kMaxSolveStages];
  float b_err[kMaxSolveStages];
  double dense[kMaxSolveStages][3];  // of theta^2 ... theta^4; theta has 1 for the first stage alone
  int64_t max_attempts;
  int order;
  int direction;
  int meet;           // whether steps end at the times of the output
  int kept_stages;    // of whose inputs Solve::kept holds those of a step
  int times;
  const double* t;    // [times]
  // With steps of their own, the samples have all of the following for each of them: the last axis.
  Progress* progress;
  float* states;      // [2][2][batch, state]: a state and its slope, and the next ones
  double* partials;   // [2][blocks][2]
  // Steps first_step_number ... + room may be taken; there is room for their times, sizes and inputs.
  int first_number, room;
  double* nodes;      // [room + 1]: where they begin, and the end of the last one; in the direction of s
  double* sizes;      // [room]
};

// Kernels of a solve; those of a solve with steps of the samples' own have 16 rows.
enum class Pass : int { forward, backward, adaptive, by_row, by_row_backward };

// How many blocks run at once on a device.
int trajectory_capacity(const Field& field, Pass pass, int device);
// Bytes of shared memory that a block may have.
int trajectory_shared_memory(int device);
int multiprocessors(int device);

void trajectory_forward(const Field& field, const Solve& solve, int blocks, const Queue& queue);
// The first call, or one that goes on after there was no room. The samples share their steps, or not.
void trajectory_adaptive(const Field& field, const Solve& solve, const Control& control, bool by_row,
                         int blocks, const Queue& queue);
// Steps of the samples' own if there is `row_h`. Also adds up the rows of `partials` into `gradients`
// [gradient_size].
void trajectory_backward(const Field& field, const Solve& solve, int blocks, float* gradients,
                         const Queue& queue);

}  // namespace fmft::cuda
