// recorder.cc: from what a call did to the plan that does it again (recorder.h).
#include "csrc/aten/plan/recorder.h"

#include <cstring>
#include <set>

#include "csrc/aten/native.h"

namespace flagos {

namespace {

constexpr size_t kLargestConstant = 4096;  // bytes of a host tensor that a plan keeps

const std::set<std::string> kAllocations{"aten::empty",     "aten::empty_strided",     "aten::empty_like",
                                         "aten::new_empty", "aten::new_empty_strided", "aten::empty_permuted"};
// They answer from a tensor's metadata alone, which the key determines.
const std::set<std::string> kMetadata{"aten::result_type",
                                      "aten::promote_types",
                                      "aten::can_cast",
                                      "aten::is_same_size",
                                      "aten::size",
                                      "aten::sym_size",
                                      "aten::sym_stride",
                                      "aten::sym_numel",
                                      "aten::stride",
                                      "aten::numel",
                                      "aten::dim",
                                      "aten::is_contiguous",
                                      "aten::is_complex",
                                      "aten::is_floating_point",
                                      "aten::is_signed",
                                      "aten::is_pinned",
                                      "aten::is_strides_like_format",
                                      "aten::is_non_overlapping_and_dense",
                                      "aten::sym_storage_offset",
                                      "aten::storage_offset",
                                      "aten::is_conj",
                                      "aten::is_neg",
                                      "aten::is_inference",
                                      "aten::_has_compatible_shallow_copy_type"};
const std::set<std::string> kReplaceMemory{"aten::resize_", "aten::resize_as_", "aten::set_"};

template <class Each>
void each_tensor(const c10::IValue& value, Each each) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) each(value.toTensor());
  } else if (value.isList()) {
    for (const auto& member : value.toListRef()) each_tensor(member, each);
  }
}
template <class Each>
void each_tensor(const torch::jit::Stack& stack, Each each) {
  for (const auto& value : stack) each_tensor(value, each);
}

bool writes(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

const c10::StorageImpl* storage_of(const at::Tensor& t) {
  return t.has_storage() ? t.storage().unsafeGetStorageImpl() : nullptr;
}

uint64_t number(const void* p) { return reinterpret_cast<uintptr_t>(p); }

uint64_t start_of(const c10::StorageImpl* storage) {
  return number(const_cast<c10::StorageImpl*>(storage)->_mutable_data_ptr_no_checks().get());
}

uint64_t first_element(const at::Tensor& t) {
  return start_of(storage_of(t)) + static_cast<uint64_t>(t.storage_offset() * static_cast<int64_t>(t.itemsize()));
}

}  // namespace

PlanRecorder::PlanRecorder(const c10::OperatorHandle& op, const torch::jit::Stack& stack, c10::DeviceIndex device)
    : op_(op), device_(device) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack.size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    each_tensor(stack[first + i], [&](const at::Tensor& t) {
      if (!this->device(t)) {
        host_.insert(storage_of(t));
        kept_.push_back(t);
        return;
      }
      inputs_.push_back({t, writes(arguments[i]), t.sizes().vec(), t.strides().vec(), storage_of(t), first_element(t),
                         extent(*t.unsafeGetTensorImpl())});
      plan_->slots.push_back({PlanSlot::kInput});
      base_.push_back(t.numel() ? first_element(t) : 0);
      first_use_.push_back(-1);
    });
  }
}

bool PlanRecorder::device(const at::Tensor& t) const { return t.device().type() == native.type; }

void PlanRecorder::refuse(const std::string& reason, bool again) {
  if (refused()) return;
  why_ = reason;
  again_ = again;
}

std::vector<std::pair<uint64_t, size_t>> PlanRecorder::allocations() const {
  std::vector<std::pair<uint64_t, size_t>> all;
  for (size_t i = inputs_.size(); i < base_.size(); ++i) all.emplace_back(base_[i], plan_->slots[i].nbytes);
  return all;
}

int PlanRecorder::new_slot(PlanSlot::Kind kind, const at::Tensor& t) {
  const auto* storage = storage_of(t);
  const int slot = static_cast<int>(plan_->slots.size());
  plan_->slots.push_back({kind, storage->nbytes()});
  base_.push_back(start_of(storage));
  first_use_.push_back(-1);
  slot_of_[storage] = slot;
  return slot;
}

