// unbox.h: what a typed call returns, from the stack on which a boxed kernel has left its results.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/impl/boxing.h>
#include <ATen/core/stack.h>

#include <tuple>
#include <type_traits>

namespace flagos {

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
  static constexpr bool possible =
      (std::is_same_v<T, at::Tensor&> && ...) && kWritten<A...> == 1 + sizeof...(T);
  static std::tuple<at::Tensor&, T...> take(torch::jit::Stack&, std::remove_reference_t<A>&... a) {
    return std::tuple_cat(written(a)...);
  }
};

}  // namespace flagos
