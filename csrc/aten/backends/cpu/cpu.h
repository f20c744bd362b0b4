// cpu.h: the last resort: copy the arguments to the CPU, run torch's CPU kernel there, copy the results back.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace flagos {

// How often each operator ran on the CPU since the last reset.
std::vector<std::pair<std::string, uint64_t>> fallback_counts();
void reset_fallback_counts();

// Strict mode turns a fallback into an error that names the operator. Returns the previous setting.
bool set_strict(bool on);

}  // namespace flagos
