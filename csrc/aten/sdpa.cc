// sdpa.cc: scaled_dot_product_attention asks a DispatchStub, not an operator, which fused kernel it may use. When that
// is flash attention, torch takes cuda and xpu to their kernel and every other device to the CPU's.
#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_fused_sdp_choice_ops.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/pad.h>
#include <torch/library.h>

#include "csrc/aten/call.h"

namespace flagos {

namespace {

// What torch.func wraps tensors in has no storage, and the choice needs none: it looks at sizes, strides and dtypes.
at::Tensor without_storage(const at::Tensor& t) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(native.dense, t.dtype(), native.device(t.device().index()));
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  return made;
}

// The choice looks at requires_grad (a fused kernel may have no backward), which aliases do not carry otherwise.
at::Tensor alias_with_grad(Call& call, const at::Tensor& t) {
  const bool wrapped = is_flagos(t) && !t.unsafeGetTensorImpl()->unsafe_storage();
  auto alias = wrapped ? without_storage(t) : call[call.add(t, /*write=*/false)];
  if (is_flagos(t) && t.requires_grad()) alias.unsafeGetTensorImpl()->set_requires_grad(true);
  return alias;
}

int64_t fused_sdp_choice(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const std::optional<at::Tensor>& attn_mask, double dropout_p, bool is_causal,
                         std::optional<double> scale, bool enable_gqa) {
  if (!native.present) return static_cast<int64_t>(sdp::SDPBackend::math);
  BelowAutograd below;
  Call call;
  const auto q = alias_with_grad(call, query), k = alias_with_grad(call, key), v = alias_with_grad(call, value);
  std::optional<at::Tensor> mask;
  if (attn_mask) mask = alias_with_grad(call, *attn_mask);
  return at::_ops::_fused_sdp_choice::redispatch(native.dense, q, k, v, mask, dropout_p, is_causal, scale, enable_gqa);
}

// What torch does for cuda, differentiable like it: the kernel takes head sizes that are multiples of eight.
std::tuple<at::Tensor, at::Tensor> flash_attention(const at::Tensor& query, const at::Tensor& key,
                                                   const at::Tensor& value, double dropout_p, bool is_causal,
                                                   const std::optional<at::Tensor>& attn_mask,
                                                   std::optional<double> scale) {
  TORCH_CHECK(!attn_mask, "flagos: flash attention takes no mask on this chip");
  const auto padded = [](const at::Tensor& t) {
    const auto rest = t.sym_size(-1) % 8;
    return rest == 0 ? t : at::pad_symint(t, {c10::SymInt(0), 8 - rest});
  };
  const auto results = at::_scaled_dot_product_flash_attention(
      padded(query), padded(key), padded(value), dropout_p, is_causal, /*return_debug_mask=*/false,
      sdp::calculate_scale(query, scale).guard_float(__FILE__, __LINE__));
  const auto& out = std::get<0>(results);
  const auto size = query.sym_size(-1);
  return {out.sym_size(-1) == size ? out : out.slice_symint(-1, 0, size), std::get<1>(results)};
}

}  // namespace

void register_flash_attention() {
  for (const auto key : {c10::DispatchKey::PrivateUse1, c10::DispatchKey::AutogradPrivateUse1}) {
    auto* const library = new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
    library->impl("_scaled_dot_product_flash_attention_for_cpu", TORCH_FN(flash_attention));
  }
}

}  // namespace flagos

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &flagos::fused_sdp_choice)
}  // namespace at::native
