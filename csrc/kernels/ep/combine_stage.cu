// Combine, first kernel: put what goes back to the tokens' owners where they can read it.
//
// Each received row becomes the sum of its expert rows, in top-k order, in fp32, rounded once. Its place is source
// rank * M + token: both sides know it. With `by_row` the expert rows lie in the window already, and a table tells owners
// where.
#include "ep/sum_rows.cuh"

using namespace epv2;

namespace {

// The producer warp's walk over the rows that this rank received.
__device__ void produce(const CombineArgs& args, int group, const Ring& ring) {
  const Common& c = args.common;
  const Counts counts(args.counts, c);
  const int lane = threadIdx.x % kWarp, width = 2 + c.num_topk;
  const int num_rows = counts.total(c.num_local_experts), step = gridDim.x * args.num_groups;
  const int32_t* metadata = reinterpret_cast<const int32_t*>(args.metadata);
  const uint8_t* x = reinterpret_cast<const uint8_t*>(args.x);
  uint8_t* window = peer_pointer(c.window, 0, c.rank);
  Producer producer(ring);

  // The metadata of the next row is on its way while this one is fed to the ring.
  int row = blockIdx.x + gridDim.x * group, next_slot = 0, next_place = -1;
  auto fetch = [&](int at) {
    next_place = -1;
    if (at >= num_rows) return;
    const int32_t* from = metadata + static_cast<int64_t>(at) * width;
    next_slot = from[0];
    if (args.expand && lane < c.num_topk) next_place = from[2 + lane];
    if (!args.expand && lane == 0) next_place = at;
  };
  fetch(row);
  for (; row < num_rows; row += step) {
    const int slot = next_slot, place = next_place;
    fetch(row + step);
    if (lane < c.num_topk) {
      const int64_t at = static_cast<int64_t>(slot) * c.num_topk + lane;
      if (c.by_row) reinterpret_cast<int32_t*>(window + args.table_offset)[at] = place;
      if (c.has_weights) {
        const float* weights = reinterpret_cast<const float*>(args.weights);
        float weight = 0;
        if (!args.expand) weight = weights[static_cast<int64_t>(row) * c.num_topk + lane];
        if (args.expand && place >= 0) weight = weights[place];
        reinterpret_cast<float*>(window + args.weights_offset)[at] = weight;
      }
    }
    if (c.by_row) continue;
    const uint32_t present = __ballot_sync(0xffffffffu, place >= 0);
    uint8_t* out = window + args.rows_offset + static_cast<int64_t>(slot) * args.row_bytes;
    for (int offset = 0; offset < args.row_bytes; offset += args.piece_bytes) {
      for (uint32_t left = present; left != 0; left &= left - 1) {
        const int64_t at = static_cast<int64_t>(__shfl_sync(0xffffffffu, place, __ffs(left) - 1)) * args.row_bytes;
        producer.push(x + at + offset, out + offset, min(args.piece_bytes, args.row_bytes - offset), left == present,
                      (left & (left - 1)) == 0);
      }
    }
  }
  producer.end();
}

}  // namespace

// Shared memory: see make_ring.
EPV2_KERNEL(epv2_combine_stage, CombineArgs, 768) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  init_rings(args);

  // Peers may still be reading what the last combine put there.
  if (!wait_all(c, kCombineDone, *state_word(c, kLastCombine), false, scratch)) return;
  run_rings(args, [&](int group, const Ring& ring) { produce(args, group, ring); });
  if (last_to_arrive(c, kArrived, scratch)) signal_all(c, kSumsReady, number);
}
