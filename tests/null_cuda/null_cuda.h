// null_cuda.h: what the parts of the null CUDA share. See runtime.cc.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#define NULL_CUDA_API extern "C" __attribute__((visibility("default")))

namespace null_cuda {

constexpr int kMaxDevices = 8;

struct Stream {
  int device;
  int priority;
  int capture = 0;            // a cudaStreamCaptureStatus
  unsigned long long id = 0;  // of the capture
  size_t nodes = 0;           // launches and copies captured so far
};

int device_count();
int current_device();
void set_current_device(int device);
size_t memory_of_a_device();
cudaError_t allocate(void** out, size_t bytes, bool host);
cudaError_t release(void* pointer);
// Which device's memory an address is in; -1 for the host's, -2 when it is not known.
int owner(const void* pointer);
// Where in which allocation an address lies; false when in none.
bool locate(const void* pointer, size_t* offset, size_t* bytes);
void count_launch();
// One line of the log, when it is on; a stream that captures counts it as a node.
void record(const std::string& line, void* stream);
bool recording();
bool showing_addresses();  // in the log, in place of where they lie in which allocation
// Notes the thread's last error and gives it back.
cudaError_t fail(cudaError_t error);
// What the test asked this function to return; the standing error goes before it.
cudaError_t enter(const char* name);
// Null for the streams that need not be created: the default ones.
inline Stream* real(cudaStream_t stream) { return uintptr_t(stream) > 2 ? reinterpret_cast<Stream*>(stream) : nullptr; }
inline bool capturing(cudaStream_t stream) {
  return real(stream) && real(stream)->capture == cudaStreamCaptureStatusActive;
}
// Errors that stay until the process ends, as an illegal access leaves them (null_cuda_break).
cudaError_t standing_error();

}  // namespace null_cuda

#define ENTER(name) \
  if (cudaError_t error = null_cuda::enter(#name)) return error
