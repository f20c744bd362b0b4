// typed_call.h: what route.h sees of a typed call's arguments, and how the call returns a boxed kernel's results.
#pragma once

#include <ATen/core/IListRef.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/impl/boxing.h>
#include <ATen/core/stack.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

namespace flagos {

// What the conditions of a route look at: the first tensor's dtype and the largest tensor's size.
struct Glance {
  at::ScalarType dtype = at::ScalarType::Undefined;
  int64_t numel = 0;
};
inline void glance(Glance& g, const at::Tensor& t) {
  if (!t.defined()) return;
  if (g.dtype == at::ScalarType::Undefined) g.dtype = t.scalar_type();
  g.numel = std::max(g.numel, t.numel());
}
inline void glance(Glance& g, const std::optional<at::Tensor>& t) {
  if (t) glance(g, *t);
}
inline void glance(Glance& g, at::TensorList list) {
  for (const at::Tensor& t : list) glance(g, t);
}
inline void glance(Glance& g, const at::ITensorListRef& list) {
  for (const at::Tensor& t : list) glance(g, t);
}
template <class T>
void glance(Glance&, const T&) {}  // no tensor

// A call's arguments on a stack, without references of their own: to count a second one to a tensor that Python knows,
// torch takes the interpreter's lock. Whoever sees them keeps and changes nothing.
class LentArguments {
 public:
  template <class... A>
  explicit LentArguments(const A&... a) : LentArguments() {  // if boxing throws, what is lent is released
    stack_.reserve(sizeof...(A));
    (push(a), ...);
  }
  LentArguments(const LentArguments&) = delete;
  LentArguments& operator=(const LentArguments&) = delete;
  ~LentArguments() {
    for (auto& value : stack_) {
      if (value.isTensor()) std::move(value).toTensor().unsafeReleaseTensorImpl();
    }
  }
  const torch::jit::Stack& stack() const { return stack_; }

 private:
  LentArguments() = default;
  void push(const at::Tensor& t) {
    using Pointer = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
    stack_.emplace_back(at::Tensor(Pointer::reclaim(t.unsafeGetTensorImpl())));
  }
  void push(const std::optional<at::Tensor>& t) {
    if (t) return push(*t);
    stack_.emplace_back();
  }
  template <class T>
  void push(const T& value) {
    torch::jit::push(stack_, value);
  }

  torch::jit::Stack stack_;
};

// The arguments that a call writes, as the typed signature shows them.
template <class A>
auto written(A& a) {
  if constexpr (std::is_same_v<A, at::Tensor>) {
    return std::tuple<at::Tensor&>(a);
  } else {
    return std::tuple<>();
  }
}
template <class... A>
constexpr size_t kWritten = (size_t{std::is_same_v<A, at::Tensor&>} + ... + 0);

// A result of type R of a call with arguments of types A; `possible` says where that is known here.
template <class R, class... A>
struct Unbox {
  static constexpr bool possible = !std::is_reference_v<R> && c10::impl::can_unbox<R>::value;
  static R take(torch::jit::Stack& stack, std::remove_reference_t<A>&...) {
    return c10::impl::PopResult<R>::call(stack);
  }
};
template <class... A>
struct Unbox<void, A...> {
  static constexpr bool possible = true;
  static void take(torch::jit::Stack&, std::remove_reference_t<A>&...) {}
};
// One that is an argument. With more written than returned it takes the schema to tell which.
template <class... A>
struct Unbox<at::Tensor&, A...> {
  static constexpr bool possible = kWritten<A...> == 1;
  static at::Tensor& take(torch::jit::Stack&, std::remove_reference_t<A>&... a) {
    return std::get<0>(std::tuple_cat(written(a)...));
  }
};
template <class... T, class... A>
struct Unbox<std::tuple<at::Tensor&, T...>, A...> {
  static constexpr bool possible = (std::is_same_v<T, at::Tensor&> && ...) && kWritten<A...> == 1 + sizeof...(T);
  static std::tuple<at::Tensor&, T...> take(torch::jit::Stack&, std::remove_reference_t<A>&... a) {
    return std::tuple_cat(written(a)...);
  }
};

}  // namespace flagos
