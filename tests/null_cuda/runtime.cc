// runtime.cc: a CUDA run time without a GPU: the functions that torch's libraries take from libcudart, loaded before it
// (LD_PRELOAD). Device memory is host memory, copies are copies, streams and events know their device and their
// capture, and a kernel does nothing but leave a line in a log. What torch does around its kernels is then real:
// allocation, dispatch, relabelling, streams, graphs, errors. No result of a kernel can be checked with it; that the
// same kernels are launched in the same order with the same shapes on the same streams can, and so can the time the
// host takes.
//
//   NULL_CUDA_DEVICES    number of devices (default 1)         NULL_CUDA_MEMORY   bytes of each (default 8 GiB)
//   NULL_CUDA_LAUNCH_NS  what a launch takes (default 0)       NULL_CUDA_DRIVER   driver version (default 13000)
//   NULL_CUDA_ARCH       compute capability (default 90, for which torch prefers cuDNN's attention; not there with 80)
//
// null_cuda_log(1) empties and starts the log, null_cuda_log(2) shows addresses as they are, null_cuda_read() gives its
// text; null_cuda_fail("cudaMalloc", 2) makes the next call of a function return a number, null_cuda_break(700) makes
// every later call fail, as an illegal access does. In a forked child of a process that has used it every call fails.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <dlfcn.h>
#include <pthread.h>

#include "null_cuda.h"

namespace null_cuda {

namespace {

struct State {
  std::mutex mutex;
  std::unordered_map<const void*, std::string> kernels;  // host stub -> the kernel's name
  std::map<std::string, int> failures;
  std::string log;
  std::atomic<unsigned long long> launches{0};
  std::atomic<int> logging{0};
  std::atomic<int> standing{0};
  int devices = 1, driver = 13000, arch = 90;
  long launch_ns = 0;
  State() {
    auto number = [](const char* name, long fallback) { return getenv(name) ? atol(getenv(name)) : fallback; };
    devices = std::min<int>(number("NULL_CUDA_DEVICES", 1), kMaxDevices);
    launch_ns = number("NULL_CUDA_LAUNCH_NS", 0);
    driver = number("NULL_CUDA_DRIVER", 13000);
    arch = number("NULL_CUDA_ARCH", 90);
  }
};
// Never destroyed: libraries register kernels before main() and release memory after it.
State& state() {
  static State* s = new State;
  return *s;
}

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
std::atomic<bool> any_failure{false}, entered{false};

// A child inherits a driver that it cannot use.
void break_child() {
  if (!entered) return;
  state().standing = cudaErrorInitializationError;
  any_failure = true;
}
const int forks_are_watched = pthread_atfork(nullptr, nullptr, break_child);

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

void spin(long ns) {
  if (ns <= 0) return;
  auto end = std::chrono::steady_clock::now() + std::chrono::nanoseconds(ns);
  while (std::chrono::steady_clock::now() < end) {
  }
}

std::string kernel_name(const void* function) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  auto found = s.kernels.find(function);
  return found == s.kernels.end() ? "unknown" : found->second;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  if (Stream* st = real(stream); st && st->device != current) return fail(cudaErrorInvalidResourceHandle);
  count_launch();
  if (recording()) {
    char text[160];
    snprintf(text, sizeof text, " <<<%u,%u,%u %u,%u,%u %zu>>> device %d stream %p", grid.x, grid.y, grid.z, block.x,
             block.y, block.z, shared, current, static_cast<void*>(stream));
    record(kernel_name(function) + text, stream);
  } else if (capturing(stream)) {
    ++real(stream)->nodes;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t fail(cudaError_t error) {
  last = error;
  return error;
}

cudaError_t enter(const char* name) {
  entered.store(true, std::memory_order_relaxed);
  if (!any_failure.load(std::memory_order_relaxed)) return cudaSuccess;
  State& s = state();
  if (s.standing) return fail(cudaError_t(s.standing.load()));
  std::lock_guard<std::mutex> lock(s.mutex);
  auto found = s.failures.find(name);
  if (found == s.failures.end()) return cudaSuccess;
  cudaError_t error = cudaError_t(found->second);
  s.failures.erase(found);
  return fail(error);
}

int device_count() { return state().devices; }
int current_device() { return current; }
void set_current_device(int device) { current = device; }
bool recording() { return state().logging.load(std::memory_order_relaxed) != 0; }
bool showing_addresses() { return state().logging.load(std::memory_order_relaxed) == 2; }
cudaError_t standing_error() { return cudaError_t(state().standing.load()); }

void record(const std::string& line, void* stream) {
  State& s = state();
  if (Stream* st = real(static_cast<cudaStream_t>(stream)); st && st->capture) ++st->nodes;
  if (!recording()) return;
  std::lock_guard<std::mutex> lock(s.mutex);
  s.log += line;
  s.log += '\n';
}

void count_launch() {
  state().launches.fetch_add(1, std::memory_order_relaxed);
  spin(state().launch_ns);
}

}  // namespace null_cuda

using namespace null_cuda;

// ---- for the tests

NULL_CUDA_API void null_cuda_log(int on) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().log.clear();
  state().logging = on;
}
// Copies up to `room` bytes of the log and returns its whole length.
NULL_CUDA_API size_t null_cuda_read(char* out, size_t room) {
  std::lock_guard<std::mutex> lock(state().mutex);
  memcpy(out, state().log.data(), std::min(room, state().log.size()));
  return state().log.size();
}
NULL_CUDA_API unsigned long long null_cuda_launches() { return state().launches; }
NULL_CUDA_API void null_cuda_fail(const char* name, int error) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().failures[name] = error;
  any_failure = true;
}
NULL_CUDA_API void null_cuda_break(int error) {
  state().standing = error;
  any_failure = true;
}

