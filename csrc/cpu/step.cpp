#include "step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace fmft::cpu {
namespace {

// Starting a thread costs some 20 us; a core moves this many numbers of a step in about that time.
constexpr int64_t kNumbersPerThread = int64_t{1} << 17;
// The error is summed block by block, so that its bits do not depend on the number of threads.
constexpr int64_t kBlock = int64_t{1} << 14;

std::vector<CpuKernels> supported() {
  std::vector<CpuKernels> found;
#ifdef FMFT_X86_DISPATCH
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back(kernels_avx512());
  if (avx2) found.push_back(kernels_avx2());
#endif
  found.push_back(kernels_portable());
  return found;
}

const std::vector<CpuKernels>& all_kernels() {
  static const std::vector<CpuKernels> kernels = supported();
  return kernels;
}

std::atomic<const CpuKernels*>& chosen() {
  static std::atomic<const CpuKernels*> kernels{&all_kernels().front()};
  return kernels;
}

// Runs run(begin, end) over ranges that together cover [0, size) and begin at multiples of kBlock.
template <class Run>
void in_parallel(int64_t size, int threads, Run run) {
  const int64_t useful = std::min<int64_t>(threads, size / kNumbersPerThread);
  if (useful <= 1) return run(int64_t{0}, size);
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  const int64_t share = (blocks + useful - 1) / useful * kBlock;
  std::vector<std::thread> pool;
  for (int64_t begin = share; begin < size; begin += share) {
    const int64_t end = std::min(begin + share, size);
    try {
      pool.emplace_back(run, begin, end);
    } catch (const std::system_error&) {  // the system gives no more threads
      run(begin, end);
    }
  }
  run(int64_t{0}, std::min(share, size));
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

void rk_combine(const StepCall& call, int threads) {
  const CpuKernels& kernels = *chosen();
  in_parallel(call.size, threads,
              [&](int64_t begin, int64_t end) { kernels.combine(call, begin, end); });
}

void rk_finish(const StepCall& call, const ErrorCall& error, int threads) {
  const CpuKernels& kernels = *chosen();
  std::vector<double> sums((call.size + kBlock - 1) / kBlock);
  in_parallel(call.size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlock)
      sums[first / kBlock] = kernels.finish(call, error, first, std::min(first + kBlock, end));
  });
  double total = 0;
  for (double sum : sums) total += sum;
  const double ratio = std::sqrt(total / static_cast<double>(call.size));
  if (call.type == Type::f64)
    *static_cast<double*>(error.ratio) = ratio;
  else
    *static_cast<float*>(error.ratio) = static_cast<float>(ratio);
}

void dense_eval(const StepCall& call, const DenseCall& dense, int threads) {
  const CpuKernels& kernels = *chosen();
  in_parallel(call.size, threads,
              [&](int64_t begin, int64_t end) { kernels.dense(call, dense, begin, end); });
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const CpuKernels& kernels : all_kernels()) names.push_back(kernels.isa);
  return names;
}

std::string instruction_set() { return chosen().load()->isa; }

void use_instruction_set(const std::string& name) {
  for (const CpuKernels& kernels : all_kernels())
    if (name == kernels.isa) return chosen().store(&kernels);
  throw std::invalid_argument("this processor or build has no instruction set '" + name + "'");
}

}  // namespace fmft::cpu
