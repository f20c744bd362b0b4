// plan.h: a launch plan: what a Python kernel did in one call, in a form that C++ does again with other tensors.
//
// A plan knows memory as slots: the call's tensors, what the kernel allocated, and what operators inside of it
// returned. An address is a slot and a distance from its beginning. Steps are launches of compiled kernels, and calls
// of torch's own operators on native tensors. A plan holds no Python object.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "csrc/aten/plan/backend.h"
#include "csrc/aten/plan/key.h"

namespace flagos {

struct Place {
  int slot = -1;  // -1: the null address
  int64_t offset = 0;
};

// A tensor within a slot.
struct PlanTensor {
  Place place;
  at::ScalarType dtype;
  std::vector<int64_t> sizes, strides;
};

struct PlanSlot {
  enum Kind { kInput, kAllocated, kReturned } kind;
  size_t nbytes = 0;
  bool tensor = false;  // some tensor needs it as a storage, not only as memory
  int last_use = -1;    // the last step that needs it; an output's memory goes to the caller
  bool output = false;
};

struct PlanLaunch {
  LaunchConfig config;
  std::vector<uint64_t> block;    // the parameters' bytes
  std::vector<uint32_t> offsets;  // where in the block each of them lies
  struct Patch {
    uint32_t offset;
    Place place;
    bool map;  // a tensor map, whose address is replaced
  };
  std::vector<Patch> patches;
  // A parameter that follows a number among the call's arguments (merge.cc).
  struct Number {
    uint32_t offset;
    uint32_t scalar;  // which of PlanKey::scalars
    enum Encoding { kInt32, kInt64, kFloat, kDouble } encoding;
  };
  std::vector<Number> numbers;
};

struct PlanCall {
  c10::OperatorHandle op;
  torch::jit::Stack arguments;  // tensors of the device are taken from `uses`
  struct Use {
    size_t argument;
    int member;  // of a list; -1: the argument itself
    PlanTensor tensor;
  };
  std::vector<Use> uses;
  std::vector<std::pair<size_t, int>> returned;  // (result, slot): results in memory of their own
};

struct PlanStep {
  std::shared_ptr<PlanLaunch> launch;  // one of the two
  std::shared_ptr<PlanCall> call;
  std::vector<int> allocate;  // slots that begin here
};

struct PlanOutput {
  int argument = -1;  // the argument itself (in-place, out=); -1: a tensor
  bool none = false;  // or nothing
  PlanTensor tensor;
};

struct Plan {
  std::vector<PlanSlot> slots;  // the inputs first, in the order of CallTensors
  std::vector<PlanStep> steps;
  std::vector<int> allocate_last;  // outputs that no step uses
  std::vector<PlanOutput> outputs;

  // Runs the call whose arguments lie on the stack, and adds its results to `results`: for those that are written
  // arguments None, unless they are wanted. Needs no GIL.
  void replay(const c10::OperatorHandle& op, const torch::jit::Stack& stack, const CallTensors& tensors,
              const PlanKey& key, torch::jit::Stack& results, bool written_too) const;
};

// One plan for calls that differ in the values of some numbers alone, from the plans of two such calls. Null when they
// differ in anything but parameters that follow those numbers; then `why` says in what. `free` gets, for each of the
// key's scalars, whether its value is put in at each replay; the others must have the value that they have in `a`.
std::shared_ptr<const Plan> merge_plans(const Plan& a, const PlanKey& key_a, const Plan& b, const PlanKey& key_b,
                                        std::vector<bool>& free, std::string& why);
// Writes the number as the parameter that follows it is encoded.
void put_number(char* place, const PlanLaunch::Number& number, const PlanKey& key);

// A native tensor over a twin storage.
at::Tensor native_tensor(c10::StorageImpl* twin, at::ScalarType dtype, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                         int64_t offset);

}  // namespace flagos
