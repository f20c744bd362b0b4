// resolve.cc: the routing rules of docs/architecture.md as one function (resolve.h).
#include "csrc/aten/resolve.h"

namespace flagos {

Resolution resolve(const std::string& op, const std::optional<RouteLine>& wish,
                   const std::vector<Candidate>& candidates) {
  Resolution result;
  result.origin = wish ? wish->origin : "default";
  std::string available;
  bool wished_exists = false;
  std::string why = "no such backend in this process";
  for (const auto& candidate : candidates) {
    const bool by_default = candidate.usable && !candidate.by_name_only;
    if (candidate.usable) available += (available.empty() ? "" : ", ") + candidate.backend;
    Step step{candidate.backend, false, candidate.why};
    if (wish && candidate.backend == wish->backend) {
      wished_exists = true;
      why = candidate.why;
      if (candidate.usable) {
        step.chosen = true;
        step.reason = "asked for by " + wish->origin;
        if (!wish->within.text.empty()) step.reason += " for calls within " + wish->within.text;
        result.backend = candidate.backend;
      }
    } else if (!wish && by_default && result.backend.empty()) {
      step.chosen = true;
      if (step.reason.empty()) step.reason = "first in the default order that has a kernel";
      result.backend = candidate.backend;
    } else if (candidate.usable && step.reason.empty()) {
      step.reason = wish         ? "not asked for"
                    : by_default ? "an earlier backend serves it"
                                 : "only when asked for by name";
    }
    result.steps.push_back(std::move(step));
  }
  if (wish && !wished_exists) result.steps.push_back({wish->backend, false, why});
  if (result.backend.empty()) {
    if (available.empty()) available = "none";
    result.error = wish ? "backend not registered: " + op + " -> " + wish->backend + " (asked for by " + wish->origin +
                              "): " + why + "; available for " + op + ": " + available
                        : "no backend has a kernel for " + op;
  }
  return result;
}

}  // namespace flagos
