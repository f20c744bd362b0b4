// dynlib.cc: dlopen over candidates with a report of every path, symbol and reason (dynlib.h).
#include "dynlib.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>

namespace flagos {
namespace {

struct Log {
  std::mutex mutex;
  std::map<std::string, std::vector<std::string>> lines;
};
Log& log() {
  static Log* instance = new Log;
  return *instance;
}

std::string loader_error() {
  const char* text = dlerror();
  return text ? text : "unknown error of the dynamic loader";
}

// Why the handle does not serve, "" when it does.
std::string resolve(void* handle, const std::vector<Symbol>& symbols, std::vector<void*>* addresses) {
  std::string missing;
  for (const Symbol& symbol : symbols) {
    void* address = dlsym(handle, symbol.name.c_str());
    if (!address && symbol.required) missing += (missing.empty() ? "" : ", ") + symbol.name;
    addresses->push_back(address);
  }
  return missing.empty() ? "" : "required symbol missing: " + missing;
}

}  // namespace

Library open_library(const std::string& chip, const std::vector<Candidate>& candidates,
                     const std::vector<Symbol>& symbols) {
  Library library;
  library.tried = candidates.empty() ? "tried: nothing" : "tried: ";
  for (const Candidate& candidate : candidates) {
    int flags = RTLD_LAZY | RTLD_LOCAL | (candidate.only_if_loaded ? RTLD_NOLOAD : 0);
    void* handle = dlopen(candidate.path.c_str(), flags);
    std::vector<void*> addresses;
    std::string reason = handle                     ? resolve(handle, symbols, &addresses)
                         : candidate.only_if_loaded ? (dlerror(), "not loaded in this process")
                                                    : loader_error();
    log_attempt(chip, candidate.path + ": " + (reason.empty() ? "opened" : reason));
    if (handle && reason.empty()) {
      for (size_t i = 0; i < symbols.size(); ++i) *symbols[i].address = addresses[i];
      library.handle = handle;
      library.path = candidate.path;
      return library;
    }
    if (handle) dlclose(handle);
    if (library.tried != "tried: ") library.tried += "; ";
    library.tried += candidate.path + ": " + reason;
  }
  return library;
}

void log_attempt(const std::string& chip, const std::string& line) {
  std::lock_guard<std::mutex> lock(log().mutex);
  std::vector<std::string>& lines = log().lines[chip];
  if (std::find(lines.begin(), lines.end(), line) == lines.end()) lines.push_back(line);
}

std::vector<std::string> attempts(const std::string& chip) {
  std::lock_guard<std::mutex> lock(log().mutex);
  return log().lines[chip];
}

}  // namespace flagos
