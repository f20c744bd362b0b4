// call.cc: aliases, their pool, and the way back (call.h).
#include "csrc/aten/call.h"

#include "csrc/runtime/device_trace.h"
#include "csrc/runtime/free_list.h"
#include "csrc/runtime/generator.h"
#include "csrc/runtime/last_ops.h"

namespace flagos {

namespace {

const c10::DispatchKeySet kOtherLayouts({c10::DispatchKey::Sparse, c10::DispatchKey::SparseCsr,
                                         c10::DispatchKey::NestedTensor, c10::DispatchKey::Quantized});
const c10::DispatchKeySet kLazyBits({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative});

// A dense tensor over a twin. A class of its own so that device_opt_ and storage_ may be set, and so that the pool can
// tell an alias that a kernel replaced.
class AliasImpl final : public c10::TensorImpl, public FromFreeList<AliasImpl, sizeof(c10::TensorImpl)> {
 public:
  AliasImpl() : TensorImpl(native.dense, caffe2::TypeMeta::Make<float>(), native.device(0)) {
    version_counter_ = c10::VariableVersion(0);  // in inference mode there would be none
  }

  void bind(const c10::TensorImpl* source, c10::StorageImpl* twin, c10::DeviceIndex index, bool borrow) {
    copy_generic_tensor_metadata(source, this);  // not the storage and the version: they would be counted up and down
    key_set_ = native.relabel(source->key_set()) - c10::python_ks;
    using Pointer = c10::intrusive_ptr<c10::StorageImpl>;
    storage_ = c10::Storage(borrow ? Pointer::reclaim(twin) : Pointer::reclaim_copy(twin));
    device_opt_ = native.device(index);
  }
  bool reusable() const { return !extra_meta_ && autograd_meta() == nullptr && pyobj_slot_.load_pyobj() == nullptr; }
  // How often kernels said that they have changed this tensor; torch's in-place kernels for lists do so themselves.
  uint32_t take_version() {
    const auto version = version_counter_.current_version();
    if (C10_UNLIKELY(version != 0)) version_counter_.set_version(0);
    return version;
  }
  void unbind(bool borrowed) {
    if (borrowed) {
      storage_.unsafeReleaseStorageImpl();
    } else {
      storage_ = c10::Storage();
    }
  }
  // A native tensor's keys become flagos ones.
  static void relabel(c10::TensorImpl* impl) { impl->*(&AliasImpl::key_set_) = native.relabel_back(impl->key_set()); }
};

static_assert(sizeof(AliasImpl) == sizeof(c10::TensorImpl));

// A loop, because comparing the arrays would call memcmp for a few numbers.
bool same_geometry(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  const auto sizes = a.sizes(), other_sizes = b.sizes();
  const auto strides = a.strides(), other_strides = b.strides();
  bool same = sizes.size() == other_sizes.size() && a.storage_offset() == b.storage_offset();
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = sizes[i] == other_sizes[i] && strides[i] == other_strides[i];
  }
  return same;
}

bool shared(const at::Tensor& t) {
  return t.use_count() > 1 || t.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() != nullptr;
}

}  // namespace

// Aliases of this thread that no call uses.
struct AliasPool {
  static constexpr int kCapacity = 2048;  // an optimizer's operators take all of a model's parameters at once
  const std::unique_ptr<AliasImpl*[]> item{new AliasImpl*[kCapacity]};  // thread-locals of a library have little room
  int size = 0;
  bool closed = false;  // the thread is ending, and its later calls must not refill what nobody will empty
  SharedLastOps last_ops;

  c10::intrusive_ptr<AliasImpl> take() {
    if (C10_LIKELY(size > 0)) return c10::intrusive_ptr<AliasImpl>::reclaim(item[--size]);
    return c10::make_intrusive<AliasImpl>();
  }
  void give_back(at::Tensor& t, c10::StorageImpl* borrowed) {
    auto* impl = static_cast<AliasImpl*>(t.unsafeGetTensorImpl());
    if (C10_UNLIKELY(t.use_count() != 1 || !impl->reusable() || closed || size == kCapacity)) {
      if (borrowed) c10::raw::intrusive_ptr::incref(borrowed);  // it goes on living, and releases the memory at its end
      return;
    }
    impl->unbind(borrowed != nullptr);
    t.unsafeReleaseTensorImpl();
    item[size++] = impl;
  }
  ~AliasPool() {
    closed = true;
    while (size) c10::raw::intrusive_ptr::decref(item[--size]);
  }
};

