// device_trace.h: what the device did and when, recorded while a profiler asks for it. For the chips behind a HAL;
// CUDA's own tracing sees the kernels of the chip cuda.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "csrc/runtime/platform.h"

namespace flagos {

struct DeviceSpan {
  enum Kind { kKernel, kCopy } kind = kKernel;
  std::string name;  // "host::mm", "Memcpy HtoD"
  c10::DeviceIndex device = 0;
  c10::StreamId stream = 0;
  int64_t start_ns = 0, end_ns = 0;          // since the epoch
  int64_t launch_ns = 0, launch_end_ns = 0;  // when the host handed it over
  int32_t thread = 0;                        // that did so, as the kernel numbers threads
  size_t nbytes = 0;                         // of a copy
  uint64_t correlation = 0;                  // the profiler's number of the operator that caused it; 0: none
};

// Read on every native call, so a plain load.
extern std::atomic<bool> device_trace_on;
inline bool tracing_device() { return device_trace_on.load(std::memory_order_relaxed); }

void start_device_trace();
// Waits for the devices; the spans since start_device_trace(), by start.
std::vector<DeviceSpan> stop_device_trace();

// A kernel that runs on the calling thread, between these two; `name` must live until the second.
void begin_host_kernel(const char* name, c10::DeviceIndex device);
void end_host_kernel();

// Work that is queued on a stream while the object lives, timed by events. Nothing when no trace runs.
class QueuedSpan {
 public:
  QueuedSpan(DeviceSpan::Kind kind, const char* name, c10::Stream stream, size_t nbytes);
  QueuedSpan(const QueuedSpan&) = delete;
  QueuedSpan& operator=(const QueuedSpan&) = delete;
  ~QueuedSpan();

 private:
  void* start_ = nullptr;  // an event
  DeviceSpan span_;
  c10::Stream stream_;
};

// The profiler's number of the operator that the calling thread is in, innermost last.
void push_correlation(uint64_t id);
void pop_correlation();

}  // namespace flagos
