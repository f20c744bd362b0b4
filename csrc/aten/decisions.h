// decisions.h: the routing table as backends that look at a call's arguments and the bindings use it. Apart from
// route.h, with which every typed operator is compiled.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "csrc/aten/route.h"

namespace flagos {

// The decision that an operator's lines make, of which the first that holds serves; without any, the default.
const Decision& decide_lines(Slot& slot, const std::vector<RouteLine>& lines);

// The conditions of the first of several lines, which is for some calls only; the others go to the next line, or
// without one to the next backend.
std::unique_ptr<Screen> conditions(Slot& slot, const std::vector<RouteLine>& lines);

// Gives the call under way to another decision's kernel, which the log and the counts then name.
void pass_on(const Decision& decision, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
             torch::jit::Stack* stack);

// Changes whenever conf and environment are read again: what was decided before may no longer hold.
uint64_t edition();

// Whether calls are logged or counted.
bool watched();

// Kernels of this function may pass a call on: they tell the log themselves when they serve one.
void says_itself(BoxedFunction* function);
// The line of FLAGOS_LOG_DISPATCH, when it is on.
void log_dispatch(const std::string& op, const std::string& backend);
// The same for a call that a decision serves, unless its kernel does it itself.
void announce(const Decision& decision);

// "native" on this chip, for an operator: its own kernels, or torch's composition where only others serve it whole.
std::string native_name(const Slot& slot);

// Every backend as seen from an operator that has a route, and which of them is native there.
std::vector<Candidate> candidates(const std::string& op, std::string& native_backend);

// Who serves an operator that has no route, as a step of explain().
Step served_without_route(const std::optional<c10::OperatorHandle>& op);

// The operator of such a name.
std::optional<c10::OperatorHandle> operator_named(const std::string& name);

}  // namespace flagos
