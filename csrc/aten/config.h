// config.h: from conf text and environment to a list of wishes "this operator on that backend". Pure functions, no
// torch.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace flagos {

// Which calls a wish is for; the others go to the operator's next line, or without one to the next backend.
struct Within {
  std::vector<std::string> dtypes;                                         // of the first tensor argument; empty: all
  int64_t min_numel = 0, max_numel = std::numeric_limits<int64_t>::max();  // of the largest tensor argument
  std::string text;                                                        // as written; "" when it is for every call
};

// One wish, with where it comes from ("backends.conf:12", "FLAGOS_OP_mm") for messages.
struct RouteLine {
  std::string op;       // "add.Tensor", as in the dispatcher without "aten::"
  std::string backend;  // canonical name; "native" stands for the chip's own until an operator is resolved
  std::string origin;
  Within within = {};
};

// What is wrong, with file and line. Nothing has been applied when it is thrown.
struct ConfigError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The canonical name of a backend ("flaggems" -> "flagos"), or "" when there is none of that name.
std::string canonical_backend(std::string_view name);
const std::vector<std::string>& backend_names();

// The operators that lines may name. Sorted.
using OpNames = std::vector<std::string>;

// The known word nearest to `word` by edit distance, or "" when none is near.
std::string nearest(std::string_view word, const std::vector<std::string>& words);

// Parses "op = backend" and "op = backend [dtype=float16,bfloat16 numel>=4096 numel<=65536]" lines; '#' starts a
// comment. `file` appears in errors. An operator's lines are tried in their order; one after a line without conditions
// is an error, because it would be silently ignored.
std::vector<RouteLine> parse_conf(std::string_view text, const std::string& file, const OpNames& ops);

// Takes FLAGOS_OP_<name> from an environment; '.' is spelt "__" in <name>. Other variables are ignored.
std::vector<RouteLine> parse_env(const std::map<std::string, std::string>& env, const OpNames& ops);

}  // namespace flagos
