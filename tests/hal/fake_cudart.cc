// fake_cudart.cc: a stand-in for libcudart, so that the cuda chip is tested without a GPU. It is a face on the host
// chip's simulated devices: memory that the host cannot touch, streams that are threads. It has a current device per
// thread and CUDA's error numbers, and forgets nothing that a test may ask for: fake_cudart_fail() makes the next call
// of a function return a number, fake_cudart_calls() counts. Built with definitions to leave functions out:
//   WITHOUT_OPTIONAL   no optional function         WITHOUT_REQUIRED   no cudaMalloc
// PREFIX is the prefix of the names (default cuda).
#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "flagos.h"

#ifndef PREFIX
#define PREFIX cuda
#endif
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define API(name) extern "C" __attribute__((visibility("default"))) int JOIN(PREFIX, name)
// Counts the call, and returns at once when the test has asked for a failure.
#define CALL(name) \
  if (int error = enter(#name)) return error

// The host chip itself: flagos_open() is busy opening the cuda chip when it gets here.
extern "C" const flagos_hal* flagos_hal_get_host(uint32_t abi_major);

namespace {

std::mutex mutex;
std::map<std::string, int> failures;  // next result by function
std::map<std::string, long> calls;
thread_local int current = 0;
thread_local int last = 0;

const flagos_hal* hal() {
  static const flagos_hal* table = [] {
    const flagos_hal* host = flagos_hal_get_host(FLAGOS_ABI_MAJOR);
    if (host->init() != FLAGOS_OK) fprintf(stderr, "fake_cudart: %s\n", host->last_message());
    return host;
  }();
  return table;
}

int enter(const char* name) {
  std::lock_guard<std::mutex> lock(mutex);
  ++calls[name];
  auto found = failures.find(name);
  if (found == failures.end()) return 0;
  last = found->second;
  failures.erase(found);
  return last;
}

int result(flagos_status status) {
  static const int numbers[] = {0, 1, 2, 400, 100, 801, 600, 400, 909, 700, 999};
  int error = numbers[status];
  if (error) last = error;
  return error;
}

flagos_stream stream_of(void* p) { return static_cast<flagos_stream>(p); }
flagos_event event_of(void* p) { return static_cast<flagos_event>(p); }
int device_count() {
  int32_t count = 0;
  hal()->device_count(&count);
  return count;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void fake_cudart_fail(const char* name, int error) {
  std::lock_guard<std::mutex> lock(mutex);
  failures[name] = error;
}
extern "C" __attribute__((visibility("default"))) long fake_cudart_calls(const char* name) {
  std::lock_guard<std::mutex> lock(mutex);
  return calls[name];
}

API(GetDeviceCount)(int* count) {
  CALL(GetDeviceCount);
  *count = device_count();
  return 0;
}
API(GetDevice)(int* device) {
  CALL(GetDevice);
  *device = current;
  return 0;
}
API(SetDevice)(int device) {
  CALL(SetDevice);
  if (device < 0 || device >= device_count()) return last = 101;
  current = device;
  return 0;
}
API(DeviceGetAttribute)(int* value, int attribute, int) {
  CALL(DeviceGetAttribute);
  switch (attribute) {
    case 10:
      *value = 32;
      return 0;
    case 16:
      *value = 4;
      return 0;
    case 39:
      *value = 2048;
      return 0;
    case 75:
      *value = 9;
      return 0;
    case 76:
      *value = 0;
      return 0;
    default:
      return last = 1;
  }
}
API(DeviceSynchronize)(void) {
  CALL(DeviceSynchronize);
  return result(hal()->device_sync(current));
}
API(GetLastError)(void) {
  enter("GetLastError");
  int error = last;
  last = 0;
  return error;
}
extern "C" __attribute__((visibility("default"))) const char* JOIN(PREFIX, GetErrorString)(int error) {
  return error == 2 ? "out of memory" : error == 700 ? "an illegal memory access was encountered" : "some error";
}
API(MemGetInfo)(size_t* available, size_t* total) {
  CALL(MemGetInfo);
  uint64_t a = 0, b = 0;
  int error = result(hal()->mem_info(current, &a, &b));
  *available = a;
  *total = b;
  return error;
}
#ifndef WITHOUT_REQUIRED
API(Malloc)(void** pointer, size_t size) {
  CALL(Malloc);
  return result(hal()->malloc(current, size, pointer));
}
#endif
API(Free)(void* pointer) {
  CALL(Free);
  return result(hal()->free(current, pointer));
}
API(HostAlloc)(void** pointer, size_t size, unsigned) {
  CALL(HostAlloc);
  return result(hal()->host_malloc(size, pointer));
}
API(FreeHost)(void* pointer) {
  CALL(FreeHost);
  return result(hal()->host_free(pointer));
}
API(MemcpyAsync)(void* dst, const void* src, size_t n, int kind, void* stream) {
  CALL(MemcpyAsync);
  return result(
      hal()->copy_async(current, dst, src, n, kind == 0 ? FLAGOS_COPY_HOST_TO_HOST : kind, stream_of(stream)));
}
API(MemsetAsync)(void* dst, int value, size_t n, void* stream) {
  CALL(MemsetAsync);
  return result(hal()->fill_async(current, dst, value, n, stream_of(stream)));
}
API(StreamCreateWithPriority)(void** stream, unsigned flags, int priority) {
  CALL(StreamCreateWithPriority);
  if (flags != 1) return last = 1;
  return result(hal()->stream_create(current, priority, reinterpret_cast<flagos_stream*>(stream)));
}
API(StreamDestroy)(void* stream) {
  CALL(StreamDestroy);
  return result(hal()->stream_destroy(current, stream_of(stream)));
}
API(StreamSynchronize)(void* stream) {
  CALL(StreamSynchronize);
  return result(hal()->stream_sync(current, stream_of(stream)));
}
API(StreamQuery)(void* stream) {
  CALL(StreamQuery);
  return result(hal()->stream_query(current, stream_of(stream)));
}
API(StreamWaitEvent)(void* stream, void* event, unsigned flags) {
  CALL(StreamWaitEvent);
  if (flags != 0) return last = 1;
  return result(hal()->stream_wait_event(current, stream_of(stream), event_of(event)));
}
API(EventCreateWithFlags)(void** event, unsigned flags) {
  CALL(EventCreateWithFlags);
  if (flags & ~2u) return last = 1;
  uint32_t timing = flags & 2u ? FLAGOS_EVENT_DEFAULT : FLAGOS_EVENT_TIMING;
  return result(hal()->event_create(current, timing, reinterpret_cast<flagos_event*>(event)));
}
API(EventDestroy)(void* event) {
  CALL(EventDestroy);
  return result(hal()->event_destroy(current, event_of(event)));
}
API(EventRecord)(void* event, void* stream) {
  CALL(EventRecord);
  return result(hal()->event_record(current, event_of(event), stream_of(stream)));
}
API(EventSynchronize)(void* event) {
  CALL(EventSynchronize);
  return result(hal()->event_sync(current, event_of(event)));
}
API(EventQuery)(void* event) {
  CALL(EventQuery);
  return result(hal()->event_query(current, event_of(event)));
}
API(EventElapsedTime)(float* ms, void* start, void* end) {
  CALL(EventElapsedTime);
  return result(hal()->event_elapsed_ms(current, event_of(start), event_of(end), ms));
}

#ifndef WITHOUT_OPTIONAL
API(MemcpyPeerAsync)(void* dst, int, const void* src, int, size_t n, void* stream) {
  CALL(MemcpyPeerAsync);
  return result(hal()->copy_async(current, dst, src, n, FLAGOS_COPY_DEVICE_TO_DEVICE, stream_of(stream)));
}
API(Memcpy2DAsync)(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width, size_t height,
                   int kind, void* stream) {
  CALL(Memcpy2DAsync);
  return result(hal()->copy2d_async(current, dst, dst_pitch, src, src_pitch, width, height,
                                    kind == 0 ? FLAGOS_COPY_HOST_TO_HOST : kind, stream_of(stream)));
}
API(LaunchHostFunc)(void* stream, void (*fn)(void*), void* arg) {
  CALL(LaunchHostFunc);
  return result(hal()->stream_host_func(current, stream_of(stream), fn, arg));
}
API(DeviceGetStreamPriorityRange)(int* least, int* greatest) {
  CALL(DeviceGetStreamPriorityRange);
  *least = 0;
  *greatest = -5;
  return 0;
}
API(DeviceCanAccessPeer)(int* can, int device, int peer) {
  CALL(DeviceCanAccessPeer);
  *can = device != peer;
  return 0;
}
API(DeviceEnablePeerAccess)(int peer, unsigned flags) {
  CALL(DeviceEnablePeerAccess);
  static std::map<std::pair<int, int>, bool> enabled;
  std::lock_guard<std::mutex> lock(mutex);
  bool& already = enabled[{current, peer}];
  if (flags || already) return last = flags ? 1 : 704;
  already = true;
  return 0;
}
API(DriverGetVersion)(int* version) {
  CALL(DriverGetVersion);
  *version = 12080;
  return 0;
}
API(RuntimeGetVersion)(int* version) {
  CALL(RuntimeGetVersion);
  *version = 12040;
  return 0;
}
API(GetDeviceProperties)(void* properties, int) {
  CALL(GetDeviceProperties);
  strcpy(static_cast<char*>(properties), "Fake GPU (simulated)");
  return 0;
}
#endif
