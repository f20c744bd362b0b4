// names.cc: operators by name, and what becomes of those that have no route (decisions.h, route.h).
#include <algorithm>

#include "csrc/aten/decisions.h"

namespace flagos {

std::optional<c10::OperatorHandle> operator_named(const std::string& name) {
  const auto dot = name.find('.');
  const auto base = (name.find("::") == std::string::npos ? "aten::" : "") + name.substr(0, dot);
  return c10::Dispatcher::singleton().findOp({base, dot == std::string::npos ? "" : name.substr(dot + 1)});
}

std::string plain_name(const c10::OperatorName& name) {
  auto full = c10::toString(name);
  return full.compare(0, 6, "aten::") == 0 ? full.substr(6) : full;
}

const OpNames& operator_names() {
  static const OpNames names = [] {
    OpNames all;
    for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) all.push_back(plain_name(name));
    std::sort(all.begin(), all.end());
    return all;
  }();
  return names;
}

Step served_without_route(const std::optional<c10::OperatorHandle>& op) {
  using c10::DispatchKey;
  const auto has = [&](DispatchKey key) { return op && op->hasKernelForDispatchKey(key); };
  if (has(DispatchKey::PrivateUse1)) {
    return {"torch_fl", true, "torch_fl serves it itself, as part of the device; it cannot be routed"};
  }
  if (has(DispatchKey::CompositeImplicitAutograd) || has(DispatchKey::CompositeExplicitAutograd) ||
      has(DispatchKey::CompositeExplicitAutogradNonFunctional)) {
    return {"composite", true, "it is composed of other operators; route those"};
  }
  return {"none", false, "no call has reached flagos yet; it gets a route with the first one"};
}

}  // namespace flagos
