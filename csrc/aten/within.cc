// within.cc: routes that are for some calls only: "silu = flagos_python [dtype=float16 numel>=4096]" (config.h).
#include <algorithm>

#include "csrc/aten/decisions.h"

namespace flagos {

namespace {

// What conditions look at, of arguments on a stack.
Glance glance_at(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  Glance seen;
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); ++i) {
    if (stack[i].isTensor()) {
      glance(seen, stack[i].toTensor());
    } else if (stack[i].isTensorList()) {
      for (const at::Tensor& t : stack[i].toTensorList()) glance(seen, t);
    }
  }
  return seen;
}

// The conditions of a wish, against the arguments of a call.
class WithinCall final : public Screen {
 public:
  WithinCall(Slot& slot, const std::vector<RouteLine>& lines)
      : slot_(slot),
        backend_(lines.front().backend),
        within_(lines.front().within),
        rest_(lines.begin() + 1, lines.end()) {
    for (int i = 0; i < static_cast<int>(at::ScalarType::NumOptions); ++i) {
      const auto type = static_cast<at::ScalarType>(i);
      const auto name = torch_name(type);
      if (within_.dtypes.empty() || std::count(within_.dtypes.begin(), within_.dtypes.end(), name)) {
        dtypes_ |= uint64_t{1} << i;
      }
    }
  }

  const Decision* other(const Glance& call) override { return holds(call) ? nullptr : otherwise(); }

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

  bool holds(const Glance& call) const {
    const bool no_tensor = call.dtype == at::ScalarType::Undefined;
    return (no_tensor || (dtypes_ >> static_cast<unsigned>(call.dtype) & 1) != 0) && call.numel >= within_.min_numel &&
           call.numel <= within_.max_numel;
  }

  // What serves the calls that the conditions do not hold for. After FlagGems' kernels comes the next backend; a native
  // kernel itself serves what no FlagGems kernel does (nullptr).
  const Decision* otherwise() {
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
  uint64_t dtypes_ = 0;
  std::atomic<const Decision*> next_{nullptr};
  std::atomic<uint64_t> edition_{0};
};

}  // namespace

void take_over(const Decision& decision) {
  TORCH_CHECK(decision.resolution.error.empty(), "flagos: ", decision.resolution.error);
  served_by(decision);
  if (!decision.screen) announce(decision);
}

std::unique_ptr<Screen> conditions(Slot& slot, const std::vector<RouteLine>& lines) {
  return std::make_unique<WithinCall>(slot, lines);
}

const Decision& screened(const Decision& decision, const Glance& call) {
  const auto* serves = &decision;
  while (serves->screen) {
    const auto* other = serves->screen->other(call);
    if (!other) {
      announce(*serves);
      break;
    }
    take_over(*other);
    serves = other;
  }
  return *serves;
}

void pass_on(const Decision& decision, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
             torch::jit::Stack* stack) {
  take_over(decision);
  call_decision(decision, op, keys, stack);
}

void call_decision(const Decision& decision, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                   torch::jit::Stack* stack) {
  const auto& serves = decision.screen ? screened(decision, glance_at(op, *stack)) : decision;
  if (serves.boxed.isValid()) return serves.boxed.callBoxed(op, keys, stack);
  relabel_boxed(op, c10::DispatchKey::Dense, stack);
}

}  // namespace flagos
