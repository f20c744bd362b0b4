// allocator.cc: the allocator registered for PrivateUse1. It makes storages' memory with the twin inside and forwards
// everything about the cache to the platform.
#include <c10/core/CachingDeviceAllocator.h>

#include "csrc/aten/twin.h"
#include "csrc/runtime/platform.h"

namespace flagos {
namespace {

struct FlagosAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override { return allocate_flagos(nbytes); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the context is the twin, never the address
  void copy_data(void* dest, const void* src, std::size_t count) const override {
    Platform& p = platform();
    const auto device = flagos_device(p.current_device());
    p.copy_bytes(dest, device, src, device, count, p.current_stream(device.index()));
  }

  bool initialized() override { return has_platform() && platform().allocator().initialized(); }
  void emptyCache(c10::MempoolId_t pool) override { platform().allocator().emptyCache(pool); }
  void recordStream(const c10::DataPtr& ptr, c10::Stream stream) override {
    platform().record_stream(native_data_ptr(ptr), stream);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    return platform().allocator().getDeviceStats(checked_index(index));
  }
  // Before anything was allocated a native allocator may know no device yet.
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    platform().start();
    platform().allocator().resetAccumulatedStats(checked_index(index));
  }
  void resetPeakStats(c10::DeviceIndex index) override {
    platform().start();
    platform().allocator().resetPeakStats(checked_index(index));
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    return platform().mem_info(checked_index(index));
  }
};

// Never destroyed: storages may outlive static objects.
FlagosAllocator* const g_allocator = new FlagosAllocator();
REGISTER_ALLOCATOR(c10::kPrivateUse1, g_allocator)

}  // namespace
}  // namespace flagos
