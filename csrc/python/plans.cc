// plans.cc: the recorder of launch plans as torch_fl/plans.py uses it, and the switches and counts of plans.
#include "csrc/python/plans.h"

#include <torch/csrc/jit/python/pybind_utils.h>

#include "csrc/python/bindings.h"

namespace py = pybind11;

namespace flagos {

namespace {

// Set once by torch_fl/plans.py when it has hooked into Triton; never released, the interpreter may end before us.
std::atomic<PyObject*> begin_recording{nullptr};
// The lists of the callbacks that someone has asked Triton to call at every launch. Only their length is read, without
// the GIL: a length that is out of date costs one call its callback.
std::vector<PyObject*>& launch_hooks() {
  static auto* const lists = new std::vector<PyObject*>;
  return *lists;
}
bool launch_hook_installed() {
  for (auto* list : launch_hooks()) {
    if (Py_SIZE(list) > 0) return true;
  }
  return false;
}

void hook(const py::function& begin, const py::args& hooks) {
  if (begin_recording.load() != nullptr) return;
  for (const auto& list : hooks) launch_hooks().push_back(py::cast<py::list>(list).release().ptr());
  begin_recording.store(py::function(begin).release().ptr());
  set_plan_stop(&launch_hook_installed);
}

c10::OperatorHandle find_operator(const std::string& name, const std::string& overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
}

void operation(PlanRecorder& recorder, const std::string& name, const std::string& overload, const py::tuple& args,
               const py::dict& keywords, const py::object& result) {
  const auto op = find_operator(name, overload);
  const auto& returns = op.schema().returns();
  torch::jit::Stack arguments, results;
  try {
    const auto kwargs = py::reinterpret_borrow<py::kwargs>(keywords);
    arguments = torch::jit::createStackForSchema(op.schema(), torch::jit::tuple_slice(args), kwargs, std::nullopt);
    if (returns.size() == 1) {
      results.push_back(torch::jit::toIValue(result, returns[0].type()));
    } else if (returns.size() > 1) {
      const py::tuple several(result);
      for (size_t i = 0; i < returns.size(); ++i) {
        results.push_back(torch::jit::toIValue(several[i], returns[i].type()));
      }
    }
  } catch (const std::exception&) {
    return recorder.refuse("calls an operator with arguments that its schema does not take (" + name + ")");
  }
  recorder.operation(op, std::move(arguments), results);
}

using Grid = std::tuple<unsigned, unsigned, unsigned>;
// (bytes, "") for a number, (bytes, "address") for an address, (bytes, "map", address) for a tensor map.
void launch(PlanRecorder& recorder, uint64_t function, Grid grid, unsigned warps, unsigned ctas, unsigned shared,
            bool cooperative, bool pdl, const std::vector<std::tuple<py::bytes, std::string, uint64_t>>& parameters) {
  LaunchConfig config;
  config.function = reinterpret_cast<void*>(function);
  std::tie(config.grid[0], config.grid[1], config.grid[2]) = grid;
  config.warps = warps;
  config.ctas = ctas;
  config.shared = shared;
  config.cooperative = cooperative;
  config.pdl = pdl;
  std::vector<Parameter> list;
  for (const auto& [bytes, kind, address] : parameters) {
    list.push_back({std::string(bytes), kind == "address", std::nullopt});
    if (kind == "map") list.back().map = address;
  }
  recorder.launch(config, list);
}

}  // namespace

void record_call(const c10::OperatorHandle& op, torch::jit::Stack* stack, Recording& recording,
                 c10::function_ref<void()> call) {
  PlanRecorder recorder(op, *stack, recording.device);
  const py::object end = py::handle(begin_recording.load())(py::cast(&recorder, py::return_value_policy::reference),
                                                            static_cast<int>(recording.device));
  try {
    call();
  } catch (...) {
    // Not a word about the call: it may succeed the next time.
    const py::error_scope keep;
    end();
    throw;
  }
  end();
  recording.plan = recorder.finish(*stack);
  if (!recording.plan && !recorder.again()) recording.refused = recorder.why();
}

py::dict counts_as_dict(const PlanCounts& counts) {
  py::dict row;
  row["hits"] = counts.hits;
  row["misses"] = counts.misses;
  row["recorded"] = counts.recorded;
  row["plans"] = counts.plans;
  row["patched"] = counts.patched;
  row["refused"] = counts.refused;
  row["apart"] = counts.apart;
  return row;
}

void bind_plans(py::module_& m) {
  py::class_<PlanRecorder>(m, "_PlanRecorder")
      .def("refuse", &PlanRecorder::refuse, py::arg("reason"), py::arg("again") = false)
      .def("refused", &PlanRecorder::refused)
      .def("operation", &operation)
      .def("launch", &launch)
      .def("allocations", &PlanRecorder::allocations);
  // begin(recorder, device) -> end(). The other arguments are lists: while one of them has members, plans rest.
  m.def("_hook_plans", &hook);
  m.def("_set_plans", &set_plans, py::arg("on"));
  m.def("_set_verifying_plans", &set_verifying_plans, py::arg("on"));
  m.def("_plans_on", &plans_on);
}

}  // namespace flagos
