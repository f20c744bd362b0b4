// register.h: the list of typed routes. scripts/gen_ops.py writes one table per translation unit into the build tree;
// register.cc puts those that the chip can serve into PyTorch's dispatcher.
#pragma once

#include <torch/library.h>

#include "csrc/aten/relabel.h"
#include "csrc/aten/route.h"

namespace flagos {

// Where the dispatcher has nothing but compositions: the key of a backend that does not exist.
constexpr c10::DispatchKeySet kComposed(c10::DispatchKey::PrivateUse3);

// An operator that torch composes of others, served by that composition.
template <class Op, class Schema = typename Op::schema>
struct Compose;
template <class Op, class R, class... A>
struct Compose<Op, R(A...)> {
  static R call(A... a) { return Op::redispatch(kComposed, std::forward<A>(a)...); }
};

struct TypedRoute {
  const char* name;  // "mm.out"
  Slot* slot;
  void* relabel;
  torch::CppFunction (*function)();
  // An operator that torch composes of others. Served whole it costs one relabelling instead of several dispatches.
  bool whole;
  bool takes_device;
  void* compose = nullptr;  // where a backend may serve it whole although torch composes it
};

template <class Op>
constexpr TypedRoute typed_route(const char* name, bool whole, bool takes_device, void* compose = nullptr) {
  return {name,
          &Route<Op>::slot,
          reinterpret_cast<void*>(&Relabel<Op>::call),
          [] { return torch::CppFunction(TORCH_FN(Route<Op>::call)); },
          whole,
          takes_device,
          compose};
}

template <class Op>
TypedRoute composed_route(const char* name, bool whole, bool takes_device) {
  return typed_route<Op>(name, whole, takes_device, reinterpret_cast<void*>(&Compose<Op>::call));
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
