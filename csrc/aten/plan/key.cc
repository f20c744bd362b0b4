// key.cc: a call as words (key.h). Every item begins with a word that says what it is and how long, so that no two
// different calls give the same words.
#include "csrc/aten/plan/key.h"

#include <ATen/Context.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/impl/COW.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

#include "csrc/aten/native.h"
#include "csrc/aten/twin.h"

namespace flagos {

namespace {

constexpr size_t kMostTensors = 32;  // relations are kept for every pair
const c10::DispatchKeySet kLazy({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                                 c10::DispatchKey::ZeroTensor});

enum Item : uint64_t {
  kNone,
  kUndefined,
  kTensor,
  kNumber,
  kHostTensor,
  kInt,
  kDouble,
  kComplex,
  kBool,
  kString,
  kDevice,
  kList
};

uint64_t head(Item item, uint64_t a = 0, uint64_t b = 0) { return item | a << 8 | b << 32; }

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
  return hash ^ hash >> 29;
}

uint64_t hash_of(const PlanKey& key) {
  uint64_t hash = key.words.size();
  for (const auto word : key.words) hash = mix(hash, word);
  return hash;
}

// Arguments that are numbers to compute with; integers that are declared as such say where and how much.
bool is_number(const c10::Argument& argument) {
  const c10::Type* type = argument.real_type().get();
  if (type->kind() == c10::TypeKind::OptionalType) type = type->castRaw<c10::OptionalType>()->getElementType().get();
  return type->kind() == c10::TypeKind::NumberType || type->kind() == c10::TypeKind::FloatType;
}

// Numbers that code likes to compare with, each a class of its own; between two of them is another class.
constexpr double kUsual[] = {-1, -0.5, 0, 0.5, 1, 2};

uint64_t class_of(double value) {
  if (std::isnan(value)) return 100;
  if (std::isinf(value)) return value > 0 ? 101 : 102;
  uint64_t place = std::signbit(value) ? 50 : 0;  // -0.0 is not 0.0
  for (const double usual : kUsual) {
    if (value == usual) return place + 1;
    if (value < usual) return place;
    place += 2;
  }
  return place;
}

uint64_t class_of(int64_t value) {
  const bool narrow = value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max();
  const bool exact = std::abs(static_cast<double>(value)) <= 1 << 24;  // as a float32
  return class_of(static_cast<double>(value)) << 8 | uint64_t{value % 16 == 0} << 2 | uint64_t{narrow} << 1 | exact;
}

class Describe {
 public:
  Describe(CallTensors& tensors, PlanKey& key) : tensors_(tensors), words_(key.words), scalars_(key.scalars) {}

  bool argument(const c10::IValue& value, const c10::Argument& declared) {
    if (is_number(declared) && (value.isInt() || value.isDouble())) {
      scalars_.push_back({static_cast<uint32_t>(words_.size() + 1), value.isInt()});
    }
    return item(value);
  }

  bool item(const c10::IValue& value) {
    if (value.isTensor()) return tensor(value.unsafeToTensorImpl());
    if (value.isNone()) return put(head(kNone));
    if (value.isInt()) return put(head(kInt), static_cast<uint64_t>(value.toInt()));
    if (value.isDouble()) return put(head(kDouble), bits(value.toDouble()));
    if (value.isBool()) return put(head(kBool, value.toBool()));
    if (value.isComplexDouble()) {
      const auto number = value.toComplexDouble();
      return put(head(kComplex), bits(number.real())) && put(bits(number.imag()));
    }
    if (value.isList()) {
      const auto list = value.toListRef();
      put(head(kList, 0, list.size()));
      for (const auto& member : list) {
        if (!item(member)) return false;
      }
      return true;
    }
    if (value.isDevice()) {
      const auto device = value.toDevice();
      if (device.type() == kFlagos && device.has_index() && !note(device.index())) return false;
      return put(head(kDevice, static_cast<uint8_t>(device.type()), static_cast<uint8_t>(device.index())));
    }
    if (value.isString()) return text(value.toStringRef());
    why = value.isGenerator() ? "takes a random generator" : "takes an argument that is no tensor, number or text";
    return false;
  }

  void relations() {
    const size_t n = tensors_.tensor.size();
    for (size_t i = 0; i < n; ++i) {
      for (size_t j = i + 1; j < n; ++j) {
        if (tensors_.tensor[i] == tensors_.tensor[j]) {
          put(head(kTensor, 1, j));
        } else if (const auto* a = tensors_.address[i], *b = tensors_.address[j];
                   a && b && a < b + extents_[j] && b < a + extents_[i]) {
          put(head(kTensor, 2, j), static_cast<uint64_t>(b - a));
        } else {
          put(head(kTensor, 3, j));
        }
      }
    }
  }

  const char* why = nullptr;

 private:
  static uint64_t bits(double number) {
    uint64_t word;
    std::memcpy(&word, &number, sizeof word);
    return word;
  }
  bool put(uint64_t word) {
    words_.push_back(word);
    return true;
  }
  bool put(uint64_t first, uint64_t second) {
    words_.push_back(first);
    return put(second);
  }
  bool text(const std::string& text) {
    put(head(kString, 0, text.size()));
    for (size_t i = 0; i < text.size(); i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, text.data() + i, std::min<size_t>(8, text.size() - i));
      put(word);
    }
    return true;
  }
  bool note(c10::DeviceIndex index) {
    if (tensors_.device >= 0 && tensors_.device != index) {
      why = "spans two devices";
      return false;
    }
    tensors_.device = index;
    return true;
  }

