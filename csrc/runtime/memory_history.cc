// memory_history.cc: recording of memory events (memory_history.h), and the cache's part in it.
#include "csrc/runtime/memory_history.h"

#include <c10/util/ApproximateClock.h>

#include "csrc/runtime/caching_allocator.h"

namespace flagos {

void MemoryHistory::start(const Options& options, bool clear) {
  options_ = options;
  if (clear) events_.clear();
  while (events_.size() > options_.max_events) events_.pop_front();
  gather_.store(options.contexts == kNone ? nullptr : options.gather);
  free_contexts_.store(options.contexts == kOfAll);
  on_.store(true, std::memory_order_release);
}

void MemoryHistory::stop() {
  on_.store(false, std::memory_order_release);
  gather_.store(nullptr);
  free_contexts_.store(false);
}

MemoryContext MemoryHistory::where() const noexcept {
  const Gather gather = gather_.load();
  if (gather == nullptr) return nullptr;
  try {
    return gather();
  } catch (const std::exception&) {  // the memory is needed more than the knowledge of its place
    return nullptr;
  }
}

void MemoryHistory::add(MemoryEvent event) {
  if (options_.max_events == 0) return;
  const bool of_free = event.action == MemoryEvent::kFreeRequested || event.action == MemoryEvent::kFreeCompleted;
  if (options_.contexts < (of_free ? kOfAll : kOfAllocations)) event.context = nullptr;
  event.time_us = c10::getTime() / 1000;
  if (events_.size() >= options_.max_events) events_.pop_front();
  events_.push_back(std::move(event));
}

// ---- the cache

namespace {
thread_local MemoryContext asked_from;  // of the allocation that this thread is making
}

void DeviceCache::note_place() { asked_from = history_.where(); }

void DeviceCache::note(MemoryEvent::Action action, const Block* block, const MemoryContext& context) {
  history_.add({action, reinterpret_cast<uintptr_t>(block->device_ptr), block->size, block->pool->stream,
                block->pool->mempool, 0, context});
}

void DeviceCache::note_alloc(Block* block) {
  note(MemoryEvent::kAlloc, block, asked_from);
  block->context = std::move(asked_from);
  asked_from = nullptr;
}

void DeviceCache::note_segment(const Block* block) { note(MemoryEvent::kSegmentAlloc, block, asked_from); }
MemoryContext DeviceCache::segment_context() { return history_.on() ? asked_from : nullptr; }

void DeviceCache::note_free(Block* block, const MemoryContext& context, bool completed) {
  if (!history_.on()) return;
  note(MemoryEvent::kFreeRequested, block, context);
  if (completed) note(MemoryEvent::kFreeCompleted, block, context);
}

void DeviceCache::note_out_of_memory(size_t size, StreamSlot stream) {
  uint64_t free_bytes = 0, total_bytes = 0;
  hal_->mem_info(device_, &free_bytes, &total_bytes);
  if (history_.on()) {
    history_.add({MemoryEvent::kOutOfMemory, static_cast<uintptr_t>(free_bytes), size, stream, 0, 0, asked_from});
  }
}

void DeviceCache::record_history(const std::optional<MemoryHistory::Options>& options, bool clear) {
  Lock lock(mutex_);
  if (options) {
    history_.start(*options, clear);
  } else {
    history_.stop();
  }
}

std::vector<MemoryEvent> DeviceCache::history() {
  Lock lock(mutex_);
  if (history_.on()) history_.add({MemoryEvent::kSnapshot, 0, 0, 0, 0, 0, nullptr});
  return history_.events();
}

// ---- pools that a program makes

__thread CurrentMempool current_mempool = {0, -1};

BlockPool& DeviceCache::mempool(StreamSlot stream, bool is_small) {
  auto& slot = mempools_[{current_mempool.id, stream, is_small}];
  if (!slot) {
    slot = std::make_unique<BlockPool>(this, stream, is_small);
    slot->mempool = current_mempool.id;
    slot->held = true;
    if (is_small) small_pools_.push_back(slot.get());
  }
  return *slot;
}

void DeviceCache::end_mempool(uint64_t id) {
  Lock lock(mutex_);
  for (auto& [key, pool] : mempools_) {
    if (std::get<0>(key) == id) pool->held = false;
  }
  release_cached(lock);
}

}  // namespace flagos
