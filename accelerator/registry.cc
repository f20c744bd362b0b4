// registry.cc: finds chips (in this library by registry.inc, outside by FLAGOS_HAL_PATH), decides which one to use, and
// opens it. Order of authority: the name in the call, FLAGOS_ACCELERATOR, the one real chip whose probe succeeds, host.
// Nothing is half-done: a wrong name, a broken out-of-tree library or two answering chips is one error with the cure.
#include "registry.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "dynlib.h"
#include "env.h"
#include "status.h"
#include "validate.h"

#define FLAGOS_CHIP(name) extern "C" const flagos_hal* flagos_hal_get_##name(uint32_t abi_major);
#include "registry.inc"
#undef FLAGOS_CHIP

namespace flagos {
namespace {

struct Chip {
  std::string name;
  flagos_hal table = {};  // our copy: entries that an older chip does not know are NULL
  std::string origin;     // "built in", or the library
  const flagos_hal* opened = nullptr;
};

struct Registry {
  std::mutex mutex;  // held while a chip opens, so that it is initialised once
  std::vector<std::unique_ptr<Chip>> chips;
  std::string broken;  // what is wrong with FLAGOS_HAL_PATH, "" when nothing is

  Registry();
  void add(const flagos_hal* hal, const std::string& origin);
  void load(const std::string& path);
  Chip* find(const std::string& name) const;
};

// Chips whose devices are not real say so in `vendor`; probing never picks them.
bool simulated(const Chip& chip) { return strstr(chip.table.vendor, "(simulated)") != nullptr; }

void append(std::string* text, const std::string& separator, const std::string& item) {
  if (!text->empty()) *text += separator;
  *text += item;
}

Registry::Registry() {
#define FLAGOS_CHIP(name) add(flagos_hal_get_##name(FLAGOS_ABI_MAJOR), "built in as " #name);
#include "registry.inc"
#undef FLAGOS_CHIP
  std::string paths = env_text("FLAGOS_HAL_PATH");
  for (size_t begin = 0; begin < paths.size();) {
    size_t end = std::min(paths.find(':', begin), paths.size());
    if (end > begin) load(paths.substr(begin, end - begin));
    begin = end + 1;
  }
}

void Registry::add(const flagos_hal* hal, const std::string& origin) {
  std::string problem = check_table(hal, origin);
  if (problem.empty()) {
    if (Chip* other = find(hal->name)) {
      problem = origin + ": the chip name \"" + hal->name + "\" is taken (" + other->origin + "); give it another name";
    }
  }
  if (!problem.empty()) {
    append(&broken, "; ", problem);
    return;
  }
  auto chip = std::make_unique<Chip>();
  chip->name = hal->name;
  chip->origin = origin;
  memcpy(&chip->table, hal, std::min<size_t>(hal->struct_size, sizeof(flagos_hal)));
  chips.push_back(std::move(chip));
}

void Registry::load(const std::string& path) {
  flagos_hal_get_fn get = nullptr;
  std::vector<Symbol> symbols = {{"flagos_hal_get", reinterpret_cast<void**>(&get), true}};
  Library library = open_library(path, {{path, false}}, symbols);
  if (!library.handle) {
    append(&broken, "; ", "FLAGOS_HAL_PATH: " + library.tried);
    return;
  }
  add(get(FLAGOS_ABI_MAJOR), path);
}

Chip* Registry::find(const std::string& name) const {
  for (const auto& chip : chips) {
    if (chip->name == name) return chip.get();
  }
  return nullptr;
}

// Never destroyed: chips may be used until the very end of the process.
Registry& registry() {
  static Registry* instance = new Registry;
  return *instance;
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = above;
    }
  }
  return row[b.size()];
}

flagos_status unknown_chip(const std::string& name, const char* source) {
  std::string known, nearest;
  size_t best = 3;  // further away is not a typing mistake
  for (const auto& chip : registry().chips) {
    append(&known, ", ", chip->name);
    size_t distance = edit_distance(name, chip->name);
    if (distance < best) best = distance, nearest = chip->name;
  }
  std::string hint = nearest.empty() ? "" : "; did you mean \"" + nearest + "\"?";
  std::string broken = registry().broken.empty() ? "" : "; " + registry().broken;
  return fail(FLAGOS_NOT_FOUND, "no chip is named \"%s\" (%s); known chips: %s%s%s", name.c_str(), source,
              known.c_str(), hint.c_str(), broken.c_str());
}

flagos_status choose(const char* name, Chip** chosen) {
  Registry& r = registry();
  std::string wanted = name ? name : env_text("FLAGOS_ACCELERATOR");
  if (name || !wanted.empty()) {
    *chosen = r.find(wanted);
    return *chosen ? FLAGOS_OK : unknown_chip(wanted, name ? "asked for by name" : "FLAGOS_ACCELERATOR");
  }
  if (!r.broken.empty()) {
    return fail(FLAGOS_FAILED_PRECONDITION, "%s; correct FLAGOS_HAL_PATH, or name a chip with FLAGOS_ACCELERATOR",
                r.broken.c_str());
  }
  std::vector<Chip*> present;
  std::string names;
  for (const auto& chip : r.chips) {
    if (simulated(*chip) || chip->table.probe() != FLAGOS_OK) continue;
    present.push_back(chip.get());
    append(&names, ", ", chip->name);
  }
  if (present.size() > 1) {
    return fail(FLAGOS_FAILED_PRECONDITION, "several chips are present: %s; choose one with FLAGOS_ACCELERATOR=%s",
                names.c_str(), present[0]->name.c_str());
  }
  *chosen = present.empty() ? r.find("host") : present[0];
  return *chosen ? FLAGOS_OK : fail(FLAGOS_UNAVAILABLE, "no chip is present and this build has no host chip");
}

