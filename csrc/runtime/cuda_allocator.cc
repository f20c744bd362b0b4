// cuda_allocator.cc: PyTorch's CUDA allocator with the front (cuda_alloc_front.h) before it.
//
// Every entry goes on to the native allocator. Only these do more: allocations of flagos calls take the front; whoever
// looks at the cache finds it as if the front were not there (waiting blocks given back first, or counted as free);
// captures, memory pools and allocation histories make the front step aside.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

#include <mutex>

#include "csrc/runtime/cuda_alloc_front.h"
#include "csrc/runtime/platform.h"
#include "csrc/runtime/torch_version.h"

namespace flagos {
namespace {

namespace cache = c10::cuda::CUDACachingAllocator;
using c10::DeviceIndex;
using c10::MempoolId_t;

class FrontedAllocator final : public cache::CUDAAllocator {
 public:
  explicit FrontedAllocator(cache::CUDAAllocator* native)
      : native_(native), link_(native), front_(link_, c10::cuda::device_count()) {
    one_device_ = c10::cuda::device_count() == 1;
    if (native_->isHistoryEnabled()) watch_history(true);
  }

  // ---- allocation
  c10::DataPtr allocate(size_t nbytes) override {
    if (native_call_device < 0) return front_.allocate_native(nbytes);
    return allocate_flagos(nbytes);
  }
  c10::DataPtr allocate_flagos(size_t nbytes) {
    const DeviceIndex device = current_device();
    return front_.allocate(nbytes, device, c10::cuda::getCurrentCUDAStream(device).id());
  }
  // The native deleter, which is right for every block: one that the front made is then only unknown to it.
  c10::DeleterFnPtr raw_deleter() const override { return native_->raw_deleter(); }
  void copy_data(void* dst, const void* src, std::size_t n) const override { native_->copy_data(dst, src, n); }
  void* raw_alloc(size_t nbytes) override {
    return noted(nbytes, [&] { return native_->raw_alloc(nbytes); });
  }
  void* raw_alloc_with_stream(size_t nbytes, cudaStream_t stream) override {
    return noted(nbytes, [&] { return native_->raw_alloc_with_stream(nbytes, stream); });
  }
  void raw_delete(void* ptr) override {
    if (ptr != nullptr) front_.release(ptr);
  }
  void recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) override {
    if (data.get() == nullptr || data.get_deleter() != front_.deleter()) return native_->recordStream(data, stream);
    front_.record_stream(data.get(), stream.id());
    // The native allocator heeds blocks with its own deleter.
    c10::DataPtr same(data.get(), data.get(), native_->raw_deleter(), data.device());
    native_->recordStream(same, stream);
    same.release_context();
  }

  // ---- the cache
  bool initialized() override { return native_->initialized(); }
  void init(int device_count) override { native_->init(device_count); }
  void enable(bool value) override {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (value != enabled_) value ? front_.resume() : front_.step_aside();
    enabled_ = value;
    native_->enable(value);
  }
  bool isEnabled() const override { return native_->isEnabled(); }
  void emptyCache(MempoolId_t pool = {0, 0}) override {
    front_.flush();
    native_->emptyCache(pool);
  }
  void cacheInfo(DeviceIndex device, size_t* largest) override {
    front_.flush(device);
    native_->cacheInfo(device, largest);
  }
  double getMemoryFraction(DeviceIndex device) override { return native_->getMemoryFraction(device); }
  void setMemoryFraction(double fraction, DeviceIndex device) override { native_->setMemoryFraction(fraction, device); }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override { return native_->getMemoryInfo(device); }
  std::vector<cache::StreamSegmentSize> getExpandableSegmentSizes(DeviceIndex device) override {
    front_.flush(device);
    return native_->getExpandableSegmentSizes(device);
  }
  void* getBaseAllocation(void* ptr, size_t* size) override { return native_->getBaseAllocation(ptr, size); }

