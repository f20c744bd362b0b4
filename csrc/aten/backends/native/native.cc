// native.cc: the backend of a chip on whose memory torch's own kernels work, named after the chip (cuda, host). One
// template, Relabel<Op>, serves every operator that torch has for the native label.
#include "csrc/aten/native.h"
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
  const auto key = native.key(c10::DispatchKey::Dense);
  if (!slot.op->hasComputedKernelForDispatchKey(key)) {
    why = std::string("torch has no ") + c10::toString(key) + " kernel for it";
    return {};
  }
  return slot.relabel ? Kernel{slot.relabel, nullptr} : Kernel{nullptr, &native_boxed};
}

}  // namespace

void register_native_backend() { register_backend({platform().chip(), 20, &available, &kernel}); }

}  // namespace flagos
