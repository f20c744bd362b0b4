// route.h: the whole data path of a call, from PyTorch's dispatcher to the kernel. Read it top to bottom.
//
//   at::mm(x, y) -> dispatcher (Autograd, Autocast: torch's own) -> key PrivateUse1 -> Route<at::_ops::mm>::call
//     -> slot.fast: one pointer load, one test, one call of the typed kernel, for example Relabel<at::_ops::mm>::call.
//   When the pointer is null something unusual is on (logging, counting, annotating, a thread's own routes, a kernel
//   that takes boxed arguments, an error to throw): a SlowCall says which decision serves this call.
//   Operators without a Route of their own (other libraries', newer torch's) arrive in boxed_route(): same slots, by
//   name.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "csrc/aten/resolve.h"
#include "csrc/aten/typed_call.h"
#include "csrc/runtime/last_ops.h"

namespace at {
struct RecordFunction;
}

namespace flagos {

struct Backend;
struct Decision;
struct Slot;

// A kernel takes its arguments typed (its address; the signature is the operator's) or boxed on a stack. Boxed ones are
// functions of (operator, key set, stack).
using BoxedFunction = void(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*);
// Who serves a call instead of a boxed kernel that is not for every call; nullptr when it does itself.
using InsteadFunction = const Decision*(const c10::OperatorHandle&, const torch::jit::Stack&);
// Serves a call with arguments that are lent (LentArguments); false when it takes owned ones to do so. Results that are
// written arguments may be left out (None): the typed caller has them.
using LentFunction = bool(const c10::OperatorHandle&, const torch::jit::Stack& arguments, torch::jit::Stack& results);
struct Kernel {
  void* typed = nullptr;
  BoxedFunction* boxed = nullptr;
  bool by_name_only = false;           // not by default: nobody has proven it right
  bool composed = false;               // torch's composition: the operators it calls are what is logged and counted
  InsteadFunction* instead = nullptr;  // to be asked before each call of `boxed`
  LentFunction* lent = nullptr;        // to be tried before it
  explicit operator bool() const { return typed || boxed; }
};

// The conditions of a decision that has some (within.cc).
class Screen {
 public:
  virtual ~Screen() = default;
  // Who serves such a call instead; nullptr when it is the decision itself.
  virtual const Decision* other(const Glance& call) = 0;
};

// The outcome of resolving one operator: made once per (operator, backend, origin), never freed, so that a pointer to
// it stays good while other threads change routes.
struct Decision {
  explicit Decision(const Slot& slot) : slot(slot) {}

  const Slot& slot;
  Resolution resolution;
  Kernel kernel;
  c10::BoxedKernel boxed;          // asks kernel.instead, calls kernel.boxed; valid when that is set
  std::unique_ptr<Screen> screen;  // the wish's conditions, when it has some: they have to be looked at first
  mutable std::atomic<uint64_t> calls{0}, nanoseconds{0};  // while counting; host time without nested operators
};

// One operator's place in the routing table.
struct Slot {
  std::string name;                  // "mm.out"
  void* relabel = nullptr;           // Relabel<Op>::call, or null for an operator without a typed route
  void* compose = nullptr;           // Compose<Op>::call, for an operator that torch composes of others
  std::atomic<void*> fast{nullptr};  // the typed kernel when nothing unusual is on
  std::atomic<const Decision*> decision{nullptr};
  std::optional<c10::OperatorHandle> op;  // set at registration
  std::optional<RouteLine> wish;          // guarded by the table's mutex, as are the next two
  std::optional<RouteLine> wish_api;      // set_route(); beats `wish`
  std::vector<std::unique_ptr<Decision>> decisions;
};

// What serves this call, if its conditions hold; logs it when it has none. Throws the decision's error.
const Decision& take_slow_path(Slot& slot);

// Counts and times a call while counting is on.
class Counted {
 public:
  explicit Counted(const Decision& decision);
  Counted(const Counted&) = delete;
  ~Counted();

 private:
  friend void served_by(const Decision& decision);
  const Decision* decision_ = nullptr;
  Counted* outer_ = nullptr;
  uint64_t start_ = 0, nested_ = 0;
};
// The call under way on this thread is in the end served by another decision.
void served_by(const Decision& decision);
// The same, logged; throws that decision's error.
void take_over(const Decision& decision);

// What serves a call in the end, after the conditions of one decision and perhaps of the next; logs it.
const Decision& screened(const Decision& decision, const Glance& call);

// One call off the fast path: take_slow_path(), counted, with a range for the profiler as long as the kernel runs.
class SlowCall {
 public:
  explicit SlowCall(Slot& slot);
  SlowCall(const SlowCall&) = delete;
  SlowCall& operator=(const SlowCall&) = delete;
  ~SlowCall();
  const Decision& decision() const { return decision_; }

 private:
  const Decision& decision_;
  std::unique_ptr<at::RecordFunction> range_;
  const Counted counted_;
};

template <class Op, class Schema = typename Op::schema>
struct Route;

template <class Op, class R, class... A>
struct Route<Op, R(A...)> {
  static inline Slot slot;