  // ---- statistics
  cache::DeviceStats getDeviceStats(DeviceIndex device) override { return front_.stats(device); }
  void resetAccumulatedStats(DeviceIndex device) override {
    native_->resetAccumulatedStats(device);
    front_.reset_accumulated(device);
  }
  void resetPeakStats(DeviceIndex device) override {
    native_->resetPeakStats(device);
    front_.reset_peak(device);
  }
  cache::SnapshotInfo snapshot(MempoolId_t pool = {0, 0}, bool traces = true) override;

  // ---- pools and captures. Blocks of a pool are the native allocator's alone, from the beginning to the end.
  void beginAllocateToPool(DeviceIndex device, MempoolId_t pool, std::function<bool(cudaStream_t)> filter) override {
    front_.step_aside();
    try {
      native_->beginAllocateToPool(device, pool, std::move(filter));
    } catch (...) {
      front_.resume();
      throw;
    }
  }
  void endAllocateToPool(DeviceIndex device, MempoolId_t pool) override {
    native_->endAllocateToPool(device, pool);
    front_.resume();
  }
  void releasePool(DeviceIndex device, MempoolId_t pool) override { native_->releasePool(device, pool); }
  int getPoolUseCount(DeviceIndex device, MempoolId_t pool) override { return native_->getPoolUseCount(device, pool); }
  void createOrIncrefPool(DeviceIndex device, MempoolId_t pool, std::shared_ptr<CUDAAllocator> own) override {
    native_->createOrIncrefPool(device, pool, std::move(own));
  }
  void setUseOnOOM(DeviceIndex device, MempoolId_t pool, bool use) override { native_->setUseOnOOM(device, pool, use); }
  void setNoSplit(DeviceIndex device, MempoolId_t pool) override { native_->setNoSplit(device, pool); }
  bool checkPoolLiveAllocations(DeviceIndex device, MempoolId_t pool,
                                const std::unordered_set<void*>& expected) override {
    return native_->checkPoolLiveAllocations(device, pool, expected);
  }
  std::shared_ptr<cache::AllocatorState> getCheckpointState(DeviceIndex device, MempoolId_t pool) override {
    return native_->getCheckpointState(device, pool);
  }
  cache::CheckpointDelta setCheckpointPoolState(DeviceIndex device,
                                                std::shared_ptr<cache::AllocatorState> state) override {
    auto delta = AllocFront::native_call([&] { return native_->setCheckpointPoolState(device, std::move(state)); });
    front_.note_all(device);
    return delta;
  }

  // ---- sharing and copies. A block of the front is a whole native block, with its address.
  cache::ShareableHandle shareIpcHandle(void* ptr) override { return native_->shareIpcHandle(ptr); }
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override { return native_->getIpcDevPtr(std::move(handle)); }
  void enablePeerAccess(DeviceIndex device, DeviceIndex peer) override { native_->enablePeerAccess(device, peer); }
  cudaError_t memcpyAsync(void* dst, int dst_device, const void* src, int src_device, size_t n, cudaStream_t stream,
                          bool peer) override {
    return native_->memcpyAsync(dst, dst_device, src, src_device, n, stream, peer);
  }

  // ---- observers
  bool isHistoryEnabled() override { return native_->isHistoryEnabled(); }
  void recordHistory(bool enabled, cache::CreateContextFn context, size_t entries, cache::RecordContext when,
                     bool clear, const std::vector<std::string>& skip) override {
    if (enabled) watch_history(true);
    native_->recordHistory(enabled, context, entries, when, clear, skip);
    if (!enabled) watch_history(false);
  }
  void attachAllocatorTraceTracker(cache::AllocatorTraceTracker tracker) override {
    front_.step_aside();  // for good: trackers cannot be detached
    native_->attachAllocatorTraceTracker(std::move(tracker));
  }
  void attachOutOfMemoryObserver(cache::OutOfMemoryObserver observer) override {
    native_->attachOutOfMemoryObserver(std::move(observer));
  }
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& pairs) override {
    native_->recordAnnotation(pairs);
  }
  void pushCompileContext(std::string& context) override { native_->pushCompileContext(context); }
  void popCompileContext() override { native_->popCompileContext(); }
  void setUserMetadata(const std::string& metadata) override { native_->setUserMetadata(metadata); }
  std::string getUserMetadata() override { return native_->getUserMetadata(); }
  std::string name() override { return native_->name(); }

