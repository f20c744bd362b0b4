// within.cc: routes that are for some calls only: "silu = flagos_python [dtype=float16 numel>=4096]" (config.h).
#include <algorithm>

#include "csrc/aten/decisions.h"

namespace flagos {

namespace {

void call_kernel(const Kernel& kernel, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                 torch::jit::Stack* stack) {
  if (kernel.boxed) return kernel.boxed(op, keys, stack);
  relabel_boxed(op, c10::DispatchKey::Dense, stack);
}

// The conditions of a wish, against the arguments of a call.
class WithinCall final : public c10::OperatorKernel {
 public:
  WithinCall(Slot& slot, const std::vector<RouteLine>& lines, const Kernel& kernel)
      : slot_(slot),
        backend_(lines.front().backend),
        within_(lines.front().within),
        rest_(lines.begin() + 1, lines.end()),
        kernel_(kernel) {
    for (int i = 0; i < static_cast<int>(at::ScalarType::NumOptions); ++i) {
      const auto type = static_cast<at::ScalarType>(i);
      const auto name = torch_name(type);
      if (within_.dtypes.empty() || std::count(within_.dtypes.begin(), within_.dtypes.end(), name)) {
        dtypes_ |= uint64_t{1} << i;
      }
    }
  }

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    const auto* next = holds(op, *stack) ? nullptr : other();
    if (next) return pass_on(*next, op, keys, stack);
    announce(slot_.name, kernel_, backend_);
    call_kernel(kernel_, op, keys, stack);
  }

 private:
  static std::string_view torch_name(at::ScalarType type) {
    switch (type) {
      case at::kHalf:
        return "float16";
      case at::kBFloat16:
        return "bfloat16";
      case at::kFloat:
        return "float32";
      case at::kDouble:
        return "float64";
      case at::kByte:
        return "uint8";
      case at::kChar:
        return "int8";
      case at::kShort:
        return "int16";
      case at::kInt:
        return "int32";
      case at::kLong:
        return "int64";
      case at::kBool:
        return "bool";
      case at::kComplexHalf:
        return "complex32";
      case at::kComplexFloat:
        return "complex64";
      case at::kComplexDouble:
        return "complex128";
      case at::kFloat8_e4m3fn:
        return "float8_e4m3fn";
      case at::kFloat8_e5m2:
        return "float8_e5m2";
      default:
        return "";
    }
  }

  bool holds(const c10::OperatorHandle& op, const torch::jit::Stack& stack) const {
    int64_t numel = 0;
    bool first = true, right = true;
    const auto see = [&](const at::Tensor& t) {
      if (!t.defined()) return;
      if (first) right = (dtypes_ >> static_cast<unsigned>(t.scalar_type()) & 1) != 0;
      first = false;
      numel = std::max(numel, t.numel());
    };
    for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size() && right; ++i) {
      if (stack[i].isTensor()) {
        see(stack[i].toTensor());
      } else if (stack[i].isTensorList()) {
        for (const at::Tensor& t : stack[i].toTensorList()) see(t);
      }
    }
    return right && numel >= within_.min_numel && numel <= within_.max_numel;
  }

  // What serves a call that the conditions do not hold for. After FlagGems' kernels comes the next backend; a native
  // kernel itself serves what no FlagGems kernel does (nullptr).
  const Decision* other() {
    const auto now = edition();
    if (C10_UNLIKELY(edition_.load(std::memory_order_acquire) != now)) {
      const bool by_lines = !rest_.empty() || backend_ == native_name(slot_);
      const auto& next = by_lines ? decide_lines(slot_, rest_) : decide_without(slot_, backend_);
      const bool itself = rest_.empty() && next.resolution.backend == backend_;
      next_.store(itself ? nullptr : &next, std::memory_order_relaxed);
      edition_.store(now, std::memory_order_release);
    }
    return next_.load(std::memory_order_relaxed);
  }

  Slot& slot_;
  const std::string backend_;
  const Within within_;
  const std::vector<RouteLine> rest_;
  const Kernel kernel_;
  uint64_t dtypes_ = 0;
  std::atomic<const Decision*> next_{nullptr};
  std::atomic<uint64_t> edition_{0};
};

}  // namespace

c10::BoxedKernel within_kernel(Slot& slot, const std::vector<RouteLine>& lines, const Kernel& kernel) {
  return c10::BoxedKernel::makeFromFunctor(std::make_unique<WithinCall>(slot, lines, kernel));
}

void call_decision(const Decision& decision, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                   torch::jit::Stack* stack) {
  if (decision.boxed.isValid()) return decision.boxed.callBoxed(op, keys, stack);
  call_kernel(decision.kernel, op, keys, stack);
}

}  // namespace flagos
