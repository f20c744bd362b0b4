// python_kernels.cc: the backend flagos_python: kernels that are Python functions over native tensors (FlagGems' Triton
// kernels). One path for every operator: relabel the arguments, take the GIL, call the function, relabel the results.
//
// torch_fl/integration.py says which operators there are and finds the functions; nothing is imported before the first
// call. Functions are called as torch.library calls a Python kernel: arguments that equal the schema's default are left
// out, because FlagGems' functions take only the parameters that they support.
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>

#include "csrc/aten/backends/flagos/flaggems.h"
#include "csrc/aten/boxed.h"
#include "csrc/aten/decisions.h"
#include "csrc/aten/native.h"
#include "csrc/aten/route.h"
#include "csrc/python/bindings.h"
#include "csrc/python/plans.h"

namespace py = pybind11;

namespace flagos {

namespace {

constexpr const char* kName = "flagos_python";

// What a kernel is right for. A call outside of it goes to the next backend.
struct Limits {
  uint64_t dtypes = ~uint64_t{0};  // one bit per at::ScalarType
  int64_t max_numel = std::numeric_limits<int64_t>::max();
  bool contiguous = false, unexpanded = false, aligned = false, nonempty = false, nonscalar = false;
  bool same_shape = false, same_dtype = false, several = false;
  uint64_t defaults = 0;  // one bit per argument that must have its default
  bool any = false;
};

enum class Verdict { right, unjudged, wrong, unusable };

// One operator that FlagGems has a function for. Never freed: other threads may be using it when a new table comes.
struct PythonKernel {
  std::string name;
  Verdict verdict = Verdict::unusable;
  std::string why;
  Limits limits;
  std::atomic<PyObject*> function{nullptr};
  std::atomic<const Decision*> next{nullptr};  // serves calls that this kernel must not
  std::atomic<uint64_t> passed_on{0};          // calls outside the limits
  std::atomic<bool> warned{false};
  PlanTable plans;
};

// Read while routes are resolved, on any thread, without the GIL.
struct Catalogue {
  std::mutex mutex;
  std::string unavailable = "torch_fl has not looked for Python kernels yet";
  std::map<std::string, PythonKernel*, std::less<>> kernels;
  std::atomic<uint64_t> edition{0};
  PyObject* load = nullptr;  // load(op) -> function; never released: the interpreter may be gone before this
};
Catalogue& catalogue() {
  static auto* const c = new Catalogue;
  return *c;
}

std::string unavailable() {
  std::lock_guard<std::mutex> lock(catalogue().mutex);
  return catalogue().unavailable;
}

// Which Python kernels run on this thread. An operator that its own kernel calls again goes to the next backend.
thread_local std::vector<const PythonKernel*> running;

class Running {
 public:
  explicit Running(const PythonKernel* kernel) { running.push_back(kernel); }
  Running(const Running&) = delete;
  ~Running() { running.pop_back(); }
};

PythonKernel& kernel_of(const c10::OperatorHandle& op) {
  struct Known {
    uint64_t edition = 0;
    PythonKernel* kernel = nullptr;
  };
  thread_local std::unordered_map<const void*, Known> known;
  thread_local const void* last = nullptr;  // one call asks several times
  thread_local Known* last_known = nullptr;
  auto& c = catalogue();
  const void* const identity = &op.operator_name();
  if (last != identity) last_known = &known[identity], last = identity;
  auto& mine = *last_known;
  const auto edition = c.edition.load(std::memory_order_acquire);
  if (C10_LIKELY(mine.edition == edition)) return *mine.kernel;
  const auto name = plain_name(op.operator_name());
  std::lock_guard<std::mutex> lock(c.mutex);
  const auto found = c.kernels.find(name);
  TORCH_CHECK(found != c.kernels.end(), "flagos: backend not registered: ", name, " -> ", kName,
              ": FlagGems has no Python kernel for it");
  mine = {edition, found->second};
  return *mine.kernel;
}

// ---- limits -------------------------------------------------------------------------------------------------------

// Numbers that torch wrapped into tensors are left alone: FlagGems' functions take them as numbers.
template <class Each>
void each_tensor(const c10::IValue& value, Each each) {
  if (value.isTensor()) {
    const auto& t = value.toTensor();
    if (t.defined() && !t.unsafeGetTensorImpl()->is_wrapped_number()) each(t);
  } else if (value.isTensorList()) {
    for (const at::Tensor& t : value.toTensorList()) each(t);
  }
}

bool is_dtype(const c10::Argument& argument) {
  const c10::Type* type = argument.real_type().get();
  if (type->kind() == c10::TypeKind::OptionalType) type = type->castRaw<c10::OptionalType>()->getElementType().get();
  return type->kind() == c10::TypeKind::ScalarTypeType;
}

bool is_default(const c10::IValue& value, const c10::Argument& argument) {
  const auto& given = argument.default_value();
  return given && (given->isNone() ? value.isNone() : !value.isNone() && *given == value);
}

// Whether a dimension of several elements has a stride of 0.
bool is_expanded(const at::Tensor& t) {
  if (t.layout() != at::kStrided) return false;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (strides[i] == 0 && sizes[i] > 1) return true;
  return false;
}

// Whether the elements start where the hardware's descriptors of memory may.
bool is_aligned(const at::Tensor& t) {
  return t.layout() != at::kStrided || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

bool within(const Limits& limits, const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  if (C10_LIKELY(!limits.any)) return true;
  bool good = true;
  const auto& arguments = op.schema().arguments();
  const size_t n = arguments.size();
  const c10::TensorImpl* first = nullptr;
  bool one = true;  // tensor at most
  for (size_t i = stack.size() - n; i < stack.size(); ++i) {
    const size_t position = i + n - stack.size();
    const auto& argument = arguments[position];
    if (stack[i].isInt() && is_dtype(argument)) {
      good &= (limits.dtypes >> static_cast<unsigned>(stack[i].toInt()) & 1) != 0;
    }
    if (limits.defaults >> std::min(position, size_t{63}) & 1) good &= is_default(stack[i], argument);
    each_tensor(stack[i], [&](const at::Tensor& t) {
      const auto numel = t.numel();
      good &= (limits.dtypes >> static_cast<unsigned>(t.scalar_type()) & 1) != 0 && numel <= limits.max_numel;
      if (limits.contiguous) good &= t.is_contiguous();
      if (limits.unexpanded) good &= !is_expanded(t);
      if (limits.aligned) good &= is_aligned(t);
      if (limits.nonempty) good &= numel > 0;
      if (limits.nonscalar) good &= t.dim() > 0;
      if (!first) {
        first = t.unsafeGetTensorImpl();
        return;
      }
      one = false;
      if (limits.same_shape) good &= t.sizes() == first->sizes();
      if (limits.same_dtype) good &= t.dtype() == first->dtype();
    });
  }
  return good && !(limits.several && one);
}

// ---- calling Python -----------------------------------------------------------------------------------------------

py::object to_python(c10::IValue value, const c10::Argument& argument) {
  if (value.isInt()) {  // the schema knows which integers stand for something else
    const c10::Type* type = argument.real_type().get();
    if (type->kind() == c10::TypeKind::OptionalType) type = type->castRaw<c10::OptionalType>()->getElementType().get();
    const auto number = value.toInt();
    if (type->kind() == c10::TypeKind::ScalarTypeType) return py::cast(static_cast<at::ScalarType>(number));
    if (type->kind() == c10::TypeKind::MemoryFormatType) return py::cast(static_cast<at::MemoryFormat>(number));
    if (type->kind() == c10::TypeKind::LayoutType) {
      auto* layout = torch::getTHPLayout(static_cast<at::Layout>(number));
      return py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(layout));
    }
  }
  return torch::jit::toPyObject(std::move(value));
}

void call_function(const c10::OperatorHandle& op, torch::jit::Stack* stack, py::handle function) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  size_t positional_end = 0;
  c10::SmallVector<c10::IValue, 2> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = (*stack)[first + i];
    const auto* alias = arguments[i].alias_info();
    if (alias && alias->isWrite()) written.push_back(value);
    if (!arguments[i].kwarg_only() && !is_default(value, arguments[i])) positional_end = i + 1;
  }
  py::list positional;
  py::dict keywords;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = arguments[i];
    auto& value = (*stack)[first + i];
    if (argument.kwarg_only()) {
      if (!is_default(value, argument)) keywords[py::str(argument.name())] = to_python(std::move(value), argument);
    } else if (i < positional_end) {
      positional.append(to_python(std::move(value), argument));
    }
  }
  torch::jit::drop(*stack, arguments.size());
  const py::object result = function(*positional, **keywords);
  const auto& returns = schema.returns();
  py::tuple several;
  if (returns.size() > 1 && written.size() != returns.size()) {
    TORCH_CHECK(py::isinstance<py::sequence>(result) && py::len(result) == returns.size(), "flagos: the ", kName,
                " kernel of ", op.operator_name(), " returned ", py::repr(py::type::of(result)).cast<std::string>(),
                " instead of ", returns.size(), " values");
    several = py::tuple(result);
  }
  size_t next_written = 0;
  for (size_t i = 0; i < returns.size(); ++i) {
    const auto* alias = returns[i].alias_info();
    if (alias && alias->isWrite() &&
        next_written < written.size()) {  // in-place, out=: the argument, whatever came back
      torch::jit::push(*stack, written[next_written++]);
      continue;
    }
    const py::object value = returns.size() == 1 ? result : py::object(several[i]);
    try {
      torch::jit::push(*stack, torch::jit::toIValue(value, returns[i].type()));
    } catch (const std::exception&) {
      TORCH_CHECK_TYPE(false, "flagos: the ", kName, " kernel of ", op.operator_name(), " returned ",
                       py::repr(py::type::of(value)).cast<std::string>(), " instead of ", returns[i].type()->str());
    }
  }
}

