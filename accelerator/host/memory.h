// memory.h: memory of the simulated device. Each device has one pool, a sparse memory file mapped twice: at the device
// address, which the host may not touch, and at the host alias, a constant distance away. Nothing is mapped or
// unprotected per access, so there is no moment in which a stray host access to device memory goes unnoticed.
#ifndef FLAGOS_HOST_MEMORY_H_
#define FLAGOS_HOST_MEMORY_H_

#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <shared_mutex>
#include <utility>

#include "flagos.h"

namespace flagos {
namespace host {

constexpr uint64_t kPage = 4096;  // every block starts on a page, so that free() can return its pages
constexpr int32_t kMaxDevices = 16;

class Pool {
 public:
  flagos_status open(int32_t device, uint64_t limit, bool protect);
  void close();

  flagos_status allocate(uint64_t size, void** pointer);
  flagos_status release(void* pointer);

  /// Is the address anywhere in the device range (or, second, in its alias)?
  bool in_range(const void* p) const { return reinterpret_cast<uintptr_t>(p) - device_base_ < span_; }
  bool in_alias(const void* p) const { return reinterpret_cast<uintptr_t>(p) - alias_base_ < span_; }
  char* alias(const void* p) const { return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) + distance_); }

  /// The live block that holds [p, p + n).
  bool find(const void* p, uint64_t n, void** base, uint64_t* size) const;
  void usage(uint64_t* used, uint64_t* limit, uint64_t* blocks, uint64_t* bytes) const;

 private:
  struct Block {
    uint64_t size, span;  // bytes asked for; bytes taken, guard gap included
    bool guarded;
  };
  uint64_t take(uint64_t span);
  void give(uint64_t offset, uint64_t span);
  void drain(size_t keep);
  bool protect_alias(uint64_t offset, uint64_t span, int protection);

  int32_t device_ = 0;
  int file_ = -1;
  uintptr_t device_base_ = 0, alias_base_ = 0, distance_ = 0;
  uint64_t span_ = 0, limit_ = 0;

  mutable std::shared_mutex mutex_;  // guards everything below
  uint64_t used_ = 0, bytes_ = 0;
  std::map<uint64_t, Block> live_;                        // by offset
  std::map<uint64_t, uint64_t> free_;                     // offset -> span, neighbours merged
  std::set<std::pair<uint64_t, uint64_t>> free_by_size_;  // (span, offset)
  std::deque<std::pair<uint64_t, uint64_t>> quarantine_;  // freed blocks, oldest first
};

/// Pools of the initialised devices; NULL beyond.
extern Pool* g_pools[kMaxDevices];
/// The device whose range (or alias) holds `p`, or -1.
int32_t device_of(const void* p);
int32_t device_of_alias(const void* p);

/// Installs (once) the SIGSEGV handler that names the cause when the host touches device memory.
void install_fault_handler();

flagos_status pinned_allocate(uint64_t size, void** pointer);
flagos_status pinned_release(void* pointer);
bool pinned_find(const void* p, void** base, uint64_t* size);

}  // namespace host
}  // namespace flagos
#endif  // FLAGOS_HOST_MEMORY_H_
