// Rows of this rank's part of the table, all or some, once no peer reads the old ones any more.
#include "engram/engram.cuh"

using namespace epv2;

// Shared memory: 16 bytes, then kTile row numbers.
EPV2_KERNEL(epv2_engram_write, EngramWriteArgs, 1024) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  int64_t* targets = reinterpret_cast<int64_t*>(scratch + 4);
  if (!wait_everybody(c, kFetchDone, *state_word(c, kLastFetch), *state_word(c, kFetches), false, scratch)) return;

  const Parts parts(args.data_bytes, args.scale_bytes);
  const int64_t* rows = reinterpret_cast<const int64_t*>(args.rows);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTile; first < args.num_rows;
       first += static_cast<int64_t>(gridDim.x) * kTile) {
    const int count = static_cast<int>(min(args.num_rows - first, static_cast<int64_t>(kTile)));
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int64_t row = rows == nullptr ? first + i : rows[first + i];
      targets[i] = row;
      if (row < 0 || row >= args.table_rows) {
        refuse_row(c, kFetchDone, first + i, row);
        targets[i] = -1;
      }
    }
    __syncthreads();
    move_parts<4>(
        count, parts.all,
        [&](int i, int part) {
          return load_part(parts.place(args.data, args.scales, first + i, part), parts.bytes(part));
        },
        [&](int i, int part, uint4 v) {
          if (targets[i] < 0) return;
          uint8_t* row = reinterpret_cast<uint8_t*>(args.table) + targets[i] * args.row_stride;
          store_part(row + (parts.is_scale(part) ? args.scale_offset : 0) + parts.offset(part), v, parts.bytes(part));
        });
    __syncthreads();
  }
  if (last_to_arrive(c, kArrived, scratch) && threadIdx.x == 0) {
    finish_operation(c, kSequence, number);
    if (args.host != 0) store_release_system(reinterpret_cast<uint32_t*>(args.host), args.host_tag);
  }
}
