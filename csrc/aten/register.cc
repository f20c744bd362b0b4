// register.cc: connects the typed routes with PyTorch's dispatcher, once the platform is known (register.h).
#include "csrc/aten/register.h"

#include "csrc/aten/native.h"

namespace flagos {

void register_native_backend();   // backends/native
void register_layouts();          // boxed.cc
void register_host_composites();  // composite.cc
void register_half_transforms();  // fft.cc
void register_softmax();          // softmax.cc
void register_cudnn();            // cudnn.cc
void register_derivatives();      // derivatives.cc
void register_linear();           // linear.cc
void register_flash_attention();  // sdpa.cc

namespace {

// An operator is left to torch's composition when that is what its own devices do, or when serving it whole cannot tell
// a result that was asked for on the CPU from one for the device.
bool serve(const TypedRoute& route, const c10::OperatorHandle& op) {
  if (op.hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) return false;  // ours, registered statically
  // Below autograd a composition is cut off from it, unless torch has a derivative for the operator as a whole.
  if (op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
      !op.hasKernelForDispatchKey(c10::DispatchKey::Autograd)) {
    return false;
  }
  if (!native.present) return false;  // no chip of that kind has kernels yet
  if (op.hasKernelForDispatchKey(native.key(c10::DispatchKey::Dense))) return true;
  return route.whole && !(route.takes_device && native.type == c10::DeviceType::CPU);
}

// A slot for an operator that torch composes and that a backend may serve whole: not below autograd when the
// composition is what autograd differentiates.
bool compose(const TypedRoute& route, const c10::OperatorHandle& op) {
  using c10::DispatchKey;
  return route.compose && native.present && !op.hasKernelForDispatchKey(DispatchKey::PrivateUse1) &&
         !op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) &&
         (op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
          op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional));
}

}  // namespace

void register_operators() {
  set_native(platform());
  register_native_backend();
  if (native.present && native.type == c10::DeviceType::CPU) register_host_composites();
  if (native.present && native.type == c10::DeviceType::CUDA) {
    register_half_transforms();
    register_softmax();
    register_cudnn();
    register_derivatives();
    register_flash_attention();
  }
  static auto* const library =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& table : typed_routes()) {
    for (const auto* route = table.begin; route != table.begin + table.size; ++route) {
      const auto full = std::string("aten::") + route->name;
      const auto dot = full.find('.');
      const auto overload = dot == std::string::npos ? std::string() : full.substr(dot + 1);
      const auto op = dispatcher.findOp({full.substr(0, dot), overload});
      if (!op) continue;
      const bool whole = serve(*route, *op);
      if (!whole && !compose(*route, *op)) continue;
      route->slot->name = route->name;
      (whole ? route->slot->relabel : route->slot->compose) = whole ? route->relabel : route->compose;
      add_slot(*route->slot, *op);
      library->impl(route->name, route->function());
    }
  }
  if (native.present) {
    register_layouts();
    register_linear();
  }
}

}  // namespace flagos
