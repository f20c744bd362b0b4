// spin_lock.h: a lock for critical sections of a few dozen instructions.
#pragma once

#include <sched.h>

#include <atomic>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace flagos {

// Spins briefly, then gives up the processor: the holder may have been preempted. Meets Lockable.
class SpinLock {
 public:
  void lock() noexcept {
    while (locked_.exchange(true, std::memory_order_acquire)) wait();
  }
  bool try_lock() noexcept { return !locked_.exchange(true, std::memory_order_acquire); }
  void unlock() noexcept { locked_.store(false, std::memory_order_release); }

 private:
  void wait() noexcept {
    for (int i = 0; locked_.load(std::memory_order_relaxed); i++) {
      if (i >= 64) {
        sched_yield();
        continue;
      }
#if defined(__x86_64__) || defined(__i386__)
      _mm_pause();
#endif
    }
  }
  std::atomic<bool> locked_{false};
};

}  // namespace flagos