namespace {
// A plain pointer needs no check for its initialisation on every use, and at a fixed offset no look-up.
__thread AliasPool* threads_pool __attribute__((tls_model("initial-exec"))) = nullptr;

AliasPool& this_threads_pool() {
  if (C10_LIKELY(threads_pool != nullptr)) return *threads_pool;
  thread_local AliasPool pool;
  threads_pool = &pool;
  return pool;
}
}  // namespace

Call::Call() : pool_(this_threads_pool()) {}

Call::~Call() {
  if (C10_UNLIKELY(!settled_)) {
    for (const auto& origin : origin_) {
      if (origin.write && origin.pooled) take_memory(origin);
    }
  }
  if (entered_) {
    native_call_device = outer_device_;
    if (C10_UNLIKELY(tracing_device()) && native.entry) end_host_kernel();
  }
  // Backwards: a tensor that was passed twice shares one alias, which its first position owns.
  for (size_t i = alias_.size(); i-- > 0;) {
    if (origin_[i].pooled) {
      pool_.give_back(alias_[i], origin_[i].borrowed ? origin_[i].twin : nullptr);
    } else {
      alias_[i].reset();
    }
  }
}

size_t Call::add(const at::Tensor& t, bool write, bool list, bool borrow) {
  const size_t position = alias_.size();
  auto* impl = t.unsafeGetTensorImpl();
  if (C10_UNLIKELY(!t.defined() || impl->device_type() != kFlagos)) {
    if (t.defined() && impl->device_type() == c10::DeviceType::CPU && impl->dim() > 0) cpu_tensor_ = true;
    alias_.push_back(t);
    origin_.emplace_back();
    return position;
  }
  if (!list) {
    for (size_t i = 0; i < position; ++i) {
      if (origin_[i].tensor && origin_[i].tensor->unsafeGetTensorImpl() == impl) {
        if (write && std::exchange(origin_[i].borrowed, false)) c10::raw::intrusive_ptr::incref(origin_[i].twin);
        origin_[i].write |= write;
        if (write) settled_ = false;
        alias_.push_back(alias_[i]);
        origin_.emplace_back();
        return position;
      }
    }
  }
  const auto index = impl->device().index();
  note(index);
  flagos_tensor_ = true;
  if (write) settled_ = false;
  if (C10_UNLIKELY(impl->key_set().has_any(kOtherLayouts))) {
    Origin origin;
    origin.tensor = &t;
    origin.write = write;
    auto alias = alias_layout(t, write, origin);  // may add members before it
    alias_.push_back(std::move(alias));
    origin_.push_back(origin);
    return alias_.size() - 1;
  }
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  TORCH_CHECK(storage != nullptr, "flagos: tensor of type ", t.toString(), " has no storage");
  auto* twin = twin_of(storage);
  const size_t nbytes = twin->nbytes();
  if (C10_UNLIKELY(nbytes == 0) && impl->numel() > 0) released_ = &t;
  origin_.push_back(
      {&t, storage, twin, twin->_mutable_data_ptr_no_checks().get(), nbytes, write, /*pooled=*/true, borrow});
  alias_.emplace_back(pool_.take());
  auto* alias = static_cast<AliasImpl*>(alias_.back().unsafeGetTensorImpl());
  alias->bind(impl, twin, index, borrow);
  if (write) alias->take_version();  // an earlier kernel may have counted what it only read
  return position;
}

size_t Call::add(at::TensorList list, bool write, bool borrow) {
  const size_t begin = alias_.size();
  alias_.reserve(begin + list.size());
  origin_.reserve(begin + list.size());
  for (const auto& t : list) add(t, write, /*list=*/true, borrow);
  return begin;
}

