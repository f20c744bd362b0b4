// softmax.cc: softmax of half precision with a result in float, on a chip that is CUDA underneath.
//
// CUDA has one kernel for that, which torch takes on a device that calls itself cuda; elsewhere it converts first.
#include <ATen/ATen.h>
#include <ATen/ops/log_softmax_native.h>
#include <ATen/ops/softmax_native.h>
#include <torch/library.h>

#include "csrc/aten/native.h"

namespace flagos {

namespace {

using at::Tensor;
using Type = std::optional<at::ScalarType>;

bool widens(const Tensor& t, Type type) { return t.scalar_type() == at::kHalf && type == at::kFloat; }

template <auto torchs, auto whole>
Tensor softmax(const Tensor& t, int64_t dim, Type type) {
  return widens(t, type) ? whole(t, dim, /*half_to_float=*/true) : torchs(t, dim, type);
}
template <auto torchs, auto whole>
Tensor& softmax_out(const Tensor& t, int64_t dim, Type type, Tensor& out) {
  return widens(t, type) ? whole(out, t, dim, /*half_to_float=*/true) : torchs(t, dim, type, out);
}

}  // namespace

void register_softmax() {
  for (const auto key : {c10::DispatchKey::PrivateUse1, c10::DispatchKey::AutogradPrivateUse1}) {
    auto* library = new torch::Library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);  // for ever
    using Out = Tensor&(const Tensor&, int64_t, Type, Tensor&);
    using New = Tensor(const Tensor&, int64_t, Type);
    library->impl("softmax.int", TORCH_FN((softmax<(New*)&at::native::softmax, &at::_softmax>)));
    library->impl("log_softmax.int", TORCH_FN((softmax<(New*)&at::native::log_softmax, &at::_log_softmax>)));
    library->impl("softmax.int_out", TORCH_FN((softmax_out<(Out*)&at::native::softmax_out, &at::_softmax_out>)));
    library->impl("log_softmax.int_out",
                  TORCH_FN((softmax_out<(Out*)&at::native::log_softmax_out, &at::_log_softmax_out>)));
  }
}

}  // namespace flagos
