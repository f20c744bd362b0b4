// interop.cc: tensors that change their label for good (interop.h), unlike a Call's aliases, which live for one kernel.
//
// Both labels share one twin storage. Giving that storage other memory under one label would leave the other label with
// an address that is gone, so from here on neither can be resized, as torch does for tensors that NumPy has seen.
#include "csrc/aten/interop.h"

#include "csrc/aten/call.h"
#include "csrc/runtime/last_ops.h"

namespace flagos {

namespace {

const char* native_name() { return native.type == c10::DeviceType::CUDA ? "cuda" : "native"; }

void check_plain(const at::Tensor& t, const char* function) {
  TORCH_CHECK(native.present, function, ": torch has no kernels for the chip ", platform().chip(),
              ", so its memory has no other label; copy with .cpu()");
  TORCH_CHECK(t.defined(), function, ": expected a tensor, got an undefined one");
  const auto keys = t.key_set();
  const bool dense = t.layout() == at::kStrided && t.has_storage() && !t.is_quantized() && !t.is_nested();
  TORCH_CHECK(dense, function, ": expected a dense tensor, got ", t.toString(),
              "; convert its members (values, indices, buffers) one by one");
  TORCH_CHECK(!keys.has(c10::DispatchKey::Python) && !keys.has(c10::DispatchKey::Functionalize) &&
                  !keys.has(c10::DispatchKey::FuncTorchBatched),
              function, ": expected a tensor with memory, got a wrapper (", keys,
              "); convert what it wraps, outside torch.func and compile");
}

void check_memory(const at::Tensor& t, const char* function) {
  TORCH_CHECK(t.numel() == 0 || t.storage().nbytes() > 0, function, ": a tensor of ", t.nbytes(),
              " bytes uses a storage of 0 bytes (was it released with untyped_storage().resize_(0)?); resize the "
              "storage back first");
}

// A TensorImpl of its own with the metadata and the version counter of `impl`.
at::Tensor copy_of(const c10::TensorImpl* impl, const c10::VariableVersion& version) {
  return at::Tensor(impl->shallow_copy_and_detach(version, /*allow_tensor_metadata_change=*/true));
}

c10::VariableVersion version_of(const at::Tensor& t) {
  return t.is_inference() ? c10::VariableVersion() : t.unsafeGetTensorImpl()->version_counter();
}

}  // namespace

at::Tensor as_native(const at::Tensor& t) {
  const std::string function = std::string("as_") + native_name();
  check_plain(t, function.c_str());
  TORCH_CHECK(t.device().type() == kFlagos, function, ": expected a flagos tensor, got one on ", t.device());
  check_memory(t, function.c_str());
  Call call;
  auto result = copy_of(call[call.add(t, /*write=*/false)].unsafeGetTensorImpl(), version_of(t));
  t.storage().unsafeGetStorageImpl()->set_resizable(false);
  result.storage().unsafeGetStorageImpl()->set_resizable(false);
  return result;
}

at::Tensor from_native(const at::Tensor& t, int64_t index) {
  const std::string function = std::string("from_") + native_name();
  check_plain(t, function.c_str());
  TORCH_CHECK(t.device().type() == native.type, function, ": expected a ", native.type, " tensor, got one on ",
              t.device(), "; copy it with .to(\"flagos\")");
  if (index < 0 && t.device().has_index()) index = t.device().index();
  const auto device = flagos_device(checked_index(index));
  TORCH_CHECK(native.type == c10::DeviceType::CPU || t.device().index() == device.index(), function,
              ": the tensor is on ", t.device(), ", so it cannot become ", device, " without a copy");
  check_memory(t, function.c_str());
  auto* twin = t.storage().unsafeGetStorageImpl();
  twin->mutable_data();  // a lazy clone gets memory of its own now
  twin->set_resizable(false);
  auto result = copy_of(t.unsafeGetTensorImpl(), version_of(t));
  auto* impl = result.unsafeGetTensorImpl();
  impl->_change_backend_component_keys(device);
  impl->set_storage_keep_dtype(
      c10::Storage(flagos_storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(twin), device.index())));
  return result;
}

void name_operator(c10::AcceleratorError& error, const char* op) {
  error.add_context(c10::str("flagos: the error surfaced in ", op, "; kernels run asynchronously, so one that was ",
                             "launched earlier may have caused it; ", last_ops_text(),
                             ". CUDA_LAUNCH_BLOCKING=1 makes it surface at its cause."));
}

}  // namespace flagos
