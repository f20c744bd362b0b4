// hal_streams.cc: lazily made stream pools of a HAL chip.
#include "csrc/runtime/hal_streams.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "csrc/runtime/hal_error.h"
#include "csrc/runtime/platform.h"

namespace flagos {

__thread c10::DeviceIndex current_device_index = 0;
__thread StreamSlot current_stream_slot[kMaxDevices] = {};

StreamTable::StreamTable(const flagos_hal* hal, int device_count) : hal_(hal) {
  for (int i = 0; i < device_count; i++) {
    devices_.push_back(std::make_unique<PerDevice>());
    devices_.back()->exists[0] = true;
  }
  int32_t least = 0, greatest = 0;
  if (hal->stream_priority_range != nullptr && device_count > 0) {
    const flagos_status status = hal->stream_priority_range(0, &least, &greatest);
    if (status != FLAGOS_UNSUPPORTED) hal_check(hal, "querying stream priorities", 0, status);
  }
  least_ = least;
  greatest_ = std::max<int>(greatest, least - kMaxPriorities + 1);
}

StreamSlot StreamTable::slot_of(c10::Stream stream) const {
  TORCH_CHECK(stream.device_type() == kFlagos, "Expected a 'flagos' stream but found one of '", stream.device(), "'");
  const auto device = checked_index(stream.device_index());
  const auto id = stream.id();
  TORCH_CHECK(id >= 0 && id < kStreamSlots && devices_[device]->exists[id].load(std::memory_order_acquire),
              "stream id ", id, " is not a stream of flagos:", static_cast<int>(device),
              "; make streams with torch.Stream(device='flagos')");
  return static_cast<StreamSlot>(id);
}

StreamSlot StreamTable::take(c10::DeviceIndex device, int priority) {
  const int level = least_ - std::clamp(priority, greatest_, least_);
  PerDevice& d = *devices_[device];
  const uint32_t turn = d.next[level].fetch_add(1, std::memory_order_relaxed) % kStreamsPerPriority;
  const auto slot = static_cast<StreamSlot>(1 + level * kStreamsPerPriority + turn);
  if (!d.exists[slot].load(std::memory_order_acquire)) {
    std::lock_guard<std::mutex> lock(d.mutex);
    if (!d.exists[slot].load(std::memory_order_relaxed)) {
      flagos_stream handle = nullptr;
      hal_check(hal_, "creating a stream", device, hal_->stream_create(device, least_ - level, &handle));
      d.handles[slot].store(handle, std::memory_order_relaxed);
      d.exists[slot].store(true, std::memory_order_release);
      d.created.fetch_add(1, std::memory_order_relaxed);
    }
  }
  return slot;
}

void* StreamTable::native_handle(c10::DeviceIndex device, StreamSlot slot) const {
  void* native = nullptr;
  TORCH_CHECK(hal_->stream_native_handle != nullptr, "flagos: the ", hal_->name, " chip has no native stream handles");
  hal_check(hal_, "reading a stream's native handle", device,
            hal_->stream_native_handle(device, handle(device, slot), &native));
  return native;
}

StreamSlot StreamTable::find_native(c10::DeviceIndex device, void* native) const {
  for (int slot = 0; slot < kStreamSlots; slot++) {
    if (devices_[device]->exists[slot].load(std::memory_order_acquire) &&
        native_handle(device, static_cast<StreamSlot>(slot)) == native)
      return static_cast<StreamSlot>(slot);
  }
  TORCH_CHECK(false, "flagos: ", native, " is not a stream of flagos:", static_cast<int>(device), "; the ", hal_->name,
              " chip can only use streams that torch_fl made");
}

}  // namespace flagos
