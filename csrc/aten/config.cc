// config.cc: the conf and environment parser (config.h).
#include "csrc/aten/config.h"

#include <algorithm>

namespace flagos {

namespace {

constexpr std::string_view kEnvPrefix = "FLAGOS_OP_";

std::string_view trim(std::string_view s) {
  const auto first = s.find_first_not_of(" \t\r\f\v");
  if (first == std::string_view::npos) return {};
  return s.substr(first, s.find_last_not_of(" \t\r\f\v") - first + 1);
}

std::string quoted(std::string_view s) {
  std::string out = "'";
  for (const char c : s.substr(0, 80)) out += (c >= 32 && c < 127) ? c : '?';
  return out + "'";
}

std::string hint(std::string_view word, const std::vector<std::string>& words) {
  const auto near = nearest(word, words);
  return near.empty() ? "" : "; did you mean '" + near + "'?";
}

std::string checked_backend(std::string_view name, const std::string& where) {
  auto backend = canonical_backend(name);
  if (backend.empty()) {
    std::string all;
    for (const auto& b : backend_names()) all += (all.empty() ? "" : ", ") + b;
    throw ConfigError(where + ": unknown backend " + quoted(name) + hint(name, backend_names()) + " (backends: " + all +
                      ")");
  }
  return backend;
}

const std::vector<std::string>& dtype_names() {
  static const std::vector<std::string> names{"bfloat16", "bool",    "complex128", "complex32",     "complex64",
                                              "float16",  "float32", "float64",    "float8_e4m3fn", "float8_e5m2",
                                              "int16",    "int32",   "int64",      "int8",          "uint8"};
  return names;
}

int64_t checked_count(std::string_view text, const std::string& where) {
  int64_t value = 0;
  for (const char c : text) {
    if (c < '0' || c > '9' || value > std::numeric_limits<int64_t>::max() / 10 - 1) {
      throw ConfigError(where + ": expected a number of elements, found " + quoted(text));
    }
    value = value * 10 + (c - '0');
  }
  if (text.empty()) throw ConfigError(where + ": expected a number of elements after 'numel>=' or 'numel<='");
  return value;
}

// The conditions between brackets.
Within checked_within(std::string_view text, const std::string& where) {
  Within within;
  while (!(text = trim(text)).empty()) {
    const auto end = text.find_first_of(" \t");
    const auto word = text.substr(0, end);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end);
    if (word.substr(0, 6) == "dtype=") {
      auto list = word.substr(6);
      do {
        const auto comma = list.find(',');
        const auto name = list.substr(0, comma);
        list = comma == std::string_view::npos ? std::string_view() : list.substr(comma + 1);
        if (!std::binary_search(dtype_names().begin(), dtype_names().end(), name)) {
          throw ConfigError(where + ": unknown dtype " + quoted(name) + hint(name, dtype_names()));
        }
        within.dtypes.emplace_back(name);
      } while (!list.empty());
    } else if (word.substr(0, 7) == "numel>=") {
      within.min_numel = checked_count(word.substr(7), where);
    } else if (word.substr(0, 7) == "numel<=") {
      within.max_numel = checked_count(word.substr(7), where);
    } else {
      throw ConfigError(where + ": unknown condition " + quoted(word) +
                        " (conditions: dtype=NAME,NAME numel>=COUNT numel<=COUNT)");
    }
    within.text += (within.text.empty() ? "" : " ") + std::string(word);
  }
  if (within.text.empty()) throw ConfigError(where + ": no condition between the brackets; leave them out");
  return within;
}

bool known(std::string_view op, const OpNames& ops) { return std::binary_search(ops.begin(), ops.end(), op); }

// Whether `spelt` is `op` with every '.' written "__".
bool spells(std::string_view spelt, std::string_view op) {
  for (const char c : op) {
    const std::string_view expected = c == '.' ? std::string_view("__") : std::string_view(&c, 1);
    if (spelt.substr(0, expected.size()) != expected) return false;
    spelt.remove_prefix(expected.size());
  }
  return spelt.empty();
}

size_t edit_distance(std::string_view a, std::string_view b, size_t limit) {
  if (std::max(a.size(), b.size()) - std::min(a.size(), b.size()) > limit) return limit + 1;
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

const std::vector<std::string>& backend_names() {
  static const std::vector<std::string> names{"flagos", "flagos_python", "cuda",   "metax",    "ascend",
                                              "host",   "cpu",           "native", "flaggems", "flaggems_python"};
  return names;
}

std::string canonical_backend(std::string_view name) {
  if (name == "flaggems") return "flagos";
  if (name == "flaggems_python") return "flagos_python";
  const auto& names = backend_names();
  return std::find(names.begin(), names.end(), name) == names.end() ? "" : std::string(name);
}

std::string nearest(std::string_view word, const std::vector<std::string>& words) {
  if (word.empty()) return "";
  const size_t limit = std::max<size_t>(2, std::min<size_t>(word.size(), 64) / 3);
  size_t best = limit + 1;
  const std::string* found = nullptr;
  for (const auto& w : words) {
    const auto distance = edit_distance(word.substr(0, 64), w, limit);
    if (distance < best) {
      best = distance;
      found = &w;
    }
  }
  return found ? *found : "";
}

std::vector<RouteLine> parse_conf(std::string_view text, const std::string& file, const OpNames& ops) {
  std::vector<RouteLine> lines;
  std::map<std::string, RouteLine, std::less<>> last;  // an operator's last line so far
  size_t number = 0;
  while (!text.empty()) {
    ++number;
    const auto end = text.find('\n');
    auto line = text.substr(0, end);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
    line = trim(line.substr(0, line.find('#')));
    if (line.empty()) continue;
    const auto where = file + ":" + std::to_string(number);
    const auto equals = line.find('=');
    const auto op = trim(line.substr(0, equals));
    const auto backend = equals == std::string_view::npos ? std::string_view() : trim(line.substr(equals + 1));
    if (op.empty() || backend.empty()) {
      throw ConfigError(where + ": expected 'op = backend', found " + quoted(line));
    }
    if (!known(op, ops)) throw ConfigError(where + ": unknown operator " + quoted(op) + hint(op, ops));
    const auto bracket = backend.find('[');
    Within within;
    if (bracket != std::string_view::npos) {
      if (backend.back() != ']') throw ConfigError(where + ": expected ']' at the end of " + quoted(line));
      within = checked_within(backend.substr(bracket + 1, backend.size() - bracket - 2), where);
    }
    auto canonical = checked_backend(trim(backend.substr(0, bracket)), where);
    const auto before = last.find(op);
    if (before != last.end() && before->second.within.text.empty()) {
      throw ConfigError(where + ": " + quoted(op) + " has a line already, for every call, at " + before->second.origin +
                        "; keep one, or give that one conditions");
    }
    lines.push_back({std::string(op), std::move(canonical), where, std::move(within)});
    last[std::string(op)] = lines.back();
  }
  return lines;
}

std::vector<RouteLine> parse_env(const std::map<std::string, std::string>& env, const OpNames& ops) {
  std::vector<RouteLine> lines;
  for (const auto& [name, value] : env) {
    if (name.compare(0, kEnvPrefix.size(), kEnvPrefix) != 0) continue;
    const auto spelt = std::string_view(name).substr(kEnvPrefix.size());
    // "__" may also belong to the operator's own name, so the known names are compared rather than this one decoded.
    const auto op = std::find_if(ops.begin(), ops.end(), [&](const auto& known) { return spells(spelt, known); });
    if (op == ops.end()) {
      std::string decoded(spelt);
      const auto at = decoded.find("__", 1);
      if (at != std::string::npos) decoded.replace(at, 2, ".");
      throw ConfigError(name + ": unknown operator " + quoted(decoded) + hint(decoded, ops));
    }
    lines.push_back({*op, checked_backend(trim(value), name), name, {}});
  }
  return lines;
}

}  // namespace flagos
