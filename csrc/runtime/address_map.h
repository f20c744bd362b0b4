// address_map.h: from the address at which a block starts to its Block, in two loads and without a lock.
//
// Some CPU kernels allocate through c10::Allocator::raw_allocate, which demands that the address itself identifies the
// memory when it is freed. So where native kernels are CPU kernels, a DataPtr's context is the address, not the Block.
#pragma once

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>

namespace flagos {

struct Block;

// A few windows of address space, each with one entry per 512 bytes. The chip's memory lies close together, so one or
// two windows hold all of it; their tables are reserved address space that becomes memory page by page, as it is
// written.
class AddressMap {
 public:
  // Makes room for blocks in [begin, begin + size).
  void cover(const void* begin, size_t size) {
    const auto first = reinterpret_cast<uintptr_t>(begin), last = first + size - 1;
    std::lock_guard<std::mutex> lock(mutex_);
    for (uintptr_t base = first & ~(kSpan - 1); base <= last; base += kSpan) {
      if (window_of(base) == nullptr) add_window(base);
    }
  }
  // `address` lies in a covered range.
  void set(const void* address, Block* block) { entry(*window_of(number(address)), address) = block; }
  // The block that starts at `address`; nullptr for memory that was never covered.
  Block* find(const void* address) const {
    const Window* window = window_of(number(address));
    return window == nullptr ? nullptr : entry(*window, address).load(std::memory_order_relaxed);
  }

 private:
  using Entry = std::atomic<Block*>;
  struct Window {
    uintptr_t base = 0;
    Entry* table = nullptr;
  };
  static constexpr uintptr_t kSpan = uintptr_t{1} << 36;
  static constexpr int kUnitBits = 9;
  static constexpr size_t kWindows = 64;

  static uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }
  static Entry& entry(const Window& window, const void* address) {
    return window.table[(number(address) - window.base) >> kUnitBits];
  }
  const Window* window_of(uintptr_t address) const {
    const size_t n = count_.load(std::memory_order_acquire);
    for (size_t i = 0; i < n; i++) {
      if (address - windows_[i].base < kSpan) return &windows_[i];
    }
    return nullptr;
  }
  void add_window(uintptr_t base) {
    const size_t n = count_.load(std::memory_order_relaxed);
    TORCH_CHECK(n < kWindows, "flagos: device memory is spread over more than ", kWindows, " windows of ", kSpan,
                " bytes");
    void* table = mmap(nullptr, (kSpan >> kUnitBits) * sizeof(Entry), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(table != MAP_FAILED, "flagos: no address space for the map of device memory");
    windows_[n] = {base, static_cast<Entry*>(table)};
    count_.store(n + 1, std::memory_order_release);
  }

  std::array<Window, kWindows> windows_;
  std::atomic<size_t> count_{0};
  std::mutex mutex_;
};

}  // namespace flagos
