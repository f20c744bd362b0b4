// fault.cc: call counters, fault plan and fork detection of the host chip (fault.h).
#include "host/fault.h"

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "env.h"
#include "host/sim.h"
#include "status.h"

namespace flagos {
namespace host {

std::atomic<uint32_t> g_state{0};
std::atomic<int32_t> g_devices{0};
thread_local Counters* t_counters = nullptr;

namespace {

const char* const kEntryNames[] = {
#define FLAGOS_ENTRY(name, need) #name,
#include "entries.inc"
#undef FLAGOS_ENTRY
};

struct Fault {
  Entry entry;
  uint64_t nth;
  flagos_status status;
};

// Never destroyed: threads may outlive static destructors.
struct Shared {
  std::mutex mutex;
  std::vector<Counters*> all, idle;     // every block ever made; those of finished threads
  uint64_t baseline[kEntryCount] = {};  // totals when the plan was set
  uint64_t planned[kEntryCount] = {};   // calls since then, while a plan is active
  std::vector<Fault> plan;
  uint64_t lost = 0;  // bit per device
};
Shared& shared() {
  static Shared* instance = new Shared;
  return *instance;
}

struct ThreadExit {
  Counters* counters = nullptr;
  ~ThreadExit() {
    if (!counters) return;
    t_counters = nullptr;
    std::lock_guard<std::mutex> lock(shared().mutex);
    shared().idle.push_back(counters);  // its counts stay in the totals; the next thread adds to them
  }
};
thread_local ThreadExit t_exit;

uint64_t total_locked(Entry entry) {
  uint64_t total = 0;
  for (Counters* counters : shared().all) total += counters->calls[entry].load(std::memory_order_relaxed);
  return total;
}

int find_entry(const std::string& name) {
  for (int i = 0; i < kEntryCount; ++i) {
    if (name == kEntryNames[i]) return i;
  }
  return -1;
}

flagos_status parse_item(const std::string& item, Fault* fault) {
  size_t at = item.find('@'), equals = item.find('=');
  const char* problem = "expected ENTRY@N=STATUS, such as malloc@17=OUT_OF_MEMORY";
  if (at != std::string::npos && equals != std::string::npos && at < equals) {
    int entry = find_entry(item.substr(0, at));
    std::string number = item.substr(at + 1, equals - at - 1);
    char* end = nullptr;
    fault->nth = strtoull(number.c_str(), &end, 10);
    if (entry < 0 || entry == kEntry_last_message) {
      problem = "no such entry of the HAL table";
    } else if (number.empty() || number[0] < '0' || number[0] > '9' || *end || fault->nth == 0) {
      problem = "the call number must be 1 or more";
    } else if (!parse_status(item.c_str() + equals + 1, &fault->status) || fault->status == FLAGOS_OK) {
      problem = "no such failure status";
    } else {
      fault->entry = static_cast<Entry>(entry);
      return FLAGOS_OK;
    }
  }
  return fail(FLAGOS_INVALID_ARGUMENT, "fault plan item \"%s\": %s", item.c_str(), problem);
}

flagos_status set_plan(const std::string& text) {
  std::vector<Fault> plan;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = text.find(';', begin);
    if (end == std::string::npos) end = text.size();
    Fault fault{};
    if (flagos_status status = parse_item(text.substr(begin, end - begin), &fault)) return status;
    plan.push_back(fault);
    begin = end + 1;
  }
  Shared& s = shared();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.plan = std::move(plan);
  s.lost = 0;
  for (int i = 0; i < kEntryCount; ++i) {
    s.baseline[i] = total_locked(static_cast<Entry>(i));
    s.planned[i] = 0;
  }
  g_state.fetch_and(~(kPlanned | kLost));
  if (!s.plan.empty()) g_state.fetch_or(kPlanned);
  return FLAGOS_OK;
}

flagos_status apply_plan(Entry entry, int32_t device) {
  Shared& s = shared();
  std::lock_guard<std::mutex> lock(s.mutex);
  uint64_t nth = ++s.planned[entry];
  uint64_t bit = device >= 0 && device < 64 ? uint64_t{1} << device : 0;
  if (s.lost & bit) return fail(FLAGOS_DEVICE_LOST, "%s: flagos:%d is lost", kEntryNames[entry], device);
  for (const Fault& fault : s.plan) {
    if (fault.entry != entry || fault.nth != nth) continue;
    if (fault.status == FLAGOS_DEVICE_LOST && bit) {
      s.lost |= bit;
      g_state.fetch_or(kLost);
    }
    return fail(fault.status, "%s: simulated failure %s at call %llu (fault plan)", kEntryNames[entry],
                flagos_status_name(fault.status), static_cast<unsigned long long>(nth));
  }
  return FLAGOS_OK;
}

flagos_status fail_forked(Entry entry) {
  return fail(FLAGOS_FAILED_PRECONDITION,
              "%s: the device was initialised before this process was forked and cannot be used in the child; use the "
              "spawn start method (multiprocessing.set_start_method(\"spawn\"))",
              kEntryNames[entry]);
}

}  // namespace

Counters* register_thread_counters() {
  Shared& s = shared();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.idle.empty()) {
    s.all.push_back(new Counters);
    s.idle.push_back(s.all.back());
  }
  t_exit.counters = t_counters = s.idle.back();
  s.idle.pop_back();
  return t_counters;
}

