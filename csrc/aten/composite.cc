// composite.cc: operators that torch's CPU cannot serve for the simulated host device, composed of others.
//
// torch's RNN layers call the fused cells for every accelerator, but the CPU has none. native_dropout draws from the
// CPU's process-wide generator, while a flagos device has its own.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "csrc/aten/native.h"

namespace flagos {

namespace {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;

Tensor with_bias(const Tensor& gates, OptionalTensor bias) { return bias && bias->defined() ? gates + *bias : gates; }

// Gates in the order input, forget, cell, output: [batch, 4 * hidden]. The third result is the fused kernel's
// workspace, which only its own backward reads; autograd differentiates this composition instead.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cx,
                                             OptionalTensor input_bias, OptionalTensor hidden_bias) {
  const auto gates = with_bias(with_bias(input_gates + hidden_gates, input_bias), hidden_bias).chunk(4, 1);
  const auto cy = gates[1].sigmoid() * cx + gates[0].sigmoid() * gates[2].tanh();
  return {gates[3].sigmoid() * cy.tanh(), cy, at::empty({0}, cx.options())};
}

// Gates in the order reset, update, new: [batch, 3 * hidden].
std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hx,
                                    OptionalTensor input_bias, OptionalTensor hidden_bias) {
  const auto input = with_bias(input_gates, input_bias).chunk(3, 1);
  const auto hidden = with_bias(hidden_gates, hidden_bias).chunk(3, 1);
  const auto reset = (input[0] + hidden[0]).sigmoid();
  const auto update = (input[1] + hidden[1]).sigmoid();
  const auto fresh = (input[2] + reset * hidden[2]).tanh();
  return {(hx - fresh) * update + fresh, at::empty({0}, hx.options())};
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  const auto options = input.options().dtype(at::kBool);
  if (!train.value_or(true)) return {input.clone(), at::ones_like(input, options)};
  const double keep = 1.0 - p;
  auto mask = at::empty_like(input, options).bernoulli_(keep);
  return {input.mul(mask).mul_(keep == 0.0 ? 0.0 : 1.0 / keep), mask};
}

}  // namespace

void register_host_composites() {
  static auto* const below =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  below->impl("_thnn_fused_lstm_cell", TORCH_FN(lstm_cell));
  below->impl("_thnn_fused_gru_cell", TORCH_FN(gru_cell));
  below->impl("native_dropout", TORCH_FN(native_dropout));
  static auto* const autograd =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  autograd->impl("_thnn_fused_lstm_cell", TORCH_FN(lstm_cell));
  autograd->impl("_thnn_fused_gru_cell", TORCH_FN(gru_cell));
}

}  // namespace flagos
