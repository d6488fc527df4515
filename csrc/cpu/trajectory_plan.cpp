#include "trajectory_plan.h"

#include <algorithm>

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
// Without packing, every number of a product ends in a sum over lanes. It takes as long as packing
// so many weights, unless few rows wait for weights that do not fit the cache.
constexpr int64_t kSumCost = 8;
constexpr int64_t kFewRows = 4;

bool stores_slope(const Layer& layer) {
  return layer.activation != Activation::identity &&
         (layer.skip_count > 0 || !slope_from_value(layer.activation, layer.parameter));
}

// Weights of all products, and the numbers that these give for a row of the batch.
struct Products {
  int64_t weights = 0, sums = 0;
};

Products products_of(const Field& field) {
  Products all;
  for (size_t l = 0; l < field.layers.size(); ++l)
    for (const Term& term : field.terms[l]) {
      if (term.parameter < 0) continue;
      all.weights += field.layers[l].width *
                     (term.source ? field.layers[term.source - 1].width : field.state);
      all.sums += field.layers[l].width;
    }
  return all;
}

int64_t choose_tile_rows(const Solve& solve, const TrajectoryKernels& kernels, int parts) {
  int64_t widest = solve.field->state, matrices = 0;
  for (size_t l = 0; l < solve.field->layers.size(); ++l) {
    widest = std::max(widest, solve.field->layers[l].width);
    matrices += solve.field->layers[l].width * solve.field->layers[l].width;
  }
  const int64_t size = number_size(solve.type);
  const int64_t most = matrices * size > kCacheBytes ? 96 : widest * size > 128 ? 48 : 96;
  const int64_t share = (std::max<int64_t>(solve.batch, 1) + parts - 1) / parts;
  const int64_t tiles = (share + most - 1) / most;
  return round_up((share + tiles - 1) / tiles, kernels.block_rows);
}

void find_live_stages(const Solve& solve, std::vector<uint8_t>& live) {
  const int s = solve.method->stages, slots = s - solve.shared;
  const auto mark = [&](uint8_t* step, const double* weights) {
    for (int i = 0; i < slots; ++i) step[i] = step[i] || weights[i] != 0;
    for (int i = slots - 1; i >= 0; --i)
      for (int j = i + 1; j < slots; ++j)
        step[i] = step[i] || (step[j] && solve.method->a[j * s + i] != 0);
  };
  live.assign(solve.steps * slots + 1, 0);
  for (int64_t n = 0; n < solve.steps; ++n) mark(&live[n * slots], solve.method->b.data());
  if (!solve.weights) return;
  for (size_t k = 0; k < solve.outputs.size(); ++k) {
    uint8_t* step = &live[solve.outputs[k] * slots];
    mark(step, solve.weights + k * s);
    if (solve.shared && solve.weights[k * s + slots] != 0) step[slots] = 1;
  }
}

}  // namespace

const TrajectoryKernels& kernels_in_use() {
  const std::string name = instruction_set();
#ifdef FMFT_X86_DISPATCH
  if (name == "avx512") return trajectory_avx512();
  if (name == "avx2") return trajectory_avx2();
#endif
  return trajectory_portable();
}

void choose_tiles(const Solve& solve, int64_t evaluations, Kept& kept) {
  kept.kernels = &kernels_in_use();
  const int64_t blocks = (solve.batch + kept.kernels->block_rows - 1) / kept.kernels->block_rows;
  const Products products = products_of(*solve.field);
  const double work = 2.0 * products.weights * (solve.batch * evaluations);
  const double useful = std::min(work / kWorkPerThread, static_cast<double>(blocks));
  kept.parts = std::max(1, std::min(solve.threads, static_cast<int>(useful)));
  kept.tile_rows = choose_tile_rows(solve, *kept.kernels, kept.parts);
  const int64_t rows = (solve.batch + kept.parts - 1) / kept.parts;
  const bool few = rows <= kFewRows && products.weights * number_size(solve.type) > kCacheBytes;
  kept.direct = few || rows * evaluations * products.sums * kSumCost <= products.weights;
}

Plan make_plan(const Solve& solve, const Kept& kept, const Gradients* gradients) {
  const Field& field = *solve.field;
  const TrajectoryKernels& kernels = *kept.kernels;
  const Keep keep = kept.keep;
  const int64_t tile_rows = kept.tile_rows, stages = kept.slots;
  const int64_t size = number_size(solve.type), line = 64 / size;
  const int64_t lanes = kernels.vector_bytes / size;
  const int count = static_cast<int>(field.layers.size());
  const bool backward = gradients != nullptr;
  const bool again = backward && keep == Keep::inputs;
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
      const bool into = (!backward || again) && !kept.direct;
      if (!out.narrow && (into || (backward && in.narrow)))
        term.forward = plan.packs.take(in.width * out.vectors * lanes);
      if (!in.narrow && (backward || (into && out.narrow)))
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
  const int64_t slots = s - solve.shared;
  const int64_t rows = std::max(kWindowBytes / (std::max<int64_t>(row_numbers, 1) * size),
                                kWindowRows);
  int64_t window = std::clamp<int64_t>(rows / (slots * tile_rows), 1, steps);
  const int64_t windows = (steps + window - 1) / window;
  window = (steps + windows - 1) / windows;

  const auto place = [&](Buffer& buffer, int64_t ld, bool per_stage) {
    buffer = {plan.scratch.take((per_stage ? window * slots : 1) * tile_rows * ld), per_stage, false};
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
  job.row_steps = plan.scratch.take(matrix);
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
  job.shared = solve.shared;
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
  job.chunk = std::max<int64_t>(kept.slots, 1);
  job.again = again;
  job.direct = kept.direct;
  job.window = window;
  return plan;
}

}  // namespace fmft::cpu
