// dynlib.h: opening a vendor's library at run time. A chip lists the functions it uses in a table, each REQUIRED or
// OPTIONAL, and where the library may be; what was tried and why it failed is kept for people to read.
#ifndef FLAGOS_DYNLIB_H_
#define FLAGOS_DYNLIB_H_

#include <cstddef>
#include <string>
#include <vector>

namespace flagos {

struct Candidate {
  std::string path;
  bool only_if_loaded = false;  // take the copy that is already in the process (torch's), never load one
};

/// One function: its full name, where its address goes, and whether the chip can do without it.
struct Symbol {
  std::string name;
  void** address;
  bool required;
};

struct Library {
  void* handle = nullptr;  // NULL: none of the candidates served
  std::string path;
  std::string tried;  // "tried: A: reason; B: reason"
};

/// Opens the first candidate that has every required symbol and fills the addresses (NULL for a missing optional one).
/// Addresses are untouched on failure. The outcome of every candidate is also logged for `chip` (see below).
Library open_library(const std::string& chip, const std::vector<Candidate>& candidates,
                     const std::vector<Symbol>& symbols);

/// Lines about what a chip tried, for flagos_chip_report.
void log_attempt(const std::string& chip, const std::string& line);
std::vector<std::string> attempts(const std::string& chip);

}  // namespace flagos
#endif  // FLAGOS_DYNLIB_H_
