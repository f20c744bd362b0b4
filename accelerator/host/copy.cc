// copy.cc: copies and fills of the simulated device: checks both sides against the copy kind, then queues the work.
#include "host/copy.h"

#include "host/fault.h"
#include "host/memory.h"
#include "host/stream.h"
#include "status.h"

namespace flagos {
namespace host {
namespace {

// The address that a worker uses for one side of a copy, NULL with a message when the side is not what `kind` says.
char* resolve(const char* entry, const char* side, const void* p, uint64_t n, bool on_device, int32_t device) {
  if (!p) {
    null_argument(entry, side);
    return nullptr;
  }
  int32_t owner = device_of(p);
  if (on_device ? owner < 0 : owner >= 0) {
    fail(FLAGOS_INVALID_ARGUMENT, "%s: the kind says that %s is %s memory, but %p is %s memory", entry, side,
         on_device ? "device" : "host", p, on_device ? "host" : "device");
    return nullptr;
  }
  if (!on_device) return static_cast<char*>(const_cast<void*>(p));
  if (device >= 0 && owner != device) {
    fail(FLAGOS_INVALID_ARGUMENT, "%s: %s is memory of flagos:%d, the call names flagos:%d", entry, side, owner,
         device);
    return nullptr;
  }
  if (!g_pools[owner]->find(p, n, nullptr, nullptr)) {
    fail(FLAGOS_INVALID_ARGUMENT, "%s: %s [%p, + %llu bytes) is not inside one live block of flagos:%d", entry, side, p,
         static_cast<unsigned long long>(n), owner);
    return nullptr;
  }
  return g_pools[owner]->alias(p);
}

flagos_status copy(const char* entry, int32_t device, Task task, void* dst, const void* src, int32_t kind,
                   flagos_stream handle) {
  if (kind < FLAGOS_COPY_HOST_TO_DEVICE || kind > FLAGOS_COPY_HOST_TO_HOST) {
    return fail(FLAGOS_INVALID_ARGUMENT, "%s: %d is not a flagos_copy_kind", entry, kind);
  }
  flagos_status status = FLAGOS_OK;
  StreamSlot* stream = find_stream(entry, device, handle, &status);
  if (!stream) return status;
  if (task.width == 0 || task.height == 0) return FLAGOS_OK;
  uint64_t rows = task.height - 1, dst_n, src_n;
  if (__builtin_mul_overflow(rows, task.dst_pitch, &dst_n) || __builtin_add_overflow(dst_n, task.width, &dst_n) ||
      __builtin_mul_overflow(rows, task.src_pitch, &src_n) || __builtin_add_overflow(src_n, task.width, &src_n) ||
      (rows > 0 && (task.dst_pitch < task.width || task.src_pitch < task.width))) {
    return fail(FLAGOS_INVALID_ARGUMENT, "%s: a pitch is smaller than width %llu, or the size overflows", entry,
                static_cast<unsigned long long>(task.width));
  }
  bool dst_device = kind == FLAGOS_COPY_HOST_TO_DEVICE || kind == FLAGOS_COPY_DEVICE_TO_DEVICE;
  bool src_device = kind == FLAGOS_COPY_DEVICE_TO_HOST || kind == FLAGOS_COPY_DEVICE_TO_DEVICE;
  int32_t owner = kind == FLAGOS_COPY_DEVICE_TO_DEVICE ? -1 : device;  // device to device may cross
  task.kind = Task::kCopy;
  task.dst = resolve(entry, "dst", dst, dst_n, dst_device, owner);
  if (!task.dst) return FLAGOS_INVALID_ARGUMENT;
  task.src = resolve(entry, "src", src, src_n, src_device, owner);
  if (!task.src) return FLAGOS_INVALID_ARGUMENT;
  return enqueue(stream, std::move(task));
}

}  // namespace

flagos_status copy_async(int32_t device, void* dst, const void* src, uint64_t n, int32_t kind, flagos_stream stream) {
  ENTER_DEVICE(copy_async, device);
  Task task;
  task.width = n;
  return copy("copy_async", device, std::move(task), dst, src, kind, stream);
}

flagos_status copy2d_async(int32_t device, void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch,
                           uint64_t width, uint64_t height, int32_t kind, flagos_stream stream) {
  ENTER_DEVICE(copy2d_async, device);
  Task task;
  task.dst_pitch = dst_pitch;
  task.src_pitch = src_pitch;
  task.width = width;
  task.height = height;
  return copy("copy2d_async", device, std::move(task), dst, src, kind, stream);
}

flagos_status fill_async(int32_t device, void* dst, int32_t byte_value, uint64_t n, flagos_stream handle) {
  ENTER_DEVICE(fill_async, device);
  flagos_status status = FLAGOS_OK;
  StreamSlot* stream = find_stream("fill_async", device, handle, &status);
  if (!stream) return status;
  if (n == 0) return FLAGOS_OK;
  Task task;
  task.kind = Task::kFill;
  task.width = n;
  task.value = byte_value & 0xff;
  task.dst = resolve("fill_async", "dst", dst, n, true, device);
  return task.dst ? enqueue(stream, std::move(task)) : FLAGOS_INVALID_ARGUMENT;
}

}  // namespace host
}  // namespace flagos
