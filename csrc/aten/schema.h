// schema.h: what an operator's schema says, read at compile time.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace flagos {

// For each argument of "name(type a, type b=default, *, type c) -> ..." whether its type is marked as written to:
// "Tensor(a!)", "Tensor(a!)[]". count: of those that were found; N: how many the operator's C++ signature has.
template <size_t N>
struct WrittenArguments {
  std::array<bool, N> written{};
  size_t count = 0;
  bool any = false;
};

template <size_t N>
constexpr WrittenArguments<N> written_arguments(std::string_view schema) {
  WrittenArguments<N> result;
  size_t i = 0;
  while (i < schema.size() && schema[i] != '(') ++i;
  int depth = 0;  // of brackets and parentheses; 1 between arguments
  bool empty = true, marked = false;
  for (; i < schema.size(); ++i) {
    const char c = schema[i];
    if (c == ')' || c == ']') --depth;
    if (depth == 0 && c == ')' && empty) break;
    if (depth == 0 || (depth == 1 && c == ',')) {
      if (!empty) {
        if (result.count < N) result.written[result.count] = marked;
        result.any = result.any || marked;
        ++result.count;
      }
      if (depth == 0 && c == ')') break;
      empty = true;
      marked = false;
    } else if (depth > 1 && c == '!') {
      marked = true;
    } else if (c != ' ' && c != '*') {
      empty = false;
    }
    if (c == '(' || c == '[') ++depth;
  }
  return result;
}

}  // namespace flagos
