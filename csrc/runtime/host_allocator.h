// host_allocator.h: pinned host memory, cached by torch's own template.
#pragma once

#include <ATen/core/CachingHostAllocator.h>

#include "flagos.h"

namespace flagos {

// The pinned memory of a HAL chip; ordinary memory when it has none. Call once; lives until the process ends.
at::HostAllocator* make_hal_host_allocator(const flagos_hal* hal);

// What PyTorch finds for PrivateUse1: forwards to the platform.
at::HostAllocator* registered_host_allocator();

}  // namespace flagos
