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

struct NetworkArgs {
  uint64_t window;
  uint64_t communicator;
  uint64_t out;
  int32_t mode;
  int32_t count;
  int32_t rank;
  int32_t ranks;
  int32_t lsa_size;
  int32_t rail;
};
