// status.cc: status names and the thread-local failure message (status.h).
#include "status.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace flagos {
namespace {

const char* const kNames[] = {"OK",          "INVALID_ARGUMENT", "OUT_OF_MEMORY", "NOT_FOUND",
                              "UNAVAILABLE", "UNSUPPORTED",      "NOT_READY",     "FAILED_PRECONDITION",
                              "TIMEOUT",     "DEVICE_LOST",      "INTERNAL"};
constexpr int kNameCount = sizeof(kNames) / sizeof(kNames[0]);

std::string& message() {
  static thread_local std::string text;
  return text;
}

}  // namespace

flagos_status fail(flagos_status status, const char* format, ...) {
  // Formatted into a new string first: an argument may point into the old message.
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  int length = vsnprintf(nullptr, 0, format, arguments);
  va_end(arguments);
  std::vector<char> text(length < 0 ? 1 : static_cast<size_t>(length) + 1);
  vsnprintf(text.data(), text.size(), format, again);
  va_end(again);
  message().assign(text.data());
  return status;
}

const char* last_message() { return message().c_str(); }

bool parse_status(const char* name, flagos_status* status) {
  for (int i = 0; i < kNameCount; ++i) {
    if (strcmp(name, kNames[i]) == 0) {
      *status = static_cast<flagos_status>(i);
      return true;
    }
  }
  return false;
}

}  // namespace flagos

const char* flagos_status_name(flagos_status status) {
  int value = static_cast<int>(status);
  return value >= 0 && value < flagos::kNameCount ? flagos::kNames[value] : "unknown status";
}

const char* flagos_last_message(void) { return flagos::last_message(); }
