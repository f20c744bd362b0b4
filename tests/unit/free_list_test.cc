// free_list_test.cc: checks of csrc/runtime/free_list.h. The exit status is the number of failures.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "csrc/runtime/free_list.h"
#include "tests/unit/expect.h"

namespace flagos {
bool g_in_bad_fork = false;
}

namespace {

constexpr size_t kSize = 96;
struct Tag {};
using List = flagos::FreeList<Tag, kSize>;

void the_last_comes_first() {
  void* a = List::take();
  void* b = List::take();
  EXPECT(a != b);
  List::give(a);
  List::give(b);
  EXPECT(List::take() == b);
  EXPECT(List::take() == a);
  List::give(a);
  List::give(b);
}

void pieces_come_back_from_another_thread() {
  std::vector<void*> pieces;
  for (int i = 0; i < 1000; i++) pieces.push_back(List::take());
  const std::set<void*> known(pieces.begin(), pieces.end());
  EXPECT(known.size() == pieces.size());
  std::thread([&] {
    for (void* piece : pieces) List::give(piece);
  }).join();
  size_t again = 0;
  pieces.clear();
  for (int i = 0; i < 1000; i++) {
    pieces.push_back(List::take());
    again += known.count(pieces.back());
  }
  EXPECT(again >= 1000 - 64);  // less what this thread had before
  for (void* piece : pieces) List::give(piece);
}

void no_piece_has_two_owners() {
  std::mutex mutex;
  std::vector<std::pair<unsigned char*, int>> passed_on;
  std::vector<std::thread> threads;
  int wrong = 0;
  for (int t = 0; t < 8; t++) {
    threads.emplace_back([&, t] {
      std::vector<std::pair<unsigned char*, int>> own;
      for (int i = 0; i < 20000; i++) {
        auto* piece = static_cast<unsigned char*>(List::take());
        std::memset(piece, t, kSize);
        own.emplace_back(piece, t);
        if (own.size() < 50) continue;
        const std::lock_guard<std::mutex> guard(mutex);
        own.swap(passed_on);  // every thread frees what another one took
        for (const auto& [one, owner] : own) {
          for (size_t k = 0; k < kSize; k++) wrong += one[k] != owner;
          List::give(one);
        }
        own.clear();
      }
      for (const auto& one : own) List::give(one.first);
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& one : passed_on) List::give(one.first);
  EXPECT(wrong == 0);
}

void a_thread_that_ends_can_still_give() {
  struct Late {
    void* piece = nullptr;
    ~Late() { List::give(piece); }
  };
  std::thread([] {
    thread_local Late late;  // made before the thread's list, so it goes after it
    late.piece = List::take();
    List::give(List::take());
  }).join();
}

void a_child_leaves_the_shared_pieces_alone() {
  std::vector<void*> pieces;
  for (int i = 0; i < 400; i++) pieces.push_back(List::take());
  const pid_t child = fork();
  if (child == 0) {
    flagos::g_in_bad_fork = true;
    for (void* piece : pieces) List::give(piece);
    for (int i = 0; i < 400; i++) List::take();
    _exit(0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  for (void* piece : pieces) List::give(piece);
}

}  // namespace

int main() {
  the_last_comes_first();
  pieces_come_back_from_another_thread();
  no_piece_has_two_owners();
  a_thread_that_ends_can_still_give();
  a_child_leaves_the_shared_pieces_alone();
  std::printf("free_list_test: %d failures\n", failures);
  return failures;
}
