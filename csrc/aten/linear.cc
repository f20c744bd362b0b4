// linear.cc: a linear layer in one step, where torch composes it of t, two views and mm or addmm with a node of
// autograd each.
//
// The layers of a transformer spend more of the host's time in the others than in mm itself. The same mm or addmm is
// called with the same sizes and strides, forward and backward, so that results are those of the composition bit for
// bit, whichever backend serves it. Whatever is not plain (other strides, forward-mode derivatives, a transform or mode
// that watches operators, a profiler, a backward pass that is to be differentiated) takes the composition.
#include <ATen/ATen.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/linear_native.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "csrc/aten/nodes.h"
#include "csrc/aten/relabel.h"
#include "csrc/aten/route.h"

namespace flagos {

namespace {

namespace autograd = torch::autograd;
using at::Tensor;
using Mm = at::_ops::mm;
using Addmm = at::_ops::addmm;

// ---- what is plain -------------------------------------------------------------------------------------------------

// Nobody looks at the operators that a layer is made of.
bool unwatched() {
  return !at::hasCallbacks() && (c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty();
}

bool plain(const Tensor& t) {
  static const auto dense =
      c10::DispatchKeySet({c10::DispatchKey::PrivateUse1, c10::DispatchKey::AutogradPrivateUse1,
                           c10::DispatchKey::AutocastPrivateUse1, c10::DispatchKey::ADInplaceOrView})
          .raw_repr();
  if ((t.key_set().raw_repr() & ~dense) != 0 || !is_flagos(t) || t.numel() == 0) return false;
  // Stricter than is_contiguous(), for which the stride of a dimension of size 1 means nothing: torch folds by it.
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int64_t d = t.dim(); d-- > 0; expected *= sizes[d]) {
    if (strides[d] != expected) return false;
  }
  return true;
}

bool together(const Tensor& a, const Tensor& b) {
  return plain(a) && plain(b) && a.dim() >= 2 && a.scalar_type() == b.scalar_type() && a.is_floating_point() &&
         a.device() == b.device() && !a.is_same(b);
}

bool plain_layer(const Tensor& input, const Tensor& weight, const Tensor* bias) {
  // A single column has the strides of a transposed matrix, too, for which torch's formula differs.
  if (weight.dim() != 2 || !together(input, weight) || input.size(-1) != weight.size(1) || weight.size(1) == 1 ||
      autograd::isFwGradDefined(input) || autograd::isFwGradDefined(weight)) {
    return false;
  }
  return unwatched() && (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && together(weight, *bias) &&
                                   !autograd::isFwGradDefined(*bias)));
}

// ---- one product ---------------------------------------------------------------------------------------------------

// The aliases of a call are its own, so this may make one the matrix of its last dimension and all others in place.
const Tensor& shape_matrix(const Tensor& alias, bool turn) {
  auto* impl = alias.unsafeGetTensorImpl();
  const auto columns = impl->sizes().back(), rows = impl->numel() / columns;
  int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  if (turn) {
    std::swap(sizes[0], sizes[1]);
    std::swap(strides[0], strides[1]);
  }
  impl->set_sizes_and_strides(at::IntArrayRef(sizes), at::IntArrayRef(strides));
  return alias;
}

// What Relabel calls on the aliases: torch's kernel, on matrices; a turned one is transposed.
template <class Op, bool turn_a, bool turn_b>
struct OnMatrices {
  static Tensor call(const Tensor& a, const Tensor& b) {
    return Op::redispatch(native.dense, shape_matrix(a, turn_a), shape_matrix(b, turn_b));
  }
  static Tensor call(const Tensor& bias, const Tensor& a, const Tensor& b, const at::Scalar& beta,
                     const at::Scalar& alpha) {
    return Op::redispatch(native.dense, bias, shape_matrix(a, turn_a), shape_matrix(b, turn_b), beta, alpha);
  }
};

// The operator is torch's own kernel here, which then works on the aliases directly.
template <class Op>
bool is_native() {
  const Slot& slot = Route<Op>::slot;
  void* const kernel = slot.fast.load(std::memory_order_relaxed);
  return kernel != nullptr && kernel == slot.relabel;
}

// For any other kernel, which gets flagos tensors.
Tensor matrix_of(const Tensor& t, bool turn) { return shape_matrix(at::native::alias(t), turn); }

// A kernel's new result under other sizes.
Tensor under(Tensor product, at::IntArrayRef sizes) {
  if (C10_UNLIKELY(!product.is_contiguous())) return product.reshape(sizes);
  product.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return product;
}

// a @ b under the given sizes.
template <bool turn_a, bool turn_b>
Tensor multiply(const Tensor& a, const Tensor& b, at::IntArrayRef sizes) {
  if (is_native<Mm>()) {
    remember_op(Route<Mm>::slot.name);
    return under(Relabel<Mm, OnMatrices<Mm, turn_a, turn_b>>::call(a, b), sizes);
  }
  const BelowAutograd below;
  return under(Route<Mm>::call(matrix_of(a, turn_a), matrix_of(b, turn_b)), sizes);
}

// bias + a @ b.t() likewise.
Tensor multiply_add(const Tensor& bias, const Tensor& a, const Tensor& b, at::IntArrayRef sizes) {
  if (is_native<Addmm>()) {
    remember_op(Route<Addmm>::slot.name);
    return under(Relabel<Addmm, OnMatrices<Addmm, false, true>>::call(bias, a, b, /*beta=*/1, /*alpha=*/1), sizes);
  }
  const BelowAutograd below;
  return under(Route<Addmm>::call(bias, matrix_of(a, false), matrix_of(b, true), /*beta=*/1, /*alpha=*/1), sizes);
}

// ---- autograd ------------------------------------------------------------------------------------------------------

class LinearBackward final : public autograd::Node {
 public:
  void save(const Tensor& input, const Tensor& weight, bool bias) {
    if (should_compute_output(0)) weight_ = autograd::SavedVariable(weight, /*is_output=*/false);
    if (should_compute_output(1)) input_ = autograd::SavedVariable(input, /*is_output=*/false);
    input_sizes_ = input.sizes().vec();
    of_addmm_ = bias;
  }

