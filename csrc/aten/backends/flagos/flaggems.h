// flaggems.h: the backend flagos: FlagGems' native library, liboperators.so, found at run time.
#pragma once

#include <string>
#include <vector>

namespace flagos {

// Opens the first of `paths` that exists; `unavailable` says why the library must not be used, "" when it may. Routes
// that are already resolved change with the next configure().
void use_flaggems_library(const std::vector<std::string>& paths, const std::string& unavailable);

}  // namespace flagos