// A Python exception under way, as one that C++ frames may pass on without the GIL.
[[noreturn]] void rethrow(py::error_already_set& error) {
  error.restore();
  python_error persisted;
  persisted.persist();
  throw persisted;
}

// The function, looked up at the first call. nullptr when the lookup found that no Python kernel can run here: then the
// routes have been resolved again without them.
PyObject* load(PythonKernel& kernel) {
  py::gil_scoped_acquire gil;
  try {
    auto function = py::handle(catalogue().load)(kernel.name);
    if (!function.is_none()) {
      auto* pointer = function.release().ptr();
      kernel.function.store(pointer, std::memory_order_release);
      return pointer;
    }
  } catch (py::error_already_set& error) {
    rethrow(error);
  }
  TORCH_CHECK(!unavailable().empty(), "flagos: nothing loads the ", kName, " kernel of ", kernel.name);
  return nullptr;
}

// Calls the function with the arguments under the native label and gives the results the label flagos.
void call_python(const PythonKernel& kernel, const c10::OperatorHandle& op, torch::jit::Stack* stack,
                 PyObject* function, Recording* recording) {
  const size_t first = stack->size() - op.schema().arguments().size();
  c10::SmallVector<size_t, 4> absent;
  for (size_t i = first; i < stack->size(); ++i) {
    if ((*stack)[i].isNone()) absent.push_back(i);
  }
  relabel_call(op, stack, [&] {
    // Without a generator FlagGems takes the native device's, and not all of its functions take one.
    for (const size_t i : absent) (*stack)[i] = c10::IValue();
    py::gil_scoped_acquire gil;
    try {
      if (recording) return record_call(op, stack, *recording, [&] { call_function(op, stack, function); });
      call_function(op, stack, function);
    } catch (py::error_already_set& error) {
      const auto note = "flagos: raised by the " + std::string(kName) + " kernel of " + kernel.name;
      if (py::hasattr(error.value(), "add_note")) error.value().attr("add_note")(note);
      rethrow(error);
    }
  });
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// The routes have changed under this call; the wish's own error when it asked for this backend.
void call_again(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  auto& slot = slot_of(op);
  const auto& decision = take_slow_path(slot);
  if (decision.kernel.boxed == &run) {  // a thread's own route, resolved before
    TORCH_CHECK(false, "flagos: backend not registered: ", slot.name, " -> ", kName, " (asked for by ",
                decision.resolution.origin, "): ", unavailable(), "; available for ", slot.name,
                ": see torch_fl.explain('", slot.name, "')");
  }
  call_decision(decision, op, keys, stack);
}

// Whether the result is wanted on another device, as zeros_like(x, device="cpu") wants it.
bool elsewhere(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); ++i) {
    if (stack[i].isDevice() && stack[i].toDevice().type() != c10::DeviceType::PrivateUse1) return true;
  }
  return false;
}

