// stream.h: streams and events of the simulated device. A stream is a queue and a thread that starts with the first
// task; work is really asynchronous, so a missing wait shows as a wrong result. Idle streams are cheap: sync and query
// are two loads, recording on one completes at once, waiting for a complete event is nothing.
#ifndef FLAGOS_HOST_STREAM_H_
#define FLAGOS_HOST_STREAM_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "flagos.h"
#include "handles.h"

namespace flagos {
namespace host {

using Clock = std::chrono::steady_clock;

struct Record;

struct Task {
  enum Kind { kCopy, kFill, kRecord, kWait, kCall };
  Kind kind = kCopy;
  char* dst = nullptr;
  const char* src = nullptr;
  uint64_t dst_pitch = 0, src_pitch = 0, width = 0, height = 1;
  int value = 0;
  std::shared_ptr<Record> record;  // kRecord: its own; kWait: another's
  void (*fn)(void*) = nullptr;
  void* arg = nullptr;
};

struct Stream {
  int32_t device = 0, priority = 0;
  uint64_t serial = 0;  // order of creation: makes the random delays repeatable
  std::atomic<uint64_t> submitted{0}, completed{0};
  std::mutex mutex;
  std::condition_variable work, progress;
  std::deque<Task> queue;
  int waiters = 0;
  bool running = false, closing = false;

  bool reached(uint64_t count) const { return completed.load(std::memory_order_acquire) >= count; }
  bool idle() const { return reached(submitted.load(std::memory_order_acquire)); }
  void wait_for(uint64_t count);
  void sync() { wait_for(submitted.load(std::memory_order_acquire)); }
};

/// One event_record(): a place in its stream's work. It is done exactly when the stream says so, so whoever has waited
/// for a stream's last event finds the stream idle. Waiters hold it, so recording the event again or destroying it does
/// not disturb them; the stream outlives it, because slots are reused and their counters go on.
struct Record {
  Stream* stream = nullptr;
  uint64_t count = 0;      // of the stream's tasks, this one included
  Clock::time_point time;  // valid once done

  bool done() const { return stream->reached(count); }
  void wait() const { stream->wait_for(count); }
};

struct Event {
  int32_t device = 0;
  bool timing = false;
  std::mutex mutex;
  std::shared_ptr<Record> record;  // NULL: never recorded

  std::shared_ptr<Record> current() {
    std::lock_guard<std::mutex> lock(mutex);
    return record;
  }
};

using StreamTable = HandleTable<Stream, 0x51>;
using EventTable = HandleTable<Event, 0xE1>;
using StreamSlot = StreamTable::Slot;
using EventSlot = EventTable::Slot;
StreamTable& streams();
EventTable& events();

/// The stream that `handle` names on `device` (NULL: its default stream); NULL with a status and message otherwise.
StreamSlot* find_stream(const char* entry, int32_t device, flagos_stream handle, flagos_status* status);
/// The event of any device when `device` is negative.
EventSlot* find_event(const char* entry, int32_t device, flagos_event handle, flagos_status* status);

flagos_status create_stream(int32_t device, int32_t priority, flagos_stream* handle);
flagos_status destroy_stream(int32_t device, flagos_stream handle);
flagos_status enqueue(StreamSlot* stream, Task task);
flagos_status create_event(int32_t device, bool timing, flagos_event* handle);
flagos_status destroy_event(EventSlot* slot, flagos_event handle);
flagos_status record_event(EventSlot* event, StreamSlot* stream);
void sync_device(int32_t device);

void open_default_streams(int32_t device_count);
flagos_stream default_stream(int32_t device);
/// Ends every stream after its queued work and waits for the threads.
void close_all_streams();

void set_chaos(uint64_t seed);

}  // namespace host
}  // namespace flagos
#endif  // FLAGOS_HOST_STREAM_H_
