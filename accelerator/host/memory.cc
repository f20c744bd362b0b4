// memory.cc: the double-mapped pool of each simulated device, and pinned host memory (memory.h).
//
// A block is [data | canary, kCanary bytes and the rest of the page | guard page]. free() checks the canary, gives the
// pages back to the system, makes the alias unreadable and keeps the addresses out of use for the next kQuarantine
// frees, so that a use after free faults instead of reading someone else's data. Fresh memory holds 0xFF bytes, a NaN
// in every floating type, but only in the first and last kFill bytes (so all of a block up to 2 MiB): filling all of a
// large block would commit memory that the program may never touch, and an algorithm that reads unset memory nearly
// always starts at an end.
#include "host/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "status.h"

namespace flagos {
namespace host {

Pool* g_pools[kMaxDevices] = {};

namespace {

constexpr uint64_t kCanary = 64, kFill = uint64_t{1} << 20;
constexpr unsigned char kCanaryByte = 0xC5;
constexpr size_t kQuarantine = 64;
constexpr size_t kMaxGuarded = 8192;  // a guard page costs two of the 65530 mappings that a process may have
constexpr uint64_t kNoOffset = UINT64_MAX;

uint64_t round_up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

// The canary covers the slack of the last page up to kCanary bytes past it; checking all of a large slack is cheap.
uint64_t canary_end(uint64_t size) { return round_up(size + kCanary, kPage); }

void fill_fresh(char* data, uint64_t n) {
#ifdef MADV_POPULATE_WRITE
  // One call instead of one page fault per page; where the kernel does not know it, the faults do the same.
  uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  if (n > kPage) madvise(reinterpret_cast<void*>(begin), n, MADV_POPULATE_WRITE);
#endif
  memset(data, 0xFF, n);
}

struct Pinned {
  std::shared_mutex mutex;
  std::map<uintptr_t, uint64_t> blocks;
};
Pinned& pinned() {
  static Pinned* instance = new Pinned;
  return *instance;
}

}  // namespace

flagos_status Pool::open(int32_t device, uint64_t limit, bool protect) {
  device_ = device;
  limit_ = limit;
  file_ = memfd_create("flagos-device-memory", MFD_CLOEXEC);
  if (file_ < 0) return fail(FLAGOS_INTERNAL, "memfd_create for flagos:%d: %s", device, strerror(errno));
  // Addresses cost nothing: four times the limit leaves room for guards, quarantine and fragmentation.
  uint64_t span = round_up(limit * 4 + (uint64_t{1} << 30), kPage);
  for (int attempt = 0; attempt < 3; ++attempt, span = round_up(span / 2, kPage)) {
    if (ftruncate(file_, static_cast<off_t>(span)) != 0) continue;
    int flags = MAP_SHARED | MAP_NORESERVE;
    void* front = mmap(nullptr, span, protect ? PROT_NONE : PROT_READ | PROT_WRITE, flags, file_, 0);
    if (front == MAP_FAILED) continue;
    void* back = mmap(nullptr, span, PROT_READ | PROT_WRITE, flags, file_, 0);
    if (back == MAP_FAILED) {
      munmap(front, span);
      continue;
    }
    for (void* p : {front, back}) {
      madvise(p, span, MADV_DONTFORK);  // a child must never write into the parent's device memory
      madvise(p, span, MADV_DONTDUMP);
    }
    device_base_ = reinterpret_cast<uintptr_t>(front);
    alias_base_ = reinterpret_cast<uintptr_t>(back);
    distance_ = alias_base_ - device_base_;
    span_ = span;
    give(0, span);
    return FLAGOS_OK;
  }
  int error = errno;
  ::close(file_);
  file_ = -1;
  return fail(FLAGOS_OUT_OF_MEMORY, "reserving %llu bytes of addresses for flagos:%d: %s (is RLIMIT_AS set?)",
              static_cast<unsigned long long>(span), device, strerror(error));
}

void Pool::close() {
  if (file_ < 0) return;
  munmap(reinterpret_cast<void*>(device_base_), span_);
  munmap(reinterpret_cast<void*>(alias_base_), span_);
  ::close(file_);
  file_ = -1;
  span_ = 0;
}

uint64_t Pool::take(uint64_t span) {
  auto found = free_by_size_.lower_bound({span, 0});
  if (found == free_by_size_.end()) {
    drain(0);
    found = free_by_size_.lower_bound({span, 0});
    if (found == free_by_size_.end()) return kNoOffset;
  }
  uint64_t whole = found->first, offset = found->second;
  free_by_size_.erase(found);
  free_.erase(offset);
  if (whole > span) {
    free_.emplace(offset + span, whole - span);
    free_by_size_.emplace(whole - span, offset + span);
  }
  return offset;
}

void Pool::give(uint64_t offset, uint64_t span) {
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && next->first == offset + span) {
    span += next->second;
    free_by_size_.erase({next->second, next->first});
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      span += previous->second;
      free_by_size_.erase({previous->second, previous->first});
      free_.erase(previous);
    }
  }
  free_.emplace(offset, span);
  free_by_size_.emplace(span, offset);
}

