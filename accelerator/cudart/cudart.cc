// cudart.cc: opening a cudart-shaped runtime, devices and memory (cudart.h).
#include "cudart.h"

#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "status.h"

namespace flagos {
namespace {

// Attribute numbers of the runtime's DeviceGetAttribute.
enum { kWarpSize = 10, kProcessors = 16, kThreadsPerProcessor = 39, kMajor = 75, kMinor = 76 };
constexpr uint64_t kAlignment = 256;  // what these runtimes promise of Malloc
constexpr int kPeerAlreadyEnabled = 704;

std::atomic<bool> g_forked{false};
void watch_fork() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { g_forked.store(true); }); });
}

flagos_status status_of(int error) {
  switch (error) {
    case 0:
      return FLAGOS_OK;
#define FLAGOS_CUDART_ERROR(number, status) \
  case number:                              \
    return FLAGOS_##status;
#include "errors.inc"
#undef FLAGOS_CUDART_ERROR
    default:
      return FLAGOS_INTERNAL;
  }
}

}  // namespace

Cudart::Current::Current(Cudart& runtime, int32_t device) : runtime_(runtime) {
  int before = -1;
  error = runtime_.fn_.GetDevice(&before);
  if (error || before == device) return;
  error = runtime_.fn_.SetDevice(device);
  if (error) return;
  // Going back to a device that nobody has used yet would create a context there, which costs memory.
  unsigned flags = 0;
  int active = 1;
  if (runtime_.context_state_ && runtime_.context_state_(before, &flags, &active) == 0 && !active) return;
  before_ = before;
}

Cudart::Current::~Current() {
  if (before_ >= 0) runtime_.fn_.SetDevice(before_);
}

flagos_status Cudart::check(int error, const char* entry, const char* function) {
  if (error == 0) return FLAGOS_OK;
  fn_.GetLastError();  // it has been reported: the next caller of the runtime must not see it again
  flagos_status status = status_of(error);
  if (status == FLAGOS_NOT_READY) return status;
  const char* text = fn_.GetErrorString(error);
  return fail(status, "%s: %s%s returned %d: %s", entry, prefix_.c_str(), function, error, text ? text : "?");
}

// ---- lifecycle ------------------------------------------------------------------------------------------------------

