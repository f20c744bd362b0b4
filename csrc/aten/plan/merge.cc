// merge.cc: one plan from two whose calls differ in the values of numbers alone (plan.h).
#include <algorithm>
#include <cstring>
#include <optional>

#include "csrc/aten/plan/plan.h"

namespace flagos {

namespace {

using Number = PlanLaunch::Number;

size_t size_of(Number::Encoding encoding) { return encoding == Number::kInt32 || encoding == Number::kFloat ? 4 : 8; }

bool same(const Place& a, const Place& b) { return a.slot == b.slot && a.offset == b.offset; }

bool same(const PlanTensor& a, const PlanTensor& b) {
  return same(a.place, b.place) && a.dtype == b.dtype && a.sizes == b.sizes && a.strides == b.strides;
}

bool same(const PlanSlot& a, const PlanSlot& b) {
  return a.kind == b.kind && a.nbytes == b.nbytes && a.tensor == b.tensor && a.last_use == b.last_use &&
         a.output == b.output;
}

bool same(const PlanOutput& a, const PlanOutput& b) {
  return a.argument == b.argument && a.none == b.none && same(a.tensor, b.tensor);
}

bool same(const PlanCall::Use& a, const PlanCall::Use& b) {
  return a.argument == b.argument && a.member == b.member && same(a.tensor, b.tensor);
}

bool same(const PlanLaunch::Patch& a, const PlanLaunch::Patch& b) {
  return a.offset == b.offset && same(a.place, b.place) && a.map == b.map;
}

template <class T>
bool all_same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const T& x, const T& y) { return same(x, y); });
}

// Constants of the host are compared by their bytes; tensors of the device are not in the template.
bool same_value(const c10::IValue& a, const c10::IValue& b) {
  if (a.tagKind() != b.tagKind()) return false;
  if (a.isTensor()) {
    const auto &x = a.toTensor(), &y = b.toTensor();
    if (!x.defined() || !y.defined()) return x.defined() == y.defined();
    return x.device().is_cpu() && y.device().is_cpu() && x.scalar_type() == y.scalar_type() && x.sizes() == y.sizes() &&
           x.is_contiguous() && y.is_contiguous() &&
           std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
  }
  if (a.isList()) {
    const auto x = a.toListRef(), y = b.toListRef();
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), &same_value);
  }
  return a.isNone() || a == b;
}

bool same(const PlanCall& a, const PlanCall& b) {
  return a.op.operator_name() == b.op.operator_name() && all_same(a.uses, b.uses) && a.returned == b.returned &&
         std::equal(a.arguments.begin(), a.arguments.end(), b.arguments.begin(), b.arguments.end(), &same_value);
}

bool same(const LaunchConfig& a, const LaunchConfig& b) {
  return a.function == b.function && std::equal(a.grid, a.grid + 3, b.grid) && a.warps == b.warps && a.ctas == b.ctas &&
         a.shared == b.shared && a.cooperative == b.cooperative && a.pdl == b.pdl;
}

class Merge {
 public:
  Merge(const PlanKey& a, const PlanKey& b) : a_(a), b_(b), free(a.scalars.size(), false) {}

  // The launch for both calls; null when a parameter differs that follows no number.
  std::shared_ptr<PlanLaunch> launch(const PlanLaunch& a, const PlanLaunch& b) {
    const size_t bytes = a.block.size() * sizeof(uint64_t);
    auto merged = std::make_shared<PlanLaunch>(a);
    for (size_t i = 0; i < a.offsets.size(); ++i) {
      const size_t begin = a.offsets[i], end = i + 1 < a.offsets.size() ? a.offsets[i + 1] : bytes;
      const bool address =
          std::any_of(a.patches.begin(), a.patches.end(), [&](const auto& patch) { return patch.offset == begin; });
      if (address || std::memcmp(block(a) + begin, block(b) + begin, end - begin) == 0) continue;
      const auto number = followed(a, b, begin, end);
      if (!number) return nullptr;
      merged->numbers.push_back(*number);
      free[number->scalar] = true;
    }
    return merged;
  }

