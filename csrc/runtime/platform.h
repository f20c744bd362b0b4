// platform.h: the one seam between PyTorch's registrations and a chip's run time.
//
// Exactly one Platform exists per process (set_platform, called once from torch_fl's import). The c10 registrations
// (guard, allocator, host allocator, hooks, generator) are thin and forward to it; the operators ask it for memory and
// for the label under which torch's own kernels accept that memory.
#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Generator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flagos.h"

namespace flagos {

constexpr auto kFlagos = c10::DeviceType::PrivateUse1;
// The constructor of c10::Device checks its index, which costs as much as looking a tensor's memory up.
inline c10::Device device_at(c10::Device device, c10::DeviceIndex index) {
  device.set_index(index);
  return device;
}
inline c10::Device flagos_device(c10::DeviceIndex index) { return device_at(c10::Device(kFlagos), index); }

// One segment of device memory and its blocks in address order, for memory snapshots. c10's own types for this move
// between releases.
using MemoryContext = std::shared_ptr<c10::GatheredContext>;  // where memory was asked for, when history is recorded
struct MemoryBlock {
  size_t size, requested_size;
  enum State { kAllocated, kAwaitingFree, kInactive } state;
  MemoryContext context = nullptr;
};
struct MemorySegment {
  uintptr_t address;
  size_t size;
  c10::Stream stream;
  bool is_large;
  std::vector<MemoryBlock> blocks;
  c10::MempoolId_t pool = {0, 0};
  MemoryContext context = nullptr;
};

class Platform {
 public:
  virtual ~Platform() = default;

  // The chip's name as in FLAGOS_ACCELERATOR, and the device type whose kernels in torch work on this chip's memory
  // (CUDA; CPU for the simulated host), or nullopt when torch has none.
  virtual const char* chip() const = 0;
  virtual std::optional<c10::DeviceType> native_type() const = 0;

  // ---- devices. Indices are checked by the caller; errors are c10::Error.
  virtual c10::DeviceIndex device_count() const noexcept = 0;  // creates no context, never throws
  virtual c10::DeviceIndex current_device() const = 0;
  virtual void set_device(c10::DeviceIndex index) = 0;
  // What guards do around every node of a backward pass: changes to a device and returns the one before, and goes back
  // to that one, which a chip may put off until the device is used.
  virtual c10::DeviceIndex exchange_device(c10::DeviceIndex index) {
    const auto previous = current_device();
    if (index != previous) set_device(index);
    return previous;
  }
  virtual void return_to_device(c10::DeviceIndex index) { set_device(index); }
  virtual bool has_primary_context(c10::DeviceIndex index) const = 0;
  virtual void device_info(c10::DeviceIndex index, flagos_device_info* info) const = 0;
  virtual std::pair<size_t, size_t> mem_info(c10::DeviceIndex index) const = 0;  // free, total bytes
  virtual void synchronize_device(c10::DeviceIndex index) const = 0;
  virtual bool can_access_peer(c10::DeviceIndex index, c10::DeviceIndex peer) const = 0;

  // ---- streams and events. Every c10::Stream here is labelled flagos.
  virtual c10::Stream current_stream(c10::DeviceIndex index) const = 0;
  virtual c10::Stream default_stream(c10::DeviceIndex index) const = 0;
  virtual c10::Stream exchange_stream(c10::Stream stream) = 0;  // returns the previous current stream of its device
  virtual c10::Stream new_stream(c10::DeviceIndex index, int priority) = 0;  // lower is more urgent
  virtual c10::Stream external_stream(c10::DeviceIndex index, void* native_handle) = 0;
  virtual bool query_stream(c10::Stream stream) const = 0;
  virtual void synchronize_stream(c10::Stream stream) const = 0;
  virtual void* native_handle(c10::Stream stream) const = 0;
  virtual std::pair<int, int> stream_priority_range() const = 0;  // least, greatest

  virtual void record(void** event, c10::Stream stream, c10::EventFlag flag) const = 0;  // creates *event when null
  virtual void block(void* event, c10::Stream stream) const = 0;
  virtual bool query_event(void* event) const = 0;
  virtual void synchronize_event(void* event) const = 0;
  virtual double elapsed_ms(void* start, void* end, c10::DeviceIndex index) const = 0;
  virtual void destroy_event(void* event, c10::DeviceIndex index) const noexcept = 0;

