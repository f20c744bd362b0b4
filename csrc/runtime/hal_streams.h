// hal_streams.h: the streams of a HAL chip: c10::StreamId <-> flagos_stream, pools, and each thread's current streams.
//
// Id 0 is the default stream. The others come from pools of 32 per priority and device, handed out in turn and kept
// until the process ends, so that a stream id never dangles. A small number as id lets other tables be indexed by it.
#pragma once

#include <c10/core/Stream.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "flagos.h"

namespace flagos {

constexpr int kMaxDevices = 64;
constexpr int kStreamsPerPriority = 32;
constexpr int kMaxPriorities = 4;
constexpr int kStreamSlots = 1 + kStreamsPerPriority * kMaxPriorities;
using StreamSlot = uint8_t;  // a StreamId that has been checked

// The current device and, per device, the current stream of this thread.
extern __thread c10::DeviceIndex current_device_index __attribute__((tls_model("initial-exec")));
extern __thread StreamSlot current_stream_slot[kMaxDevices] __attribute__((tls_model("initial-exec")));

class StreamTable {
 public:
  StreamTable(const flagos_hal* hal, int device_count);

  flagos_stream handle(c10::DeviceIndex device, StreamSlot slot) const noexcept {
    return devices_[device]->handles[slot].load(std::memory_order_relaxed);
  }
  flagos_stream current_handle(c10::DeviceIndex device) const noexcept {
    return handle(device, current_stream_slot[device]);
  }
  // The slot of a stream that somebody handed to us; an error when this table never made it.
  StreamSlot slot_of(c10::Stream stream) const;
  StreamSlot take(c10::DeviceIndex device, int priority);
  // The slot whose native handle this is; an error when it is no stream of ours.
  StreamSlot find_native(c10::DeviceIndex device, void* native_handle) const;
  void* native_handle(c10::DeviceIndex device, StreamSlot slot) const;
  std::pair<int, int> priority_range() const noexcept { return {least_, greatest_}; }
  bool used(c10::DeviceIndex device) const noexcept {
    return devices_[device]->created.load(std::memory_order_relaxed) > 0;
  }

 private:
  struct PerDevice {
    std::array<std::atomic<flagos_stream>, kStreamSlots> handles{};
    std::array<std::atomic<bool>, kStreamSlots> exists{};
    std::array<std::atomic<uint32_t>, kMaxPriorities> next{};
    std::atomic<int> created{0};
    std::mutex mutex;  // creation only
  };

  const flagos_hal* hal_;
  std::vector<std::unique_ptr<PerDevice>> devices_;
  int least_ = 0, greatest_ = 0;
};

}  // namespace flagos
