// interop.h: the same memory under the other label, for code that knows torch's own device and not flagos.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace flagos {

// A tensor under the native label (CUDA; CPU on the host chip) over the memory of a flagos tensor. It owns the memory
// as any tensor does, shares the version counter, and is detached from autograd. Only dense tensors.
at::Tensor as_native(const at::Tensor& t);

// The other way: a flagos tensor of device `index` over the memory of a native one. -1 means the tensor's own index.
at::Tensor from_native(const at::Tensor& t, int64_t index);

// Puts an error of a native kernel into the user's words: its tensors are on flagos. To an error of the device it adds
// which operator it surfaced in and how to find the kernel that caused it. The type and the backtrace stay.
void tell(c10::Error& error, const char* op);

}  // namespace flagos
