// caching_allocator_segments.cc: the slow half of the device memory cache: segments, running out, statistics,
// snapshots.
#include <c10/util/Exception.h>

#include <algorithm>
#include <string>
#include <vector>

#include "csrc/runtime/caching_allocator.h"
#include "csrc/runtime/hal_error.h"

namespace flagos {
namespace {

constexpr size_t kMiB = 1u << 20;
constexpr size_t kSmallSegment = 2 * kMiB;
constexpr size_t kLargeSegment = 20 * kMiB;  // shared by requests below 10 MiB
constexpr size_t kOwnSegment = 10 * kMiB;    // from here on a request gets a segment of its own
constexpr size_t kSegmentUnit = 2 * kMiB;

size_t segment_size(const BlockPool& pool, size_t size) {
  if (pool.is_small) return kSmallSegment;
  if (size < kOwnSegment) return kLargeSegment;
  return (size + kSegmentUnit - 1) / kSegmentUnit * kSegmentUnit;
}

std::string mib(uint64_t bytes) { return c10::CachingAllocator::format_size(bytes); }

}  // namespace

// ---- growing

// A block of `size` bytes for a pool that has none: merge, else a new segment, else free what is cached and try again.
Block* DeviceCache::grow(Lock& lock, BlockPool& p, size_t size) {
  if (worth_merging(p)) {
    merge_small(p);
    if (Block* block = take(p, size)) return block;
  }
  const size_t wanted = segment_size(p, size);
  bool over_limit = false;
  flagos_status status = add_segment(lock, p, wanted, &over_limit);
  std::string chip_message;
  if (status == FLAGOS_OUT_OF_MEMORY) {
    retries_++;
    chip_message = over_limit ? "" : hal_->last_message();
    release_cached(lock);
    if (Block* block = take(p, size)) return block;  // merging alone may have made room
    status = add_segment(lock, p, wanted, &over_limit);
    const size_t least = (size + kSegmentUnit - 1) / kSegmentUnit * kSegmentUnit;
    if (status == FLAGOS_OUT_OF_MEMORY && least < wanted) status = add_segment(lock, p, least, &over_limit);
    if (status == FLAGOS_OUT_OF_MEMORY && !over_limit) chip_message = hal_->last_message();
  }
  if (status == FLAGOS_OUT_OF_MEMORY) throw_out_of_memory(lock, size, over_limit, chip_message);
  if (status != FLAGOS_OK) {
    lock.unlock();
    throw_hal_error(hal_, "allocating device memory", device_, status);
  }
  Block* block = take(p, size);
  if (block != nullptr) return block;
  return grow(lock, p, size);  // another thread was faster to the new segment
}

// Asks the chip for a segment, without the lock, and adds it to the pool as one free block.
flagos_status DeviceCache::add_segment(Lock& lock, BlockPool& p, size_t size, bool* over_limit) {
  const size_t reserved = static_cast<size_t>(counters_[kReservedBytes][0].current) + in_flight_;
  *over_limit = size > limit_ || reserved > limit_ - size;
  if (*over_limit) return FLAGOS_OUT_OF_MEMORY;
  in_flight_ += size;
  lock.unlock();
  void* device_ptr = nullptr;
  void* native = nullptr;
  flagos_status status = hal_->malloc(device_, size, &device_ptr);
  if (status == FLAGOS_OK) {
    const flagos_status alias = hal_->host_alias ? hal_->host_alias(device_ptr, &native) : FLAGOS_UNSUPPORTED;
    if (alias == FLAGOS_UNSUPPORTED) {
      native = device_ptr;
    } else if (alias != FLAGOS_OK) {
      const std::string text = hal_error_text(hal_, "mapping device memory for the host", device_, alias);
      hal_->free(device_, device_ptr);
      lock.lock();
      in_flight_ -= size;
      lock.unlock();
      TORCH_CHECK(false, text);
    }
    if (by_address_ != nullptr) by_address_->cover(native, size);
  }
  lock.lock();
  in_flight_ -= size;
  if (status != FLAGOS_OK) return status;
  Block* block = new_block();
  block->native = static_cast<char*>(native);
  block->device_ptr = static_cast<char*>(device_ptr);
  block->size = size;
  block->pool = &p;
  block->state = Block::kFree;
  if (by_address_ != nullptr) by_address_->set(native, block);
  segments_[block->native] = {block->device_ptr, size, block, segment_context()};
  if (history_.on()) note_segment(block);
  mallocs_++;
  used_ = true;
  add(kSegment, p, 1);
  add(kReservedBytes, p, static_cast<int64_t>(size));
  push(block);
  return FLAGOS_OK;
}

// Gives every segment that is entirely free back to the chip. The lock is released meanwhile.
void DeviceCache::release_cached(Lock& lock) {
  if (!pending_.empty()) {
    syncs_++;
    lock.unlock();
    hal_check(hal_, "waiting for blocks that other streams use", device_, hal_->device_sync(device_));
    lock.lock();
    finish_events();
  }
  for (auto* pool : small_pools_) merge_small(*pool);
  std::vector<Block*> out;
  for (auto it = segments_.begin(); it != segments_.end();) {
    Block* block = it->second.first;
    if (block->state != Block::kFree || block->split() || block->pool->held) {
      ++it;
      continue;
    }
    BlockPool& p = *block->pool;
    if (p.is_small) {  // out of its bin: it is alone in the bin of whole segments, or one of several there
      Block** link = &p.bins[block->size / 512];
      while (*link != block) link = &(*link)->link;
      *link = block->link;
      block->link = nullptr;
      const size_t bin = block->size / 512;
      if (p.bins[bin] == nullptr) p.nonempty[bin / 64] &= ~(uint64_t{1} << (bin % 64));
    } else {
      p.tree.erase(block);
    }
    out.push_back(block);
    it = segments_.erase(it);
  }
  if (out.empty()) return;
  lock.unlock();
  // Work that used these blocks may still be queued: free() does not wait.
  flagos_status first = hal_->device_sync(device_);
  const char* what = "waiting before freeing device memory";
  std::string text = first != FLAGOS_OK ? hal_error_text(hal_, what, device_, first) : "";
  std::vector<Block*> kept;
  for (Block*& block : out) {
    const flagos_status status = first != FLAGOS_OK ? first : hal_->free(device_, block->device_ptr);
    if (status == FLAGOS_OK) continue;
    if (text.empty()) text = hal_error_text(hal_, "freeing device memory", device_, status);
    kept.push_back(block);
    block = nullptr;
  }
  lock.lock();
  for (Block* block : kept) {  // still ours: back into the cache
    segments_[block->native] = {block->device_ptr, block->size, block, nullptr};
    push(block);
  }
  for (Block* block : out) {
    if (block == nullptr) continue;
    frees_++;
    if (history_.on()) note(MemoryEvent::kSegmentFree, block, nullptr);
    add(kSegment, *block->pool, -1);
    add(kReservedBytes, *block->pool, -static_cast<int64_t>(block->size));
    retire(block);
  }
  if (!text.empty()) {
    lock.unlock();
    TORCH_CHECK(false, text);
  }
}

void DeviceCache::throw_out_of_memory(Lock& lock, size_t size, bool over_limit, const std::string& chip_message) {
  ooms_++;
  if (history_.on()) note_out_of_memory(size, current_stream_slot[device_]);
  const auto allocated = static_cast<size_t>(counters_[kAllocatedBytes][0].current);
  const auto reserved = static_cast<size_t>(counters_[kReservedBytes][0].current);
  const size_t limit = limit_;
  lock.unlock();
  c10::reportOutOfMemoryToProfiler(static_cast<int64_t>(size), allocated, reserved, flagos_device(device_));
  uint64_t free_bytes = 0, total_bytes = 0;
  const bool known = hal_->mem_info(device_, &free_bytes, &total_bytes) == FLAGOS_OK;
  std::string text = "flagos out of memory. Tried to allocate " + mib(size) + " on flagos:" + std::to_string(device_) +
                     " (" + hal_->name + "): this process holds " + mib(allocated) + " in tensors and " +
                     mib(reserved) + " reserved in all";
  if (over_limit) text += ", and may reserve " + mib(limit) + " (set_per_process_memory_fraction)";
  if (known) text += "; the chip has " + mib(free_bytes) + " free of " + mib(total_bytes);
  if (!chip_message.empty()) text += " and says: " + chip_message;
  text += reserved - allocated > reserved / 4 && reserved - allocated > size
              ? "; much of the reserved memory is free but in pieces: allocate the largest tensors first, or restart"
              : "; delete tensors that are not needed or use a smaller batch";
  TORCH_CHECK_WITH(OutOfMemoryError, false, text);
}

void DeviceCache::empty() {
  Lock lock(mutex_);
  release_cached(lock);
}

bool DeviceCache::used() {
  Lock lock(mutex_);
  return used_;
}

void DeviceCache::set_fraction(double fraction) {
  TORCH_CHECK_VALUE(fraction >= 0 && fraction <= 1, "flagos: a memory fraction is between 0 and 1, not ", fraction);
  uint64_t free_bytes = 0, total_bytes = 0;
  hal_check(hal_, "reading the memory size", device_, hal_->mem_info(device_, &free_bytes, &total_bytes));
  Lock lock(mutex_);
  fraction_ = fraction;
  limit_ = fraction == 1 ? SIZE_MAX : static_cast<size_t>(fraction * static_cast<double>(total_bytes));
}

double DeviceCache::fraction() {
  Lock lock(mutex_);
  return fraction_;
}

// ---- statistics

c10::CachingAllocator::Stat Counter::stat() const {
  c10::CachingAllocator::Stat s;
  s.current = current;
  s.peak = peak;
  s.allocated = allocated;
  s.freed = allocated - (current - at_reset);
  return s;
}

c10::CachingDeviceAllocator::DeviceStats DeviceCache::stats() {
  Lock lock(mutex_);
  for (auto* pool : small_pools_) {  // so that blocks which only wait to be merged do not count as split
    if (pool->frees_since_merge > 0) merge_small(*pool);
  }
  c10::CachingDeviceAllocator::DeviceStats out;
  c10::CachingAllocator::StatArray* const arrays[kStatKinds] = {
      &out.allocation, &out.active,         &out.allocated_bytes, &out.active_bytes,        &out.requested_bytes,
      &out.segment,    &out.reserved_bytes, &out.inactive_split,  &out.inactive_split_bytes};
  for (int kind = 0; kind < kStatKinds; kind++) {
    for (int k = 0; k < 3; k++) (*arrays[kind])[k] = counters_[kind][k].stat();
  }
  out.num_alloc_retries = retries_;
  out.num_ooms = ooms_;
  out.num_sync_all_streams = syncs_;
  out.num_device_alloc = mallocs_;
  out.num_device_free = frees_;
  out.max_split_size = -1;  // every block may be split
  return out;
}

void DeviceCache::reset_peak() {
  Lock lock(mutex_);
  for (auto& row : counters_) {
    for (Counter& c : row) c.reset_peak();
  }
}

void DeviceCache::reset_accumulated() {
  Lock lock(mutex_);
  for (auto& row : counters_) {
    for (Counter& c : row) c.reset_accumulated();
  }
  retries_ = ooms_ = syncs_ = mallocs_ = frees_ = 0;
}

void DeviceCache::snapshot(std::vector<MemorySegment>* out) {
  Lock lock(mutex_);
  for (const auto& entry : segments_) {
    const Segment& s = entry.second;
    const BlockPool& p = *s.first->pool;
    const c10::Stream stream(c10::Stream::UNSAFE, flagos_device(device_), p.stream);
    out->push_back(
        {reinterpret_cast<uintptr_t>(s.device_ptr), s.size, stream, !p.is_small, {}, {0, p.mempool}, s.context});
    for (const Block* block = s.first; block != nullptr; block = block->next) {
      const auto state = block->state == Block::kAllocated ? MemoryBlock::kAllocated
                         : block->state == Block::kFree    ? MemoryBlock::kInactive
                                                           : MemoryBlock::kAwaitingFree;
      out->back().blocks.push_back({block->size, block->requested, state, block->context});
    }
  }
}

}  // namespace flagos