// ---- registration of kernels

NULL_CUDA_API void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
NULL_CUDA_API void __cudaRegisterFatBinaryEnd(void**) {}
NULL_CUDA_API void __cudaUnregisterFatBinary(void**) {}
NULL_CUDA_API char __cudaInitModule(void**) { return 1; }
NULL_CUDA_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
NULL_CUDA_API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                                          dim3*, int*) {
  std::lock_guard<std::mutex> lock(state().mutex);
  state().kernels[host] = name;
}
NULL_CUDA_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
NULL_CUDA_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
NULL_CUDA_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
NULL_CUDA_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                                             cudaStream_t stream) {
  ENTER(cudaLaunchKernel);
  return launch(kernel, grid, block, shared, stream);
}

extern "C" {

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  ENTER(cudaLaunchKernel);
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  ENTER(cudaLaunchKernel);
  return launch(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  ENTER(cudaLaunchHostFunc);
  function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  *out = {};
  out->numRegs = 32, out->maxThreadsPerBlock = 1024, out->binaryVersion = 90, out->ptxVersion = 90;
  out->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* out, const void*, int, size_t, unsigned) {
  *out = 8;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
  *out = const_cast<void*>(symbol);
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

// ---- devices

cudaError_t cudaGetDeviceCount(int* out) {
  ENTER(cudaGetDeviceCount);
  *out = state().devices;
  return state().devices ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* out) {
  ENTER(cudaGetDevice);
  *out = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  ENTER(cudaSetDevice);
  if (device < 0 || device >= state().devices) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ENTER(cudaDeviceSynchronize);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* out, int device, int peer) {
  *out = device != peer;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* out, int length, int device) {
  snprintf(out, length, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> values = {
      {cudaDevAttrComputeCapabilityMajor, state().arch / 10},
      {cudaDevAttrComputeCapabilityMinor, state().arch % 10},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrCooperativeLaunch, 1},
  };
  auto found = values.find(attribute);
  *out = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  ENTER(cudaGetDeviceProperties);
  if (device < 0 || device >= state().devices) return fail(cudaErrorInvalidDevice);
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "null CUDA device");
  auto get = [&](cudaDeviceAttr attribute) {
    int value;
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  out->major = state().arch / 10, out->minor = state().arch % 10;
  out->totalGlobalMem = memory_of_a_device();
  out->multiProcessorCount = get(cudaDevAttrMultiProcessorCount);
  out->maxThreadsPerBlock = get(cudaDevAttrMaxThreadsPerBlock);
  out->maxThreadsPerMultiProcessor = get(cudaDevAttrMaxThreadsPerMultiProcessor);
  out->sharedMemPerBlock = get(cudaDevAttrMaxSharedMemoryPerBlock);
  out->sharedMemPerBlockOptin = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  out->sharedMemPerMultiprocessor = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  out->regsPerBlock = out->regsPerMultiprocessor = get(cudaDevAttrMaxRegistersPerBlock);
  out->warpSize = get(cudaDevAttrWarpSize);
  out->l2CacheSize = get(cudaDevAttrL2CacheSize);
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024, out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->textureAlignment = 512;
  out->pciBusID = device + 1;
  out->uuid.bytes[0] = char(device + 1);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* out) {
  *out = state().driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* out) {
  *out = CUDART_VERSION;
  return cudaSuccess;
}
// torch asks for the driver's functions here; those of driver.cc are in this library too.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *out = dlsym(RTLD_DEFAULT, name);
  if (!*out) *out = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (!*out) *out = reinterpret_cast<void*>(+[] { return CUDA_ERROR_NOT_SUPPORTED; });
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// ---- errors

cudaError_t cudaGetLastError() {
  cudaError_t error = state().standing ? cudaError_t(state().standing.load()) : last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return state().standing ? cudaError_t(state().standing.load()) : last; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (int(error)) {
    case 0:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInitializationError:
      return "initialization error";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorNotReady:
      return "device not ready";
    default:
      return "an error of the null CUDA";
  }
}
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }

}  // extern "C"
