// hal_platform.h: Platform over a chip's HAL table, for every chip but CUDA.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>

#include "csrc/runtime/caching_allocator.h"
#include "csrc/runtime/hal_streams.h"
#include "csrc/runtime/platform.h"

namespace flagos {

class HalPlatform : public Platform {
 public:
  HalPlatform(const flagos_hal* hal, std::optional<c10::DeviceType> native_type);

  const char* chip() const override { return hal_->name; }
  std::optional<c10::DeviceType> native_type() const override { return native_type_; }

  c10::DeviceIndex device_count() const noexcept override { return count_; }
  c10::DeviceIndex current_device() const override { return current_device_index; }
  void set_device(c10::DeviceIndex index) override { current_device_index = index; }
  bool has_primary_context(c10::DeviceIndex index) const override;
  void device_info(c10::DeviceIndex index, flagos_device_info* info) const override;
  std::pair<size_t, size_t> mem_info(c10::DeviceIndex index) const override;
  void synchronize_device(c10::DeviceIndex index) const override;
  bool can_access_peer(c10::DeviceIndex index, c10::DeviceIndex peer) const override;

  c10::Stream current_stream(c10::DeviceIndex index) const override {
    return stream(index, current_stream_slot[index]);
  }
  c10::Stream default_stream(c10::DeviceIndex index) const override { return stream(index, 0); }
  c10::Stream exchange_stream(c10::Stream stream) override;
  c10::Stream new_stream(c10::DeviceIndex index, int priority) override;
  c10::Stream external_stream(c10::DeviceIndex index, void* native_handle) override;
  bool query_stream(c10::Stream stream) const override;
  void synchronize_stream(c10::Stream stream) const override;
  void* native_handle(c10::Stream stream) const override;
  std::pair<int, int> stream_priority_range() const override { return streams_.priority_range(); }

  void record(void** event, c10::Stream stream, c10::EventFlag flag) const override;
  void block(void* event, c10::Stream stream) const override;
  bool query_event(void* event) const override;
  void synchronize_event(void* event) const override;
  double elapsed_ms(void* start, void* end, c10::DeviceIndex index) const override;
  void destroy_event(void* event, c10::DeviceIndex index) const noexcept override;

  c10::DataPtr allocate(size_t nbytes) override { return allocator_.allocate(nbytes); }
  c10::Allocator* native_allocator() override { return &allocator_; }
  void* device_address(const c10::DataPtr& native) const override;
  void* native_address(void* device_address) const override;
  void record_stream(const c10::DataPtr& native, c10::Stream stream) override {
    allocator_.recordStream(native, stream);
  }
  c10::DeviceAllocator& allocator() override { return allocator_; }
  at::HostAllocator& host_allocator() override { return *host_allocator_; }
  bool is_pinned(const void* ptr) const override;
  c10::Device device_of(const void* ptr) const override;
  void* raw_allocate(size_t nbytes, c10::Stream stream) override;
  void raw_free(void* ptr) override;
  void set_memory_fraction(c10::DeviceIndex index, double fraction) override;
  double memory_fraction(c10::DeviceIndex index) const override;
  std::vector<MemorySegment> memory_snapshot() override;
  DeviceCache& cache(c10::DeviceIndex index) { return allocator_.cache(index); }
  void copy_bytes(void* dst, c10::Device dst_device, const void* src, c10::Device src_device, size_t nbytes,
                  c10::Stream stream) override;

  at::Generator native_generator(c10::DeviceIndex index, bool fresh) final;

  // For code that talks to the chip itself.
  const flagos_hal* hal() const { return hal_; }
  flagos_stream handle(c10::Stream stream) const {
    return streams_.handle(stream.device_index(), streams_.slot_of(stream));
  }

 protected:
  static c10::Stream stream(c10::DeviceIndex index, StreamSlot slot) {
    return c10::Stream(c10::Stream::UNSAFE, flagos_device(index), slot);
  }

  // `fresh` as in native_generator; called once per device with false.
  virtual at::Generator make_generator(c10::DeviceIndex index, bool fresh) const;

  const flagos_hal* hal_;
  const std::optional<c10::DeviceType> native_type_;
  c10::DeviceIndex count_ = 0;
  StreamTable streams_;
  mutable CachingAllocator allocator_;
  at::HostAllocator* host_allocator_;  // never destroyed: tensors may outlive static objects
  struct DefaultGenerator {
    std::once_flag once;
    at::Generator generator;
  };
  std::vector<DefaultGenerator> default_generators_;
  std::mutex raw_mutex_;
  std::unordered_map<void*, c10::DataPtr> raw_;
};

// The platform of the simulated host chip, whose memory torch's CPU kernels use (host_native.cc).
Platform* make_host_platform(const flagos_hal* hal);

}  // namespace flagos
