// alloc_front_test.cc: checks and a benchmark of the allocator's front over a native allocator made for the purpose,
// without CUDA. The statistics are compared with those of the same calls without a front.
//
// Usage: alloc_front_test [bench | roundup]. Prints one line per check; the exit status is the number of failures.
#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "csrc/runtime/cuda_alloc_front.h"
#include "tests/unit/alloc_front_fake.h"
#include "tests/unit/expect.h"

namespace flagos {
extern bool g_in_bad_fork;
bool g_in_bad_fork = false;  // platform.cc's; set here by the check that forks
}  // namespace flagos

namespace {

using c10::StreamId;

std::string difference(const Stats& a, const Stats& b) {
  const std::pair<Kind, const char*> kinds[] = {{&Stats::allocation, "allocation"},
                                                {&Stats::active, "active"},
                                                {&Stats::allocated_bytes, "allocated_bytes"},
                                                {&Stats::active_bytes, "active_bytes"},
                                                {&Stats::requested_bytes, "requested_bytes"}};
  std::string out;
  for (const auto& [kind, name] : kinds) {
    for (size_t pool = 0; pool < 3; pool++) {
      const auto &x = (a.*kind)[pool], &y = (b.*kind)[pool];
      const std::pair<const char*, std::pair<int64_t, int64_t>> fields[] = {{"current", {x.current, y.current}},
                                                                            {"peak", {x.peak, y.peak}},
                                                                            {"allocated", {x.allocated, y.allocated}},
                                                                            {"freed", {x.freed, y.freed}}};
      for (const auto& [field, values] : fields) {
        if (values.first == values.second) continue;
        out += std::string(" ") + name + "[" + std::to_string(pool) + "]." + field + " " +
               std::to_string(values.first) + " instead of " + std::to_string(values.second) + ";";
      }
    }
  }
  return out;
}

// A front over a native allocator. Neither is ever destroyed, like the real ones.
struct Fixture {
  Fake& native = *(fake = new Fake());
  AllocFront& front = *new AllocFront(native, 2);
  Fixture() {
    native.when_short = [this] { front.try_flush(native.current); };
  }
  DataPtr get(size_t n, StreamId stream = 0, DeviceIndex device = 0) {
    native.current = device;
    return front.allocate(n, device, stream);
  }
};

void reuse_in_a_class() {
  Fixture f;
  void* first = f.get(1000).get();
  DataPtr second = f.get(700);
  EXPECT(second.get() == first && second.get_context() == first && f.native.calls == 1);
  EXPECT(f.get(1000).get() != first && f.native.calls == 2);
  EXPECT(f.get(1025).get() != first && f.native.calls == 3);  // another class
  EXPECT(f.get(0).get() == nullptr && f.native.calls == 3);
  f.get(AllocFront::kLargest + 1).clear();
  EXPECT(f.native.living() == 3);  // too large: not kept
}

void large_classes_share_a_list() {
  Fixture f;
  std::vector<void*> address(AllocFront::kMostLarge);
  std::vector<DataPtr> held;
  const auto size = [](size_t i) { return kMiB + 512 * i + 1; };
  for (size_t i = 0; i < address.size(); i++) address[i] = held.emplace_back(f.get(size(i))).get();
  held.clear();
  const size_t calls = f.native.calls;
  size_t same = 0;
  for (size_t i = 0; i < address.size(); i++) same += held.emplace_back(f.get(size(i) + 300)).get() == address[i];
  EXPECT(same == address.size() && f.native.calls == calls);
}

void large_blocks_make_way() {
  Fixture f;
  f.get(512).clear();
  const auto hold = [&f](int64_t count) {
    std::vector<DataPtr> held;
    for (int64_t i = 0; i < count; i++) held.push_back(f.get(2 * kMiB));
  };
  hold(AllocFront::kMostLarge + 1);
  EXPECT(f.native.living() == 2);  // the last one, and the small one
  hold(AllocFront::kMostLarge - 1);
  f.get(3 * kMiB).clear();
  EXPECT(f.native.living() == AllocFront::kMostLarge);
  hold(AllocFront::kMostLarge);
  f.get(3 * kMiB).clear();
  EXPECT(f.native.living() == 1);
}

void a_new_large_class_gives_the_others_back() {
  Fixture f;
  f.get(512).clear();
  f.get(2 * kMiB).clear();
  f.get(2 * kMiB).clear();
  EXPECT(f.native.living() == 2 && f.native.calls == 2);
  DataPtr other = f.get(kMiB + 512);
  EXPECT(f.native.living() == 2);  // the small one still waits
  f.get(2 * kMiB).clear();
  EXPECT(f.native.calls == 4);
}

// Two threads in the native allocator at once: what a block takes cannot be told, and it is not kept.
void a_large_block_of_unknown_size() {
  Fixture f;
  f.native.capacity = 0;
  f.native.when_short = [&] {
    f.native.capacity = size_t{1} << 40;
    f.native.allocate(3 * kMiB).release_context();  // another thread's
  };
  f.get(2 * kMiB).clear();
  EXPECT(f.native.living() == 1);
  f.get(2 * kMiB).clear();
  EXPECT(f.native.living() == 2);
}

void streams_and_devices_are_apart() {
  Fixture f;
  void* a = f.get(512, 1).get();
  void* b = f.get(512, 2).get();
  void* c = f.get(512, 1, 1).get();
  EXPECT(a != b && b != c && a != c);
  EXPECT(f.get(512, 1).get() == a && f.get(512, 2).get() == b && f.get(512, 1, 1).get() == c);
  EXPECT(f.get(512, 1, 1).device() == c10::Device(c10::kCUDA, 1));
  DataPtr held = f.get(512, 1);
  f.get(512, 2).clear();
  held.clear();  // freed while another stream is in use: it still belongs to its own
  EXPECT(f.get(512, 1).get() == a && f.native.calls == 3);
}

void many_streams() {
  Fixture f;
  for (int round = 0; round < 3; round++) {
    for (StreamId s = 0; s < 40; s++) f.get(512, s).clear();
  }
  EXPECT(f.native.living() == AllocFront::kMostStreams);
  DataPtr held = f.get(512, 39);
  for (StreamId s = 0; s < 30; s++) f.get(512, s).clear();
  held.clear();  // its lists were given to another stream meanwhile
  const size_t calls = f.native.calls;
  f.get(512, 39).clear();
  EXPECT(f.native.calls == calls && f.native.living() == AllocFront::kMostStreams);
  f.front.flush();
  EXPECT(f.native.living() == 0);
}

void freed_by_another_thread() {
  Fixture f;
  DataPtr p = f.get(512);
  void* address = p.get();
  std::thread([&] { p.clear(); }).join();
  EXPECT(f.native.living() == 1 && f.get(512).get() == address);
}

void recorded_blocks_are_not_kept() {
  Fixture f;
  DataPtr p = f.get(512, 1), q = f.get(512, 1);
  f.front.record_stream(p.get(), 2);
  f.front.record_stream(q.get(), 1);  // its own stream: nothing to wait for
  p.clear();
  EXPECT(f.native.living() == 1);
  q.clear();
  EXPECT(f.native.living() == 1);
}

void bounded() {
  Fixture f;
  std::vector<DataPtr> all;
  for (int64_t i = 0; i < AllocFront::kMostBlocks + 36; i++) all.push_back(f.get(kMiB));
  all.clear();
  EXPECT(f.native.living() == AllocFront::kMostBlocks);
}

void out_of_memory_flushes() {
  Fixture f;
  f.native.capacity = 4 * kMiB;
  auto fill = [&] {
    std::vector<DataPtr> all;
    for (int i = 0; i < 4; i++) all.push_back(f.get(kMiB, i));
  };
  std::thread(fill).join();
  EXPECT(f.native.living() == 4);
  EXPECT(f.get(4 * kMiB).get() != nullptr);  // the callback gave all of them back, and the large one is native
  EXPECT(f.native.living() == 0);
  fill();
  f.native.when_short = [] {};  // as if the lock had been taken: the front tries again itself
  EXPECT(f.front.allocate_native(2 * kMiB).get() != nullptr);
  fill();
  bool thrown = false;
  try {
    f.get(5 * kMiB);
  } catch (const c10::OutOfMemoryError&) {
    thrown = true;
  }
  EXPECT(thrown);
}

void steps_aside() {
  Fixture f;
  f.get(512).clear();
  DataPtr held = f.get(1024);
  f.front.step_aside();
  f.front.step_aside();
  EXPECT(f.native.living() == 1);
  held.clear();  // freed meanwhile: not kept
  f.get(512).clear();
  EXPECT(f.native.living() == 0);
  f.front.resume();
  f.get(512).clear();
  EXPECT(f.native.living() == 0);
  f.front.resume();
  f.get(512).clear();
  EXPECT(f.native.living() == 1);
}

struct Profiler final : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t, size_t, size_t, c10::Device) override {}
  bool memoryProfilingEnabled() const override { return true; }
};

