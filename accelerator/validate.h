// validate.h: the validating interposer, a HAL table in front of another one that checks the caller (see validate.cc).
#ifndef FLAGOS_VALIDATE_H_
#define FLAGOS_VALIDATE_H_

#include "flagos.h"

namespace flagos {

/// A table with the checks before `inner`, which must stay valid. NULL with a message when too many are wrapped.
const flagos_hal* validating(const flagos_hal* inner);

}  // namespace flagos
#endif  // FLAGOS_VALIDATE_H_
