#include "trajectory.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "step.h"

namespace fmft::cpu {
namespace {

// Less work than this on a thread costs more to hand over than it saves.
constexpr double kWorkPerThread = 2e6;
// What a window of stages takes, so that it stays in the L2 cache; but never fewer rows than make
// the product for the gradients of a matrix worth its traffic.
constexpr int64_t kWindowBytes = 512 << 10;
constexpr int64_t kWindowRows = 384;
constexpr int64_t kCacheBytes = 512 << 10;

TrajectoryKernels kernels_in_use() {
  const std::string name = instruction_set();
#ifdef FMFT_X86_DISPATCH
  if (name == "avx512") return trajectory_avx512();
  if (name == "avx2") return trajectory_avx2();
#endif
  return trajectory_portable();
}

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

bool stores_slope(const Layer& layer) {
  return layer.activation != Activation::identity &&
         (layer.skip_count > 0 || !slope_from_value(layer.activation, layer.parameter));
}

// A memory that is laid out piece by piece; sizes and offsets count numbers.
class Space {
 public:
  explicit Space(int64_t line) : line_(line) {}
  int64_t take(int64_t size) {
    const int64_t offset = size_;
    size_ += up(size, line_);
    return offset;
  }
  int64_t size() const { return size_; }

 private:
  int64_t line_, size_ = 0;
};

struct Plan {
  std::vector<Value> values;
  std::vector<Layer> layers;
  std::vector<std::vector<Term>> terms;
  std::vector<uint8_t> live;
  Space packs, scratch, kept, gradients;
  Job job;