  // ---- memory
  // Memory of the current device in the order of its current stream. The DataPtr is labelled native_type() (with the
  // address that native kernels use), or flagos when there is none.
  virtual c10::DataPtr allocate(size_t nbytes) = 0;
  // The allocator that native kernels find in a storage when they resize it.
  virtual c10::Allocator* native_allocator() = 0;
  // The address that a flagos tensor shows for memory that native kernels see as `native`: the same one, unless the
  // chip hides device memory from the host. `native` need not come from allocate(): then it is returned unchanged.
  virtual void* device_address(const c10::DataPtr& native) const { return native.get(); }
  // The other way: the address that native kernels use for an address that a flagos tensor shows. Memory that the chip
  // does not know comes back unchanged.
  virtual void* native_address(void* device_address) const { return device_address; }
  virtual void record_stream(const c10::DataPtr& native, c10::Stream stream) = 0;
  virtual c10::DeviceAllocator& allocator() = 0;  // cache, statistics; never used to allocate
  virtual at::HostAllocator& host_allocator() = 0;
  virtual bool is_pinned(const void* ptr) const = 0;
  // The device that owns memory at `ptr` (an address that a flagos tensor shows); an error when none does.
  virtual c10::Device device_of(const void* ptr) const = 0;
  // Memory without a tensor, for other libraries: the address that a flagos tensor would show.
  virtual void* raw_allocate(size_t nbytes, c10::Stream stream) = 0;
  virtual void raw_free(void* ptr) = 0;
  // The share of the device's memory that this process may reserve; more is an out-of-memory error.
  virtual void set_memory_fraction(c10::DeviceIndex index, double fraction) = 0;
  virtual double memory_fraction(c10::DeviceIndex index) const = 0;
  virtual std::vector<MemorySegment> memory_snapshot() = 0;
  // Bytes between host and device, or between devices, in the order of `stream`. Returns before they have moved when
  // the host side is pinned; otherwise the chip decides. Used where no native kernel can do it.
  virtual void copy_bytes(void* dst, c10::Device dst_device, const void* src, c10::Device src_device, size_t nbytes,
                          c10::Stream stream) = 0;

  // ---- native calls
  // Called before a native kernel runs on device `index`, when native_needs_entry(): the host chip waits here until
  // the current stream has drained, because its "kernels" run on the calling thread.
  virtual bool native_needs_entry() const { return false; }
  // Prepares the chip for torch's own kernels; comes before the first of them, from any thread, perhaps several times.
  virtual void start() {}
  virtual void enter_native(c10::DeviceIndex /*index*/) {}

  // ---- random numbers
  // The native generator behind the default generator of a device, always the same one; `fresh` makes one with its
  // own state.
  virtual at::Generator native_generator(c10::DeviceIndex index, bool fresh) = 0;
};

// The process's platform. set_platform may be called once; platform() throws one clear line before that.
void set_platform(Platform* platform);
extern std::atomic<Platform*> the_platform;
[[noreturn]] void throw_no_platform();
inline bool has_platform() noexcept { return the_platform.load(std::memory_order_acquire) != nullptr; }
inline Platform& platform() {
  Platform* p = the_platform.load(std::memory_order_acquire);
  if (C10_UNLIKELY(p == nullptr)) throw_no_platform();
  return *p;
}

// Makes the platform of a HAL chip (every chip except CUDA). Owned by the process.
Platform* make_hal_platform(const flagos_hal* hal);

// What libtorch_fl_cuda.so exports as extern "C" flagos_make_cuda_platform.
using MakePlatformFn = Platform* (*)();

// Checks a device index and returns it as is; -1 means the current device. The error names the count.
c10::DeviceIndex check_index(int64_t index);
extern c10::DeviceIndex platform_devices;  // 0 before set_platform
inline c10::DeviceIndex checked_index(int64_t index) {
  if (C10_LIKELY(index >= 0 && index < platform_devices)) return static_cast<c10::DeviceIndex>(index);
  return check_index(index);
}

// The device on which the calling thread runs a native kernel, -1 outside one. Native allocators that must put a
// kernel's results into device memory (the host chip) read it. A plain __thread with a fixed offset: ordinary CPU
// allocations read it too and must not notice.
extern __thread c10::DeviceIndex native_call_device __attribute__((tls_model("initial-exec")));

}  // namespace flagos
