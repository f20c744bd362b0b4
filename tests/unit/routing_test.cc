// routing_test.cc: the routing rules without torch: config.cc and resolve.cc against the contract, and a fuzzer.
// Built and run by test_routing_rules.py: `routing_test` checks, `routing_test fuzz N [SEED]` feeds N random inputs.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <set>

#include "csrc/aten/config.h"
#include "csrc/aten/resolve.h"

using namespace flagos;

namespace {

int failures = 0;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++failures;                                                          \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, "" __VA_ARGS__);                                \
      std::fprintf(stderr, "\n");                                          \
    }                                                                      \
  } while (0)

OpNames sorted(OpNames names) {
  std::sort(names.begin(), names.end());
  return names;
}

const OpNames kOps = sorted({"mm", "mm.out", "add.Tensor", "add_.Tensor", "add.Scalar", "mul.Tensor", "_softmax",
                             "__lshift__.Scalar", "_fused_sgd_", "native_layer_norm", "sort.stable", "embedding", "x"});

// The message of the ConfigError that `f` throws, or "" when it throws none.
std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}
bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
bool begins(const std::string& text, const std::string& part) { return text.compare(0, part.size(), part) == 0; }

std::vector<RouteLine> conf(const std::string& text) { return parse_conf(text, "a.conf", kOps); }
std::string conf_error(const std::string& text) {
  return error_of([&] { conf(text); });
}
std::string env_error(const std::string& name, const std::string& value) {
  return error_of([&] { parse_env({{name, value}}, kOps); });
}

// ---- the conf file ------------------------------------------------------------------------------------------------

void valid_lines() {
  const auto lines = conf("# first\n\n  mm=cpu   # trailing\r\nadd.Tensor =\tflaggems\n_softmax = flaggems_python");
  CHECK(lines.size() == 3);
  CHECK(lines[0].op == "mm" && lines[0].backend == "cpu" && lines[0].origin == "a.conf:3");
  CHECK(lines[1].op == "add.Tensor" && lines[1].backend == "flagos" && lines[1].origin == "a.conf:4");
  CHECK(lines[2].op == "_softmax" && lines[2].backend == "flagos_python" && lines[2].origin == "a.conf:5");
  CHECK(conf("").empty() && conf("\n\n#\n # mm = nowhere\n").empty());
}

void malformed_lines() {
  for (const std::string bad : {"mm", "mm cpu", "mm =", "= cpu", "=", "mm = # cpu", "\x01\xff"}) {
    const auto text = conf_error("x = cpu\n" + bad + "\n");
    CHECK(begins(text, "a.conf:2: ") && has(text, "op = backend"), "'%s' gave '%s'", bad.c_str(), text.c_str());
  }
  CHECK(begins(conf_error("mm = cpu = cuda"), "a.conf:1: unknown backend"));
  CHECK(begins(conf_error("aten::mm = cpu"), "a.conf:1: unknown operator 'aten::mm'"));
}

void conditions() {
  const auto line = conf("mm = flaggems_python [ dtype=float16,bfloat16  numel>=4096 numel<=65536 ] # why").front();
  CHECK(line.backend == "flagos_python" && line.within.dtypes == std::vector<std::string>({"float16", "bfloat16"}));
  CHECK(line.within.min_numel == 4096 && line.within.max_numel == 65536);
  CHECK(line.within.text == "dtype=float16,bfloat16 numel>=4096 numel<=65536", "%s", line.within.text.c_str());
  CHECK(conf("mm = cpu").front().within.text.empty());
  const auto shown = resolve("mm", line, {{"flagos_python", true, false, ""}});
  CHECK(has(shown.steps.front().reason, "within dtype=float16,bfloat16 numel>=4096"));
  const std::vector<std::pair<std::string, std::string>> bad{{"mm = cpu [numel>=4", "expected ']'"},
                                                             {"mm = cpu []", "no condition"},
                                                             {"mm = cpu [dtype=float17]", "did you mean 'float16'?"},
                                                             {"mm = cpu [dtype=]", "unknown dtype ''"},
                                                             {"mm = cpu [numel>=x]", "number of elements"},
                                                             {"mm = cpu [numel>=99999999999999999999]", "number of"},
                                                             {"mm = cpu [numel>=]", "number of elements"},
                                                             {"mm = cpu [ndim>=2]", "unknown condition 'ndim>=2'"},
                                                             {"mm = [numel>=2]", "unknown backend ''"}};
  for (const auto& [text, expected] : bad) {
    const auto error = conf_error("\n" + text);
    CHECK(begins(error, "a.conf:2: ") && has(error, expected), "'%s' gave '%s'", text.c_str(), error.c_str());
  }
}

