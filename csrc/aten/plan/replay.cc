// replay.cc: runs a plan (plan.h): allocate, put the addresses in, launch, hand the outputs over.
#include <ATen/EmptyTensor.h>
#include <c10/core/DeviceGuard.h>

#include <atomic>

#include "csrc/aten/call.h"
#include "csrc/aten/plan/plan.h"
#include "csrc/aten/twin.h"

namespace flagos {

namespace {

std::atomic<const PlanBackend*> the_backend{nullptr};

const c10::DispatchKeySet kDense(c10::DispatchKey::PrivateUse1);

// The memory of one slot while a plan runs.
struct Held {
  char* base = nullptr;
  c10::StorageImpl* twin = nullptr;  // native; null for memory that no tensor needs
  c10::DataPtr memory;               // owns what only kernels see
  c10::Storage storage;              // flagos, of an output
  c10::Storage native;               // owns `twin` when nothing else does
};

class Replay {
 public:
  Replay(const Plan& plan, const CallTensors& tensors, const PlanKey& key)
      : plan_(plan), key_(key), device_(tensors.device) {
    held_.resize(plan.slots.size());
    for (size_t i = 0; i < tensors.tensor.size(); ++i) {
      held_[i].base = tensors.address[i];
      held_[i].twin = tensors.twin[i];
    }
    inputs_ = tensors.tensor.size();
    auto& chip = platform();
    if (C10_UNLIKELY(chip.current_device() != device_)) guard_.emplace(flagos_device(device_));
    stream_ = plan_backend()->enter(chip.current_stream(device_));
  }

  void allocate(int slot) {
    const auto& wanted = plan_.slots[slot];
    auto& held = held_[slot];
    if (wanted.output || wanted.tensor) {
      auto memory = allocate_flagos(wanted.nbytes);
      held.base = static_cast<char*>(memory.get());
      held.storage = c10::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                                                        wanted.nbytes, std::move(memory),
                                                                        flagos_allocator(), /*resizable=*/true));
      if (wanted.tensor) held.twin = twin_of(held.storage.unsafeGetStorageImpl());
    } else {
      held.memory = platform().allocate(wanted.nbytes);
      held.base = static_cast<char*>(held.memory.get());
    }
  }

  void release(size_t step) {
    for (size_t slot = inputs_; slot < held_.size(); ++slot) {
      if (plan_.slots[slot].last_use == static_cast<int>(step) && !plan_.slots[slot].output) held_[slot] = Held();
    }
  }

