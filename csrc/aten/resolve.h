// resolve.h: which backend serves one operator, and why. A pure function without torch.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "csrc/aten/config.h"

namespace flagos {

// A backend as seen from one operator, in the default order.
struct Candidate {
  std::string backend;
  bool usable = false;
  bool by_name_only = false;  // usable when asked for, never by default
  std::string why;            // why not, or a remark
};

struct Step {
  std::string backend;
  bool chosen = false;
  std::string reason;
};

struct Resolution {
  std::string backend;      // "" when no backend can serve the operator
  std::string origin;       // "default", or the wish's origin
  std::string error;        // set when backend is ""
  std::vector<Step> steps;  // what explain() shows
};

// A wish is met or fails; it never goes elsewhere. Without one the first usable candidate is taken.
Resolution resolve(const std::string& op, const std::optional<RouteLine>& wish,
                   const std::vector<Candidate>& candidates);

}  // namespace flagos
