// config.cc: the conf and environment parser (config.h).
#include "csrc/aten/config.h"

#include <algorithm>
#include <set>

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
  static const std::vector<std::string> names{"flagos", "flagos_python", "cuda",     "metax",          "ascend",
                                              "host",   "cpu",           "flaggems", "flaggems_python"};
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
  std::map<std::string, std::string, std::less<>> seen;
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
    auto canonical = checked_backend(backend, where);
    const auto before = seen.find(op);
    if (before != seen.end()) {
      throw ConfigError(where + ": " + quoted(op) + " has a line already at " + before->second + "; keep one");
    }
    seen.emplace(op, where);
    lines.push_back({std::string(op), std::move(canonical), where});
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
    lines.push_back({*op, checked_backend(trim(value), name), name});
  }
  return lines;
}

}  // namespace flagos
