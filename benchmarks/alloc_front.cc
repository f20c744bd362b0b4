// alloc_front.cc: times one allocate and free of the CUDA allocator as a flagos call and as any other code meets it.
// Built and called by alloc_front.py.
#include <c10/core/Allocator.h>

#include <chrono>

namespace flagos {
extern __thread c10::DeviceIndex native_call_device;  // platform.h
}

// Nanoseconds per pair. device: that of a flagos call, or -1 for code outside one.
extern "C" double time_allocations(size_t nbytes, int pairs, int device) {
  c10::Allocator* allocator = c10::GetAllocator(c10::kCUDA);
  const auto outer = flagos::native_call_device;
  flagos::native_call_device = static_cast<c10::DeviceIndex>(device);
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  for (int i = 0; i < pairs; i++) allocator->allocate(nbytes).clear();
  const std::chrono::duration<double, std::nano> time = Clock::now() - start;
  flagos::native_call_device = outer;
  return time.count() / pairs;
}
