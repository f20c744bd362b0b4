// handles.h: opaque handles that cannot dangle. A handle is {generation, index, tag}, not an address, so a stale,
// foreign or invented one is recognised without touching memory that is gone. Slots are never freed, only reused under
// a new generation; find() is a few loads and takes no lock.
#ifndef FLAGOS_HANDLES_H_
#define FLAGOS_HANDLES_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

namespace flagos {

template <typename T, uint8_t kTag>
class HandleTable {
  static constexpr uint64_t kChunk = 256, kChunks = 4096;

 public:
  struct Slot {
    std::atomic<uint64_t> handle{0};  // 0 while no live handle names this slot
    uint32_t index = 0, generation = 0;
    T value;
  };

  /// The live slot that `handle` names, or NULL.
  Slot* find(const void* handle) const {
    uint64_t bits = reinterpret_cast<uint64_t>(handle);
    uint64_t index = (bits >> 8) & (kChunk * kChunks - 1);
    if ((bits & 0xff) != kTag) return nullptr;
    Slot* chunk = chunks_[index / kChunk].load(std::memory_order_acquire);
    if (!chunk) return nullptr;
    Slot* slot = chunk + index % kChunk;
    return slot->handle.load(std::memory_order_acquire) == bits ? slot : nullptr;
  }

  /// A slot that is not live yet; the caller fills `value` and then calls publish(). NULL when all are taken.
  Slot* reserve() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      if (used_ == kChunk * kChunks) return nullptr;
      if (used_ % kChunk == 0) chunks_[used_ / kChunk].store(new Slot[kChunk], std::memory_order_release);
      Slot* slot = chunks_[used_ / kChunk].load(std::memory_order_relaxed) + used_ % kChunk;
      slot->index = static_cast<uint32_t>(used_++);
      free_.push_back(slot);
    }
    Slot* slot = free_.back();
    free_.pop_back();
    return slot;
  }

  void* publish(Slot* slot) {
    uint64_t generation = ++slot->generation;
    uint64_t bits = (generation << 32) | (static_cast<uint64_t>(slot->index) << 8) | kTag;
    slot->handle.store(bits, std::memory_order_release);
    return reinterpret_cast<void*>(bits);
  }

  /// Ends the handle's life. False when another thread did so first.
  bool retire(Slot* slot, const void* handle) {
    uint64_t bits = reinterpret_cast<uint64_t>(handle);
    return slot->handle.compare_exchange_strong(bits, 0);
  }

  /// Gives a retired slot back for reuse.
  void recycle(Slot* slot) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(slot);
  }

  /// Calls fn(slot) for every slot ever used, live or not.
  template <typename F>
  void for_each(F fn) {
    uint64_t used;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      used = used_;
    }
    for (uint64_t i = 0; i < used; ++i) fn(chunks_[i / kChunk].load(std::memory_order_acquire) + i % kChunk);
  }

 private:
  std::mutex mutex_;
  std::vector<Slot*> free_;
  uint64_t used_ = 0;
  std::atomic<Slot*> chunks_[kChunks] = {};
};

}  // namespace flagos
#endif  // FLAGOS_HANDLES_H_