bool Pool::protect_alias(uint64_t offset, uint64_t span, int protection) {
  return mprotect(reinterpret_cast<void*>(alias_base_ + offset), span, protection) == 0;
}

void Pool::drain(size_t keep) {
  while (quarantine_.size() > keep) {
    auto [offset, span] = quarantine_.front();
    quarantine_.pop_front();
    // When the alias cannot be opened again (out of mappings) the addresses are given up, never the checks.
    if (protect_alias(offset, span, PROT_READ | PROT_WRITE)) give(offset, span);
  }
}

flagos_status Pool::allocate(uint64_t size, void** pointer) {
  uint64_t taken = size > limit_ ? size : round_up(size, kPage);
  uint64_t offset = kNoOffset, used;
  Block block{size, 0, false};
  {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    used = used_;
    if (taken <= limit_ && used_ <= limit_ - taken) {
      block.span = canary_end(size) + kPage;
      offset = take(block.span);
      if (offset != kNoOffset) {
        used_ += taken;
        block.guarded = live_.size() < kMaxGuarded;
      }
    }
  }
  if (offset == kNoOffset) {
    return fail(FLAGOS_OUT_OF_MEMORY,
                "malloc: flagos:%d is out of memory: asked for %llu bytes, %llu of %llu in use (FLAGOS_HOST_MEMORY)",
                device_, static_cast<unsigned long long>(size), static_cast<unsigned long long>(used),
                static_cast<unsigned long long>(limit_));
  }
  if (block.guarded) block.guarded = protect_alias(offset + block.span - kPage, kPage, PROT_NONE);
  char* data = reinterpret_cast<char*>(alias_base_ + offset);
  fill_fresh(data, size <= 2 * kFill ? size : kFill);
  if (size > 2 * kFill) fill_fresh(data + size - kFill, kFill);
  memset(data + size, kCanaryByte, canary_end(size) - size);
  std::unique_lock<std::shared_mutex> lock(mutex_);
  live_.emplace(offset, block);
  bytes_ += size;
  *pointer = reinterpret_cast<void*>(device_base_ + offset);
  return FLAGOS_OK;
}

