// tuning.cc: calls one operator many times from C++, so that what is timed is its kernel and not Python's way to it.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <chrono>

#include "csrc/aten/decisions.h"
#include "csrc/python/bindings.h"

namespace py = pybind11;

namespace flagos {

namespace {

// Seconds of the host for `count` calls in a row; their results are dropped at once.
double repeat(const std::string& name, const py::tuple& args, const py::dict& kwargs, int64_t count) {
  const auto op = operator_named(name);
  TORCH_CHECK_VALUE(op, "flagos: torch has no operator ", name);
  const auto stack = torch::jit::createStackForSchema(op->schema(), torch::jit::tuple_slice(args),
                                                      py::reinterpret_borrow<py::kwargs>(kwargs), std::nullopt);
  py::gil_scoped_release no_gil;
  const at::NoGradGuard no_grad;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < count; ++i) {
    auto arguments = stack;
    op->callBoxed(arguments);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

void bind_tuning(py::module_& m) {
  m.def("_repeat", torch::wrap_pybind_function(repeat), py::arg("op"), py::arg("args"), py::arg("kwargs"),
        py::arg("count"));
}

}  // namespace flagos
