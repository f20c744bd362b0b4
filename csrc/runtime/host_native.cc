// host_native.cc: the simulated host chip as torch's CPU kernels see it.
//
// Its native label is CPU, so results of CPU kernels would land in ordinary memory. While a native call runs on a
// thread (native_call_device >= 0), the CPU allocator registered here gives device memory instead: its host-readable
// alias, labelled CPU. Kernels run on the calling thread, so a native call first waits for its stream.
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/CPUAllocator.h>

#include "csrc/runtime/hal_error.h"
#include "csrc/runtime/hal_platform.h"

namespace flagos {
namespace {

class CpuHook final : public c10::Allocator {
 public:
  CpuHook(const flagos_hal* hal, const StreamTable* streams, CachingAllocator* device_memory, c10::Allocator* ordinary)
      : hal_(hal), streams_(streams), device_memory_(device_memory), ordinary_(ordinary) {}

  c10::DataPtr allocate(size_t nbytes) override {
    const auto device = native_call_device;
    if (C10_LIKELY(device < 0)) return ordinary_->allocate(nbytes);
    c10::DataPtr data = device_memory_->allocate(device, current_stream_slot[device], nbytes);
    // The kernel writes at once, but another thread may have freed this block with work on it still in the stream.
    hal_check(hal_, "waiting for the stream before an operator's result", device,
              hal_->stream_sync(device, streams_->current_handle(device)));
    return data;
  }
  // raw_allocate may come inside a native call and raw_deallocate outside one, or the other way round.
  c10::DeleterFnPtr raw_deleter() const override { return &free_either; }
  // Nobody else may take device memory's DataPtr apart, for example to share it copy-on-write.
  bool is_simple_data_ptr(const c10::DataPtr& ptr) const override {
    return CachingAllocator::block_of(ptr) == nullptr && ordinary_->is_simple_data_ptr(ptr);
  }
  void copy_data(void* dest, const void* src, std::size_t count) const override { default_copy_data(dest, src, count); }

 private:
  static void free_either(void* address) {
    if (!CachingAllocator::try_free_address(address)) c10::GetDefaultCPUAllocator()->raw_deallocate(address);
  }

  const flagos_hal* const hal_;
  const StreamTable* const streams_;
  CachingAllocator* const device_memory_;
  c10::Allocator* const ordinary_;
};

class HostPlatform final : public HalPlatform {
 public:
  explicit HostPlatform(const flagos_hal* hal)
      : HalPlatform(hal, c10::kCPU), hook_(hal, &streams_, &allocator_, c10::GetCPUAllocator()) {
    c10::SetCPUAllocator(&hook_, /*priority=*/1);
  }

  c10::Allocator* native_allocator() override { return &hook_; }
  bool native_needs_entry() const override { return true; }
  void enter_native(c10::DeviceIndex index) override {
    hal_check(hal_, "waiting for the stream before an operator", index,
              hal_->stream_sync(index, streams_.current_handle(index)));
  }

  // Each device has its own CPU generator: equal seeds give the CPU's numbers. Like the CPU's own it starts
  // unpredictably.
  at::Generator make_generator(c10::DeviceIndex /*index*/, bool fresh) const override {
    return fresh ? at::detail::createCPUGenerator()
                 : at::detail::createCPUGenerator(c10::detail::getNonDeterministicRandom());
  }

 private:
  CpuHook hook_;
};

}  // namespace

Platform* make_host_platform(const flagos_hal* hal) { return new HostPlatform(hal); }

}  // namespace flagos
