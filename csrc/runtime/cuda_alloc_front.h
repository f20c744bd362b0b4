// cuda_alloc_front.h: a front for blocks of at most 2 MiB before PyTorch's CUDA caching allocator, which takes several
// times as long for one allocate and free as everything else that flagos does in a call.
//
// AllocFront holds the logic and knows no CUDA, so that tests can run it over an allocator of their own. The rules:
//  * A freed block waits in a list of its device, its stream and its size class, and serves the next request there, as
//    the native allocator itself would reuse it: the order of the stream makes that right whichever thread frees. One
//    lock of a few instructions guards all lists. They are shared by all threads, because the threads of forward and
//    backward free each other's blocks, and because then every statistic, and every flush, is exact.
//  * Statistics are exact, and a waiting block counts as free. Peaks too: `room` is how much may still be handed out
//    before a peak could be passed; only then is the native allocator asked for its state. A block of the native small
//    pool has exactly its class's bytes, so that there every figure is that of a process without the front. One of the
//    large pool may be up to 1 MiB longer, depending on where the native allocator found it.
//  * Large blocks that wait go back to the native allocator where the front has none of a class that is asked for, and
//    where many wait and another comes, or a longer one is asked for. It would otherwise cut up longer free blocks and
//    later need new memory for long requests. (Without these rules, or with longer blocks, training with texts of
//    changing length reserved up to a tenth more memory.)
//  * A DataPtr of the front has the address itself as its context, as the native ones do.
//  * The front's lock comes before the native allocator's. The front never allocates natively under its lock. When the
//    native allocator, short of memory and with its own lock taken, calls the front (try_flush), or something else
//    whose memory ends a block of the front, then the front's lock is only tried.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "csrc/runtime/free_list.h"
#include "csrc/runtime/spin_lock.h"

namespace flagos {

class AllocFront {
 public:
  using DeviceStats = c10::CachingDeviceAllocator::DeviceStats;
  static constexpr size_t kStep = 512;               // the native allocator's unit
  static constexpr size_t kSmall = size_t{1} << 20;  // the native allocator's small pool ends here
  static constexpr size_t kLargest = size_t{2} << 20;
  static constexpr int64_t kMostBlocks = int64_t{1} << 16;  // waiting, per device: whoever flushes waits for them
  static constexpr int64_t kMostLarge = 8;                  // of them of the large pool
  static constexpr size_t kMostStreams = 16;                // per device; the one not used for longest makes way

  // The allocator behind the front.
  struct Native {
    virtual ~Native() = default;
    virtual c10::DataPtr allocate(size_t nbytes) = 0;
    virtual void free(void* ptr) = 0;
    virtual DeviceStats stats(c10::DeviceIndex device) = 0;
  };

  // One per process, never destroyed: blocks may outlive statics.
  AllocFront(Native& native, c10::DeviceIndex device_count);

  // Memory of the current device in the order of its current stream, which the caller names.
  c10::DataPtr allocate(size_t nbytes, c10::DeviceIndex device, c10::StreamId stream);
  // The same for a caller that shall not meet the front: only the peaks take note.
  c10::DataPtr allocate_native(size_t nbytes);
  // Native memory came into use by another way.
  void note(c10::DeviceIndex device, size_t nbytes);
  void note_all(c10::DeviceIndex device);  // an amount that nobody knows
  static c10::DeleterFnPtr deleter();      // of the blocks that the front handed out
  // Ends the life of a block, the front's or not.
  void release(void* ptr);
  // The block is in use on a stream that is not its own: only the native allocator can tell when it is free.
  void record_stream(void* ptr, c10::StreamId stream);

  // Runs a native call that may allocate: until it returns this thread, which may then hold the native lock, does not
  // wait for the front's.
  template <class Call>
  static auto native_call(Call&& call) {
    const NativeScope scope;
    return call();
  }

  // Gives waiting blocks back; -1 means of all devices. Returns how many.
  size_t flush(c10::DeviceIndex device = -1);
  // For a caller that holds the native allocator's lock: gives up when the front's lock is not free soon.
  size_t try_flush(c10::DeviceIndex device);

  // While at least one call of step_aside has no resume, the front hands out and keeps nothing.
  void step_aside();
  void resume() { aside_.fetch_sub(1); }

  DeviceStats stats(c10::DeviceIndex device);
  // After the native allocator did the same.
  void reset_peak(c10::DeviceIndex device);
  void reset_accumulated(c10::DeviceIndex device);
  // The true request behind each living block whose native request was another.
  std::unordered_map<uintptr_t, size_t> requests();

