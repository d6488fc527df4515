// Whole trajectories of a network on the CPU. The batch is cut into tiles of rows; a tile goes
// through all steps, stages and layers while it is in the cache, forward and backward.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../core/step.h"
#include "activation_kind.h"
#include "threads.h"

namespace fmft {

constexpr int kMaxLayers = 1024;

// Matrices [rows, ld] for every stage, or one that all stages share.
struct Buffer {
  int64_t offset = -1;  // -1: absent
  bool per_stage = false;
  bool kept = false;  // in the chunks of memory that last from the forward to the backward pass
};

// A value of the network in a tile. Narrow ones are dense; others are padded to whole vectors.
struct Value {
  int64_t width = 0, ld = 0, vectors = 0;
  bool narrow = false;
  Buffer value, delta;  // delta: the gradient of z, before that of the value
};

struct Term {
  int source = 0;
  int parameter = -1;  // -1: the identity
  int64_t column = 0;
  int64_t forward = -1, backward = -1;  // W^T and W among the packs
  int64_t gradient = -1;
};

struct Layer {
  int64_t width = 0;
  int bias = -1, time = -1, table = -1, cond = -1;
  int64_t time_column = 0;
  Activation activation = Activation::identity;
  double parameter = 1;
  const Term* terms = nullptr;
  int term_count = 0;
  const int* skips = nullptr;
  int skip_count = 0;
  bool live = true;       // whether the velocity depends on it
  bool keeps_slope = false;
  Buffer slope;           // activation'(z), where it is not a function of the value
  int64_t bias_row = -1, time_row = -1;                      // among the packs
  int64_t bias_sum = -1, time_sum = -1, table_sum = -1;      // among the gradients
};

// One solve as the kernels see it. Offsets count numbers of the solve's type.
struct Job {
  Type type = Type::f32;
  int64_t batch = 0, tile_rows = 0;
  int64_t steps = 0;
  int stages = 0;
  // The last stage of a step is the first of the next one: its values and deltas lie there, and the
  // slot after the last step holds that of the last step.
  bool shared = false;
  const double *a = nullptr, *b = nullptr, *times = nullptr, *h = nullptr;
  int64_t chunk = 1;              // slots in a chunk of the kept memory
  const uint8_t* live = nullptr;  // of every slot: whether anything reads the stage
  int64_t outputs = 0;
  const int64_t* output_at = nullptr;
  const double* weights = nullptr;
  const Value* values = nullptr;
  const Layer* layers = nullptr;
  int layer_count = 0;

  const void* y0 = nullptr;
  const void* const* parameters = nullptr;
  const int64_t* leading = nullptr;
  const void* const* tables = nullptr;
  const void* const* conds = nullptr;
  void* out = nullptr;

  const void* grad = nullptr;
  void* grad_y0 = nullptr;
  void* const* grad_conds = nullptr;
  bool again = false;  // the backward pass computes the values from the stage inputs
  bool direct = false;  // values are computed from the weights where they lie, without packing
  int64_t window = 1;  // steps between two products for the gradients of the matrices
  int64_t lost = 0;  // where what the gradients' sums lose lies behind them; 0: nowhere

