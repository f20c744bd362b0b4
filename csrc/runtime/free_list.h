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
// between threads, many at a time, through a store that all of them share. New ones are made many at a time, side by
// side: one by one they would lie scattered between other objects, each in another line and page of the processor's
// caches. They are never returned to malloc. Tag: one list per type that uses it.
template <class Tag, size_t kSize>
class FreeList {
 public:
  static void* take() {
    Own* own = threads_own();
    if (C10_LIKELY(own != nullptr && (own->count != 0 || refill(*own)))) return own->piece[--own->count];
    return make(1);
  }
  static void give(void* piece) noexcept {
    Own* own = threads_own();
    if (C10_UNLIKELY(own == nullptr)) return give_shared(&piece, 1);
    if (C10_UNLIKELY(own->count == kMost)) spill(*own);
    own->piece[own->count++] = piece;
  }

 private:
  static constexpr size_t kBatch = 64, kMost = 2 * kBatch, kAlignment = 64;

  struct Own {
    void* piece[kMost];
    size_t count = 0;
    ~Own() {
      give_shared(piece, count);
      state = Thread{nullptr, true};
    }
  };
  struct Thread {
    Own* own;
    bool ended;
  };
  struct Shared {
    SpinLock lock;
    std::vector<void*> pieces;  // has room for all that were ever made
    size_t made = 0;
  };

  // Null while the thread ends.
  static Own* threads_own() noexcept {
    if (C10_LIKELY(state.own != nullptr)) return state.own;
    if (state.ended) return nullptr;
    thread_local const std::unique_ptr<Own> own(new (std::nothrow) Own);  // a library's thread-locals have little room
    return state.own = own.get();
  }
  static Shared& shared() {
    static Shared& store = *new Shared();  // never destroyed: storages may outlive statics
    return store;
  }
  // The store is not touched in a forked child, where somebody may have held the lock.
  static void* make(size_t n) {
    if (!in_bad_fork()) {
      Shared& store = shared();
      const std::lock_guard<SpinLock> guard(store.lock);
      store.made += n;
      if (store.pieces.capacity() < store.made) store.pieces.reserve(std::max(store.made, 2 * store.pieces.capacity()));
    }
    return ::operator new(n * kSize, std::align_val_t(kAlignment));
  }
  static bool refill(Own& own) {
    if (in_bad_fork()) return false;
    {
      Shared& store = shared();
      const std::lock_guard<SpinLock> guard(store.lock);
      own.count = std::min(kBatch, store.pieces.size());
      std::copy(store.pieces.end() - own.count, store.pieces.end(), own.piece);
      store.pieces.resize(store.pieces.size() - own.count);
    }
    if (own.count != 0) return true;
    auto* const first = static_cast<std::byte*>(make(kBatch));
    for (size_t i = 0; i < kBatch; i++) own.piece[i] = first + (kBatch - 1 - i) * kSize;
    own.count = kBatch;
    return true;
  }
  static void give_shared(void** pieces, size_t n) noexcept {
    if (in_bad_fork()) return;
    Shared& store = shared();
    const std::lock_guard<SpinLock> guard(store.lock);
    store.pieces.insert(store.pieces.end(), pieces, pieces + n);
  }
  // Keeps the younger half, which the processor's cache still knows.
  static void spill(Own& own) noexcept {
    give_shared(own.piece, kBatch);
    std::copy(own.piece + kBatch, own.piece + kMost, own.piece);
    own.count -= kBatch;
  }

  static __thread Thread state __attribute__((tls_model("initial-exec")));
};

template <class Tag, size_t kSize>
__thread typename FreeList<Tag, kSize>::Thread FreeList<Tag, kSize>::state = {nullptr, false};

// A base of T that takes its objects, of kSize bytes, from a list of their own.
template <class T, size_t kSize>
struct FromFreeList {
  static void* operator new(size_t) { return FreeList<T, kSize>::take(); }
  static void operator delete(void* piece) noexcept { FreeList<T, kSize>::give(piece); }
};

}  // namespace flagos
