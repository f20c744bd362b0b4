// host_allocator.cc: torch's caching host allocator over a chip's host_malloc, and its registration.
//
// A block that copies on other streams still use is handed out again only after the events recorded at its free.
#include "csrc/runtime/host_allocator.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "csrc/runtime/fork.h"
#include "csrc/runtime/hal_error.h"
#include "csrc/runtime/platform.h"

namespace flagos {
namespace {

const flagos_hal* g_hal = nullptr;

// An event of the platform, owned. Empty: done.
class OwnedEvent {
 public:
  // Runs inside deleters, so it cannot raise: when no event can be had, the stream is drained instead.
  explicit OwnedEvent(c10::Stream stream) noexcept : device_(stream.device_index()) {
    try {
      platform().record(&event_, stream, c10::EventFlag::PYTORCH_DEFAULT);
    } catch (const c10::Error&) {
      try {
        platform().synchronize_stream(stream);
      } catch (const c10::Error&) {  // the device is lost: nothing on it will touch the memory again
      }
    }
  }
  OwnedEvent(OwnedEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)), device_(other.device_) {}
  OwnedEvent& operator=(OwnedEvent&& other) noexcept {
    std::swap(event_, other.event_);
    std::swap(device_, other.device_);
    return *this;
  }
  ~OwnedEvent() {
    if (event_ != nullptr) platform().destroy_event(event_, device_);
  }
  bool done() const noexcept {
    try {
      return platform().query_event(event_);
    } catch (const c10::Error&) {
      return false;  // asked again later
    }
  }

 private:
  void* event_ = nullptr;
  c10::DeviceIndex device_;
};

using HostBlock = at::HostBlock<c10::Stream>;

// Only the leaf functions that the template asks for: its insides change between releases.
struct HalHostAllocatorImpl : at::CachingHostAllocatorImpl<c10::Stream, OwnedEvent> {
  void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }

 private:
  void allocate_host_memory(size_t size, void** ptr) override {
    check_fork();
    if (g_hal->host_malloc == nullptr) {
      TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(ptr, 64, size) == 0, "flagos: no host memory for ", size,
                       " bytes");
      return;
    }
    flagos_status status = g_hal->host_malloc(size, ptr);
    if (status == FLAGOS_OUT_OF_MEMORY) {  // what we keep in reserve may be in the way
      empty_cache();
      status = g_hal->host_malloc(size, ptr);
    }
    hal_check(g_hal, "allocating pinned memory", -1, status);
  }
  void free_block(HostBlock* block) override {
    if (in_bad_fork()) return;
    if (g_hal->host_free == nullptr || g_hal->host_malloc == nullptr) {
      std::free(block->ptr_);
    } else {
      hal_check(g_hal, "freeing pinned memory", -1, g_hal->host_free(block->ptr_));
    }
  }
  void record_stream(std::optional<std::vector<OwnedEvent>>& events, c10::Stream stream) override {
    events->emplace_back(stream);
  }
  bool query_event(OwnedEvent& event) override { return event.done(); }
  c10::Stream get_current_stream() const override { return platform().current_stream(platform().current_device()); }
  bool stream_is_capturing(c10::Stream) const override { return false; }
};

void hal_host_free(void* context);
struct HalHostAllocator final : at::CachingHostAllocatorInterface<HalHostAllocatorImpl, hal_host_free> {};
HalHostAllocator* g_hal_host_allocator = nullptr;
void hal_host_free(void* context) {
  if (in_bad_fork()) return;
  g_hal_host_allocator->free(context);
}

struct RegisteredHostAllocator final : at::HostAllocator {
  at::DataPtr allocate(size_t size) override { return inner().allocate(size); }
  at::DeleterFnPtr raw_deleter() const override { return inner().raw_deleter(); }
  void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }
  bool record_event(void* ptr, void* ctx, c10::Stream stream) override {
    return inner().record_event(ptr, ctx, stream);
  }
  void empty_cache() override { inner().empty_cache(); }
  at::HostStats get_stats() override { return inner().get_stats(); }
  void reset_accumulated_stats() override { inner().reset_accumulated_stats(); }
  void reset_peak_stats() override { inner().reset_peak_stats(); }

 private:
  static at::HostAllocator& inner() { return platform().host_allocator(); }
};

RegisteredHostAllocator* const g_registered = new RegisteredHostAllocator();
REGISTER_HOST_ALLOCATOR(at::kPrivateUse1, g_registered)

}  // namespace

at::HostAllocator* make_hal_host_allocator(const flagos_hal* hal) {
  g_hal = hal;
  g_hal_host_allocator = new HalHostAllocator();
  return g_hal_host_allocator;
}

at::HostAllocator* registered_host_allocator() { return g_registered; }

}  // namespace flagos