  void* packs = nullptr;
  // In the scratch memory.
  int64_t row = 0, sums = 0, y = 0, k = 0, gy = 0, gx = 0, spare = 0, row_steps = 0;
};

struct TileMemory {
  int64_t first = 0, rows = 0;
  void* const* kept = nullptr;  // the chunks, in which the tile begins at kept_offset
  int64_t kept_offset = 0;
  void *scratch = nullptr, *gradients = nullptr;
  void* state = nullptr;  // what an adaptive solve carries from step to step
};

// A step of an adaptive solve. In the tile's state lie matrices [tile_rows, ld] of the state's
// width: y, the next y, and the stages.
struct Attempt {
  int64_t step = 0;     // number of the step
  double h = 0;         // signed
  const double* times = nullptr;  // [stages]
  const double* row_h = nullptr;  // the steps of every row, and then times are [stages, tile_rows]
  const double* b_err = nullptr;
  double rtol = 0, atol = 0;
  int y = 0, next = 1;  // numbers of the matrices
  int k[kMaxStages] = {};
};

// A value of few rows: a product with weights, or else the activation of an earlier value.
struct Link {
  int source = 0;               // 0 is the input, i + 1 the value of link i
  int weight = -1, bias = -1;   // numbers of parameters
  Activation activation = Activation::identity;
  double parameter = 1;
  int64_t inputs = 0, outputs = 0;
};

// Links one after the other; all values are dense.
struct Chain {
  Type type = Type::f32;
  int64_t rows = 0;
  const Link* links = nullptr;
  int count = 0;
  const void* const* parameters = nullptr;
  const int64_t* leading = nullptr;
  void* const* values = nullptr;  // the input, and then room for the value of every link
};

struct TrajectoryKernels {
  const char* isa;
  int vector_bytes;
  int block_rows, block_vectors;
  void (*pack)(const Job&);
  void (*forward)(const Job&, const TileMemory&);
  void (*backward)(const Job&, const TileMemory&);
  // Adaptive solves. Sums of squares over the entries of every row, in units of the allowed error:
  // of y0 and [tile_rows] numbers later its slope; of the change of slope after a step of h; of
  // the error of a step.
  void (*start)(const Job&, const TileMemory&, const Attempt&, double* sums);
  void (*probe)(const Job&, const TileMemory&, const Attempt&, double* sums);
  void (*attempt)(const Job&, const TileMemory&, const Attempt&, double* sums);
  // One output from the stages of the last step.
  void (*interpolate)(const Job&, const TileMemory&, const Attempt&, const double* weights,
                      void* out);
  // The adjoint of a step, for rows with steps of their own.
  void (*step_back)(const Job&, const TileMemory&, const Attempt&);
  void (*chain)(const Chain&);
};

const TrajectoryKernels& trajectory_portable();
const TrajectoryKernels& trajectory_avx2();
const TrajectoryKernels& trajectory_avx512();

namespace cpu {

// What does not change from solve to solve.
struct Field {
  int64_t state = 0;
  std::vector<Layer> layers;
  std::vector<std::vector<Term>> terms;
  std::vector<std::vector<int>> skips;
  int tables = 0, conds = 0;
};

struct Method {
  int stages = 0;
  std::vector<double> a, b;  // [s, s] and [s]
};

enum class Keep : int { nothing, inputs, activations };

struct Solve {
  const Field* field = nullptr;
  const Method* method = nullptr;
  Type type = Type::f32;
  bool shared = false;  // see Job
  int threads = 1;
  int64_t batch = 0, steps = 0;
  const double *times = nullptr, *h = nullptr;
  std::vector<int64_t> outputs;
  const double* weights = nullptr;
  const void* y0 = nullptr;
  std::vector<const void*> parameters, tables, conds;
  std::vector<int64_t> leading;
};

// What the backward pass needs of the forward pass.
struct Kept {
  const TrajectoryKernels* kernels = nullptr;
  Keep keep = Keep::nothing;
  int parts = 1;
  int64_t tile_rows = 0;
  bool direct = false;  // see Job
  int64_t slots = 1;  // stages that a chunk has room for
  std::vector<Memory> chunks;

  Kept() = default;
  Kept(Kept&&) = default;
  Kept& operator=(Kept&&) = default;
};

// Where the gradients go; nullptr where they are not wanted.
struct Gradients {
  void* y0 = nullptr;
  std::vector<void*> parameters, tables, conds;
  std::vector<int64_t> sizes, leading;  // of the parameters
};

const TrajectoryKernels& kernels_in_use();

Kept trajectory_forward(const Solve& solve, Keep keep, void* out);
void trajectory_backward(const Solve& solve, const Kept& kept, const void* grad,
                         const Gradients& gradients);

// Step control as in fmft_fast/solvers/adaptive.py.
struct Control {
  double rtol, atol, safety, ifactor, dfactor, min_step, max_step;
  int64_t max_num_steps;
  double first_step;  // NaN: chosen here
  bool meet;          // whether a step ends at every wanted time
};

enum class Outcome : int { done, too_many_steps, underflow, not_finite };

// The accepted steps of an adaptive solve, and how it ended.
struct Steps {
  Outcome outcome = Outcome::done;
  std::vector<double> times, h, weights;
  std::vector<int64_t> outputs;
  int64_t rejected = 0, evaluations = 0;
  double last_ratio = 0;
  Kept kept;
};

// Outputs at all times t; the method's last stage is the first of the next step, and its last node
// is 1. `dense` [s, 4] are the coefficients of the dense output. Throws Interrupted when `asks` tells to.
Steps trajectory_adaptive(const Solve& solve, const std::vector<double>& c,
                          const std::vector<double>& b_err, const std::vector<double>& dense,
                          int order, const Control& control, const std::vector<double>& t,
                          Keep keep, void* out, bool (*asks)());

}  // namespace cpu
}  // namespace fmft
