// env.cc: the one place where C++ code reads environment variables, and only those that env.inc lists.
#include "env.h"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "status.h"

namespace {

const char* const kVariables[] = {
#define FLAGOS_ENV(name, default_text, sentence) name,
#include "env.inc"
#undef FLAGOS_ENV
};

bool listed(const char* name) {
  for (const char* known : kVariables) {
    size_t length = strlen(known);
    bool prefix = known[length - 1] == '_';
    if (prefix ? strncmp(name, known, length) == 0 && name[length] != '\0' : strcmp(name, known) == 0) return true;
  }
  return false;
}

}  // namespace

const char* flagos_env(const char* name) {
  if (!name || !listed(name)) {
    fprintf(stderr, "flagos: environment variable %s is read but not listed in accelerator/env.inc\n",
            name ? name : "(null)");
    abort();
  }
  return getenv(name);
}

namespace flagos {

std::string env_text(const char* name) {
  const char* text = flagos_env(name);
  return text ? text : "";
}

bool env_number(const char* name, uint64_t fallback, uint64_t low, uint64_t high, uint64_t* value) {
  std::string text = env_text(name);
  if (text.empty()) {
    *value = fallback;
    return true;
  }
  char* end = nullptr;
  errno = 0;
  unsigned long long number = strtoull(text.c_str(), &end, 10);
  int shift = 0;
  switch (*end) {
    case 'K':
    case 'k':
      shift = 10;
      break;
    case 'M':
    case 'm':
      shift = 20;
      break;
    case 'G':
    case 'g':
      shift = 30;
      break;
    default:
      break;
  }
  if (shift) ++end;
  bool digits = text[0] >= '0' && text[0] <= '9';  // strtoull itself would accept "-1"
  if (!digits || *end != '\0' || errno != 0 || number > (UINT64_MAX >> shift) || (number << shift) < low ||
      (number << shift) > high) {
    fail(FLAGOS_INVALID_ARGUMENT, "%s=%s: must be a whole number from %llu to %llu, with K, M or G allowed", name,
         text.c_str(), static_cast<unsigned long long>(low), static_cast<unsigned long long>(high));
    return false;
  }
  *value = number << shift;
  return true;
}

}  // namespace flagos
