// view.cc: views and metadata. They touch no data, so torch's own functions work on flagos tensors as they are.
#include <ATen/core/Tensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "csrc/aten/call.h"

namespace flagos {

namespace {

// Module.to() and .data = keep the Parameter object when its TensorImpl can take over another's metadata. All dense
// strided ones of these devices can; without this every .to("flagos") makes new Parameters and unties tied weights.
bool has_compatible_shallow_copy_type(const at::Tensor& self, const at::Tensor& from) {
  const auto dense = [](const at::Tensor& t) {
    const auto type = t.device().type();
    return t.layout() == at::kStrided && t.key_set().has_all(c10::DispatchKeySet(c10::DispatchKey::Dense)) &&
           (type == kFlagos || type == c10::kCPU || type == c10::kMeta || type == native.type);
  };
  if (dense(self) && dense(from)) return true;
  return self.unsafeGetTensorImpl()->key_set().highestPriorityTypeId() ==
         from.unsafeGetTensorImpl()->key_set().highestPriorityTypeId();
}

void record_stream(at::Tensor& self, at::Stream stream) {
  TORCH_CHECK(stream.device_type() == kFlagos, "flagos: record_stream needs a flagos stream, not one of ",
              stream.device());
  if (self.numel() == 0) return;
  platform().record_stream(native_data_ptr(self.storage().data_ptr()), stream);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("_has_compatible_shallow_copy_type", TORCH_FN(has_compatible_shallow_copy_type));
  m.impl("record_stream", TORCH_FN(record_stream));
}

}  // namespace flagos
