// cudart.h: a chip over a runtime that follows CUDA's. What differs between vendors (names, libraries, how to see that
// the hardware is there) is data, a CudartChip; the code is the same. A chip's hal.cc fills in the data and ends with
// cudart_table(). No vendor header is needed: symbols.inc has the prototypes.
#ifndef FLAGOS_CUDART_CUDART_H_
#define FLAGOS_CUDART_CUDART_H_

#include <atomic>
#include <map>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "dynlib.h"
#include "flagos.h"
#include "handles.h"

namespace flagos {

/// One way to reach the runtime: the prefix of its functions, the libraries that may have them, and the functions whose
/// name differs by more than the prefix, as {name in symbols.inc, name here}.
struct CudartNames {
  std::string prefix;
  std::vector<Candidate> candidates;
  std::vector<std::pair<std::string, std::string>> renamed;
};

struct CudartChip {
  const char* name;
  const char* vendor;
  const char* arch_format;  // printf format of the architecture, given major and minor capability
  /// "" when the hardware seems to be there, else why not. Cheap: creates no context and calls nothing of the vendor's.
  std::string (*absent)();
  std::vector<CudartNames> (*names)();  // in order of preference
  const char* driver;                   // optional: the driver's library and its DevicePrimaryCtxGetState
  const char* context_state;
};

class Cudart {
 public:
  explicit Cudart(const CudartChip& chip) : chip_(chip) {}

  // The entries of flagos_hal.
  flagos_status probe();
  flagos_status init();
  flagos_status shutdown();
  const char* last_message();
  flagos_status device_count(int32_t* count);
  flagos_status device_info(int32_t device, flagos_device_info* info);
  flagos_status mem_info(int32_t device, uint64_t* free_bytes, uint64_t* total_bytes);
  flagos_status malloc(int32_t device, uint64_t size, void** ptr);
  flagos_status free(int32_t device, void* ptr);
  flagos_status host_malloc(uint64_t size, void** ptr);
  flagos_status host_free(void* ptr);
  flagos_status pointer_info(const void* ptr, flagos_pointer_info* info);
  flagos_status copy_async(int32_t device, void* dst, const void* src, uint64_t n, int32_t kind, flagos_stream stream);
  flagos_status copy2d_async(int32_t device, void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch,
                             uint64_t width, uint64_t height, int32_t kind, flagos_stream stream);
  flagos_status fill_async(int32_t device, void* dst, int32_t byte_value, uint64_t n, flagos_stream stream);
  flagos_status stream_create(int32_t device, int32_t priority, flagos_stream* stream);
  flagos_status stream_destroy(int32_t device, flagos_stream stream);
  flagos_status stream_sync(int32_t device, flagos_stream stream);
  flagos_status stream_query(int32_t device, flagos_stream stream);
  flagos_status stream_native_handle(int32_t device, flagos_stream stream, void** handle);
  flagos_status stream_priority_range(int32_t device, int32_t* least, int32_t* greatest);
  flagos_status stream_host_func(int32_t device, flagos_stream stream, void (*fn)(void*), void* arg);
  flagos_status event_create(int32_t device, uint32_t flags, flagos_event* event);
  flagos_status event_destroy(int32_t device, flagos_event event);
  flagos_status event_record(int32_t device, flagos_event event, flagos_stream stream);
  flagos_status event_sync(int32_t device, flagos_event event);
  flagos_status event_query(int32_t device, flagos_event event);
  flagos_status event_elapsed_ms(int32_t device, flagos_event start, flagos_event end, float* ms);
  flagos_status stream_wait_event(int32_t device, flagos_stream stream, flagos_event event);
  flagos_status device_sync(int32_t device);
  flagos_status can_access_peer(int32_t device, int32_t peer, int32_t* can);
  flagos_status enable_peer(int32_t device, int32_t peer);
  flagos_status last_error(int32_t device);

 private:
  struct Functions {
#define FLAGOS_CUDART_SYMBOL(need, name, result, parameters) result(*name) parameters = nullptr;
#include "symbols.inc"
#undef FLAGOS_CUDART_SYMBOL
  };
  struct Block {
    uint64_t size;
    int32_t device;  // kHost: pinned
  };
  struct Handle {
    void* native = nullptr;
    int32_t device = 0;
    bool timing = false;
    std::atomic<bool> recorded{false};
  };
  using Streams = HandleTable<Handle, 0x57>;
  using Events = HandleTable<Handle, 0xE7>;
  static constexpr int32_t kHost = -1, kAnyDevice = -2;