// Who serves a call that this kernel must not; nullptr when it may.
const Decision* instead(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  auto& kernel = kernel_of(op);
  const bool entered = std::find(running.begin(), running.end(), &kernel) != running.end();
  if (C10_LIKELY(!entered && !elsewhere(op, stack))) {
    if (C10_LIKELY(within(kernel.limits, op, stack))) return nullptr;
    kernel.passed_on.fetch_add(1, std::memory_order_relaxed);
  }
  const auto* next = kernel.next.load(std::memory_order_acquire);
  if (!next) {
    next = &decide_without(slot_of(op), kName);
    kernel.next.store(next, std::memory_order_release);
  }
  return next;
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  auto& kernel = kernel_of(op);
  if (kernel.verdict == Verdict::wrong && !kernel.warned.exchange(true)) {
    TORCH_WARN("flagos: the ", kName, " kernel of ", kernel.name, " was asked for by name although it is ", kernel.why);
  }
  auto* function = kernel.function.load(std::memory_order_acquire);
  if (C10_UNLIKELY(!function) && !(function = load(kernel))) return call_again(op, keys, stack);
  log_dispatch(kernel.name, kName);
  const Running mark(&kernel);
  if (plans_on()) {
    return run_planned(kernel.plans, op, stack,
                       [&](Recording* recording) { call_python(kernel, op, stack, function, recording); });
  }
  call_python(kernel, op, stack, function, nullptr);
}

