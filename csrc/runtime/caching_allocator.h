// caching_allocator.h: the device memory cache over a chip's malloc, for every chip but CUDA.
//
// Memory is cut from segments, in the order of one stream: a freed block may be used again at once by later work of the
// same stream. Requests up to 1 MiB come from 2 MiB segments through exact bins of 512 bytes (a hit is a few loads and
// stores; neighbours are merged only when a bin has nothing to give), larger ones through a best-fit tree that merges
// at once. A block used on other streams (record_stream) waits for their events. Nothing here takes the GIL.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/runtime/address_map.h"
#include "csrc/runtime/hal_streams.h"
#include "csrc/runtime/memory_history.h"
#include "csrc/runtime/platform.h"
#include "csrc/runtime/spin_lock.h"
#include "flagos.h"

namespace flagos {

class DeviceCache;
struct BlockPool;

// A piece of a segment. It is the context of a DataPtr while allocated, or found from the address that is (AddressMap).
struct Block {
  enum State : uint8_t { kFree, kAllocated, kAwaitingFree };

  char* native = nullptr;      // the address that native kernels use
  char* device_ptr = nullptr;  // the address that flagos tensors show
  size_t size = 0;
  size_t requested = 0;
  BlockPool* pool = nullptr;
  Block* prev = nullptr;  // neighbours in the segment
  Block* next = nullptr;
  Block* link = nullptr;  // next in its bin, or in the list of unused Block objects
  std::unique_ptr<std::vector<StreamSlot>> used_by;
  MemoryContext context;  // where it was asked for, when history is recorded
  int pending_events = 0;
  State state = kFree;

  bool split() const { return prev != nullptr || next != nullptr; }
};

// The pool of a program (MemPool) from which the calling thread allocates on one device; id 0: none.
struct CurrentMempool {
  uint64_t id;
  c10::DeviceIndex device;
};
extern __thread CurrentMempool current_mempool __attribute__((tls_model("initial-exec")));

// The free blocks of one stream and one kind (small, large).
struct BlockPool {
  struct BySize {
    bool operator()(const Block* a, const Block* b) const {
      return a->size != b->size ? a->size < b->size : a->native < b->native;
    }
  };
  static constexpr int kBins = 4096 + 1;  // bin i holds blocks of i * 512 bytes, up to a whole small segment

  BlockPool(DeviceCache* cache, StreamSlot stream, bool is_small) : cache(cache), stream(stream), is_small(is_small) {
    if (is_small) bins = std::make_unique<Block*[]>(kBins);
  }

  DeviceCache* cache;
  StreamSlot stream;
  bool is_small;
  bool held = false;     // by a program's MemPool: its free segments stay
  uint64_t mempool = 0;  // that pool's id; 0: none
  // small
  std::unique_ptr<Block*[]> bins;
  std::array<uint64_t, kBins / 64 + 1> nonempty{};
  size_t frees_since_merge = 0;
  size_t merge_after = 0;  // frees that make the next merging pass worth its cost
  // large
  std::set<Block*, BySize> tree;
};

// A counter of c10's statistics, with `freed` derived so that a free touches one word.
struct Counter {
  int64_t current = 0, peak = 0, allocated = 0, at_reset = 0;
  void add(int64_t n) {
    current += n;
    allocated += n;
    peak = current > peak ? current : peak;
  }
  void subtract(int64_t n) { current -= n; }
  void reset_peak() { peak = current; }
  void reset_accumulated() {
    allocated = 0;
    at_reset = current;
  }
  c10::CachingAllocator::Stat stat() const;
};

enum StatKind {
  kAllocation,
  kActive,
  kAllocatedBytes,
  kActiveBytes,
  kRequestedBytes,
  kSegment,
  kReservedBytes,
  kInactiveSplit,
  kInactiveSplitBytes,
  kStatKinds
};

// The cache of one device. Public members lock; private ones named *_locked expect the lock to be held.
class DeviceCache {
 public:
  // `by_address`: where to note every block's address; nullptr: nowhere.
  DeviceCache(const flagos_hal* hal, const StreamTable* streams, c10::DeviceIndex device, AddressMap* by_address);

  Block* allocate(StreamSlot stream, size_t nbytes);
  void free(Block* block) noexcept;
  void record_stream(Block* block, StreamSlot stream);
  void empty();
  void set_fraction(double fraction);
  double fraction();
  bool used();
  c10::CachingDeviceAllocator::DeviceStats stats();
  void reset_peak();
  void reset_accumulated();
  void snapshot(std::vector<MemorySegment>* out);
  // Records from now on, or stops (nullopt).
  void record_history(const std::optional<MemoryHistory::Options>& options, bool clear);
  std::vector<MemoryEvent> history();
  // The pool takes no more memory, and gives back what is free.
  void end_mempool(uint64_t id);

