// backend.h: what a launch plan needs of a chip's driver: the one place that knows how a kernel is started. A chip that
// has compiled kernels of its own registers one (csrc/runtime/cuda_plans.cc); without one there are no plans.
#pragma once

#include <c10/core/Stream.h>

#include <cstddef>
#include <vector>

namespace flagos {

// One kernel and how it is started, as the compiler's launcher was told.
struct LaunchConfig {
  void* function = nullptr;  // the driver's handle; belongs to one device
  unsigned grid[3] = {1, 1, 1};
  unsigned warps = 1, ctas = 1, shared = 0;
  bool cooperative = false, pdl = false;  // pdl: may start before the kernel before it has ended
};

class PlanBackend {
 public:
  virtual ~PlanBackend() = default;
  // The sizes in bytes of the parameters that the compiled function declares. False when the driver cannot say.
  virtual bool parameters(void* function, std::vector<size_t>& sizes) const = 0;
  // Whether a graph is being captured on the stream.
  virtual bool capturing(c10::Stream stream) const = 0;
  // Makes the device's context current on this thread; returns the stream as launch() takes it.
  virtual void* enter(c10::Stream stream) const = 0;
  // Starts a kernel; parameters[i] points at the i-th parameter. Throws when the driver refuses.
  virtual void launch(const LaunchConfig& config, void* stream, void** parameters) const = 0;
  // Puts another address into a tensor map (a descriptor of a tensor for the copy engine), 128 bytes.
  virtual void replace_address(void* tensor_map, void* address) const = 0;
};

// Called once, when a platform that has one is made.
void set_plan_backend(const PlanBackend* backend);
const PlanBackend* plan_backend();  // nullptr: this chip has none

}  // namespace flagos
