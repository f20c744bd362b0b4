// derivatives.cc: derivatives that torch computes in another way on a device that does not call itself cuda.
//
// torch's formula for max, min, median and nanmedian without a dimension waits for the device there, and renorm's
// accumulates in double. So the node that torch's autograd kernel leaves is exchanged for one that applies torch's own
// formula to the tensors under CUDA's label. The kernel is torch's, and so are forward-mode derivatives. A backward
// pass that is to be differentiated again takes torch's formula as it is.
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/library.h>

#include <mutex>

#include "csrc/aten/call.h"
#include "csrc/aten/nodes.h"

namespace flagos {

namespace {

namespace autograd = torch::autograd;
namespace nodes = torch::autograd::generated;
using at::Tensor;

// `members` are all that torch's node keeps: tensors saved for backward, and plain values.
template <class Node, auto... members>
class OnNative final : public Node {
 public:
  static void exchange(const Tensor& result) {
    auto node = result.grad_fn();
    auto* torchs = dynamic_cast<Node*>(node.get());
    // Hooks on the node, as an in-place operator on a tensor that retains its gradient leaves them, stay where they
    // are.
    if (!torchs || !torchs->tensor_pre_hooks().empty() || !torchs->retains_grad_hooks().empty()) return;
    const auto ours = make_node<OnNative>();
    ((ours.get()->*members = std::move(torchs->*members)), ...);
    ours->set_next_edges(std::move(torchs->next_edges()));
    set_node(result, ours);
  }

  autograd::variable_list apply(autograd::variable_list&& gradients) override {
    const bool plain = is_flagos(gradients[0]) && (gradients[0].key_set() & at::kTensorSubclassLike).empty();
    if (at::GradMode::is_enabled() || !plain) return Node::apply(std::move(gradients));
    const std::lock_guard<std::mutex> one_at_a_time(aliased_);
    const BelowAutograd below;
    Call call;
    const Tensor gradient = gradients[0];
    const auto at = call.add(gradient, /*write=*/false);
    Saved saved;
    saved.reserve(sizeof...(members));
    (unpack<members>(saved), ...);
    for (const auto& one : saved) call.add(one.original, /*write=*/false, /*list=*/true);
    call.enter(this->name().c_str());
    for (size_t i = 0; i < saved.size(); ++i) *saved[i].place = autograd::SavedVariable(call[at + 1 + i], false);
    gradients[0] = call[at];
    const Restored restored{saved};
    auto results = Node::apply(std::move(gradients));
    for (auto& t : results) t = call.result(std::move(t));
    return results;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> one_at_a_time(aliased_);
    Node::release_variables();
  }

 private:
  struct One {
    autograd::SavedVariable* place;
    autograd::SavedVariable value;
    Tensor original;
  };
  using Saved = std::vector<One>;
  struct Restored {
    Saved& saved;
    ~Restored() {
      for (auto& one : saved) *one.place = std::move(one.value);
    }
  };

  template <auto member>
  void unpack(Saved& saved) {
    if constexpr (std::is_same_v<std::decay_t<decltype(this->*member)>, autograd::SavedVariable>) {
      auto original = (this->*member).unpack(this->getptr());
      saved.push_back({&(this->*member), std::move(this->*member), std::move(original)});
    }
  }

  std::mutex aliased_;  // while the saved tensors are aliases
};

template <class Op, class Exchange, class Schema = typename Op::schema>
struct Differentiated;
template <class Op, class Exchange, class R, class... A>
struct Differentiated<Op, Exchange, R(A...)> {
  static R call(c10::DispatchKeySet keys, A... a) {
    const Tensor& self = std::get<0>(std::forward_as_tuple(a...));
    if (!(at::GradMode::is_enabled() && self.requires_grad()) && !self._fw_grad(/*level=*/0).defined()) {
      const at::AutoDispatchBelowAutograd below;
      return Op::redispatch(keys & c10::after_autograd_keyset, std::forward<A>(a)...);
    }
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
    torch::jit::Stack stack{c10::IValue(a)...};
    op.callBoxedForDispatchKey(c10::DispatchKey::Autograd, stack);  // torch's own for every device
    auto result = torch::jit::pop(stack).toTensor();
    Exchange::exchange(result);
    if constexpr (std::is_reference_v<R>) {
      return std::get<0>(std::forward_as_tuple(a...));
    } else {
      return result;
    }
  }
};

template <class Op, class Exchange>
void add(torch::Library& library) {
  const std::string overload(Op::overload_name);
  const auto name = std::string(Op::name) + (overload.empty() ? "" : "." + overload);
  library.impl(name.c_str(), TORCH_FN((Differentiated<Op, Exchange>::call)));
}

template <class Node>
using Extreme = OnNative<Node, &Node::self_, &Node::result_>;
using Renorm = OnNative<nodes::RenormBackward0, &nodes::RenormBackward0::dim, &nodes::RenormBackward0::maxnorm,
                        &nodes::RenormBackward0::p, &nodes::RenormBackward0::self_>;

}  // namespace

void register_derivatives() {
  static auto* const library =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  add<at::_ops::max, Extreme<nodes::MaxBackward1>>(*library);
  add<at::_ops::min, Extreme<nodes::MinBackward1>>(*library);
  add<at::_ops::median, Extreme<nodes::MedianBackward0>>(*library);
  add<at::_ops::nanmedian, Extreme<nodes::NanmedianBackward0>>(*library);
  add<at::_ops::renorm, Renorm>(*library);
  add<at::_ops::renorm_, Renorm>(*library);
}

}  // namespace flagos
