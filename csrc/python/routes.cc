// routes.cc: the routing table's bindings; torch_fl/routing.py is their face.
#include <ATen/ScalarOps.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <chrono>
#include <complex>
#include <fstream>
#include <sstream>

#include "csrc/aten/backends/cpu/cpu.h"
#include "csrc/aten/decisions.h"
#include "csrc/aten/native.h"
#include "csrc/aten/route.h"
#include "csrc/python/bindings.h"

namespace py = pybind11;

namespace flagos {

namespace {

using Environment = std::map<std::string, std::string>;

// What the conf file and the environment said, for routes that have to be resolved again.
std::vector<RouteLine>& applied() {
  static auto* const lines = new std::vector<RouteLine>;
  return *lines;
}

// Reads and checks everything before anything is applied. An empty path means that no conf file is used.
void configure_from(const std::string& path, const Environment& env) {
  std::vector<RouteLine> lines;
  if (!path.empty()) {
    std::ifstream file(path);
    if (!file) throw ConfigError(path + ": cannot be read; FLAGOS_BACKEND_CONFIG must name an existing conf file");
    std::stringstream text;
    text << file.rdbuf();
    lines = parse_conf(text.str(), path, operator_names());
  }
  for (auto& line : parse_env(env, operator_names())) {  // beats what the conf says
    const auto same = [&](const RouteLine& other) { return other.op == line.op; };
    lines.erase(std::remove_if(lines.begin(), lines.end(), same), lines.end());
    lines.push_back(std::move(line));
  }
  configure(lines);
  applied() = std::move(lines);
}

// Conf and environment lines for operators that torch composes of others, which therefore have no route here.
std::vector<std::pair<std::string, std::string>> lines_without_effect() {
  std::vector<std::pair<std::string, std::string>> rows;
  const auto table = routes();
  const auto has_route = [&](const std::string& op) {
    return std::any_of(table.begin(), table.end(), [&](const auto& row) { return row.op == op; });
  };
  for (const auto& line : applied()) {
    if (has_route(line.op)) continue;
    const auto op = operator_named(line.op);
    using c10::DispatchKey;
    if (op && (op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
               op->hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd))) {
      rows.emplace_back(line.op, line.origin);
    }
  }
  return rows;
}

std::vector<RouteLine> parse_routes(const std::map<std::string, std::string>& routes, const char* origin) {
  std::vector<RouteLine> lines;
  const auto& known = operator_names();
  for (const auto& [op, backend] : routes) {
    if (!std::binary_search(known.begin(), known.end(), op)) {  // before it is pasted into a line of a conf
      const auto near = nearest(op, known);
      throw ConfigError(std::string(origin) + ": unknown operator '" + op + "'" +
                        (near.empty() ? "" : "; did you mean '" + near + "'?"));
    }
    auto parsed = parse_conf(op + " = " + backend, origin, operator_names());
    parsed.front().origin = origin;
    lines.push_back(std::move(parsed.front()));
  }
  return lines;
}

void set_route_checked(const std::string& op, const std::optional<std::string>& backend) {
  if (!backend) return set_route({op, "", "set_route", {}});
  set_route(parse_routes({{op, *backend}}, "set_route").front());
}

// A Python number as one of torch's; none when it is something else.
std::optional<c10::Scalar> number(const py::handle& value) {
  if (py::isinstance<py::bool_>(value)) return c10::Scalar(py::cast<bool>(value));
  if (py::isinstance<py::int_>(value)) return c10::Scalar(py::cast<int64_t>(value));
  if (py::isinstance<py::float_>(value)) return c10::Scalar(py::cast<double>(value));
  if (PyComplex_Check(value.ptr())) return c10::Scalar(c10::complex<double>(py::cast<std::complex<double>>(value)));
  return std::nullopt;
}

// Numbers in the place of tensors become what torch makes of them.
py::tuple wrap_numbers(const c10::OperatorHandle& op, const py::tuple& args) {
  py::tuple wrapped(args.size());
  for (size_t i = 0; i < args.size(); ++i) {
    py::object value = args[i];
    const bool tensor =
        i < op.schema().arguments().size() && op.schema().arguments()[i].type()->kind() == c10::TypeKind::TensorType;
    if (const auto scalar = tensor ? number(value) : std::nullopt) {
      auto made = at::scalar_to_tensor(*scalar);
      made.unsafeGetTensorImpl()->set_wrapped_number(true);
      value = py::cast(made);
    }
    wrapped[i] = value;
  }
  return wrapped;
}

// Calls one operator many times, so that what tune() times is its kernel and not Python's way to it. Seconds of the
// host; results are dropped at once.
double repeat(const std::string& name, const py::tuple& args, const py::dict& kwargs, int64_t count) {
  const auto op = operator_named(name);
  TORCH_CHECK_VALUE(op, "flagos: torch has no operator ", name);
  const auto stack = torch::jit::createStackForSchema(op->schema(), torch::jit::tuple_slice(wrap_numbers(*op, args)),
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

void bind_routes(py::module_& m) {
  m.def("_configure", &configure_from, py::arg("path"), py::arg("env"));
  m.def("_reconfigure", [] { configure(applied()); });
  m.def("_lines_without_effect", &lines_without_effect);
  m.def("_routes", [] {
    std::vector<std::tuple<std::string, std::string, std::string, std::string>> rows;
    for (const auto& r : routes()) rows.emplace_back(r.op, r.backend, r.origin, r.reason);
    return rows;
  });
  m.def("_explain", [](const std::string& op) {
    std::vector<std::tuple<std::string, bool, std::string>> rows;
    for (const auto& step : explain(op).steps) rows.emplace_back(step.backend, step.chosen, step.reason);
    return rows;
  });
  // ((backend, usable, only by name, why) ..., the name of the native one)
  m.def("_candidates", [](const std::string& op) {
    std::vector<std::tuple<std::string, bool, bool, std::string>> rows;
    std::string native_backend;
    for (const auto& c : candidates(op, native_backend)) rows.emplace_back(c.backend, c.usable, c.by_name_only, c.why);
    return std::make_pair(rows, native_backend);
  });
  m.def("_repeat", torch::wrap_pybind_function(repeat), py::arg("op"), py::arg("args"), py::arg("kwargs"),
        py::arg("count"));
  m.def("_set_route", &set_route_checked, py::arg("op"), py::arg("backend"));
  m.def("_push_thread_route", [](const std::map<std::string, std::string>& routes) {
    return push_thread_routes(parse_routes(routes, "route"));
  });
  m.def("_pop_thread_route", &pop_thread_routes);
  m.def("_registered_ops", [] {
    std::vector<std::string> names;
    for (const auto& r : routes()) names.push_back(r.op);
    return names;
  });
  m.def("_counts", [] {
    std::vector<std::tuple<std::string, std::string, uint64_t, uint64_t>> rows;  // the last: nanoseconds of the host
    for (const auto& c : call_counts()) rows.emplace_back(c.op, c.backend, c.calls, c.nanoseconds);
    return rows;
  });
  m.def("_set_counting", &set_counting);
  m.def("_set_log", &set_logging);
  m.def("_fallbacks", [] {
    std::map<std::string, uint64_t> rows;
    for (const auto& [op, n] : fallback_counts()) rows.emplace(op, n);
    return rows;
  });
  m.def("_reset_fallbacks", &reset_fallback_counts);
  m.def("_set_strict", &set_strict);
  m.def("_native_key", []() -> std::optional<std::string> {
    if (!native.present) return std::nullopt;
    return c10::toString(native.key(c10::DispatchKey::Dense));
  });
}

}  // namespace flagos
