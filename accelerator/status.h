// status.h: failing with a message. Every function of the C ABI returns a flagos_status; fail() leaves the one line
// that explains it for the calling thread, and last_message() reads it.
#ifndef FLAGOS_STATUS_H_
#define FLAGOS_STATUS_H_

#include "flagos.h"

namespace flagos {

/// Stores the formatted message for this thread and returns `status`, so that `return fail(...)` reads well.
__attribute__((format(printf, 2, 3))) flagos_status fail(flagos_status status, const char* format, ...);

/// The calling thread's last message; never NULL.
const char* last_message();

/// The status whose flagos_status_name() is `name`; false when there is none.
bool parse_status(const char* name, flagos_status* status);

}  // namespace flagos
#endif  // FLAGOS_STATUS_H_
