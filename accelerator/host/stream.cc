// stream.cc: worker threads, tasks and records of the simulated device (stream.h).
#include "host/stream.h"

#include <pthread.h>
#include <signal.h>

#include <cstring>
#include <system_error>
#include <thread>

#include "host/memory.h"
#include "host/sim.h"
#include "status.h"

namespace flagos {
namespace host {
namespace {

std::atomic<uint64_t> g_chaos{0};
std::atomic<uint64_t> g_serial{0};
flagos_stream g_default[kMaxDevices] = {};
StreamSlot* g_default_slot[kMaxDevices] = {};

struct Workers {
  std::mutex mutex;
  std::condition_variable changed;
  int count = 0;
};
Workers& workers() {
  static Workers* instance = new Workers;
  return *instance;
}

uint64_t mix(uint64_t x) {  // splitmix64: enough randomness for delays, and the same on every machine
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

void delay(uint64_t stream, uint64_t task) {
  uint64_t seed = g_chaos.load(std::memory_order_relaxed);
  if (seed == 0) return;
  uint64_t random = mix(mix(mix(seed) ^ stream) ^ task);
  if (random % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds((random >> 8) % 2000));
}

void run(Task& task) {
  switch (task.kind) {
    case Task::kCopy:
      for (uint64_t row = 0; row < task.height; ++row) {
        memmove(task.dst + row * task.dst_pitch, task.src + row * task.src_pitch, task.width);
      }
      break;
    case Task::kFill:
      memset(task.dst, task.value, task.width);
      break;
    case Task::kRecord:
      task.record->time = Clock::now();
      break;
    case Task::kWait:
      task.record->wait();
      break;
    case Task::kCall:
      task.fn(task.arg);
      break;
  }
}

void work(StreamSlot* slot) {
  Stream& stream = slot->value;
  std::unique_lock<std::mutex> lock(stream.mutex);
  for (;;) {
    stream.work.wait(lock, [&] { return !stream.queue.empty() || stream.closing; });
    if (stream.queue.empty()) break;
    Task task = std::move(stream.queue.front());
    stream.queue.pop_front();
    uint64_t number = stream.completed.load(std::memory_order_relaxed);
    lock.unlock();
    delay(stream.serial, number);
    run(task);
    task.record.reset();
    lock.lock();
    stream.completed.store(number + 1, std::memory_order_release);
    if (stream.waiters) stream.progress.notify_all();
  }
  stream.running = false;
  lock.unlock();
  streams().recycle(slot);
  Workers& w = workers();
  std::lock_guard<std::mutex> guard(w.mutex);
  --w.count;
  w.changed.notify_all();
}

flagos_status start_worker(StreamSlot* slot) {
  {
    std::lock_guard<std::mutex> guard(workers().mutex);
    ++workers().count;
  }
  // Signals belong to the program's own threads.
  sigset_t all, old;
  sigfillset(&all);
  sigdelset(&all, SIGSEGV);
  sigdelset(&all, SIGBUS);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  flagos_status status = FLAGOS_OK;
  try {
    std::thread(work, slot).detach();
  } catch (const std::system_error& error) {
    std::lock_guard<std::mutex> guard(workers().mutex);
    --workers().count;
    status = fail(FLAGOS_INTERNAL, "starting the thread of a stream: %s", error.what());
  }
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  return status;
}

// Lets a retired stream end after its queued work; its worker, or this call, makes the slot free again.
void finish(StreamSlot* slot) {
  std::unique_lock<std::mutex> lock(slot->value.mutex);
  slot->value.closing = true;
  bool running = slot->value.running;
  slot->value.work.notify_all();
  lock.unlock();
  if (!running) streams().recycle(slot);
}

}  // namespace

StreamTable& streams() {
  static StreamTable* instance = new StreamTable;
  return *instance;
}

EventTable& events() {
  static EventTable* instance = new EventTable;
  return *instance;
}

void Stream::wait_for(uint64_t count) {
  if (reached(count)) return;
  std::unique_lock<std::mutex> lock(mutex);
  ++waiters;
  progress.wait(lock, [&] { return reached(count); });
  --waiters;
}

StreamSlot* find_stream(const char* entry, int32_t device, flagos_stream handle, flagos_status* status) {
  if (!handle) return g_default_slot[device];
  StreamSlot* slot = streams().find(handle);
  if (!slot) {
    *status = fail(FLAGOS_NOT_FOUND, "%s: %p is not a live stream (destroyed, or never created?)", entry,
                   static_cast<void*>(handle));
    return nullptr;
  }
  if (slot->value.device != device) {
    *status = fail(FLAGOS_INVALID_ARGUMENT, "%s: the stream belongs to flagos:%d, the call names flagos:%d", entry,
                   slot->value.device, device);
    return nullptr;
  }
  return slot;
}

EventSlot* find_event(const char* entry, int32_t device, flagos_event handle, flagos_status* status) {
  EventSlot* slot = handle ? events().find(handle) : nullptr;
  if (!slot) {
    *status = handle ? fail(FLAGOS_NOT_FOUND, "%s: %p is not a live event (destroyed, or never created?)", entry,
                            static_cast<void*>(handle))
                     : fail(FLAGOS_INVALID_ARGUMENT, "%s: event is NULL", entry);
    return nullptr;
  }
  if (device >= 0 && slot->value.device != device) {
    *status = fail(FLAGOS_INVALID_ARGUMENT, "%s: the event belongs to flagos:%d, the call names flagos:%d", entry,
                   slot->value.device, device);
    return nullptr;
  }
  return slot;
}

flagos_status create_stream(int32_t device, int32_t priority, flagos_stream* handle) {
  StreamSlot* slot = streams().reserve();
  if (!slot) return fail(FLAGOS_OUT_OF_MEMORY, "stream_create: no stream handle is left");
  Stream& stream = slot->value;
  {
    std::lock_guard<std::mutex> lock(stream.mutex);
    stream.device = device;
    stream.priority = priority;
    stream.serial = g_serial.fetch_add(1);
    stream.closing = false;  // the task counters go on: a thread may still wait for the slot's former stream
  }
  *handle = static_cast<flagos_stream>(streams().publish(slot));
  return FLAGOS_OK;
}

flagos_status destroy_stream(int32_t device, flagos_stream handle) {
  if (!handle || handle == g_default[device]) {
    return fail(FLAGOS_INVALID_ARGUMENT, "stream_destroy: the default stream of flagos:%d cannot be destroyed", device);
  }
  flagos_status status = FLAGOS_OK;
  if (!find_stream("stream_destroy", device, handle, &status)) return status;
  StreamSlot* slot = streams().find(handle);
  if (!slot || !streams().retire(slot, handle)) {
    return fail(FLAGOS_NOT_FOUND, "stream_destroy: the stream was destroyed by another thread");
  }
  finish(slot);
  return FLAGOS_OK;
}

flagos_status enqueue(StreamSlot* slot, Task task) {
  Stream& stream = slot->value;
  std::lock_guard<std::mutex> lock(stream.mutex);
  if (stream.closing) return fail(FLAGOS_NOT_FOUND, "the stream was destroyed by another thread");
  if (!stream.running) {
    if (flagos_status status = start_worker(slot)) return status;
    stream.running = true;
  }
  uint64_t count = stream.submitted.load(std::memory_order_relaxed) + 1;
  if (task.kind == Task::kRecord) task.record->count = count;
  stream.queue.push_back(std::move(task));
  stream.submitted.store(count, std::memory_order_release);
  stream.work.notify_one();
  return FLAGOS_OK;
}

flagos_status create_event(int32_t device, bool timing, flagos_event* handle) {
  EventSlot* slot = events().reserve();
  if (!slot) return fail(FLAGOS_OUT_OF_MEMORY, "event_create: no event handle is left");
  slot->value.device = device;
  slot->value.timing = timing;
  *handle = static_cast<flagos_event>(events().publish(slot));
  return FLAGOS_OK;
}

flagos_status destroy_event(EventSlot* slot, flagos_event handle) {
  if (!events().retire(slot, handle)) {
    return fail(FLAGOS_NOT_FOUND, "event_destroy: the event was destroyed by another thread");
  }
  {
    std::lock_guard<std::mutex> lock(slot->value.mutex);
    slot->value.record.reset();
  }
  events().recycle(slot);
  return FLAGOS_OK;
}

flagos_status record_event(EventSlot* event, StreamSlot* stream) {
  auto record = std::make_shared<Record>();
  record->stream = &stream->value;
  if (stream->value.idle()) {
    record->time = Clock::now();  // all earlier work is done, so there is nothing to wait for
  } else {
    Task task;
    task.kind = Task::kRecord;
    task.record = record;
    if (flagos_status status = enqueue(stream, std::move(task))) return status;
  }
  std::lock_guard<std::mutex> lock(event->value.mutex);
  event->value.record = std::move(record);
  return FLAGOS_OK;
}

void sync_device(int32_t device) {
  streams().for_each([device](StreamSlot* slot) {
    Stream& stream = slot->value;
    if (stream.idle()) return;
    std::unique_lock<std::mutex> lock(stream.mutex);
    if (stream.device != device) return;
    lock.unlock();
    stream.sync();
  });
}

void open_default_streams(int32_t device_count) {
  for (int32_t device = 0; device < device_count; ++device) {
    create_stream(device, 0, &g_default[device]);
    g_default_slot[device] = streams().find(g_default[device]);
  }
}

flagos_stream default_stream(int32_t device) { return g_default[device]; }

void close_all_streams() {
  streams().for_each([](StreamSlot* slot) {
    void* handle = reinterpret_cast<void*>(slot->handle.load());
    if (!handle || !streams().retire(slot, handle)) return;
    finish(slot);
  });
  Workers& w = workers();
  std::unique_lock<std::mutex> lock(w.mutex);
  w.changed.wait(lock, [&w] { return w.count == 0; });
}

void set_chaos(uint64_t seed) { g_chaos.store(seed); }

}  // namespace host
}  // namespace flagos

void flagos_sim_set_chaos(uint64_t seed) { flagos::host::set_chaos(seed); }