// ---- addresses ---------------------------------------------------------------------------------------------------

std::optional<Place> PlanRecorder::place_of(uint64_t address) {
  if (address == 0) return Place{};
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].bytes && address == base_[i]) return Place{static_cast<int>(i), 0};
  }
  for (size_t i = inputs_.size(); i < base_.size(); ++i) {
    if (address >= base_[i] && address - base_[i] < std::max<size_t>(plan_->slots[i].nbytes, 1)) {
      return Place{static_cast<int>(i), static_cast<int64_t>(address - base_[i])};
    }
  }
  // Where inputs overlap, any of them will do: the distance between them is in the key.
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (address >= inputs_[i].address && address - inputs_[i].address < inputs_[i].bytes) {
      return Place{static_cast<int>(i), static_cast<int64_t>(address - base_[i])};
    }
  }
  return std::nullopt;
}

std::optional<Place> PlanRecorder::place_of(const at::Tensor& t) {
  const auto* storage = storage_of(t);
  if (!storage) return std::nullopt;
  const auto found = slot_of_.find(storage);
  if (found != slot_of_.end()) {
    return Place{found->second, t.storage_offset() * static_cast<int64_t>(t.itemsize())};
  }
  const auto address = first_element(t);
  std::optional<Place> inside;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const auto& input = inputs_[i];
    if (input.storage != storage) continue;
    const auto distance = static_cast<int64_t>(address - input.address);
    if (distance == 0) return Place{static_cast<int>(i), 0};
    if (t.numel() == 0 || (distance > 0 && static_cast<size_t>(distance) < input.bytes)) {
      if (!inside) inside = Place{static_cast<int>(i), t.numel() == 0 ? 0 : distance};
    }
  }
  return inside;
}

std::optional<PlanTensor> PlanRecorder::plan_tensor(const at::Tensor& t) {
  if (t.layout() != at::kStrided || t.is_conj() || t.is_neg() || t.is_quantized()) {
    refuse("uses a tensor that is not a plain dense one");
    return std::nullopt;
  }
  const auto place = place_of(t);
  if (!place) {
    refuse(storage_of(t) ? "uses memory that is neither an argument nor its own" : "uses a tensor without memory");
    return std::nullopt;
  }
  return PlanTensor{*place, t.scalar_type(), t.sizes().vec(), t.strides().vec()};
}

void PlanRecorder::touch(int slot) {
  const int step = static_cast<int>(plan_->steps.size());
  if (first_use_[slot] < 0) first_use_[slot] = step;
  plan_->slots[slot].last_use = step;
}

// ---- operators ---------------------------------------------------------------------------------------------------

bool PlanRecorder::known(const at::Tensor& t) const {
  const auto* storage = storage_of(t);
  return slot_of_.count(storage) ||
         std::any_of(inputs_.begin(), inputs_.end(), [&](const auto& input) { return input.storage == storage; });
}

// Host tensors that are made of the key's values alone have the same contents at every call with that key.
void PlanRecorder::host_operation(const std::string& name, const torch::jit::Stack& arguments,
                                  const torch::jit::Stack& results) {
  each_tensor(arguments, [&](const at::Tensor& t) {
    if (!t.is_meta() && !host_.count(storage_of(t))) {
      refuse("reads memory of the host that is not the call's (" + name + ")");
    }
  });
  each_tensor(results, [&](const at::Tensor& t) {
    host_.insert(storage_of(t));
    kept_.push_back(t);
  });
}

void PlanRecorder::check_writes(const c10::OperatorHandle& op, const torch::jit::Stack& arguments) {
  const auto& declared = op.schema().arguments();
  for (size_t i = 0; i < declared.size(); ++i) {
    if (!writes(declared[i])) continue;
    each_tensor(arguments[i], [&](const at::Tensor& t) {
      for (const auto& input : inputs_) {
        if (input.storage == storage_of(t) && !slot_of_.count(storage_of(t)) && !input.written) {
          refuse("changes an argument that it must not change (" + op.operator_name().name + ")");
        }
      }
    });
  }
}