flagos_status Pool::release(void* pointer) {
  uint64_t offset = reinterpret_cast<uintptr_t>(pointer) - device_base_;
  Block block;
  {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    auto found = live_.find(offset);
    if (found == live_.end()) {
      return fail(FLAGOS_INVALID_ARGUMENT,
                  "free: %p is not the start of a live block of flagos:%d (freed twice, or inside a block?)", pointer,
                  device_);
    }
    block = found->second;
    char* data = reinterpret_cast<char*>(alias_base_ + offset);
    for (uint64_t i = block.size, end = canary_end(block.size); i < end; ++i) {
      if (static_cast<unsigned char>(data[i]) == kCanaryByte) continue;
      memset(data + block.size, kCanaryByte, end - block.size);  // reported once; the next free succeeds
      return fail(FLAGOS_INTERNAL,
                  "free: the block of %llu bytes at %p of flagos:%d was written %llu bytes past its end",
                  static_cast<unsigned long long>(block.size), pointer, device_,
                  static_cast<unsigned long long>(i - block.size + 1));
    }
    live_.erase(found);
    used_ -= round_up(block.size, kPage);
    bytes_ -= block.size;
  }
  fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
            static_cast<off_t>(block.span));
  protect_alias(offset, block.span, PROT_NONE);
  std::unique_lock<std::shared_mutex> lock(mutex_);
  quarantine_.emplace_back(offset, block.span);
  drain(kQuarantine);
  return FLAGOS_OK;
}

bool Pool::find(const void* p, uint64_t n, void** base, uint64_t* size) const {
  if (!in_range(p)) return false;
  uint64_t offset = reinterpret_cast<uintptr_t>(p) - device_base_;
  std::shared_lock<std::shared_mutex> lock(mutex_);
  auto found = live_.upper_bound(offset);
  if (found == live_.begin()) return false;
  --found;
  uint64_t inside = offset - found->first;
  if (inside >= found->second.size || n > found->second.size - inside) return false;
  if (base) *base = reinterpret_cast<void*>(device_base_ + found->first);
  if (size) *size = found->second.size;
  return true;
}

void Pool::usage(uint64_t* used, uint64_t* limit, uint64_t* blocks, uint64_t* bytes) const {
  std::shared_lock<std::shared_mutex> lock(mutex_);
  if (used) *used = used_;
  if (limit) *limit = limit_;
  if (blocks) *blocks = live_.size();
  if (bytes) *bytes = bytes_;
}

int32_t device_of(const void* p) {
  for (int32_t i = 0; i < kMaxDevices && g_pools[i]; ++i) {
    if (g_pools[i]->in_range(p)) return i;
  }
  return -1;
}

int32_t device_of_alias(const void* p) {
  for (int32_t i = 0; i < kMaxDevices && g_pools[i]; ++i) {
    if (g_pools[i]->in_alias(p)) return i;
  }
  return -1;
}

flagos_status pinned_allocate(uint64_t size, void** pointer) {
  void* memory = nullptr;
  if (size > (uint64_t{1} << 47) || posix_memalign(&memory, kPage, size) != 0) {
    return fail(FLAGOS_OUT_OF_MEMORY, "host_malloc: the host has no %llu bytes left",
                static_cast<unsigned long long>(size));
  }
  std::unique_lock<std::shared_mutex> lock(pinned().mutex);
  pinned().blocks.emplace(reinterpret_cast<uintptr_t>(memory), size);
  *pointer = memory;
  return FLAGOS_OK;
}

flagos_status pinned_release(void* pointer) {
  {
    std::unique_lock<std::shared_mutex> lock(pinned().mutex);
    if (pinned().blocks.erase(reinterpret_cast<uintptr_t>(pointer)) == 0) {
      return fail(FLAGOS_INVALID_ARGUMENT, "host_free: %p does not come from host_malloc, or was freed before",
                  pointer);
    }
  }
  ::free(pointer);
  return FLAGOS_OK;
}

bool pinned_find(const void* p, void** base, uint64_t* size) {
  uintptr_t address = reinterpret_cast<uintptr_t>(p);
  std::shared_lock<std::shared_mutex> lock(pinned().mutex);
  auto found = pinned().blocks.upper_bound(address);
  if (found == pinned().blocks.begin()) return false;
  --found;
  if (address - found->first >= found->second) return false;
  *base = reinterpret_cast<void*>(found->first);
  *size = found->second;
  return true;
}

}  // namespace host
}  // namespace flagos
