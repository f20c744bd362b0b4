// free_list.h: memory for objects of one size that come and go with every operator.
#pragma once

#include <c10/macros/Macros.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "csrc/runtime/fork.h"
#include "csrc/runtime/spin_lock.h"

namespace flagos {

// Every thread keeps some pieces. Forward passes take what backward passes free on another thread, so that pieces move
// between threads, many at a time, through a store that all of them share. Tag: one list per type that uses it.
template <class Tag, size_t kSize>
class FreeList {
 public:
  static void* take() {
    Own* own = threads_own();
    if (C10_LIKELY(own != nullptr && (own->count != 0 || refill(*own)))) return own->piece[--own->count];
    return ::operator new(kSize);
  }
  static void give(void* piece) noexcept {
    Own* own = threads_own();
    if (C10_UNLIKELY(own == nullptr || (own->count == kMost && !spill(*own)))) return ::operator delete(piece);
    own->piece[own->count++] = piece;
  }

 private:
  static constexpr size_t kBatch = 64, kMost = 2 * kBatch;
  static constexpr size_t kMostShared = size_t{1} << 14;

  struct Own {
    void* piece[kMost];
    size_t count = 0;
    ~Own() {
      while (count != 0) ::operator delete(piece[--count]);
      state = Thread{nullptr, true};
    }
  };
  struct Thread {
    Own* own;
    bool ended;
  };
  struct Shared {
    SpinLock lock;
    std::vector<void*> pieces;
  };

  // Null while the thread ends.
  static Own* threads_own() noexcept {
    if (C10_LIKELY(state.own != nullptr)) return state.own;
    if (state.ended) return nullptr;
    thread_local const std::unique_ptr<Own> own(new (std::nothrow) Own);  // a library's thread-locals have little room
    return state.own = own.get();
  }
  static Shared& shared() {
    static Shared& store = *new Shared{{}, {}};  // never destroyed: storages may outlive statics
    return store;
  }
  // Neither this nor spill in a forked child, where somebody may have held the lock.
  static bool refill(Own& own) noexcept {
    if (in_bad_fork()) return false;
    Shared& store = shared();
    const std::lock_guard<SpinLock> guard(store.lock);
    const size_t n = std::min(kBatch, store.pieces.size());
    std::copy(store.pieces.end() - n, store.pieces.end(), own.piece);
    store.pieces.resize(store.pieces.size() - n);
    own.count = n;
    return n != 0;
  }
  // Keeps the younger half, which the processor's cache still knows.
  static bool spill(Own& own) noexcept {
    if (in_bad_fork()) return false;
    Shared& store = shared();
    const std::lock_guard<SpinLock> guard(store.lock);
    if (store.pieces.size() >= kMostShared) return false;
    if (store.pieces.capacity() == 0) store.pieces.reserve(kMostShared + kBatch);
    store.pieces.insert(store.pieces.end(), own.piece, own.piece + kBatch);
    std::copy(own.piece + kBatch, own.piece + kMost, own.piece);
    own.count -= kBatch;
    return true;
  }

  static __thread Thread state __attribute__((tls_model("initial-exec")));
};

template <class Tag, size_t kSize>
__thread typename FreeList<Tag, kSize>::Thread FreeList<Tag, kSize>::state = {nullptr, false};

}  // namespace flagos
