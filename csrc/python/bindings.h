// bindings.h: the parts of torch_fl._C, one function per source file of this directory.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace flagos {

void bind_device(pybind11::module_& m);
void bind_stream(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_memory_history(pybind11::module_& m);
void bind_interop(pybind11::module_& m);
void bind_random(pybind11::module_& m);
void bind_routes(pybind11::module_& m);
void bind_python_kernels(pybind11::module_& m);
void bind_plans(pybind11::module_& m);
void bind_sim(pybind11::module_& m);
void bind_diagnostics(pybind11::module_& m);

using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace flagos
