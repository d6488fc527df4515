#include "threads.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace fmft::cpu {
namespace {

class Pool {
 public:
  // False if another call is using the threads.
  bool run(int parts, const std::function<void(int)>& work) {
    std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int>(threads_.size()) < parts - 1)
          threads_.emplace_back([this, seen = round_] { wait(seen); });
      } catch (const std::system_error&) {  // the system gives no more: fewer take all parts
      }
      work_ = &work;
      parts_ = parts;
      next_ = 0;
      ++round_;
    }
    wake_.notify_all();
    take(work, parts);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    work_ = nullptr;
    return true;
  }

 private:
  void take(const std::function<void(int)>& work, int parts) {
    for (int part = next_++; part < parts; part = next_++) work(part);
  }

  void wait(unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (!work_) continue;  // came too late
      const auto& work = *work_;
      const int parts = parts_;
      ++active_;
      lock.unlock();
      take(work, parts);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<int> next_{0};
  int parts_ = 0, active_ = 0;
  unsigned long round_ = 0;
};

// Never destroyed: its threads wait until the process ends. A forked child has none of them and
// makes its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (!pool || owner != getpid()) {
    pool = new Pool;
    owner = getpid();
  }
  return *pool;
}

constexpr size_t kHuge = size_t{1} << 21;
constexpr size_t kMostPooled = size_t{1} << 29;

struct Block {
  void* data;
  size_t bytes;
};

struct Free {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t total = 0;
};

std::atomic<size_t> live_bytes{0}, scratch_bytes{0}, peak_bytes{0};

Free& free_memory() {
  static Free* memory = new Free;  // outlives all that gives memory back
  return *memory;
}

}  // namespace

void in_threads(int parts, const std::function<void(int)>& run) {
  if (parts > 1 && pool().run(parts, run)) return;
  for (int part = 0; part < parts; ++part) run(part);
}

Memory::Memory(size_t bytes) {
  Free& free = free_memory();
  const auto count = [&] {
    const size_t live = live_bytes += bytes_;
    size_t peak = peak_bytes;
    while (live > peak && !peak_bytes.compare_exchange_weak(peak, live)) {
    }
  };
  {
    std::lock_guard<std::mutex> lock(free.mutex);
    for (Block& block : free.blocks)
      if (block.bytes >= bytes && block.bytes <= 2 * bytes + 4096) {
        data_ = block.data;
        bytes_ = block.bytes;
        free.total -= bytes_;
        block = free.blocks.back();
        free.blocks.pop_back();
        count();
        return;
      }
  }
  const size_t alignment = bytes >= 2 * kHuge ? kHuge : 64;
  bytes_ = (bytes + alignment) / alignment * alignment;
  if (posix_memalign(&data_, alignment, bytes_)) throw std::bad_alloc();
  count();
#ifdef MADV_HUGEPAGE
  if (alignment == kHuge) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Memory::~Memory() {
  if (!data_) return;
  live_bytes -= bytes_;
  Free& free = free_memory();
  {
    std::lock_guard<std::mutex> lock(free.mutex);
    if (free.total + bytes_ <= kMostPooled) {
      free.blocks.push_back({data_, bytes_});
      free.total += bytes_;
      return;
    }
  }
  std::free(data_);
}

void* scratch_memory(size_t bytes) {
  thread_local Memory memory;
  if (memory.bytes() < bytes) {
    scratch_bytes -= memory.bytes();
    memory = Memory();
    memory = Memory(bytes);
    scratch_bytes += memory.bytes();
  }
  return memory.data();
}

MemoryUse memory_use() { return {live_bytes, scratch_bytes, peak_bytes}; }

void reset_memory_peak() { peak_bytes = live_bytes.load(); }

}  // namespace fmft::cpu
