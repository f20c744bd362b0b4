// layouts.cc: relabelling of tensors that are more than one strided storage: sparse COO, compressed sparse, nested and
// quantized. They are rebuilt from relabelled members, since their TensorImpl classes hold tensors of their own.
#include <ATen/NestedTensorImpl.h>
#include <ATen/SparseCsrTensorImpl.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/quantized/QTensorImpl.h>

#include "csrc/aten/call.h"

namespace flagos {

using at::SparseCsrTensorImpl;
using at::SparseTensorImpl;
using at::native::NestedTensorImpl;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::StorageImpl;

namespace {

// SparseTensorImpl takes its device from its keys alone and so has no index; this sets it.
struct DeviceSetter : c10::TensorImpl {
  static void set(c10::TensorImpl* impl, c10::Device device) { impl->*(&DeviceSetter::device_opt_) = device; }
};

c10::Storage share(StorageImpl* storage) {
  return c10::Storage(c10::intrusive_ptr<StorageImpl>::reclaim_copy(storage));
}

at::Tensor detached(const at::Tensor& t) {
  return at::Tensor(t.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true));
}

void set_coo_members(const at::Tensor& to, const at::Tensor& from, at::Tensor indices, at::Tensor values) {
  auto* source = static_cast<SparseTensorImpl*>(from.unsafeGetTensorImpl());
  auto* target = static_cast<SparseTensorImpl*>(to.unsafeGetTensorImpl());
  target->raw_resize_(source->sparse_dim(), source->dense_dim(), source->sizes());
  target->set_indices_and_values_unsafe(indices, values);
  target->set_coalesced(source->coalesced());
}

}  // namespace

at::Tensor Call::member_alias(const at::Tensor& t) {
  members_.push_front(t);
  return alias_[add(members_.front(), /*write=*/false)];
}

at::Tensor Call::member_result(const at::Tensor& t) {
  for (size_t i = 0; i < alias_.size(); ++i) {
    if (alias_[i].is_same(t) && origin_[i].tensor) return *origin_[i].tensor;
  }
  return result(detached(t));
}

at::Tensor Call::alias_layout(const at::Tensor& t, bool write, Origin& origin) {
  auto* impl = t.unsafeGetTensorImpl();
  const auto keys = impl->key_set();
  if (t.is_sparse()) {
    auto* coo = static_cast<SparseTensorImpl*>(impl);
    auto alias =
        at::detail::make_tensor<SparseTensorImpl>(DispatchKeySet(native.key(DispatchKey::Sparse)), impl->dtype());
    DeviceSetter::set(alias.unsafeGetTensorImpl(), native.device(impl->device().index()));
    auto indices = member_alias(coo->indices());
    auto values = member_alias(coo->values());
    set_coo_members(alias, t, std::move(indices), std::move(values));
    return alias;
  }
  if (keys.has(DispatchKey::SparseCsr)) {
    auto* csr = static_cast<SparseCsrTensorImpl*>(impl);
    auto alias = at::detail::make_tensor<SparseCsrTensorImpl>(DispatchKeySet(native.key(DispatchKey::SparseCsr)),
                                                              native.device(impl->device().index()), csr->layout(),
                                                              impl->dtype());
    auto compressed = member_alias(csr->compressed_indices());
    auto plain = member_alias(csr->plain_indices());
    auto values = member_alias(csr->values());
    static_cast<SparseCsrTensorImpl*>(alias.unsafeGetTensorImpl())
        ->set_member_tensors(compressed, plain, values, csr->sizes());
    return alias;
  }
  origin.storage = impl->unsafe_storage().unsafeGetStorageImpl();
  origin.twin = twin_of(origin.storage);
  origin.data = origin.twin->_mutable_data_ptr_no_checks().get();
  origin.nbytes = origin.twin->nbytes();
  if (keys.has(DispatchKey::Quantized)) {
    auto* quantized = static_cast<at::QTensorImpl*>(impl);
    auto alias = at::detail::make_tensor<at::QTensorImpl>(
        share(origin.twin), DispatchKeySet(native.key(DispatchKey::Quantized)), impl->dtype(), quantized->quantizer());
    alias.unsafeGetTensorImpl()->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
    return alias;
  }
  auto* nested = static_cast<NestedTensorImpl*>(impl);
  return at::detail::make_tensor<NestedTensorImpl>(
      share(origin.twin), DispatchKeySet(native.key(DispatchKey::NestedTensor)), impl->dtype(),
      nested->get_nested_sizes(), nested->get_nested_strides(), nested->get_storage_offsets());
}

