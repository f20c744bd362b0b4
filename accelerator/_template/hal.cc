// hal.cc: the skeleton of a chip. Copy this folder to accelerator/<chip>/, or build it as a library of its own:
//   c++ -std=c++17 -shared -fPIC -I include hal.cc -o libmychip.so
//   FLAGOS_HAL_PATH=./libmychip.so FLAGOS_ACCELERATOR=template ...
// It is the smallest complete chip: one device whose memory is the host's and whose streams finish each task before the
// call returns. It passes the conformance suite. Replace the lines marked CHIP with the vendor's calls; the order and
// the checks around them are what flagos.h asks of every chip. docs/adding_a_chip.md explains the steps.
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "flagos.h"

// Opaque to the caller. A real chip keeps the vendor's handle here.
struct flagos_stream_s {
  int32_t device;
};
struct flagos_event_s {
  int32_t device;
  bool timing, recorded;
  std::chrono::steady_clock::time_point time;
};

namespace {

constexpr int32_t kDevices = 1;
constexpr uint64_t kAlignment = 256, kMemory = uint64_t{1} << 30;

struct Block {
  uint64_t size;
  bool pinned;
};
std::mutex g_mutex;  // every entry may be called from any thread
bool g_initialised = false;
uint64_t g_used = 0;
std::map<uintptr_t, Block> g_blocks;

// One line per failure, kept for the calling thread: what failed, the vendor's function, the vendor's number.
thread_local char t_message[256] = "";
__attribute__((format(printf, 2, 3))) flagos_status fail(flagos_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(t_message, sizeof(t_message), format, arguments);
  va_end(arguments);
  return status;
}
const char* last_message() { return t_message; }

flagos_status check(const char* entry, int32_t device) {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (!g_initialised) return fail(FLAGOS_FAILED_PRECONDITION, "%s: called before init() or after shutdown()", entry);
  if (device >= 0 && device < kDevices) return FLAGOS_OK;
  return fail(FLAGOS_INVALID_ARGUMENT, "%s: no device %d, there are %d", entry, device, kDevices);
}
#define CHECK(entry, device) \
  if (flagos_status bad = check(#entry, device)) return bad
#define CHECK_ARGUMENT(entry, condition) \
  if (!(condition)) return fail(FLAGOS_INVALID_ARGUMENT, "%s: must hold: %s", #entry, #condition)

// ---- lifecycle ------------------------------------------------------------------------------------------------------

// CHIP: is the device node there, does the vendor's library open? Create no context here: it would cost memory and time
// in programs that use another chip, and break fork.
flagos_status probe() { return FLAGOS_OK; }

flagos_status init() {
  std::lock_guard<std::mutex> lock(g_mutex);
  g_initialised = true;  // CHIP: open the library, resolve its functions, count devices
  return FLAGOS_OK;
}

flagos_status shutdown() {
  CHECK(shutdown, 0);
  std::lock_guard<std::mutex> lock(g_mutex);
  for (auto& block : g_blocks) free(reinterpret_cast<void*>(block.first));
  g_blocks.clear();
  g_used = 0;
  g_initialised = false;
  return FLAGOS_OK;
}

flagos_status device_count(int32_t* count) {
  CHECK(device_count, 0);
  CHECK_ARGUMENT(device_count, count);
  *count = kDevices;
  return FLAGOS_OK;
}

flagos_status device_info(int32_t device, flagos_device_info* info) {
  CHECK(device_info, device);
  CHECK_ARGUMENT(device_info, info && info->struct_size >= sizeof(uint32_t));
  flagos_device_info full = {};
  full.struct_size = info->struct_size;
  full.multi_processor_count = full.warp_size = full.max_threads_per_multi_processor = 1;
  snprintf(full.name, sizeof(full.name), "template (simulated)");
  full.total_memory = kMemory;
  full.malloc_alignment = kAlignment;
  // The caller may have been compiled against a shorter or longer structure than this chip.
  memcpy(info, &full, info->struct_size < sizeof(full) ? info->struct_size : sizeof(full));
  return FLAGOS_OK;
}

flagos_status mem_info(int32_t device, uint64_t* free_bytes, uint64_t* total_bytes) {
  CHECK(mem_info, device);
  CHECK_ARGUMENT(mem_info, free_bytes && total_bytes);
  std::lock_guard<std::mutex> lock(g_mutex);
  *free_bytes = kMemory - g_used;
  *total_bytes = kMemory;
  return FLAGOS_OK;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

flagos_status allocate(const char* entry, uint64_t size, bool pinned, void** ptr) {
  if (!ptr || size == 0) return fail(FLAGOS_INVALID_ARGUMENT, "%s: size is 0 or ptr is NULL", entry);
  std::lock_guard<std::mutex> lock(g_mutex);
  void* memory = nullptr;
  if (size > kMemory || (!pinned && size > kMemory - g_used) || posix_memalign(&memory, kAlignment, size) != 0) {
    return fail(FLAGOS_OUT_OF_MEMORY, "%s: no room for %llu bytes", entry, static_cast<unsigned long long>(size));
  }
  g_blocks[reinterpret_cast<uintptr_t>(memory)] = {size, pinned};
  if (!pinned) g_used += size;
  *ptr = memory;
  return FLAGOS_OK;
}

flagos_status release(const char* entry, void* ptr, bool pinned) {
  if (!ptr) return FLAGOS_OK;
  std::lock_guard<std::mutex> lock(g_mutex);
  auto found = g_blocks.find(reinterpret_cast<uintptr_t>(ptr));
  if (found == g_blocks.end() || found->second.pinned != pinned) {
    return fail(FLAGOS_INVALID_ARGUMENT, "%s: %p is not a live block", entry, ptr);
  }
  if (!pinned) g_used -= found->second.size;
  g_blocks.erase(found);
  free(ptr);
  return FLAGOS_OK;
}

flagos_status device_malloc(int32_t device, uint64_t size, void** ptr) {
  CHECK(malloc, device);
  return allocate("malloc", size, false, ptr);  // CHIP
}
flagos_status device_free(int32_t device, void* ptr) {
  CHECK(free, device);
  return release("free", ptr, false);  // CHIP
}
flagos_status host_malloc(uint64_t size, void** ptr) {
  CHECK(host_malloc, 0);
  return allocate("host_malloc", size, true, ptr);  // CHIP
}
flagos_status host_free(void* ptr) {
  CHECK(host_free, 0);
  return release("host_free", ptr, true);  // CHIP
}

flagos_status pointer_info(const void* ptr, flagos_pointer_info* info) {
  CHECK(pointer_info, 0);
  CHECK_ARGUMENT(pointer_info, info && info->struct_size >= sizeof(uint32_t));
  flagos_pointer_info full = {};
  full.struct_size = info->struct_size;
  full.device = -1;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto next = g_blocks.upper_bound(reinterpret_cast<uintptr_t>(ptr));
    if (next != g_blocks.begin()) {
      auto block = std::prev(next);
      if (reinterpret_cast<uintptr_t>(ptr) - block->first < block->second.size) {
        full.kind = block->second.pinned ? FLAGOS_POINTER_PINNED : FLAGOS_POINTER_DEVICE;
        full.device = block->second.pinned ? -1 : 0;
        full.base = reinterpret_cast<void*>(block->first);
        full.size = block->second.size;
      }
    }
  }
  memcpy(info, &full, info->struct_size < sizeof(full) ? info->struct_size : sizeof(full));
  return FLAGOS_OK;
}

// ---- copy and fill --------------------------------------------------------------------------------------------------

flagos_status copy_async(int32_t device, void* dst, const void* src, uint64_t n, int32_t kind, flagos_stream) {
  CHECK(copy_async, device);
  CHECK_ARGUMENT(copy_async, kind >= FLAGOS_COPY_HOST_TO_DEVICE && kind <= FLAGOS_COPY_HOST_TO_HOST);
  if (n == 0) return FLAGOS_OK;
  CHECK_ARGUMENT(copy_async, dst && src);
  memmove(dst, src, n);  // CHIP: enqueue on the stream
  return FLAGOS_OK;
}

flagos_status fill_async(int32_t device, void* dst, int32_t byte_value, uint64_t n, flagos_stream) {
  CHECK(fill_async, device);
  if (n == 0) return FLAGOS_OK;
  CHECK_ARGUMENT(fill_async, dst);
  memset(dst, byte_value, n);  // CHIP: enqueue on the stream
  return FLAGOS_OK;
}

// ---- streams: NULL is the device's default stream -----------------------------------------------------------------

flagos_status stream_create(int32_t device, int32_t, flagos_stream* stream) {
  CHECK(stream_create, device);
  CHECK_ARGUMENT(stream_create, stream);
  *stream = new (std::nothrow) flagos_stream_s{device};  // CHIP
  return *stream ? FLAGOS_OK : fail(FLAGOS_OUT_OF_MEMORY, "stream_create: no host memory");
}
flagos_status stream_destroy(int32_t device, flagos_stream stream) {
  CHECK(stream_destroy, device);
  CHECK_ARGUMENT(stream_destroy, stream);
  delete stream;  // CHIP: let queued work finish
  return FLAGOS_OK;
}
flagos_status stream_sync(int32_t device, flagos_stream) {
  CHECK(stream_sync, device);
  return FLAGOS_OK;  // CHIP
}
flagos_status stream_query(int32_t device, flagos_stream) {
  CHECK(stream_query, device);
  return FLAGOS_OK;  // CHIP: FLAGOS_NOT_READY while work is pending
}
flagos_status stream_native_handle(int32_t device, flagos_stream stream, void** handle) {
  CHECK(stream_native_handle, device);
  CHECK_ARGUMENT(stream_native_handle, handle);
  *handle = stream;  // CHIP: what a kernel launch takes
  return FLAGOS_OK;
}

// ---- events ---------------------------------------------------------------------------------------------------------

flagos_status event_create(int32_t device, uint32_t flags, flagos_event* event) {
  CHECK(event_create, device);
  CHECK_ARGUMENT(event_create, event && flags <= FLAGOS_EVENT_TIMING);
  *event = new (std::nothrow) flagos_event_s{device, flags == FLAGOS_EVENT_TIMING, false, {}};  // CHIP
  return *event ? FLAGOS_OK : fail(FLAGOS_OUT_OF_MEMORY, "event_create: no host memory");
}
flagos_status event_destroy(int32_t device, flagos_event event) {
  CHECK(event_destroy, device);
  CHECK_ARGUMENT(event_destroy, event);
  delete event;  // CHIP
  return FLAGOS_OK;
}
flagos_status event_record(int32_t device, flagos_event event, flagos_stream) {
  CHECK(event_record, device);
  CHECK_ARGUMENT(event_record, event);
  event->recorded = true;  // CHIP
  event->time = std::chrono::steady_clock::now();
  return FLAGOS_OK;
}
flagos_status event_sync(int32_t device, flagos_event event) {
  CHECK(event_sync, device);
  CHECK_ARGUMENT(event_sync, event);
  return FLAGOS_OK;  // CHIP
}
flagos_status event_query(int32_t device, flagos_event event) {
  CHECK(event_query, device);
  CHECK_ARGUMENT(event_query, event);
  return FLAGOS_OK;  // CHIP: FLAGOS_NOT_READY while the record is pending
}
flagos_status event_elapsed_ms(int32_t device, flagos_event start, flagos_event end, float* ms) {
  CHECK(event_elapsed_ms, device);
  CHECK_ARGUMENT(event_elapsed_ms, start && end && ms);
  if (!start->timing || !end->timing || !start->recorded || !end->recorded) {
    return fail(FLAGOS_FAILED_PRECONDITION, "event_elapsed_ms: both events need FLAGOS_EVENT_TIMING and a record");
  }
  *ms = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return FLAGOS_OK;
}
flagos_status stream_wait_event(int32_t device, flagos_stream, flagos_event event) {
  CHECK(stream_wait_event, device);
  CHECK_ARGUMENT(stream_wait_event, event);
  return FLAGOS_OK;  // CHIP
}

// ---- device ---------------------------------------------------------------------------------------------------------

flagos_status device_sync(int32_t device) {
  CHECK(device_sync, device);
  return FLAGOS_OK;  // CHIP
}
flagos_status last_error(int32_t device) {
  CHECK(last_error, device);
  return FLAGOS_OK;  // CHIP: errors of work that ran after its call had returned
}

// clang-format off
const flagos_hal kTable = {
    // "(simulated)" in `vendor` keeps a chip that is not real from being chosen by probing: remove it for a real one.
    sizeof(flagos_hal), FLAGOS_ABI_MAJOR, FLAGOS_ABI_MINOR, "template", "nobody (simulated)",
    probe, init, shutdown, last_message, device_count, device_info, mem_info,
    device_malloc, device_free, host_malloc, host_free, pointer_info, nullptr /* host_alias */,
    copy_async, nullptr /* copy2d_async */, fill_async,
    stream_create, stream_destroy, stream_sync, stream_query, stream_native_handle,
    nullptr /* stream_priority_range */, nullptr /* stream_host_func */,
    event_create, event_destroy, event_record, event_sync, event_query, event_elapsed_ms, stream_wait_event,
    device_sync, nullptr /* can_access_peer */, nullptr /* enable_peer */, last_error,
    nullptr /* extensions */};
// clang-format on

}  // namespace

const flagos_hal* flagos_hal_get(uint32_t abi_major) { return abi_major == FLAGOS_ABI_MAJOR ? &kTable : nullptr; }
