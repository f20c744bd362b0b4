// flaggems.cc: FlagGems' C++ operators behind routes (flaggems.h). Nothing of FlagGems is needed to build this: its
// functions are found by their mangled names, which contain the types of their arguments, so that a library with other
// signatures has a missing symbol instead of a wrong call. The signatures are those of FlagGems 5.0.2.
//
// Only operators that are right are bound. A call that they are not made for (another dtype, nothing to do) takes
// torch's own kernel, which costs one test.
#include "csrc/aten/backends/flagos/flaggems.h"

#include <dlfcn.h>
#include <unistd.h>

#include <map>
#include <mutex>

#include "csrc/aten/decisions.h"
#include "csrc/aten/native.h"
#include "csrc/aten/relabel.h"
#include "csrc/aten/route.h"

// After the headers above: these need their types.
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/argmax_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/embedding_ops.h>
#include <ATen/ops/max_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/sort_ops.h>

namespace flagos {

namespace {

// Whether FlagGems' kernels take this argument: fp16, bf16 and fp32 of at least one element; indices are integers.
bool taken(const at::Tensor& t) {
  const auto type = t.scalar_type();
  return t.numel() > 0 && t.layout() == at::kStrided && !t.is_conj() && !t.is_neg() &&
         (type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kLong || type == at::kInt);
}
template <class T>
bool taken(const T&) {
  return true;
}

// Whether an operator's data, its first argument, is floating; the others must then be taken as they are.
bool floating(const at::Tensor& first) { return first.is_floating_point() && first.dim() > 0; }
template <class... X>
bool fits(const at::Tensor& first, const X&... rest) {
  return floating(first) && taken(first) && (taken(rest) && ...);
}

// FlagGems writes into `out` as it is, where torch would resize it first.
bool output_fits(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  return a.dim() == 2 && b.dim() == 2 && out.dim() == 2 && out.size(0) == a.size(0) && out.size(1) == b.size(1) &&
         out.scalar_type() == a.scalar_type();
}
bool output_fits(const at::Tensor&, const at::Tensor& a, const at::Tensor& b, const at::Scalar&, const at::Scalar&,
                 const at::Tensor& out) {
  return output_fits(a, b, out);
}
template <class... X>
bool output_fits(const X&...) {
  return true;
}

// FlagGems takes sizes as plain integers.
template <class T>
decltype(auto) plain(T&& value) {
  if constexpr (std::is_same_v<std::decay_t<T>, c10::SymInt>) {
    return value.expect_int();
  } else {
    return std::forward<T>(value);
  }
}

// A watched call of an operator that FlagGems' function serves, or torch's own kernel instead.
void note(const char* name, const char* overload, bool served) {
  const auto op = c10::Dispatcher::singleton().findOp({name, overload});
  TORCH_INTERNAL_ASSERT(op);
  const auto plain = plain_name(op->operator_name());
  if (served) return log_dispatch(plain, "flagos");
  const auto& native_decision = decide_lines(slot_of(*op), {RouteLine{plain, "native", "the route to flagos", {}}});
  served_by(native_decision);
  log_dispatch(plain, native_decision.resolution.backend);
}

// FlagGems' function with signature F in the place of torch's kernel.
template <class Op, class F>
struct Bound {
  static inline F* function = nullptr;
  template <class... X>
  static decltype(auto) call(X&&... x) {
    using Result = decltype(Op::redispatch(native.dense, std::forward<X>(x)...));
    const bool served = fits(x...) && output_fits(x...);
    if (C10_UNLIKELY(watched())) note(Op::name, Op::overload_name, served);
    if (C10_UNLIKELY(!served)) return static_cast<Result>(Op::redispatch(native.dense, std::forward<X>(x)...));
    return static_cast<Result>(function(plain(std::forward<X>(x))...));
  }
};

// The same for a route that looks at the arguments first.
template <class Op, class Inner>
void call_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  static const auto kernel = c10::KernelFunction::makeFromUnboxedRuntimeFunction(&Relabel<Op, Inner>::call);
  kernel.callBoxed(op, keys, stack);
}

struct Symbol {
  const char* mangled;
  void** function;  // Bound<...>::function
  void* kernel;     // Relabel<Op, Bound<...>>::call
  BoxedFunction* boxed;
  const char* by_name_only = nullptr;  // why it does not serve by default
};

template <class Op, class F>
Symbol bind(const char* mangled, const char* by_name_only = nullptr) {
  using Inner = Bound<Op, F>;
  says_itself(&call_boxed<Op, Inner>);
  return {mangled, reinterpret_cast<void**>(&Inner::function), reinterpret_cast<void*>(&Relabel<Op, Inner>::call),
          &call_boxed<Op, Inner>, by_name_only};
}

using at::Scalar;
using at::Tensor;
using Two = std::tuple<Tensor, Tensor>;
namespace ops = at::_ops;

const std::map<std::string, Symbol, std::less<>>& symbols() {
  constexpr const char* kNan = "ignores NaN, which torch propagates; only when asked for by name";
  static const std::map<std::string, Symbol, std::less<>> all{
      {"mm", bind<ops::mm, Tensor(const Tensor&, const Tensor&)>("_ZN9flag_gems9mm_tensorERKN2at6TensorES3_")},
      {"mm.out", bind<ops::mm_out, Tensor&(const Tensor&, const Tensor&, Tensor&)>(
                     "_ZN9flag_gems13mm_out_tensorERKN2at6TensorES3_RS1_")},
      {"addmm", bind<ops::addmm, Tensor(const Tensor&, const Tensor&, const Tensor&, const Scalar&, const Scalar&)>(
                    "_ZN9flag_gems5addmmERKN2at6TensorES3_S3_RKN3c106ScalarES7_")},
      {"addmm.out",
       bind<ops::addmm_out, Tensor&(const Tensor&, const Tensor&, const Tensor&, const Scalar&, const Scalar&,
                                    Tensor&)>("_ZN9flag_gems9addmm_outERKN2at6TensorES3_S3_RKN3c106ScalarES7_RS1_")},
      {"bmm", bind<ops::bmm, Tensor(const Tensor&, const Tensor&)>("_ZN9flag_gems3bmmERKN2at6TensorES3_")},
      {"embedding", bind<ops::embedding, Tensor(const Tensor&, const Tensor&, int64_t, bool, bool)>(
                        "_ZN9flag_gems9embeddingERKN2at6TensorES3_lbb")},
      {"argmax", bind<ops::argmax, Tensor(const Tensor&, std::optional<int64_t>, bool)>(
                     "_ZN9flag_gems6argmaxERKN2at6TensorESt8optionalIlEb", kNan)},
      {"max.dim",
       bind<ops::max_dim, Two(const Tensor&, int64_t, bool)>("_ZN9flag_gems7max_dimERKN2at6TensorElb", kNan)},
      {"sort", bind<ops::sort, Two(const Tensor&, int64_t, bool)>("_ZN9flag_gems4sortERKN2at6TensorElb")},
      {"sort.stable", bind<ops::sort_stable, Two(const Tensor&, std::optional<bool>, int64_t, bool)>(
                          "_ZN9flag_gems11sort_stableERKN2at6TensorESt8optionalIbElb")},
  };
  return all;
}

// FlagGems 5.0.2 has these in C++, and they are not used.
const std::map<std::string, const char*, std::less<>>& refused() {
  static const std::map<std::string, const char*, std::less<>> all{
      {"_softmax", "wrong for more than 128 columns"},
      {"_softmax_backward_data", "wrong for more than 128 columns"},
      {"exponential_", "never advances the generator, so every call returns the same numbers"},
      {"sum", "ignores the dtype and accumulates in the input's"},
      {"sum.dim_IntList", "keeps the dtype of integers, where torch sums in int64"},
      {"max", "not proven"},
      {"topk", "wrong for an input that is not contiguous"},
      {"cat", "does not promote dtypes, and returns its input when there is one tensor"},
      {"nonzero", "not proven; it synchronizes"},
      {"zeros", "uses device 0 unless told otherwise"},
      {"embedding_dense_backward", "wrong for a gradient that is not contiguous"},
      {"copy_", "takes only equal dtypes and contiguous tensors"},
      {"_to_copy", "takes only equal dtypes and contiguous tensors"},
  };
  return all;
}

struct Library {
  std::mutex mutex;
  std::string unavailable = "FlagGems' library liboperators.so was not looked for";
  std::string path;
  void* handle = nullptr;
};
Library& library() {
  static auto* const l = new Library;
  return *l;
}

// FlagGems built for a chip of ours asks libstream_api.so for the current stream, and expects to find it loaded.
void open_stream_api() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&use_flaggems_library), &info) == 0) return;
  const std::string own = info.dli_fname;
  dlopen((own.substr(0, own.rfind('/') + 1) + "libstream_api.so").c_str(), RTLD_NOW | RTLD_GLOBAL);
}

