// interop.cc: tensors that change their label for good (interop.h), unlike a Call's aliases, which live for one kernel.
//
// Both labels share one twin storage. Giving that storage other memory under one label would leave the other label with
// an address that is gone, so from here on neither can be resized, as torch does for tensors that NumPy has seen.
#include "csrc/aten/interop.h"

#include <cctype>
#include <string_view>

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

namespace {

bool in_a_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// "cuda:0", "'cuda'", "torch.cuda.FloatTensor", "CUDAFloatType" are the user's tensors; "torch.cuda.empty_cache()",
// "cudaMalloc" and "CUDA error" are not.
std::string in_users_words(const std::string& text) {
  const auto ends = [&](size_t begin, size_t end, std::string_view with) {
    return end >= begin + with.size() && std::string_view(text).substr(end - with.size(), with.size()) == with;
  };
  const auto end_of_word = [&](size_t at) {
    while (at < text.size() && in_a_word(text[at])) ++at;
    return at;
  };
  std::string result;
  for (size_t i = 0; i < text.size();) {
    const auto name = std::string_view(text).substr(i, 4);
    const char before = i ? text[i - 1] : ' ';
    bool ours = false;
    if ((name == "cuda" || name == "CUDA") && !in_a_word(before) && before != '/') {
      const auto end = end_of_word(i);
      const bool member = end + 1 < text.size() && text[end] == '.' && in_a_word(text[end + 1]);
      if (name == "CUDA") {
        ours = ends(i + 4, end, "Type");
      } else if (before == '.') {
        ours = member && ends(0, i, "torch.") && ends(end + 1, end_of_word(end + 1), "Tensor");
      } else {
        ours = end == i + 4 && !member;
      }
    }
    result += ours ? c10::get_privateuse1_backend() : std::string(1, text[i]);
    i += ours ? 4 : 1;
  }
  return result;
}

}  // namespace

void tell(c10::Error& error, const char* op) {
  if (auto* of_device = dynamic_cast<c10::AcceleratorError*>(&error)) {
    of_device->add_context(c10::str("flagos: the error surfaced in ", op, "; kernels run asynchronously, so one that ",
                                    "was launched earlier may have caused it; ", last_ops_text(),
                                    ". CUDA_LAUNCH_BLOCKING=1 makes it surface at its cause."));
    return;
  }
  if (native.type != c10::DeviceType::CUDA) return;  // the host chip's kernels say cpu, which may be the user's too
  auto text = in_users_words(error.msg());
  if (text == error.msg()) return;
  c10::Error said(std::move(text), error.backtrace(), error.caller());
  for (const auto& line : error.context()) said.add_context(line);
  error = said;  // only this part of it: what is thrown on is still an IndexError, a LinAlgError, ...
}

}  // namespace flagos