void steps_aside_for_the_memory_profiler() {
  Fixture f;
  f.get(512).clear();
  const size_t calls = f.native.calls;
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<Profiler>());
    f.get(512).clear();
    f.get(512).clear();
    EXPECT(f.native.calls == calls + 2 && f.native.living() == 0);
  }
  f.get(512).clear();
  EXPECT(f.native.living() == 1);
}

void raw_interface() {
  Fixture f;
  DataPtr p = f.get(600);
  p.clear();
  p = f.get(520);
  void* raw = p.release_context();
  fake->free(raw);  // the native deleter: the front does not hear of it
  EXPECT(f.native.living() == 0);
  DataPtr again = f.get(600);  // the native allocator uses the address again
  EXPECT(again.get() == raw && difference(f.front.stats(0), f.front.stats(0)).empty());
  EXPECT(f.front.stats(0).requested_bytes[0].current == 600);
  f.front.release(again.release_context());  // raw_delete
  EXPECT(f.native.living() == 1);
  f.front.release(f.front.allocate_native(512).release_context());  // not the front's
  EXPECT(f.native.living() == 1);
}

void true_requests() {
  Fixture f;
  f.get(1000).clear();
  DataPtr p = f.get(600), q = f.get(512);
  const auto requests = f.front.requests();
  EXPECT(requests.size() == 1 && requests.count(reinterpret_cast<uintptr_t>(p.get())) == 1);
  EXPECT(requests.begin()->second == 600);
}

