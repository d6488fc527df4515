// Threads that wait for work, and memory that is used again from call to call.
#pragma once
#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <thread>
#include <utility>

namespace fmft::cpu {

// Runs run(part) for all parts, on as many threads if they are free.
void in_threads(int parts, const std::function<void(int)>& run);

// What a solve throws that was asked to stop.
struct Interrupted {};

// Whether a solve of which nobody knows how long it takes should go on. `asks` tells; it is called now and
// then by the thread that made this.
class Interruption {
 public:
  explicit Interruption(bool (*asks)()) : asks_(asks) {}
  bool stops() {
    if (stopped_) return true;
    if (std::this_thread::get_id() != owner_) return false;
    const auto now = Clock::now();
    if (now - asked_ < std::chrono::milliseconds(50)) return false;
    asked_ = now;
    stopped_ = asks_();
    return stopped_;
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool (*asks_)();
  std::thread::id owner_ = std::this_thread::get_id();
  Clock::time_point asked_ = Clock::now();
  std::atomic<bool> stopped_{false};
};

// Memory aligned to cache lines that goes back to a pool when it is no longer needed.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Scratch memory of this thread, of at least so many bytes.
void* scratch_memory(size_t bytes);

// Bytes in use, the part of them that is scratch, and the most in use since the last reset.
struct MemoryUse {
  size_t live, scratch, peak;
};
MemoryUse memory_use();
void reset_memory_peak();

}  // namespace fmft::cpu
