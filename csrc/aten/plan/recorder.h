// recorder.h: watches one call of a Python kernel and makes the plan of it. torch_fl/plans.py tells it what it sees:
// the operators that run inside the call and the kernels that are launched.
//
// A recorder keeps every tensor that it hears of, so that no address is used twice while it listens. What a plan cannot
// do again is refused, with the reason; a refused call is never recorded again.
#pragma once

#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <variant>

#include "csrc/aten/plan/plan.h"

namespace flagos {

// One parameter of a launch, in the order of the compiled function's: bytes, or an address, or a tensor map.
struct Parameter {
  std::string bytes;
  bool address = false;         // `bytes` is one
  std::optional<uint64_t> map;  // the address within the tensor map `bytes`
};

class PlanRecorder {
 public:
  // The call's arguments lie on the stack under the native label.
  PlanRecorder(const c10::OperatorHandle& op, const torch::jit::Stack& stack, c10::DeviceIndex device);

  // The first reason counts. again: not the call's fault, so its next sighting may be recorded.
  void refuse(const std::string& reason, bool again = false);
  bool refused() const { return !why_.empty(); }
  const std::string& why() const { return why_; }
  bool again() const { return again_; }

  // An operator has run inside the call.
  void operation(const c10::OperatorHandle& op, torch::jit::Stack arguments, const torch::jit::Stack& results);
  // A kernel has been launched.
  void launch(const LaunchConfig& config, const std::vector<Parameter>& parameters);
  // Storages that the call has allocated so far: (address, bytes).
  std::vector<std::pair<uint64_t, size_t>> allocations() const;

  // The call has returned; its results lie on the stack. Null when it cannot be replayed.
  std::shared_ptr<const Plan> finish(const torch::jit::Stack& stack);

 private:
  struct Input {
    at::Tensor tensor;
    bool written;
    // As the call began, to see whether it has changed them.
    std::vector<int64_t> sizes, strides;
    const c10::StorageImpl* storage;
    uint64_t address;  // of the first element, also when there is none
    size_t bytes;      // from there to the end of the last one
  };

  bool device(const at::Tensor& t) const;
  std::optional<Place> place_of(const at::Tensor& t);
  std::optional<Place> place_of(uint64_t address);
  std::optional<PlanTensor> plan_tensor(const at::Tensor& t);
  int new_slot(PlanSlot::Kind kind, const at::Tensor& t);
  bool known(const at::Tensor& t) const;
  void host_operation(const std::string& name, const torch::jit::Stack& arguments, const torch::jit::Stack& results);
  void check_writes(const c10::OperatorHandle& op, const torch::jit::Stack& arguments);
  void add_call(const c10::OperatorHandle& op, torch::jit::Stack arguments, const torch::jit::Stack& results);
  bool use(PlanCall& call, size_t argument, int member, at::Tensor& t);
  void touch(int slot);

  const c10::OperatorHandle op_;
  const c10::DeviceIndex device_;
  std::string why_;
  bool again_ = false;
  std::shared_ptr<Plan> plan_ = std::make_shared<Plan>();
  std::vector<Input> inputs_;
  std::vector<at::Tensor> kept_;
  std::unordered_map<const c10::StorageImpl*, int> slot_of_;  // what the call allocated
  std::vector<uint64_t> base_;                                // per slot
  std::unordered_set<const c10::StorageImpl*> host_;          // tensors of the host whose contents the key determines
  std::vector<int> first_use_;                                // per slot
};

}  // namespace flagos
