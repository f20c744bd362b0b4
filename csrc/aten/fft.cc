// fft.cc: Fourier transforms of half precision on a chip that is CUDA underneath.
//
// torch composes torch.fft.* of three operators that CUDA has for half too, but the composition refuses half on every
// device that does not call itself cuda. For half the composition is made here, the same for values and launches, and
// differentiable like torch's; every other dtype goes to torch's own.
#include <ATen/ATen.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/fft_fft2_native.h>
#include <ATen/ops/fft_fft_native.h>
#include <ATen/ops/fft_fftn_native.h>
#include <ATen/ops/fft_hfft2_native.h>
#include <ATen/ops/fft_hfft_native.h>
#include <ATen/ops/fft_hfftn_native.h>
#include <ATen/ops/fft_ifft2_native.h>
#include <ATen/ops/fft_ifft_native.h>
#include <ATen/ops/fft_ifftn_native.h>
#include <ATen/ops/fft_ihfft2_native.h>
#include <ATen/ops/fft_ihfft_native.h>
#include <ATen/ops/fft_ihfftn_native.h>
#include <ATen/ops/fft_irfft2_native.h>
#include <ATen/ops/fft_irfft_native.h>
#include <ATen/ops/fft_irfftn_native.h>
#include <ATen/ops/fft_rfft2_native.h>
#include <ATen/ops/fft_rfft_native.h>
#include <ATen/ops/fft_rfftn_native.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/aten/native.h"

namespace flagos {

namespace {

using at::Tensor;
using Norm = std::optional<std::string_view>;
using Length = std::optional<c10::SymInt>;
using Lengths = at::OptionalSymIntArrayRef;
using Dims = at::OptionalIntArrayRef;

bool is_half(const Tensor& t) { return t.scalar_type() == at::kHalf || t.scalar_type() == at::kComplexHalf; }
Tensor complex(const Tensor& t) { return t.is_complex() ? t : t.to(at::kComplexHalf); }

// What the three operators call the scaling: 0 none, 1 by the root of the length, 2 by the length.
int64_t scaling(Norm norm, bool forward) {
  if (!norm || *norm == "backward") return forward ? 0 : 2;
  if (*norm == "forward") return forward ? 2 : 0;
  TORCH_CHECK(*norm == "ortho", "Invalid normalization mode: \"", *norm, "\"");
  return 1;
}

void real_only(const Tensor& t, const char* name, const char* kind = "real ") {
  TORCH_CHECK(!t.is_complex(), name, " expects a ", kind, "input tensor, but got ", t.scalar_type());
}

// Zeros after the end, or less of it.
Tensor resized(Tensor t, at::IntArrayRef dims, at::IntArrayRef lengths) {
  at::DimVector pad(2 * t.dim());
  bool padded = false;
  for (size_t i = 0; i < dims.size(); ++i) {
    const auto have = t.size(dims[i]);
    if (have < lengths[i]) {
      pad[2 * (t.dim() - 1 - dims[i]) + 1] = lengths[i] - have;
      padded = true;
    } else if (have > lengths[i]) {
      t = t.slice(dims[i], 0, lengths[i]);
    }
  }
  return padded ? at::constant_pad_nd(t, pad) : t;
}

struct Shape {
  at::DimVector dims, lengths;
};
Shape shape_of(const Tensor& t, Lengths s, Dims dim) {
  Shape shape;
  if (dim) {
    shape.dims.assign(dim->begin(), dim->end());
  } else {
    const int64_t n = s ? int64_t(s->size()) : t.dim();
    TORCH_CHECK(n <= t.dim(), "Got shape with ", n, " values but input tensor only has ", t.dim(), " dimensions.");
    for (int64_t i = t.dim() - n; i < t.dim(); ++i) shape.dims.push_back(i);
  }
  at::maybe_wrap_dims(shape.dims, t.dim(), /*wrap_scalars=*/false);
  auto sorted = shape.dims;
  std::sort(sorted.begin(), sorted.end());
  TORCH_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), "FFT dims must be unique");
  TORCH_CHECK(!s || s->size() == shape.dims.size(), "When given, dim and shape arguments must have the same length");
  for (size_t i = 0; i < shape.dims.size(); ++i) {
    const int64_t wanted = s ? (*s)[i].guard_int(__FILE__, __LINE__) : -1;
    shape.lengths.push_back(wanted == -1 ? t.size(shape.dims[i]) : wanted);
    TORCH_CHECK(shape.lengths.back() > 0, "Invalid number of data points (", shape.lengths.back(), ") specified");
  }
  return shape;
}
// The lengths of a half-complex input; returns the length of the real result's last dimension.
int64_t halve(Shape& shape, const Tensor& t, Lengths s) {
  TORCH_CHECK(!shape.dims.empty(), "a transform to real numbers must transform at least one axis");
  const bool given = s && (*s)[s->size() - 1].guard_int(__FILE__, __LINE__) != -1;
  const int64_t last = given ? shape.lengths.back() : 2 * (t.size(shape.dims.back()) - 1);
  TORCH_CHECK(last >= 1, "Invalid number of data points (", last, ") specified");
  shape.lengths.back() = last / 2 + 1;
  return last;
}

