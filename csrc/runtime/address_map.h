// address_map.h: from the address at which a block starts to its Block, in three loads and without a lock.
//
// Some CPU kernels allocate through c10::Allocator::raw_allocate, which demands that the address itself identifies the
// memory when it is freed. So where native kernels are CPU kernels, a DataPtr's context is the address, not the Block.
#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>

namespace flagos {

struct Block;

class AddressMap {
 public:
  // Makes room for blocks in [begin, begin + size).
  void cover(const void* begin, size_t size) {
    const auto first = reinterpret_cast<uintptr_t>(begin), last = first + size - 1;
    TORCH_CHECK(last >> kAddressBits == 0, "flagos: address ", begin, " is beyond ", kAddressBits, " bits");
    std::lock_guard<std::mutex> lock(mutex_);
    for (uintptr_t leaf = first >> kLeafShift; leaf <= last >> kLeafShift; leaf++) {
      auto& middle_slot = root_[leaf >> kLevelBits];
      Middle* middle = middle_slot.load(std::memory_order_relaxed);
      if (middle == nullptr) middle_slot.store(middle = make<Middle>(), std::memory_order_release);
      auto& leaf_slot = (*middle)[leaf % kLevelSize];
      if (leaf_slot.load(std::memory_order_relaxed) == nullptr)
        leaf_slot.store(make<Leaf>(), std::memory_order_release);
    }
  }
  // `address` lies in a covered range.
  void set(const void* address, Block* block) {
    (*leaf(address))[unit(address)].store(block, std::memory_order_relaxed);
  }
  // The block that starts at `address`; nullptr for memory that was never covered.
  Block* find(const void* address) const {
    const Leaf* l = leaf(address);
    return l == nullptr ? nullptr : (*l)[unit(address)].load(std::memory_order_relaxed);
  }

 private:
  static constexpr int kAddressBits = 48, kUnitBits = 9, kLevelBits = 13, kLeafShift = kUnitBits + kLevelBits;
  static constexpr size_t kLevelSize = size_t{1} << kLevelBits;
  using Leaf = std::array<std::atomic<Block*>, kLevelSize>;
  using Middle = std::array<std::atomic<Leaf*>, kLevelSize>;

  // Zeroed memory that costs nothing until it is written.
  template <class T>
  static T* make() {
    void* memory = std::calloc(1, sizeof(T));
    TORCH_CHECK(memory != nullptr, "flagos: no host memory for the address map");
    return static_cast<T*>(memory);
  }
  static size_t unit(const void* address) { return (reinterpret_cast<uintptr_t>(address) >> kUnitBits) % kLevelSize; }
  Leaf* leaf(const void* address) const {
    const auto n = reinterpret_cast<uintptr_t>(address) >> kLeafShift;
    if ((n >> (2 * kLevelBits)) != 0) return nullptr;
    const Middle* middle = root_[n >> kLevelBits].load(std::memory_order_acquire);
    return middle == nullptr ? nullptr : (*middle)[n % kLevelSize].load(std::memory_order_acquire);
  }

  std::mutex mutex_;
  std::array<std::atomic<Middle*>, kLevelSize> root_{};
};

}  // namespace flagos
