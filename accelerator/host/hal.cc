// hal.cc: the host chip's table. It is what a machine without accelerator uses and what every test runs on: a simulated
// device in host memory whose mistakes are visible. Each entry passes the gate of fault.h, checks its arguments, and
// calls memory.h or stream.h. Priorities are accepted and have no effect; every device reaches every other one.
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "env.h"
#include "host/copy.h"
#include "host/fault.h"
#include "host/memory.h"
#include "host/sim.h"
#include "host/stream.h"
#include "status.h"

namespace flagos {
namespace host {
namespace {

std::mutex g_init_mutex;

uint64_t machine_memory() {
  uint64_t memory = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGE_SIZE));
  // A container may own less than the machine has.
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    if (FILE* file = fopen(path, "r")) {
      unsigned long long limit = 0;
      if (fscanf(file, "%llu", &limit) == 1 && limit > 0) memory = std::min<uint64_t>(memory, limit);
      fclose(file);
    }
  }
  return memory;
}

// ---- lifecycle ------------------------------------------------------------------------------------------------------

flagos_status probe() { return enter_unready(kEntry_probe); }

flagos_status init() {
  if (flagos_status entered = enter_unready(kEntry_init)) return entered;
  std::lock_guard<std::mutex> lock(g_init_mutex);
  if (g_state.load() & kInitialised) return FLAGOS_OK;
  uint64_t devices, memory, protect, chaos;
  uint64_t half = std::max<uint64_t>(machine_memory() / 2 / kPage * kPage, kPage);
  if (!env_number("FLAGOS_HOST_DEVICES", 2, 1, kMaxDevices, &devices) ||
      !env_number("FLAGOS_HOST_MEMORY", half, kPage, uint64_t{1} << 42, &memory) ||
      !env_number("FLAGOS_HOST_PROTECT", 1, 0, 1, &protect) ||
      !env_number("FLAGOS_SIM_CHAOS", 0, 0, UINT64_MAX, &chaos)) {
    return FLAGOS_INVALID_ARGUMENT;
  }
  if (flagos_status status = load_fault_plan()) return status;
  for (uint64_t i = 0; i < devices; ++i) {
    Pool* pool = new Pool;
    if (flagos_status status = pool->open(static_cast<int32_t>(i), memory, protect != 0)) {
      delete pool;
      for (uint64_t j = 0; j < i; ++j) g_pools[j]->close();
      return status;
    }
    delete g_pools[i];
    g_pools[i] = pool;
  }
  if (chaos) set_chaos(chaos);
  g_devices.store(static_cast<int32_t>(devices));
  open_default_streams(static_cast<int32_t>(devices));
  install_fault_handler();
  watch_fork();
  g_state.fetch_or(kInitialised, std::memory_order_release);
  return FLAGOS_OK;
}

flagos_status shutdown() {
  ENTER(shutdown, kNoDevice);
  std::lock_guard<std::mutex> lock(g_init_mutex);
  if (!(g_state.fetch_and(~kInitialised) & kInitialised)) return FLAGOS_OK;
  close_all_streams();
  for (int32_t i = 0; i < g_devices.load(); ++i) g_pools[i]->close();
  g_devices.store(0);
  return FLAGOS_OK;
}

const char* message() { return last_message(); }

flagos_status device_count(int32_t* count) {
  ENTER(device_count, kNoDevice);
  if (!count) return null_argument("device_count", "count");
  *count = g_devices.load();
  return FLAGOS_OK;
}

flagos_status device_info(int32_t device, flagos_device_info* info) {
  ENTER_DEVICE(device_info, device);
  if (!info) return null_argument("device_info", "info");
  if (info->struct_size < sizeof(uint32_t)) {
    return fail(FLAGOS_INVALID_ARGUMENT, "device_info: struct_size is %u; set it to sizeof(flagos_device_info)",
                info->struct_size);
  }
  flagos_device_info full = {};
  full.struct_size = info->struct_size;
  full.multi_processor_count = static_cast<int32_t>(sysconf(_SC_NPROCESSORS_ONLN));
  snprintf(full.name, sizeof(full.name), "flagos host (simulated)");
  utsname system = {};
  uname(&system);
  snprintf(full.arch, sizeof(full.arch), "%.31s", system.machine);
  snprintf(full.driver_version, sizeof(full.driver_version), "%.31s", system.release);
  snprintf(full.runtime_version, sizeof(full.runtime_version), "%d.%d", FLAGOS_ABI_MAJOR, FLAGOS_ABI_MINOR);
  g_pools[device]->usage(nullptr, &full.total_memory, nullptr, nullptr);
  full.warp_size = 1;
  full.max_threads_per_multi_processor = 1;
  full.malloc_alignment = kPage;
  memcpy(info, &full, std::min<size_t>(info->struct_size, sizeof(full)));
  return FLAGOS_OK;
}

