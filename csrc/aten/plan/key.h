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

// A number among the arguments. Calls that differ in such numbers alone may share a plan (table.h).
struct PlanScalar {
  uint32_t word;  // its value: the bits of a double, or an integer
  bool integer;
};

struct PlanKey {
  c10::SmallVector<uint64_t, 48> words;
  c10::SmallVector<PlanScalar, 2> scalars;
  uint64_t hash = 0;
  bool operator==(const PlanKey& other) const { return hash == other.hash && words == other.words; }
  // The key with each number's class in place of its value. Within a class a compiler makes one kernel of all values,
  // and Python code that compares with the usual numbers takes one way.
  PlanKey family() const;
};

// Describes the call that lies on the stack. Null when it can have a plan, else why it cannot.
const char* describe_call(const c10::OperatorHandle& op, const torch::jit::Stack& stack, CallTensors& tensors,
                          PlanKey& key);

// The call in words, for messages: "float32[4, 8] stride (8, 1), 2".
std::string call_text(const c10::OperatorHandle& op, const torch::jit::Stack& stack);

// The bytes from a tensor's first element to the end of its last; 0 when it has none.
size_t extent(const c10::TensorImpl& tensor);

}  // namespace flagos