void nearest_names() {
  CHECK(has(conf_error("add.Tensr = cpu"), "unknown operator 'add.Tensr'; did you mean 'add.Tensor'?"));
  CHECK(has(conf_error("mm = cuad"), "unknown backend 'cuad'; did you mean 'cuda'?"));
  CHECK(has(conf_error("mm = flagems"), "did you mean 'flaggems'?"));
  const auto far = conf_error("completely_different_name = cpu");
  CHECK(has(far, "unknown operator") && !has(far, "did you mean"), "%s", far.c_str());
  CHECK(has(conf_error("mm = gpu9000"), "(backends: flagos, flagos_python, cuda, metax, ascend, host, cpu"));
  CHECK(nearest("", kOps).empty() && nearest("mm", {}).empty());
  CHECK(nearest(std::string(100000, 'm'), kOps).empty());
}

void duplicate_lines() {
  const auto text = conf_error("mm = cpu\nx = cpu\n mm = cuda");
  CHECK(begins(text, "a.conf:3: 'mm'") && has(text, "a.conf:1"), "%s", text.c_str());
  CHECK(!conf_error("mm = cpu\nmm = cpu").empty());
}

void several_lines() {
  const auto lines = conf("mm = flaggems [dtype=float16]\nx = cpu\nmm = cuda [numel>=8]\n mm = native # the rest");
  CHECK(lines.size() == 4 && lines[0].op == "mm" && lines[1].op == "x" && lines[2].op == "mm" && lines[3].op == "mm");
  CHECK(lines[0].backend == "flagos" && lines[2].within.min_numel == 8 && lines[3].backend == "native");
  CHECK(lines[3].origin == "a.conf:4" && lines[3].within.text.empty());
  const auto text = conf_error("mm = cpu [numel>=8]\nmm = cuda\nmm = cpu [numel<=2]");
  CHECK(begins(text, "a.conf:3: 'mm'") && has(text, "for every call, at a.conf:2"), "%s", text.c_str());
}

void errors_are_one_printable_line() {
  const auto text = conf_error("mm = \x01\x7f\xc3\xa4" + std::string(500, 'z'));
  CHECK(text.size() < 400 && std::all_of(text.begin(), text.end(), [](char c) { return c >= 32 && c < 127; }));
}

// ---- the environment ----------------------------------------------------------------------------------------------

void environment() {
  const auto lines = parse_env({{"FLAGOS_OP_mm__out", "cuda"},
                                {"FLAGOS_OP_add___Tensor", "flaggems"},
                                {"FLAGOS_OP___lshift____Scalar", " cpu "},
                                {"FLAGOS_OP__fused_sgd_", "cpu"},
                                {"FLAGOS_OPmm", "nonsense"},
                                {"PATH", "nonsense"}},
                               kOps);
  std::set<std::string> found;
  for (const auto& line : lines) found.insert(line.op + "=" + line.backend + " " + line.origin);
  const std::set<std::string> expected{"mm.out=cuda FLAGOS_OP_mm__out", "add_.Tensor=flagos FLAGOS_OP_add___Tensor",
                                       "__lshift__.Scalar=cpu FLAGOS_OP___lshift____Scalar",
                                       "_fused_sgd_=cpu FLAGOS_OP__fused_sgd_"};
  CHECK(found == expected);
  auto text = env_error("FLAGOS_OP_add__Tensro", "cpu");
  CHECK(begins(text, "FLAGOS_OP_add__Tensro: unknown operator 'add.Tensro'") && has(text, "'add.Tensor'"), "%s",
        text.c_str());
  text = env_error("FLAGOS_OP_mm", "cudaa");
  CHECK(begins(text, "FLAGOS_OP_mm: unknown backend 'cudaa'; did you mean 'cuda'?"), "%s", text.c_str());
  CHECK(has(env_error("FLAGOS_OP_mm", ""), "unknown backend ''"));
  CHECK(has(env_error("FLAGOS_OP_", "cpu"), "unknown operator ''"));
  CHECK(has(env_error("FLAGOS_OP_mm.out", "cpu"), "unknown operator 'mm.out'"));
}

void canonical_names() {
  CHECK(canonical_backend("flaggems") == "flagos" && canonical_backend("flaggems_python") == "flagos_python");
  for (const auto& name : backend_names()) CHECK(!canonical_backend(name).empty());
  for (const char* name : {"", "CUDA", "cuda ", "flagos-python", "gpu"})
    CHECK(canonical_backend(name).empty(), "%s", name);
}

