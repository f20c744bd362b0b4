// random.cc: generators in torch_fl._C.
#include <torch/csrc/Generator.h>

#include "csrc/python/bindings.h"
#include "csrc/runtime/generator.h"

namespace py = pybind11;

namespace flagos {

void bind_random(py::module_& m) {
  m.def("_default_generator", [](int64_t index) {
    return py::reinterpret_steal<py::object>(THPGenerator_Wrap(default_generator(checked_index(index))));
  });
}

}  // namespace flagos
