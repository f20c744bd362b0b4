// sdpa.cc: scaled_dot_product_attention asks a DispatchStub, not an operator, which fused kernel it may use.
#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_fused_sdp_choice_ops.h>

#include "csrc/aten/call.h"

namespace flagos {

namespace {

// The choice looks at requires_grad (a fused kernel may have no backward), which aliases do not carry otherwise.
at::Tensor alias_with_grad(Call& call, const at::Tensor& t) {
  auto alias = call[call.add(t, /*write=*/false)];
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

}  // namespace

}  // namespace flagos

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &flagos::fused_sdp_choice)
}  // namespace at::native
