// cpu.cc: the copying CPU fallback: counted, warned about once per operator, forbidden in strict mode (cpu.h).
#include "csrc/aten/backends/cpu/cpu.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/native/CPUFallback.h>

#include <atomic>
#include <map>
#include <mutex>

#include "csrc/aten/native.h"
#include "csrc/aten/route.h"
#include "csrc/runtime/generator.h"

namespace flagos {

namespace {

std::mutex mutex;
std::map<std::string, uint64_t> counts;
std::atomic<bool> strict{false};

std::string describe_arguments(const torch::jit::Stack& stack, size_t n) {
  std::string text;
  for (const auto& value : torch::jit::last(stack, n)) {
    if (!value.isTensor() || !value.toTensor().defined()) continue;
    const auto& t = value.toTensor();
    text += (text.empty() ? "" : ", ") + std::string(c10::toString(t.scalar_type())) + c10::str(t.sizes());
  }
  return text;
}

// A CPU kernel takes a CPU generator. Where the chip's own is none, one is seeded from it.
void replace_generators(torch::jit::Stack& stack, size_t n) {
  for (size_t i = stack.size() - n; i < stack.size(); ++i) {
    if (!stack[i].isGenerator()) continue;
    const auto generator = stack[i].toGenerator();
    if (!generator.defined() || generator.device().type() != kFlagos) continue;
    const auto own = native_of(generator);
    stack[i] = own.device().is_cpu() ? own : at::detail::createCPUGenerator(own.current_seed());
  }
}

// Another library's operator would find all its tensors on the CPU after the copies, so a mix of devices, which no CPU
// or CUDA kernel of it could serve, is refused here. torch's own operators may take single arguments from the CPU.
void refuse_mixed(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t n) {
  if (op.operator_name().getNamespace() == std::optional<std::string_view>("aten")) return;
  std::optional<c10::Device> ours, other;
  const auto see = [&](const at::Tensor& t) {
    if (!t.defined() || (t.is_cpu() && t.dim() == 0)) return;
    auto& seen = t.device().type() == kFlagos && (!ours || *ours == t.device()) ? ours : other;
    seen = t.device();
  };
  for (const auto& value : torch::jit::last(stack, n)) {
    if (value.isTensor()) see(value.toTensor());
    if (!value.isTensorList()) continue;
    for (const at::Tensor& t : value.toTensorList()) see(t);
  }
  TORCH_CHECK(!ours || !other, "Expected all tensors to be on the same device, but found at least two devices, ", *ours,
              " and ", *other, "! (when checking arguments of ", op.operator_name().name, "). Move them with .to(\"",
              *ours, "\").");
}

// The tensors that another library's operator changes. It counts their versions on the copies; autograd has to know it
// of the originals. torch's own operators count above this kernel.
std::vector<at::Tensor> changed_by(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::vector<at::Tensor> changed;
  const auto& arguments = op.schema().arguments();
  if (!op.schema().is_mutable() || op.hasKernelForDispatchKey(c10::DispatchKey::ADInplaceOrView)) return changed;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = stack[stack.size() - arguments.size() + i];
    if (!arguments[i].alias_info() || !arguments[i].alias_info()->isWrite()) continue;
    if (value.isTensor()) changed.push_back(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorList()) changed.push_back(t);
    }
  }
  return changed;
}

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto name = plain_name(op.operator_name());
  const auto arguments = op.schema().arguments().size();
  TORCH_CHECK(!strict.load(std::memory_order_relaxed), "flagos: strict mode: ", name, "(",
              describe_arguments(*stack, arguments), ") would run on the CPU; torch_fl.explain(\"", name,
              "\") says why; torch_fl.strict(False) allows it");
  refuse_mixed(op, *stack, arguments);
  bool first = false;
  {
    std::lock_guard<std::mutex> lock(mutex);
    first = counts[name]++ == 0;
  }
  if (first) {
    TORCH_WARN("flagos: ", name, "(", describe_arguments(*stack, arguments),
               ") runs on the CPU: its tensors are copied there and back on every call. torch_fl.explain(\"", name,
               "\") says why, torch_fl.fallbacks() counts the calls.");
  }
  replace_generators(*stack, arguments);
  const auto changed = changed_by(op, *stack);
  at::native::cpu_fallback(op, stack);
  for (const auto& t : changed) {
    if (t.defined() && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

bool available(std::string&) { return true; }

Kernel kernel(const Slot& slot, std::string& why) {
  if (!slot.op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU)) {
    why = "torch has no CPU kernel for it";
    return {};
  }
  why = "copies to the CPU and back";
  return Kernel{nullptr, &run_on_cpu};
}

FLAGOS_BACKEND(cpu, {"cpu", 100, &available, &kernel});

}  // namespace

std::vector<std::pair<std::string, uint64_t>> fallback_counts() {
  std::lock_guard<std::mutex> lock(mutex);
  std::vector<std::pair<std::string, uint64_t>> all;
  for (const auto& [name, n] : counts) {
    if (n) all.emplace_back(name, n);
  }
  return all;
}

void reset_fallback_counts() {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto& entry : counts) entry.second = 0;  // kept, so that the warning stays once per operator
}

bool set_strict(bool on) { return strict.exchange(on); }

}  // namespace flagos
