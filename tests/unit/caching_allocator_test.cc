// caching_allocator_test.cc: checks and a benchmark of the device memory cache, on the simulated host chip alone.
// chip.
//
// Usage: caching_allocator_test [bench]. Prints one line per check; the exit status is the number of failures.
#include <c10/util/Exception.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>

#include "accelerator/host/sim.h"
#include "csrc/runtime/caching_allocator.h"

using flagos::Block;
using flagos::CachingAllocator;
using flagos::StreamTable;

namespace {

constexpr size_t kMiB = 1 << 20;
int failures = 0;

std::string describe() { return ""; }
template <class... Args>
std::string describe(const char* format, Args... args) {
  char text[256];
  std::snprintf(text, sizeof(text), format, args...);
  return text;
}

#define EXPECT(condition, ...)                                       \
  do {                                                               \
    if (!(condition)) {                                              \
      failures++;                                                    \
      std::printf("FAIL %s:%d %s ", __func__, __LINE__, #condition); \
      std::printf("%s\n", describe(__VA_ARGS__).c_str());            \
    }                                                                \
  } while (0)

const flagos_hal* hal;

struct Fixture {
  StreamTable streams{hal, 2};
  CachingAllocator memory{hal, &streams, 2, c10::kCPU};
  c10::DataPtr get(size_t n, int stream = 0) { return memory.allocate(0, static_cast<flagos::StreamSlot>(stream), n); }
  c10::CachingDeviceAllocator::DeviceStats stats() { return memory.getDeviceStats(0); }
  ~Fixture() {
    flagos_sim_set_fail("");
    memory.cache(0).set_fraction(1);
    memory.emptyCache({0, 0});
  }
};

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "";
}

void reuse_is_immediate() {
  Fixture f;
  for (const size_t n : {size_t{1}, size_t{512}, size_t{513}, kMiB, kMiB + 1, 30 * kMiB}) {
    void* first = f.get(n).get();
    c10::DataPtr again = f.get(n);
    EXPECT(again.get() == first, "size %zu", n);
    std::memset(again.get(), 1, n);
  }
}

void streams_do_not_share() {
  Fixture f;
  const auto other = f.streams.take(0, 0);
  void* first = f.get(1000).get();
  c10::DataPtr second = f.get(1000, other);
  EXPECT(second.get() != first);
}

void small_blocks_split_and_merge() {
  Fixture f;
  std::vector<c10::DataPtr> held;
  for (int i = 0; i < 4096; i++) held.push_back(f.get(512));
  EXPECT(f.stats().segment[0].current == 1);
  held.clear();
  {
    c10::DataPtr a = f.get(kMiB), b = f.get(kMiB);  // stats() merges too, so it must not come first
    const auto s = f.stats();
    EXPECT(s.segment[0].current == 1 && s.reserved_bytes[1].current == static_cast<int64_t>(2 * kMiB));
  }
  const auto s = f.stats();
  EXPECT(s.inactive_split[0].current == 0, "%ld pieces left", static_cast<long>(s.inactive_split[0].current));
}

void large_blocks_split_and_merge() {
  Fixture f;
  {
    c10::DataPtr a = f.get(5 * kMiB), b = f.get(6 * kMiB), c = f.get(9 * kMiB);
    EXPECT(f.stats().segment[2].current == 1);
    b.clear();
    auto s = f.stats();
    EXPECT(s.inactive_split[2].current == 1 && s.inactive_split_bytes[2].current == static_cast<int64_t>(6 * kMiB));
  }
  auto s = f.stats();
  EXPECT(s.inactive_split[2].current == 0 && s.reserved_bytes[0].current == static_cast<int64_t>(20 * kMiB));
  c10::DataPtr whole = f.get(20 * kMiB);
  EXPECT(f.stats().segment[2].current == 1);
}

// Random calls against a model that adds the numbers up itself.
void statistics_are_exact() {
  Fixture f;
  std::mt19937 random(7);
  std::map<int, std::pair<c10::DataPtr, size_t>> held;
  int64_t count = 0, requested = 0, peak_requested = 0, total = 0;
  for (int i = 0; i < 20000; i++) {
    const int key = static_cast<int>(random() % 200);
    auto it = held.find(key);
    if (it != held.end()) {
      requested -= static_cast<int64_t>(it->second.second);
      count--;
      held.erase(it);
    } else {
      const size_t n = random() % 10 == 0 ? 1 + random() % (4 * kMiB) : 1 + random() % 5000;
      held[key] = {f.get(n), n};
      requested += static_cast<int64_t>(n);
      peak_requested = std::max(peak_requested, requested);
      count++;
      total++;
    }
  }
  auto s = f.stats();
  EXPECT(s.allocation[0].current == count && s.allocation[0].allocated == total);
  EXPECT(s.allocation[0].freed == total - count);
  EXPECT(s.requested_bytes[0].current == requested && s.requested_bytes[0].peak == peak_requested);
  int64_t bytes = 0;
  for (auto& entry : held) bytes += static_cast<int64_t>(CachingAllocator::block_of(entry.second.first)->size);
  EXPECT(s.allocated_bytes[0].current == bytes && s.active_bytes[0].current == bytes);
  for (auto* stat : {&s.allocated_bytes, &s.requested_bytes, &s.allocation, &s.reserved_bytes, &s.segment})
    EXPECT((*stat)[0].current == (*stat)[1].current + (*stat)[2].current);
  int64_t in_blocks = 0, in_segments = 0;
  std::vector<flagos::MemorySegment> snapshot;
  f.memory.cache(0).snapshot(&snapshot);
  for (auto& segment : snapshot) {
    in_segments += static_cast<int64_t>(segment.size);
    for (auto& block : segment.blocks) in_blocks += static_cast<int64_t>(block.size);
  }
  EXPECT(in_blocks == in_segments && in_segments == s.reserved_bytes[0].current);
  f.memory.resetAccumulatedStats(0);
  f.memory.resetPeakStats(0);
  held.clear();
  s = f.stats();
  EXPECT(s.allocation[0].freed == count && s.allocation[0].allocated == 0 && s.allocation[0].peak == count);
}

void nothing_overlaps_under_threads() {
  Fixture f;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; t++) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      std::vector<std::pair<c10::DataPtr, size_t>> held(64);
      for (int i = 0; i < 30000; i++) {
        auto& slot = held[random() % held.size()];
        if (slot.first) {
          auto* words = static_cast<uint64_t*>(slot.first.get());
          const auto stamp = reinterpret_cast<uint64_t>(words) + t;
          if (words[0] != stamp || words[slot.second / 8 - 1] != stamp) wrong++;
          slot.first.clear();
        } else {
          slot.second = 8 * (1 + random() % (random() % 50 == 0 ? 300000 : 2000));
          slot.first = f.get(slot.second);
          auto* words = static_cast<uint64_t*>(slot.first.get());
          words[0] = words[slot.second / 8 - 1] = reinterpret_cast<uint64_t>(words) + t;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT(wrong == 0, "%d stamps", wrong.load());
  const auto s = f.stats();
  EXPECT(s.allocation[0].current == 0 && s.allocated_bytes[0].current == 0 && s.active[0].current == 0);
}

void record_stream_waits() {
  Fixture f;
  const auto other = f.streams.take(0, 0);
  static std::atomic<bool> go;
  go = false;
  c10::DataPtr a = f.get(4096);
  void* const address = a.get();
  const flagos_stream handle = f.streams.handle(0, other);
  EXPECT(hal->stream_host_func(
             0, handle,
             [](void*) {
               while (!go) usleep(100);
             },
             nullptr) == FLAGOS_OK);
  f.memory.cache(0).record_stream(CachingAllocator::block_of(a), other);
  a.clear();
  auto s = f.stats();
  EXPECT(s.active[0].current == 1 && s.allocation[0].current == 0);
  {
    c10::DataPtr b = f.get(4096);
    EXPECT(b.get() != address);
  }
  go = true;
  EXPECT(hal->stream_sync(0, handle) == FLAGOS_OK);
  c10::DataPtr c = f.get(8192);  // looks at the events
  s = f.stats();
  EXPECT(s.active[0].current == 1 && s.allocation[0].current == 1);
}

void empty_gives_everything_back() {
  Fixture f;
  uint64_t blocks = 0, bytes = 0;
  {
    c10::DataPtr a = f.get(100), b = f.get(3 * kMiB), c = f.get(40 * kMiB);
  }
  c10::DataPtr kept = f.get(100);
  f.memory.emptyCache({0, 0});
  EXPECT(flagos_sim_live(0, &blocks, &bytes) == FLAGOS_OK && blocks == 1 && bytes == 2 * kMiB, "%lu blocks",
         static_cast<unsigned long>(blocks));
  kept.clear();
  f.memory.emptyCache({0, 0});
  EXPECT(flagos_sim_live(0, &blocks, &bytes) == FLAGOS_OK && blocks == 0);
  EXPECT(f.stats().reserved_bytes[0].current == 0);
}

void running_out_frees_caches_first() {
  Fixture f;
  f.memory.cache(0).set_fraction(1e-9);
  EXPECT(message_of([&] { f.get(1); }).find("may reserve") != std::string::npos);
  uint64_t free_bytes = 0, total = 0;
  hal->mem_info(0, &free_bytes, &total);
  f.memory.cache(0).set_fraction((64.0 * kMiB + 1) / static_cast<double>(total));
  {
    c10::DataPtr a = f.get(40 * kMiB);
  }
  const auto before = f.stats();
  c10::DataPtr b = f.get(50 * kMiB);  // fits only when the first one's segment goes back
  const auto s = f.stats();
  EXPECT(s.num_alloc_retries == before.num_alloc_retries + 1 && s.num_ooms == before.num_ooms);
  const std::string text = message_of([&] { f.get(40 * kMiB); });
  EXPECT(text.find("Tried to allocate 40.00 MiB on flagos:0 (host)") != std::string::npos, "%s", text.c_str());
  EXPECT(text.find("50.00 MiB in tensors") != std::string::npos && text.find('\n') == std::string::npos);
  c10::DataPtr small = f.get(5 * kMiB);  // not 20 MiB, but there is room for what was asked
  EXPECT(static_cast<bool>(small));
  bool right_type = false;
  try {
    f.get(size_t{1} << 63);
  } catch (const c10::OutOfMemoryError&) {
    right_type = true;
  }
  EXPECT(right_type);
}

void faults_leave_it_usable() {
  Fixture f;
  const auto other = f.streams.take(0, 0);
  const auto plan = [](const char* text) { EXPECT(flagos_sim_set_fail(text) == FLAGOS_OK, "%s", text); };
  plan("malloc@1=OUT_OF_MEMORY");
  EXPECT(message_of([&] { f.get(100); }).empty());  // the retry succeeds
  EXPECT(f.stats().num_alloc_retries == 1);
  f.memory.emptyCache({0, 0});
  plan("malloc@1=OUT_OF_MEMORY;malloc@2=OUT_OF_MEMORY");
  EXPECT(message_of([&] { f.get(100); }).find("flagos out of memory") == 0);
  plan("malloc@1=INTERNAL");
  EXPECT(message_of([&] { f.get(100); }).find("INTERNAL") != std::string::npos);
  plan("host_alias@1=INTERNAL");
  EXPECT(message_of([&] { f.get(100); }).find("mapping device memory") != std::string::npos);
  plan("");
  uint64_t blocks = 0, bytes = 0;
  EXPECT(flagos_sim_live(0, &blocks, &bytes) == FLAGOS_OK && blocks == 0);
  {
    c10::DataPtr a = f.get(100), b = f.get(5 * kMiB);
  }
  plan("free@1=INTERNAL");
  EXPECT(message_of([&] { f.memory.emptyCache({0, 0}); }).find("freeing device memory") != std::string::npos);
  EXPECT(f.stats().segment[0].current == 1);
  plan("device_sync@1=TIMEOUT");
  EXPECT(message_of([&] { f.memory.emptyCache({0, 0}); }).find("TIMEOUT") != std::string::npos);
  EXPECT(f.stats().segment[0].current == 1);
  for (const char* text : {"event_create@1=INTERNAL", "event_record@1=INTERNAL"}) {
    plan(text);
    c10::DataPtr a = f.get(100);
    f.memory.cache(0).record_stream(CachingAllocator::block_of(a), other);
    a.clear();  // cannot raise: waits for the stream instead
    EXPECT(f.stats().active[0].current == 0, "%s", text);
  }
  plan("");
  f.memory.emptyCache({0, 0});
  EXPECT(flagos_sim_live(0, &blocks, &bytes) == FLAGOS_OK && blocks == 0);
}

void both_addresses() {
  Fixture f;
  c10::DataPtr a = f.get(100), b = f.get(3 * kMiB);
  for (auto* p : {&a, &b}) {
    const Block* block = CachingAllocator::block_of(*p);
    void* alias = nullptr;
    EXPECT(hal->host_alias(block->device_ptr, &alias) == FLAGOS_OK && alias == p->get());
  }
  EXPECT(a.get_context() == a.get() && !CachingAllocator::try_free_address(&f));
  void* const raw = f.memory.raw_allocate(777);  // the address alone must be enough to free it
  EXPECT(f.stats().allocation[0].current == 3 && CachingAllocator::try_free_address(raw));
  EXPECT(f.stats().allocation[0].current == 2);
  c10::DataPtr empty = f.get(0);
  EXPECT(empty.get() == nullptr && CachingAllocator::block_of(empty) == nullptr);
}

// Nanoseconds per allocate and free: the best of many short slices, so that other work on the machine does not count.
double measure(Fixture& f, size_t size, int live, int threads) {
  constexpr int kSlices = 100, kRounds = 10000;
  std::vector<c10::DataPtr> held;
  for (int i = 0; i < live; i++) held.push_back(f.get(size));
  double best = 1e9;
  for (int slice = 0; slice < kSlices; slice++) {
    const auto loop = [&] {
      for (int i = 0; i < kRounds; i++) f.get(size);
    };
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> workers;
    for (int i = 1; i < threads; i++) workers.emplace_back(loop);
    loop();
    for (auto& worker : workers) worker.join();
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    best = std::min(best, time.count() / (kRounds * threads));
  }
  return best;
}

}  // namespace

namespace flagos {
// The registrations of libtorch_fl.so are not part of this program when it is built from single sources.
__attribute__((weak)) void register_hooks() {}
__attribute__((weak)) void register_profiler() {}
}  // namespace flagos

int main(int argc, char**) {
  if (flagos_open("host", &hal) != FLAGOS_OK) {
    std::printf("FAIL cannot open the host chip: %s\n", flagos_last_message());
    return 1;
  }
  if (argc > 1) {
    Fixture f;
    for (const size_t size : {size_t{64}, size_t{4096}, kMiB, 8 * kMiB})
      for (const int threads : {1, 2, 8})
        std::printf("allocate + free %8zu bytes, %d thread(s): %6.1f ns\n", size, threads,
                    measure(f, size, 10, threads));
    return 0;
  }
  const std::pair<const char*, void (*)()> checks[] = {
      {"reuse_is_immediate", reuse_is_immediate},
      {"streams_do_not_share", streams_do_not_share},
      {"small_blocks_split_and_merge", small_blocks_split_and_merge},
      {"large_blocks_split_and_merge", large_blocks_split_and_merge},
      {"statistics_are_exact", statistics_are_exact},
      {"nothing_overlaps_under_threads", nothing_overlaps_under_threads},
      {"record_stream_waits", record_stream_waits},
      {"empty_gives_everything_back", empty_gives_everything_back},
      {"running_out_frees_caches_first", running_out_frees_caches_first},
      {"faults_leave_it_usable", faults_leave_it_usable},
      {"both_addresses", both_addresses},
  };
  for (const auto& check : checks) {
    const int before = failures;
    check.second();
    std::printf("%s %s\n", failures == before ? "ok" : "FAILED", check.first);
  }
  return failures;
}