bool PlanRecorder::use(PlanCall& call, size_t argument, int member, at::Tensor& t) {
  if (!device(t)) {
    if (t.is_meta() || !host_.count(storage_of(t))) {
      // A number that became a tensor on its way here is a constant; every other host tensor must be known.
      if (!t.unsafeGetTensorImpl()->is_wrapped_number()) refuse("copies from the host");
    }
    if (t.nbytes() > kLargestConstant) refuse("copies from the host");
    if (!refused() && !t.unsafeGetTensorImpl()->is_wrapped_number()) t = t.clone();
    return !refused();
  }
  auto tensor = plan_tensor(t);
  if (!tensor) return false;
  touch(tensor->place.slot);
  plan_->slots[tensor->place.slot].tensor = true;
  call.uses.push_back({argument, member, std::move(*tensor)});
  t = at::Tensor();  // a plan keeps no memory of the call it was made of
  return true;
}

void PlanRecorder::add_call(const c10::OperatorHandle& op, torch::jit::Stack arguments,
                            const torch::jit::Stack& results) {
  auto call = std::make_shared<PlanCall>(PlanCall{op, {}, {}, {}});
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = arguments[i];
    if (value.isTensor() && value.toTensor().defined()) {
      auto t = value.toTensor();
      if (!use(*call, i, -1, t)) return;
      value = t;
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      int member = 0;
      for (at::Tensor t : value.toTensorList()) {
        if (!use(*call, i, member++, t)) return;
        list.push_back(t);
      }
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      int member = 0;
      for (std::optional<at::Tensor> t : value.toOptionalTensorList()) {
        if (t && t->defined() && !use(*call, i, member, *t)) return;
        ++member;
        list.push_back(std::move(t));
      }
      value = std::move(list);
    } else if (value.isGenerator()) {
      return refuse("draws random numbers (" + op.operator_name().name + ")");
    }
  }
  for (size_t i = 0; i < results.size(); ++i) {
    if (!results[i].isTensor()) return refuse("calls an operator whose results are no tensors");
    const auto& t = results[i].toTensor();
    if (!t.defined() || known(t)) continue;
    if (t.layout() != at::kStrided || !t.has_storage()) return refuse("uses a tensor that is not a plain dense one");
    const int slot = new_slot(PlanSlot::kReturned, t);
    touch(slot);
    call->returned.emplace_back(i, slot);
  }
  call->arguments = std::move(arguments);
  plan_->steps.emplace_back();
  plan_->steps.back().call = std::move(call);
}

void PlanRecorder::operation(const c10::OperatorHandle& op, torch::jit::Stack arguments,
                             const torch::jit::Stack& results) {
  if (refused()) return;
  const auto& name = op.operator_name().name;
  if (op.hasTag(at::Tag::nondeterministic_seeded)) return refuse("draws random numbers (" + name + ")");
  bool takes = false, gives = false, gives_host = false, all_known = true, any_result = false;
  each_tensor(arguments, [&](const at::Tensor& t) { takes |= device(t); });
  each_tensor(results, [&](const at::Tensor& t) {
    any_result = true;
    gives |= device(t);
    gives_host |= !device(t) && !t.is_meta();
    all_known &= known(t);
  });
  if (!takes && !gives) return host_operation(name, arguments, results);
  each_tensor(arguments, [&](const at::Tensor& t) { kept_.push_back(t); });
  each_tensor(results, [&](const at::Tensor& t) { kept_.push_back(t); });
  if (op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape) || gives_host) {
    return refuse("waits for the device (" + name + ")");
  }
  if (kAllocations.count(name)) {
    return each_tensor(results, [&](const at::Tensor& t) {
      if (t.layout() != at::kStrided || !t.has_storage()) return refuse("uses a tensor that is not a plain dense one");
      if (t.device().index() != device_) return refuse("allocates on another device");
      new_slot(PlanSlot::kAllocated, t);
    });
  }
  if (!any_result && !results.empty()) {
    if (!kMetadata.count(name)) refuse("asks for what a plan cannot know again (" + name + ")");
    return;
  }
  if (kReplaceMemory.count(name)) {
    // Without effect when the tensor has that size already, as an out= argument should; finish() sees to inputs.
    for (const auto& input : inputs_) {
      if (input.tensor.is_same(results[0].toTensor())) return;
    }
    return refuse("gives a tensor other memory (" + name + ")");
  }
  const auto& declared = op.schema().arguments();
  const bool mutates = std::any_of(declared.begin(), declared.end(), writes);
  if (!mutates && any_result && all_known) return;  // a view
  check_writes(op, arguments);
  if (!refused()) add_call(op, std::move(arguments), results);
}

