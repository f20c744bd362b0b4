// last_ops.h: the last operators of every thread, for errors that surface long after their cause. Always on: a call
// stores one pointer into a ring of its thread.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace flagos {

struct LastOps {
  static constexpr unsigned kLength = 16;
  const std::string* names[kLength];  // of the routing table, which is never freed
  unsigned count;                     // of all calls of this thread
};
extern __thread LastOps last_ops __attribute__((tls_model("initial-exec")));

// Another thread may read meanwhile: it then sees the call before or after this one.
inline void remember_op(const std::string& name) {
  LastOps& ring = last_ops;
  __atomic_store_n(&ring.names[ring.count++ % LastOps::kLength], &name, __ATOMIC_RELAXED);
}

// The calling thread's ring joins those that last_ops_by_thread() reads, until the object dies with the thread.
class SharedLastOps {
 public:
  SharedLastOps();
  SharedLastOps(const SharedLastOps&) = delete;
  SharedLastOps& operator=(const SharedLastOps&) = delete;
  ~SharedLastOps();
};

struct ThreadOps {
  std::string thread;              // its name and id; "" for the calling thread, which comes first
  std::vector<std::string> names;  // newest first
};
std::vector<ThreadOps> last_ops_by_thread();

// "last operators, newest first: mm, add.Tensor x2; of thread pt_autograd_0: ..."; "" when there were none.
std::string last_ops_text();

}  // namespace flagos
