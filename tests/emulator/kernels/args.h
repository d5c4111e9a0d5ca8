#pragma once

#include <cstdint>

struct TestArgs {
  uint64_t in;
  uint64_t out;
  uint64_t window;
  int32_t mode;
  int32_t count;
  int32_t rank;
  int32_t ranks;
};
