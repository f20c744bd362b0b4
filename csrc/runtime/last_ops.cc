// last_ops.cc: the list of all threads' rings and their text (last_ops.h).
#include "csrc/runtime/last_ops.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

#include "csrc/runtime/fork.h"

namespace flagos {

__thread LastOps last_ops = {};

namespace {

struct Ring {
  const LastOps* ring;
  std::string thread;
};
struct Rings {
  std::mutex mutex;
  std::vector<Ring> all;
};
Rings& rings() {
  static auto* const r = new Rings;  // threads may end after static objects
  return *r;
}

std::vector<std::string> names_of(const LastOps& ring) {
  std::vector<std::string> names;
  const unsigned count = __atomic_load_n(&ring.count, __ATOMIC_RELAXED);
  for (unsigned back = 1; back <= LastOps::kLength; back++) {
    const auto* name = __atomic_load_n(&ring.names[(count - back) % LastOps::kLength], __ATOMIC_RELAXED);
    if (name == nullptr) break;
    names.push_back(*name);
  }
  return names;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size();) {
    size_t same = i + 1;
    while (same < names.size() && names[same] == names[i]) same++;
    text += (i ? ", " : "") + names[i] + (same - i > 1 ? " x" + std::to_string(same - i) : "");
    i = same;
  }
  return text;
}

}  // namespace

SharedLastOps::SharedLastOps() {
  char name[32] = "";
  pthread_getname_np(pthread_self(), name, sizeof(name));
  auto& r = rings();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.all.push_back({&last_ops, std::string(name) + " " + std::to_string(syscall(SYS_gettid))});
}

SharedLastOps::~SharedLastOps() {
  if (in_bad_fork()) return;
  auto& r = rings();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto mine = [](const Ring& ring) { return ring.ring == &last_ops; };
  r.all.erase(std::remove_if(r.all.begin(), r.all.end(), mine), r.all.end());
}

std::vector<ThreadOps> last_ops_by_thread() {
  std::vector<ThreadOps> threads{{"", names_of(last_ops)}};
  if (in_bad_fork()) return threads;  // the others' memory is gone, and somebody may have held the lock
  auto& r = rings();
  std::lock_guard<std::mutex> lock(r.mutex);
  for (const auto& [ring, thread] : r.all) {
    if (ring != &last_ops) threads.push_back({thread, names_of(*ring)});
  }
  return threads;
}

std::string last_ops_text() {
  std::string text;
  for (const auto& [thread, names] : last_ops_by_thread()) {
    if (names.empty()) continue;
    text += text.empty() ? "last operators, newest first: " : "; ";
    if (!thread.empty()) text += "of thread " + thread + ": ";
    text += joined(names);
  }
  return text;
}

}  // namespace flagos
