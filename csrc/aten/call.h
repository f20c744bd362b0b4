// call.h: the arguments and results of one native call, relabelled.
//
// A Call turns flagos tensors into aliases (their twin's storage, native keys) for the time of one kernel call and
// turns the results back. Inputs are never modified. Aliases come from a per-thread pool. Used by the typed wrapper
// (relabel.h), the boxed one (boxed.cc) and the few operators that are written by hand.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>

#include <forward_list>

#include "csrc/aten/native.h"
#include "csrc/aten/twin.h"

namespace flagos {

struct AliasPool;

class Call {
 public:
  Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call();

  // ---- before the kernel -----------------------------------------------------------------------------------------
  // Adds one tensor argument; `write` when the kernel may change its data or metadata. Returns its position. `t` must
  // outlive the call. list: members are not looked up among each other (lists are long, and the same tensor twice is
  // legal). borrow: the alias takes no reference to the memory, which `t` holds meanwhile; for kernels of torch and
  // FlagGems, which give no other storage to an argument that their schema does not mark as written.
  size_t add(const at::Tensor& t, bool write, bool list = false, bool borrow = false);
  size_t add(at::TensorList list, bool write, bool borrow);  // strided tensors; the position of the first
  c10::Storage add(const c10::Storage& storage);
  c10::Device map(c10::Device device);
  c10::Stream map(c10::Stream stream);
  std::optional<at::Generator> map(const std::optional<at::Generator>& generator);

  // All arguments are in: checks that they share a device (mixes are allowed for a few operators), prepares the chip.
  void enter(const char* op, bool mixed_allowed = false);

  at::Tensor& operator[](size_t position) { return alias_[position]; }
  at::TensorList list(size_t begin, size_t n) const { return at::TensorList(alias_.data() + begin, n); }
  c10::DeviceIndex index() const { return index_; }

  // ---- after the kernel ------------------------------------------------------------------------------------------
  // Carries sizes, strides, dtype, lazy bits, quantizer, storage and version of written aliases back to the originals.
  // After an exception the destructor carries back the memory alone: a kernel that fails may have resized its result,
  // which keeps its shape and stays usable.
  void write_back();
  // A result under the flagos label: the original object when the kernel returned an argument, a tensor on the
  // argument's storage when it is a view of one, otherwise the same TensorImpl over a new flagos storage.
  at::Tensor result(at::Tensor&& t);

 private:
  struct Origin {
    const at::Tensor* tensor = nullptr;  // nullptr: passed through unchanged
    c10::StorageImpl* storage = nullptr;
    c10::StorageImpl* twin = nullptr;
    const void* data = nullptr;  // the twin's memory before the call
    size_t nbytes = 0;
    bool write = false;
    bool pooled = false;
    bool borrowed = false;
  };

  void refuse(const char* op, bool mixed_allowed) const;
  void note(c10::DeviceIndex index) {
    if (index_ < 0) index_ = index;
    if (index != index_) other_index_ = index;
  }
  static void take_memory(const Origin& origin);  // for the original, when the twin has got another
  at::Tensor shared_result(at::Tensor&& t);
  c10::Storage storage_of(c10::StorageImpl* twin);
  // layouts.cc: sparse, CSR, nested and quantized tensors are rebuilt from relabelled members, both ways.
  at::Tensor alias_layout(const at::Tensor& t, bool write, Origin& origin);
  at::Tensor result_layout(const at::Tensor& t);
  bool write_back_layout(at::Tensor original, at::Tensor alias);
  at::Tensor member_alias(const at::Tensor& t);
  at::Tensor member_result(const at::Tensor& t);

  AliasPool& pool_;  // the thread's; looked up once, thread-locals of a shared library are not free
  c10::SmallVector<at::Tensor, 8> alias_;
  c10::SmallVector<Origin, 8> origin_;
  c10::SmallVector<std::pair<c10::StorageImpl*, c10::Storage>, 2> storages_;  // twin -> flagos storage, besides origin_
  std::forward_list<at::Tensor> members_;  // of sparse arguments: keeps what Origin::tensor points at
  c10::DeviceIndex index_ = -1;
  c10::DeviceIndex outer_device_ = -1;
  c10::DeviceIndex other_index_ = -1;     // a second flagos device among the arguments
  const at::Tensor* released_ = nullptr;  // an argument whose storage was resized to nothing
  bool flagos_tensor_ = false;
  bool foreign_storage_ = false;  // a storage argument of another device
  bool cpu_tensor_ = false;       // a CPU tensor with dimensions among the arguments
  bool results_native_ = false;   // the caller asked for results on the CPU
  bool entered_ = false;
  bool settled_ = true;  // nothing is written, or it has been carried back
};

// Excludes autograd and autocast below a kernel, at no cost when they are excluded already, as under VariableType.
// count_versions: what the kernel calls on its arguments still counts their versions, as it does below torch's own
// in-place operators on lists and below other libraries' operators.
class BelowAutograd {
 public:
  explicit BelowAutograd(bool count_versions = false) {
    auto keys = native.above;
    if (count_versions) keys = keys - c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
    if (C10_UNLIKELY(!c10::impl::tls_local_dispatch_key_set().excluded_.has_all(keys))) guard_.emplace(keys);
  }

 private:
  std::optional<c10::impl::ExcludeDispatchKeyGuard> guard_;
};

inline bool is_flagos(const at::Tensor& t) { return t.defined() && t.unsafeGetTensorImpl()->device_type() == kFlagos; }

}  // namespace flagos
