// relabel.h: Relabel<Op>, the kernel that serves an operator with torch's own kernel for the native label.
//
// One template for every operator. Arg<A> says what happens to an argument of type A; everything that holds no tensor,
// device or generator passes through untouched.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/IListRef.h>
#include <ATen/core/List.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "csrc/aten/call.h"
#include "csrc/aten/interop.h"
#include "csrc/aten/schema.h"

namespace flagos {

// ---- arguments ---------------------------------------------------------------------------------------------------
// Constructed in argument order, before Call::enter; get() is called once, after it.

template <class A>
struct Arg {
  std::remove_reference_t<A>* value;
  Arg(Call&, std::remove_reference_t<A>& a, bool) : value(&a) {}
  A get(Call&) { return static_cast<A&&>(*value); }
};

template <>
struct Arg<const at::Tensor&> {
  const at::Tensor* original;
  size_t position;
  Arg(Call& call, const at::Tensor& t, bool write)
      : original(&t), position(call.add(t, write, /*list=*/false, /*borrow=*/!write)) {}
  const at::Tensor& get(Call& call) { return call[position]; }
};

template <>
struct Arg<at::Tensor&> {
  at::Tensor* original;
  size_t position;
  Arg(Call& call, at::Tensor& t, bool) : original(&t), position(call.add(t, /*write=*/true)) {}
  at::Tensor& get(Call& call) { return call[position]; }
};

template <>
struct Arg<const std::optional<at::Tensor>&> {
  std::optional<at::Tensor> alias;
  Arg(Call& call, const std::optional<at::Tensor>& t, bool write) {
    if (t) alias = call[call.add(*t, write, /*list=*/false, /*borrow=*/!write)];
  }
  const std::optional<at::Tensor>& get(Call&) { return alias; }
};

template <>
struct Arg<at::TensorList> {
  size_t begin, n;
  Arg(Call& call, at::TensorList list, bool write) : begin(call.add(list, write, /*borrow=*/!write)), n(list.size()) {}
  at::TensorList get(Call& call) { return call.list(begin, n); }
};

template <>
struct Arg<const at::ITensorListRef&> {
  size_t begin = 0, n = 0;
  Arg(Call& call, const at::ITensorListRef& list, bool write) {
    for (const at::Tensor& t : list) {
      const auto position = call.add(t, write, /*list=*/true, /*borrow=*/!write);
      if (n++ == 0) begin = position;
    }
  }
  at::ITensorListRef get(Call& call) { return at::ITensorListRef(call.list(begin, n)); }
};

template <>
struct Arg<const c10::List<std::optional<at::Tensor>>&> {
  using List = c10::List<std::optional<at::Tensor>>;
  std::vector<at::Tensor> originals;  // a List hands out copies; the Call needs something that stays
  List aliases;
  Arg(Call& call, const List& list, bool write) {
    originals.reserve(list.size());
    aliases.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      std::optional<at::Tensor> t = list.get(i);
      if (t) {
        originals.push_back(std::move(*t));
        aliases.push_back(call[call.add(originals.back(), write)]);
      } else {
        aliases.push_back(std::nullopt);
      }
    }
  }
  const List& get(Call&) { return aliases; }
};

template <>
struct Arg<std::optional<at::Device>> {
  std::optional<at::Device> device;
  Arg(Call& call, const std::optional<at::Device>& d, bool) {
    if (d) device = call.map(*d);
  }
  std::optional<at::Device> get(Call&) { return device; }
};

template <>
struct Arg<at::Device> {
  at::Device device;
  Arg(Call& call, at::Device d, bool) : device(call.map(d)) {}
  at::Device get(Call&) { return device; }
};

template <>
struct Arg<std::optional<at::Generator>> {
  const std::optional<at::Generator>* generator;
  Arg(Call&, const std::optional<at::Generator>& g, bool) : generator(&g) {}
  std::optional<at::Generator> get(Call& call) { return call.map(*generator); }
};

template <>
struct Arg<at::Storage> {
  at::Storage storage;
  Arg(Call& call, const at::Storage& s, bool) : storage(call.add(s)) {}
  at::Storage get(Call&) { return std::move(storage); }
};

template <>
struct Arg<at::Stream> {
  at::Stream stream;
  Arg(Call& call, at::Stream s, bool) : stream(call.map(s)) {}
  at::Stream get(Call&) { return stream; }
};

// ---- results -----------------------------------------------------------------------------------------------------