// ---- launches ----------------------------------------------------------------------------------------------------

void PlanRecorder::launch(const LaunchConfig& config, const std::vector<Parameter>& parameters) {
  if (refused()) return;
  std::vector<size_t> sizes;
  if (!plan_backend()->parameters(config.function, sizes))
    return refuse("the driver does not show a kernel's parameters");
  if (sizes.size() != parameters.size()) return refuse("a kernel has other parameters than its launcher says");
  auto launch = std::make_shared<PlanLaunch>();
  launch->config = config;
  std::string block;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& parameter = parameters[i];
    if (sizes[i] != parameter.bytes.size()) return refuse("a kernel has other parameters than its launcher says");
    const size_t alignment = parameter.map ? 64 : std::min<size_t>(sizes[i], 8);
    block.resize((block.size() + alignment - 1) / alignment * alignment);
    const auto offset = static_cast<uint32_t>(block.size());
    launch->offsets.push_back(offset);
    block += parameter.bytes;
    uint64_t value = parameter.map.value_or(0);
    if (!parameter.map && sizes[i] == 8) std::memcpy(&value, parameter.bytes.data(), 8);
    if (parameter.address || parameter.map) {
      const auto place = place_of(value);
      if (!place) return refuse("a kernel gets an address that is neither in an argument nor in memory of the call");
      if (place->slot < 0) continue;
      launch->patches.push_back({offset, *place, parameter.map.has_value()});
      touch(place->slot);
    } else if (value > 4096 && place_of(value)) {
      return refuse("a kernel gets an address as a number");
    }
  }
  block.resize((block.size() + 7) / 8 * 8);
  launch->block.resize(block.size() / 8);
  std::memcpy(launch->block.data(), block.data(), block.size());
  plan_->steps.emplace_back();
  plan_->steps.back().launch = std::move(launch);
}

// ---- the end -----------------------------------------------------------------------------------------------------

std::shared_ptr<const Plan> PlanRecorder::finish(const torch::jit::Stack& stack) {
  for (const auto& input : inputs_) {
    const auto& t = input.tensor;
    if (t.sizes() != input.sizes || t.strides() != input.strides || storage_of(t) != input.storage ||
        first_element(t) != input.address) {
      refuse("changes the size or the memory of an argument");
    }
  }
  const auto& schema = op_.schema();
  std::vector<int> written;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    if (writes(schema.arguments()[i])) written.push_back(static_cast<int>(i));
  }
  size_t next_written = 0;
  const size_t first = stack.size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size() && !refused(); ++i) {
    PlanOutput output;
    if (writes(schema.returns()[i]) && next_written < written.size()) {
      output.argument = written[next_written++];
    } else if (!stack[first + i].isTensor()) {
      refuse("returns something that is not a tensor");
    } else if (const auto& t = stack[first + i].toTensor(); !t.defined()) {
      output.none = true;
    } else if (!device(t)) {
      refuse("waits for the device (returns a tensor of the host)");
    } else if (auto tensor = plan_tensor(t)) {
      auto& slot = plan_->slots[tensor->place.slot];
      if (slot.kind == PlanSlot::kInput) refuse("returns an argument, or a view of one, as a new tensor");
      slot.output = true;
      output.tensor = std::move(*tensor);
    }
    plan_->outputs.push_back(std::move(output));
  }
  if (refused()) return nullptr;
  for (size_t i = inputs_.size(); i < plan_->slots.size(); ++i) {
    const auto& slot = plan_->slots[i];
    if (slot.kind != PlanSlot::kAllocated) continue;
    if (first_use_[i] >= 0) {
      plan_->steps[first_use_[i]].allocate.push_back(static_cast<int>(i));
    } else if (slot.output) {
      plan_->allocate_last.push_back(static_cast<int>(i));
    }
  }
  return plan_;
}

}  // namespace flagos
