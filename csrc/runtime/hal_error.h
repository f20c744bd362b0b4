// hal_error.h: a failing HAL call becomes one c10::Error: what, which device, the status, the chip's words and a hint.
#pragma once

#include <c10/core/Device.h>
#include <c10/macros/Macros.h>

#include <string>

#include "flagos.h"

namespace flagos {

// "flagos: <what> failed on flagos:<device> (<chip>): <STATUS> <chip message>; <hint>". device < 0: no device in the
// text.
std::string hal_error_text(const flagos_hal* hal, const char* what, int device, flagos_status status);
[[noreturn]] void throw_hal_error(const flagos_hal* hal, const char* what, int device, flagos_status status);

inline void hal_check(const flagos_hal* hal, const char* what, int device, flagos_status status) {
  if (C10_UNLIKELY(status != FLAGOS_OK)) throw_hal_error(hal, what, device, status);
}

}  // namespace flagos
