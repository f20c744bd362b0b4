// boxed.h: relabelling of a call whose arguments lie on a stack.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/FunctionRef.h>

namespace flagos {

// Turns the operator's arguments on the stack into native aliases, lets `run` replace them by results, and turns those
// back.
void relabel_call(const c10::OperatorHandle& op, torch::jit::Stack* stack, c10::function_ref<void()> run);

}  // namespace flagos
