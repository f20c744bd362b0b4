// guard.cc: the device guard: devices, streams and events as PyTorch's generic code sees them.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "csrc/aten/twin.h"
#include "csrc/runtime/platform.h"

namespace flagos {
namespace {

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kFlagos; }

  // ---- devices
  c10::DeviceIndex deviceCount() const noexcept override { return has_platform() ? platform().device_count() : 0; }
  c10::Device getDevice() const override { return flagos_device(platform().current_device()); }
  void setDevice(c10::Device device) const override { exchangeDevice(device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    TORCH_CHECK(device.type() == kFlagos, "Expected a flagos device, but got ", device);
    return flagos_device(platform().exchange_device(checked_index(device.index())));
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() < 0 || device.index() >= deviceCount()) return;
    try {
      platform().return_to_device(device.index());
    } catch (const c10::Error& e) {
      TORCH_WARN("flagos: could not go back to ", device, ": ", e.what_without_backtrace());
    }
  }
  c10::DeviceCapability getDeviceCapability(c10::Device /*device*/) const override { return {}; }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    platform().synchronize_device(checked_index(index));
  }

  // ---- streams
  c10::Stream getStream(c10::Device device) const override {
    return platform().current_stream(checked_index(device.index()));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return platform().default_stream(checked_index(device.index()));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool high_priority) const override {
    Platform& p = platform();
    const auto range = p.stream_priority_range();
    return p.new_stream(checked_index(device.index()), high_priority ? range.second : range.first);
  }
  c10::Stream getNewStream(c10::Device device, int priority) const override {
    return platform().new_stream(checked_index(device.index()), priority);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return platform().exchange_stream(stream); }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return platform().native_handle(stream); }
  bool queryStream(const c10::Stream& stream) const override { return platform().query_stream(stream); }
  void synchronizeStream(const c10::Stream& stream) const override { platform().synchronize_stream(stream); }

  // ---- events
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex index,
              const c10::EventFlag flag) const override {
    TORCH_CHECK(index == -1 || index == stream.device_index(), "Event device index ", static_cast<int>(index),
                " does not match recording stream's device index ", static_cast<int>(stream.device_index()), ".");
    platform().record(event, stream, flag);
  }
  void block(void* event, const c10::Stream& stream) const override { platform().block(event, stream); }
  bool queryEvent(void* event) const override { return platform().query_event(event); }
  void synchronizeEvent(void* event) const override { platform().synchronize_event(event); }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex index) const override {
    return platform().elapsed_ms(start, end, index);
  }
  void destroyEvent(void* event, const c10::DeviceIndex index) const noexcept override {
    if (event != nullptr && has_platform()) platform().destroy_event(event, index);
  }

  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    platform().record_stream(native_data_ptr(data), stream);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl)

}  // namespace
}  // namespace flagos
