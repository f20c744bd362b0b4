// register.h: the list of typed routes. scripts/gen_ops.py writes one table per translation unit into the build tree;
// register.cc puts those that the chip can serve into PyTorch's dispatcher.
#pragma once

#include <torch/library.h>

#include "csrc/aten/relabel.h"
#include "csrc/aten/route.h"

namespace flagos {

struct TypedRoute {
  const char* name;  // "mm.out"
  Slot* slot;
  void* relabel;
  torch::CppFunction (*function)();
  // An operator that torch composes of others. Served whole it costs one relabelling instead of several dispatches.
  bool whole;
  bool takes_device;
};

template <class Op>
constexpr TypedRoute typed_route(const char* name, bool whole, bool takes_device) {
  return {name,
          &Route<Op>::slot,
          reinterpret_cast<void*>(&Relabel<Op>::call),
          [] { return torch::CppFunction(TORCH_FN(Route<Op>::call)); },
          whole,
          takes_device};
}

struct TypedRoutes {
  const TypedRoute* begin;
  size_t size;
};
// In the generated sources.
const std::vector<TypedRoutes>& typed_routes();

// Registers backends, typed routes and layouts for the process's platform. Called once.
void register_operators();

}  // namespace flagos