bool available(std::string& why) {
  auto& l = library();
  std::lock_guard<std::mutex> lock(l.mutex);
  why = l.unavailable;
  if (why.empty() && !native.present) why = "torch has no kernels for this chip, which FlagGems' library needs";
  return why.empty();
}

Kernel kernel(const Slot& slot, std::string& why) {
  const auto bad = refused().find(slot.name);
  if (bad != refused().end()) {
    why = std::string("FlagGems 5.0.2's C++ kernel is refused: ") + bad->second;
    return {};
  }
  const auto found = symbols().find(slot.name);
  if (found == symbols().end()) {
    why = "FlagGems has no C++ kernel for it";
    return {};
  }
  auto& l = library();
  std::lock_guard<std::mutex> lock(l.mutex);
  const auto& symbol = found->second;
  void* address = l.handle ? dlsym(l.handle, symbol.mangled) : nullptr;
  if (address == nullptr) {
    why = l.path + " lacks " + symbol.mangled + "; its signatures must be those of FlagGems 5.0.2";
    return {};
  }
  *symbol.function = address;
  if (symbol.by_name_only) why = symbol.by_name_only;
  return Kernel{symbol.kernel, symbol.boxed, symbol.by_name_only != nullptr};
}

FLAGOS_BACKEND(flagos, {"flagos", 5, &available, &kernel});

}  // namespace

void use_flaggems_library(const std::vector<std::string>& paths, const std::string& unavailable) {
  auto& l = library();
  std::lock_guard<std::mutex> lock(l.mutex);
  if (l.handle) return;  // bound for the life of the process: its functions may be in use
  l.unavailable = unavailable;
  if (!unavailable.empty()) return;
  l.unavailable = "FlagGems' library liboperators.so was not found";
  for (const auto& path : paths) {
    if (access(path.c_str(), F_OK) != 0) {
      l.unavailable += (&path == &paths.front() ? ": tried " : ", ") + path;
      continue;
    }
    open_stream_api();
    l.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    l.path = path;
    l.unavailable = l.handle ? "" : std::string("FlagGems' library cannot be loaded: ") + dlerror();
    return;
  }
}

}  // namespace flagos