  static R call(A... a) {
    remember_op(slot.name);
    void* kernel = slot.fast.load(std::memory_order_relaxed);
    if (C10_LIKELY(kernel != nullptr)) return reinterpret_cast<R (*)(A...)>(kernel)(std::forward<A>(a)...);
    return call_slowly(std::forward<A>(a)...);
  }

  C10_NOINLINE static R call_slowly(A... a) {  // apart, so that the fast path needs no stack frame
    const SlowCall slow(slot);
    const Decision* decision = &slow.decision();
    if (decision->screen) {  // looked at before the arguments are boxed, which costs as much as some operators do
      Glance seen;
      (glance(seen, a), ...);
      decision = &screened(*decision, seen);
    }
    if constexpr (c10::impl::can_box_all<A...>::value && Unbox<R, A...>::possible) {
      if (decision->kernel.instead) {  // so that another's kernel gets the arguments as they are
        const LentArguments lent(a...);
        const auto& kernel = decision->kernel;
        const auto* other = kernel.instead(*slot.op, lent.stack());
        if (!other) {
          torch::jit::Stack stack;
          if (!kernel.lent || !kernel.lent(*slot.op, lent.stack(), stack)) {
            stack = c10::impl::boxArgs<A...>(a...);
            kernel.boxed(*slot.op, c10::DispatchKeySet(), &stack);
          }
          return Unbox<R, A...>::take(stack, a...);
        }
        decision = other;
        take_over(*decision);
      }
    }
    if (decision->kernel.typed) return reinterpret_cast<R (*)(A...)>(decision->kernel.typed)(std::forward<A>(a)...);
    return c10::impl::BoxedKernelWrapper<R(A...)>::call(decision->boxed, *slot.op, c10::DispatchKeySet(),
                                                        std::forward<A>(a)...);
  }
};

// The PrivateUse1 fallback: every operator that has no kernel registered for flagos.
void boxed_route(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// boxed.cc: the boxed counterpart of Relabel, for any operator; `functionality` names the layout's key (Dense, Sparse,
// ...).
void relabel_boxed(const c10::OperatorHandle& op, c10::DispatchKey functionality, torch::jit::Stack* stack);

// ---- backends ----------------------------------------------------------------------------------------------------

// A backend registers itself (FLAGOS_BACKEND in its own file). Backends are asked in the order of `rank` when no wish
// names one.
struct Backend {
  std::string name;
  int rank;
  // Whether the backend can run in this process; when not, says why.
  bool (*available)(std::string& why);
  // The kernel for an operator; none says why.
  Kernel (*kernel)(const Slot& slot, std::string& why);
};
bool register_backend(Backend backend);
#define FLAGOS_BACKEND(NAME, ...) static const bool flagos_backend_##NAME = ::flagos::register_backend(__VA_ARGS__)

// ---- the table (route.cc) ----------------------------------------------------------------------------------------

// Puts a slot into the table; the operator must exist in torch. Slots live for ever.
void add_slot(Slot& slot, const c10::OperatorHandle& op);

// Names the backend below `backend` in the default order that can serve the slot; what a kernel uses that was entered
// again by the operator it implements, or that must not serve a call.
const Decision& decide_without(Slot& slot, const std::string& backend);
// Calls the kernel of a decision, or of those that its conditions leave the call to.
void call_decision(const Decision& decision, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                   torch::jit::Stack* stack);

// The slot of an operator, made when it has none yet.
Slot& slot_of(const c10::OperatorHandle& op);

// Replaces all conf and environment wishes at once and resolves every slot; throws ConfigError with nothing applied.
void configure(const std::vector<RouteLine>& lines);

// set_route at run time; an empty backend returns the operator to conf, environment or default.
void set_route(const RouteLine& line);

// Routes of the calling thread only, innermost last: route(...) as a context manager. Coroutines may leave them in
// another order than that in which they entered: what is left is what push returned.
uint64_t push_thread_routes(const std::vector<RouteLine>& lines);
void pop_thread_routes(uint64_t pushed);

struct RouteView {
  std::string op, backend, origin, reason;
};
std::vector<RouteView> routes();
Resolution explain(const std::string& op);
struct CallCount {
  std::string op, backend;
  uint64_t calls, nanoseconds;
};
std::vector<CallCount> call_counts();
bool set_logging(bool on);   // returns the previous value
bool set_counting(bool on);  // likewise; turning it on sets the counts to zero
// Likewise: while a profiler runs, a range "flagos::mm[backend]" around every kernel. Counted: off when all are off.
void set_annotating(bool on);
// What an operator does that has to wait for the device to know its result: 0 nothing, 1 warns, 2 raises.
void set_sync_debug_mode(int mode);
int sync_debug_mode();
void report_synchronizing(const std::string& op);  // warns or raises as the mode says

// "mm.out": the dispatcher's name without "aten::". The one spelling of an operator's name in confs, logs and tables.
std::string plain_name(const c10::OperatorName& name);

// Every operator name a line may use, sorted.
const OpNames& operator_names();

}  // namespace flagos
