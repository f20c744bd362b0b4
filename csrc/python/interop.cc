// interop.cc: torch_fl._C._as_native and _from_native: the same memory under the other label.
//
// torch_fl.flagos offers them as as_cuda and from_cuda. On the host chip the native label is cpu; there they serve
// tests.
#include "csrc/aten/interop.h"

#include <torch/csrc/autograd/python_variable.h>

#include "csrc/python/bindings.h"

namespace py = pybind11;

namespace flagos {

void bind_interop(py::module_& m) {
  m.def("_as_native", &as_native, py::arg("tensor"), NoGil());
  m.def("_from_native", &from_native, py::arg("tensor"), py::arg("index") = -1, NoGil());
}

}  // namespace flagos
