// abi_layout.cc: freezes the layout of include/flagos.h. Nothing here runs: that it compiles is the test. When a minor
// version appends an entry, add its line at the end; a line that has to change is a break, which needs a new abi_major.
#include <cstddef>
#include <type_traits>

#include "flagos.h"

static_assert(sizeof(void*) == 8, "64-bit only");
static_assert(FLAGOS_ABI_MAJOR == 1 && FLAGOS_ABI_MINOR == 0, "update the lines below together with the version");
static_assert(std::is_standard_layout<flagos_hal>::value, "");

#define AT(type, member, offset) static_assert(offsetof(type, member) == (offset), #type "." #member " has moved")

AT(flagos_hal, struct_size, 0);
AT(flagos_hal, abi_major, 4);
AT(flagos_hal, abi_minor, 6);
AT(flagos_hal, name, 8);
AT(flagos_hal, vendor, 16);
AT(flagos_hal, probe, 24);
AT(flagos_hal, init, 32);
AT(flagos_hal, shutdown, 40);
AT(flagos_hal, last_message, 48);
AT(flagos_hal, device_count, 56);
AT(flagos_hal, device_info, 64);
AT(flagos_hal, mem_info, 72);
AT(flagos_hal, malloc, 80);
AT(flagos_hal, free, 88);
AT(flagos_hal, host_malloc, 96);
AT(flagos_hal, host_free, 104);
AT(flagos_hal, pointer_info, 112);
AT(flagos_hal, host_alias, 120);
AT(flagos_hal, copy_async, 128);
AT(flagos_hal, copy2d_async, 136);
AT(flagos_hal, fill_async, 144);
AT(flagos_hal, stream_create, 152);
AT(flagos_hal, stream_destroy, 160);
AT(flagos_hal, stream_sync, 168);
AT(flagos_hal, stream_query, 176);
AT(flagos_hal, stream_native_handle, 184);
AT(flagos_hal, stream_priority_range, 192);
AT(flagos_hal, stream_host_func, 200);
AT(flagos_hal, event_create, 208);
AT(flagos_hal, event_destroy, 216);
AT(flagos_hal, event_record, 224);
AT(flagos_hal, event_sync, 232);
AT(flagos_hal, event_query, 240);
AT(flagos_hal, event_elapsed_ms, 248);
AT(flagos_hal, stream_wait_event, 256);
AT(flagos_hal, device_sync, 264);
AT(flagos_hal, can_access_peer, 272);
AT(flagos_hal, enable_peer, 280);
AT(flagos_hal, last_error, 288);
AT(flagos_hal, extensions, 296);
static_assert(sizeof(flagos_hal) == 304, "");

AT(flagos_device_info, struct_size, 0);
AT(flagos_device_info, multi_processor_count, 4);
AT(flagos_device_info, name, 8);
AT(flagos_device_info, arch, 136);
AT(flagos_device_info, driver_version, 168);
AT(flagos_device_info, runtime_version, 200);
AT(flagos_device_info, total_memory, 232);
AT(flagos_device_info, major, 240);
AT(flagos_device_info, minor, 244);
AT(flagos_device_info, warp_size, 248);
AT(flagos_device_info, max_threads_per_multi_processor, 252);
AT(flagos_device_info, malloc_alignment, 256);
static_assert(sizeof(flagos_device_info) == 264, "");

AT(flagos_pointer_info, struct_size, 0);
AT(flagos_pointer_info, kind, 4);
AT(flagos_pointer_info, device, 8);
AT(flagos_pointer_info, base, 16);
AT(flagos_pointer_info, size, 24);
static_assert(sizeof(flagos_pointer_info) == 32, "");

AT(flagos_extension, struct_size, 0);
AT(flagos_extension, type, 4);
AT(flagos_extension, next, 8);
static_assert(sizeof(flagos_extension) == 16, "");

static_assert(FLAGOS_OK == 0 && FLAGOS_INVALID_ARGUMENT == 1 && FLAGOS_OUT_OF_MEMORY == 2 && FLAGOS_NOT_FOUND == 3, "");
static_assert(FLAGOS_UNAVAILABLE == 4 && FLAGOS_UNSUPPORTED == 5 && FLAGOS_NOT_READY == 6, "");
static_assert(FLAGOS_FAILED_PRECONDITION == 7 && FLAGOS_TIMEOUT == 8 && FLAGOS_DEVICE_LOST == 9, "");
static_assert(FLAGOS_INTERNAL == 10, "");
static_assert(FLAGOS_COPY_HOST_TO_DEVICE == 1 && FLAGOS_COPY_DEVICE_TO_HOST == 2, "");
static_assert(FLAGOS_COPY_DEVICE_TO_DEVICE == 3 && FLAGOS_COPY_HOST_TO_HOST == 4, "");
static_assert(FLAGOS_POINTER_UNKNOWN == 0 && FLAGOS_POINTER_DEVICE == 1 && FLAGOS_POINTER_PINNED == 2, "");
static_assert(FLAGOS_EVENT_DEFAULT == 0 && FLAGOS_EVENT_TIMING == 1, "");
static_assert(FLAGOS_EXTENSION_GRAPH == 1 && FLAGOS_EXTENSION_COLLECTIVES == 5, "");
