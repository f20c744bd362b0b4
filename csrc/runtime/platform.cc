// platform.cc: the process's one Platform, index checks and fork detection.
#include "csrc/runtime/platform.h"

#include <c10/util/Exception.h>
#include <pthread.h>

#include <atomic>

#include "csrc/runtime/fork.h"
#include "csrc/runtime/registrations.h"

namespace flagos {
namespace {

std::atomic<Platform*> g_platform{nullptr};

}  // namespace

__thread c10::DeviceIndex native_call_device = -1;
bool g_in_bad_fork = false;

void set_platform(Platform* platform) {
  Platform* expected = nullptr;
  TORCH_CHECK(platform != nullptr, "flagos: set_platform(nullptr)");
  TORCH_CHECK(g_platform.compare_exchange_strong(expected, platform), "flagos: the chip is already '",
              expected ? expected->chip() : "", "'; it is chosen once per process (FLAGOS_ACCELERATOR)");
  register_hooks();
  register_profiler();
}

Platform& platform() {
  Platform* p = g_platform.load(std::memory_order_acquire);
  TORCH_CHECK(C10_LIKELY(p != nullptr), "flagos: no chip has been opened; 'import torch_fl' does it");
  return *p;
}

bool has_platform() noexcept { return g_platform.load(std::memory_order_acquire) != nullptr; }

c10::DeviceIndex checked_index(int64_t index) {
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
