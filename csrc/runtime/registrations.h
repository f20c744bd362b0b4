// registrations.h: the registrations with PyTorch that happen when a platform is set, not when the library is loaded.
#pragma once

namespace flagos {

// Hands PyTorch the PrivateUse1 hooks; later calls do nothing.
void register_hooks();
// Likewise the profiler's side of the device.
void register_profiler();

}  // namespace flagos
