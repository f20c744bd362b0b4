// plans.h: how a Python kernel's call is watched while its launch plan is made.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "csrc/aten/plan/planned.h"

namespace flagos {

// Runs `call`, which replaces the native arguments on the stack by its results, and records it. Needs the GIL.
void record_call(const c10::OperatorHandle& op, torch::jit::Stack* stack, Recording& recording,
                 c10::function_ref<void()> call);

pybind11::dict counts_as_dict(const PlanCounts& counts);

}  // namespace flagos
