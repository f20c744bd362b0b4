// factory.cc: empty tensors on flagos. All other factories are composed of these by torch; kaiser_window also asks a
// DispatchStub.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/native/UnaryOps.h>
#include <ATen/ops/kaiser_window.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/aten/call.h"

namespace flagos {

namespace {

const c10::DispatchKeySet kDense(c10::DispatchKey::PrivateUse1);

// Makes the tensor's device current for the allocation; free when it is current already.
class Placement {
 public:
  explicit Placement(std::optional<at::Device> device) {
    if (device && device->has_index() && device->index() != platform().current_device()) guard_.emplace(*device);
  }

 private:
  std::optional<c10::DeviceGuard> guard_;
};

void check(std::optional<at::Layout> layout, std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned, not flagos tensors");
  TORCH_CHECK(layout.value_or(at::kStrided) == at::kStrided, "flagos: empty has no layout ", *layout);
}

// In torch's deterministic mode new memory holds NaN or the largest number, so that whoever reads it notices.
at::Tensor filled(at::Tensor t) {
  const auto& context = at::globalContext();
  if (C10_UNLIKELY(context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())) {
    at::native::fill_empty_deterministic_(t);
  }
  return t;
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device> device, std::optional<bool> pin_memory,
                 std::optional<at::MemoryFormat> memory_format) {
  check(layout, pin_memory);
  Placement placement(device);
  return filled(
      at::detail::empty_generic(size, flagos_allocator(), kDense, c10::dtype_or_default(dtype), memory_format));
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout> layout, std::optional<at::Device> device,
                         std::optional<bool> pin_memory) {
  check(layout, pin_memory);
  Placement placement(device);
  return filled(
      at::detail::empty_strided_generic(size, stride, flagos_allocator(), kDense, c10::dtype_or_default(dtype)));
}

// Torch does not let others ask its own devices' kernels behind the stub: the native window is made whole.
void kaiser_window(at::TensorIteratorBase& iter, int64_t window_length, double beta) {
  TORCH_CHECK(native.present, "flagos: kaiser_window has no kernel for this chip; make the window on the CPU");
  const at::Tensor result = iter.tensor(0);
  const BelowAutograd below;
  Call call;
  const auto out = call.add(result, /*write=*/true);
  call.enter("aten::kaiser_window");
  const auto options = at::TensorOptions(call[out].device()).dtype(result.dtype());
  call[out].copy_(at::kaiser_window(window_length, /*periodic=*/false, beta, options));
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
}

}  // namespace flagos

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(kaiser_window_stub, &flagos::kaiser_window)
}  // namespace at::native
