// profiler.cc: torch.profiler on flagos. Kineto asks for device spans (a child profiler, for the chips behind a HAL;
// CUPTI serves the chip cuda), the profiler without Kineto asks for events around each operator (stubs, every chip).
#include <c10/util/ApproximateClock.h>
#include <torch/csrc/profiler/stubs/base.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <mutex>

#include "csrc/runtime/device_trace.h"
#include "csrc/runtime/registrations.h"

#define FMT_HEADER_ONLY
#include <kineto/libkineto.h>
#include <kineto/output_base.h>

namespace flagos {
namespace {

// ---- Kineto

using libkineto::ActivityType;

class Session final : public libkineto::IActivityProfilerSession {
 public:
  ~Session() override {
    if (running_) stop_device_trace();
  }
  void start() override {
    start_device_trace();
    running_ = true;
    status_ = libkineto::TraceStatus::RECORDING;
  }
  void stop() override {
    if (!running_) return;
    spans_ = stop_device_trace();
    running_ = false;
    status_ = libkineto::TraceStatus::PROCESSING;
  }
  std::vector<std::string> errors() override { return {}; }

  void processTrace(libkineto::ActivityLogger& logger) override {
    processTrace(logger, [](int32_t) { return nullptr; }, 0, 0);
  }
  void processTrace(libkineto::ActivityLogger& logger, libkineto::getLinkedActivityCallback linked, int64_t,
                    int64_t) override {
    int32_t number = 0;
    for (const auto& span : spans_) {
      const bool copy = span.kind == DeviceSpan::kCopy;
      const auto* const op = span.correlation ? linked(static_cast<int32_t>(span.correlation)) : nullptr;
      ++number;
      if (op) {  // the host's side of it, from which a trace draws an arrow to the device's
        auto& launch = add(ActivityType::PRIVATEUSE1_RUNTIME, copy ? "flagosMemcpyAsync" : "flagosLaunchKernel", number,
                           span.launch_ns, span.launch_end_ns);
        launch.device = static_cast<int32_t>(getpid());
        launch.resource = launch.threadId = span.thread;
        link(launch, op, span.correlation, /*start=*/true);
        launch.log(logger);
      }
      auto& work = add(copy ? ActivityType::GPU_MEMCPY : ActivityType::CONCURRENT_KERNEL, span.name, number,
                       span.start_ns, span.end_ns);
      work.device = span.device;
      work.resource = static_cast<int32_t>(span.stream);
      work.addMetadata("device", static_cast<int>(span.device));
      work.addMetadata("stream", span.stream);
      if (copy) work.addMetadata("bytes", span.nbytes);
      if (op) link(work, op, span.correlation, /*start=*/false);
      work.log(logger);
    }
  }

  std::unique_ptr<libkineto::DeviceInfo> getDeviceInfo() override { return nullptr; }
  std::vector<libkineto::ResourceInfo> getResourceInfos() override {
    std::map<std::pair<int64_t, int64_t>, libkineto::ResourceInfo> streams;
    for (const auto& s : spans_) {
      streams.try_emplace({s.device, s.stream}, s.device, s.stream, s.stream, "stream " + std::to_string(s.stream));
    }
    std::vector<libkineto::ResourceInfo> infos;
    for (const auto& entry : streams) infos.push_back(entry.second);
    return infos;
  }
  std::unique_ptr<libkineto::CpuTraceBuffer> getTraceBuffer() override { return std::move(buffer_); }

  void pushCorrelationId(uint64_t id) override { push_correlation(id); }
  void popCorrelationId() override { pop_correlation(); }

