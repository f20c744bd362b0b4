// memory_history.h: what happened in a device memory cache and where in the program, for torch's memory viewer.
#pragma once

#include <atomic>
#include <deque>
#include <vector>

#include "csrc/runtime/hal_streams.h"
#include "csrc/runtime/platform.h"

namespace flagos {

struct MemoryEvent {
  enum Action { kAlloc, kFreeRequested, kFreeCompleted, kSegmentAlloc, kSegmentFree, kOutOfMemory, kSnapshot } action;
  uintptr_t address;  // of an out-of-memory event: the bytes that the chip still had
  size_t size;
  StreamSlot stream;
  uint64_t pool;
  int64_t time_us = 0;
  MemoryContext context = nullptr;
};

// Off by default. on() is all that an allocation pays then; everything else expects the cache's lock, except where().
class MemoryHistory {
 public:
  using Gather = MemoryContext (*)();
  enum Contexts { kNone, kOfBlocks, kOfAllocations, kOfAll };  // what keeps a context
  struct Options {
    Contexts contexts = kNone;
    Gather gather = nullptr;
    size_t max_events = 0;
  };

  void start(const Options& options, bool clear);
  void stop();
  bool on() const { return on_.load(std::memory_order_acquire); }
  bool keeps_free_contexts() const { return free_contexts_.load(std::memory_order_relaxed); }

  // The calling place. Without the lock: it may wait for Python's.
  MemoryContext where() const noexcept;
  // The event keeps its context only if the options say so.
  void add(MemoryEvent event);
  std::vector<MemoryEvent> events() const { return {events_.begin(), events_.end()}; }

 private:
  std::atomic<bool> on_{false};
  std::atomic<bool> free_contexts_{false};
  std::atomic<Gather> gather_{nullptr};
  Options options_;
  std::deque<MemoryEvent> events_;
};

}  // namespace flagos
