// native.cc: the backend of a chip on whose memory torch's own kernels work, named after the chip (cuda, host). One
// template, Relabel<Op>, serves every operator that torch has for the native label. And "composite": torch's
// composition of operators that have a slot only so that another backend may serve them whole.
#include "csrc/aten/native.h"
#include "csrc/aten/register.h"
#include "csrc/aten/route.h"

namespace flagos {

namespace {

void native_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  relabel_boxed(op, c10::DispatchKey::Dense, stack);
}

bool available(std::string& why) {
  if (native.present) return true;
  why = std::string("torch has no kernels for the chip ") + platform().chip();
  return false;
}

Kernel kernel(const Slot& slot, std::string& why) {
  if (slot.compose) {
    why = "torch composes it of other operators, which have routes of their own";
    return {};
  }
  const auto key = native.key(c10::DispatchKey::Dense);
  if (!slot.op->hasComputedKernelForDispatchKey(key)) {
    why = std::string("torch has no ") + c10::toString(key) + " kernel for it";
    return {};
  }
  return Kernel{slot.relabel, &native_boxed};
}

// Torch's composition of an operator, as if nothing were registered for flagos.
void compose_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  op.redispatchBoxed(kComposed, stack);
}

Kernel composition(const Slot& slot, std::string& why) {
  if (!slot.compose) return {};
  why = "torch's composition of other operators, each with a route of its own";
  return Kernel{slot.compose, &compose_boxed, false, true};
}

bool always(std::string&) { return true; }

FLAGOS_BACKEND(composite, {"composite", 30, &always, &composition});

}  // namespace

void register_native_backend() { register_backend({platform().chip(), 20, &available, &kernel}); }

}  // namespace flagos
