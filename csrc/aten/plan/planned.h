// planned.h: a call of a Python kernel with its plan: replayed when there is one, else run in Python and recorded.
#pragma once

#include <c10/util/FunctionRef.h>

#include "csrc/aten/plan/recorder.h"
#include "csrc/aten/plan/table.h"

namespace flagos {

// What the recording of a call came to. The Python side fills it while the call runs.
struct Recording {
  c10::DeviceIndex device = -1;
  std::shared_ptr<const Plan> plan;
  std::string refused;
};

// Replaces the arguments on the stack by the results. `python` runs the call in Python; with a Recording it watches.
void run_planned(PlanTable& table, const c10::OperatorHandle& op, torch::jit::Stack* stack,
                 c10::function_ref<void(Recording*)> python);

// The same with lent arguments, if there is a plan that may be replayed; `begin` is called before.
bool replay_lent(PlanTable& table, const c10::OperatorHandle& op, const torch::jit::Stack& arguments,
                 torch::jit::Stack& results, c10::function_ref<void()> begin);

// While `stop` says so, calls run in Python and nothing is recorded; it is asked before every call, on any thread.
void set_plan_stop(bool (*stop)());

}  // namespace flagos
