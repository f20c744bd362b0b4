// caching_allocator.cc: the hot half of the device memory cache: taking, splitting, freeing and merging blocks.
#include "csrc/runtime/caching_allocator.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "csrc/runtime/fork.h"
#include "csrc/runtime/hal_error.h"

namespace flagos {
namespace {

constexpr size_t kUnit = 512;           // all blocks are multiples of it
constexpr size_t kSmallMax = 1u << 20;  // the largest small request
constexpr size_t kLargestRequest = size_t{1} << 62;

size_t rounded(size_t nbytes) { return (nbytes + kUnit - 1) / kUnit * kUnit; }

}  // namespace

DeviceCache::DeviceCache(const flagos_hal* hal, const StreamTable* streams, c10::DeviceIndex device,
                         AddressMap* by_address)
    : hal_(hal), streams_(streams), device_(device), by_address_(by_address) {}

// ---- counting

void DeviceCache::add(StatKind kind, const BlockPool& p, int64_t n) {
  Counter& of_pool = counters_[kind][p.is_small ? 1 : 2];
  if (n >= 0) {
    counters_[kind][0].add(n);
    of_pool.add(n);
  } else {
    counters_[kind][0].subtract(-n);
    of_pool.subtract(-n);
  }
}

inline void DeviceCache::count_inactive(const Block* block, int sign) {
  const auto size = static_cast<int64_t>(block->size);
  for (const int k : {0, block->pool->is_small ? 1 : 2}) {
    if (sign > 0) {
      counters_[kInactiveSplit][k].add(1);
      counters_[kInactiveSplitBytes][k].add(size);
    } else {
      counters_[kInactiveSplit][k].subtract(1);
      counters_[kInactiveSplitBytes][k].subtract(size);
    }
  }
}

inline void DeviceCache::count_alloc(const Block* block) {
  const auto size = static_cast<int64_t>(block->size), requested = static_cast<int64_t>(block->requested);
  for (const int k : {0, block->pool->is_small ? 1 : 2}) {
    counters_[kAllocation][k].add(1);
    counters_[kActive][k].add(1);
    counters_[kAllocatedBytes][k].add(size);
    counters_[kActiveBytes][k].add(size);
    counters_[kRequestedBytes][k].add(requested);
  }
}

inline void DeviceCache::count_free(const Block* block, bool still_active) {
  const auto size = static_cast<int64_t>(block->size), requested = static_cast<int64_t>(block->requested);
  for (const int k : {0, block->pool->is_small ? 1 : 2}) {
    counters_[kAllocation][k].subtract(1);
    counters_[kAllocatedBytes][k].subtract(size);
    counters_[kRequestedBytes][k].subtract(requested);
    if (still_active) continue;
    counters_[kActive][k].subtract(1);
    counters_[kActiveBytes][k].subtract(size);
  }
}

// ---- blocks and pools

BlockPool& DeviceCache::pool(StreamSlot stream, bool is_small) {
  if (C10_UNLIKELY(current_mempool.id != 0) && current_mempool.device == device_) return mempool(stream, is_small);
  auto& slot = pools_[stream][is_small ? 0 : 1];
  if (C10_UNLIKELY(!slot)) {
    slot = std::make_unique<BlockPool>(this, stream, is_small);
    if (is_small) small_pools_.push_back(slot.get());
  }
  return *slot;
}

Block* DeviceCache::new_block() {
  if (Block* block = unused_) {
    unused_ = block->link;
    block->link = nullptr;
    return block;
  }
  storage_.emplace_back();
  return &storage_.back();
}

void DeviceCache::retire(Block* block) {
  block->prev = block->next = nullptr;
  block->link = unused_;
  unused_ = block;
}

// Puts a free block into the list of its pool, without merging.
void DeviceCache::push(Block* block) {
  BlockPool& p = *block->pool;
  if (p.is_small) {
    const size_t bin = block->size / kUnit;
    block->link = p.bins[bin];
    p.bins[bin] = block;
    p.nonempty[bin / 64] |= uint64_t{1} << (bin % 64);
  } else {
    p.tree.insert(block);
  }
}

// A block that fits best, out of its list and cut to size; nullptr when the pool has none.
Block* DeviceCache::take(BlockPool& p, size_t size) {
  Block* block = nullptr;
  if (p.is_small) {
    size_t bin = size / kUnit;
    block = p.bins[bin];
    if (block == nullptr) {  // the next larger bin that has one
      size_t word = bin / 64;
      uint64_t bits = p.nonempty[word] & (~uint64_t{0} << (bin % 64));
      while (bits == 0 && ++word < p.nonempty.size()) bits = p.nonempty[word];
      if (bits == 0) return nullptr;
      bin = word * 64 + __builtin_ctzll(bits);
      block = p.bins[bin];
    }
    p.bins[bin] = block->link;
    block->link = nullptr;
    if (p.bins[bin] == nullptr) p.nonempty[bin / 64] &= ~(uint64_t{1} << (bin % 64));
  } else {
    Block key;
    key.size = size;
    auto it = p.tree.lower_bound(&key);
    if (it == p.tree.end()) return nullptr;
    block = *it;
    p.tree.erase(it);
  }
  if (block->split()) count_inactive(block, -1);
  // A large block keeps a rest of up to 1 MiB: as a block of its own it would serve no large request.
  const size_t rest = block->size - size;
  if (rest >= kUnit && (p.is_small || rest > kSmallMax)) split(block, size);
  return block;
}

// Cuts a block that is in no list; the rest goes to the pool.
void DeviceCache::split(Block* block, size_t size) {
  Block* rest = new_block();
  rest->native = block->native + size;
  rest->device_ptr = block->device_ptr + size;
  rest->size = block->size - size;
  rest->pool = block->pool;
  rest->state = Block::kFree;
  rest->prev = block;
  rest->next = block->next;
  if (block->next != nullptr) block->next->prev = rest;
  block->next = rest;
  block->size = size;
  if (by_address_ != nullptr) by_address_->set(rest->native, rest);
  count_inactive(rest, 1);
  push(rest);
}

void DeviceCache::absorb_next(Block* block) {
  Block* gone = block->next;
  block->size += gone->size;
  block->next = gone->next;
  if (gone->next != nullptr) gone->next->prev = block;
  retire(gone);
}

// Gives a block back to its pool. Large blocks merge with their neighbours at once.
void DeviceCache::put_free(Block* block) {
  block->state = Block::kFree;
  block->requested = 0;
  BlockPool& p = *block->pool;
  if (p.is_small) {
    p.frees_since_merge++;
  } else {
    if (Block* next = block->next; next != nullptr && next->state == Block::kFree) {
      p.tree.erase(next);
      count_inactive(next, -1);
      absorb_next(block);
    }
    if (Block* prev = block->prev; prev != nullptr && prev->state == Block::kFree) {
      p.tree.erase(prev);
      count_inactive(prev, -1);
      absorb_next(prev);
      block = prev;
    }
  }
  if (block->split()) count_inactive(block, 1);
  push(block);
}

// Merges all neighbouring free blocks of a small pool. Returns how many blocks it looked at.
size_t DeviceCache::merge_small(BlockPool& p) {
  std::fill_n(p.bins.get(), BlockPool::kBins, nullptr);
  p.nonempty.fill(0);
  size_t looked_at = 0;
  for (auto& entry : segments_) {
    if (entry.second.first->pool != &p) continue;
    for (Block* block = entry.second.first; block != nullptr; block = block->next) {
      looked_at++;
      if (block->state != Block::kFree) continue;
      const bool merge = block->next != nullptr && block->next->state == Block::kFree;
      if (merge) {
        count_inactive(block, -1);
        while (block->next != nullptr && block->next->state == Block::kFree) {
          count_inactive(block->next, -1);
          absorb_next(block);
          looked_at++;
        }
        if (block->split()) count_inactive(block, 1);
      }
      push(block);
    }
  }
  p.frees_since_merge = 0;
  p.merge_after = looked_at / 8;  // so that merging costs a constant amount per free, whatever the pool's size
  return looked_at;
}

bool DeviceCache::worth_merging(BlockPool& p) {
  return p.is_small && p.frees_since_merge > 0 && p.frees_since_merge >= p.merge_after;
}

// ---- the two entry points

Block* DeviceCache::allocate(StreamSlot stream, size_t nbytes) {
  if (C10_UNLIKELY(history_.on())) note_place();
  Lock lock(mutex_);
  if (C10_UNLIKELY(nbytes > kLargestRequest)) throw_out_of_memory(lock, nbytes, false, "");
  const size_t size = rounded(nbytes);
  BlockPool& p = pool(stream, size <= kSmallMax);
  if (C10_UNLIKELY(!pending_.empty())) finish_events();
  Block* block = take(p, size);
  if (C10_UNLIKELY(block == nullptr)) block = grow(lock, p, size);
  block->state = Block::kAllocated;
  block->requested = nbytes;
  count_alloc(block);
  if (C10_UNLIKELY(history_.on())) note_alloc(block);
  const int64_t allocated = counters_[kAllocatedBytes][0].current;
  const int64_t reserved = counters_[kReservedBytes][0].current;
  void* const address = block->device_ptr;
  const auto bytes = static_cast<int64_t>(block->size);
  lock.unlock();
  c10::reportMemoryUsageToProfiler(address, bytes, allocated, reserved, flagos_device(device_));
  return block;
}

void DeviceCache::free(Block* block) noexcept {
  void* const address = block->device_ptr;
  const auto bytes = static_cast<int64_t>(block->size);
  const bool recorded = C10_UNLIKELY(history_.on() || block->context != nullptr);
  const MemoryContext place = recorded && history_.keeps_free_contexts() ? history_.where() : nullptr;
  Lock lock(mutex_);
  if (C10_UNLIKELY(recorded)) {
    note_free(block, place, block->used_by == nullptr);
    block->context = nullptr;
  }
  if (C10_UNLIKELY(block->used_by != nullptr)) {
    count_free(block, true);
    block->state = Block::kAwaitingFree;
    const auto used_by = std::move(block->used_by);
    block->pending_events = 1;  // ours, so that nobody frees the block before all events are recorded
    for (const StreamSlot stream : *used_by) {
      flagos_event event = nullptr;
      if (!spare_events_.empty()) {
        event = spare_events_.back();
        spare_events_.pop_back();
      }
      lock.unlock();
      const flagos_stream handle = streams_->handle(device_, stream);
      flagos_status status = FLAGOS_OK;
      if (event == nullptr) status = hal_->event_create(device_, FLAGOS_EVENT_DEFAULT, &event);
      if (status == FLAGOS_OK) status = hal_->event_record(device_, event, handle);
      // A deleter cannot raise: without an event, wait here. When that fails too the device is lost.
      if (status != FLAGOS_OK) hal_->stream_sync(device_, handle);
      lock.lock();
      if (status == FLAGOS_OK) {
        pending_[stream].push_back({event, block});
        block->pending_events++;
      } else if (event != nullptr) {
        spare_events_.push_back(event);
      }
    }
    if (--block->pending_events == 0) {
      if (history_.on()) note(MemoryEvent::kFreeCompleted, block, nullptr);
      add(kActive, *block->pool, -1);
      add(kActiveBytes, *block->pool, -static_cast<int64_t>(block->size));
      put_free(block);
    }
  } else {
    count_free(block, false);
    put_free(block);
  }
  const int64_t allocated = counters_[kAllocatedBytes][0].current;
  const int64_t reserved = counters_[kReservedBytes][0].current;
  lock.unlock();
  c10::reportMemoryUsageToProfiler(address, -bytes, allocated, reserved, flagos_device(device_));
}

void DeviceCache::record_stream(Block* block, StreamSlot stream) {
  if (stream == block->pool->stream) return;
  Lock lock(mutex_);
  if (!block->used_by) block->used_by = std::make_unique<std::vector<StreamSlot>>();
  auto& list = *block->used_by;
  if (std::find(list.begin(), list.end(), stream) == list.end()) list.push_back(stream);
}

// Frees the blocks whose events have come. An event that cannot be queried is asked again next time.
void DeviceCache::finish_events() {
  for (auto it = pending_.begin(); it != pending_.end();) {
    auto& queue = it->second;
    while (!queue.empty()) {
      const Pending p = queue.front();
      if (hal_->event_query(device_, p.event) != FLAGOS_OK) break;
      queue.pop_front();
      spare_events_.push_back(p.event);
      if (--p.block->pending_events == 0) {
        if (history_.on()) note(MemoryEvent::kFreeCompleted, p.block, nullptr);
        add(kActive, *p.block->pool, -1);
        add(kActiveBytes, *p.block->pool, -static_cast<int64_t>(p.block->size));
        put_free(p.block);
      }
    }
    it = queue.empty() ? pending_.erase(it) : std::next(it);
  }
}

// ---- behind PyTorch's interface

CachingAllocator::CachingAllocator(const flagos_hal* hal, const StreamTable* streams, int device_count,
                                   std::optional<c10::DeviceType> label)
    : streams_(streams), label_(label) {
  AddressMap* const by_address = label == c10::kCPU ? &addresses() : nullptr;
  for (int i = 0; i < device_count; i++)
    caches_.push_back(std::make_unique<DeviceCache>(hal, streams, static_cast<c10::DeviceIndex>(i), by_address));
}

c10::DataPtr CachingAllocator::allocate(c10::DeviceIndex device, StreamSlot stream, size_t nbytes) {
  check_fork();
  const c10::Device label = label_ ? c10::Device(*label_) : flagos_device(device);
  if (C10_UNLIKELY(nbytes == 0)) return c10::DataPtr(nullptr, label);
  Block* block = caches_[device]->allocate(stream, nbytes);
  if (label_ == c10::kCPU) return c10::DataPtr(block->native, block->native, &free_address, label);
  return c10::DataPtr(block->native, block, &free_block, label);
}

AddressMap& CachingAllocator::addresses() {
  static AddressMap* const map = new AddressMap();  // never destroyed: tensors may outlive static objects
  return *map;
}

void CachingAllocator::free_block(void* context) {
  if (C10_UNLIKELY(in_bad_fork())) return;  // the parent's memory, and perhaps a lock that nobody will ever release
  Block* block = static_cast<Block*>(context);
  block->pool->cache->free(block);
}

void CachingAllocator::free_address(void* context) { try_free_address(context); }

bool CachingAllocator::try_free_address(void* address) noexcept {
  Block* block = addresses().find(address);
  if (block == nullptr) return false;
  free_block(block);
  return true;
}

void CachingAllocator::copy_data(void* dest, const void* src, std::size_t count) const {
  const auto device = flagos_device(platform().current_device());
  platform().copy_bytes(dest, device, src, device, count, platform().current_stream(device.index()));
}

void CachingAllocator::emptyCache(c10::MempoolId_t) {
  check_fork();
  for (auto& cache : caches_) cache->empty();
}

void CachingAllocator::recordStream(const c10::DataPtr& ptr, c10::Stream stream) {
  Block* block = block_of(ptr);
  if (block == nullptr) return;  // empty, or not our memory: its owner keeps it alive
  const StreamSlot slot = streams_->slot_of(stream);
  block->pool->cache->record_stream(block, slot);
}

c10::CachingDeviceAllocator::DeviceStats CachingAllocator::getDeviceStats(c10::DeviceIndex device) {
  return caches_.at(device)->stats();
}
void CachingAllocator::resetAccumulatedStats(c10::DeviceIndex device) { caches_.at(device)->reset_accumulated(); }
void CachingAllocator::resetPeakStats(c10::DeviceIndex device) { caches_.at(device)->reset_peak(); }
std::pair<size_t, size_t> CachingAllocator::getMemoryInfo(c10::DeviceIndex device) {
  return platform().mem_info(device);
}

}  // namespace flagos
