// Tells ThreadSanitizer which thread of a block runs and what it has waited for, where the kernels are compiled
// with -fsanitize=thread. It then reports what two threads do to one number with no barrier in between.
#pragma once
#include <cstdint>

#ifdef __SANITIZE_THREAD__
#include <cstdlib>

// These functions only look like races: no two threads of the host run at once.
#define FMFT_HOST_UNWATCHED __attribute__((no_sanitize("thread")))

extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read2(void* address);
}

namespace host::watch {

FMFT_HOST_UNWATCHED inline void* current() { return __tsan_get_current_fiber(); }
FMFT_HOST_UNWATCHED inline void* make() { return __tsan_create_fiber(0); }
FMFT_HOST_UNWATCHED inline void end(void* thread) { __tsan_destroy_fiber(thread); }
FMFT_HOST_UNWATCHED inline void run(void* thread) { __tsan_switch_to_fiber(thread, 1); }
// What was done before tell() is over for whoever hears of the same place.
FMFT_HOST_UNWATCHED inline void tell(void* place) { __tsan_release(place); }
FMFT_HOST_UNWATCHED inline void hear(void* place) { __tsan_acquire(place); }
FMFT_HOST_UNWATCHED inline void read(const uint16_t* at) { __tsan_read2(const_cast<uint16_t*>(at)); }
// FMFT_HOST_DEAF=1: barriers do not count, so that almost everything is a race.
FMFT_HOST_UNWATCHED inline bool deaf() { return std::getenv("FMFT_HOST_DEAF"); }

}  // namespace host::watch

#else
#define FMFT_HOST_UNWATCHED

namespace host::watch {

inline void* current() { return nullptr; }
inline void* make() { return nullptr; }
inline void end(void*) {}
inline void run(void*) {}
inline void tell(void*) {}
inline void hear(void*) {}
inline void read(const uint16_t*) {}
inline bool deaf() { return true; }

}  // namespace host::watch
#endif
