// twin.cc: creation, adoption and refresh of twin storages (twin.h).
#include "csrc/aten/twin.h"

#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <pthread.h>

#include <algorithm>
#include <mutex>

#include "csrc/aten/native.h"
#include "csrc/runtime/free_list.h"

namespace flagos {

Native native;

void set_native(const Platform& platform) {
  const auto type = platform.native_type();
  if (!type) return;
  native.type = *type;
  native.any_device = c10::Device(*type);
  native.backend =
      c10::toBackendComponent(*type == c10::DeviceType::CUDA ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  native.dense = c10::DispatchKeySet(native.key(c10::DispatchKey::Dense));
  native.entry = platform.native_needs_entry();
  const auto flagos_backend = c10::BackendComponent::PrivateUse1Bit;
  native.flagos_bits =
      (c10::DispatchKeySet(flagos_backend) | c10::getAutocastRelatedKeySetFromBackend(flagos_backend)).raw_repr();
  native.native_bits =
      (c10::DispatchKeySet(native.backend) | c10::getAutocastRelatedKeySetFromBackend(native.backend)).raw_repr();
  native.present = true;
  // In a child the next operator asks the platform to start, which refuses where the parent has used the device.
  const int registered = pthread_atfork(nullptr, nullptr, [] { native.started.store(false); });
  TORCH_CHECK(registered == 0, "flagos: pthread_atfork failed with error ", registered);
}

namespace {

// A StorageImpl whose memory does not come from malloc, which is slow for what one thread takes and another frees.
struct PooledStorage final : c10::StorageImpl, FromFreeList<PooledStorage, sizeof(c10::StorageImpl)> {
  using StorageImpl::StorageImpl;
};
static_assert(sizeof(PooledStorage) == sizeof(c10::StorageImpl));

void drop_twin(void* context) { c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(context)); }

std::mutex adopt_mutex;

c10::DataPtr label(c10::intrusive_ptr<c10::StorageImpl> twin, void* address, c10::DeviceIndex index) {
  return c10::DataPtr(address, twin.release(), &drop_twin, flagos_device(index));
}

c10::StorageImpl* adopt(c10::StorageImpl* storage) {
  std::lock_guard<std::mutex> lock(adopt_mutex);
  auto& ptr = storage->_mutable_data_ptr_no_checks();
  if (ptr.get_deleter() == &drop_twin) return static_cast<c10::StorageImpl*>(ptr.get_context());
  const auto index = std::max<c10::DeviceIndex>(ptr.device().index(), 0);
  void* const address = ptr.get();
  const auto deleter = ptr.get_deleter();
  c10::DataPtr native_ptr(platform().native_address(address), ptr.release_context(), deleter, native.device(index));
  auto twin =
      c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), storage->nbytes(),
                                            std::move(native_ptr), platform().native_allocator(), storage->resizable());
  auto* result = twin.get();
  ptr = label(std::move(twin), address, index);
  return result;
}

}  // namespace

c10::DataPtr label_twin(c10::intrusive_ptr<c10::StorageImpl> twin, c10::DeviceIndex index) {
  const auto& ptr = twin->_mutable_data_ptr_no_checks();
  void* address = native.entry ? platform().device_address(ptr) : ptr.get();
  return label(std::move(twin), address, index);
}

c10::intrusive_ptr<c10::StorageImpl> flagos_storage(c10::intrusive_ptr<c10::StorageImpl> twin, c10::DeviceIndex index) {
  const auto nbytes = twin->nbytes();
  const auto resizable = twin->resizable();
  return c10::make_intrusive<PooledStorage>(c10::StorageImpl::use_byte_size_t(), nbytes,
                                            label_twin(std::move(twin), index), flagos_allocator(), resizable);
}

c10::StorageImpl* twin_of(c10::StorageImpl* storage) {
  const auto& ptr = storage->_mutable_data_ptr_no_checks();
  if (C10_LIKELY(ptr.get_deleter() == &drop_twin)) return static_cast<c10::StorageImpl*>(ptr.get_context());
  return adopt(storage);
}

void refresh_from_twin(c10::StorageImpl* storage, c10::StorageImpl* twin) {
  auto& ptr = storage->_mutable_data_ptr_no_checks();
  ptr = label_twin(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(twin), ptr.device().index());
  storage->set_nbytes(twin->nbytes());
}

c10::DataPtr allocate_flagos(size_t nbytes) {
  auto& chip = platform();
  auto ptr = chip.allocate(nbytes);
  if (!native.present) return ptr;
  // An empty allocation may come back without a device index.
  const auto index =
      native.type == c10::DeviceType::CPU || ptr.device().index() < 0 ? chip.current_device() : ptr.device().index();
  return label_twin(c10::make_intrusive<PooledStorage>(c10::StorageImpl::use_byte_size_t(), nbytes, std::move(ptr),
                                                       chip.native_allocator(), /*resizable=*/true),
                    index);
}

const c10::DataPtr& native_data_ptr(const c10::DataPtr& ptr) {
  if (ptr.get_deleter() != &drop_twin) return ptr;
  return static_cast<c10::StorageImpl*>(ptr.get_context())->_mutable_data_ptr_no_checks();
}

void resize_flagos_storage(c10::StorageImpl* storage, size_t nbytes) {
  TORCH_CHECK(storage->resizable(), "Trying to resize storage that is not resizable");
  const auto device = storage->device();
  c10::DeviceGuard guard(device);
  auto& chip = platform();
  const auto stream = chip.current_stream(device.index());
  const auto keep = std::min(nbytes, storage->nbytes());
  auto fresh = chip.allocate(nbytes);
  if (!native.present) {
    if (keep) chip.copy_bytes(fresh.get(), device, storage->data(), device, keep, stream);
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(nbytes);
    return;
  }
  auto* twin = twin_of(storage);
  if (keep) chip.copy_bytes(chip.device_address(fresh), device, storage->data(), device, keep, stream);
  twin->set_data_ptr_noswap(std::move(fresh));
  twin->set_nbytes(nbytes);
  refresh_from_twin(storage, twin);
}

c10::Allocator* flagos_allocator() {
  static c10::Allocator* const allocator = c10::GetAllocator(kFlagos);
  return allocator;
}

}  // namespace flagos
