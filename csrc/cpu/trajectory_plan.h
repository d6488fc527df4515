// Where everything of a solve lies in memory.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "trajectory.h"

namespace fmft::cpu {

inline int64_t number_size(Type type) { return type == Type::f64 ? 8 : 4; }

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A memory that is laid out piece by piece; sizes and offsets count numbers.
class Space {
 public:
  explicit Space(int64_t line) : line_(line) {}
  int64_t take(int64_t size) {
    const int64_t offset = size_;
    size_ += round_up(size, line_);
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

// Sets the kernels, the parts of the batch, the rows of a tile and whether weights are packed, for a
// solve of so many evaluations.
void choose_tiles(const Solve& solve, int64_t evaluations, Kept& kept);

// The plan of a forward pass, or of the backward pass for these gradients.
Plan make_plan(const Solve& solve, const Kept& kept, const Gradients* gradients);

// Runs run(plan, parts, bytes) on zeroed gradients of every part, of so many bytes each, and adds
// them up. Every one is the sum of at most so many summands.
void add_up_gradients(const Solve& solve, const Kept& kept, const void* grad,
                      const Gradients& gradients, int64_t summands,
                      const std::function<void(const Plan&, char*, int64_t)>& run);

// Runs run(memory, tile, part) for all tiles, tiles that lie next to each other on one thread.
template <class Run>
void each_tile(const Solve& solve, const Plan& plan, const Kept& kept, Run run) {
  const int64_t rows = kept.tile_rows, tiles = (solve.batch + rows - 1) / rows;
  const int64_t size = number_size(solve.type);
  std::vector<void*> chunks;
  for (const Memory& chunk : kept.chunks) chunks.push_back(chunk.data());
  in_threads(kept.parts, [&](int part) {
    TileMemory memory;
    memory.scratch = scratch_memory(plan.scratch.size() * size);
    for (int64_t tile = tiles * part / kept.parts; tile < tiles * (part + 1) / kept.parts; ++tile) {
      memory.first = tile * rows;
      memory.rows = std::min(rows, solve.batch - memory.first);
      memory.kept = chunks.data();
      memory.kept_offset = tile * plan.kept.size();
      run(memory, tile, part);
    }
  });
}

}  // namespace fmft::cpu