  void launch(const PlanLaunch& launch) {
    c10::SmallVector<uint64_t, 64> room;
    room.resize_for_overwrite(launch.block.size() + 8);
    // Tensor maps lie at multiples of 64 bytes.
    auto* block = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(room.data()) + 63) & ~uintptr_t{63});
    std::memcpy(block, launch.block.data(), launch.block.size() * sizeof(uint64_t));
    for (const auto& patch : launch.patches) {
      char* const value = held_[patch.place.slot].base + patch.place.offset;
      if (C10_UNLIKELY(patch.map)) {
        plan_backend()->replace_address(block + patch.offset, value);
      } else {
        std::memcpy(block + patch.offset, &value, sizeof value);
      }
    }
    for (const auto& number : launch.numbers) put_number(block + number.offset, number, key_);
    c10::SmallVector<void*, 32> parameters;
    for (const auto offset : launch.offsets) parameters.push_back(block + offset);
    plan_backend()->launch(launch.config, stream_, parameters.data());
  }

  void call(const PlanCall& call) {
    const BelowAutograd below;
    auto stack = call.arguments;
    for (const auto& use : call.uses) {
      if (use.member < 0) {
        stack[use.argument] = native(use.tensor);
      } else if (stack[use.argument].isTensorList()) {  // a list of the template is shared: it is replaced, not changed
        stack[use.argument] = replaced(stack[use.argument].toTensorList(), use);
      } else {
        stack[use.argument] = replaced(stack[use.argument].toOptionalTensorList(), use);
      }
    }
    call.op.callBoxed(&stack);
    const size_t first = stack.size() - call.op.schema().returns().size();
    for (const auto& [result, slot] : call.returned) {
      auto& held = held_[slot];
      held.native = stack[first + result].toTensor().storage();
      held.twin = held.native.unsafeGetStorageImpl();
      TORCH_INTERNAL_ASSERT(held.twin->nbytes() >= plan_.slots[slot].nbytes, "flagos: a plan's call of ",
                            call.op.operator_name(), " returned less memory than when it was recorded");
      held.base = static_cast<char*>(held.twin->_mutable_data_ptr_no_checks().get());
    }
  }

  at::Tensor output(const PlanTensor& tensor) {
    auto& held = held_[tensor.place.slot];
    if (!held.storage) {  // an operator's result: it becomes the twin of a storage that the caller gets
      held.storage =
          c10::Storage(flagos_storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(held.twin), device_));
    }
    auto result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(held.storage), kDense,
                                                           c10::scalarTypeToTypeMeta(tensor.dtype));
    result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes, tensor.strides,
                                                        tensor.place.offset / static_cast<int64_t>(result.itemsize()));
    return result;
  }

 private:
  at::Tensor native(const PlanTensor& tensor) {
    auto& held = held_[tensor.place.slot];
    const auto* base = static_cast<char*>(held.twin->_mutable_data_ptr_no_checks().get());
    // A tensor without elements has no address to measure from, and needs none.
    const int64_t offset =
        held.base ? (held.base - base + tensor.place.offset) / static_cast<int64_t>(c10::elementSize(tensor.dtype)) : 0;
    return native_tensor(held.twin, tensor.dtype, tensor.sizes, tensor.strides, offset);
  }

  template <class List>
  List replaced(const List& list, const PlanCall::Use& use) {
    auto copy = list.copy();
    copy.set(use.member, native(use.tensor));
    return copy;
  }

  const Plan& plan_;
  const PlanKey& key_;
  c10::DeviceIndex device_;
  c10::SmallVector<Held, 8> held_;
  size_t inputs_ = 0;
  std::optional<c10::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace

void set_plan_backend(const PlanBackend* backend) { the_backend.store(backend, std::memory_order_release); }
const PlanBackend* plan_backend() { return the_backend.load(std::memory_order_acquire); }

at::Tensor native_tensor(c10::StorageImpl* twin, at::ScalarType dtype, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                         int64_t offset) {
  auto result =
      at::detail::make_tensor<c10::TensorImpl>(c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(twin)),
                                               native.dense, c10::scalarTypeToTypeMeta(dtype));
  result.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return result;
}

void Plan::replay(const c10::OperatorHandle& op, const torch::jit::Stack& stack, const CallTensors& tensors,
                  const PlanKey& key, torch::jit::Stack& results, bool written_too) const {
  Replay replay(*this, tensors, key);
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto& step = steps[i];
    for (const int slot : step.allocate) replay.allocate(slot);
    if (C10_LIKELY(step.launch != nullptr)) {
      replay.launch(*step.launch);
    } else {
      replay.call(*step.call);
    }
    if (i + 1 < steps.size()) replay.release(i);
  }
  for (const int slot : allocate_last) replay.allocate(slot);
  const auto& schema = op.schema();
  const size_t first = stack.size() - schema.arguments().size();
  results.reserve(results.size() + outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto& output = outputs[i];
    if (output.argument >= 0) {
      const auto* alias = schema.returns()[i].alias_info();
      const bool left_out = !written_too && alias && alias->isWrite();
      results.push_back(left_out ? c10::IValue() : stack[first + output.argument]);
    } else if (output.none) {
      results.emplace_back(at::Tensor());
    } else {
      results.emplace_back(replay.output(output.tensor));
    }
  }
}

}  // namespace flagos
