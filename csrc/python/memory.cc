// memory.cc: memory in torch_fl._C: the cache, raw allocations, pinned memory's statistics, snapshots.
//
// Statistics of device memory come from torch's own torch._C._accelerator_getDeviceStats.
#include <ATen/core/CachingHostAllocator.h>
#include <torch/csrc/autograd/python_variable.h>

#include "csrc/aten/twin.h"
#include "csrc/python/bindings.h"
#include "csrc/runtime/platform.h"

namespace py = pybind11;

namespace flagos {
namespace {

c10::Stream stream_of(int64_t id, int64_t index) {
  return c10::Stream(c10::Stream::UNSAFE, flagos_device(checked_index(index)), id);
}

py::dict host_memory_stats() {
  at::HostStats stats;
  {
    py::gil_scoped_release no_gil;
    stats = platform().host_allocator().get_stats();
  }
  py::dict out;
  const auto stat = [&](const std::string& name, const c10::CachingAllocator::Stat& s) {
    out[py::str(name + ".current")] = s.current;
    out[py::str(name + ".peak")] = s.peak;
    out[py::str(name + ".allocated")] = s.allocated;
    out[py::str(name + ".freed")] = s.freed;
  };
  const auto duration = [&](const std::string& name, const c10::CachingAllocator::DurationStat& s) {
    out[py::str(name + ".total")] = s.total;
    out[py::str(name + ".max")] = s.max;
    out[py::str(name + ".min")] = s.min;
    out[py::str(name + ".count")] = s.count;
    out[py::str(name + ".avg")] = s.count == 0 ? 0.0 : static_cast<double>(s.total) / static_cast<double>(s.count);
  };
  stat("allocations", stats.allocations);
  stat("allocated_bytes", stats.allocated_bytes);
  stat("active_requests", stats.active_requests);
  stat("active_bytes", stats.active_bytes);
  duration("host_alloc_time", stats.host_alloc_time);
  duration("host_free_time", stats.host_free_time);
  out["num_host_alloc"] = stats.num_host_alloc;
  out["num_host_free"] = stats.num_host_free;
  return out;
}

void record_stream(const at::Tensor& tensor, int64_t id, int64_t index, int64_t type) {
  TORCH_CHECK(tensor.device().type() == kFlagos, "record_stream: expected a flagos tensor, not one on ",
              tensor.device());
  TORCH_CHECK(type == static_cast<int64_t>(kFlagos), "Expected a 'flagos' stream but found one of device type ", type);
  platform().record_stream(native_data_ptr(tensor.storage().data_ptr()), stream_of(id, index));
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def("_empty_cache", [] { platform().allocator().emptyCache({0, 0}); }, NoGil());
  m.def(
      "_set_memory_fraction",
      [](double fraction, int64_t index) { platform().set_memory_fraction(checked_index(index), fraction); }, NoGil());
  m.def("_get_memory_fraction", [](int64_t index) { return platform().memory_fraction(checked_index(index)); });
  m.def(
      "_raw_allocate",
      [](size_t nbytes, int64_t id, int64_t index) {
        return reinterpret_cast<uintptr_t>(platform().raw_allocate(nbytes, stream_of(id, index)));
      },
      NoGil());
  m.def("_raw_delete", [](uintptr_t ptr) { platform().raw_free(reinterpret_cast<void*>(ptr)); }, NoGil());
  m.def("_record_stream", &record_stream);
  m.def("_host_memory_stats", &host_memory_stats);
  m.def("_end_recording_pinned", [](unsigned long long pool, unsigned long long users_pool) {
    auto* cuda = at::getHostAllocator(at::kCUDA);
    cuda->end_allocate_to_pool({pool, users_pool});
    cuda->release_pool({pool, users_pool});
  });
  m.def("_host_empty_cache", [] { platform().host_allocator().empty_cache(); }, NoGil());
  m.def("_reset_accumulated_host_memory_stats", [] { platform().host_allocator().reset_accumulated_stats(); }, NoGil());
  m.def("_reset_peak_host_memory_stats", [] { platform().host_allocator().reset_peak_stats(); }, NoGil());
  m.def("_is_pinned_ptr", [](uintptr_t ptr) { return platform().is_pinned(reinterpret_cast<const void*>(ptr)); });
}

}  // namespace flagos