// ---- the transforms: `forward` is the sign of the exponent, `out` where the result goes, if it is defined

void complex_only(const Tensor& out, const char* name) {
  TORCH_CHECK(!out.defined() || out.is_complex(), name, " expects a complex output tensor, but got ",
              out.scalar_type());
}
Tensor to_complex(const Tensor& t, at::IntArrayRef dims, Norm norm, bool forward, Tensor out, const char* name) {
  complex_only(out, name);
  if (out.defined()) return at::_fft_c2c_out(out, t, dims, scaling(norm, forward), forward);
  return at::_fft_c2c(t, dims, scaling(norm, forward), forward);
}
Tensor from_real(const Tensor& t, at::IntArrayRef dims, Norm norm, bool forward, bool onesided, Tensor out,
                 const char* name) {
  complex_only(out, name);
  // The operator has one sign only.
  if (out.defined() && forward) return at::_fft_r2c_out(out, t, dims, scaling(norm, forward), onesided);
  auto result = at::_fft_r2c(t, dims, scaling(norm, forward), onesided);
  if (forward) return result;
  return out.defined() ? at::conj_physical_out(out, result) : result.conj();
}
Tensor to_real(const Tensor& t, at::IntArrayRef dims, Norm norm, bool forward, int64_t length, Tensor out,
               const char* name) {
  TORCH_CHECK(!out.defined() || out.is_floating_point(), name, " expects a floating point output tensor, but got ",
              out.scalar_type());
  const auto input = forward ? t.conj() : t;  // likewise
  if (out.defined()) return at::_fft_c2r_out(out, input, dims, scaling(norm, forward), length);
  return at::_fft_c2r(input, dims, scaling(norm, forward), length);
}

Tensor fft(const Tensor& t, at::IntArrayRef dims, Norm norm, bool forward, const Tensor& out) {
  const char* name = forward ? "fft" : "ifft";
  return t.is_complex() ? to_complex(t, dims, norm, forward, out, name)
                        : from_real(t, dims, norm, forward, false, out, name);
}

struct One {  // of one dimension
  at::DimVector dim;
  int64_t length;
  Tensor input;
  One(const Tensor& t, const Length& n, int64_t d, bool halved) {
    dim = {at::maybe_wrap_dim(d, t.dim(), /*wrap_scalar=*/false)};
    length = n ? n->guard_int(__FILE__, __LINE__) : halved ? 2 * (t.size(dim[0]) - 1) : t.size(dim[0]);
    TORCH_CHECK(length >= 1, "Invalid number of data points (", length, ") specified");
    input = n ? resized(t, dim, {halved ? length / 2 + 1 : length}) : t;
  }
};

