// stream.cc: copies, streams and events of a cudart-shaped runtime (cudart.h). Handles given to callers are our own, so
// that a stale or foreign one is an error: the runtimes themselves crash on some of them.
#include "cudart.h"
#include "status.h"

namespace flagos {
namespace {

constexpr unsigned kNonBlocking = 1;    // stream flag: does not wait for the legacy default stream
constexpr unsigned kDisableTiming = 2;  // event flag

// The runtimes number host-to-host 0 and the others as flagos_copy_kind does.
int native_kind(int32_t kind) { return kind == FLAGOS_COPY_HOST_TO_HOST ? 0 : kind; }

bool valid_kind(int32_t kind) { return kind >= FLAGOS_COPY_HOST_TO_DEVICE && kind <= FLAGOS_COPY_HOST_TO_HOST; }

}  // namespace

flagos_status Cudart::native_stream(const char* entry, int32_t device, flagos_stream handle, void** native) {
  *native = nullptr;  // the runtime's default stream
  if (!handle) return FLAGOS_OK;
  auto* slot = streams_.find(handle);
  if (!slot) {
    return fail(FLAGOS_NOT_FOUND, "%s: %p is not a live stream (destroyed, or never created?)", entry,
                static_cast<void*>(handle));
  }
  if (slot->value.device != device) {
    return fail(FLAGOS_INVALID_ARGUMENT, "%s: the stream belongs to device %d, the call names %d", entry,
                slot->value.device, device);
  }
  *native = slot->value.native;
  return FLAGOS_OK;
}

flagos_status Cudart::find_event(const char* entry, int32_t device, flagos_event handle, Handle** event) {
  if (!handle) return fail(FLAGOS_INVALID_ARGUMENT, "%s: event is NULL", entry);
  auto* slot = events_.find(handle);
  if (!slot) {
    return fail(FLAGOS_NOT_FOUND, "%s: %p is not a live event (destroyed, or never created?)", entry,
                static_cast<void*>(handle));
  }
  if (device != kAnyDevice && slot->value.device != device) {
    return fail(FLAGOS_INVALID_ARGUMENT, "%s: the event belongs to device %d, the call names %d", entry,
                slot->value.device, device);
  }
  *event = &slot->value;
  return FLAGOS_OK;
}

// What most entries below begin with: `native` is the vendor's stream, and the device is current until the entry
// returns.
#define ON_STREAM(entry, device, handle)                                              \
  if (flagos_status bad = ready(#entry, device)) return bad;                          \
  void* native = nullptr;                                                             \
  if (flagos_status bad = native_stream(#entry, device, handle, &native)) return bad; \
  Current current(*this, device);                                                     \
  if (flagos_status bad = check(current.error, #entry, "SetDevice")) return bad

#define ON_EVENT(entry, device, handle)                                          \
  if (flagos_status bad = ready(#entry, device)) return bad;                     \
  Handle* mark = nullptr;                                                        \
  if (flagos_status bad = find_event(#entry, device, handle, &mark)) return bad; \
  Current current(*this, device);                                                \
  if (flagos_status bad = check(current.error, #entry, "SetDevice")) return bad

// ---- copy and fill --------------------------------------------------------------------------------------------------

flagos_status Cudart::copy_async(int32_t device, void* dst, const void* src, uint64_t n, int32_t kind,
                                 flagos_stream stream) {
  ON_STREAM(copy_async, device, stream);
  if (!valid_kind(kind)) return fail(FLAGOS_INVALID_ARGUMENT, "copy_async: %d is not a flagos_copy_kind", kind);
  if (n == 0) return FLAGOS_OK;
  if (!dst || !src) return fail(FLAGOS_INVALID_ARGUMENT, "copy_async: dst or src is NULL");
  if (kind == FLAGOS_COPY_DEVICE_TO_DEVICE && devices_ > 1 && fn_.MemcpyPeerAsync) {
    uint64_t base;
    Block to, from;
    if (locate(dst, &base, &to) && locate(src, &base, &from) && to.device != from.device) {
      return check(fn_.MemcpyPeerAsync(dst, to.device, src, from.device, n, native), "copy_async", "MemcpyPeerAsync");
    }
  }
  return check(fn_.MemcpyAsync(dst, src, n, native_kind(kind), native), "copy_async", "MemcpyAsync");
}

flagos_status Cudart::copy2d_async(int32_t device, void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch,
                                   uint64_t width, uint64_t height, int32_t kind, flagos_stream stream) {
  ON_STREAM(copy2d_async, device, stream);
  if (!valid_kind(kind)) return fail(FLAGOS_INVALID_ARGUMENT, "copy2d_async: %d is not a flagos_copy_kind", kind);
  if (width == 0 || height == 0) return FLAGOS_OK;
  if (!dst || !src) return fail(FLAGOS_INVALID_ARGUMENT, "copy2d_async: dst or src is NULL");
  if (height > 1 && (dst_pitch < width || src_pitch < width)) {
    return fail(FLAGOS_INVALID_ARGUMENT, "copy2d_async: a pitch is smaller than width %llu",
                static_cast<unsigned long long>(width));
  }
  if (fn_.Memcpy2DAsync) {
    int error = fn_.Memcpy2DAsync(dst, dst_pitch, src, src_pitch, width, height, native_kind(kind), native);
    return check(error, "copy2d_async", "Memcpy2DAsync");
  }
  for (uint64_t row = 0; row < height; ++row) {
    int error = fn_.MemcpyAsync(static_cast<char*>(dst) + row * dst_pitch,
                                static_cast<const char*>(src) + row * src_pitch, width, native_kind(kind), native);
    if (flagos_status bad = check(error, "copy2d_async", "MemcpyAsync")) return bad;
  }
  return FLAGOS_OK;
}

flagos_status Cudart::fill_async(int32_t device, void* dst, int32_t byte_value, uint64_t n, flagos_stream stream) {
  ON_STREAM(fill_async, device, stream);
  if (n == 0) return FLAGOS_OK;
  if (!dst) return fail(FLAGOS_INVALID_ARGUMENT, "fill_async: dst is NULL");
  return check(fn_.MemsetAsync(dst, byte_value & 0xff, n, native), "fill_async", "MemsetAsync");
}

// ---- streams --------------------------------------------------------------------------------------------------------

flagos_status Cudart::stream_create(int32_t device, int32_t priority, flagos_stream* stream) {
  if (flagos_status bad = ready("stream_create", device)) return bad;
  if (!stream) return fail(FLAGOS_INVALID_ARGUMENT, "stream_create: stream is NULL");
  Current current(*this, device);
  if (flagos_status bad = check(current.error, "stream_create", "SetDevice")) return bad;
  void* native = nullptr;
  int error = fn_.StreamCreateWithPriority(&native, kNonBlocking, priority);  // the runtime clamps the priority
  if (flagos_status bad = check(error, "stream_create", "StreamCreateWithPriority")) return bad;
  auto* slot = streams_.reserve();
  if (!slot) {
    fn_.StreamDestroy(native);
    return fail(FLAGOS_OUT_OF_MEMORY, "stream_create: no stream handle is left");
  }
  slot->value.native = native;
  slot->value.device = device;
  *stream = static_cast<flagos_stream>(streams_.publish(slot));
  return FLAGOS_OK;
}

flagos_status Cudart::stream_destroy(int32_t device, flagos_stream stream) {
  ON_STREAM(stream_destroy, device, stream);
  if (!stream) return fail(FLAGOS_INVALID_ARGUMENT, "stream_destroy: the default stream cannot be destroyed");
  auto* slot = streams_.find(stream);
  if (!slot || !streams_.retire(slot, stream)) {
    return fail(FLAGOS_NOT_FOUND, "stream_destroy: the stream was destroyed by another thread");
  }
  streams_.recycle(slot);
  return check(fn_.StreamDestroy(native), "stream_destroy", "StreamDestroy");
}

flagos_status Cudart::stream_sync(int32_t device, flagos_stream stream) {
  ON_STREAM(stream_sync, device, stream);
  return check(fn_.StreamSynchronize(native), "stream_sync", "StreamSynchronize");
}

flagos_status Cudart::stream_query(int32_t device, flagos_stream stream) {
  ON_STREAM(stream_query, device, stream);
  return check(fn_.StreamQuery(native), "stream_query", "StreamQuery");
}

flagos_status Cudart::stream_native_handle(int32_t device, flagos_stream stream, void** handle) {
  if (flagos_status bad = ready("stream_native_handle", device)) return bad;
  if (!handle) return fail(FLAGOS_INVALID_ARGUMENT, "stream_native_handle: handle is NULL");
  void* native = nullptr;
  if (flagos_status bad = native_stream("stream_native_handle", device, stream, &native)) return bad;
  *handle = native;
  return FLAGOS_OK;
}

flagos_status Cudart::stream_priority_range(int32_t device, int32_t* least, int32_t* greatest) {
  if (flagos_status bad = ready("stream_priority_range", device)) return bad;
  if (!least || !greatest) return fail(FLAGOS_INVALID_ARGUMENT, "stream_priority_range: an output is NULL");
  int low = 0, high = 0;
  if (fn_.DeviceGetStreamPriorityRange) {
    Current current(*this, device);
    if (flagos_status bad = check(current.error, "stream_priority_range", "SetDevice")) return bad;
    int error = fn_.DeviceGetStreamPriorityRange(&low, &high);
    if (flagos_status bad = check(error, "stream_priority_range", "DeviceGetStreamPriorityRange")) return bad;
  }
  *least = low;
  *greatest = high;
  return FLAGOS_OK;
}

flagos_status Cudart::stream_host_func(int32_t device, flagos_stream stream, void (*fn)(void*), void* arg) {
  ON_STREAM(stream_host_func, device, stream);
  if (!fn) return fail(FLAGOS_INVALID_ARGUMENT, "stream_host_func: fn is NULL");
  if (fn_.LaunchHostFunc) return check(fn_.LaunchHostFunc(native, fn, arg), "stream_host_func", "LaunchHostFunc");
  if (flagos_status bad = check(fn_.StreamSynchronize(native), "stream_host_func", "StreamSynchronize")) return bad;
  fn(arg);  // the default that flagos.h states for chips without the function
  return FLAGOS_OK;
}

// ---- events ---------------------------------------------------------------------------------------------------------

flagos_status Cudart::event_create(int32_t device, uint32_t flags, flagos_event* event) {
  if (flagos_status bad = ready("event_create", device)) return bad;
  if (!event) return fail(FLAGOS_INVALID_ARGUMENT, "event_create: event is NULL");
  if (flags & ~static_cast<uint32_t>(FLAGOS_EVENT_TIMING)) {
    return fail(FLAGOS_INVALID_ARGUMENT, "event_create: unknown flags 0x%x", flags);
  }
  Current current(*this, device);
  if (flagos_status bad = check(current.error, "event_create", "SetDevice")) return bad;
  bool timing = (flags & FLAGOS_EVENT_TIMING) != 0;
  void* native = nullptr;
  int error = fn_.EventCreateWithFlags(&native, timing ? 0 : kDisableTiming);
  if (flagos_status bad = check(error, "event_create", "EventCreateWithFlags")) return bad;
  auto* slot = events_.reserve();
  if (!slot) {
    fn_.EventDestroy(native);
    return fail(FLAGOS_OUT_OF_MEMORY, "event_create: no event handle is left");
  }
  slot->value.native = native;
  slot->value.device = device;
  slot->value.timing = timing;
  slot->value.recorded.store(false);
  *event = static_cast<flagos_event>(events_.publish(slot));
  return FLAGOS_OK;
}

flagos_status Cudart::event_destroy(int32_t device, flagos_event event) {
  ON_EVENT(event_destroy, device, event);
  void* native = mark->native;
  auto* slot = events_.find(event);
  if (!slot || !events_.retire(slot, event)) {
    return fail(FLAGOS_NOT_FOUND, "event_destroy: the event was destroyed by another thread");
  }
  events_.recycle(slot);
  return check(fn_.EventDestroy(native), "event_destroy", "EventDestroy");
}

flagos_status Cudart::event_record(int32_t device, flagos_event event, flagos_stream stream) {
  Handle* mark = nullptr;
  if (flagos_status bad = ready("event_record", device)) return bad;
  if (flagos_status bad = find_event("event_record", device, event, &mark)) return bad;
  ON_STREAM(event_record, device, stream);
  flagos_status status = check(fn_.EventRecord(mark->native, native), "event_record", "EventRecord");
  if (status == FLAGOS_OK) mark->recorded.store(true);
  return status;
}

flagos_status Cudart::event_sync(int32_t device, flagos_event event) {
  ON_EVENT(event_sync, device, event);
  return check(fn_.EventSynchronize(mark->native), "event_sync", "EventSynchronize");
}

flagos_status Cudart::event_query(int32_t device, flagos_event event) {
  ON_EVENT(event_query, device, event);
  return check(fn_.EventQuery(mark->native), "event_query", "EventQuery");
}

flagos_status Cudart::event_elapsed_ms(int32_t device, flagos_event start, flagos_event end, float* ms) {
  if (flagos_status bad = ready("event_elapsed_ms", device)) return bad;
  if (!ms) return fail(FLAGOS_INVALID_ARGUMENT, "event_elapsed_ms: ms is NULL");
  Handle *first = nullptr, *second = nullptr;
  if (flagos_status bad = find_event("event_elapsed_ms", device, start, &first)) return bad;
  if (flagos_status bad = find_event("event_elapsed_ms", device, end, &second)) return bad;
  if (!first->timing || !second->timing || !first->recorded.load() || !second->recorded.load()) {
    return fail(FLAGOS_FAILED_PRECONDITION,
                "event_elapsed_ms: both events must be created with FLAGOS_EVENT_TIMING and recorded");
  }
  Current current(*this, device);
  if (flagos_status bad = check(current.error, "event_elapsed_ms", "SetDevice")) return bad;
  float value = 0;
  int error = fn_.EventElapsedTime(&value, first->native, second->native);
  if (flagos_status bad = check(error, "event_elapsed_ms", "EventElapsedTime")) return bad;
  *ms = value;
  return FLAGOS_OK;
}

flagos_status Cudart::stream_wait_event(int32_t device, flagos_stream stream, flagos_event event) {
  ON_STREAM(stream_wait_event, device, stream);
  Handle* mark = nullptr;
  if (flagos_status bad = find_event("stream_wait_event", kAnyDevice, event, &mark)) return bad;
  return check(fn_.StreamWaitEvent(native, mark->native, 0), "stream_wait_event", "StreamWaitEvent");
}

flagos_status Cudart::device_sync(int32_t device) {
  if (flagos_status bad = ready("device_sync", device)) return bad;
  Current current(*this, device);
  if (flagos_status bad = check(current.error, "device_sync", "SetDevice")) return bad;
  return check(fn_.DeviceSynchronize(), "device_sync", "DeviceSynchronize");
}

}  // namespace flagos