c10::Storage Call::add(const c10::Storage& storage) {
  if (!storage || storage.device_type() != kFlagos) {
    foreign_storage_ |= static_cast<bool>(storage);
    return storage;
  }
  note(storage.device().index());
  auto* twin = twin_of(storage.unsafeGetStorageImpl());
  storages_.emplace_back(twin, storage);
  return c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(twin));
}

c10::Device Call::map(c10::Device device) {
  if (device.type() == kFlagos) {
    const auto index = device.index() > 0   ? checked_index(device.index())
                       : device.has_index() ? 0
                                            : platform().current_device();
    note(index);
    return native.device(index);
  }
  results_native_ |= device.type() == native.type;
  return device;
}

c10::Stream Call::map(c10::Stream stream) {
  if (stream.device_type() != kFlagos) return stream;
  return c10::Stream(c10::Stream::UNSAFE, native.device(stream.device_index()), stream.id());
}

std::optional<at::Generator> Call::map(const std::optional<at::Generator>& generator) {
  if (generator && generator->defined()) {
    TORCH_CHECK(flagos_tensor_ && !results_native_, "Expected a 'cpu' device type for generator but found '",
                generator->device().type(), "'");
    return native_of(*generator);
  }
  // Native CPU kernels would draw from the process-wide generator; a flagos device has its own.
  if (native.entry && !results_native_) return platform().native_generator(index_, /*fresh=*/false);
  return generator;
}

void Call::refuse(const char* op, bool mixed_allowed) const {
  const std::string_view name(op);
  if (released_ && name != "aten::resize_" && name != "aten::set_") {
    TORCH_CHECK(false, "flagos: ", name, ": a tensor of ", released_->nbytes(),
                " bytes uses a storage of 0 bytes (was it released with untyped_storage().resize_(0)?); resize the "
                "storage back first");
  }
  TORCH_CHECK(!foreign_storage_ || !flagos_tensor_, "Attempted to set the storage of a tensor on device ",
              flagos_device(index_), " to a storage on a different device; copy the data instead.");
  // Native CPU kernels cannot tell the labels apart, so the check that CUDA kernels make is made here.
  if (!native.entry || mixed_allowed || results_native_) return;
  TORCH_CHECK(other_index_ < 0, "Expected all tensors to be on the same device, but found at least two devices, ",
              flagos_device(index_), " and ", flagos_device(other_index_), "! (when checking arguments of ", name,
              "). Move them with .to(\"", flagos_device(index_), "\").");
  TORCH_CHECK(!cpu_tensor_ || !flagos_tensor_,
              "Expected all tensors to be on the same device, but found at least two devices, ", flagos_device(index_),
              " and cpu! (when checking arguments of ", name, "). Move them with .to(\"", flagos_device(index_),
              "\").");
}

void Call::enter(const char* op, bool mixed_allowed) {
  if (C10_UNLIKELY(released_ != nullptr || other_index_ >= 0 || foreign_storage_ || (cpu_tensor_ && flagos_tensor_))) {
    refuse(op, mixed_allowed);
  }
  if (C10_UNLIKELY(!native.started.load(std::memory_order_relaxed))) {
    platform().start();
    native.started.store(true, std::memory_order_relaxed);
  }
  if (index_ < 0) index_ = platform().current_device();
  if (native.entry && results_native_) return;
  outer_device_ = native_call_device;
  entered_ = true;
  native_call_device = index_;
  if (native.entry) {
    platform().enter_native(index_);
    if (C10_UNLIKELY(tracing_device())) begin_host_kernel(op, index_);
  }
}

void Call::take_memory(const Origin& origin) {
  const auto& memory = origin.twin->_mutable_data_ptr_no_checks();
  if (C10_UNLIKELY(memory.get() != origin.data || origin.twin->nbytes() != origin.nbytes)) {
    refresh_from_twin(origin.storage, origin.twin);
  }
}