  // For the native allocator, which found no free block on the current device and holds its lock.
  bool give_back() { return front_.try_flush(current_device()) != 0; }

 private:
  struct Link final : AllocFront::Native {
    explicit Link(CUDAAllocator* native) : native_(native) {}
    c10::DataPtr allocate(size_t nbytes) override { return native_->allocate(nbytes); }
    void free(void* ptr) override { native_->raw_delete(ptr); }
    AllocFront::DeviceStats stats(DeviceIndex device) override { return native_->getDeviceStats(device); }
    CUDAAllocator* const native_;
  };

  // With one device the driver need not be asked.
  DeviceIndex current_device() const {
    if (C10_LIKELY(one_device_)) return 0;
    DeviceIndex device = -1;
    C10_CUDA_CHECK(c10::cuda::GetDevice(&device));
    return device;
  }
  template <class Call>
  void* noted(size_t nbytes, Call call) {
    void* ptr = AllocFront::native_call(call);
    if (ptr != nullptr) front_.note(current_device(), nbytes);
    return ptr;
  }
  void watch_history(bool on) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (on == history_) return;
    on ? front_.step_aside() : front_.resume();
    history_ = on;
  }

  CUDAAllocator* const native_;
  Link link_;
  AllocFront front_;
  bool one_device_ = false;
  std::mutex mutex_;  // guards the two below
  bool history_ = false, enabled_ = true;
};

// The native snapshot after a flush, with the true request of each block that the front has handed out anew.
cache::SnapshotInfo FrontedAllocator::snapshot(MempoolId_t pool, bool traces) {
  front_.flush();
  cache::SnapshotInfo info = native_->snapshot(pool, traces);
  const auto requests = front_.requests();
  if (requests.empty()) return info;
  for (auto& segment : info.segments) {
    uintptr_t address = segment.address;
    for (auto& block : segment.blocks) {
      const auto found = requests.find(address);
      address += block.size;
      if (found == requests.end() || !block.allocated) continue;
      segment.requested_size += found->second - block.requested_size;
      block.requested_size = found->second;
    }
  }
  return info;
}

FrontedAllocator* installed = nullptr;

struct GiveBack final : c10::FreeMemoryCallback {
  bool Execute() override { return installed != nullptr && installed->give_back(); }
};
bool wanted() {
  const char* value = flagos_env("FLAGOS_ALLOC_FRONT");
  const std::string text = value == nullptr || *value == '\0' ? "1" : value;
  TORCH_CHECK(text == "0" || text == "1", "FLAGOS_ALLOC_FRONT=", text, ": expected 1 or 0");
  // PyTorch's own switch: no cache at all, for memory checkers.
  return text == "1" && flagos_env("PYTORCH_NO_CUDA_MEMORY_CACHING") == nullptr;
}

}  // namespace

void install_alloc_front() {
  if (installed != nullptr || !wanted()) return;
  cache::CUDAAllocator* native = cache::get();
  if (native->name() != "native") return;    // cudaMallocAsync and pluggable allocators have rules of their own
  installed = new FrontedAllocator(native);  // never destroyed: tensors may outlive statics
  c10::FreeCudaMemoryCallbacksRegistry()->Register(
      "flagos_alloc_front", []() -> std::unique_ptr<c10::FreeMemoryCallback> { return std::make_unique<GiveBack>(); });
  cache::allocator.store(installed);
  c10::SetAllocator(c10::kCUDA, installed, 1);
}

c10::DataPtr allocate_through_front(size_t nbytes) {
  return installed != nullptr ? installed->allocate_flagos(nbytes) : cache::get()->allocate(nbytes);
}

}  // namespace flagos
