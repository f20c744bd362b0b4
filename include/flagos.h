/* flagos.h: the hardware abstraction layer (HAL) of torch_fl.
 *
 * A chip is one C table, `flagos_hal`. This header is all that a chip and torch_fl share: C99, no torch, no
 * vendor header. docs/adding_a_chip.md walks through writing one; accelerator/_template is the skeleton.
 *
 * Rules
 *  1. The table begins with {struct_size, abi_major, abi_minor, name, vendor}. Within one abi_major entries are
 *     only ever appended; a reader looks at struct_size before it touches an entry newer than the reader's minor.
 *  2. Every entry returns a flagos_status (FLAGOS_OK is 0). On failure it leaves one line for the calling thread,
 *     read by last_message(): what failed, the vendor's function, the vendor's own number.
 *  3. Every call that concerns a device names its index. There is no hidden current device: a vendor's set-device
 *     call is the chip's private business and is never visible to the caller's thread.
 *  4. Every entry may be called from any thread at any time between init() and shutdown().
 *  5. A NULL entry means unsupported; the default that the caller then uses is stated beside the entry.
 *  6. Memory allocated on one side is never freed on the other.
 *  7. Operations named *_async are ordered by their stream only. `stream` NULL is the device's default stream,
 *     which is an ordinary stream: it does not wait for others.
 *  8. A failed call changes nothing: outputs stay untouched and handles stay valid.
 *
 * Changelog, one line per minor:
 *  1.0  first version
 */
#ifndef FLAGOS_H_
#define FLAGOS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLAGOS_ABI_MAJOR 1
#define FLAGOS_ABI_MINOR 0

#if defined(__GNUC__)
#define FLAGOS_EXPORT __attribute__((visibility("default")))
#else
#define FLAGOS_EXPORT
#endif

/* ---- status -------------------------------------------------------------------------------------------------- */

typedef enum flagos_status {
  FLAGOS_OK = 0,
  FLAGOS_INVALID_ARGUMENT = 1,    /* the caller's mistake: NULL, bad index, bad kind, pointer out of range */
  FLAGOS_OUT_OF_MEMORY = 2,       /* device or host memory; freeing may help */
  FLAGOS_NOT_FOUND = 3,           /* no such chip, library, symbol or handle */
  FLAGOS_UNAVAILABLE = 4,         /* the chip or its driver is not on this machine */
  FLAGOS_UNSUPPORTED = 5,         /* this chip will never do it */
  FLAGOS_NOT_READY = 6,           /* query only: work is still pending; not an error */
  FLAGOS_FAILED_PRECONDITION = 7, /* right call, wrong moment: before init, after shutdown, after fork */
  FLAGOS_TIMEOUT = 8,
  FLAGOS_DEVICE_LOST = 9, /* sticky: every later call on the device fails with it */
  FLAGOS_INTERNAL = 10
} flagos_status;

/* ---- handles and plain structures ------------------------------------------------------------------------------ */

typedef struct flagos_stream_s* flagos_stream;
typedef struct flagos_event_s* flagos_event;

typedef enum flagos_copy_kind {
  FLAGOS_COPY_HOST_TO_DEVICE = 1,
  FLAGOS_COPY_DEVICE_TO_HOST = 2,
  FLAGOS_COPY_DEVICE_TO_DEVICE = 3, /* also between two devices of the chip */
  FLAGOS_COPY_HOST_TO_HOST = 4      /* in stream order */
} flagos_copy_kind;

typedef enum flagos_pointer_kind {
  FLAGOS_POINTER_UNKNOWN = 0, /* ordinary host memory, or nothing of ours */
  FLAGOS_POINTER_DEVICE = 1,
  FLAGOS_POINTER_PINNED = 2 /* from host_malloc */
} flagos_pointer_kind;

enum { FLAGOS_EVENT_DEFAULT = 0, FLAGOS_EVENT_TIMING = 1 }; /* flags of event_create */

