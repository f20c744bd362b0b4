// hal_platform.cc: devices, streams, memory and copies of a HAL chip. Events are in hal_events.cc.
#include "csrc/runtime/hal_platform.h"

#include <c10/util/Exception.h>

#include <cstring>

#include "csrc/runtime/device_trace.h"
#include "csrc/runtime/fork.h"
#include "csrc/runtime/generator.h"
#include "csrc/runtime/hal_error.h"
#include "csrc/runtime/host_allocator.h"

namespace flagos {
namespace {

int count_devices(const flagos_hal* hal) {
  int32_t count = 0;
  hal_check(hal, "counting devices", -1, hal->device_count(&count));
  TORCH_CHECK(count <= kMaxDevices, "flagos: ", count, " (", hal->name, ") devices; at most ", kMaxDevices,
              " are supported");
  return count;
}

bool has_entry(const flagos_hal* hal, const void* entry) {
  return static_cast<const char*>(entry) < reinterpret_cast<const char*>(hal) + hal->struct_size;
}

// As torch's profiler names them elsewhere, by flagos_copy_kind.
const char* const kCopyNames[] = {"Memcpy", "Memcpy HtoD", "Memcpy DtoH", "Memcpy DtoD", "Memcpy HtoH"};

}  // namespace

HalPlatform::HalPlatform(const flagos_hal* hal, std::optional<c10::DeviceType> native_type)
    : hal_(hal),
      native_type_(native_type),
      count_(static_cast<c10::DeviceIndex>(count_devices(hal))),
      streams_(hal, count_),
      allocator_(hal, &streams_, count_, native_type),
      host_allocator_(make_hal_host_allocator(hal)),
      default_generators_(count_) {
  watch_forks();  // the chip is open
}

Platform* make_hal_platform(const flagos_hal* hal) {
  if (std::strcmp(hal->name, "host") == 0) return make_host_platform(hal);
  return new HalPlatform(hal, std::nullopt);
}

// ---- devices

bool HalPlatform::has_primary_context(c10::DeviceIndex index) const {
  return index >= 0 && index < count_ && (streams_.used(index) || allocator_.cache(index).used());
}

void HalPlatform::device_info(c10::DeviceIndex index, flagos_device_info* info) const {
  *info = flagos_device_info{};
  info->struct_size = sizeof(*info);
  hal_check(hal_, "reading device properties", index, hal_->device_info(index, info));
}

std::pair<size_t, size_t> HalPlatform::mem_info(c10::DeviceIndex index) const {
  uint64_t free_bytes = 0, total_bytes = 0;
  hal_check(hal_, "reading free memory", index, hal_->mem_info(index, &free_bytes, &total_bytes));
  return {free_bytes, total_bytes};
}

void HalPlatform::synchronize_device(c10::DeviceIndex index) const {
  hal_check(hal_, "synchronizing the device", index, hal_->device_sync(index));
  if (has_entry(hal_, &hal_->last_error) && hal_->last_error != nullptr)
    hal_check(hal_, "earlier asynchronous work", index, hal_->last_error(index));
}

bool HalPlatform::can_access_peer(c10::DeviceIndex index, c10::DeviceIndex peer) const {
  if (hal_->can_access_peer == nullptr) return false;
  int32_t can = 0;
  hal_check(hal_, "asking for peer access", index, hal_->can_access_peer(index, peer, &can));
  return can != 0;
}

// ---- streams

c10::Stream HalPlatform::exchange_stream(c10::Stream next) {
  const StreamSlot slot = streams_.slot_of(next);
  const auto index = next.device_index();
  const c10::Stream previous = current_stream(index);
  current_stream_slot[index] = slot;
  return previous;
}

c10::Stream HalPlatform::new_stream(c10::DeviceIndex index, int priority) {
  check_fork();
  return stream(index, streams_.take(index, priority));
}

c10::Stream HalPlatform::external_stream(c10::DeviceIndex index, void* native_handle) {
  return stream(index, native_handle == nullptr ? 0 : streams_.find_native(index, native_handle));
}

bool HalPlatform::query_stream(c10::Stream s) const {
  const flagos_status status = hal_->stream_query(s.device_index(), handle(s));
  if (status == FLAGOS_NOT_READY) return false;
  hal_check(hal_, "querying a stream", s.device_index(), status);
  return true;
}

void HalPlatform::synchronize_stream(c10::Stream s) const {
  hal_check(hal_, "synchronizing a stream", s.device_index(), hal_->stream_sync(s.device_index(), handle(s)));
}

void* HalPlatform::native_handle(c10::Stream s) const {
  return streams_.native_handle(s.device_index(), streams_.slot_of(s));
}

// ---- memory

void* HalPlatform::device_address(const c10::DataPtr& native) const {
  const Block* block = CachingAllocator::block_of(native);
  if (block == nullptr) return native.get();
  return block->device_ptr + (static_cast<char*>(native.get()) - block->native);
}

void* HalPlatform::native_address(void* address) const {
  void* alias = nullptr;
  if (address == nullptr || hal_->host_alias == nullptr || hal_->host_alias(address, &alias) != FLAGOS_OK)
    return address;
  return alias;
}

bool HalPlatform::is_pinned(const void* ptr) const {
  flagos_pointer_info info{};
  info.struct_size = sizeof(info);
  return ptr != nullptr && hal_->pointer_info(ptr, &info) == FLAGOS_OK && info.kind == FLAGOS_POINTER_PINNED;
}

c10::Device HalPlatform::device_of(const void* ptr) const {
  flagos_pointer_info info{};
  info.struct_size = sizeof(info);
  const flagos_status status = hal_->pointer_info(ptr, &info);
  TORCH_CHECK(status == FLAGOS_OK && info.kind == FLAGOS_POINTER_DEVICE, "flagos: ", ptr,
              " is not memory of a flagos device (", hal_->name, "); pass an address that a flagos tensor shows");
  return flagos_device(static_cast<c10::DeviceIndex>(info.device));
}

void* HalPlatform::raw_allocate(size_t nbytes, c10::Stream s) {
  c10::DataPtr data = allocator_.allocate(s.device_index(), streams_.slot_of(s), nbytes);
  void* const address = device_address(data);
  if (address == nullptr) return nullptr;
  std::lock_guard<std::mutex> lock(raw_mutex_);
  raw_.emplace(address, std::move(data));
  return address;
}

void HalPlatform::raw_free(void* ptr) {
  if (ptr == nullptr) return;
  c10::DataPtr data;  // freed after the lock
  std::lock_guard<std::mutex> lock(raw_mutex_);
  auto it = raw_.find(ptr);
  TORCH_CHECK(it != raw_.end(), "flagos: ", ptr, " did not come from caching_allocator_alloc, or was freed before");
  data = std::move(it->second);
  raw_.erase(it);
}

void HalPlatform::set_memory_fraction(c10::DeviceIndex index, double fraction) {
  allocator_.cache(index).set_fraction(fraction);
}

double HalPlatform::memory_fraction(c10::DeviceIndex index) const { return allocator_.cache(index).fraction(); }

std::vector<MemorySegment> HalPlatform::memory_snapshot() {
  std::vector<MemorySegment> segments;
  for (c10::DeviceIndex i = 0; i < count_; i++) allocator_.cache(i).snapshot(&segments);
  return segments;
}

void HalPlatform::copy_bytes(void* dst, c10::Device dst_device, const void* src, c10::Device src_device, size_t nbytes,
                             c10::Stream s) {
  if (nbytes == 0) return;
  check_fork();
  const bool to_device = dst_device.type() == kFlagos, from_device = src_device.type() == kFlagos;
  const int kind = to_device ? (from_device ? FLAGOS_COPY_DEVICE_TO_DEVICE : FLAGOS_COPY_HOST_TO_DEVICE)
                             : (from_device ? FLAGOS_COPY_DEVICE_TO_HOST : FLAGOS_COPY_HOST_TO_HOST);
  const auto index = s.device_index();
  {
    const QueuedSpan span(DeviceSpan::kCopy, kCopyNames[kind], s, nbytes);
    hal_check(hal_, "copying", index, hal_->copy_async(index, dst, src, nbytes, kind, handle(s)));
  }
  bool wait = false;
  for (const void* host : {to_device ? nullptr : static_cast<const void*>(dst), from_device ? nullptr : src}) {
    if (host == nullptr) continue;
    flagos_pointer_info info{};
    info.struct_size = sizeof(info);
    const bool pinned = hal_->pointer_info(host, &info) == FLAGOS_OK && info.kind == FLAGOS_POINTER_PINNED;
    // Pinned memory goes back to its cache only after the copy; ordinary memory may be gone when we return.
    if (!pinned || !host_allocator_->record_event(info.base, nullptr, s)) wait = true;
  }
  if (wait) synchronize_stream(s);
}

at::Generator HalPlatform::native_generator(c10::DeviceIndex index, bool fresh) {
  index = checked_index(index);
  if (fresh) return make_generator(index, true);
  DefaultGenerator& entry = default_generators_[index];
  std::call_once(entry.once, [&] { entry.generator = make_generator(index, false); });
  return entry.generator;
}

at::Generator HalPlatform::make_generator(c10::DeviceIndex index, bool /*fresh*/) const {
  return make_philox_generator(index);
}

}  // namespace flagos
