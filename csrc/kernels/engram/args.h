// Arguments of Engram's kernels. Addresses are device addresses, 0 = absent; offsets are bytes from the start of every
// rank's window. `Common::window` is Engram's own, which has flags and what ranks tell each other, never rows.
//
// A row of the table: values, scale factors at `scale_offset`, `row_stride` bytes from one row to the next.
#pragma once
#include <cstdint>

#include "ep/args.h"

struct EngramWriteArgs {
  Common common;
  uint64_t table;         // rows of this rank
  uint64_t rows;          // int64 [num_rows]: which of them; 0 = the first ones
  uint64_t data;          // [num_rows, data_bytes]
  uint64_t scales;        // [num_rows, scale_bytes]
  uint64_t host;          // word of mapped host memory that becomes host_tag when nobody reads the old rows any more
  int64_t num_rows;
  int64_t table_rows;     // of each rank
  uint32_t host_tag;
  int32_t data_bytes;     // of a row
  int32_t scale_bytes;
  int32_t scale_offset;
  int32_t row_stride;
};

struct EngramFetchArgs {
  Common common;
  uint64_t parts;         // uint64 [ranks of the node]: addresses of their parts of the table, in GPU or host memory
  uint64_t table;         // between nodes: ncclWindow_t, rows from its start
  uint64_t landing_offset;  // in `table`: where rows of other nodes land, `tile` for each CTA
  uint64_t indices;       // int64 [num_entries], -1 = zeros
  uint64_t out;           // [num_entries, data_bytes]
  uint64_t out_scales;    // [num_entries, scale_bytes]
  uint64_t slots;         // uint32 [num_slots]: hash table of entries, empty: all ones
  uint64_t stale_slots;   // uint32 [num_stale]: that of the fetch before, which is emptied
  uint64_t leaders;       // int32 [num_entries]: which entry fetches the row
  uint64_t counters;      // uint64 [3]: rows pulled from other ranks so far, the entries that they were for, and rows of
                          // other nodes
  uint64_t host_counters; // the same in mapped host memory
  int64_t table_rows;
  int32_t num_entries;
  int32_t num_slots;      // power of two, more than num_entries
  int32_t num_stale;
  int32_t tile;           // between nodes: entries that a CTA fetches at once
  int32_t settled;        // 1: in one node, no row has changed since the last fetch
  int32_t data_bytes;
  int32_t scale_bytes;
  int32_t scale_offset;
  int32_t row_stride;
};

struct EngramGroupArgs {
  Common common;
  uint64_t indices;       // int64 [num_entries], -1 = none
  uint64_t staging;       // ncclWindow_t: rows and sums for their owners
  uint64_t keys;          // uint64 [2, num_entries]: where they are sorted, to and fro
  uint64_t items;         // int32 [2, num_entries]: likewise, the entry that each key is of
  uint64_t counts;        // int32 [257, CTAs]
  uint64_t begins;        // int32 [num_entries + 1]: out, where the entries of each distinct row begin
  uint64_t distinct;      // int64 [num_entries]: out, distinct rows, ascending
  uint64_t host;          // words of mapped host memory: a tag, then what the host has to know
  uint64_t told_offset;   // Told [P]
  uint64_t room_offset;   // Room [P]
  uint64_t rows_offset;   // int64, staged rows
  uint64_t arrived_rows_offset;  // int64, rows from other nodes
  int64_t table_rows;
  uint32_t host_tag;
  int32_t from_peers;     // 1 = what is grouped are the rows that all ranks staged for this one
  int32_t num_entries;
  int32_t num_passes;     // bytes of a key that count
};

struct EngramSumArgs {
  Common common;
  uint64_t values;        // [entries, hidden] to sum
  uint64_t staging;
  uint64_t items;         // int32: entries, sorted by row
  uint64_t begins;        // int32 [num_rows + 1]
  uint64_t distinct;      // int64 [num_rows]
  uint64_t out;           // fp32 [num_rows, hidden]
  uint64_t out_rows;      // int64 [num_rows]
  uint64_t told_offset;
  uint64_t sums_offset;   // fp32, staged sums
  uint64_t arrived_sums_offset;  // fp32, sums from other nodes
  int32_t from_peers;     // 1 = what is summed is what all ranks staged for this one
  int32_t num_rows;
  int32_t hidden;
  int32_t width;          // values of a load: 4, or 1 where rows don't begin at multiples of that
};

// Only between nodes: rows and sums go to their owners there.
struct EngramPutArgs {
  Common common;
  uint64_t staging;
  uint64_t room_offset;
  uint64_t rows_offset;
  uint64_t sums_offset;
  uint64_t arrived_rows_offset;
  uint64_t arrived_sums_offset;
  int64_t table_rows;
  int32_t num_rows;       // staged
  int32_t hidden;
};
