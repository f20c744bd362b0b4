// small_chip.cc: an out-of-tree chip for the registry tests: it has the skeleton's table with one thing changed, which
// the definitions at build time choose (NAME, VENDOR, PROBE, INIT, MAJOR, STRUCT_SIZE, WITHOUT, RETURNS_NULL, EXPORT).
#define flagos_hal_get template_hal_get
#include "../../accelerator/_template/hal.cc"
#undef flagos_hal_get

#ifndef NAME
#define NAME "small"
#endif
#ifndef VENDOR
#define VENDOR "a vendor"
#endif
#ifndef PROBE
#define PROBE FLAGOS_OK
#endif
#ifndef INIT
#define INIT FLAGOS_OK
#endif
#ifndef EXPORT
#define EXPORT flagos_hal_get
#endif

namespace {
flagos_status small_probe() {
  return PROBE == FLAGOS_OK ? FLAGOS_OK : fail(static_cast<flagos_status>(PROBE), "no device node /dev/small");
}
flagos_status small_init() {
  return INIT == FLAGOS_OK ? init() : fail(static_cast<flagos_status>(INIT), "smallInit returned 42");
}
}  // namespace

extern "C" FLAGOS_EXPORT const flagos_hal* EXPORT(uint32_t abi_major) {
  static flagos_hal table = *template_hal_get(abi_major);
  table.name = NAME;
  table.vendor = VENDOR;
  table.probe = small_probe;
  table.init = small_init;
#ifdef MAJOR
  table.abi_major = MAJOR;
#endif
#ifdef STRUCT_SIZE
  table.struct_size = STRUCT_SIZE;
#endif
#ifdef WITHOUT
  table.WITHOUT = nullptr;
#endif
#ifdef RETURNS_NULL
  return nullptr;
#else
  return &table;
#endif
}
