// factory.cc: empty tensors on flagos. All other factories are composed of these by torch.
#include <ATen/EmptyTensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/aten/native.h"
#include "csrc/aten/twin.h"

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

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device> device, std::optional<bool> pin_memory,
                 std::optional<at::MemoryFormat> memory_format) {
  check(layout, pin_memory);
  Placement placement(device);
  return at::detail::empty_generic(size, flagos_allocator(), kDense, c10::dtype_or_default(dtype), memory_format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout> layout, std::optional<at::Device> device,
                         std::optional<bool> pin_memory) {
  check(layout, pin_memory);
  Placement placement(device);
  return at::detail::empty_strided_generic(size, stride, flagos_allocator(), kDense, c10::dtype_or_default(dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
}

}  // namespace flagos
