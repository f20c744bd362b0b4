// memory_history.cc: in torch_fl._C, snapshots and history of device memory in the form of torch's memory viewer, and
// the pools that a program makes. For the chips behind a HAL; on the chip cuda torch.cuda's own functions serve.
#include <torch/csrc/profiler/combined_traceback.h>

#include <map>
#include <vector>

#include "csrc/python/bindings.h"
#include "csrc/runtime/hal_platform.h"

namespace py = pybind11;

namespace flagos {
namespace {

HalPlatform& chip() {
  auto* hal = dynamic_cast<HalPlatform*>(&platform());
  TORCH_CHECK(hal != nullptr, "flagos: the chip ", platform().chip(), " has an allocator of its own; ask torch.cuda");
  return *hal;
}

// The calling places of a snapshot as lists of frames. Naming them is slow, so it is done for all at once.
class Places {
 public:
  void add(const MemoryContext& context) {
    if (context && index_.emplace(context.get(), contexts_.size()).second) {
      contexts_.push_back(torch::getCapturedTracebackFromContext(context));
    }
  }
  void name() {
    if (contexts_.empty()) return;
    const auto named = torch::symbolize(contexts_);
    std::vector<py::dict> frames;
    for (const auto& f : named.all_frames) {
      py::dict frame;
      frame["filename"] = f.filename;
      frame["name"] = f.funcname;
      frame["line"] = f.lineno;
      frames.push_back(frame);
    }
    for (const auto& traceback : named.tracebacks) {
      py::list list;
      for (const auto i : traceback) list.append(frames[i]);
      lists_.push_back(list);
    }
  }
  py::list of(const MemoryContext& context) const { return context ? lists_[index_.at(context.get())] : py::list(); }

 private:
  std::map<const void*, size_t> index_;
  std::vector<torch::CapturedTraceback*> contexts_;
  std::vector<py::list> lists_;
};

py::list segments_as_python(const std::vector<MemorySegment>& segments, const Places& places) {
  const char* const states[] = {"active_allocated", "active_awaiting_free", "inactive"};
  py::list out;
  for (const auto& s : segments) {
    size_t requested = 0, allocated = 0, active = 0, address = s.address;
    py::list blocks;
    for (const auto& b : s.blocks) {
      requested += b.requested_size;
      allocated += b.state == MemoryBlock::kAllocated ? b.size : 0;
      active += b.state != MemoryBlock::kInactive ? b.size : 0;
      py::dict block;
      block["address"] = address;
      block["size"] = b.size;
      block["requested_size"] = b.requested_size;
      block["state"] = states[b.state];
      block["frames"] = places.of(b.context);
      blocks.append(block);
      address += b.size;
    }
    py::dict segment;
    segment["device"] = static_cast<int>(s.stream.device_index());
    segment["address"] = s.address;
    segment["total_size"] = s.size;
    segment["allocated_size"] = allocated;
    segment["active_size"] = active;
    segment["requested_size"] = requested;
    segment["stream"] = s.stream.id();
    segment["segment_type"] = s.is_large ? "large" : "small";
    segment["segment_pool_id"] = py::make_tuple(s.pool.first, s.pool.second);
    segment["is_expandable"] = false;
    segment["frames"] = places.of(s.context);
    segment["blocks"] = blocks;
    out.append(segment);
  }
  return out;
}

py::list events_as_python(const std::vector<MemoryEvent>& events, const Places& places) {
  const char* const actions[] = {"alloc", "free_requested", "free_completed", "segment_alloc", "segment_free",
                                 "oom",   "snapshot"};
  py::list out;
  for (const auto& e : events) {
    py::dict event;
    event["action"] = actions[e.action];
    event[e.action == MemoryEvent::kOutOfMemory ? "device_free" : "addr"] = e.address;
    event["size"] = e.size;
    event["stream"] = static_cast<int>(e.stream);
    event["time_us"] = e.time_us;
    event["segment_pool_id"] = py::make_tuple(0, e.pool);
    event["frames"] = places.of(e.context);
    for (const char* name : {"compile_context", "user_metadata"}) event[name] = "";  // given by programs, on CUDA
    out.append(event);
  }
  return out;
}

// (segments, traces by device), of one moment per device.
py::tuple memory_snapshot(bool with_events) {
  std::vector<MemorySegment> segments;
  std::vector<std::vector<MemoryEvent>> events;
  auto& hal = chip();
  {
    py::gil_scoped_release no_gil;
    segments = hal.memory_snapshot();
    for (c10::DeviceIndex i = 0; i < hal.device_count(); i++) {
      events.push_back(with_events ? hal.cache(i).history() : std::vector<MemoryEvent>());
    }
  }
  Places places;
  for (const auto& s : segments) {
    places.add(s.context);
    for (const auto& b : s.blocks) places.add(b.context);
  }
  for (const auto& list : events) {
    for (const auto& e : list) places.add(e.context);
  }
  places.name();
  py::list traces;
  for (const auto& list : events) traces.append(events_as_python(list, places));
  return py::make_tuple(segments_as_python(segments, places), traces);
}

MemoryContext python_frames() { return torch::CapturedTraceback::gather(true, false, false); }
MemoryContext all_frames() { return torch::CapturedTraceback::gather(true, true, true); }

// contexts: 0 none, 1 of live blocks, 2 of allocations, 3 of frees as well; nullopt stops recording.
void record_history(std::optional<int> contexts, bool cpp_frames, size_t max_events, bool clear) {
  std::optional<MemoryHistory::Options> options;
  if (contexts) {
    options = {static_cast<MemoryHistory::Contexts>(*contexts), cpp_frames ? &all_frames : &python_frames, max_events};
  }
  auto& hal = chip();
  for (c10::DeviceIndex i = 0; i < hal.device_count(); i++) hal.cache(i).record_history(options, clear);
}

// Sends the calling thread's allocations on a device to a pool (0: to none); what they went to before.
std::pair<uint64_t, int> use_mempool(uint64_t id, int device) {
  chip();
  const auto before = current_mempool;
  current_mempool = {id, static_cast<c10::DeviceIndex>(device)};
  return {before.id, before.device};
}

void end_mempool(uint64_t id) {
  auto& hal = chip();
  for (c10::DeviceIndex i = 0; i < hal.device_count(); i++) hal.cache(i).end_mempool(id);
}

}  // namespace

void bind_memory_history(py::module_& m) {
  m.def("_memory_snapshot", &memory_snapshot, py::arg("with_events"));
  m.def("_record_memory_history", &record_history, py::arg("contexts"), py::arg("cpp_frames"), py::arg("max_events"),
        py::arg("clear"), NoGil());
  m.def("_use_mempool", &use_mempool, py::arg("id"), py::arg("device"));
  m.def("_end_mempool", &end_mempool, py::arg("id"), NoGil());
}

}  // namespace flagos
