// alloc_front_fake.h: a native allocator for alloc_front_test.cc, with the statistics that the real one keeps.
#pragma once

#include <c10/util/Exception.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "csrc/runtime/cuda_alloc_front.h"

using c10::DataPtr;
using c10::DeviceIndex;
using flagos::AllocFront;
using Stats = AllocFront::DeviceStats;
using Kind = std::array<c10::CachingAllocator::Stat, 3> Stats::*;
constexpr size_t kMiB = 1 << 20;

// What a request takes. Large blocks are up to 1 MiB longer: too little to be worth a block of its own.
inline size_t block_size(size_t n) {
  const size_t size = (n + 511) / 512 * 512;
  return n <= kMiB ? size : size + size / 512 * 2654435761u % 2048 * 512;
}

// Enters a block, or takes it off.
inline void add(Stats& s, size_t n, bool more) {
  const size_t size = block_size(n), pools[] = {0, size_t{n <= kMiB ? 1u : 2u}};
  const std::pair<Kind, size_t> parts[] = {{&Stats::allocation, 1},
                                           {&Stats::active, 1},
                                           {&Stats::allocated_bytes, size},
                                           {&Stats::active_bytes, size},
                                           {&Stats::requested_bytes, n}};
  for (const auto& [kind, amount] : parts) {
    for (size_t pool : pools) more ? (s.*kind)[pool].increase(amount) : (s.*kind)[pool].decrease(amount);
  }
}

// Like the native allocator: one recursive lock, a callback under that lock when memory is short, addresses used again.
struct Fake final : AllocFront::Native {
  struct Block {
    size_t nbytes;
    DeviceIndex device;
  };
  std::recursive_mutex mutex;
  std::map<uintptr_t, Block> live;
  std::map<size_t, std::vector<uintptr_t>> idle;
  Stats totals[2];
  size_t used = 0, capacity = size_t{1} << 40, calls = 0;
  uintptr_t next = 0x7f0000000000;
  DeviceIndex current = 0;
  std::function<void()> when_short = [] {};

  DataPtr allocate(size_t nbytes) override;
  void free(void* ptr) override {
    const std::lock_guard<std::recursive_mutex> guard(mutex);
    const auto found = live.find(reinterpret_cast<uintptr_t>(ptr));
    if (found == live.end()) std::printf("FAIL freed twice: %p\n", ptr), std::abort();
    const auto [n, device] = found->second;
    live.erase(found);
    add(totals[device], n, false);
    const size_t size = block_size(n);
    used -= size;
    idle[size].push_back(reinterpret_cast<uintptr_t>(ptr));
  }
  Stats stats(DeviceIndex device) override {
    const std::lock_guard<std::recursive_mutex> guard(mutex);
    return totals[device];
  }
  size_t living() {
    const std::lock_guard<std::recursive_mutex> guard(mutex);
    return live.size();
  }
};

inline Fake* fake;

inline DataPtr Fake::allocate(size_t nbytes) {
  const std::lock_guard<std::recursive_mutex> guard(mutex);
  const DeviceIndex device = current;
  if (nbytes == 0) return DataPtr(nullptr, c10::Device(c10::kCUDA, device));
  calls++;
  const size_t size = block_size(nbytes);
  if (used + size > capacity) when_short();
  TORCH_CHECK_WITH(OutOfMemoryError, used + size <= capacity, "out of memory");
  uintptr_t p = next;
  auto& same = idle[size];
  if (same.empty()) {
    next += size;
  } else {
    p = same.back();
    same.pop_back();
  }
  used += size;
  live[p] = {nbytes, device};
  add(totals[device], nbytes, true);
  void* ptr = reinterpret_cast<void*>(p);
  return DataPtr(ptr, ptr, [](void* q) { fake->free(q); }, c10::Device(c10::kCUDA, device));
}