  explicit Plan(int64_t line) : packs(line), scratch(line), kept(line), gradients(line) {}
};

double work(const Solve& solve) {
  double madds = 0;
  for (size_t l = 0; l < solve.field->layers.size(); ++l)
    for (const Term& term : solve.field->terms[l]) {
      const int64_t in =
          term.source ? solve.field->layers[term.source - 1].width : solve.field->state;
      madds += static_cast<double>(in * solve.field->layers[l].width);
    }
  return 2 * madds * static_cast<double>(solve.batch * solve.steps * solve.method->stages);
}

int64_t choose_tile_rows(const Solve& solve, const TrajectoryKernels& kernels, int parts) {
  int64_t widest = solve.field->state, matrices = 0;
  for (size_t l = 0; l < solve.field->layers.size(); ++l) {
    widest = std::max(widest, solve.field->layers[l].width);
    matrices += solve.field->layers[l].width * solve.field->layers[l].width;
  }
  const int64_t size = solve.type == Type::f64 ? 8 : 4;
  const int64_t most = matrices * size > kCacheBytes ? 96 : widest * size > 128 ? 48 : 96;
  const int64_t share = (std::max<int64_t>(solve.batch, 1) + parts - 1) / parts;
  const int64_t tiles = (share + most - 1) / most;
  return up((share + tiles - 1) / tiles, kernels.block_rows);
}

void find_live_stages(const Solve& solve, std::vector<uint8_t>& live) {
  const int s = solve.method->stages;
  const auto mark = [&](uint8_t* step, const double* weights) {
    for (int i = 0; i < s; ++i) step[i] = step[i] || weights[i] != 0;
    for (int i = s - 1; i >= 0; --i)
      for (int j = i + 1; j < s; ++j)
        step[i] = step[i] || (step[j] && solve.method->a[j * s + i] != 0);
  };
  live.assign(std::max<int64_t>(solve.steps * s, 1), 0);
  for (int64_t n = 0; n < solve.steps; ++n) mark(&live[n * s], solve.method->b.data());
  if (solve.weights)
    for (size_t k = 0; k < solve.outputs.size(); ++k)
      mark(&live[solve.outputs[k] * s], solve.weights + k * s);
}

Plan make_plan(const Solve& solve, const TrajectoryKernels& kernels, int64_t tile_rows, Keep keep,
               const Gradients* gradients) {
  const Field& field = *solve.field;
  const int64_t size = solve.type == Type::f64 ? 8 : 4, line = 64 / size;
  const int64_t lanes = kernels.vector_bytes / size;
  const int count = static_cast<int>(field.layers.size());
  const bool backward = gradients != nullptr;
  const bool again = backward && keep == Keep::inputs;
  const int64_t stages = solve.steps * solve.method->stages;
  Plan plan(line);
  plan.layers = field.layers;
  plan.terms = field.terms;
  plan.values.resize(count + 1);
  int64_t longest = 0;
  for (int v = 0; v <= count; ++v) {
    Value& value = plan.values[v];
    value.width = v ? field.layers[v - 1].width : field.state;
    value.vectors = (value.width + lanes - 1) / lanes;
    value.narrow = 2 * value.width <= lanes;
    value.ld = value.narrow ? value.width : value.vectors * lanes;
    // Rows a multiple of two lines apart would meet in few sets of the cache.
    if (value.vectors > kernels.block_vectors && value.ld % (2 * line) == 0) value.ld += line;
    longest = std::max(longest, value.ld);
  }
  const auto wanted = [&](int parameter) {
    return backward && parameter >= 0 && gradients->parameters[parameter];
  };
  std::vector<bool> multiplied(count + 1), pulled(count + 1);
  for (int l = 0; l < count; ++l) {
    Layer& layer = plan.layers[l];
    layer.terms = plan.terms[l].data();
    layer.term_count = static_cast<int>(plan.terms[l].size());
    layer.skips = field.skips[l].data();
    layer.skip_count = static_cast<int>(field.skips[l].size());
    if (!layer.live) continue;
    const Value& out = plan.values[l + 1];
    for (Term& term : plan.terms[l]) {
      if (term.parameter < 0) continue;
      const Value& in = plan.values[term.source];
      multiplied[term.source] = true;
      const bool into = !backward || again;
      if (!out.narrow && (into || in.narrow))
        term.forward = plan.packs.take(in.width * out.vectors * lanes);
      if (!in.narrow && (backward || out.narrow))
        term.backward = plan.packs.take(out.width * in.vectors * lanes);
      if (!wanted(term.parameter)) continue;
      pulled[term.source] = pulled[l + 1] = true;
      term.gradient = plan.gradients.take(!in.narrow    ? out.width * in.vectors * lanes
                                          : !out.narrow ? in.width * out.vectors * lanes
                                                        : in.width * out.width);
    }
    if (!backward || again) {
      if (layer.bias >= 0) layer.bias_row = plan.packs.take(out.ld);
      if (layer.time >= 0) layer.time_row = plan.packs.take(out.ld);
    }
    if (wanted(layer.bias)) layer.bias_sum = plan.gradients.take(out.width);
    if (wanted(layer.time)) layer.time_sum = plan.gradients.take(out.width);
    if (backward && layer.table >= 0 && gradients->tables[layer.table])
      layer.table_sum = plan.gradients.take(stages * out.width);
  }

  // Kept memory first and in the same order in both passes.
  const auto place_kept = [&](Buffer& buffer, int64_t ld) {
    buffer = {plan.kept.take(stages * tile_rows * ld), true, true};
  };
  if (keep != Keep::nothing) place_kept(plan.values[0].value, plan.values[0].ld);
  for (int v = 1; v <= count && keep == Keep::activations; ++v) {
    Layer& layer = plan.layers[v - 1];
    if (!layer.live) continue;
    const bool derived = layer.activation != Activation::identity && !stores_slope(layer);
    if (multiplied[v] || derived) place_kept(plan.values[v].value, plan.values[v].ld);
    if (stores_slope(layer)) place_kept(layer.slope, plan.values[v].ld);
  }

  // A window of stages of what the gradients of the matrices read.
  int64_t row_numbers = 0;
  for (int v = 1; v <= count; ++v)
    if (pulled[v]) row_numbers += plan.values[v].ld * (again && v < count ? 2 : 1);
  const int64_t s = solve.method->stages, steps = std::max<int64_t>(solve.steps, 1);
  const int64_t rows = std::max(kWindowBytes / (std::max<int64_t>(row_numbers, 1) * size),
                                kWindowRows);
  int64_t window = std::clamp<int64_t>(rows / (s * tile_rows), 1, steps);
  const int64_t windows = (steps + window - 1) / window;
  window = (steps + windows - 1) / windows;

  const auto place = [&](Buffer& buffer, int64_t ld, bool per_stage) {
    buffer = {plan.scratch.take((per_stage ? window * s : 1) * tile_rows * ld), per_stage, false};
  };
  for (int v = 0; v <= count; ++v) {
    Value& value = plan.values[v];
    const bool live = v == 0 || plan.layers[v - 1].live;
    if (!live) continue;
    if (v > 0 && backward) place(value.delta, value.ld, pulled[v]);
    if (value.value.offset >= 0) continue;
    if (!backward && v < count) place(value.value, value.ld, false);
    if (again && v > 0 && (v < count || plan.layers[v - 1].activation != Activation::identity))
      place(value.value, value.ld, pulled[v] && v < count);
    if (again && v > 0 && stores_slope(plan.layers[v - 1]))
      place(plan.layers[v - 1].slope, value.ld, false);
  }
  const int64_t matrix = tile_rows * plan.values[0].ld;
  Job& job = plan.job;
  job.row = plan.scratch.take(longest);
  job.sums = plan.scratch.take(longest);
  job.spare = plan.scratch.take(matrix);
  if (backward) {
    job.gy = plan.scratch.take(matrix);
    job.gx = plan.scratch.take(s * matrix);
  } else {
    job.y = plan.scratch.take(matrix);
    job.k = plan.scratch.take(s * matrix);
  }

  find_live_stages(solve, plan.live);
  job.type = solve.type;
  job.batch = solve.batch;
  job.tile_rows = tile_rows;
  job.steps = solve.steps;
  job.stages = static_cast<int>(s);
  job.a = solve.method->a.data();
  job.b = solve.method->b.data();
  job.times = solve.times;
  job.h = solve.h;
  job.live = plan.live.data();
  job.outputs = static_cast<int64_t>(solve.outputs.size());
  job.output_at = solve.outputs.data();
  job.weights = solve.weights;
  job.values = plan.values.data();
  job.layers = plan.layers.data();
  job.layer_count = count;
  job.y0 = solve.y0;
  job.parameters = solve.parameters.data();
  job.leading = solve.leading.data();
  job.tables = solve.tables.data();
  job.conds = solve.conds.data();
  job.again = again;
  job.window = window;
  return plan;
}

// Runs run(memory, part) for all tiles.
template <class Run>
void each_tile(const Solve& solve, const Plan& plan, int64_t size, int parts, void* kept, Run run) {
  const int64_t rows = plan.job.tile_rows, tiles = (solve.batch + rows - 1) / rows;
  in_threads(parts, [&](int part) {
    TileMemory memory;
    memory.scratch = scratch_memory(plan.scratch.size() * size);
    for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
      memory.first = tile * rows;
      memory.rows = std::min(rows, solve.batch - memory.first);
      memory.kept = static_cast<char*>(kept) + tile * plan.kept.size() * size;
      run(memory, part);
    }
  });
}

// to[rows, columns] of this leading dimension += the sum of the parts' matrices, in their order.
template <class T>
void add_parts(T* to, int64_t leading, const T* from, int64_t row, int64_t column, int64_t rows,
               int64_t columns, int64_t stride, int parts) {
  for (int part = 0; part < parts; ++part, from += stride)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        to[i * leading + j] += from[i * row + j * column];
}

template <class T>
void collect(const Solve& solve, const Plan& plan, const Gradients& gradients, const T* from,
             int64_t lanes, int parts) {
  const int64_t stride = plan.gradients.size();
  for (size_t p = 0; p < gradients.parameters.size(); ++p)
    if (gradients.parameters[p])
      memset(gradients.parameters[p], 0, gradients.rows[p] * gradients.columns[p] * sizeof(T));
  for (size_t t = 0; t < gradients.tables.size(); ++t) {
    if (!gradients.tables[t]) continue;
    for (const Layer& layer : plan.layers)
      if (layer.table == static_cast<int>(t))
        memset(gradients.tables[t], 0,
               solve.steps * solve.method->stages * layer.width * sizeof(T));
  }
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const Layer& layer = plan.layers[l];
    const Value& out = plan.values[l + 1];
    for (const Term& term : plan.terms[l]) {
      if (term.gradient < 0) continue;
      const Value& in = plan.values[term.source];
      T* to = static_cast<T*>(gradients.parameters[term.parameter]) + term.column;
      const bool across = in.narrow && !out.narrow;
      const int64_t row = across ? 1 : in.narrow ? in.width : in.vectors * lanes;
      const int64_t column = across ? out.vectors * lanes : 1;
      add_parts(to, gradients.columns[term.parameter], from + term.gradient, row, column,
                out.width, in.width, stride, parts);
    }
    if (layer.bias_sum >= 0)
      add_parts(static_cast<T*>(gradients.parameters[layer.bias]), 1, from + layer.bias_sum, 1, 1,
                layer.width, 1, stride, parts);
    if (layer.time_sum >= 0)
      add_parts(static_cast<T*>(gradients.parameters[layer.time]) + layer.time_column,
                gradients.columns[layer.time], from + layer.time_sum, 1, 1, layer.width, 1, stride,
                parts);
    if (layer.table_sum >= 0)
      add_parts(static_cast<T*>(gradients.tables[layer.table]), 0, from + layer.table_sum, 0, 1, 1,
                solve.steps * solve.method->stages * layer.width, stride, parts);
  }
}

}  // namespace