  bool tensor(c10::TensorImpl* t) {
    if (t == c10::UndefinedTensorImpl::singleton()) return put(head(kUndefined));
    const auto dtype = static_cast<uint64_t>(c10::typeMetaToScalarType(t->dtype()));
    if (t->device_type() == c10::DeviceType::CPU) return host_tensor(t, dtype);
    if (t->device_type() != kFlagos || t->layout() != at::kStrided || !t->has_storage() ||
        t->key_set().has_any(c10::python_ks)) {
      why = "takes a tensor that is not a dense one of flagos";
      return false;
    }
    if (tensors_.tensor.size() == kMostTensors) {
      why = "takes more than 32 tensors";
      return false;
    }
    if (!note(t->device().index())) return false;
    auto* storage = t->unsafe_storage().unsafeGetStorageImpl();
    auto* twin = storage ? twin_of(storage) : nullptr;
    if (!twin || c10::impl::cow::is_cow_data_ptr(twin->_mutable_data_ptr_no_checks()) ||
        (twin->nbytes() == 0 && t->numel() > 0)) {
      why = "takes a tensor whose memory is released or copied on write";
      return false;
    }
    char* address = nullptr;
    if (t->numel() > 0) {
      address = static_cast<char*>(twin->_mutable_data_ptr_no_checks().get()) + t->storage_offset() * t->itemsize();
    }
    const auto sizes = t->sizes();
    const auto strides = t->strides();
    const auto lazy = t->key_set() & kLazy;
    const uint64_t lazy_bits = lazy.has(c10::DispatchKey::Conjugate) | lazy.has(c10::DispatchKey::Negative) << 1 |
                               lazy.has(c10::DispatchKey::ZeroTensor) << 2;
    const uint64_t aligned = reinterpret_cast<uintptr_t>(address) % 16 == 0;  // compilers ask for no more
    put(head(kTensor, dtype | aligned << 8 | sizes.size() << 12, lazy_bits));
    words_.append(sizes.begin(), sizes.end());
    words_.append(strides.begin(), strides.end());
    tensors_.tensor.push_back(t);
    tensors_.twin.push_back(twin);
    tensors_.address.push_back(address);
    extents_.push_back(extent(*t));
    return true;
  }

  // A tensor on the host is known to Python code by its value, so it must be one number.
  bool host_tensor(c10::TensorImpl* t, uint64_t dtype) {
    if (t->dim() != 0 || t->layout() != at::kStrided || !t->has_storage() ||
        t->key_set().has_any(c10::python_ks | kLazy)) {
      why = "takes a tensor of the host";
      return false;
    }
    uint64_t value[2] = {0, 0};
    std::memcpy(value, t->data(), t->itemsize());
    put(head(t->is_wrapped_number() ? kNumber : kHostTensor, dtype));
    if (t->dtype() == caffe2::TypeMeta::Make<double>() || t->dtype() == caffe2::TypeMeta::Make<int64_t>()) {
      scalars_.push_back({static_cast<uint32_t>(words_.size()), t->dtype() == caffe2::TypeMeta::Make<int64_t>()});
    }
    return put(value[0], value[1]);
  }

  CallTensors& tensors_;
  decltype(PlanKey::words)& words_;
  decltype(PlanKey::scalars)& scalars_;
  c10::SmallVector<size_t, 8> extents_;
};

}  // namespace

size_t extent(const c10::TensorImpl& tensor) {
  if (tensor.numel() == 0) return 0;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return static_cast<size_t>(last + 1) * tensor.itemsize();
}

const char* describe_call(const c10::OperatorHandle& op, const torch::jit::Stack& stack, CallTensors& tensors,
                          PlanKey& key) {
  Describe describe(tensors, key);
  const auto& context = at::globalContext();
  key.words.push_back(static_cast<uint64_t>(c10::get_default_dtype_as_scalartype()) |
                      uint64_t{context.deterministicAlgorithms()} << 8 |
                      uint64_t{context.deterministicAlgorithmsWarnOnly()} << 9);
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!describe.argument(stack[stack.size() - arguments.size() + i], arguments[i])) return describe.why;
  }
  describe.relations();
  if (tensors.device < 0) tensors.device = platform().current_device();
  key.words.push_back(static_cast<uint64_t>(tensors.device));
  key.hash = hash_of(key);
  return nullptr;
}

PlanKey PlanKey::family() const {
  PlanKey family = *this;
  for (const auto& scalar : scalars) {
    auto& word = family.words[scalar.word];
    double value;
    std::memcpy(&value, &word, sizeof value);
    word = scalar.integer ? class_of(static_cast<int64_t>(word)) : class_of(value);
  }
  family.hash = hash_of(family);
  return family;
}

namespace {
void describe_text(std::ostream& out, const c10::IValue& value) {
  if (value.isTensor()) {
    const auto& t = value.toTensor();
    if (!t.defined()) {
      out << "undefined";
    } else if (t.dim() == 0 && t.device().is_cpu()) {
      out << t.scalar_type() << ' ' << t.item().toComplexDouble();
    } else {
      out << t.scalar_type() << t.sizes() << " strides " << t.strides() << " offset " << t.storage_offset();
    }
  } else if (value.isList()) {
    const auto list = value.toListRef();
    out << '[';
    for (size_t i = 0; i < list.size(); ++i) {
      if (i) out << ", ";
      describe_text(out, list[i]);
    }
    out << ']';
  } else {
    out << value;
  }
}
}  // namespace

std::string call_text(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::ostringstream out;
  const size_t n = op.schema().arguments().size();
  for (size_t i = stack.size() - n; i < stack.size(); ++i) {
    if (i > stack.size() - n) out << ", ";
    describe_text(out, stack[i]);
  }
  return out.str();
}

}  // namespace flagos