// A release inside a native call, while another thread holds the front's lock and waits for the native one.
void release_under_the_native_lock() {
  Fixture f;
  DataPtr inner = f.get(512);
  f.native.capacity = f.native.used;
  std::thread other;
  f.native.when_short = [&] {
    other = std::thread([&] { f.front.stats(0); });
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    inner.clear();
    f.native.capacity = size_t{1} << 40;
  };
  DataPtr p = f.get(1024);
  other.join();
  EXPECT(p.get() != nullptr && f.native.living() == 2);
  EXPECT(f.front.stats(0).allocation[0].current == 1);
  f.front.flush();
  EXPECT(f.native.living() == 1);
}

void nothing_happens_in_a_forked_child() {
  Fixture f;
  DataPtr p = f.get(512);
  f.get(1024).clear();
  const pid_t child = fork();
  if (child == 0) {
    flagos::g_in_bad_fork = true;
    p.clear();
    f.front.flush();
    f.front.stats(0);
    _exit(f.native.live.size() == 2 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// Random calls; `look` says how often the statistics are compared, because looking must not be what keeps them right.
void statistics(unsigned seed, int look) {
  Fixture f;
  std::mt19937 random(seed);
  const auto roll = [&](int n) { return static_cast<int>(random() % n); };
  struct Item {
    DataPtr data;
    size_t n;
    DeviceIndex device;
  };
  std::vector<Item> items;
  Stats absent[2];
  int aside = 0;
  const auto drop = [&](size_t i) {
    add(absent[items[i].device], items[i].n, false);
    items[i].data.clear();
    items.erase(items.begin() + static_cast<std::ptrdiff_t>(i));
  };
  for (int step = 0; step < 20000; step++) {
    const DeviceIndex device = static_cast<DeviceIndex>(roll(4) == 0);
    const int what = roll(100);
    if (what < 48) {
      const size_t n = what < 40 ? 1 + roll(3000) : what < 46 ? 1 + roll(kMiB) : kMiB + 1 + roll(kMiB);
      DataPtr data;
      f.native.current = device;
      data = roll(8) == 0 ? f.front.allocate_native(n) : f.front.allocate(n, device, roll(3));
      add(absent[device], n, true);
      items.push_back({std::move(data), n, device});
    } else if (what < 95 && !items.empty()) {
      drop(roll(static_cast<int>(items.size())));
    } else if (what == 95) {
      f.front.flush(static_cast<DeviceIndex>(roll(3) - 1));
    } else if (what == 96 && !items.empty()) {
      f.front.record_stream(items[roll(static_cast<int>(items.size()))].data.get(), 7);
    } else if (what == 97 && roll(5) == 0) {
      f.front.reset_peak(device);
      for (Kind k : {&Stats::allocation, &Stats::active, &Stats::allocated_bytes, &Stats::active_bytes,
                     &Stats::requested_bytes}) {
        for (auto& stat : (absent[device].*k)) stat.reset_peak();
        for (auto& stat : (f.native.totals[device].*k)) stat.reset_peak();
      }
      f.front.reset_peak(device);
    } else if (what == 98 && roll(5) == 0) {
      for (Kind k : {&Stats::allocation, &Stats::active, &Stats::allocated_bytes, &Stats::active_bytes,
                     &Stats::requested_bytes}) {
        for (auto& stat : (absent[device].*k)) stat.reset_accumulated();
        for (auto& stat : (f.native.totals[device].*k)) stat.reset_accumulated();
      }
      f.front.reset_accumulated(device);
    } else if (what == 99 && roll(10) == 0) {
      aside == 0 ? f.front.step_aside() : f.front.resume();
      aside ^= 1;
    }
    if (step % 2000 == 1999) {
      while (items.size() > 20) drop(items.size() - 1);
    }
    if (step % look != look - 1) continue;
    for (DeviceIndex d = 0; d < 2; d++) {
      const std::string wrong = difference(f.front.stats(d), absent[d]);
      if (wrong.empty()) continue;
      failures++;
      std::printf("FAIL statistics seed %u step %d device %d:%s\n", seed, step, d, wrong.c_str());
      return;
    }
  }
}

void statistics_are_those_without_a_front() {
  for (unsigned seed = 0; seed < 12; seed++) statistics(seed, seed % 3 == 0 ? 1 : seed % 3 == 1 ? 97 : 5000);
}

// Peaks while several threads share a device: between what one thread surely held and the sum of all that may have
// been.
void threads() {
  Fixture f;
  f.native.capacity = 24 * kMiB;
  constexpr int kThreads = 4;
  std::vector<std::thread> all;
  for (int t = 0; t < kThreads; t++) {
    all.emplace_back([&, t] {
      std::mt19937 random(t);
      std::vector<DataPtr> mine;
      for (int i = 0; i < 40000; i++) {
        if (random() % 2 == 0 && mine.size() < 20) {
          const size_t n = random() % 50 == 0 ? kMiB + 5 : 1 + random() % 40000;
          try {
            mine.push_back(random() % 9 == 0 ? f.front.allocate_native(n) : f.front.allocate(n, 0, random() % 2));
          } catch (const c10::OutOfMemoryError&) {
            mine.clear();
          }
        } else if (!mine.empty()) {
          mine.erase(mine.begin() + static_cast<std::ptrdiff_t>(random() % mine.size()));
        }
        if (i % 500 == 0) f.front.stats(0);
        if (i % 3000 == 0) f.front.flush();
        if (i % 7000 == 0) f.front.step_aside(), f.front.resume();
      }
    });
  }
  for (auto& thread : all) thread.join();
  const Stats stats = f.front.stats(0);
  for (Kind k :
       {&Stats::allocation, &Stats::active, &Stats::allocated_bytes, &Stats::active_bytes, &Stats::requested_bytes}) {
    for (const auto& stat : (stats.*k)) EXPECT(stat.current == 0 && stat.allocated == stat.freed);
  }
  EXPECT(stats.allocated_bytes[0].peak <= static_cast<int64_t>(f.native.capacity));
  f.front.flush();
  EXPECT(f.native.living() == 0);
}

// With roundup_power2_divisions in PYTORCH_ALLOC_CONF the classes would be wrong.
void nothing_is_kept_when_sizes_are_rounded_otherwise() {
  Fixture f;
  for (size_t n : {512, 700, 5000, 100000}) f.get(n).clear();
  EXPECT(f.native.living() == 0);
}

void bench() {
  Fixture f;
  using Clock = std::chrono::steady_clock;
  constexpr int kCalls = 2000000;
  f.get(4096).clear();
  const auto start = Clock::now();
  for (int i = 0; i < kCalls; i++) f.front.allocate(4096, 0, 0).clear();
  const double ns = std::chrono::duration<double, std::nano>(Clock::now() - start).count() / kCalls;
  std::printf("front: allocate and free %.1f ns\n", ns);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "bench") return bench(), 0;
  const std::pair<const char*, void (*)()> checks[] = {
      {"reuse in a class", reuse_in_a_class},
      {"large classes share a list", large_classes_share_a_list},
      {"large blocks make way", large_blocks_make_way},
      {"a new large class gives the others back", a_new_large_class_gives_the_others_back},
      {"a large block of unknown size", a_large_block_of_unknown_size},
      {"streams and devices are apart", streams_and_devices_are_apart},
      {"many streams", many_streams},
      {"freed by another thread", freed_by_another_thread},
      {"recorded blocks are not kept", recorded_blocks_are_not_kept},
      {"bounded", bounded},
      {"out of memory flushes", out_of_memory_flushes},
      {"steps aside", steps_aside},
      {"steps aside for the memory profiler", steps_aside_for_the_memory_profiler},
      {"raw interface", raw_interface},
      {"true requests", true_requests},
      {"release under the native lock", release_under_the_native_lock},
      {"nothing happens in a forked child", nothing_happens_in_a_forked_child},
      {"statistics are those without a front", statistics_are_those_without_a_front},
      {"threads", threads},
  };
  const std::pair<const char*, void (*)()> rounded[] = {
      {"nothing is kept when sizes are rounded otherwise", nothing_is_kept_when_sizes_are_rounded_otherwise}};
  const auto run = [](const auto& check) {
    const int before = failures;
    check.second();
    std::printf("%s %s\n", failures == before ? "ok" : "not ok", check.first);
    std::fflush(stdout);
  };
  if (mode == "roundup") {
    for (const auto& check : rounded) run(check);
  } else {
    for (const auto& check : checks) run(check);
  }
  return failures;
}