// A call whose plan is there needs neither Python nor references to its arguments.
bool run_lent(const c10::OperatorHandle& op, const torch::jit::Stack& arguments, torch::jit::Stack& results) {
  auto& kernel = kernel_of(op);
  if (!plans_on() || !kernel.function.load(std::memory_order_acquire)) return false;
  if (kernel.verdict == Verdict::wrong && !kernel.warned.load()) return false;
  const Running mark(&kernel);
  return replay_lent(kernel.plans, op, arguments, results, [&] { log_dispatch(kernel.name, kName); });
}

// ---- the backend --------------------------------------------------------------------------------------------------

bool available(std::string& why) {
  why = unavailable();
  return why.empty();
}

Kernel kernel(const Slot& slot, std::string& why) {
  auto& c = catalogue();
  std::lock_guard<std::mutex> lock(c.mutex);
  const auto found = c.kernels.find(slot.name);
  if (found == c.kernels.end()) {
    why = "FlagGems has no Python kernel for it";
    return {};
  }
  why = found->second->why;
  if (found->second->verdict == Verdict::unusable) return {};
  return Kernel{nullptr, &run, found->second->verdict != Verdict::right, false, &instead, &run_lent};
}

FLAGOS_BACKEND(flagos_python, {kName, 10, &available, &kernel});

// ---- the table, from Python ---------------------------------------------------------------------------------------

// One bit for each of the named arguments of an operator.
uint64_t positions(const std::string& op, const std::vector<std::string>& names) {
  const auto dot = std::min(op.find('.'), op.size());
  const auto handle = c10::Dispatcher::singleton().findSchema(
      {"aten::" + op.substr(0, dot), dot < op.size() ? op.substr(dot + 1) : ""});
  uint64_t found = 0;
  for (const auto& name : names) {
    const auto index = handle ? handle->schema().argumentIndexWithName(name) : std::nullopt;
    TORCH_CHECK_VALUE(index && *index < 63 && handle->schema().arguments()[*index].default_value(),
                      "limit 'defaults': ", op, " has no argument '", name, "' with a default");
    found |= uint64_t{1} << *index;
  }
  return found;
}

