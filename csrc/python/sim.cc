// sim.cc: torch_fl._C._sim, the controls of the simulated host chip that tests use.
#include "accelerator/host/sim.h"

#include <condition_variable>
#include <mutex>
#include <string>
#include <utility>

#include "csrc/python/bindings.h"
#include "csrc/runtime/hal_platform.h"

namespace py = pybind11;

namespace flagos {
namespace {

void check(flagos_status status) {
  TORCH_CHECK_VALUE(status == FLAGOS_OK, "flagos: ", flagos_status_name(status), " ", flagos_last_message());
}

// A gate that holds streams closed, so that a test decides when queued work runs.
struct Gate {
  std::mutex mutex;
  std::condition_variable opened;
  uint64_t holds = 0, released = 0;

  void hold(int64_t id, int64_t index) {
    const auto* chip = dynamic_cast<HalPlatform*>(&platform());
    TORCH_CHECK(chip != nullptr, "flagos: only a HAL chip's streams can be held, this is ", platform().chip());
    const c10::Stream stream(c10::Stream::UNSAFE, flagos_device(checked_index(index)), id);
    uint64_t* ticket;
    {
      std::lock_guard<std::mutex> lock(mutex);
      ticket = new uint64_t(++holds);
    }
    check(chip->hal()->stream_host_func(stream.device_index(), chip->handle(stream), &wait, ticket));
  }
  void release() {
    std::lock_guard<std::mutex> lock(mutex);
    released = holds;
    opened.notify_all();
  }
  static void wait(void* argument);
};
Gate& gate() {
  static auto& g = *new Gate();  // streams may still wait at exit
  return g;
}
void Gate::wait(void* argument) {
  const uint64_t ticket = *static_cast<uint64_t*>(argument);
  delete static_cast<uint64_t*>(argument);
  std::unique_lock<std::mutex> lock(gate().mutex);
  gate().opened.wait(lock, [ticket] { return gate().released >= ticket; });
}

}  // namespace

void bind_sim(py::module_& m) {
  auto sim = m.def_submodule("_sim", "Controls of the simulated host chip.");
  sim.def("set_fail", [](const std::string& plan) { check(flagos_sim_set_fail(plan.c_str())); });
  sim.def("calls", [](const std::string& entry) { return flagos_sim_calls(entry.c_str()); });
  sim.def("set_chaos", [](uint64_t seed) { flagos_sim_set_chaos(seed); });
  // Queues on a stream a wait for the next release().
  sim.def("hold", [](int64_t id, int64_t index) { gate().hold(id, index); });
  sim.def("release", [] { gate().release(); });
  sim.def("live", [](int device) {
    uint64_t blocks = 0, bytes = 0;
    check(flagos_sim_live(device, &blocks, &bytes));
    return std::make_pair(blocks, bytes);
  });
}

}  // namespace flagos