template <class T>
T relabel_result(Call&, T&& value) {
  return std::move(value);
}
inline at::Tensor relabel_result(Call& call, at::Tensor&& t) { return call.result(std::move(t)); }
inline std::vector<at::Tensor> relabel_result(Call& call, std::vector<at::Tensor>&& list) {
  for (auto& t : list) t = call.result(std::move(t));
  return std::move(list);
}
template <class... T>
std::tuple<T...> relabel_result(Call& call, std::tuple<T...>&& values) {
  return std::apply([&](auto&... v) { return std::tuple<T...>(relabel_result(call, std::move(v))...); }, values);
}

// The original behind a reference that the kernel returned: the mutable argument whose alias it is.
template <class T, class... A>
T& returned_argument(Call& call, const at::Tensor& returned, std::tuple<Arg<A>...>& args) {
  T* found = nullptr;
  T* last = nullptr;
  std::apply(
      [&](auto&... arg) {
        auto look = [&](auto& a) {
          using AnArg = std::decay_t<decltype(a)>;
          if constexpr (std::is_same_v<AnArg, Arg<T&>>) {
            last = a.original;
            if (!found && call[a.position].is_same(returned)) found = a.original;
          }
        };
        (look(arg), ...);
      },
      args);
  return found ? *found : *last;
}

template <class R>
struct Returns {  // a value
  template <class... A>
  static R map(Call& call, R&& value, std::tuple<Arg<A>...>&) {
    return relabel_result(call, std::move(value));
  }
};
template <class T>
struct Returns<T&> {  // at::Tensor& or const at::Tensor&: one of the arguments
  template <class... A>
  static T& map(Call& call, const at::Tensor& returned, std::tuple<Arg<A>...>& args) {
    return returned_argument<T>(call, returned, args);
  }
};
template <class... T>
struct Returns<std::tuple<T&...>> {
  template <class... A>
  static std::tuple<T&...> map(Call& call, std::tuple<T&...>&& returned, std::tuple<Arg<A>...>& args) {
    return std::apply([&](auto&... r) { return std::tuple<T&...>(returned_argument<T>(call, r, args)...); }, returned);
  }
};

// ---- the kernel --------------------------------------------------------------------------------------------------

// Mixes of CPU and flagos tensors, or of two devices, that are legal: index tensors may live on the CPU.
template <class Op>
constexpr bool mixed_devices_allowed() {
  constexpr std::string_view name(Op::name);
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
         name == "aten::index_put" || name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put" ||
         name == "aten::copy_";
}

// What runs on the aliases: torch's kernel for the native label.
template <class Op>
struct NativeKernel {
  template <class... X>
  static decltype(auto) call(X&&... x) {
    return Op::redispatch(native.dense, std::forward<X>(x)...);
  }
};

// `Inner` replaces torch's kernel by another one that works on native tensors (backends/flagos).
template <class Op, class Inner = NativeKernel<Op>, class Schema = typename Op::schema>
struct Relabel;

template <class Op, class Inner, class R, class... A>
struct Relabel<Op, Inner, R(A...)> {
  // The types do not say it: lists that foreach operators write to, and the argument of resize_, are const.
  static constexpr auto kWritten = written_arguments<sizeof...(A)>(Op::schema_str);
  static_assert(kWritten.count == sizeof...(A));
  static constexpr bool kMixedAllowed = mixed_devices_allowed<Op>();  // a constant, or the names are compared per call

  static R call(A... a) {
    BelowAutograd below(/*count_versions=*/std::is_void_v<R>);
    Call call;
    size_t position = 0;
    std::tuple<Arg<A>...> args{Arg<A>(call, a, kWritten.written[position++])...};
    call.enter(Op::name, kMixedAllowed);
    auto run = [&](auto&... arg) -> R {
      try {
        return Inner::call(arg.get(call)...);
      } catch (c10::Error& error) {
        tell(error, Op::name);
        throw;
      }
    };
    if constexpr (std::is_void_v<R>) {
      std::apply(run, args);
      call.write_back();
    } else if constexpr (std::is_reference_v<R>) {
      const at::Tensor& returned = std::apply(run, args);
      call.write_back();
      return Returns<R>::map(call, returned, args);
    } else {
      R result = std::apply(run, args);
      if constexpr (kWritten.any) call.write_back();
      return Returns<R>::map(call, std::move(result), args);
    }
  }
};

}  // namespace flagos