Kept trajectory_forward(const Solve& solve, Keep keep, void* out) {
  Kept kept;
  kept.kernels = kernels_in_use();
  kept.keep = keep;
  const int64_t blocks = (solve.batch + kept.kernels.block_rows - 1) / kept.kernels.block_rows;
  const double useful = std::min(work(solve) / kWorkPerThread, static_cast<double>(blocks));
  kept.parts = std::max(1, std::min(solve.threads, static_cast<int>(useful)));
  kept.tile_rows = choose_tile_rows(solve, kept.kernels, kept.parts);
  const int64_t size = solve.type == Type::f64 ? 8 : 4;
  Plan plan = make_plan(solve, kept.kernels, kept.tile_rows, keep, nullptr);
  const int64_t tiles = (solve.batch + kept.tile_rows - 1) / kept.tile_rows;
  kept.memory = Memory(tiles * plan.kept.size() * size);
  const Memory packs(plan.packs.size() * size);
  plan.job.packs = packs.data();
  plan.job.out = out;
  kept.kernels.pack(plan.job);
  each_tile(solve, plan, size, kept.parts, kept.memory.data(),
            [&](const TileMemory& memory, int) { kept.kernels.forward(plan.job, memory); });
  return kept;
}

void trajectory_backward(const Solve& solve, const Kept& kept, const void* grad,
                         const Gradients& gradients) {
  if (kept.keep == Keep::nothing)
    throw std::invalid_argument("expected a forward pass that kept its stage inputs, got none");
  const int64_t size = solve.type == Type::f64 ? 8 : 4;
  Plan plan = make_plan(solve, kept.kernels, kept.tile_rows, kept.keep, &gradients);
  const Memory packs(plan.packs.size() * size);
  const Memory parts(plan.gradients.size() * size * kept.parts);
  memset(parts.data(), 0, plan.gradients.size() * size * kept.parts);
  for (size_t l = 0; l < plan.layers.size(); ++l)
    if (const int cond = plan.layers[l].cond; cond >= 0 && gradients.conds[cond])
      memset(gradients.conds[cond], 0, solve.batch * plan.layers[l].width * size);
  plan.job.packs = packs.data();
  plan.job.grad = grad;
  plan.job.grad_y0 = gradients.y0;
  plan.job.grad_conds = gradients.conds.data();
  kept.kernels.pack(plan.job);
  each_tile(solve, plan, size, kept.parts, kept.memory.data(),
            [&](TileMemory memory, int part) {
              memory.gradients =
                  static_cast<char*>(parts.data()) + part * plan.gradients.size() * size;
              kept.kernels.backward(plan.job, memory);
            });
  const int64_t lanes = kept.kernels.vector_bytes / size;
  if (solve.type == Type::f64)
    collect(solve, plan, gradients, static_cast<const double*>(parts.data()), lanes, kept.parts);
  else
    collect(solve, plan, gradients, static_cast<const float*>(parts.data()), lanes, kept.parts);
}

}  // namespace fmft::cpu
