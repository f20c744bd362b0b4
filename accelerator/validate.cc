// validate.cc: the interposer of FLAGOS_HAL_VALIDATE=1. It stands before any chip's table and checks what the caller
// does: calls before init, handles that are stale or another device's, double and interior frees, copy kinds that
// contradict the pointers, ranges outside a block. Every finding is a failed call; its message starts with "validate:".
//
// Callers get handles of our own with generations, so that a stale one is found even when the chip reuses its address;
// a kernel launch takes the real one from stream_native_handle, which passes through. Extensions are hidden, because
// they would see handles that the chip does not know.
#include "validate.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "handles.h"
#include "status.h"

namespace flagos {
namespace {

constexpr size_t kRememberedFrees = 4096;
using Ptr = const void*;

class Validator {
 public:
  explicit Validator(const flagos_hal* inner) : inner_(inner) { inner_->device_count(&devices_); }

#define READY(entry) \
  if (flagos_status bad = ready(#entry)) return bad
#define READY_DEVICE(entry, device) \
  READY(entry);                     \
  if (flagos_status bad = check_device(#entry, device)) return bad

  flagos_status probe() { return pass(inner_->probe()); }
  flagos_status init() {
    flagos_status status = pass(inner_->init());
    if (status == FLAGOS_OK) {
      initialised_.store(true);
      inner_->device_count(&devices_);
    }
    return status;
  }
  flagos_status shutdown() {
    READY(shutdown);
    report_leaks();
    flagos_status status = pass(inner_->shutdown());
    if (status == FLAGOS_OK) initialised_.store(false);
    return status;
  }
  const char* last_message() { return flagos::last_message(); }
  flagos_status device_count(int32_t* count) { return pass(inner_->device_count(count)); }
  flagos_status device_info(int32_t device, flagos_device_info* info) {
    READY_DEVICE(device_info, device);
    return pass(inner_->device_info(device, info));
  }
  flagos_status mem_info(int32_t device, uint64_t* free_bytes, uint64_t* total_bytes) {
    READY_DEVICE(mem_info, device);
    return pass(inner_->mem_info(device, free_bytes, total_bytes));
  }

  flagos_status malloc(int32_t device, uint64_t size, void** ptr) {
    READY_DEVICE(malloc, device);
    if (!ptr || size == 0) return misuse("malloc", "size is 0 or ptr is NULL");
    flagos_status status = pass(inner_->malloc(device, size, ptr));
    if (status == FLAGOS_OK) add_block(*ptr, size, device);
    return status;
  }
  flagos_status free(int32_t device, void* ptr) {
    READY_DEVICE(free, device);
    return ptr ? release("free", ptr, device) : FLAGOS_OK;
  }
  flagos_status host_malloc(uint64_t size, void** ptr) {
    READY(host_malloc);
    if (!ptr || size == 0) return misuse("host_malloc", "size is 0 or ptr is NULL");
    flagos_status status = pass(inner_->host_malloc(size, ptr));
    if (status == FLAGOS_OK) add_block(*ptr, size, kHost);
    return status;
  }
  flagos_status host_free(void* ptr) {
    READY(host_free);
    return ptr ? release("host_free", ptr, kHost) : FLAGOS_OK;
  }
  flagos_status pointer_info(const void* ptr, flagos_pointer_info* info) {
    READY(pointer_info);
    return pass(inner_->pointer_info(ptr, info));
  }
  flagos_status host_alias(const void* device_ptr, void** host_ptr) {
    READY(host_alias);
    int32_t owner = kHost;
    if (!locate(device_ptr, 1, &owner) || owner == kHost) {
      return misuse("host_alias", "%p is not inside live device memory", device_ptr);
    }
    return pass(inner_->host_alias(device_ptr, host_ptr));
  }

  flagos_status copy_async(int32_t device, void* dst, const void* src, uint64_t n, int32_t kind, flagos_stream stream) {
    READY_DEVICE(copy_async, device);
    if (flagos_status bad = check_copy("copy_async", device, dst, n, src, n, kind)) return bad;
    if (flagos_status bad = unwrap("copy_async", device, &stream)) return bad;
    return pass(inner_->copy_async(device, dst, src, n, kind, stream));
  }
  flagos_status copy2d_async(int32_t device, void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch,
                             uint64_t width, uint64_t height, int32_t kind, flagos_stream stream) {
    READY_DEVICE(copy2d_async, device);
    uint64_t rows = height ? height - 1 : 0, dst_n = 0, src_n = 0;
    if (width && height) {
      if (rows && (dst_pitch < width || src_pitch < width)) return misuse("copy2d_async", "a pitch is below the width");
      if (__builtin_mul_overflow(rows, dst_pitch, &dst_n) || __builtin_add_overflow(dst_n, width, &dst_n) ||
          __builtin_mul_overflow(rows, src_pitch, &src_n) || __builtin_add_overflow(src_n, width, &src_n)) {
        return misuse("copy2d_async", "pitch times height overflows");
      }
    }
    if (flagos_status bad = check_copy("copy2d_async", device, dst, dst_n, src, src_n, kind)) return bad;
    if (flagos_status bad = unwrap("copy2d_async", device, &stream)) return bad;
    return pass(inner_->copy2d_async(device, dst, dst_pitch, src, src_pitch, width, height, kind, stream));
  }
  flagos_status fill_async(int32_t device, void* dst, int32_t byte_value, uint64_t n, flagos_stream stream) {
    READY_DEVICE(fill_async, device);
    if (n) {
      if (flagos_status bad = check_side("fill_async", "dst", dst, n, true, device)) return bad;
    }
    if (flagos_status bad = unwrap("fill_async", device, &stream)) return bad;
    return pass(inner_->fill_async(device, dst, byte_value, n, stream));
  }

  flagos_status stream_create(int32_t device, int32_t priority, flagos_stream* stream) {
    READY_DEVICE(stream_create, device);
    if (!stream) return misuse("stream_create", "stream is NULL");
    flagos_stream real = nullptr;
    flagos_status status = pass(inner_->stream_create(device, priority, &real));
    return status ? status : wrap(&streams_, device, real, stream);
  }
  flagos_status stream_destroy(int32_t device, flagos_stream stream) {
    READY_DEVICE(stream_destroy, device);
    if (!stream) return misuse("stream_destroy", "the default stream cannot be destroyed");
    flagos_stream real = stream;
    if (flagos_status bad = unwrap("stream_destroy", device, &real)) return bad;
    flagos_status status = pass(inner_->stream_destroy(device, real));
    if (status == FLAGOS_OK) retire(&streams_, stream);
    return status;
  }
#define STREAM_ENTRY(entry, parameters, ...)                             \
  flagos_status entry parameters {                                       \
    READY_DEVICE(entry, device);                                         \
    if (flagos_status bad = unwrap(#entry, device, &stream)) return bad; \
    return pass(inner_->entry(__VA_ARGS__));                             \
  }
  STREAM_ENTRY(stream_sync, (int32_t device, flagos_stream stream), device, stream)
  STREAM_ENTRY(stream_query, (int32_t device, flagos_stream stream), device, stream)
  STREAM_ENTRY(stream_native_handle, (int32_t device, flagos_stream stream, void** handle), device, stream, handle)
  STREAM_ENTRY(stream_host_func, (int32_t device, flagos_stream stream, void (*fn)(void*), void* arg), device, stream,
               fn, arg)
  flagos_status stream_priority_range(int32_t device, int32_t* least, int32_t* greatest) {
    READY_DEVICE(stream_priority_range, device);
    return pass(inner_->stream_priority_range(device, least, greatest));
  }

  flagos_status event_create(int32_t device, uint32_t flags, flagos_event* event) {
    READY_DEVICE(event_create, device);
    if (!event) return misuse("event_create", "event is NULL");
    flagos_event real = nullptr;
    flagos_status status = pass(inner_->event_create(device, flags, &real));
    return status ? status : wrap(&events_, device, real, event);
  }
  flagos_status event_destroy(int32_t device, flagos_event event) {
    READY_DEVICE(event_destroy, device);
    flagos_event real = event;
    if (flagos_status bad = unwrap("event_destroy", device, &real)) return bad;
    flagos_status status = pass(inner_->event_destroy(device, real));
    if (status == FLAGOS_OK) retire(&events_, event);
    return status;
  }
  flagos_status event_record(int32_t device, flagos_event event, flagos_stream stream) {
    READY_DEVICE(event_record, device);
    if (flagos_status bad = unwrap("event_record", device, &event)) return bad;
    if (flagos_status bad = unwrap("event_record", device, &stream)) return bad;
    return pass(inner_->event_record(device, event, stream));
  }
  flagos_status event_sync(int32_t device, flagos_event event) {
    READY_DEVICE(event_sync, device);
    if (flagos_status bad = unwrap("event_sync", device, &event)) return bad;
    return pass(inner_->event_sync(device, event));
  }
  flagos_status event_query(int32_t device, flagos_event event) {
    READY_DEVICE(event_query, device);
    if (flagos_status bad = unwrap("event_query", device, &event)) return bad;
    return pass(inner_->event_query(device, event));
  }
  flagos_status event_elapsed_ms(int32_t device, flagos_event start, flagos_event end, float* ms) {
    READY_DEVICE(event_elapsed_ms, device);
    if (flagos_status bad = unwrap("event_elapsed_ms", device, &start)) return bad;
    if (flagos_status bad = unwrap("event_elapsed_ms", device, &end)) return bad;
    return pass(inner_->event_elapsed_ms(device, start, end, ms));
  }
  flagos_status stream_wait_event(int32_t device, flagos_stream stream, flagos_event event) {
    READY_DEVICE(stream_wait_event, device);
    if (flagos_status bad = unwrap("stream_wait_event", device, &stream)) return bad;
    if (flagos_status bad = unwrap("stream_wait_event", kAnyDevice, &event)) return bad;
    return pass(inner_->stream_wait_event(device, stream, event));
  }

  flagos_status device_sync(int32_t device) {
    READY_DEVICE(device_sync, device);
    return pass(inner_->device_sync(device));
  }
  flagos_status can_access_peer(int32_t device, int32_t peer, int32_t* can) {
    READY_DEVICE(can_access_peer, device);
    if (flagos_status bad = check_device("can_access_peer", peer)) return bad;
    return pass(inner_->can_access_peer(device, peer, can));
  }
  flagos_status enable_peer(int32_t device, int32_t peer) {
    READY_DEVICE(enable_peer, device);
    if (flagos_status bad = check_device("enable_peer", peer)) return bad;
    return pass(inner_->enable_peer(device, peer));
  }
  flagos_status last_error(int32_t device) {
    READY_DEVICE(last_error, device);
    return pass(inner_->last_error(device));
  }

 private:
  static constexpr int32_t kHost = -1, kAnyDevice = -2;
  struct Block {
    uint64_t size;
    int32_t device;
  };
  struct Handle {
    void* real = nullptr;
    int32_t device = 0;
  };
  using StreamHandles = HandleTable<Handle, 0x53>;
  using EventHandles = HandleTable<Handle, 0xE3>;

  __attribute__((format(printf, 2, 3))) static flagos_status misuse(const char* entry, const char* format, ...) {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    return fail(FLAGOS_INVALID_ARGUMENT, "validate: %s: %s", entry, text);
  }

  // A chip from outside keeps its message in its own library.
  flagos_status pass(flagos_status status) {
    return status == FLAGOS_OK || status == FLAGOS_NOT_READY ? status : fail(status, "%s", inner_->last_message());
  }

  flagos_status ready(const char* entry) {
    if (initialised_.load(std::memory_order_relaxed)) return FLAGOS_OK;
    return fail(FLAGOS_FAILED_PRECONDITION, "validate: %s: called before init() or after shutdown()", entry);
  }

  flagos_status check_device(const char* entry, int32_t device) {
    if (device >= 0 && device < devices_) return FLAGOS_OK;
    return misuse(entry, "device %d does not exist, the chip has %d", device, devices_);
  }

  void add_block(void* ptr, uint64_t size, int32_t device) {
    std::lock_guard<std::mutex> lock(mutex_);
    uintptr_t address = reinterpret_cast<uintptr_t>(ptr);
    blocks_[address] = {size, device};
    freed_.erase(address);
  }

  // The block is forgotten before the chip frees it: afterwards another thread may be given the same address.
  flagos_status release(const char* entry, void* ptr, int32_t device) {
    uintptr_t address = reinterpret_cast<uintptr_t>(ptr);
    Block block;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = blocks_.find(address);
      if (found == blocks_.end()) {
        if (freed_.count(address)) return misuse(entry, "%p was freed before (double free)", ptr);
        return misuse(entry, "%p is not the start of a live block", ptr);
      }
      block = found->second;
      if (block.device != device) {
        return misuse(entry, "%p belongs to device %d, the call names %d (-1 is the host)", ptr, block.device, device);
      }
      blocks_.erase(found);
      if (freed_.size() >= kRememberedFrees) freed_.erase(freed_.begin());
      freed_[address] = device;
    }
    flagos_status status = pass(device == kHost ? inner_->host_free(ptr) : inner_->free(device, ptr));
    if (status != FLAGOS_OK) add_block(ptr, block.size, device);  // a failed call changes nothing
    return status;
  }

  // The device (or kHost) of the live block that holds [p, p + n).
  bool locate(Ptr p, uint64_t n, int32_t* device) {
    uintptr_t address = reinterpret_cast<uintptr_t>(p);
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = blocks_.upper_bound(address);
    if (found == blocks_.begin()) return false;
    --found;
    uint64_t inside = address - found->first;
    if (inside >= found->second.size) return false;
    *device = found->second.device;
    return n <= found->second.size - inside;
  }

  flagos_status check_side(const char* entry, const char* side, Ptr p, uint64_t n, bool on_device, int32_t device) {
    int32_t owner = kHost;
    if (!p) return misuse(entry, "%s is NULL", side);
    bool inside = locate(p, n, &owner);
    if (!on_device) {
      if (owner == kHost) return FLAGOS_OK;  // pinned, or memory that we know nothing about
      return misuse(entry, "the kind says that %s is host memory, but %p belongs to device %d", side, p, owner);
    }
    if (!inside) {
      return misuse(entry, "%s [%p, + %llu bytes) is not memory inside one live block of a device", side, p,
                    static_cast<unsigned long long>(n));
    }
    if (owner == kHost) return misuse(entry, "the kind says that %s is device memory, but %p is pinned", side, p);
    if (device != kAnyDevice && owner != device) {
      return misuse(entry, "%s belongs to device %d, the call names %d", side, owner, device);
    }
    return FLAGOS_OK;
  }

  flagos_status check_copy(const char* entry, int32_t device, Ptr dst, uint64_t dst_n, Ptr src, uint64_t src_n,
                           int32_t kind) {
    if (kind < FLAGOS_COPY_HOST_TO_DEVICE || kind > FLAGOS_COPY_HOST_TO_HOST) {
      return misuse(entry, "%d is not a copy kind", kind);
    }
    if (dst_n == 0) return FLAGOS_OK;
    bool to_device = kind == FLAGOS_COPY_HOST_TO_DEVICE || kind == FLAGOS_COPY_DEVICE_TO_DEVICE;
    bool from_device = kind == FLAGOS_COPY_DEVICE_TO_HOST || kind == FLAGOS_COPY_DEVICE_TO_DEVICE;
    int32_t owner = kind == FLAGOS_COPY_DEVICE_TO_DEVICE ? kAnyDevice : device;
    if (flagos_status bad = check_side(entry, "dst", dst, dst_n, to_device, owner)) return bad;
    return check_side(entry, "src", src, src_n, from_device, owner);
  }

  template <typename Table, typename T>
  flagos_status wrap(Table* table, int32_t device, T real, T* handle) {
    auto* slot = table->reserve();
    if (!slot) return fail(FLAGOS_OUT_OF_MEMORY, "validate: no handle is left");
    slot->value = {real, device};
    *handle = static_cast<T>(table->publish(slot));
    return FLAGOS_OK;
  }

  template <typename Table>
  void retire(Table* table, const void* handle) {
    auto* slot = table->find(handle);
    if (slot && table->retire(slot, handle)) table->recycle(slot);
  }

  template <typename Table, typename T>
  flagos_status unwrap_in(const Table& table, const char* entry, const char* what, int32_t device, T* handle) {
    auto* slot = table.find(*handle);
    if (!slot) {
      return fail(FLAGOS_NOT_FOUND, "validate: %s: %p is not a live %s (destroyed, or never created?)", entry,
                  static_cast<void*>(*handle), what);
    }
    if (device != kAnyDevice && slot->value.device != device) {
      return misuse(entry, "the %s belongs to device %d, the call names %d", what, slot->value.device, device);
    }
    *handle = static_cast<T>(slot->value.real);
    return FLAGOS_OK;
  }
  flagos_status unwrap(const char* entry, int32_t device, flagos_stream* stream) {
    return *stream ? unwrap_in(streams_, entry, "stream", device, stream) : FLAGOS_OK;
  }
  flagos_status unwrap(const char* entry, int32_t device, flagos_event* event) {
    return *event ? unwrap_in(events_, entry, "event", device, event) : misuse(entry, "event is NULL");
  }

  void report_leaks() {
    size_t streams = 0, events = 0;
    streams_.for_each([&](auto* slot) { streams += slot->handle.load() != 0; });
    events_.for_each([&](auto* slot) { events += slot->handle.load() != 0; });
    std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.empty() && !streams && !events) return;
    fprintf(stderr, "flagos: validate: shutdown with %zu blocks, %zu streams and %zu events still live\n",
            blocks_.size(), streams, events);
  }

  const flagos_hal* inner_;
  std::atomic<bool> initialised_{true};  // the registry wraps a table after its init()
  int32_t devices_ = 0;
  std::mutex mutex_;
  std::map<uintptr_t, Block> blocks_;
  std::map<uintptr_t, int32_t> freed_;
  StreamHandles streams_;
  EventHandles events_;
};

// A C function pointer carries no object, so each wrapped table has its own set of functions, numbered by I.
constexpr int kMaxWrapped = 4;
Validator* g_validators[kMaxWrapped];

template <int I, auto Method>
struct Thunk;
template <int I, typename R, typename... A, R (Validator::*Method)(A...)>
struct Thunk<I, Method> {
  static R call(A... arguments) { return (g_validators[I]->*Method)(arguments...); }
};

template <int I>
const flagos_hal* wrap_table(const flagos_hal* inner) {
  static flagos_hal table;
  g_validators[I] = new Validator(inner);
  table = *inner;
  table.extensions = nullptr;
#define FLAGOS_ENTRY(entry, need) \
  if (inner->entry) table.entry = &Thunk<I, &Validator::entry>::call;
#include "entries.inc"
#undef FLAGOS_ENTRY
  return &table;
}

}  // namespace

const flagos_hal* validating(const flagos_hal* inner) {
  static int count = 0;  // the registry calls with its lock held
  const flagos_hal* (*wraps[kMaxWrapped])(const flagos_hal*) = {wrap_table<0>, wrap_table<1>, wrap_table<2>,
                                                                wrap_table<3>};
  if (count == kMaxWrapped) {
    fail(FLAGOS_INTERNAL, "FLAGOS_HAL_VALIDATE: at most %d chips of one process can be validated", kMaxWrapped);
    return nullptr;
  }
  return wraps[count++](inner);
}

}  // namespace flagos
