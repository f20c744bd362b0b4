// device_trace.cc: recording of device spans (device_trace.h).
#include "csrc/runtime/device_trace.h"

#include <c10/util/ApproximateClock.h>
#include <c10/util/Exception.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>

namespace flagos {

std::atomic<bool> device_trace_on{false};

namespace {

struct Queued {
  DeviceSpan span;
  void* start;
  void* end;
};
// The event against which a device's others are measured, and the time at which it came.
struct Base {
  void* event = nullptr;
  int64_t ns = 0;
};
struct Trace {
  std::mutex mutex;  // guards everything below
  std::vector<DeviceSpan> done;
  std::vector<Queued> queued;
  std::vector<Base> bases;  // per device, made by the first span
  unsigned number = 0;      // of traces so far
};
Trace& trace() {
  static auto* const t = new Trace;  // streams and threads may outlive static objects
  return *t;
}

struct ThreadTrace {
  std::vector<uint64_t> correlations;
  std::vector<std::pair<unsigned, DeviceSpan>> running;  // kernels, with the trace in which they began
};
thread_local ThreadTrace mine;

uint64_t correlation() { return mine.correlations.empty() ? 0 : mine.correlations.back(); }

int32_t thread_number() {
  static thread_local const auto number = static_cast<int32_t>(syscall(SYS_gettid));
  return number;
}

void destroy(void* event, c10::DeviceIndex device) { platform().destroy_event(event, device); }

}  // namespace

void push_correlation(uint64_t id) { mine.correlations.push_back(id); }
void pop_correlation() {
  if (!mine.correlations.empty()) mine.correlations.pop_back();
}

void start_device_trace() {
  auto& t = trace();
  std::lock_guard<std::mutex> lock(t.mutex);
  t.done.clear();
  t.bases.resize(platform().device_count());
  t.number++;
  device_trace_on = true;
}

std::vector<DeviceSpan> stop_device_trace() {
  device_trace_on = false;
  auto& chip = platform();
  auto& t = trace();
  std::lock_guard<std::mutex> lock(t.mutex);
  for (auto& [span, start, end] : t.queued) {
    try {
      const auto& base = t.bases[span.device];
      chip.synchronize_event(end);
      const double begin = 1e6 * chip.elapsed_ms(base.event, start, span.device);
      const double length = 1e6 * chip.elapsed_ms(start, end, span.device);
      span.start_ns = base.ns + static_cast<int64_t>(begin);
      span.end_ns = span.start_ns + static_cast<int64_t>(length);
      t.done.push_back(std::move(span));
    } catch (const c10::Error& error) {
      TORCH_WARN("flagos: ", span.name, " is missing in the profile: ", error.what_without_backtrace());
    }
    destroy(start, span.device);
    destroy(end, span.device);
  }
  t.queued.clear();
  for (size_t i = 0; i < t.bases.size(); i++) destroy(t.bases[i].event, static_cast<c10::DeviceIndex>(i));
  t.bases.clear();
  auto spans = std::move(t.done);
  t.done.clear();
  std::stable_sort(spans.begin(), spans.end(),
                   [](const DeviceSpan& a, const DeviceSpan& b) { return a.start_ns < b.start_ns; });
  return spans;
}

void begin_host_kernel(const char* name, c10::DeviceIndex device) {
  DeviceSpan span;
  span.launch_ns = c10::getTime();
  span.thread = thread_number();
  const char* const colons = std::strstr(name, "::");  // "aten::mm" becomes "host::mm", to be told from the operator
  span.name = std::string(platform().chip()) + "::" + (colons ? colons + 2 : name);
  span.device = device;
  span.stream = platform().current_stream(device).id();
  span.correlation = correlation();
  unsigned number;
  {
    std::lock_guard<std::mutex> lock(trace().mutex);
    number = trace().number;
  }
  span.start_ns = span.launch_end_ns = c10::getTime();  // it runs on this thread, so it is handed over and starts
  mine.running.emplace_back(number, std::move(span));
}

void end_host_kernel() {
  if (mine.running.empty()) return;  // the trace began inside this kernel
  auto [number, span] = std::move(mine.running.back());
  mine.running.pop_back();
  span.end_ns = c10::getTime();
  auto& t = trace();
  std::lock_guard<std::mutex> lock(t.mutex);
  if (tracing_device() && number == t.number) t.done.push_back(std::move(span));
}

QueuedSpan::QueuedSpan(DeviceSpan::Kind kind, const char* name, c10::Stream stream, size_t nbytes) : stream_(stream) {
  if (C10_LIKELY(!tracing_device())) return;
  span_.kind = kind;
  span_.name = name;
  span_.device = stream.device_index();
  span_.stream = stream.id();
  span_.nbytes = nbytes;
  span_.correlation = correlation();
  span_.thread = thread_number();
  span_.launch_ns = c10::getTime();
  try {
    auto& t = trace();
    std::lock_guard<std::mutex> lock(t.mutex);
    if (!tracing_device()) return;
    auto& base = t.bases.at(span_.device);
    if (base.event == nullptr) {
      platform().record(&base.event, stream, c10::EventFlag::BACKEND_DEFAULT);
      platform().synchronize_event(base.event);
      base.ns = c10::getTime();
    }
    platform().record(&start_, stream, c10::EventFlag::BACKEND_DEFAULT);
  } catch (const std::exception&) {  // the work itself reports what is wrong with the device
  }
}

QueuedSpan::~QueuedSpan() {
  if (C10_LIKELY(start_ == nullptr)) return;
  void* end = nullptr;
  try {
    platform().record(&end, stream_, c10::EventFlag::BACKEND_DEFAULT);
    span_.launch_end_ns = c10::getTime();
    auto& t = trace();
    std::lock_guard<std::mutex> lock(t.mutex);
    if (tracing_device()) {
      t.queued.push_back({std::move(span_), start_, end});
      return;
    }
  } catch (const std::exception&) {
  }
  destroy(start_, stream_.device_index());
  destroy(end, stream_.device_index());
}

}  // namespace flagos
