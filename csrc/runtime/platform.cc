// platform.cc: the process's one Platform, index checks and fork detection.
#include "csrc/runtime/platform.h"

#include <c10/util/Exception.h>
#include <pthread.h>

#include <atomic>

#include "csrc/runtime/fork.h"
#include "csrc/runtime/registrations.h"

namespace flagos {

std::atomic<Platform*> the_platform{nullptr};
c10::DeviceIndex platform_devices = 0;
__thread c10::DeviceIndex native_call_device = -1;
bool g_in_bad_fork = false;

void set_platform(Platform* platform) {
  Platform* expected = nullptr;
  TORCH_CHECK(platform != nullptr, "flagos: set_platform(nullptr)");
  TORCH_CHECK(the_platform.compare_exchange_strong(expected, platform), "flagos: the chip is already '",
              expected ? expected->chip() : "", "'; it is chosen once per process (FLAGOS_ACCELERATOR)");
  platform_devices = platform->device_count();
  register_hooks();
  register_profiler();
}

void throw_no_platform() { TORCH_CHECK(false, "flagos: no chip has been opened; 'import torch_fl' does it"); }

c10::DeviceIndex check_index(int64_t index) {
  const Platform& p = platform();
  if (index == -1) return p.current_device();
  const int count = p.device_count();
  TORCH_CHECK(C10_LIKELY(index >= 0 && index < count), "flagos:", index, " does not exist: this machine has ", count,
              " (", p.chip(), ") device", count == 1 ? "" : "s");
  return static_cast<c10::DeviceIndex>(index);
}

void watch_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { g_in_bad_fork = true; });
  TORCH_CHECK(registered == 0, "flagos: pthread_atfork failed with error ", registered);
}

void throw_bad_fork() {
  TORCH_CHECK(false,
              "Cannot re-initialize flagos in forked subprocess. To use flagos with multiprocessing, you must use the "
              "'spawn' start method");
}

}  // namespace flagos