Limits limits_of(const std::string& op, const py::dict& data) {
  Limits limits;
  for (const auto& [key, value] : data) {
    const auto name = py::cast<std::string>(key);
    if (name == "dtypes") {
      limits.dtypes = 0;
      for (const auto& dtype : value)
        limits.dtypes |= uint64_t{1} << static_cast<unsigned>(py::cast<at::ScalarType>(dtype));
    } else if (name == "max_numel") {
      limits.max_numel = py::cast<int64_t>(value);
    } else if (name == "defaults") {
      limits.defaults = positions(op, py::cast<std::vector<std::string>>(value));
    } else {
      bool* flag = name == "contiguous"   ? &limits.contiguous
                   : name == "unexpanded" ? &limits.unexpanded
                   : name == "aligned"    ? &limits.aligned
                   : name == "nonempty"   ? &limits.nonempty
                   : name == "nonscalar"  ? &limits.nonscalar
                   : name == "same_shape" ? &limits.same_shape
                   : name == "same_dtype" ? &limits.same_dtype
                   : name == "several"    ? &limits.several
                                          : nullptr;
      TORCH_CHECK_VALUE(
          flag, "unknown limit '", name,
          "' (limits: dtypes, max_numel, contiguous, unexpanded, aligned, nonempty, nonscalar, same_shape, same_dtype, "
          "several, defaults)");
      *flag = py::cast<bool>(value);
    }
    limits.any = true;
  }
  return limits;
}

using Row = std::tuple<std::string, std::string, py::dict>;  // verdict, why, limits

void set_python_kernels(const std::string& unavailable, const std::map<std::string, Row>& rows,
                        const py::function& load) {
  std::map<std::string, PythonKernel*, std::less<>> kernels;
  for (const auto& [op, row] : rows) {
    const auto& verdict = std::get<0>(row);
    auto* kernel = new PythonKernel;
    kernels[op] = kernel;
    kernel->name = op;
    kernel->verdict = verdict == "right"      ? Verdict::right
                      : verdict == "unjudged" ? Verdict::unjudged
                      : verdict == "wrong"    ? Verdict::wrong
                                              : Verdict::unusable;
    kernel->why = std::get<1>(row);
    kernel->limits = limits_of(op, std::get<2>(row));
  }
  auto& c = catalogue();
  std::lock_guard<std::mutex> lock(c.mutex);
  c.unavailable = unavailable;
  c.kernels = std::move(kernels);
  c.load = py::function(load).release().ptr();
  c.edition.fetch_add(1, std::memory_order_release);
}

std::map<std::string, uint64_t> passed_on() {
  std::map<std::string, uint64_t> rows;
  auto& c = catalogue();
  std::lock_guard<std::mutex> lock(c.mutex);
  for (const auto& [name, kernel] : c.kernels) {
    if (const auto n = kernel->passed_on.load()) rows[name] = n;
  }
  return rows;
}

// The counts of every operator's plans, of those that have any.
py::dict plan_counts() {
  py::dict rows;
  auto& c = catalogue();
  std::lock_guard<std::mutex> lock(c.mutex);
  for (const auto& [name, kernel] : c.kernels) {
    const auto counts = kernel->plans.counts();
    if (counts.hits || counts.misses || !counts.refused.empty()) rows[py::str(name)] = counts_as_dict(counts);
  }
  return rows;
}

void clear_plans() {
  auto& c = catalogue();
  std::lock_guard<std::mutex> lock(c.mutex);
  for (const auto& [name, kernel] : c.kernels) kernel->plans.clear();
}

}  // namespace

void bind_python_kernels(py::module_& m) {
  says_itself(&run);
  // unavailable: why no Python kernel can run, "" when they can. kernels: op -> (verdict, why, limits), the verdict one
  // of right, unjudged, wrong, unusable. load(op) returns the function, or None after it has declared all of them
  // unavailable. Routes that are already resolved change with the next _configure() or _reconfigure().
  m.def("_set_python_kernels", &set_python_kernels, py::arg("unavailable"), py::arg("kernels"), py::arg("load"));
  // Calls per operator that went to the next backend because they were outside the limits of the Python kernel.
  m.def("_python_kernels_passed_on", &passed_on);
  m.def("_plan_counts", &plan_counts);
  m.def("_clear_plans", &clear_plans);
  m.def("_use_flaggems_library", &use_flaggems_library, py::arg("paths"), py::arg("unavailable"));
}

}  // namespace flagos