  /// Makes `device` current for one call and gives the thread back what it had.
  class Current {
   public:
    Current(Cudart& runtime, int32_t device);
    ~Current();
    int error = 0;

   private:
    Cudart& runtime_;
    int before_ = -1;
  };

  flagos_status open();
  flagos_status ready(const char* entry);
  flagos_status ready(const char* entry, int32_t device);
  /// The status for a vendor's result, with a message that names the entry, the function and the number.
  flagos_status check(int error, const char* entry, const char* function);
  bool locate(const void* p, uint64_t* base, Block* block);
  flagos_status release(const char* entry, void* ptr, int32_t device);
  flagos_status native_stream(const char* entry, int32_t device, flagos_stream handle, void** native);
  flagos_status find_event(const char* entry, int32_t device, flagos_event handle, Handle** event);

  const CudartChip& chip_;
  Functions fn_;
  int (*context_state_)(int device, unsigned* flags, int* active) = nullptr;
  std::string prefix_;
  std::shared_mutex mutex_;  // guards opening and blocks_
  bool opened_ = false;
  std::atomic<bool> initialised_{false};
  int32_t devices_ = 0;
  std::map<uintptr_t, Block> blocks_;
  Streams streams_;
  Events events_;
};

/// The table over the object that Get returns: C function pointers carry no object, so Get is part of their type.
template <Cudart& (*Get)()>
struct CudartTable {
  template <auto Method>
  struct Entry;
  template <typename R, typename... A, R (Cudart::*Method)(A...)>
  struct Entry<Method> {
    static R call(A... arguments) { return (Get().*Method)(arguments...); }
  };

  static flagos_hal make(const char* name, const char* vendor) {
    flagos_hal table = {};
    table.struct_size = sizeof(table);
    table.abi_major = FLAGOS_ABI_MAJOR;
    table.abi_minor = FLAGOS_ABI_MINOR;
    table.name = name;
    table.vendor = vendor;
#define FLAGOS_CUDART_ENTRY(entry) table.entry = &Entry<&Cudart::entry>::call
    FLAGOS_CUDART_ENTRY(probe);
    FLAGOS_CUDART_ENTRY(init);
    FLAGOS_CUDART_ENTRY(shutdown);
    FLAGOS_CUDART_ENTRY(last_message);
    FLAGOS_CUDART_ENTRY(device_count);
    FLAGOS_CUDART_ENTRY(device_info);
    FLAGOS_CUDART_ENTRY(mem_info);
    FLAGOS_CUDART_ENTRY(malloc);
    FLAGOS_CUDART_ENTRY(free);
    FLAGOS_CUDART_ENTRY(host_malloc);
    FLAGOS_CUDART_ENTRY(host_free);
    FLAGOS_CUDART_ENTRY(pointer_info);
    FLAGOS_CUDART_ENTRY(copy_async);
    FLAGOS_CUDART_ENTRY(copy2d_async);
    FLAGOS_CUDART_ENTRY(fill_async);
    FLAGOS_CUDART_ENTRY(stream_create);
    FLAGOS_CUDART_ENTRY(stream_destroy);
    FLAGOS_CUDART_ENTRY(stream_sync);
    FLAGOS_CUDART_ENTRY(stream_query);
    FLAGOS_CUDART_ENTRY(stream_native_handle);
    FLAGOS_CUDART_ENTRY(stream_priority_range);
    FLAGOS_CUDART_ENTRY(stream_host_func);
    FLAGOS_CUDART_ENTRY(event_create);
    FLAGOS_CUDART_ENTRY(event_destroy);
    FLAGOS_CUDART_ENTRY(event_record);
    FLAGOS_CUDART_ENTRY(event_sync);
    FLAGOS_CUDART_ENTRY(event_query);
    FLAGOS_CUDART_ENTRY(event_elapsed_ms);
    FLAGOS_CUDART_ENTRY(stream_wait_event);
    FLAGOS_CUDART_ENTRY(device_sync);
    FLAGOS_CUDART_ENTRY(can_access_peer);
    FLAGOS_CUDART_ENTRY(enable_peer);
    FLAGOS_CUDART_ENTRY(last_error);
#undef FLAGOS_CUDART_ENTRY
    return table;  // host_alias stays NULL: the host cannot read device memory
  }
};

}  // namespace flagos
#endif  // FLAGOS_CUDART_CUDART_H_