 private:
  static const char* block(const PlanLaunch& launch) { return reinterpret_cast<const char*>(launch.block.data()); }

  std::optional<Number> followed(const PlanLaunch& a, const PlanLaunch& b, size_t begin, size_t end) const {
    std::optional<Number> found;
    for (uint32_t scalar = 0; scalar < a_.scalars.size(); ++scalar) {
      for (const auto encoding : {Number::kInt32, Number::kInt64, Number::kFloat, Number::kDouble}) {
        const Number number{static_cast<uint32_t>(begin), scalar, encoding};
        const size_t size = size_of(encoding);
        if ((!a_.scalars[scalar].integer && (encoding == Number::kInt32 || encoding == Number::kInt64)) ||
            size > end - begin) {
          continue;
        }
        char expected_a[8], expected_b[8];
        put_number(expected_a, number, a_);
        put_number(expected_b, number, b_);
        if (std::memcmp(block(a) + begin, expected_a, size) != 0 ||
            std::memcmp(block(b) + begin, expected_b, size) != 0 ||
            std::memcmp(block(a) + begin + size, block(b) + begin + size, end - begin - size) != 0) {
          continue;
        }
        if (found && found->scalar != scalar) return std::nullopt;  // two numbers had the same values
        if (!found) found = number;
      }
    }
    return found;
  }

  const PlanKey &a_, &b_;

 public:
  std::vector<bool> free;
};

}  // namespace

void put_number(char* place, const Number& number, const PlanKey& key) {
  const auto& scalar = key.scalars[number.scalar];
  const uint64_t word = key.words[scalar.word];
  const auto integer = static_cast<int64_t>(word);
  double value = static_cast<double>(integer);
  if (!scalar.integer) std::memcpy(&value, &word, sizeof value);
  const auto put = [&](auto encoded) { std::memcpy(place, &encoded, sizeof encoded); };
  switch (number.encoding) {
    case Number::kInt32:
      return put(static_cast<int32_t>(integer));
    case Number::kInt64:
      return put(integer);
    case Number::kFloat:
      return put(static_cast<float>(value));
    case Number::kDouble:
      return put(value);
  }
}

std::shared_ptr<const Plan> merge_plans(const Plan& a, const PlanKey& key_a, const Plan& b, const PlanKey& key_b,
                                        std::vector<bool>& free, std::string& why) {
  const auto apart = [&](const char* reason) {
    why = reason;
    return nullptr;
  };
  if (!all_same(a.slots, b.slots) || !all_same(a.outputs, b.outputs) || a.allocate_last != b.allocate_last) {
    return apart("other memory");
  }
  if (a.steps.size() != b.steps.size()) return apart("other steps");
  Merge merge(key_a, key_b);
  auto merged = std::make_shared<Plan>(a);
  for (size_t i = 0; i < a.steps.size(); ++i) {
    const auto &x = a.steps[i], &y = b.steps[i];
    if (!x.launch != !y.launch || x.allocate != y.allocate) return apart("other steps");
    if (x.call) {
      if (!same(*x.call, *y.call)) return apart("an operator inside gets other numbers");
      continue;
    }
    if (!same(x.launch->config, y.launch->config)) return apart("another kernel or grid");
    if (!all_same(x.launch->patches, y.launch->patches) || x.launch->offsets != y.launch->offsets ||
        x.launch->block.size() != y.launch->block.size()) {
      return apart("other parameters");
    }
    merged->steps[i].launch = merge.launch(*x.launch, *y.launch);
    if (!merged->steps[i].launch) return apart("a parameter that follows no number");
  }
  for (size_t i = 0; i < key_a.scalars.size(); ++i) {
    const auto word = key_a.scalars[i].word;
    if (key_a.words[word] != key_b.words[word] && !merge.free[i]) return apart("a number that no parameter follows");
  }
  free = std::move(merge.free);
  return merged;
}

}  // namespace flagos