at::Tensor Call::result_layout(const at::Tensor& t) {
  auto* impl = t.unsafeGetTensorImpl();
  const auto keys = impl->key_set();
  const auto device = flagos_device(native.type == c10::DeviceType::CPU ? index_ : impl->device().index());
  if (t.is_sparse()) {
    auto* coo = static_cast<SparseTensorImpl*>(impl);
    auto out = at::detail::make_tensor<SparseTensorImpl>(DispatchKeySet(DispatchKey::SparsePrivateUse1), impl->dtype());
    DeviceSetter::set(out.unsafeGetTensorImpl(), device);
    set_coo_members(out, t, member_result(coo->indices()), member_result(coo->values()));
    return out;
  }
  if (keys.has(DispatchKey::SparseCsr)) {
    auto* csr = static_cast<SparseCsrTensorImpl*>(impl);
    auto out = at::detail::make_tensor<SparseCsrTensorImpl>(DispatchKeySet(DispatchKey::SparseCsrPrivateUse1), device,
                                                            csr->layout(), impl->dtype());
    static_cast<SparseCsrTensorImpl*>(out.unsafeGetTensorImpl())
        ->set_member_tensors(member_result(csr->compressed_indices()), member_result(csr->plain_indices()),
                             member_result(csr->values()), csr->sizes());
    return out;
  }
  if (keys.has(DispatchKey::NestedTensor)) {
    auto* nested = static_cast<NestedTensorImpl*>(impl);
    // Some derivatives (linear, matmul) exist for nested tensors only, under a key of theirs.
    const DispatchKeySet key_set({DispatchKey::NestedTensorPrivateUse1, DispatchKey::AutogradNestedTensor});
    return at::detail::make_tensor<NestedTensorImpl>(storage_of(impl->unsafe_storage().unsafeGetStorageImpl()), key_set,
                                                     impl->dtype(), nested->get_nested_sizes(),
                                                     nested->get_nested_strides(), nested->get_storage_offsets());
  }
  if (keys.has(DispatchKey::Quantized) && impl->has_storage()) {
    auto* quantized = static_cast<at::QTensorImpl*>(impl);
    auto out = at::detail::make_tensor<at::QTensorImpl>(storage_of(impl->unsafe_storage().unsafeGetStorageImpl()),
                                                        DispatchKeySet(DispatchKey::QuantizedPrivateUse1),
                                                        impl->dtype(), quantized->quantizer());
    out.unsafeGetTensorImpl()->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
    return out;
  }
  return t;  // opaque layouts (mkldnn) have no flagos form and stay native
}

// True when nothing is left for the strided path to do.
bool Call::write_back_layout(at::Tensor original, at::Tensor alias) {
  if (original.is_sparse()) {
    auto* coo = static_cast<SparseTensorImpl*>(alias.unsafeGetTensorImpl());
    set_coo_members(original, alias, member_result(coo->indices()), member_result(coo->values()));
    return true;
  }
  const auto keys = alias.unsafeGetTensorImpl()->key_set();
  if (keys.has(DispatchKey::SparseCsr)) {
    auto* csr = static_cast<SparseCsrTensorImpl*>(alias.unsafeGetTensorImpl());
    static_cast<SparseCsrTensorImpl*>(original.unsafeGetTensorImpl())
        ->set_member_tensors(member_result(csr->compressed_indices()), member_result(csr->plain_indices()),
                             member_result(csr->values()), csr->sizes());
    return true;
  }
  if (keys.has(DispatchKey::Quantized)) {
    static_cast<at::QTensorImpl*>(original.unsafeGetTensorImpl())
        ->set_quantizer_(static_cast<at::QTensorImpl*>(alias.unsafeGetTensorImpl())->quantizer());
    return false;
  }
  return keys.has(DispatchKey::NestedTensor);
}

}  // namespace flagos
