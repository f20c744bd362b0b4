// device.cc: devices in torch_fl._C: counting, choosing, properties, synchronising.
#include "csrc/python/bindings.h"
#include "csrc/runtime/fork.h"
#include "csrc/runtime/platform.h"

namespace py = pybind11;

namespace flagos {
namespace {

int exchange_device(int64_t index) {
  const auto next = checked_index(index);
  const auto previous = platform().current_device();
  if (next != previous) platform().set_device(next);
  return previous;
}

py::dict device_properties(int64_t index) {
  flagos_device_info info;
  const auto device = checked_index(index);
  {
    py::gil_scoped_release no_gil;
    platform().device_info(device, &info);
  }
  py::dict d;
  d["name"] = std::string(info.name);
  d["arch"] = std::string(info.arch);
  d["driver_version"] = std::string(info.driver_version);
  d["runtime_version"] = std::string(info.runtime_version);
  d["total_memory"] = info.total_memory;
  d["major"] = info.major;
  d["minor"] = info.minor;
  d["warp_size"] = info.warp_size;
  d["multi_processor_count"] = info.multi_processor_count;
  d["max_threads_per_multi_processor"] = info.max_threads_per_multi_processor;
  d["malloc_alignment"] = info.malloc_alignment;
  return d;
}

}  // namespace

void bind_device(py::module_& m) {
  m.def("_device_count", [] { return has_platform() ? static_cast<int>(platform().device_count()) : 0; });
  m.def("_current_device", [] { return static_cast<int>(platform().current_device()); });
  m.def("_set_device", [](int64_t index) { exchange_device(index); });
  m.def("_exchange_device", &exchange_device);
  m.def("_maybe_exchange_device", [](int64_t index) {
    return index < 0 ? static_cast<int>(platform().current_device()) : exchange_device(index);
  });
  m.def("_device_properties", &device_properties);
  m.def("_mem_info", [](int64_t index) { return platform().mem_info(checked_index(index)); }, NoGil());
  m.def("_synchronize", [](int64_t index) { platform().synchronize_device(checked_index(index)); }, NoGil());
  m.def(
      "_can_access_peer",
      [](int64_t index, int64_t peer) { return platform().can_access_peer(checked_index(index), checked_index(peer)); },
      NoGil());
  m.def("_has_primary_context", [](int64_t index) { return platform().has_primary_context(checked_index(index)); });
  m.def("_is_in_bad_fork", &in_bad_fork);
}

}  // namespace flagos
