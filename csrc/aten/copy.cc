// copy.cc: copies to, from and between flagos tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/_copy_from_native.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/copy_ops.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "csrc/aten/call.h"
#include "csrc/aten/interop.h"
#include "csrc/aten/route.h"

namespace flagos {

namespace {

// Bytes that lie alike on both sides can go through the chip's copy engine in stream order.
bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  return a.dtype() == b.dtype() && a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.is_non_overlapping_and_dense() && a.is_conj() == b.is_conj() && a.is_neg() == b.is_neg();
}

const void* address(const at::Tensor& t) {
  return static_cast<const char*>(t.storage().data()) + t.storage_offset() * t.itemsize();
}

// A host copy that may return early: only where the chip has real streams and the kernels would run on this thread.
bool asynchronous(const at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  if (!native.entry || !non_blocking || self.numel() == 0 || !same_bytes(self, src)) return false;
  const auto& host = self.is_cpu() ? self : src;
  return host.is_cpu() && platform().is_pinned(host.storage().data());
}

// The record keeps the host block from being handed out again before the stream has read or written it.
void copy_asynchronously(const at::Tensor& self, const at::Tensor& src) {
  const auto device = is_flagos(self) ? self.device() : src.device();
  auto& chip = platform();
  const auto stream = chip.current_stream(device.index());
  chip.copy_bytes(const_cast<void*>(address(self)), self.device(), address(src), src.device(), self.nbytes(), stream);
  const auto& host = self.is_cpu() ? self : src;
  auto& host_ptr = host.storage().data_ptr();
  chip.host_allocator().record_event(const_cast<void*>(host_ptr.get()), host_ptr.get_context(), stream);
}

bool lazy(const at::Tensor& t) { return t.is_conj() || t.is_neg(); }

// torch's CUDA kernel moves bytes between host and device and settles lazy conjugation and negation around it, which
// goes wrong for a strided, a converted or a pinned copy (https://github.com/pytorch/pytorch/issues/146286): it has to
// see plain values.
bool needs_plain_values(const at::Tensor& self, const at::Tensor& src) {
  return (lazy(self) || lazy(src)) && self.is_cpu() != src.is_cpu() && native.type != c10::DeviceType::CPU &&
         !same_bytes(self, src);
}

void copy(const at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  static const std::string name("copy_");
  remember_op(name);
  if (asynchronous(self, src, non_blocking)) return copy_asynchronously(self, src);
  if (C10_UNLIKELY(sync_debug_mode() != 0) && is_flagos(self) != is_flagos(src) && self.numel() > 0) {
    report_synchronizing(name);
  }
  BelowAutograd below;
  if (C10_UNLIKELY(needs_plain_values(self, src))) {
    const auto values = src.resolve_conj().resolve_neg();
    if (!lazy(self)) return copy(self, values, non_blocking);
    self.copy_(values.to(self.device()));
    return;
  }
  Call call;
  const auto to = call.add(self, /*write=*/true);
  const auto from = call.add(src, /*write=*/false);
  call.enter("copy_", /*mixed_allowed=*/true);
  if (native.entry && is_flagos(self) && is_flagos(src) && self.device() != src.device()) {
    platform().enter_native(self.device().index());  // both devices' streams order a copy between them
    platform().enter_native(src.device().index());
  }
  try {
    at::_ops::copy_::redispatch(native.dense, call[to], call[from], non_blocking);
  } catch (c10::Error& error) {
    tell(error, "aten::copy_");
    throw;
  }
  call.write_back();
}

bool plain(const at::Tensor& t) {
  return t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested() && !t.is_meta() && t.has_storage();
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  if (!native.present || !plain(self) || !plain(src)) return at::native::copy_(self, src, non_blocking);
  copy(self, src, non_blocking);
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  copy(dst, self, non_blocking);
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  dst.resize_(self.sizes());
  copy(dst, self, /*non_blocking=*/false);
  return dst;
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
}
TORCH_LIBRARY_IMPL(aten, QuantizedPrivateUse1, m) {
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
}

// Without these the fallbacks for lazy conjugation clone the argument, the clone copies, and the copy comes here again.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
  m.impl("_copy_from_and_resize", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
  m.impl("_copy_from_and_resize", torch::CppFunction::makeFallthrough());
}

}  // namespace flagos
