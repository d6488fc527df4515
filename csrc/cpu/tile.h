// A tile of the batch in memory: where its values lie, and loops over their numbers.
#pragma once
#include "trajectory.h"
#include "vector.h"

namespace fmft {
inline namespace FMFT_ISA {

template <class T>
struct Tile {
  const Job& job;
  int64_t first, rows;
  void* const* kept;
  int64_t kept_offset;
  T* scratch;
  Sums<T> gradients;
  int64_t base;  // the stage that comes first in the scratch memory
  const double* times = nullptr;  // of every row, in place of a time that all rows share

  Tile(const Job& job, const TileMemory& memory)
      : job(job),
        first(memory.first),
        rows(memory.rows),
        kept(memory.kept),
        kept_offset(memory.kept_offset),
        scratch(static_cast<T*>(memory.scratch)),
        gradients{static_cast<T*>(memory.gradients), job.lost},
        base(0) {}

  T* at(const Buffer& buffer, int64_t ld, int64_t q) const {
    if (buffer.kept)
      return static_cast<T*>(kept[q / job.chunk]) + kept_offset + buffer.offset +
             q % job.chunk * rows * ld;
    return scratch + buffer.offset + (buffer.per_stage ? q - base : 0) * rows * ld;
  }
  T* value(int number, int64_t q) const {
    return at(job.values[number].value, job.values[number].ld, q);
  }
  T* delta(int number, int64_t q) const {
    return at(job.values[number].delta, job.values[number].ld, q);
  }
  const Value& state() const { return job.values[0]; }
  const Value& velocity() const { return job.values[job.layer_count]; }
  const T* pack(int64_t offset) const { return static_cast<const T*>(job.packs) + offset; }
};

// All vectors of a value's matrix; what pads the rows to `ld` is left out where it is long.
template <class T, class Run>
inline void each_entry(const Value& value, int64_t rows, Run run) {
  constexpr int L = Lanes<T>::count;
  if (value.narrow || value.ld == value.vectors * L) return each_vector<T>(rows * value.ld, run);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < value.vectors; ++v) run(r * value.ld + v * L, Whole{});
}

// to = from, or to += from.
template <class T>
void accumulate(const Value& value, int64_t rows, T* to, const T* from, bool add) {
  each_entry<T>(value, rows, [=](int64_t i, auto part) {
    const Vector<T> x = get(from + i, part);
    put<T>(to + i, add ? get(to + i, part) + x : x, part);
  });
}

// Rows between a tensor [.., width] and a tile.
template <class T>
void read_rows(const Value& value, int64_t rows, T* to, const void* tensor, int64_t first) {
  const T* from = static_cast<const T*>(tensor) + first * value.width;
  if (value.ld == value.width) {
    memcpy(to, from, rows * value.width * sizeof(T));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(to + r * value.ld, from + r * value.width, value.width * sizeof(T));
    memset(to + r * value.ld + value.width, 0, (value.ld - value.width) * sizeof(T));
  }
}

template <class T>
void write_rows(const Value& value, int64_t rows, const T* from, void* tensor, int64_t first) {
  T* to = static_cast<T*>(tensor) + first * value.width;
  for (int64_t r = 0; r < rows; ++r)
    memcpy(to + r * value.width, from + r * value.ld, value.width * sizeof(T));
}

// A sum of states with weights: kept short by leaving out those of weight zero.
template <class T>
struct Sum {
  const T* x[2 * kMaxStages + 1];
  T w[2 * kMaxStages + 1];
  int count = 0;

  void add(const T* from, double weight) {
    if (weight == 0) return;
    x[count] = from;
    w[count++] = static_cast<T>(weight);
  }
  // to = y + scale sum; nullptr for y is zero and for scale one.
  void write(T* to, const T* y, int64_t size, const T* scale = nullptr) const {
    each_vector<T>(size, [&](int64_t i, auto part) {
      Vector<T> total = y && !scale ? get(y + i, part) : Vector<T>{};
      for (int j = 0; j < count; ++j) total += w[j] * get(x[j] + i, part);
      if (scale) {
        total *= get(scale + i, part);
        if (y) total += get(y + i, part);
      }
      put<T>(to + i, total, part);
    });
  }
};

}  // namespace FMFT_ISA
}  // namespace fmft
