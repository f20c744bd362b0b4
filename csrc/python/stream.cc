// stream.cc: streams in torch_fl._C, as the (stream_id, device_index, device_type) triples that torch.Stream takes.
#include <tuple>

#include "csrc/python/bindings.h"
#include "csrc/runtime/hal_streams.h"
#include "csrc/runtime/platform.h"

namespace py = pybind11;

namespace flagos {
namespace {

using Triple = std::tuple<int64_t, int64_t, int64_t>;

Triple pack(c10::Stream stream) {
  return {stream.id(), stream.device_index(), static_cast<int64_t>(stream.device_type())};
}

c10::Stream unpack(int64_t id, int64_t index, int64_t type) {
  TORCH_CHECK(type == static_cast<int64_t>(kFlagos), "Expected a 'flagos' stream but found one of device type ", type);
  return c10::Stream(c10::Stream::UNSAFE, flagos_device(checked_index(index)), id);
}

}  // namespace

void bind_stream(py::module_& m) {
  m.def("_current_stream", [](int64_t index) { return pack(platform().current_stream(checked_index(index))); });
  m.def("_default_stream", [](int64_t index) { return pack(platform().default_stream(checked_index(index))); });
  m.def("_set_stream",
        [](int64_t id, int64_t index, int64_t type) { platform().exchange_stream(unpack(id, index, type)); });
  m.def("_external_stream", [](uintptr_t handle, int64_t index) {
    return pack(platform().external_stream(checked_index(index), reinterpret_cast<void*>(handle)));
  });
  m.def("_stream_native_handle", [](int64_t id, int64_t index, int64_t type) {
    return reinterpret_cast<uintptr_t>(platform().native_handle(unpack(id, index, type)));
  });
  m.def("_stream_priority_range", [] { return platform().stream_priority_range(); });
  m.def("_hal_stream_priority", [](int64_t id) {
    const int least = platform().stream_priority_range().first;
    return id == 0 ? least : least - static_cast<int>(id - 1) / kStreamsPerPriority;
  });
}

}  // namespace flagos