 private:
  struct NativeScope {
    NativeScope();
    ~NativeScope();
    const bool outer;
  };
  struct Amount {
    int64_t count = 0, bytes = 0, requested = 0;
    bool negative() const { return (count | bytes | requested) < 0; }
    void add(const Amount& a) { count += a.count, bytes += a.bytes, requested += a.requested; }
    void subtract(const Amount& a) { count -= a.count, bytes -= a.bytes, requested -= a.requested; }
  };
  enum Pool { kAll, kSmallPool, kLargePool };  // as in c10's StatType
  static constexpr size_t kPools = 3;
  static Pool pool_of(size_t size_class) { return size_class * kStep <= kSmall ? kSmallPool : kLargePool; }
  // Blocks and devices: what is used together lies in as few lines of the processor's cache as it can.
  struct alignas(64) Block : FromFreeList<Block, 64> {
    void* ptr;
    Block* next;
    c10::StreamId stream;
    size_t requested, native_requested;  // by the present owner; when the native allocator made the block
    int64_t bytes;                       // as the native allocator counts it
    uint32_t size_class;
    c10::DeviceIndex device;
    bool recorded;
    Pool pool() const { return pool_of(size_class); }
    Amount amount() const { return {1, bytes, static_cast<int64_t>(requested)}; }
  };
  // The classes of the small pool have a list each, those of the large pool, of which few wait, share the last.
  class Lists {
   public:
    c10::StreamId stream;
    uint64_t last_use = 0;
    Block* take(uint32_t size_class) {
      Block** at = &of(size_class);
      while (*at != nullptr && (*at)->size_class != size_class) at = &(*at)->next;
      Block* found = *at;
      if (found != nullptr) *at = found->next;
      return found;
    }
    void put(Block* block) {
      Block*& head = of(block->size_class);
      block->next = head;
      head = block;
    }
    template <class Visit>
    void drain(Pool pool, Visit visit) {
      const size_t end = pool == kSmallPool ? kClasses : head_.size();
      for (size_t i = pool == kLargePool ? kClasses : 0; i < end; i++) {
        while (head_[i] != nullptr) visit(std::exchange(head_[i], head_[i]->next));
      }
    }

   private:
    static constexpr size_t kClasses = kSmall / kStep + 1;
    Block*& of(uint32_t size_class) { return head_[std::min<size_t>(size_class, kClasses)]; }
    std::array<Block*, kClasses + 1> head_{};
  };
  // A sum for each of the native pools, and both together.
  struct Sums {
    Amount small, large;
    Amount& in(Pool pool) { return pool == kSmallPool ? small : large; }
    Amount of(size_t pool) const {
      Amount sum = pool == kLargePool ? large : small;
      if (pool == kAll) sum.add(large);
      return sum;
    }
  };
  // What the statistics of one device need. taken: handed out from the lists. returned: put there, less what was
  // flushed; so returned - taken is what waits.
  struct alignas(64) Device {
    std::vector<std::unique_ptr<Lists>> lists;  // the one in use comes first
    bool used = false;
    Sums taken, returned;
    Amount room[kPools];
    Sums taken_at_reset, returned_at_reset;
    int64_t peak[5][kPools] = {};
    int64_t waiting(Pool pool = kAll) const { return returned.of(pool).count - taken.of(pool).count; }
  };
  static_assert(sizeof(Block) == 64);
  // Blocks by address: open addressing, at most half full.
  class Table {
   public:
    Block* find(const void* ptr) const { return slots_[index_of(ptr)]; }
    Block* insert(Block* block);  // returns the block that had the address
    void erase(const void* ptr);
    const std::vector<Block*>& slots() const { return slots_; }

   private:
    size_t home(const void* ptr) const { return (reinterpret_cast<uintptr_t>(ptr) >> 9) * kFactor >> shift_; }
    size_t index_of(const void* ptr) const {
      size_t i = home(ptr);
      while (slots_[i] != nullptr && slots_[i]->ptr != ptr) i = (i + 1) & (slots_.size() - 1);
      return i;
    }
    static constexpr uint64_t kFactor = 0x9E3779B97F4A7C15u;
    std::vector<Block*> slots_ = std::vector<Block*>(1024);
    int shift_ = 64 - 10;
    size_t used_ = 0;
  };

  bool stepped_aside() const;
  bool end(void* ptr);
  void forget(Block* block);
  void end_late();
  void start(c10::DeviceIndex index);
  Lists* lists_of(Device& device, c10::StreamId stream);
  Lists& make_lists(Device& device, c10::StreamId stream);
  void spend(c10::DeviceIndex index, Pool pool, const Amount& amount);
  Amount ever_allocated(c10::DeviceIndex index);
  void measure(c10::DeviceIndex index);
  size_t flush_lists(Device& device, Lists& lists, Pool pool = kAll);
  size_t flush_locked(c10::DeviceIndex device, Pool pool = kAll);
  void make_way(c10::DeviceIndex device);

  Native& native_;
  SpinLock lock_;
  std::atomic<bool> used_{false}, any_late_{false};
  std::atomic<int> aside_{0};
  std::vector<Device> devices_;
  Table blocks_;
  uint64_t clock_ = 0;
  // Addresses whose release met a taken lock inside a native call.
  SpinLock late_lock_;
  std::vector<void*> late_;
};

// ---- in cuda_allocator.cc
// Puts the front before PyTorch's CUDA allocator, unless FLAGOS_ALLOC_FRONT=0, or the allocator is not PyTorch's own
// caching one. Call it once, after CUDA's lazy initialisation.
void install_alloc_front();
// Memory for a flagos tensor: through the front when it is installed.
c10::DataPtr allocate_through_front(size_t nbytes);

}  // namespace flagos
