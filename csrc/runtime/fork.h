// fork.h: what a forked child may still do with the device: nothing, and it must be told so clearly.
//
// A child inherits the parent's cache, locks and address ranges but none of the threads or the driver state behind
// them. Every way in raises; every deleter becomes a no-op, because the memory belongs to the parent.
#pragma once

#include <c10/macros/Macros.h>

namespace flagos {

// Marks children of this process from now on. A platform calls it when it first touches its driver; again: no effect.
void watch_forks();

extern bool g_in_bad_fork;  // written once, in the child, before any other code of the child runs
inline bool in_bad_fork() noexcept { return g_in_bad_fork; }
[[noreturn]] void throw_bad_fork();
inline void check_fork() {
  if (C10_UNLIKELY(g_in_bad_fork)) throw_bad_fork();
}

}  // namespace flagos
