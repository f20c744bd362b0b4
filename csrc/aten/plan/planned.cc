// planned.cc: see planned.h; and the check of a replay against the Python call (FLAGOS_PLAN_VERIFY).
#include "csrc/aten/plan/planned.h"

#include <ATen/ops/empty_like.h>

#include <cstdio>
#include <cstring>

#include "csrc/aten/call.h"
#include "csrc/aten/twin.h"
#include "csrc/runtime/fork.h"

namespace flagos {

namespace {

std::atomic<bool (*)()> the_stop{nullptr};

// Ends a recording however the call ends: by a plan, a refusal, or an exception.
class Attempt {
 public:
  Attempt(PlanTable& table, const PlanKey& key) : table_(table), key_(key) {}
  Attempt(const Attempt&) = delete;
  ~Attempt() { table_.recorded(key_, std::move(recording.plan), recording.refused); }
  Recording recording;

 private:
  PlanTable& table_;
  const PlanKey& key_;
};

// ---- checking a replay -------------------------------------------------------------------------------------------

// A native tensor over a flagos tensor's memory.
at::Tensor native_of_dense(const at::Tensor& t) {
  return native_tensor(twin_of(t.storage().unsafeGetStorageImpl()), t.scalar_type(), t.sizes(), t.strides(),
                       t.storage_offset());
}

std::vector<at::Tensor> written_arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::vector<at::Tensor> written;
  const auto& arguments = op.schema().arguments();
  const size_t first = stack.size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].alias_info() || !arguments[i].alias_info()->isWrite()) continue;
    const auto& value = stack[first + i];
    if (value.isTensor() && is_flagos(value.toTensor())) written.push_back(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorList()) written.push_back(t);
    }
  }
  return written;
}

std::vector<at::Tensor> copies(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> result;
  for (const auto& t : tensors) result.push_back(native_of_dense(t).clone());
  return result;
}

std::string difference(const at::Tensor& replayed, const at::Tensor& expected, const char* what) {
  if (replayed.defined() != expected.defined()) return std::string(what) + " is defined in one of them only";
  if (!replayed.defined()) return "";
  if (replayed.scalar_type() != expected.scalar_type() || replayed.sizes() != expected.sizes() ||
      replayed.strides() != expected.strides()) {
    return c10::str(what, " is ", replayed.scalar_type(), replayed.sizes(), " strides ", replayed.strides(),
                    ", expected ", expected.scalar_type(), expected.sizes(), " strides ", expected.strides());
  }
  const auto a = replayed.contiguous().cpu(), b = expected.contiguous().cpu();
  if (std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0) return "";
  const auto *x = static_cast<const char*>(a.const_data_ptr()), *y = static_cast<const char*>(b.const_data_ptr());
  size_t at = 0, wrong = 0;
  for (size_t i = a.nbytes(); i-- > 0;) {
    if (x[i] != y[i]) ++wrong, at = i;
  }
  return c10::str(what, " differs in ", wrong, " of ", a.nbytes(), " bytes, first in element ", at / a.itemsize());
}

// Replaces the arguments on the stack by the results. When it throws before it has launched anything, they are still
// there.
void replay(const Plan& plan, const c10::OperatorHandle& op, torch::jit::Stack* stack, const CallTensors& tensors,
            const PlanKey& key) {
  torch::jit::Stack results;
  plan.replay(op, *stack, tensors, key, results, /*written_too=*/true);
  torch::jit::drop(*stack, op.schema().arguments().size());
  for (auto& result : results) stack->push_back(std::move(result));
}

// Replays on the real arguments, puts back what that has written, runs the call in Python, and compares. The caller
// gets the Python call's results.
void verify(PlanTable& table, const PlanKey& key, const Plan& plan, const c10::OperatorHandle& op,
            torch::jit::Stack* stack, const CallTensors& tensors, c10::function_ref<void(Recording*)> python) {
  const auto text = call_text(op, *stack);
  const auto written = written_arguments(op, *stack);
  torch::jit::Stack replayed(*stack);
  std::vector<at::Tensor> before, after;
  {
    const BelowAutograd below;
    before = copies(written);
    replay(plan, op, &replayed, tensors, key);
    after = copies(written);
    for (size_t i = 0; i < written.size(); ++i) native_of_dense(written[i]).copy_(before[i]);
  }
  python(nullptr);
  const BelowAutograd below;
  std::string wrong;
  for (size_t i = 0; i < written.size() && wrong.empty(); ++i) {
    wrong = difference(after[i], native_of_dense(written[i]), "a written argument");
  }
  const size_t results = op.schema().returns().size();
  for (size_t i = 0; i < results && wrong.empty(); ++i) {
    const auto& got = replayed[replayed.size() - results + i].toTensor();
    const auto& expected = (*stack)[stack->size() - results + i].toTensor();
    if (got.is_same(expected)) continue;  // a written argument
    wrong = difference(is_flagos(got) ? native_of_dense(got) : got,
                       is_flagos(expected) ? native_of_dense(expected) : expected, "a result");
  }
  if (wrong.empty()) return;
  std::fprintf(stderr, "[flagos plan] %s(%s): the replay is not what the Python call gives: %s; the plan is dropped\n",
               c10::toString(op.operator_name()).c_str(), text.c_str(), wrong.c_str());
  table.refuse(key, "its replay was wrong (FLAGOS_PLAN_VERIFY)");
}

}  // namespace

void set_plan_stop(bool (*stop)()) { the_stop.store(stop, std::memory_order_release); }

bool replay_lent(PlanTable& table, const c10::OperatorHandle& op, const torch::jit::Stack& arguments,
                 torch::jit::Stack& results, c10::function_ref<void()> begin) {
  check_fork();
  const auto stop = the_stop.load(std::memory_order_acquire);
  if (C10_UNLIKELY(stop == nullptr || stop() || verifying_plans())) return false;
  CallTensors tensors;
  PlanKey key;
  if (describe_call(op, arguments, tensors, key)) return false;
  const auto plan = table.ready(key);
  if (!plan) return false;
  begin();
  plan->replay(op, arguments, tensors, key, results, /*written_too=*/false);
  return true;
}

void run_planned(PlanTable& table, const c10::OperatorHandle& op, torch::jit::Stack* stack,
                 c10::function_ref<void(Recording*)> python) {
  check_fork();
  const auto stop = the_stop.load(std::memory_order_acquire);
  if (C10_UNLIKELY(stop == nullptr || stop())) {
    if (stop) table.count_refused("a launch hook is installed");
    return python(nullptr);
  }
  CallTensors tensors;
  PlanKey key;
  if (const char* why = describe_call(op, *stack, tensors, key)) {
    table.count_refused(why);
    return python(nullptr);
  }
  const auto found = table.look_up(key);
  if (C10_LIKELY(found.plan != nullptr)) {
    if (C10_UNLIKELY(verifying_plans())) return verify(table, key, *found.plan, op, stack, tensors, python);
    return replay(*found.plan, op, stack, tensors, key);
  }
  // What runs while a graph is captured must not compile, tune or be watched; a plan made before is fine.
  if (found.settled || plan_backend()->capturing(platform().current_stream(tensors.device)) || !table.sight(key)) {
    return python(nullptr);
  }
  Attempt attempt(table, key);
  attempt.recording.device = tensors.device;
  python(&attempt.recording);
}

}  // namespace flagos
