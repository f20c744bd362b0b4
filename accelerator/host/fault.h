// fault.h: the gate that every entry of the host chip passes first. It refuses calls before init and after fork, counts
// calls, and carries out the fault plan (FLAGOS_SIM_FAIL). In the normal state it costs one load and one store.
#ifndef FLAGOS_HOST_FAULT_H_
#define FLAGOS_HOST_FAULT_H_

#include <atomic>
#include <cstdint>

#include "flagos.h"

namespace flagos {
namespace host {

enum Entry : int {
#define FLAGOS_ENTRY(name, need) kEntry_##name,
#include "entries.inc"
#undef FLAGOS_ENTRY
  kEntryCount
};

enum : uint32_t { kInitialised = 1, kForked = 2, kPlanned = 4, kLost = 8 };
extern std::atomic<uint32_t> g_state;
constexpr int kNoDevice = -1;

// Call counters are per thread, so that counting never makes two threads share a cache line.
struct Counters {
  std::atomic<uint64_t> calls[kEntryCount] = {};
};
extern thread_local Counters* t_counters __attribute__((tls_model("initial-exec")));
Counters* register_thread_counters();

inline void count_call(Entry entry) {
  Counters* counters = t_counters ? t_counters : register_thread_counters();
  std::atomic<uint64_t>& calls = counters->calls[entry];
  calls.store(calls.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);  // only this thread writes
}

flagos_status enter_slow(Entry entry, int32_t device, uint32_t state);

/// OK when the call may go on; otherwise the status to return, with its message set.
inline flagos_status enter(Entry entry, int32_t device) {
  uint32_t state = g_state.load(std::memory_order_acquire);
  if (__builtin_expect(state == kInitialised, 1)) {
    count_call(entry);
    return FLAGOS_OK;
  }
  return enter_slow(entry, device, state);
}

/// The same for probe and init, which are legal before init.
flagos_status enter_unready(Entry entry);

/// Devices of the initialised chip, 0 otherwise.
extern std::atomic<int32_t> g_devices;
flagos_status check_device(const char* entry, int32_t device);
flagos_status null_argument(const char* entry, const char* name);

// What every entry begins with.
#define ENTER(entry, device) \
  if (flagos_status entered = enter(kEntry_##entry, device)) return entered

#define ENTER_DEVICE(entry, device) \
  ENTER(entry, device);             \
  if (flagos_status bad = check_device(#entry, device)) return bad

/// Reads FLAGOS_SIM_FAIL; called by init.
flagos_status load_fault_plan();

/// Marks a forked child from then on; called once by init.
void watch_fork();

}  // namespace host
}  // namespace flagos
#endif  // FLAGOS_HOST_FAULT_H_