// ---- resolution ---------------------------------------------------------------------------------------------------

const std::vector<Candidate> kCandidates{{"flagos", false, false, "no library"},
                                         {"flagos_python", true, true, "unproven"},
                                         {"host", true, false, ""},
                                         {"cpu", true, false, "copies"}};

Resolution wished(const std::string& backend, const std::vector<Candidate>& candidates = kCandidates) {
  return resolve("mm", RouteLine{"mm", backend, "b.conf:7"}, candidates);
}

void default_order() {
  auto r = resolve("mm", std::nullopt, kCandidates);
  CHECK(r.backend == "host" && r.origin == "default" && r.error.empty() && r.steps.size() == 4);
  CHECK(!r.steps[0].chosen && r.steps[0].reason == "no library");
  CHECK(!r.steps[1].chosen && r.steps[1].reason == "unproven");
  CHECK(r.steps[2].chosen && !r.steps[2].reason.empty() && !r.steps[3].chosen);
  r = resolve("mm", std::nullopt, {{"flagos", false, false, "no library"}});
  CHECK(r.backend.empty() && has(r.error, "no backend has a kernel for mm"));
}

void a_wish_is_met_or_fails() {
  auto r = wished("cpu");
  CHECK(r.backend == "cpu" && r.origin == "b.conf:7" && has(r.steps[3].reason, "b.conf:7"));
  r = wished("flagos_python");
  CHECK(r.backend == "flagos_python" && r.error.empty(), "forcing an unproven kernel is allowed");
  for (const auto& [backend, why] : std::vector<std::pair<std::string, std::string>>{
           {"flagos", "no library"}, {"metax", "no such backend in this process"}}) {
    r = wished(backend);
    CHECK(r.backend.empty() && r.origin == "b.conf:7");
    for (const auto& part : {std::string("backend not registered"), std::string("mm"), backend, why,
                             std::string("b.conf:7"), std::string("flagos_python, host, cpu")}) {
      CHECK(has(r.error, part), "'%s' lacks '%s'", r.error.c_str(), part.c_str());
    }
    CHECK(std::any_of(r.steps.begin(), r.steps.end(), [&](const Step& s) { return s.backend == backend; }));
  }
  CHECK(has(wished("cuda", {}).error, "available for mm: none"));
}

// ---- the fuzzer ---------------------------------------------------------------------------------------------------

class Fuzzer {
 public:
  explicit Fuzzer(uint64_t seed) : random_(seed) {}

  void conf_text() {
    std::string text;
    for (size_t n = below(6); n > 0; --n) text += line() + (below(8) ? "\n" : "");
    if (below(4) == 0 && !text.empty()) text[below(text.size())] = static_cast<char>(below(256));
    const auto lines_in_text = 1 + std::count(text.begin(), text.end(), '\n');
    try {
      std::set<std::string> ended;  // operators with a line for every call
      for (const auto& line : parse_conf(text, "f.conf", kOps)) {
        good(line, text);
        CHECK(!ended.count(line.op), "a line that cannot serve: %s", text.c_str());
        if (line.within.text.empty()) ended.insert(line.op);
        CHECK(line_number(line.origin + ":", "f.conf:") <= lines_in_text, "%s", text.c_str());
      }
    } catch (const ConfigError& error) {
      const auto number = line_number(error.what(), "f.conf:");
      CHECK(number >= 1 && number <= lines_in_text, "'%s' from '%s'", error.what(), text.c_str());
      CHECK(!has(error.what(), "\n"), "%s", error.what());
    }
  }

  void env() {
    std::map<std::string, std::string> env;
    for (size_t n = below(4); n > 0; --n) {
      auto name = below(8) ? word(kOps) : noise(12);
      for (size_t at = name.find('.'); at != std::string::npos && below(8); at = name.find('.'))
        name.replace(at, 1, "__");
      name = name.substr(0, name.find('\0'));  // no environment can hold a NUL
      env[(below(8) ? "FLAGOS_OP_" : "FLAGOS_") + name] = below(4) ? word(backend_names()) : noise(8);
    }
    try {
      for (const auto& line : parse_env(env, kOps)) {
        good(line, line.origin);
        CHECK(env.count(line.origin) == 1);
      }
    } catch (const ConfigError& error) {
      const std::string text = error.what();
      CHECK(std::any_of(env.begin(), env.end(), [&](auto& e) { return begins(text, e.first + ": "); }), "%s",
            text.c_str());
    }
  }

