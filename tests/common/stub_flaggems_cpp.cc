// stub_flaggems_cpp.cc: a stand-in for FlagGems' liboperators.so with the same exported signatures, computing with
// torch on whatever tensors it gets. Built by test_flaggems_cpp.py. Each function counts its calls (stub_calls), so
// that a test can tell whether it or torch's own kernel served; STUB_WITHOUT_BMM leaves one out.
#include <ATen/ATen.h>

#include <atomic>

static std::atomic<int> calls{0};
extern "C" int stub_calls() { return calls; }

namespace flag_gems {

using at::Scalar;
using at::Tensor;

static void count(const Tensor& t) {
  TORCH_CHECK(t.device().type() != at::kPrivateUse1, "the stand-in was called with a flagos tensor");
  ++calls;
}

Tensor mm_tensor(const Tensor& a, const Tensor& b) {
  count(a);
  return at::mm(a, b);
}
Tensor& mm_out_tensor(const Tensor& a, const Tensor& b, Tensor& out) {
  count(a);
  return at::mm_out(out, a, b);
}
Tensor addmm(const Tensor& self, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  count(self);
  return at::addmm(self, a, b, beta, alpha);
}
Tensor& addmm_out(const Tensor& self, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha,
                  Tensor& out) {
  count(self);
  return at::addmm_out(out, self, a, b, beta, alpha);
}
#ifndef STUB_WITHOUT_BMM
Tensor bmm(const Tensor& a, const Tensor& b) {
  count(a);
  return at::bmm(a, b);
}
#endif
Tensor embedding(const Tensor& weight, const Tensor& indices, int64_t padding_idx, bool scale, bool sparse) {
  count(weight);
  return at::embedding(weight, indices, padding_idx, scale, sparse);
}
Tensor argmax(const Tensor& self, std::optional<int64_t> dim, bool keepdim) {
  count(self);
  return at::argmax(self, dim, keepdim);
}
std::tuple<Tensor, Tensor> max_dim(const Tensor& self, int64_t dim, bool keepdim) {
  count(self);
  return at::max(self, dim, keepdim);
}
std::tuple<Tensor, Tensor> sort(const Tensor& self, int64_t dim, bool descending) {
  count(self);
  return at::sort(self, dim, descending);
}
std::tuple<Tensor, Tensor> sort_stable(const Tensor& self, std::optional<bool> stable, int64_t dim, bool descending) {
  count(self);
  return at::sort(self, stable, dim, descending);
}
Tensor softmax(const Tensor& self, int64_t, bool) {
  count(self);
  return at::zeros_like(self);  // a wrong answer, as the real one gives for many columns
}

}  // namespace flag_gems
