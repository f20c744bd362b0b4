// schema_test.cc: reads a schema per line, writes for each the arguments that csrc/aten/schema.h says are written to,
// as a string of 0 and 1.
#include <iostream>
#include <string>

#include "csrc/aten/schema.h"

int main() {
  std::string line;
  while (std::getline(std::cin, line)) {
    const auto found = flagos::written_arguments<128>(line);
    bool any = false;
    for (size_t i = 0; i < found.count; ++i) {
      std::cout << (found.written[i] ? '1' : '0');
      any = any || found.written[i];
    }
    std::cout << (any == found.any ? "\n" : "?\n");
  }
}