flagos_status Cudart::open() {
  std::unique_lock<std::shared_mutex> lock(mutex_);
  if (opened_) return FLAGOS_OK;
  std::string tried;
  for (const CudartNames& names : chip_.names()) {
    Functions functions;
    std::vector<Symbol> symbols;
    enum { OPTIONAL, REQUIRED };
#define FLAGOS_CUDART_SYMBOL(need, name, result, parameters) \
  symbols.push_back({#name, reinterpret_cast<void**>(&functions.name), need == REQUIRED});
#include "symbols.inc"
#undef FLAGOS_CUDART_SYMBOL
    for (Symbol& symbol : symbols) {
      for (const auto& rename : names.renamed) {
        if (symbol.name == rename.first) symbol.name = rename.second;
      }
      symbol.name = names.prefix + symbol.name;
    }
    Library library = open_library(chip_.name, names.candidates, symbols);
    if (library.handle) {
      fn_ = functions;
      prefix_ = names.prefix;
      if (chip_.driver) {
        std::vector<Symbol> state = {{chip_.context_state, reinterpret_cast<void**>(&context_state_), true}};
        open_library(chip_.name, {{chip_.driver, true}}, state);
      }
      opened_ = true;
      return FLAGOS_OK;
    }
    tried += (tried.empty() ? "" : "; ") + library.tried;
  }
  return fail(FLAGOS_UNAVAILABLE, "the runtime library of %s was not found; %s", chip_.name, tried.c_str());
}

flagos_status Cudart::probe() {
  std::string why = chip_.absent();
  if (!why.empty()) return fail(FLAGOS_UNAVAILABLE, "%s", why.c_str());
  return open();
}

flagos_status Cudart::init() {
  if (g_forked.load()) return ready("init");
  if (initialised_.load()) return FLAGOS_OK;
  if (flagos_status status = probe()) return status;
  int count = 0;
  if (flagos_status status = check(fn_.GetDeviceCount(&count), "init", "GetDeviceCount")) return status;
  if (count < 1) return fail(FLAGOS_UNAVAILABLE, "init: %sGetDeviceCount found no device", prefix_.c_str());
  devices_ = count;
  initialised_.store(true);
  watch_fork();
  return FLAGOS_OK;
}

flagos_status Cudart::shutdown() {
  if (flagos_status bad = ready("shutdown")) return bad;
  for (int32_t device = 0; device < devices_; ++device) {
    if (context_state_) {
      unsigned flags = 0;
      int active = 1;
      if (context_state_(device, &flags, &active) == 0 && !active) continue;
    }
    if (flagos_status status = device_sync(device)) return status;
  }
  initialised_.store(false);
  return FLAGOS_OK;
}

flagos_status Cudart::ready(const char* entry) {
  if (g_forked.load(std::memory_order_relaxed)) {
    return fail(
        FLAGOS_FAILED_PRECONDITION,
        "%s: the %s runtime was initialised before this process was forked and cannot be used in the child; use "
        "the spawn start method",
        entry, chip_.name);
  }
  if (initialised_.load(std::memory_order_acquire)) return FLAGOS_OK;
  return fail(FLAGOS_FAILED_PRECONDITION, "%s: called before init() or after shutdown()", entry);
}

flagos_status Cudart::ready(const char* entry, int32_t device) {
  if (flagos_status bad = ready(entry)) return bad;
  if (device >= 0 && device < devices_) return FLAGOS_OK;
  return fail(FLAGOS_INVALID_ARGUMENT, "%s: no device %d, the chip %s has %d", entry, device, chip_.name, devices_);
}

const char* Cudart::last_message() { return flagos::last_message(); }

flagos_status Cudart::device_count(int32_t* count) {
  if (!initialised_.load()) return ready("device_count");
  if (!count) return fail(FLAGOS_INVALID_ARGUMENT, "device_count: count is NULL");
  *count = devices_;
  return FLAGOS_OK;
}

flagos_status Cudart::device_info(int32_t device, flagos_device_info* info) {
  if (flagos_status bad = ready("device_info", device)) return bad;
  if (!info || info->struct_size < sizeof(uint32_t)) {
    return fail(FLAGOS_INVALID_ARGUMENT, "device_info: info is NULL or its struct_size is not set");
  }
  flagos_device_info full = {};
  full.struct_size = info->struct_size;
  std::pair<int, int32_t*> attributes[] = {{kProcessors, &full.multi_processor_count},
                                           {kMajor, &full.major},
                                           {kMinor, &full.minor},
                                           {kWarpSize, &full.warp_size},
                                           {kThreadsPerProcessor, &full.max_threads_per_multi_processor}};
  for (auto [attribute, value] : attributes) {
    int error = fn_.DeviceGetAttribute(value, attribute, device);
    if (flagos_status status = check(error, "device_info", "DeviceGetAttribute")) return status;
  }
  // Larger than any version's structure; only the name at its start is read.
  alignas(16) char properties[16384] = {};
  auto get = fn_.GetDeviceProperties_v2 ? fn_.GetDeviceProperties_v2 : fn_.GetDeviceProperties;
  if (get && get(properties, device) == 0) snprintf(full.name, sizeof(full.name), "%.127s", properties);
  if (!full.name[0]) snprintf(full.name, sizeof(full.name), "%s device", chip_.vendor);
  snprintf(full.arch, sizeof(full.arch), chip_.arch_format, full.major, full.minor);
  for (auto [version, text] :
       {std::pair(fn_.DriverGetVersion, full.driver_version), std::pair(fn_.RuntimeGetVersion, full.runtime_version)}) {
    int number = 0;
    if (version && version(&number) == 0) snprintf(text, 32, "%d.%d", number / 1000, number % 1000 / 10);
  }
  uint64_t free_bytes;
  if (flagos_status status = mem_info(device, &free_bytes, &full.total_memory)) return status;
  full.malloc_alignment = kAlignment;
  memcpy(info, &full, std::min<size_t>(info->struct_size, sizeof(full)));
  return FLAGOS_OK;
}

flagos_status Cudart::mem_info(int32_t device, uint64_t* free_bytes, uint64_t* total_bytes) {
  if (flagos_status bad = ready("mem_info", device)) return bad;
  if (!free_bytes || !total_bytes) return fail(FLAGOS_INVALID_ARGUMENT, "mem_info: an output is NULL");
  Current current(*this, device);
  if (flagos_status bad = check(current.error, "mem_info", "SetDevice")) return bad;
  size_t available = 0, total = 0;
  if (flagos_status bad = check(fn_.MemGetInfo(&available, &total), "mem_info", "MemGetInfo")) return bad;
  *free_bytes = available;
  *total_bytes = total;
  return FLAGOS_OK;
}

flagos_status Cudart::last_error(int32_t device) {
  if (flagos_status bad = ready("last_error", device)) return bad;
  Current current(*this, device);
  if (flagos_status bad = check(current.error, "last_error", "SetDevice")) return bad;
  return check(fn_.GetLastError(), "last_error", "GetLastError");
}

flagos_status Cudart::can_access_peer(int32_t device, int32_t peer, int32_t* can) {
  if (flagos_status bad = ready("can_access_peer", device)) return bad;
  if (flagos_status bad = ready("can_access_peer", peer)) return bad;
  if (!can) return fail(FLAGOS_INVALID_ARGUMENT, "can_access_peer: can is NULL");
  int answer = 0;
  if (device != peer && fn_.DeviceCanAccessPeer) {
    int error = fn_.DeviceCanAccessPeer(&answer, device, peer);
    if (flagos_status status = check(error, "can_access_peer", "DeviceCanAccessPeer")) return status;
  }
  *can = answer != 0;
  return FLAGOS_OK;
}

flagos_status Cudart::enable_peer(int32_t device, int32_t peer) {
  if (flagos_status bad = ready("enable_peer", device)) return bad;
  if (flagos_status bad = ready("enable_peer", peer)) return bad;
  if (device == peer) return fail(FLAGOS_INVALID_ARGUMENT, "enable_peer: device %d is not its own peer", device);
  if (!fn_.DeviceEnablePeerAccess) return fail(FLAGOS_UNSUPPORTED, "enable_peer: the runtime has no such function");
  Current current(*this, device);
  if (flagos_status bad = check(current.error, "enable_peer", "SetDevice")) return bad;
  int error = fn_.DeviceEnablePeerAccess(peer, 0);
  if (error == kPeerAlreadyEnabled) {
    fn_.GetLastError();
    return FLAGOS_OK;
  }
  return check(error, "enable_peer", "DeviceEnablePeerAccess");
}

// ---- memory ---------------------------------------------------------------------------------------------------------

bool Cudart::locate(const void* p, uint64_t* base, Block* block) {
  uintptr_t address = reinterpret_cast<uintptr_t>(p);
  std::shared_lock<std::shared_mutex> lock(mutex_);
  auto found = blocks_.upper_bound(address);
  if (found == blocks_.begin()) return false;
  --found;
  if (address - found->first >= found->second.size) return false;
  *base = found->first;
  *block = found->second;
  return true;
}

flagos_status Cudart::malloc(int32_t device, uint64_t size, void** ptr) {
  if (flagos_status bad = ready("malloc", device)) return bad;
  if (!ptr || size == 0) return fail(FLAGOS_INVALID_ARGUMENT, "malloc: size is 0 or ptr is NULL");
  Current current(*this, device);
  if (flagos_status bad = check(current.error, "malloc", "SetDevice")) return bad;
  void* memory = nullptr;
  if (flagos_status bad = check(fn_.Malloc(&memory, size), "malloc", "Malloc")) {
    size_t available = 0, total = 0;
    // Runtimes reject absurd sizes with other numbers; what the caller needs to hear is that it does not fit.
    if (fn_.MemGetInfo(&available, &total) == 0 && (bad == FLAGOS_OUT_OF_MEMORY || size > total)) {
      std::string reason = flagos::last_message();
      return fail(FLAGOS_OUT_OF_MEMORY, "%s (device %d: asked for %llu bytes, %zu of %zu free)", reason.c_str(), device,
                  static_cast<unsigned long long>(size), available, total);
    }
    return bad;
  }
  std::unique_lock<std::shared_mutex> lock(mutex_);
  blocks_[reinterpret_cast<uintptr_t>(memory)] = {size, device};
  *ptr = memory;
  return FLAGOS_OK;
}

// Forgets the block before the runtime frees it: afterwards another thread may be given the same address.
flagos_status Cudart::release(const char* entry, void* ptr, int32_t device) {
  Block block;
  {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    auto found = blocks_.find(reinterpret_cast<uintptr_t>(ptr));
    if (found == blocks_.end()) {
      return fail(FLAGOS_INVALID_ARGUMENT, "%s: %p is not the start of a live block of this chip", entry, ptr);
    }
    if (found->second.device != device) {
      return fail(FLAGOS_INVALID_ARGUMENT, "%s: %p belongs to device %d, the call names %d (-1 is the host)", entry,
                  ptr, found->second.device, device);
    }
    block = found->second;
    blocks_.erase(found);
  }
  flagos_status status;
  if (device == kHost) {
    status = check(fn_.FreeHost(ptr), entry, "FreeHost");
  } else {
    Current current(*this, device);
    status = check(current.error, entry, "SetDevice");
    if (status == FLAGOS_OK) status = check(fn_.Free(ptr), entry, "Free");
  }
  if (status != FLAGOS_OK) {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    blocks_[reinterpret_cast<uintptr_t>(ptr)] = block;
  }
  return status;
}

flagos_status Cudart::free(int32_t device, void* ptr) {
  if (flagos_status bad = ready("free", device)) return bad;
  return ptr ? release("free", ptr, device) : FLAGOS_OK;
}

flagos_status Cudart::host_malloc(uint64_t size, void** ptr) {
  if (flagos_status bad = ready("host_malloc")) return bad;
  if (!ptr || size == 0) return fail(FLAGOS_INVALID_ARGUMENT, "host_malloc: size is 0 or ptr is NULL");
  if (size >> 47) {
    return fail(FLAGOS_OUT_OF_MEMORY, "host_malloc: %llu bytes are more than a process can address",
                static_cast<unsigned long long>(size));
  }
  constexpr unsigned kPortable = 1;  // pinned for every device
  void* memory = nullptr;
  if (flagos_status bad = check(fn_.HostAlloc(&memory, size, kPortable), "host_malloc", "HostAlloc")) return bad;
  std::unique_lock<std::shared_mutex> lock(mutex_);
  blocks_[reinterpret_cast<uintptr_t>(memory)] = {size, kHost};
  *ptr = memory;
  return FLAGOS_OK;
}

flagos_status Cudart::host_free(void* ptr) {
  if (flagos_status bad = ready("host_free")) return bad;
  return ptr ? release("host_free", ptr, kHost) : FLAGOS_OK;
}

// Answers for what this chip allocated. The runtimes' own query cannot tell the size, and may create a context.
flagos_status Cudart::pointer_info(const void* ptr, flagos_pointer_info* info) {
  if (flagos_status bad = ready("pointer_info")) return bad;
  if (!info || info->struct_size < sizeof(uint32_t)) {
    return fail(FLAGOS_INVALID_ARGUMENT, "pointer_info: info is NULL or its struct_size is not set");
  }
  flagos_pointer_info full = {};
  full.struct_size = info->struct_size;
  full.device = -1;
  uint64_t base;
  Block block;
  if (locate(ptr, &base, &block)) {
    full.kind = block.device == kHost ? FLAGOS_POINTER_PINNED : FLAGOS_POINTER_DEVICE;
    full.device = block.device;
    full.base = reinterpret_cast<void*>(base);
    full.size = block.size;
  }
  memcpy(info, &full, std::min<size_t>(info->struct_size, sizeof(full)));
  return FLAGOS_OK;
}

}  // namespace flagos
