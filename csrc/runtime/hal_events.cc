// hal_events.cc: events of a HAL chip. An event is made at its first record, on that stream's device.
#include <c10/util/Exception.h>

#include <memory>

#include "csrc/runtime/fork.h"
#include "csrc/runtime/hal_error.h"
#include "csrc/runtime/hal_platform.h"

namespace flagos {
namespace {

struct HalEvent {
  flagos_event event;
  c10::DeviceIndex device;
  bool timing;
};

HalEvent* event_of(void* event) { return static_cast<HalEvent*>(event); }

}  // namespace

void HalPlatform::record(void** event, c10::Stream s, c10::EventFlag flag) const {
  check_fork();
  const auto index = s.device_index();
  const flagos_stream stream_handle = handle(s);
  if (*event == nullptr) {
    auto made = std::make_unique<HalEvent>(HalEvent{nullptr, index, flag == c10::EventFlag::BACKEND_DEFAULT});
    hal_check(hal_, "creating an event", index,
              hal_->event_create(index, made->timing ? FLAGOS_EVENT_TIMING : FLAGOS_EVENT_DEFAULT, &made->event));
    const flagos_status status = hal_->event_record(index, made->event, stream_handle);
    if (status != FLAGOS_OK) {
      const std::string text = hal_error_text(hal_, "recording an event", index, status);
      hal_->event_destroy(index, made->event);
      TORCH_CHECK(false, text);
    }
    *event = made.release();
    return;
  }
  HalEvent* e = event_of(*event);
  TORCH_CHECK(e->device == index, "flagos: an event of flagos:", static_cast<int>(e->device),
              " cannot be recorded on a stream of flagos:", static_cast<int>(index), "; make one event per device");
  hal_check(hal_, "recording an event", index, hal_->event_record(index, e->event, stream_handle));
}

void HalPlatform::block(void* event, c10::Stream s) const {
  if (event == nullptr) return;  // never recorded: nothing to wait for
  hal_check(hal_, "waiting for an event on a stream", s.device_index(),
            hal_->stream_wait_event(s.device_index(), handle(s), event_of(event)->event));
}

bool HalPlatform::query_event(void* event) const {
  if (event == nullptr) return true;
  const HalEvent* e = event_of(event);
  const flagos_status status = hal_->event_query(e->device, e->event);
  if (status == FLAGOS_NOT_READY) return false;
  hal_check(hal_, "querying an event", e->device, status);
  return true;
}

void HalPlatform::synchronize_event(void* event) const {
  if (event == nullptr) return;
  const HalEvent* e = event_of(event);
  hal_check(hal_, "synchronizing an event", e->device, hal_->event_sync(e->device, e->event));
}

double HalPlatform::elapsed_ms(void* start, void* end, c10::DeviceIndex /*index*/) const {
  TORCH_CHECK(start != nullptr && end != nullptr, "Both events must be recorded before calculating elapsed time.");
  const HalEvent *a = event_of(start), *b = event_of(end);
  TORCH_CHECK(a->timing && b->timing, "Both events must be created with argument 'enable_timing=True'.");
  TORCH_CHECK(a->device == b->device, "flagos: elapsed time between events of flagos:", static_cast<int>(a->device),
              " and flagos:", static_cast<int>(b->device), "; both must be of one device");
  float ms = 0;
  hal_check(hal_, "measuring the time between events", a->device,
            hal_->event_elapsed_ms(a->device, a->event, b->event, &ms));
  return ms;
}

void HalPlatform::destroy_event(void* event, c10::DeviceIndex /*index*/) const noexcept {
  if (event == nullptr) return;
  const std::unique_ptr<HalEvent> e(event_of(event));
  if (!in_bad_fork()) hal_->event_destroy(e->device, e->event);
}

}  // namespace flagos
