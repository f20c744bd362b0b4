// third_party.cc: an operator of another library, with kernels for the CPU and for CUDA alone, for dispatch.py: flagos
// reaches it through the boxed path, which knows no operator beforehand.
#include <ATen/core/Tensor.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

namespace {

at::Tensor scale(const at::Tensor& x, double by) { return at::mul(x, by); }

}  // namespace

TORCH_LIBRARY(flagos_bench, m) { m.def("scale(Tensor x, float by) -> Tensor"); }
TORCH_LIBRARY_IMPL(flagos_bench, CPU, m) { m.impl("scale", TORCH_FN(scale)); }
TORCH_LIBRARY_IMPL(flagos_bench, CUDA, m) { m.impl("scale", TORCH_FN(scale)); }
