// key.h: what a launch plan is looked up by: everything about a call that a kernel's Python code can depend on, short
// of the contents of device memory.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/SmallVector.h>

#include <string>

namespace flagos {

// The flagos tensors of a call in the order of its arguments, members of lists among them. Borrowed from the stack.
struct CallTensors {
  c10::SmallVector<c10::TensorImpl*, 8> tensor;
  c10::SmallVector<c10::StorageImpl*, 8> twin;
  c10::SmallVector<char*, 8> address;  // of the first element; null for a tensor without elements
  c10::DeviceIndex device = -1;
};

struct PlanKey {
  c10::SmallVector<uint64_t, 48> words;
  uint64_t hash = 0;
  bool operator==(const PlanKey& other) const { return hash == other.hash && words == other.words; }
};

// Describes the call that lies on the stack. Null when it can have a plan, else why it cannot.
const char* describe_call(const c10::OperatorHandle& op, const torch::jit::Stack& stack, CallTensors& tensors,
                          PlanKey& key);

// The call in words, for messages: "float32[4, 8] stride (8, 1), 2".
std::string call_text(const c10::OperatorHandle& op, const torch::jit::Stack& stack);

// The bytes from a tensor's first element to the end of its last; 0 when it has none.
size_t extent(const c10::TensorImpl& tensor);

}  // namespace flagos
