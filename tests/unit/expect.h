// expect.h: what the small test programs count. Their exit status is the number of failures.
#pragma once

#include <cstdio>

inline int failures = 0;

#define EXPECT(condition)                                             \
  do {                                                                \
    if (!(condition)) {                                               \
      failures++;                                                     \
      std::printf("FAIL %s:%d %s\n", __func__, __LINE__, #condition); \
    }                                                                 \
  } while (0)
