// Arguments of the benchmark kernels. Addresses are of device memory.
#pragma once
#include <cstdint>

struct SmCopyArgs {
  uint64_t source;     // rows to read
  uint64_t target;     // room for rows * writes of them
  uint32_t rows;       // rows to read, or to write where none are read
  uint32_t row_bytes;  // a multiple of 16
  uint32_t reads;      // 1 = read each row, 0 = write what shared memory holds
  uint32_t writes;     // times that each row is written, side by side; 0 = read only
  uint32_t stages;     // rows in flight for each warp, 2 to 32
};
