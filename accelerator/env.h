// env.h: reading the environment. flagos_env() (flagos.h) is the only getenv of the C++ code; these helpers parse.
#ifndef FLAGOS_ENV_H_
#define FLAGOS_ENV_H_

#include <cstdint>
#include <string>

#include "flagos.h"

namespace flagos {

/// The variable's value, or "" when it is unset.
std::string env_text(const char* name);

/// False, with a message, unless the variable is unset (then `fallback`) or a whole number in [low, high], where a
/// suffix K, M or G multiplies by a power of 1024.
bool env_number(const char* name, uint64_t fallback, uint64_t low, uint64_t high, uint64_t* value);

}  // namespace flagos
#endif  // FLAGOS_ENV_H_
