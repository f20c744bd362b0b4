// native.h: the label under which torch's own kernels accept this chip's memory, fixed when the platform is chosen.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>

#include <atomic>

#include "csrc/runtime/platform.h"

namespace flagos {

// Torch's kernels see a chip's memory as `type` tensors: CUDA on NVIDIA, CPU on the simulated host. Read-only after
// set_native(), but for `started`.
struct alignas(64) Native {                  // a line of the processor's cache, which every call reads
  bool present = false;                      // false: torch has no kernels for this chip (MetaX, Ascend)
  bool entry = false;                        // Platform::enter_native must run before a kernel
  mutable std::atomic<bool> started{false};  // Platform::start has run
  c10::DeviceType type = c10::DeviceType::CPU;
  c10::Device any_device{c10::DeviceType::CPU};  // of that type, without an index
  c10::BackendComponent backend = c10::BackendComponent::CPUBit;
  c10::DispatchKeySet dense;  // what Op::redispatch gets
  uint64_t flagos_bits = 0;   // the bits of a key set that say flagos ...
  uint64_t native_bits = 0;   // ... and those that say native instead
  // What a kernel below autograd must not dispatch to again.
  c10::DispatchKeySet above = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;

  c10::DispatchKey key(c10::DispatchKey functionality) const {
    return c10::toRuntimePerBackendFunctionalityKey(functionality, backend);
  }
  // A flagos tensor's key set under the native label.
  c10::DispatchKeySet relabel(c10::DispatchKeySet keys) const {
    return c10::DispatchKeySet(c10::DispatchKeySet::RAW, (keys.raw_repr() & ~flagos_bits) | native_bits);
  }
  // The other way.
  c10::DispatchKeySet relabel_back(c10::DispatchKeySet keys) const {
    return c10::DispatchKeySet(c10::DispatchKeySet::RAW, (keys.raw_repr() & ~native_bits) | flagos_bits);
  }
  c10::Device device(c10::DeviceIndex index) const {
    return device_at(any_device, type == c10::DeviceType::CPU ? c10::DeviceIndex{-1} : index);
  }
};

extern Native native;

// Derives `native` from the platform. Called once, before any operator is registered.
void set_native(const Platform& platform);

}  // namespace flagos