  autograd::variable_list apply(autograd::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    autograd::variable_list results(3);
    if (!gradients[0].defined()) return results;
    // What is not plain is perhaps copied here, once for all.
    const Tensor gradient = plain(gradients[0]) ? std::move(gradients[0]) : matrix(gradients[0]);
    const bool watched = at::GradMode::is_enabled() || !unwatched();
    // In the order of torch's formulas, which for mm is another one than for addmm.
    if (of_addmm_) results[0] = for_input(gradient, watched);
    results[1] = for_weight(gradient, watched);
    if (!of_addmm_) results[0] = for_input(gradient, watched);
    if (task_should_compute_output({2})) results[2] = matrix(gradient);  // the engine sums it up, as for addmm
    return results;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    input_.reset_data();
    weight_.reset_data();
  }
  std::string name() const override { return "LinearBackward0"; }

 private:
  static Tensor matrix(const Tensor& t) { return t.reshape({-1, t.size(-1)}); }
  Tensor for_input(const Tensor& gradient, bool watched) {
    if (!task_should_compute_output({0})) return {};
    const Tensor weight = weight_.unpack();
    if (!watched && together(gradient, weight)) return multiply<false, false>(gradient, weight, input_sizes_);
    return matrix(gradient).mm(weight).reshape(input_sizes_);
  }
  Tensor for_weight(const Tensor& gradient, bool watched) {
    if (!task_should_compute_output({1})) return {};
    const Tensor input = input_.unpack();
    if (watched || !together(gradient, input)) return matrix(gradient).t().mm(matrix(input));
    return multiply<true, false>(gradient, input, {gradient.size(-1), input.size(-1)});
  }

  autograd::SavedVariable input_, weight_;
  std::vector<int64_t> input_sizes_;
  bool of_addmm_ = false;
};

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& optional_bias) {
  const Tensor* bias = optional_bias && optional_bias->defined() ? &*optional_bias : nullptr;
  if (!plain_layer(input, weight, bias)) return at::native::linear(input, weight, optional_bias);
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  Tensor result = bias ? multiply_add(*bias, input, weight, sizes) : multiply<false, true>(input, weight, sizes);
  if (autograd::compute_requires_grad(input, weight, optional_bias)) {
    const auto node = make_node<LinearBackward>();
    node->set_next_edges(autograd::collect_next_edges(input, weight, optional_bias));
    node->save(input, weight, bias != nullptr);
    set_node(result, node);
  }
  return result;
}

}  // namespace

void register_linear() {
  static auto* const library =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  library->impl("linear", TORCH_FN(linear));
}

}  // namespace flagos
