// hooks.cc: the PrivateUse1 hooks: what PyTorch's core asks an accelerator outside the guard.
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/util/Exception.h>

#include <mutex>

#include "csrc/aten/twin.h"
#include "csrc/runtime/fork.h"
#include "csrc/runtime/generator.h"
#include "csrc/runtime/host_allocator.h"
#include "csrc/runtime/platform.h"
#include "csrc/runtime/registrations.h"

namespace flagos {
namespace {

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return deviceCount() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override {
    return has_platform() && platform().has_primary_context(index);
  }
  void init() const override { check_fork(); }

  c10::DeviceIndex deviceCount() const override { return has_platform() ? platform().device_count() : 0; }
  c10::DeviceIndex getCurrentDevice() const override { return platform().current_device(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { exchangeDevice(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    Platform& p = platform();
    const auto previous = p.current_device();
    if (index != previous) p.set_device(checked_index(index));
    return previous;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? platform().current_device() : exchangeDevice(index);
  }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    const auto i = checked_index(index);
    return at::make_generator<FlagosGenerator>(platform().native_generator(i, true), i);
  }

  bool isPinnedPtr(const void* data) const override { return has_platform() && platform().is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return registered_host_allocator(); }
  at::Device getDeviceFromPtr(void* data) const override { return platform().device_of(data); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    resize_flagos_storage(storage.unsafeGetStorageImpl(), nbytes);
  }
};

}  // namespace

void register_hooks() {
  static std::once_flag once;
  std::call_once(once, [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
}

}  // namespace flagos