typedef struct flagos_device_info {
  uint32_t struct_size; /* set by the caller */
  int32_t multi_processor_count;
  char name[128];          /* as the vendor spells it; "(simulated)" in it when nothing is real */
  char arch[32];           /* "sm_90", "xcore1000", ... */
  char driver_version[32]; /* "" when unknown */
  char runtime_version[32];
  uint64_t total_memory; /* bytes */
  int32_t major, minor;  /* compute capability; 0, 0 when the chip has no such notion */
  int32_t warp_size;
  int32_t max_threads_per_multi_processor;
  uint64_t malloc_alignment; /* bytes; every pointer from malloc is a multiple of it */
} flagos_device_info;

typedef struct flagos_pointer_info {
  uint32_t struct_size; /* set by the caller */
  int32_t kind;         /* flagos_pointer_kind */
  int32_t device;       /* -1 for host memory */
  int32_t reserved;
  void* base;    /* start of the allocation that holds the pointer */
  uint64_t size; /* its size in bytes, as asked for */
} flagos_pointer_info;

/* An optional group of entries lives in a structure of its own that begins with this header, chained from
 * flagos_hal.extensions. Unknown types are skipped. */
typedef struct flagos_extension {
  uint32_t struct_size;
  uint32_t type; /* flagos_extension_type */
  const struct flagos_extension* next;
} flagos_extension;

typedef enum flagos_extension_type {
  FLAGOS_EXTENSION_GRAPH = 1,
  FLAGOS_EXTENSION_VMM = 2,
  FLAGOS_EXTENSION_IPC = 3,
  FLAGOS_EXTENSION_TRACE = 4,
  FLAGOS_EXTENSION_COLLECTIVES = 5
} flagos_extension_type;

/* ---- the table --------------------------------------------------------------------------------------------------- */

typedef struct flagos_hal {
  uint32_t struct_size; /* sizeof(flagos_hal) as the chip was compiled */
  uint16_t abi_major;
  uint16_t abi_minor;
  const char* name;   /* "host", "cuda", "metax", "ascend", ...: what FLAGOS_ACCELERATOR names */
  const char* vendor; /* for people */

  /* lifecycle. probe() says whether init() would find a device; it must be cheap, may be called before init(), and
   * never creates a context. init() may be called again after it succeeded (no effect). */
  flagos_status (*probe)(void);
  flagos_status (*init)(void);
  flagos_status (*shutdown)(void);
  const char* (*last_message)(void); /* of the calling thread; never NULL; valid until its next failing call */
  flagos_status (*device_count)(int32_t* count);
  flagos_status (*device_info)(int32_t device, flagos_device_info* info);
  flagos_status (*mem_info)(int32_t device, uint64_t* free_bytes, uint64_t* total_bytes);

  /* memory. size 0 is INVALID_ARGUMENT. free(NULL) is OK. free() waits for nothing: the caller has ordered it. */
  flagos_status (*malloc)(int32_t device, uint64_t size, void** ptr);
  flagos_status (*free)(int32_t device, void* ptr);
  flagos_status (*host_malloc)(uint64_t size, void** ptr); /* NULL: unpinned memory is used instead */
  flagos_status (*host_free)(void* ptr);
  flagos_status (*pointer_info)(const void* ptr, flagos_pointer_info* info);
  /* The address under which the host may read and write `device_ptr`'s memory. NULL or UNSUPPORTED: it may not. The
   * distance between the two is one constant for the whole allocation. */
  flagos_status (*host_alias)(const void* device_ptr, void** host_ptr);

  /* copy and fill. Ranges must lie inside one allocation on the device side. n 0 is OK and does nothing. */
  flagos_status (*copy_async)(int32_t device, void* dst, const void* src, uint64_t n, int32_t kind,
                              flagos_stream stream);
  flagos_status (*copy2d_async)(int32_t device, void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch,
                                uint64_t width, uint64_t height, int32_t kind,
                                flagos_stream stream); /* NULL: row by row with copy_async */
  flagos_status (*fill_async)(int32_t device, void* dst, int32_t byte_value, uint64_t n, flagos_stream stream);

  /* streams. priority: lower is more urgent, clamped to priority_range. destroy() lets queued work finish. */
  flagos_status (*stream_create)(int32_t device, int32_t priority, flagos_stream* stream);
  flagos_status (*stream_destroy)(int32_t device, flagos_stream stream);
  flagos_status (*stream_sync)(int32_t device, flagos_stream stream);
  flagos_status (*stream_query)(int32_t device, flagos_stream stream); /* OK or NOT_READY */
  flagos_status (*stream_native_handle)(int32_t device, flagos_stream stream, void** handle);
  flagos_status (*stream_priority_range)(int32_t device, int32_t* least, int32_t* greatest); /* NULL: 0, 0 */
  /* Runs fn(arg) on some thread in stream order. fn must not call into the HAL. NULL: sync, then call. */
  flagos_status (*stream_host_func)(int32_t device, flagos_stream stream, void (*fn)(void* arg), void* arg);

  /* events. An event that was never recorded is complete. record() replaces the earlier record. */
  flagos_status (*event_create)(int32_t device, uint32_t flags, flagos_event* event);
  flagos_status (*event_destroy)(int32_t device, flagos_event event);
  flagos_status (*event_record)(int32_t device, flagos_event event, flagos_stream stream);
  flagos_status (*event_sync)(int32_t device, flagos_event event);
  flagos_status (*event_query)(int32_t device, flagos_event event); /* OK or NOT_READY */
  /* Both events created with FLAGOS_EVENT_TIMING, recorded and complete; otherwise FAILED_PRECONDITION/NOT_READY. */
  flagos_status (*event_elapsed_ms)(int32_t device, flagos_event start, flagos_event end, float* ms);
  /* Later work on `stream` waits for the record that `event` holds now. The event may be another device's. */
  flagos_status (*stream_wait_event)(int32_t device, flagos_stream stream, flagos_event event);

  /* device */
  flagos_status (*device_sync)(int32_t device);
  flagos_status (*can_access_peer)(int32_t device, int32_t peer, int32_t* can); /* NULL: no */
  flagos_status (*enable_peer)(int32_t device, int32_t peer);                   /* NULL: UNSUPPORTED */
  flagos_status (*last_error)(int32_t device); /* asynchronous errors that no call has reported yet; clears them */

  const flagos_extension* extensions; /* NULL: none */
} flagos_hal;

