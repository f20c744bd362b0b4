// memory.cc: the memory of the null CUDA: host memory that knows which device it plays, zero when it is new. A device
// has as much as NULL_CUDA_MEMORY says and is out of memory beyond it.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "null_cuda.h"

namespace null_cuda {

namespace {

struct Block {
  size_t bytes;
  int device;  // -1: pinned host memory
};

std::mutex& mutex = *new std::mutex;  // memory is released after main() too
std::map<uintptr_t, Block>& blocks = *new std::map<uintptr_t, Block>;
size_t used[kMaxDevices] = {};

// The allocation that holds an address, or the end; under the lock.
auto find(const void* pointer) {
  auto next = blocks.upper_bound(uintptr_t(pointer));
  if (next == blocks.begin()) return blocks.end();
  --next;
  return uintptr_t(pointer) < next->first + std::max<size_t>(next->second.bytes, 1) ? next : blocks.end();
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream, const char* what) {
  if (capturing(stream)) {
    record("copy", stream);
    return cudaSuccess;
  }
  if (bytes) memmove(to, from, bytes);
  if (recording()) {
    char text[160];
    snprintf(text, sizeof text, "%s %zu bytes %d->%d stream %p", what, bytes, owner(from), owner(to),
             static_cast<void*>(stream));
    record(text, stream);
  }
  return cudaSuccess;
}

}  // namespace

size_t memory_of_a_device() {
  static size_t bytes = getenv("NULL_CUDA_MEMORY") ? atol(getenv("NULL_CUDA_MEMORY")) : size_t{8} << 30;
  return bytes;
}

cudaError_t allocate(void** out, size_t bytes, bool host) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!host && used[current_device()] + bytes > memory_of_a_device()) {
    *out = nullptr;
    return fail(cudaErrorMemoryAllocation);
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, std::max<size_t>(bytes, 512))) return fail(cudaErrorMemoryAllocation);
  memset(memory, 0, bytes);
  blocks[uintptr_t(memory)] = {bytes, host ? -1 : current_device()};
  if (!host) used[current_device()] += bytes;
  *out = memory;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(uintptr_t(pointer));
  if (found == blocks.end()) return fail(cudaErrorInvalidValue);
  if (found->second.device >= 0) used[found->second.device] -= found->second.bytes;
  blocks.erase(found);
  free(pointer);
  return cudaSuccess;
}

int owner(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = find(pointer);
  return found == blocks.end() ? -2 : found->second.device;
}

bool locate(const void* pointer, size_t* offset, size_t* bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = find(pointer);
  if (found == blocks.end()) return false;
  *offset = uintptr_t(pointer) - found->first;
  *bytes = found->second.bytes;
  return true;
}

}  // namespace null_cuda

using namespace null_cuda;

extern "C" {

cudaError_t cudaMalloc(void** out, size_t bytes) {
  ENTER(cudaMalloc);
  return allocate(out, bytes, false);
}
cudaError_t cudaFree(void* pointer) {
  ENTER(cudaFree);
  return release(pointer);
}
cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) { return allocate(out, bytes, false); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }
cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  ENTER(cudaHostAlloc);
  return allocate(out, bytes, true);
}
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> lock(mutex);
  blocks[uintptr_t(pointer)] = {bytes, -1};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  blocks.erase(uintptr_t(pointer));
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  ENTER(cudaMemGetInfo);
  std::lock_guard<std::mutex> lock(mutex);
  *free = memory_of_a_device() - used[current_device()];
  *total = memory_of_a_device();
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  *out = {};
  int device = owner(pointer);
  out->type = device >= 0 ? cudaMemoryTypeDevice : device == -1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  out->device = std::max(device, 0);
  out->devicePointer = device == -2 ? nullptr : const_cast<void*>(pointer);
  out->hostPointer = device == -1 ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  ENTER(cudaMemcpy);
  return copy(to, from, bytes, nullptr, "copy (synchronous)");
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  ENTER(cudaMemcpyAsync);
  return copy(to, from, bytes, stream, "copy");
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  ENTER(cudaMemcpyPeerAsync);
  return copy(to, from, bytes, stream, "copy (peer)");
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row)
    copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width, stream,
         "copy");
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  ENTER(cudaMemsetAsync);
  if (!capturing(stream)) memset(to, value, bytes);
  char text[96];
  snprintf(text, sizeof text, "set %zu bytes to %d stream %p", bytes, value, static_cast<void*>(stream));
  record(text, stream);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t*, int) { return fail(cudaErrorNotSupported); }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return fail(cudaErrorNotSupported); }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return fail(cudaErrorNotSupported); }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
  return fail(cudaErrorNotSupported);
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return fail(cudaErrorNotSupported); }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return fail(cudaErrorNotSupported); }
cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return fail(cudaErrorNotSupported); }
cudaError_t cudaIpcCloseMemHandle(void*) { return fail(cudaErrorNotSupported); }
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { return fail(cudaErrorNotSupported); }
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return fail(cudaErrorNotSupported); }

}  // extern "C"