 private:
  libkineto::GenericTraceActivity& add(ActivityType type, const std::string& name, int32_t number, int64_t start_ns,
                                       int64_t end_ns) {
    buffer_->emplace_activity(buffer_->span, type, name);
    auto& activity = *buffer_->activities.back();
    activity.id = number;
    activity.startTime = start_ns;
    activity.endTime = end_ns;
    return activity;
  }
  static void link(libkineto::GenericTraceActivity& activity, const libkineto::ITraceActivity* op, uint64_t correlation,
                   bool start) {
    activity.linked = op;
    activity.flow.id = static_cast<uint32_t>(activity.id);
    activity.flow.type = libkineto::kLinkAsyncCpuGpu;
    activity.flow.start = start;
    activity.addMetadata("External id", correlation);
    activity.addMetadata("correlation", activity.id);
  }

  std::vector<DeviceSpan> spans_;
  std::unique_ptr<libkineto::CpuTraceBuffer> buffer_ = std::make_unique<libkineto::CpuTraceBuffer>();
  bool running_ = false;
};

class DeviceProfiler final : public libkineto::IActivityProfiler {
 public:
  const std::string& name() const override { return name_; }
  const std::set<ActivityType>& availableActivities() const override { return types_; }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(const std::set<ActivityType>& types,
                                                                 const libkineto::Config&) override {
    if (types.count(ActivityType::CONCURRENT_KERNEL) == 0) return nullptr;  // the CPU's side alone
    return std::make_unique<Session>();
  }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(int64_t, int64_t, const std::set<ActivityType>& types,
                                                                 const libkineto::Config& config) override {
    return configure(types, config);
  }

 private:
  const std::string name_ = "flagos";
  const std::set<ActivityType> types_{ActivityType::GPU_MEMCPY, ActivityType::CONCURRENT_KERNEL,
                                      ActivityType::PRIVATEUSE1_RUNTIME};
};

// ---- the profiler without Kineto

struct EventDeleter {
  c10::DeviceIndex device;
  void operator()(void* event) const { platform().destroy_event(event, device); }
};

struct Stubs final : torch::profiler::impl::ProfilerStubs {
  void record(c10::DeviceIndex* device, torch::profiler::impl::ProfilerVoidEventStub* event,
              int64_t* cpu_ns) const override {
    auto& chip = platform();
    const auto index = chip.current_device();
    if (device) *device = index;
    void* made = nullptr;
    chip.record(&made, chip.current_stream(index), c10::EventFlag::BACKEND_DEFAULT);
    *event = torch::profiler::impl::ProfilerVoidEventStub(made, EventDeleter{index});
    if (cpu_ns) *cpu_ns = c10::getTime();
  }
  // Microseconds.
  float elapsed(const torch::profiler::impl::ProfilerVoidEventStub* start,
                const torch::profiler::impl::ProfilerVoidEventStub* end) const override {
    auto& chip = platform();
    chip.synchronize_event(start->get());
    chip.synchronize_event(end->get());
    return static_cast<float>(1000 * chip.elapsed_ms(start->get(), end->get(), chip.current_device()));
  }
  // Marks and ranges are for a vendor's own profiler, which has no entry in the HAL.
  void mark(const char*) const override {}
  void rangePush(const char*) const override {}
  void rangePop() const override {}
  bool enabled() const override { return has_platform(); }
  void onEachDevice(std::function<void(int)> op) const override {
    auto& chip = platform();
    const auto before = chip.current_device();
    for (c10::DeviceIndex i = 0; i < chip.device_count(); i++) {
      if (!chip.has_primary_context(i)) continue;
      chip.set_device(i);
      op(i);
    }
    chip.set_device(before);
  }
  void synchronize() const override {
    for (c10::DeviceIndex i = 0; i < platform().device_count(); i++) {
      if (platform().has_primary_context(i)) platform().synchronize_device(i);
    }
  }
};

}  // namespace

void register_profiler() {
  static std::once_flag once;
  std::call_once(once, [] {
    torch::profiler::impl::registerPrivateUse1Methods(new Stubs());
    if (platform().native_type() == c10::DeviceType::CUDA) return;
    libkineto::api().registerProfilerFactory([] { return std::make_unique<DeviceProfiler>(); });
  });
}

}  // namespace flagos
