// registry.h: which chips there are and which one to use. The public face is flagos_open() and its neighbours in
// flagos.h; this is the part that other files of libflagos use.
#ifndef FLAGOS_REGISTRY_H_
#define FLAGOS_REGISTRY_H_

#include <string>

#include "flagos.h"

namespace flagos {

/// "" when the table can serve this library, otherwise why not. `origin` names the table in the text.
std::string check_table(const flagos_hal* hal, const std::string& origin);

}  // namespace flagos
#endif  // FLAGOS_REGISTRY_H_
