// cuda_alloc_front.cc: the logic of the front (rules: cuda_alloc_front.h).
#include "csrc/runtime/cuda_alloc_front.h"

#include <c10/core/AllocatorConfig.h>
#include <c10/core/impl/GPUTrace.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "csrc/runtime/fork.h"

namespace flagos {
namespace {

using Guard = std::lock_guard<SpinLock>;
using Stats = AllocFront::DeviceStats;
using c10::CachingAllocator::StatArray;

AllocFront* instance;  // for the deleter, which is given an address and nothing else

// Set while this thread is inside the native allocator's allocate, and therefore perhaps holds its lock.
thread_local bool in_native = false;

// The front's lock, for a caller that must not wait for it.
bool lock_soon(SpinLock& lock) {
  for (int tries = 0; tries < 1000; tries++) {
    if (lock.try_lock()) return true;
  }
  return false;
}

void delete_block(void* ptr) { instance->release(ptr); }

// The statistics that waiting blocks distort, each with the part of an Amount that it counts.
enum Part { kCount, kBytes, kRequested };
struct Kind {
  StatArray Stats::* stat;
  Part part;
};
constexpr Kind kKinds[] = {{&Stats::allocation, kCount},
                           {&Stats::active, kCount},
                           {&Stats::allocated_bytes, kBytes},
                           {&Stats::active_bytes, kBytes},
                           {&Stats::requested_bytes, kRequested}};
constexpr size_t kKindCount = std::size(kKinds);

template <class Amount>
auto& part_of(Amount&& amount, Part part) {
  return part == kCount ? amount.count : part == kBytes ? amount.bytes : amount.requested;
}

size_t class_of(size_t nbytes) { return (nbytes + AllocFront::kStep - 1) / AllocFront::kStep; }

}  // namespace

AllocFront::NativeScope::NativeScope() : outer(std::exchange(in_native, true)) {}
AllocFront::NativeScope::~NativeScope() { in_native = outer; }

AllocFront::Block* AllocFront::Table::insert(Block* block) {
  if (2 * (used_ + 1) > slots_.size()) {
    std::vector<Block*> old(2 * slots_.size());
    old.swap(slots_);
    shift_--;
    for (Block* b : old) {
      if (b != nullptr) slots_[index_of(b->ptr)] = b;
    }
  }
  Block*& slot = slots_[index_of(block->ptr)];
  if (slot == nullptr) used_++;
  return std::exchange(slot, block);
}

void AllocFront::Table::erase(const void* ptr) {
  size_t hole = index_of(ptr);
  if (slots_[hole] == nullptr) return;
  used_--;
  const size_t mask = slots_.size() - 1;
  slots_[hole] = nullptr;
  // Every later block of the run that the hole cuts off from its home moves into it.
  for (size_t i = (hole + 1) & mask; slots_[i] != nullptr; i = (i + 1) & mask) {
    if (((i - home(slots_[i]->ptr)) & mask) < ((i - hole) & mask)) continue;
    slots_[hole] = std::exchange(slots_[i], nullptr);
    hole = i;
  }
}

AllocFront::AllocFront(Native& native, c10::DeviceIndex device_count) : native_(native), devices_(device_count) {
  instance = this;
}

// Whoever watches single allocations (the memory profiler, a sanitizer of GPU accesses) must see them all.
bool AllocFront::stepped_aside() const {
  return aside_.load(std::memory_order_relaxed) != 0 || in_bad_fork() || c10::memoryProfilingEnabled() ||
         c10::impl::GPUTrace::get_trace() != nullptr;
}

void AllocFront::step_aside() {
  aside_.fetch_add(1);
  flush();  // whoever puts a block back after this has seen the new count under the lock
}

// Until its first use on a device the front changes nothing there, so that the native peaks hold.
void AllocFront::start(c10::DeviceIndex index) {
  Device& device = devices_[index];
  const Stats stats = native_.stats(index);
  for (size_t k = 0; k < kKindCount; k++) {
    for (size_t p = 0; p < kPools; p++) device.peak[k][p] = (stats.*kKinds[k].stat)[p].peak;
  }
  device.used = true;
  used_.store(true, std::memory_order_relaxed);
  measure(index);
}

AllocFront::Lists* AllocFront::lists_of(Device& device, c10::StreamId stream) {
  auto& all = device.lists;
  if (C10_LIKELY(!all.empty() && all.front()->stream == stream)) return all.front().get();
  for (auto& lists : all) {
    if (lists->stream != stream) continue;
    all.front()->last_use = ++clock_;
    std::swap(all.front(), lists);
    return all.front().get();
  }
  return nullptr;
}

AllocFront::Lists& AllocFront::make_lists(Device& device, c10::StreamId stream) {
  auto& all = device.lists;
  if (all.size() < kMostStreams) {
    all.push_back(std::make_unique<Lists>());
  } else {
    // The first is the one in use and carries an old time.
    auto oldest = std::min_element(all.begin() + 1, all.end(),
                                   [](const auto& a, const auto& b) { return a->last_use < b->last_use; });
    flush_lists(device, **oldest);
    std::swap(*oldest, all.back());
  }
  all.back()->stream = stream;
  return *lists_of(device, stream);
}

c10::DataPtr AllocFront::allocate(size_t nbytes, c10::DeviceIndex device, c10::StreamId stream) {
  if (nbytes - 1 >= kLargest) {  // zero, too
    if (nbytes != 0 && !stepped_aside()) {
      const Guard guard(lock_);
      make_way(device);
    }
    return allocate_native(nbytes);
  }
  if (C10_UNLIKELY(stepped_aside())) {
    flush();
    return allocate_native(nbytes);
  }
  const auto size_class = static_cast<uint32_t>(class_of(nbytes));
  const bool large = pool_of(size_class) == kLargePool;
  {
    const Guard guard(lock_);
    Device& d = devices_[device];
    Lists* lists = lists_of(d, stream);
    if (C10_LIKELY(lists != nullptr)) {
      if (Block* block = lists->take(size_class)) {
        block->requested = nbytes;
        d.taken.in(block->pool()).add(block->amount());
        spend(device, block->pool(), block->amount());
        return c10::DataPtr(block->ptr, block->ptr, &delete_block, c10::Device(c10::kCUDA, device));
      }
    }
    if (!d.used) start(device);
    if (large) flush_locked(device, kLargePool);
  }
  const Amount before = large ? ever_allocated(device) : Amount();
  c10::DataPtr data = allocate_native(nbytes);
  const Amount after = large ? ever_allocated(device) : Amount{1, static_cast<int64_t>(size_class * kStep), 0};
  // A setting may make the native allocator round in another way, or not cache at all.
  using c10::CachingAllocator::AcceleratorAllocatorConfig;
  if (!data || data.get() != data.get_context() || AcceleratorAllocatorConfig::roundup_power2_divisions(nbytes) > 1) {
    return data;
  }
  if (C10_UNLIKELY(after.count - before.count != 1)) return data;  // another thread's block is among them
  auto block = std::make_unique<Block>(Block{{},
                                             data.get(),
                                             nullptr,
                                             stream,
                                             nbytes,
                                             nbytes,
                                             after.bytes - before.bytes,
                                             size_class,
                                             data.device().index(),
                                             false});
  const Guard guard(lock_);
  if (Block* lost = blocks_.insert(block.get())) {  // released by the native deleter, without the front's knowledge
    forget(lost);
  }
  void* ptr = block.release()->ptr;
  data.release_context();
  return c10::DataPtr(ptr, ptr, &delete_block, data.device());
}

c10::DataPtr AllocFront::allocate_native(size_t nbytes) {
  if (C10_UNLIKELY(in_bad_fork())) return native_.allocate(nbytes);
  c10::DataPtr data;
  try {
    const NativeScope scope;
    data = native_.allocate(nbytes);
  } catch (const c10::OutOfMemoryError&) {
    // try_flush, which the native allocator called before it gave up, may have met a lock that was taken.
    if (in_native || flush() == 0) throw;
    const NativeScope scope;
    data = native_.allocate(nbytes);
  }
  if (C10_UNLIKELY(in_native)) return data;  // called by the native allocator itself: its lock may be taken
  if (data) note(data.device().index(), nbytes);
  return data;
}

void AllocFront::note(c10::DeviceIndex device, size_t nbytes) {
  end_late();
  if (!used_.load(std::memory_order_relaxed) || in_bad_fork()) return;
  const Guard guard(lock_);
  if (!devices_[device].used) return;
  // A large block may be longer than its request, by less than 2 MiB unless a setting says otherwise.
  using c10::CachingAllocator::AcceleratorAllocatorConfig;
  if (AcceleratorAllocatorConfig::roundup_power2_divisions(nbytes) > 1 ||
      nbytes >= AcceleratorAllocatorConfig::max_split_size()) {
    return measure(device);
  }
  const Pool pool = pool_of(class_of(nbytes));
  const size_t bytes = class_of(nbytes) * kStep + (pool == kSmallPool ? 0 : 2 * kSmall);
  spend(device, pool, {1, static_cast<int64_t>(bytes), static_cast<int64_t>(nbytes)});
}

void AllocFront::note_all(c10::DeviceIndex device) {
  if (!used_.load(std::memory_order_relaxed) || in_bad_fork()) return;
  const Guard guard(lock_);
  if (devices_[device].used) measure(device);
}

c10::DeleterFnPtr AllocFront::deleter() { return &delete_block; }

void AllocFront::release(void* ptr) {
  if (C10_UNLIKELY(in_bad_fork())) return;  // the parent's memory, and perhaps a lock that nobody will ever release
  if (C10_LIKELY(!in_native)) {
    lock_.lock();
  } else if (!lock_soon(lock_)) {
    const Guard guard(late_lock_);
    late_.push_back(ptr);
    any_late_.store(true, std::memory_order_relaxed);
    return;
  }
  const bool kept = end(ptr);
  lock_.unlock();
  if (!kept) native_.free(ptr);
}

// Under the lock. True when the block waits in a list from now on; false when the front no longer knows it.
bool AllocFront::end(void* ptr) {
  Block* block = blocks_.find(ptr);
  if (block == nullptr) return false;
  Device& device = devices_[block->device];
  if (!block->recorded && !stepped_aside() && device.waiting() < kMostBlocks) {
    if (block->pool() == kLargePool) make_way(block->device);
    Lists* lists = lists_of(device, block->stream);
    if (C10_UNLIKELY(lists == nullptr)) lists = &make_lists(device, block->stream);
    lists->put(block);
    device.returned.in(block->pool()).add(block->amount());
    device.room[kAll].add(block->amount());
    device.room[block->pool()].add(block->amount());
    return true;
  }
  blocks_.erase(ptr);
  forget(block);
  return false;
}

// The block is the native allocator's again, which will take off what it was once asked for.
void AllocFront::forget(Block* block) {
  const auto requested = static_cast<int64_t>(block->requested), once = static_cast<int64_t>(block->native_requested);
  devices_[block->device].returned.in(block->pool()).requested += requested - once;
  delete block;
}

void AllocFront::end_late() {
  if (C10_LIKELY(!any_late_.load(std::memory_order_relaxed))) return;
  std::vector<void*> late;
  {
    const Guard guard(late_lock_);
    late.swap(late_);
    any_late_.store(false, std::memory_order_relaxed);
  }
  for (void* ptr : late) release(ptr);
}

void AllocFront::record_stream(void* ptr, c10::StreamId stream) {
  if (C10_UNLIKELY(in_bad_fork())) return;
  const Guard guard(lock_);
  Block* block = blocks_.find(ptr);
  if (block != nullptr && block->stream != stream) block->recorded = true;
}

size_t AllocFront::flush_lists(Device& device, Lists& lists, Pool pool) {
  // A memory profiler has seen these blocks freed when they came to wait, or was not there to see them allocated.
  const auto watched = c10::ThreadLocalDebugInfo::current();
  c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(nullptr);
  size_t flushed = 0;
  lists.drain(pool, [&](Block* block) {
    block->requested = block->native_requested;
    device.returned.in(block->pool()).subtract(block->amount());
    blocks_.erase(block->ptr);
    native_.free(block->ptr);
    delete block;
    flushed++;
  });
  c10::ThreadLocalDebugInfo::_forceCurrentDebugInfo(watched);
  return flushed;
}

size_t AllocFront::flush_locked(c10::DeviceIndex index, Pool pool) {
  size_t flushed = 0;
  for (size_t i = 0; i < devices_.size(); i++) {
    if (index >= 0 && static_cast<size_t>(index) != i) continue;
    Device& device = devices_[i];
    if (device.waiting(pool) == 0) continue;
    for (auto& lists : device.lists) flushed += flush_lists(device, *lists, pool);
  }
  return flushed;
}

void AllocFront::make_way(c10::DeviceIndex device) {
  if (devices_[device].waiting(kLargePool) >= kMostLarge) flush_locked(device, kLargePool);
}

size_t AllocFront::flush(c10::DeviceIndex device) {
  if (!used_.load(std::memory_order_relaxed) || in_bad_fork()) return 0;
  end_late();
  const Guard guard(lock_);
  return flush_locked(device);
}

size_t AllocFront::try_flush(c10::DeviceIndex device) {
  if (!used_.load(std::memory_order_relaxed) || in_bad_fork()) return 0;
  if (!lock_soon(lock_)) return 0;
  const Guard guard(lock_, std::adopt_lock);
  return flush_locked(device);
}

void AllocFront::spend(c10::DeviceIndex index, Pool pool, const Amount& amount) {
  auto& room = devices_[index].room;
  room[kAll].subtract(amount);
  room[pool].subtract(amount);
  if (C10_UNLIKELY(room[kAll].negative() || room[pool].negative())) measure(index);
}

// Of the native large pool: how many blocks it has handed out so far, and their bytes.
AllocFront::Amount AllocFront::ever_allocated(c10::DeviceIndex index) {
  const Stats stats = native_.stats(index);
  return {stats.allocation[kLargePool].allocated, stats.allocated_bytes[kLargePool].allocated, 0};
}

// Brings the peaks up to date and finds how far they are away.
void AllocFront::measure(c10::DeviceIndex index) {
  Device& device = devices_[index];
  const Stats stats = native_.stats(index);
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (size_t p = 0; p < kPools; p++) {
    device.room[p] = {kMost, kMost, kMost};
    for (size_t k = 0; k < kKindCount; k++) {
      const Part part = kKinds[k].part;
      const int64_t waiting = part_of(device.returned.of(p), part) - part_of(device.taken.of(p), part);
      const int64_t current = (stats.*kKinds[k].stat)[p].current - waiting;
      int64_t& peak = device.peak[k][p];
      peak = std::max(peak, current);
      int64_t& room = part_of(device.room[p], part);
      room = std::min(room, peak - current);
    }
  }
}

AllocFront::DeviceStats AllocFront::stats(c10::DeviceIndex index) {
  if (!used_.load(std::memory_order_relaxed) || in_bad_fork()) return native_.stats(index);
  const Guard guard(lock_);
  Stats stats = native_.stats(index);
  const Device& device = devices_[index];
  if (!device.used) return stats;
  for (size_t k = 0; k < kKindCount; k++) {
    const Part part = kKinds[k].part;
    for (size_t p = 0; p < kPools; p++) {
      const int64_t taken = part_of(device.taken.of(p), part), returned = part_of(device.returned.of(p), part);
      auto& stat = (stats.*kKinds[k].stat)[p];
      stat.current -= returned - taken;
      stat.peak = device.peak[k][p];
      stat.allocated += taken - part_of(device.taken_at_reset.of(p), part);
      stat.freed += returned - part_of(device.returned_at_reset.of(p), part);
    }
  }
  // Without the front the waiting bytes would be free parts of segments. How many blocks that were cannot be told.
  for (size_t p = 0; p < kPools; p++) {
    stats.inactive_split_bytes[p].current += device.returned.of(p).bytes - device.taken.of(p).bytes;
  }
  return stats;
}

void AllocFront::reset_peak(c10::DeviceIndex index) {
  if (!used_.load(std::memory_order_relaxed) || in_bad_fork()) return;
  const Guard guard(lock_);
  if (!devices_[index].used) return;
  for (auto& peaks : devices_[index].peak) std::fill(std::begin(peaks), std::end(peaks), 0);
  measure(index);
}

void AllocFront::reset_accumulated(c10::DeviceIndex index) {
  if (!used_.load(std::memory_order_relaxed) || in_bad_fork()) return;
  const Guard guard(lock_);
  Device& device = devices_[index];
  device.taken_at_reset = device.taken;
  device.returned_at_reset = device.returned;
}

std::unordered_map<uintptr_t, size_t> AllocFront::requests() {
  std::unordered_map<uintptr_t, size_t> out;
  if (in_bad_fork()) return out;
  const Guard guard(lock_);
  for (const Block* block : blocks_.slots()) {
    if (block != nullptr && block->requested != block->native_requested) {
      out.emplace(reinterpret_cast<uintptr_t>(block->ptr), block->requested);
    }
  }
  return out;
}

}  // namespace flagos