void Call::write_back() {
  settled_ = true;
  for (size_t i = 0; i < origin_.size(); ++i) {
    const auto& origin = origin_[i];
    if (!origin.write || !origin.tensor) continue;
    auto* to = origin.tensor->unsafeGetTensorImpl();
    auto* from = alias_[i].unsafeGetTensorImpl();
    if (C10_UNLIKELY(!origin.pooled) && write_back_layout(*origin.tensor, alias_[i])) continue;
    if (C10_LIKELY(origin.pooled)) {
      for (auto n = static_cast<AliasImpl*>(from)->take_version(); C10_UNLIKELY(n != 0); --n) to->bump_version();
    }
    take_memory(origin);
    auto* twin = from->unsafe_storage().unsafeGetStorageImpl();
    if (C10_UNLIKELY(twin != origin.twin)) to->set_storage_keep_dtype(storage_of(twin));
    if (C10_UNLIKELY(from->dtype() != to->dtype())) to->set_storage_and_dtype(to->storage(), from->dtype());
    if (C10_UNLIKELY((from->key_set() & kLazyBits) != (to->key_set() & kLazyBits))) {
      origin.tensor->_set_conj(alias_[i].is_conj());
      origin.tensor->_set_neg(alias_[i].is_neg());
    }
    if (C10_UNLIKELY(!same_geometry(*from, *to))) {
      to->set_sizes_and_strides(from->sizes(), from->strides(), from->storage_offset());
    }
  }
}

c10::Storage Call::storage_of(c10::StorageImpl* twin) {
  for (const auto& origin : origin_) {
    if (origin.twin == twin && origin.storage) {
      return c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(origin.storage));
    }
  }
  for (const auto& known : storages_) {
    if (known.first == twin) return known.second;
  }
  const auto index = native.type == c10::DeviceType::CPU ? index_ : twin->device().index();
  c10::Storage storage(flagos_storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(twin), index));
  storages_.emplace_back(twin, storage);
  return storage;
}

at::Tensor Call::result(at::Tensor&& t) {
  if (!t.defined() || results_native_) return std::move(t);
  auto* impl = t.unsafeGetTensorImpl();
  if (C10_UNLIKELY(impl->device_type() != native.type)) return std::move(t);
  if (C10_UNLIKELY(impl->key_set().has_any(kOtherLayouts) || !impl->has_storage() || shared(t) ||
                   impl->unsafe_storage().use_count() > 1)) {
    return shared_result(std::move(t));
  }
  // Nobody else has seen this tensor: its storage becomes the twin of a new flagos storage, its label changes in place.
  const auto index = native.type == c10::DeviceType::CPU ? index_ : impl->device().index();
  // Taken out rather than copied: the reference count is an atomic.
  auto twin = c10::intrusive_ptr<c10::StorageImpl>::reclaim(
      const_cast<c10::Storage&>(impl->unsafe_storage()).unsafeReleaseStorageImpl());
  AliasImpl::relabel(impl);
  impl->set_storage_keep_dtype(c10::Storage(flagos_storage(std::move(twin), index)));
  return std::move(t);
}

at::Tensor Call::shared_result(at::Tensor&& t) {
  auto* impl = t.unsafeGetTensorImpl();
  for (size_t i = 0; i < alias_.size(); ++i) {
    if (alias_[i].unsafeGetTensorImpl() != impl) continue;
    return origin_[i].tensor ? *origin_[i].tensor : std::move(t);  // a native argument stays what it is
  }
  if (impl->key_set().has_any(kOtherLayouts) || !impl->has_storage()) return result_layout(t);
  if (shared(t)) {
    t = at::Tensor(impl->shallow_copy_and_detach(c10::VariableVersion(0), /*allow_tensor_metadata_change=*/true));
    impl = t.unsafeGetTensorImpl();
  }
  auto storage = storage_of(impl->unsafe_storage().unsafeGetStorageImpl());
  AliasImpl::relabel(impl);
  impl->set_storage_keep_dtype(std::move(storage));
  return std::move(t);
}

}  // namespace flagos