/* What a chip outside this tree exports from the shared library that FLAGOS_HAL_PATH names. NULL when the chip cannot
 * serve this abi_major. */
FLAGOS_EXPORT const flagos_hal* flagos_hal_get(uint32_t abi_major);
typedef const flagos_hal* (*flagos_hal_get_fn)(uint32_t abi_major);

/* ---- libflagos.so: finding and opening a chip ------------------------------------------------------------------- */

/* Opens a chip and returns its initialised table, wrapped by the validating interposer under FLAGOS_HAL_VALIDATE=1.
 * name NULL: FLAGOS_ACCELERATOR, else the one chip whose probe succeeds, else "host". Two chips that both probe are an
 * error that names them. Chips that are simulated (all but a real vendor's) are opened only by name, except "host". */
FLAGOS_EXPORT flagos_status flagos_open(const char* name, const flagos_hal** hal);

/* As flagos_open decides, without opening: the name goes to `buffer` (NUL-terminated, cut at n). */
FLAGOS_EXPORT flagos_status flagos_choose(const char* name, char* buffer, size_t n);

/* Every known chip, in-tree and from FLAGOS_HAL_PATH. flagos_chip_report writes one line per thing tried: library
 * paths, symbols, probe result; it returns the length the whole text needs. */
FLAGOS_EXPORT int32_t flagos_chip_count(void);
FLAGOS_EXPORT const char* flagos_chip_name(int32_t index);
FLAGOS_EXPORT size_t flagos_chip_report(const char* name, char* buffer, size_t n);

FLAGOS_EXPORT const char* flagos_status_name(flagos_status status);
/* The calling thread's message of the last failing flagos_* function above; never NULL. */
FLAGOS_EXPORT const char* flagos_last_message(void);

/* The value of an environment variable of accelerator/env.inc, NULL when unset; asking for one that the table lacks
 * aborts, so that docs/environment.md stays complete. */
FLAGOS_EXPORT const char* flagos_env(const char* name);

#ifdef __cplusplus
}
#endif
#endif /* FLAGOS_H_ */