 private:
  using Lock = std::unique_lock<SpinLock>;
  struct Segment {
    char* device_ptr;
    size_t size;
    Block* first;  // stays the first block through all splits and merges
    MemoryContext context;
  };
  struct Pending {
    flagos_event event;
    Block* block;
  };

  BlockPool& pool(StreamSlot stream, bool is_small);
  BlockPool& mempool(StreamSlot stream, bool is_small);
  Block* new_block();
  void retire(Block* block);
  Block* take(BlockPool& pool, size_t size);
  void split(Block* block, size_t size);
  void put_free(Block* block);
  void push(Block* block);
  void absorb_next(Block* block);  // both free and in no list
  size_t merge_small(BlockPool& pool);
  bool worth_merging(BlockPool& pool);
  void count_inactive(const Block* block, int sign);
  void count_alloc(const Block* block);
  void count_free(const Block* block, bool still_active);
  void add(StatKind kind, const BlockPool& pool, int64_t n);

  Block* grow(Lock& lock, BlockPool& pool, size_t size);
  flagos_status add_segment(Lock& lock, BlockPool& pool, size_t segment_size, bool* over_limit);
  void release_cached(Lock& lock);
  void finish_events();
  void throw_out_of_memory(Lock& lock, size_t size, bool over_limit, const std::string& chip_message);

  // memory_history.cc
  void note_place();
  void note(MemoryEvent::Action action, const Block* block, const MemoryContext& context);
  void note_alloc(Block* block);
  void note_segment(const Block* block);
  MemoryContext segment_context();
  void note_free(Block* block, const MemoryContext& context, bool completed);
  void note_out_of_memory(size_t size, StreamSlot stream);

  const flagos_hal* hal_;
  const StreamTable* streams_;
  const c10::DeviceIndex device_;
  AddressMap* const by_address_;
  SpinLock mutex_;
  std::array<std::array<std::unique_ptr<BlockPool>, 2>, kStreamSlots> pools_;
  std::map<std::tuple<uint64_t, StreamSlot, bool>, std::unique_ptr<BlockPool>> mempools_;  // id, stream, is_small
  std::vector<BlockPool*> small_pools_;                                                    // of both
  MemoryHistory history_;
  Counter counters_[kStatKinds][3];    // aggregate, small, large
  std::map<char*, Segment> segments_;  // by native address
  std::map<StreamSlot, std::deque<Pending>> pending_;
  std::vector<flagos_event> spare_events_;
  std::deque<Block> storage_;
  Block* unused_ = nullptr;
  size_t in_flight_ = 0;  // bytes being asked of the chip right now
  size_t limit_ = SIZE_MAX;
  double fraction_ = 1.0;
  bool used_ = false;
  int64_t retries_ = 0, ooms_ = 0, syncs_ = 0, mallocs_ = 0, frees_ = 0;
};

// All devices' caches behind PyTorch's interface. allocate() serves the current device and stream.
class CachingAllocator final : public c10::DeviceAllocator {
 public:
  // `label` is the device type that the DataPtrs carry; nullopt: flagos. With CPU a DataPtr's context is its address.
  CachingAllocator(const flagos_hal* hal, const StreamTable* streams, int device_count,
                   std::optional<c10::DeviceType> label);

  c10::DataPtr allocate(c10::DeviceIndex device, StreamSlot stream, size_t nbytes);
  // The block behind a DataPtr of this allocator, nullptr for any other.
  static Block* block_of(const c10::DataPtr& ptr) noexcept {
    if (ptr.get_deleter() == &free_block) return static_cast<Block*>(ptr.get_context());
    if (ptr.get_deleter() == &free_address) return addresses().find(ptr.get_context());
    return nullptr;
  }
  // Frees an address from allocate() under the CPU label; false, and nothing done, for any other address.
  static bool try_free_address(void* address) noexcept;
  DeviceCache& cache(c10::DeviceIndex device) { return *caches_[device]; }

  c10::DataPtr allocate(size_t nbytes) override {
    const auto device = current_device_index;
    return allocate(device, current_stream_slot[device], nbytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, std::size_t count) const override;
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override;
  void recordStream(const c10::DataPtr& ptr, c10::Stream stream) override;
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;
  void resetPeakStats(c10::DeviceIndex device) override;
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override;

 private:
  static void free_block(void* context);
  static void free_address(void* context);
  static AddressMap& addresses();

  const StreamTable* streams_;
  std::optional<c10::DeviceType> label_;
  std::vector<std::unique_ptr<DeviceCache>> caches_;
};

}  // namespace flagos
