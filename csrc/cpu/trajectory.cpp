#include "trajectory.h"

#include <cstring>
#include <stdexcept>

#include "trajectory_plan.h"

namespace fmft::cpu {
namespace {

// Sums of fewer numbers lose next to nothing.
constexpr int64_t kFewSummands = 32;

// to[rows, columns] of this leading dimension += the sum of the parts' matrices, in their order.
template <class T>
void add_parts(T* to, int64_t leading, const T* from, int64_t row, int64_t column, int64_t rows,
               int64_t columns, int64_t stride, int64_t lost, int parts) {
  for (int part = 0; part < parts; ++part, from += stride)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = i * row + j * column;
        to[i * leading + j] += lost ? from[at] + from[at + lost] : from[at];
      }
}

template <class T>
void collect(const Solve& solve, const Plan& plan, const Gradients& gradients, const T* from,
             int64_t lanes, int parts) {
  const int64_t lost = plan.job.lost, stride = plan.gradients.size() + lost;
  for (size_t p = 0; p < gradients.parameters.size(); ++p)
    if (gradients.parameters[p])
      memset(gradients.parameters[p], 0, gradients.sizes[p] * sizeof(T));
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
      add_parts(to, gradients.leading[term.parameter], from + term.gradient, row, column,
                out.width, in.width, stride, lost, parts);
    }
    if (layer.bias_sum >= 0)
      add_parts(static_cast<T*>(gradients.parameters[layer.bias]), 1, from + layer.bias_sum, 1, 1,
                layer.width, 1, stride, lost, parts);
    if (layer.time_sum >= 0)
      add_parts(static_cast<T*>(gradients.parameters[layer.time]) + layer.time_column,
                gradients.leading[layer.time], from + layer.time_sum, 1, 1, layer.width, 1, stride,
                lost, parts);
    if (layer.table_sum >= 0)
      add_parts(static_cast<T*>(gradients.tables[layer.table]), 0, from + layer.table_sum, 0, 1, 1,
                solve.steps * solve.method->stages * layer.width, stride, lost, parts);
  }
}

}  // namespace

Kept trajectory_forward(const Solve& solve, Keep keep, void* out) {
  Kept kept;
  kept.keep = keep;
  kept.slots = solve.steps * solve.method->stages;
  choose_tiles(solve, kept.slots, kept);
  const int64_t size = number_size(solve.type);
  Plan plan = make_plan(solve, kept, nullptr);
  const int64_t tiles = (solve.batch + kept.tile_rows - 1) / kept.tile_rows;
  kept.chunks.emplace_back(tiles * plan.kept.size() * size);
  const Memory packs(plan.packs.size() * size);
  plan.job.packs = packs.data();
  plan.job.out = out;
  kept.kernels->pack(plan.job);
  each_tile(solve, plan, kept, [&](const TileMemory& memory, int64_t, int) {
    kept.kernels->forward(plan.job, memory);
  });
  return kept;
}

void add_up_gradients(const Solve& solve, const Kept& kept, const void* grad,
                      const Gradients& gradients, int64_t summands,
                      const std::function<void(const Plan&, char*, int64_t)>& run) {
  if (kept.keep == Keep::nothing)
    throw std::invalid_argument("expected a forward pass that kept its stage inputs, got none");
  const int64_t size = number_size(solve.type);
  Plan plan = make_plan(solve, kept, &gradients);
  if (summands > kFewSummands) plan.job.lost = plan.gradients.size();
  const int64_t bytes = (plan.gradients.size() + plan.job.lost) * size;
  const Memory packs(plan.packs.size() * size);
  const Memory parts(bytes * kept.parts);
  memset(parts.data(), 0, bytes * kept.parts);
  for (const Layer& layer : plan.layers)
    if (layer.cond >= 0 && gradients.conds[layer.cond])
      memset(gradients.conds[layer.cond], 0, solve.batch * layer.width * size);
  plan.job.packs = packs.data();
  plan.job.grad = grad;
  plan.job.grad_y0 = gradients.y0;
  plan.job.grad_conds = gradients.conds.data();
  kept.kernels->pack(plan.job);
  run(plan, static_cast<char*>(parts.data()), bytes);
  const int64_t lanes = kept.kernels->vector_bytes / size;
  if (solve.type == Type::f64)
    collect(solve, plan, gradients, static_cast<const double*>(parts.data()), lanes, kept.parts);
  else
    collect(solve, plan, gradients, static_cast<const float*>(parts.data()), lanes, kept.parts);
}

void trajectory_backward(const Solve& solve, const Kept& kept, const void* grad,
                         const Gradients& gradients) {
  const auto run = [&](const Plan& plan, char* parts, int64_t bytes) {
    each_tile(solve, plan, kept, [&](TileMemory memory, int64_t, int part) {
      memory.gradients = parts + part * bytes;
      kept.kernels->backward(plan.job, memory);
    });
  };
  const int64_t tiles = (solve.batch + kept.tile_rows - 1) / kept.tile_rows;
  const int64_t stages = solve.steps * solve.method->stages;
  add_up_gradients(solve, kept, grad, gradients, tiles * stages, run);
}

}  // namespace fmft::cpu
