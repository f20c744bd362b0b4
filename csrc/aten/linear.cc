// linear.cc: a linear layer in one step, where torch composes it of t, two views and mm or addmm with a node of
// autograd each.
//
// The layers of a transformer spend more of the host's time in the others than in mm itself. The same mm or addmm is
// called with the same sizes and strides, forward and backward, so that results are those of the composition bit for
// bit. Whatever is not plain (other strides, forward-mode derivatives, a transform or mode that watches operators,
// another kernel for mm, a profiler, a backward pass that is to be differentiated) takes the composition.
#include <ATen/ATen.h>
#include <ATen/ops/linear_native.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "csrc/aten/call.h"
#include "csrc/aten/interop.h"
#include "csrc/aten/route.h"
#include "csrc/runtime/torch_version.h"

namespace flagos {

namespace {

namespace autograd = torch::autograd;
using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;
using Mm = at::_ops::mm;
using Addmm = at::_ops::addmm;

// ---- what is plain -------------------------------------------------------------------------------------------------

// The operator is torch's own kernel here, and nobody watches single operators.
template <class Op>
bool is_native() {
  const Slot& slot = Route<Op>::slot;
  void* const kernel = slot.fast.load(std::memory_order_relaxed);
  return kernel != nullptr && kernel == slot.relabel && !at::hasCallbacks() &&
         (c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty();
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

bool plain_layer(const Tensor& input, const Tensor& weight, OptionalTensor bias) {
  // A single column has the strides of a transposed matrix, too, for which torch's formula differs.
  if (weight.dim() != 2 || !together(input, weight) || input.size(-1) != weight.size(1) || weight.size(1) == 1 ||
      autograd::isFwGradDefined(input) || autograd::isFwGradDefined(weight)) {
    return false;
  }
  if (!bias || !bias->defined()) return is_native<Mm>();
  return is_native<Addmm>() && bias->dim() == 1 && bias->size(0) == weight.size(0) && together(weight, *bias) &&
         !autograd::isFwGradDefined(*bias);
}

// ---- one product
// --------------------------------------------------------------------------------------------------------

// A tensor as the matrix of its last dimension and all others, perhaps transposed.
struct Matrix {
  const Tensor& tensor;
  bool transposed = false;

  void shape(Tensor& alias) const {
    auto* impl = alias.unsafeGetTensorImpl();
    const auto columns = impl->sizes().back(), rows = impl->numel() / columns;
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1}, turned[] = {columns, rows},
                  steps[] = {1, columns};
    impl->set_sizes_and_strides(at::IntArrayRef(transposed ? turned : sizes), transposed ? steps : strides);
  }
};

// a @ b under the given sizes; bias + a @ b where there is one. The aliases of a call are its own, so they can be
// reshaped in place.
template <class Op>
Tensor multiply(const Matrix& a, const Matrix& b, at::IntArrayRef sizes, const Tensor* bias = nullptr) {
  remember_op(Route<Op>::slot.name);
  const BelowAutograd below;
  Call call;
  call.add(a.tensor, /*write=*/false, /*list=*/false, /*borrow=*/true);
  call.add(b.tensor, /*write=*/false, /*list=*/false, /*borrow=*/true);
  if constexpr (std::is_same_v<Op, Addmm>) call.add(*bias, /*write=*/false, /*list=*/false, /*borrow=*/true);
  call.enter(Op::name);
  a.shape(call[0]);
  b.shape(call[1]);
  try {
    Tensor product;
    if constexpr (std::is_same_v<Op, Addmm>) {
      product = Addmm::redispatch(native.dense, call[2], call[0], call[1], /*beta=*/1, /*alpha=*/1);
    } else {
      product = Mm::redispatch(native.dense, call[0], call[1]);
    }
    product = call.result(std::move(product));
    product.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    return product;
  } catch (c10::Error& error) {
    tell(error, Op::name);
    throw;
  }
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
    const bool watched = at::GradMode::is_enabled() || !is_native<Mm>();
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
    if (!watched && together(gradient, weight)) return multiply<Mm>({gradient}, {weight}, input_sizes_);
    return matrix(gradient).mm(weight).reshape(input_sizes_);
  }
  Tensor for_weight(const Tensor& gradient, bool watched) {
    if (!task_should_compute_output({1})) return {};
    const Tensor input = input_.unpack();
    if (watched || !together(gradient, input)) return matrix(gradient).t().mm(matrix(input));
    return multiply<Mm>({gradient, true}, {input}, {gradient.size(-1), input.size(-1)});
  }

  autograd::SavedVariable input_, weight_;
  std::vector<int64_t> input_sizes_;
  bool of_addmm_ = false;
};

Tensor linear(const Tensor& input, const Tensor& weight, OptionalTensor bias) {
  if (!plain_layer(input, weight, bias)) return at::native::linear(input, weight, bias);
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  Tensor result = bias && bias->defined() ? multiply<Addmm>({input}, {weight, true}, sizes, &*bias)
                                          : multiply<Mm>({input}, {weight, true}, sizes);
  if (autograd::compute_requires_grad(input, weight, bias)) {
#if FLAGOS_INTRUSIVE_NODES
    const auto node = c10::make_intrusive<LinearBackward>();
#else
    const std::shared_ptr<LinearBackward> node(new LinearBackward, autograd::deleteNode);
#endif
    node->set_next_edges(autograd::collect_next_edges(input, weight, bias));
    node->save(input, weight, bias && bias->defined());
    node->add_input_metadata(result);
    autograd::impl::set_gradient_edge(result, {node, 0});
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