template <bool forward>
Tensor fft_1(const Tensor& t, const Length& n, int64_t d, Norm norm, const Tensor& out) {
  const One one(t, n, d, false);
  return fft(one.input, one.dim, norm, forward, out);
}
template <bool forward>
Tensor rfft_1(const Tensor& t, const Length& n, int64_t d, Norm norm, const Tensor& out) {
  const char* name = forward ? "rfft" : "ihfft";
  real_only(t, name);
  const One one(t, n, d, false);
  return from_real(one.input, one.dim, norm, forward, true, out, name);
}
template <bool forward>
Tensor irfft_1(const Tensor& t, const Length& n, int64_t d, Norm norm, const Tensor& out) {
  const One one(complex(t), n, d, true);
  return to_real(one.input, one.dim, norm, forward, one.length, out, forward ? "hfft" : "irfft");
}
template <bool forward>
Tensor fft_n(const Tensor& t, Lengths s, Dims dim, Norm norm, const Tensor& out) {
  const auto shape = shape_of(t, s, dim);
  return to_complex(resized(complex(t), shape.dims, shape.lengths), shape.dims, norm, forward, out, "fftn");
}
Tensor rfft_n(const Tensor& t, Lengths s, Dims dim, Norm norm, const Tensor& out) {
  real_only(t, "rfftn", "real-valued ");
  const auto shape = shape_of(t, s, dim);
  TORCH_CHECK(!shape.dims.empty(), "rfftn must transform at least one axis");
  return from_real(resized(t, shape.dims, shape.lengths), shape.dims, norm, true, true, out, "rfftn");
}
Tensor irfft_n(const Tensor& t, Lengths s, Dims dim, Norm norm, const Tensor& out) {
  auto shape = shape_of(t, s, dim);
  const auto last = halve(shape, t, s);
  return to_real(resized(complex(t), shape.dims, shape.lengths), shape.dims, norm, false, last, out, "irfftn");
}
Tensor hfft_n(const Tensor& t, Lengths s, Dims dim, Norm norm, const Tensor& out) {
  auto shape = shape_of(t, s, dim);
  const auto last = halve(shape, t, s);
  auto x = resized(complex(t), shape.dims, shape.lengths);
  const auto final_dim = shape.dims.back();
  shape.dims.pop_back();
  if (!shape.dims.empty()) x = to_complex(x, shape.dims, norm, true, {}, "hfftn");
  return to_real(x, {final_dim}, norm, true, last, out, "hfftn");
}
Tensor ihfft_n(const Tensor& t, Lengths s, Dims dim, Norm norm, const Tensor& out) {
  auto shape = shape_of(t, s, dim);
  TORCH_CHECK(!shape.dims.empty(), "ihfftn must transform at least one axis");
  const auto x = resized(t, shape.dims, shape.lengths);
  const auto final_dim = shape.dims.back();
  shape.dims.pop_back();
  if (shape.dims.empty()) return from_real(x, {final_dim}, norm, false, true, out, "ihfftn");
  const auto last = at::conj_physical(at::_fft_r2c(x, {final_dim}, scaling(norm, false), true));
  return to_complex(last, shape.dims, norm, false, out, "ihfftn");
}

// ---- registration: half here, everything else to torch's composition

template <auto torchs, auto half, class Function = decltype(torchs)>
struct Transform;
template <auto torchs, auto half, class S, class D>
struct Transform<torchs, half, Tensor (*)(const Tensor&, S, D, Norm)> {
  static Tensor call(const Tensor& t, S s, D dim, Norm norm) {
    return is_half(t) ? half(t, s, dim, norm, {}) : torchs(t, s, dim, norm);
  }
};
template <auto torchs, auto half, class S, class D, class Out>
struct Transform<torchs, half, Out& (*)(const Tensor&, S, D, Norm, Out&)> {
  static Out& call(const Tensor& t, S s, D dim, Norm norm, Out& out) {
    if (!is_half(t)) return torchs(t, s, dim, norm, out);
    half(t, s, dim, norm, out);
    return out;
  }
};

template <auto torchs, auto torchs_out, auto half>
void add(torch::Library& below, torch::Library& autograd, const std::string& name) {
  for (auto* library : {&below, &autograd}) {
    library->impl(name.c_str(), TORCH_FN((Transform<torchs, half>::call)));
    library->impl((name + ".out").c_str(), TORCH_FN((Transform<torchs_out, half>::call)));
  }
}

}  // namespace

void register_half_transforms() {
  static auto* const below =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  static auto* const autograd =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
#define TRANSFORM(name, ...) \
  add<&at::native::name##_symint, &at::native::name##_symint_out, &__VA_ARGS__>(*below, *autograd, #name)
  TRANSFORM(fft_fft, fft_1<true>);
  TRANSFORM(fft_ifft, fft_1<false>);
  TRANSFORM(fft_rfft, rfft_1<true>);
  TRANSFORM(fft_ihfft, rfft_1<false>);
  TRANSFORM(fft_irfft, irfft_1<false>);
  TRANSFORM(fft_hfft, irfft_1<true>);
  TRANSFORM(fft_fftn, fft_n<true>);
  TRANSFORM(fft_ifftn, fft_n<false>);
  TRANSFORM(fft_rfftn, rfft_n);
  TRANSFORM(fft_irfftn, irfft_n);
  TRANSFORM(fft_hfftn, hfft_n);
  TRANSFORM(fft_ihfftn, ihfft_n);
  TRANSFORM(fft_fft2, fft_n<true>);
  TRANSFORM(fft_ifft2, fft_n<false>);
  TRANSFORM(fft_rfft2, rfft_n);
  TRANSFORM(fft_irfft2, irfft_n);
  TRANSFORM(fft_hfft2, hfft_n);
  TRANSFORM(fft_ihfft2, ihfft_n);
#undef TRANSFORM
}

}  // namespace flagos
