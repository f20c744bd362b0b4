// sim.cc: torch_fl._C._sim, the controls of the simulated host chip that tests use.
#include "accelerator/host/sim.h"

#include <string>
#include <utility>

#include "csrc/python/bindings.h"

namespace py = pybind11;

namespace flagos {
namespace {

void check(flagos_status status) {
  TORCH_CHECK_VALUE(status == FLAGOS_OK, "flagos: ", flagos_status_name(status), " ", flagos_last_message());
}

}  // namespace

void bind_sim(py::module_& m) {
  auto sim = m.def_submodule("_sim", "Controls of the simulated host chip.");
  sim.def("set_fail", [](const std::string& plan) { check(flagos_sim_set_fail(plan.c_str())); });
  sim.def("calls", [](const std::string& entry) { return flagos_sim_calls(entry.c_str()); });
  sim.def("set_chaos", [](uint64_t seed) { flagos_sim_set_chaos(seed); });
  sim.def("live", [](int device) {
    uint64_t blocks = 0, bytes = 0;
    check(flagos_sim_live(device, &blocks, &bytes));
    return std::make_pair(blocks, bytes);
  });
}

}  // namespace flagos
