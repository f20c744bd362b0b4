// diagnostics.cc: in torch_fl._C, what helps to find out what went on: last operators, annotations, hidden waits.
#include <torch/csrc/utils/pybind.h>

#include "csrc/aten/route.h"
#include "csrc/python/bindings.h"
#include "csrc/runtime/last_ops.h"

namespace py = pybind11;

namespace flagos {

void bind_diagnostics(py::module_& m) {
  m.def("_last_ops", [] {
    std::vector<std::pair<std::string, std::vector<std::string>>> threads;
    for (auto& t : last_ops_by_thread()) threads.emplace_back(std::move(t.thread), std::move(t.names));
    return threads;
  });
  m.def("_set_annotating", &set_annotating, py::arg("on"));
  m.def("_set_sync_debug_mode", &set_sync_debug_mode, py::arg("mode"));
  m.def("_get_sync_debug_mode", &sync_debug_mode);
}

}  // namespace flagos
