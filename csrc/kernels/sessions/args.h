// Arguments of the kernels behind all-gather sessions. Addresses are of device memory.
#pragma once
#include <cstdint>

struct ReduceScatterArgs {
  uint64_t window;    // whose part of each rank is summed
  uint64_t offset;    // of what belongs to that rank, in every rank's window
  uint64_t out;       // the sums
  uint64_t count;     // values
  double scale;       // factor on each sum
  uint64_t incoming;  // in this rank's window: what other ranks, or nodes, have brought, that of rank r the r-th
  int32_t num_ranks;
  int32_t first;  // rank whose part lies in a window of this node
  int32_t near;   // such ranks
  int32_t own;    // this rank's index there
  int32_t piece_bytes;  // of a part that travel at once
  int32_t num_groups;   // independent rings of a CTA
  int32_t num_slots;    // pieces of a ring
};