// A chip from outside keeps its own message; this one names the chip.
flagos_status fail_with(const Chip& chip, const char* what, flagos_status status) {
  std::string reason = chip.table.last_message();
  return fail(status, "%s of chip \"%s\" (%s) failed with %s: %s", what, chip.name.c_str(), chip.origin.c_str(),
              flagos_status_name(status), reason.c_str());
}

void report(Chip& chip, std::string* text) {
  *text += chip.name + " (" + chip.table.vendor + "), " + chip.origin + "\n";
  flagos_status status = chip.table.probe();
  std::string reason = status == FLAGOS_OK ? "" : std::string(": ") + chip.table.last_message();
  for (const std::string& line : attempts(chip.name)) *text += "  tried " + line + "\n";
  *text += std::string("  probe: ") + flagos_status_name(status) + reason + "\n";
}

}  // namespace

std::string check_table(const flagos_hal* hal, const std::string& origin) {
  std::string ours = std::to_string(FLAGOS_ABI_MAJOR) + "." + std::to_string(FLAGOS_ABI_MINOR);
  if (!hal) {
    return origin + ": flagos_hal_get(" + std::to_string(FLAGOS_ABI_MAJOR) +
           ") returned NULL: the chip does not serve HAL ABI " + ours +
           " of this libflagos; rebuild one against the other's flagos.h";
  }
  if (hal->abi_major != FLAGOS_ABI_MAJOR) {
    return origin + ": built for HAL ABI " + std::to_string(hal->abi_major) + "." + std::to_string(hal->abi_minor) +
           ", this libflagos has " + ours + "; rebuild the chip against this flagos.h";
  }
  // The table of version 1.0 is the smallest that exists; every later one is longer.
  if (hal->struct_size < offsetof(flagos_hal, extensions) + sizeof(hal->extensions)) {
    return origin + ": struct_size is " + std::to_string(hal->struct_size) + ", the smallest table of HAL ABI " +
           std::to_string(FLAGOS_ABI_MAJOR) + " has " + std::to_string(sizeof(flagos_hal)) +
           "; set it to sizeof(flagos_hal)";
  }
  if (!hal->name || !hal->name[0] || !hal->vendor) return origin + ": the table has no name or no vendor";
  std::string missing;
  enum { OPTIONAL, REQUIRED };
#define FLAGOS_ENTRY(entry, need) \
  if (need == REQUIRED && !hal->entry) append(&missing, ", ", #entry);
#include "entries.inc"
#undef FLAGOS_ENTRY
  return missing.empty() ? "" : origin + ": required entries are NULL: " + missing;
}

}  // namespace flagos

using flagos::registry;

flagos_status flagos_open(const char* name, const flagos_hal** hal) {
  if (!hal) return flagos::fail(FLAGOS_INVALID_ARGUMENT, "flagos_open: hal is NULL");
  std::lock_guard<std::mutex> lock(registry().mutex);
  flagos::Chip* chip = nullptr;
  if (flagos_status status = flagos::choose(name, &chip)) return status;
  if (!chip->opened) {
    uint64_t validate = 0;
    if (!flagos::env_number("FLAGOS_HAL_VALIDATE", 0, 0, 1, &validate)) return FLAGOS_INVALID_ARGUMENT;
    if (flagos_status status = chip->table.init()) return flagos::fail_with(*chip, "init", status);
    const flagos_hal* table = validate ? flagos::validating(&chip->table) : &chip->table;
    if (!table) return FLAGOS_INTERNAL;
    chip->opened = table;
  }
  *hal = chip->opened;
  return FLAGOS_OK;
}

flagos_status flagos_choose(const char* name, char* buffer, size_t n) {
  if (!buffer || n == 0) return flagos::fail(FLAGOS_INVALID_ARGUMENT, "flagos_choose: no buffer");
  std::lock_guard<std::mutex> lock(registry().mutex);
  flagos::Chip* chip = nullptr;
  if (flagos_status status = flagos::choose(name, &chip)) return status;
  size_t length = std::min(n - 1, chip->name.size());
  memcpy(buffer, chip->name.data(), length);
  buffer[length] = '\0';
  return FLAGOS_OK;
}

int32_t flagos_chip_count(void) { return static_cast<int32_t>(registry().chips.size()); }

const char* flagos_chip_name(int32_t index) {
  if (index < 0 || index >= flagos_chip_count()) return nullptr;
  return registry().chips[static_cast<size_t>(index)]->name.c_str();
}

size_t flagos_chip_report(const char* name, char* buffer, size_t n) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  std::string text;
  for (const auto& chip : registry().chips) {
    if (!name || chip->name == name) flagos::report(*chip, &text);
  }
  if (!registry().broken.empty()) text += "not usable: " + registry().broken + "\n";
  if (text.empty()) text = std::string("no chip is named ") + name + "\n";
  if (buffer && n) {
    size_t length = std::min(n - 1, text.size());
    memcpy(buffer, text.data(), length);
    buffer[length] = '\0';
  }
  return text.size();
}