  void resolution() {
    std::vector<Candidate> candidates;
    for (size_t n = below(5); n > 0; --n) {
      candidates.push_back({std::string(1, 'a' + static_cast<char>(candidates.size())), below(2) == 0, below(3) == 0,
                            below(2) ? "w" : ""});
    }
    std::optional<RouteLine> wish;
    if (below(2)) wish = RouteLine{"mm", std::string(1, 'a' + static_cast<char>(below(6))), "o"};
    const auto r = resolve("mm", wish, candidates);
    std::string expected;
    for (const auto& c : candidates) {
      if (!expected.empty() || !c.usable) continue;
      if (wish ? c.backend == wish->backend : !c.by_name_only) expected = c.backend;
    }
    CHECK(r.backend == expected && r.error.empty() == !expected.empty());
    const auto chosen = std::count_if(r.steps.begin(), r.steps.end(), [](const Step& s) { return s.chosen; });
    CHECK(chosen == (expected.empty() ? 0 : 1));
    for (const auto& s : r.steps) CHECK(!s.chosen || (s.backend == expected && !s.reason.empty()));
    if (wish && expected.empty()) CHECK(has(r.error, "backend not registered") && has(r.error, wish->backend));
  }

  size_t below(size_t n) { return n ? random_() % n : 0; }

 private:
  std::string noise(size_t longest) {
    std::string text(below(longest), ' ');
    for (auto& c : text) c = static_cast<char>(below(256));
    return text;
  }
  std::string word(const std::vector<std::string>& words) {
    auto text = words[below(words.size())];
    if (below(6) == 0 && !text.empty()) text.erase(below(text.size()), 1);
    if (below(8) == 0) text.insert(below(text.size() + 1), 1, static_cast<char>(below(256)));
    return text;
  }
  std::string condition() {
    static const std::vector<std::string> words{"dtype=float16", "dtype=bool,int64", "numel>=12", "numel<=7"};
    std::string text = " [";
    for (size_t n = below(3); n > 0; --n) text += word(words) + space();
    return text + (below(8) ? "]" : "");
  }
  std::string space() { return std::string(below(3), below(4) ? ' ' : '\t'); }
  std::string line() {
    switch (below(10)) {
      case 0:
        return noise(40);
      case 1:
        return space() + "#" + noise(10);
      case 2:
        return word(kOps) + space();
      default:
        return space() + word(kOps) + space() + (below(10) ? "=" : "==") + space() + word(backend_names()) +
               (below(4) ? "" : condition()) + (below(4) ? "" : " # c") + (below(4) ? "" : "\r");
    }
  }
  void good(const RouteLine& line, const std::string& from) {
    CHECK(std::binary_search(kOps.begin(), kOps.end(), line.op), "%s", from.c_str());
    CHECK(!line.backend.empty() && canonical_backend(line.backend) == line.backend, "%s", from.c_str());
    CHECK(line.within.min_numel >= 0 && line.within.max_numel >= 0, "%s", from.c_str());
  }
  // The number in "PREFIX<number>:...", or 0.
  static long line_number(const std::string& text, const std::string& prefix) {
    if (!begins(text, prefix)) return 0;
    char* end = nullptr;
    const long number = std::strtol(text.c_str() + prefix.size(), &end, 10);
    return *end == ':' ? number : 0;
  }
  std::mt19937_64 random_;
};

int fuzz(size_t inputs, uint64_t seed) {
  Fuzzer fuzzer(seed);
  for (size_t i = 0; i < inputs && failures < 10; ++i) {
    switch (fuzzer.below(4)) {
      case 0:
        fuzzer.env();
        break;
      case 1:
        fuzzer.resolution();
        break;
      default:
        fuzzer.conf_text();
    }
  }
  std::printf("fuzz: %zu inputs, seed %llu, %d failures\n", inputs, static_cast<unsigned long long>(seed), failures);
  return failures != 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && !std::strcmp(argv[1], "fuzz")) {
    return fuzz(std::strtoull(argv[2], nullptr, 10), argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
  }
  const std::pair<const char*, void (*)()> checks[] = {
      {"valid_lines", valid_lines},         {"malformed_lines", malformed_lines},
      {"conditions", conditions},           {"nearest_names", nearest_names},
      {"duplicate_lines", duplicate_lines}, {"errors_are_one_printable_line", errors_are_one_printable_line},
      {"environment", environment},         {"canonical_names", canonical_names},
      {"default_order", default_order},     {"a_wish_is_met_or_fails", a_wish_is_met_or_fails},
      {"several_lines", several_lines},
  };
  for (const auto& [name, check] : checks) {
    const int before = failures;
    check();
    std::printf("%s %s\n", failures == before ? "ok  " : "FAIL", name);
  }
  return failures != 0;
}
