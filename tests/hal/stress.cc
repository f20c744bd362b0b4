// stress.cc: 8 threads that use a chip at once, for runs under AddressSanitizer and ThreadSanitizer (and without). Each
// round allocates, copies in, copies between blocks on a second stream behind an event, copies out, and compares; in
// between threads share streams, query each other's memory, and create and destroy handles. Exits with 1 on a
// difference.
//   stress [chip] [rounds] [seed of the random delays]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../accelerator/host/sim.h"
#include "flagos.h"

namespace {

constexpr int kThreads = 8;
const flagos_hal* hal;
int32_t devices = 0;
flagos_stream shared_stream = nullptr;
std::atomic<int> failures{0};
std::atomic<void*> last_block{nullptr};
std::atomic<int> host_calls{0};

bool ok(flagos_status status, const char* what) {
  if (status == FLAGOS_OK) return true;
  fprintf(stderr, "stress: %s: %s: %s\n", what, flagos_status_name(status), hal->last_message());
  failures.fetch_add(1);
  return false;
}
#define OK(call) ok(hal->call, #call)

struct Random {
  uint64_t state;
  uint64_t operator()(uint64_t limit) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % limit;
  }
};

void round_trip(int32_t device, Random& random, flagos_stream stream, flagos_event event) {
  uint64_t n = 1 + random(1 << 16);
  std::vector<unsigned char> in(n, static_cast<unsigned char>(random(256))), out(n, 0);
  void *a = nullptr, *b = nullptr;
  if (!OK(malloc(device, n, &a)) || !OK(malloc(device, n, &b))) return;
  last_block.store(a);
  OK(copy_async(device, a, in.data(), n, FLAGOS_COPY_HOST_TO_DEVICE, stream));
  OK(event_record(device, event, stream));
  OK(stream_wait_event(device, nullptr, event));
  OK(copy_async(device, b, a, n, FLAGOS_COPY_DEVICE_TO_DEVICE, nullptr));
  OK(copy_async(device, out.data(), b, n, FLAGOS_COPY_DEVICE_TO_HOST, nullptr));
  hal->stream_query(device, stream);
  hal->event_query(device, event);
  OK(stream_sync(device, nullptr));
  if (in != out) {
    fprintf(stderr, "stress: a copy of %llu bytes came back different\n", static_cast<unsigned long long>(n));
    failures.fetch_add(1);
  }
  void* alias = nullptr;
  if (hal->host_alias && hal->host_alias(b, &alias) == FLAGOS_OK && memcmp(alias, in.data(), n) != 0) {
    fprintf(stderr, "stress: the alias shows other bytes\n");
    failures.fetch_add(1);
  }
  OK(fill_async(device, a, 1, n, stream));
  OK(event_record(device, event, stream));
  OK(event_sync(device, event));
  OK(stream_query(device, stream));  // nobody else uses it: idle once its last event is complete
  OK(free(device, a));
  OK(free(device, b));
}

void body(int index, int rounds) {
  Random random{static_cast<uint64_t>(index) + 1};
  int32_t device = index % devices;
  flagos_stream stream = nullptr;
  flagos_event event = nullptr;
  OK(stream_create(device, 0, &stream));
  OK(event_create(device, FLAGOS_EVENT_TIMING, &event));
  for (int i = 0; i < rounds; ++i) {
    round_trip(device, random, stream, event);
    switch (random(6)) {
      case 0: {  // a stream and an event that live briefly, destroyed with work pending
        flagos_stream brief = nullptr;
        flagos_event mark = nullptr;
        OK(stream_create(device, -1, &brief));
        OK(event_create(device, 0, &mark));
        if (hal->stream_host_func) {
          OK(stream_host_func(
              device, brief, [](void* counter) { static_cast<std::atomic<int>*>(counter)->fetch_add(1); },
              &host_calls));
        }
        OK(event_record(device, mark, brief));
        OK(stream_wait_event(device, stream, mark));
        OK(event_destroy(device, mark));
        OK(stream_destroy(device, brief));
        break;
      }
      case 1: {  // a stream of all threads, on device 0
        OK(stream_wait_event(0, shared_stream, event));
        if (device == 0) OK(event_record(0, event, shared_stream));
        OK(stream_sync(0, shared_stream));
        break;
      }
      case 2: {  // somebody else's block, perhaps freed by now
        flagos_pointer_info info = {};
        info.struct_size = sizeof(info);
        OK(pointer_info(last_block.load(), &info));
        break;
      }
      case 3: {
        void* pinned = nullptr;
        if (hal->host_malloc && OK(host_malloc(4096, &pinned))) OK(host_free(pinned));
        break;
      }
      case 4:
        OK(device_sync(device));
        break;
      default: {  // a mistake, so that messages are written from all threads
        uint64_t a = 0, b = 0;
        if (hal->free(device, &a) != FLAGOS_INVALID_ARGUMENT || !hal->last_message()[0]) failures.fetch_add(1);
        OK(mem_info(device, &a, &b));
      }
    }
  }
  OK(event_sync(device, event));
  OK(event_destroy(device, event));
  OK(stream_destroy(device, stream));
}

}  // namespace

int main(int argc, char** argv) {
  const char* chip = argc > 1 ? argv[1] : "host";
  int rounds = argc > 2 ? atoi(argv[2]) : 300;
  if (flagos_open(chip, &hal) != FLAGOS_OK) {
    fprintf(stderr, "stress: %s\n", flagos_last_message());
    return 1;
  }
  flagos_sim_set_chaos(argc > 3 ? strtoull(argv[3], nullptr, 10) : 0);
  OK(device_count(&devices));
  OK(stream_create(0, 0, &shared_stream));
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(body, i, rounds);
  for (std::thread& thread : threads) thread.join();
  OK(stream_destroy(0, shared_stream));
  for (int32_t device = 0; device < devices; ++device) OK(device_sync(device));
  if (strcmp(chip, "host") == 0) {
    for (int32_t device = 0; device < devices; ++device) {
      uint64_t blocks = 0, bytes = 0;
      flagos_sim_live(device, &blocks, &bytes);
      if (blocks) fprintf(stderr, "stress: %llu blocks leaked\n", static_cast<unsigned long long>(blocks));
      failures.fetch_add(static_cast<int>(blocks));
    }
  }
  OK(shutdown());
  printf("stress: chip %s, %d threads, %d rounds each, %d failures\n", chip, kThreads, rounds, failures.load());
  return failures.load() ? 1 : 0;
}