flagos_status mem_info(int32_t device, uint64_t* free_bytes, uint64_t* total_bytes) {
  ENTER_DEVICE(mem_info, device);
  if (!free_bytes || !total_bytes) return null_argument("mem_info", "an output");
  uint64_t used, limit;
  g_pools[device]->usage(&used, &limit, nullptr, nullptr);
  *free_bytes = limit - used;
  *total_bytes = limit;
  return FLAGOS_OK;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

flagos_status device_malloc(int32_t device, uint64_t size, void** ptr) {
  ENTER_DEVICE(malloc, device);
  if (!ptr) return null_argument("malloc", "ptr");
  if (size == 0) return fail(FLAGOS_INVALID_ARGUMENT, "malloc: size is 0");
  return g_pools[device]->allocate(size, ptr);
}

flagos_status device_free(int32_t device, void* ptr) {
  ENTER_DEVICE(free, device);
  if (!ptr) return FLAGOS_OK;
  int32_t owner = device_of(ptr);
  if (owner != device) {
    if (owner < 0) return fail(FLAGOS_INVALID_ARGUMENT, "free: %p is not device memory of the host chip", ptr);
    return fail(FLAGOS_INVALID_ARGUMENT, "free: %p belongs to flagos:%d, the call names flagos:%d", ptr, owner, device);
  }
  return g_pools[device]->release(ptr);
}

flagos_status host_malloc(uint64_t size, void** ptr) {
  ENTER(host_malloc, kNoDevice);
  if (!ptr) return null_argument("host_malloc", "ptr");
  if (size == 0) return fail(FLAGOS_INVALID_ARGUMENT, "host_malloc: size is 0");
  return pinned_allocate(size, ptr);
}

flagos_status host_free(void* ptr) {
  ENTER(host_free, kNoDevice);
  return ptr ? pinned_release(ptr) : FLAGOS_OK;
}

flagos_status pointer_info(const void* ptr, flagos_pointer_info* info) {
  ENTER(pointer_info, kNoDevice);
  if (!info) return null_argument("pointer_info", "info");
  if (info->struct_size < sizeof(uint32_t)) {
    return fail(FLAGOS_INVALID_ARGUMENT, "pointer_info: struct_size is %u; set it to sizeof(flagos_pointer_info)",
                info->struct_size);
  }
  flagos_pointer_info full = {};
  full.struct_size = info->struct_size;
  full.device = -1;
  int32_t device = device_of(ptr);
  if (device >= 0) {
    if (g_pools[device]->find(ptr, 1, &full.base, &full.size)) {
      full.kind = FLAGOS_POINTER_DEVICE;
      full.device = device;
    }
  } else if (pinned_find(ptr, &full.base, &full.size)) {
    full.kind = FLAGOS_POINTER_PINNED;
  }
  memcpy(info, &full, std::min<size_t>(info->struct_size, sizeof(full)));
  return FLAGOS_OK;
}

flagos_status host_alias(const void* device_ptr, void** host_ptr) {
  ENTER(host_alias, kNoDevice);
  if (!host_ptr) return null_argument("host_alias", "host_ptr");
  int32_t device = device_of(device_ptr);
  if (device < 0) {
    return fail(FLAGOS_INVALID_ARGUMENT, "host_alias: %p is not device memory of the host chip", device_ptr);
  }
  *host_ptr = g_pools[device]->alias(device_ptr);  // one addition; liveness is the caller's business
  return FLAGOS_OK;
}

// ---- streams --------------------------------------------------------------------------------------------------------

constexpr int32_t kLeastPriority = 0, kGreatestPriority = -1;

flagos_status stream_create(int32_t device, int32_t priority, flagos_stream* stream) {
  ENTER_DEVICE(stream_create, device);
  if (!stream) return null_argument("stream_create", "stream");
  return create_stream(device, std::clamp(priority, kGreatestPriority, kLeastPriority), stream);
}

flagos_status stream_destroy(int32_t device, flagos_stream stream) {
  ENTER_DEVICE(stream_destroy, device);
  return destroy_stream(device, stream);
}

flagos_status stream_sync(int32_t device, flagos_stream handle) {
  ENTER_DEVICE(stream_sync, device);
  flagos_status status = FLAGOS_OK;
  StreamSlot* stream = find_stream("stream_sync", device, handle, &status);
  if (stream) stream->value.sync();
  return status;
}

flagos_status stream_query(int32_t device, flagos_stream handle) {
  ENTER_DEVICE(stream_query, device);
  flagos_status status = FLAGOS_OK;
  StreamSlot* stream = find_stream("stream_query", device, handle, &status);
  if (!stream) return status;
  return stream->value.idle() ? FLAGOS_OK : FLAGOS_NOT_READY;
}

flagos_status stream_native_handle(int32_t device, flagos_stream handle, void** native) {
  ENTER_DEVICE(stream_native_handle, device);
  if (!native) return null_argument("stream_native_handle", "handle");
  flagos_status status = FLAGOS_OK;
  if (!find_stream("stream_native_handle", device, handle, &status)) return status;
  *native = handle ? handle : default_stream(device);
  return FLAGOS_OK;
}

flagos_status stream_priority_range(int32_t device, int32_t* least, int32_t* greatest) {
  ENTER_DEVICE(stream_priority_range, device);
  if (!least || !greatest) return null_argument("stream_priority_range", "an output");
  *least = kLeastPriority;
  *greatest = kGreatestPriority;
  return FLAGOS_OK;
}

flagos_status stream_host_func(int32_t device, flagos_stream handle, void (*fn)(void*), void* arg) {
  ENTER_DEVICE(stream_host_func, device);
  if (!fn) return null_argument("stream_host_func", "fn");
  flagos_status status = FLAGOS_OK;
  StreamSlot* stream = find_stream("stream_host_func", device, handle, &status);
  if (!stream) return status;
  Task task;
  task.kind = Task::kCall;
  task.fn = fn;
  task.arg = arg;
  return enqueue(stream, std::move(task));
}

// ---- events ---------------------------------------------------------------------------------------------------------

flagos_status event_create(int32_t device, uint32_t flags, flagos_event* event) {
  ENTER_DEVICE(event_create, device);
  if (!event) return null_argument("event_create", "event");
  if (flags & ~static_cast<uint32_t>(FLAGOS_EVENT_TIMING)) {
    return fail(FLAGOS_INVALID_ARGUMENT, "event_create: unknown flags 0x%x", flags);
  }
  return create_event(device, (flags & FLAGOS_EVENT_TIMING) != 0, event);
}

flagos_status event_destroy(int32_t device, flagos_event handle) {
  ENTER_DEVICE(event_destroy, device);
  flagos_status status = FLAGOS_OK;
  EventSlot* event = find_event("event_destroy", device, handle, &status);
  return event ? destroy_event(event, handle) : status;
}

flagos_status event_record(int32_t device, flagos_event handle, flagos_stream stream_handle) {
  ENTER_DEVICE(event_record, device);
  flagos_status status = FLAGOS_OK;
  EventSlot* event = find_event("event_record", device, handle, &status);
  StreamSlot* stream = event ? find_stream("event_record", device, stream_handle, &status) : nullptr;
  return stream ? record_event(event, stream) : status;
}

flagos_status event_sync(int32_t device, flagos_event handle) {
  ENTER_DEVICE(event_sync, device);
  flagos_status status = FLAGOS_OK;
  EventSlot* event = find_event("event_sync", device, handle, &status);
  if (!event) return status;
  if (auto record = event->value.current()) record->wait();
  return FLAGOS_OK;
}

flagos_status event_query(int32_t device, flagos_event handle) {
  ENTER_DEVICE(event_query, device);
  flagos_status status = FLAGOS_OK;
  EventSlot* event = find_event("event_query", device, handle, &status);
  if (!event) return status;
  auto record = event->value.current();
  return !record || record->done() ? FLAGOS_OK : FLAGOS_NOT_READY;
}

flagos_status event_elapsed_ms(int32_t device, flagos_event start, flagos_event end, float* ms) {
  ENTER_DEVICE(event_elapsed_ms, device);
  if (!ms) return null_argument("event_elapsed_ms", "ms");
  flagos_status status = FLAGOS_OK;
  EventSlot* first = find_event("event_elapsed_ms", device, start, &status);
  EventSlot* second = first ? find_event("event_elapsed_ms", device, end, &status) : nullptr;
  if (!second) return status;
  auto a = first->value.current(), b = second->value.current();
  if (!first->value.timing || !second->value.timing || !a || !b) {
    return fail(FLAGOS_FAILED_PRECONDITION,
                "event_elapsed_ms: both events must be created with FLAGOS_EVENT_TIMING and recorded");
  }
  if (!a->done() || !b->done()) {
    return fail(FLAGOS_NOT_READY, "event_elapsed_ms: an event is still pending");
  }
  *ms = std::chrono::duration<float, std::milli>(b->time - a->time).count();
  return FLAGOS_OK;
}

flagos_status stream_wait_event(int32_t device, flagos_stream stream_handle, flagos_event handle) {
  ENTER_DEVICE(stream_wait_event, device);
  flagos_status status = FLAGOS_OK;
  StreamSlot* stream = find_stream("stream_wait_event", device, stream_handle, &status);
  EventSlot* event = stream ? find_event("stream_wait_event", -1, handle, &status) : nullptr;
  if (!event) return status;
  auto record = event->value.current();
  if (!record || record->done()) return FLAGOS_OK;
  Task task;
  task.kind = Task::kWait;
  task.record = std::move(record);
  return enqueue(stream, std::move(task));
}

// ---- device ---------------------------------------------------------------------------------------------------------

flagos_status device_sync(int32_t device) {
  ENTER_DEVICE(device_sync, device);
  sync_device(device);
  return FLAGOS_OK;
}

flagos_status can_access_peer(int32_t device, int32_t peer, int32_t* can) {
  ENTER_DEVICE(can_access_peer, device);
  if (flagos_status bad = check_device("can_access_peer", peer)) return bad;
  if (!can) return null_argument("can_access_peer", "can");
  *can = device != peer;
  return FLAGOS_OK;
}

flagos_status enable_peer(int32_t device, int32_t peer) {
  ENTER_DEVICE(enable_peer, device);
  if (flagos_status bad = check_device("enable_peer", peer)) return bad;
  if (device == peer) return fail(FLAGOS_INVALID_ARGUMENT, "enable_peer: flagos:%d is not its own peer", device);
  return FLAGOS_OK;
}

flagos_status last_error(int32_t device) {
  ENTER_DEVICE(last_error, device);
  return FLAGOS_OK;  // the simulated device has no asynchronous errors of its own; a fault plan makes some
}

// clang-format off
const flagos_hal kTable = {
    sizeof(flagos_hal), FLAGOS_ABI_MAJOR, FLAGOS_ABI_MINOR, "host", "torch_fl (simulated)",
    probe, init, shutdown, message, device_count, device_info, mem_info,
    device_malloc, device_free, host_malloc, host_free, pointer_info, host_alias,
    copy_async, copy2d_async, fill_async,
    stream_create, stream_destroy, stream_sync, stream_query, stream_native_handle, stream_priority_range,
    stream_host_func,
    event_create, event_destroy, event_record, event_sync, event_query, event_elapsed_ms, stream_wait_event,
    device_sync, can_access_peer, enable_peer, last_error,
    nullptr};
// clang-format on

}  // namespace
}  // namespace host
}  // namespace flagos

const flagos_hal* flagos_hal_get(uint32_t abi_major) {
  return abi_major == FLAGOS_ABI_MAJOR ? &flagos::host::kTable : nullptr;
}

flagos_status flagos_sim_live(int device, uint64_t* blocks, uint64_t* bytes) {
  using namespace flagos::host;
  if (!(g_state.load() & kInitialised)) {
    return flagos::fail(FLAGOS_FAILED_PRECONDITION, "flagos_sim_live: the host chip is not initialised");
  }
  if (flagos_status bad = check_device("flagos_sim_live", device)) return bad;
  g_pools[device]->usage(nullptr, nullptr, blocks, bytes);
  return FLAGOS_OK;
}