flagos_status enter_slow(Entry entry, int32_t device, uint32_t state) {
  if (state & kForked) return entry == kEntry_device_count ? FLAGOS_OK : fail_forked(entry);
  if (!(state & kInitialised)) {
    return fail(FLAGOS_FAILED_PRECONDITION, "%s: called before init() or after shutdown()", kEntryNames[entry]);
  }
  count_call(entry);
  return state & (kPlanned | kLost) ? apply_plan(entry, device) : FLAGOS_OK;
}

flagos_status enter_unready(Entry entry) {
  uint32_t state = g_state.load(std::memory_order_acquire);
  if (state & kForked) return fail_forked(entry);
  count_call(entry);
  return state & (kPlanned | kLost) ? apply_plan(entry, kNoDevice) : FLAGOS_OK;
}

flagos_status check_device(const char* entry, int32_t device) {
  int32_t count = g_devices.load(std::memory_order_relaxed);
  if (device >= 0 && device < count) return FLAGOS_OK;
  return fail(FLAGOS_INVALID_ARGUMENT, "%s: no device %d, the host chip has %d (FLAGOS_HOST_DEVICES)", entry, device,
              count);
}

flagos_status null_argument(const char* entry, const char* name) {
  return fail(FLAGOS_INVALID_ARGUMENT, "%s: %s is NULL", entry, name);
}

flagos_status load_fault_plan() {
  static bool loaded = false;  // guarded by init's lock; a later init must not undo flagos_sim_set_fail
  if (loaded) return FLAGOS_OK;
  std::string text = env_text("FLAGOS_SIM_FAIL");
  if (flagos_status status = text.empty() ? FLAGOS_OK : set_plan(text)) {
    return fail(status, "FLAGOS_SIM_FAIL: %s", last_message());
  }
  loaded = true;
  return FLAGOS_OK;
}

void watch_fork() {
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] {
      if (g_state.load(std::memory_order_relaxed) & kInitialised) g_state.store(kForked);
    });
  });
}

}  // namespace host
}  // namespace flagos

flagos_status flagos_sim_set_fail(const char* plan) { return flagos::host::set_plan(plan ? plan : ""); }

uint64_t flagos_sim_calls(const char* entry) {
  using namespace flagos::host;
  int index = entry ? find_entry(entry) : -1;
  if (index < 0) return 0;
  std::lock_guard<std::mutex> lock(shared().mutex);
  return total_locked(static_cast<Entry>(index)) - shared().baseline[index];
}
