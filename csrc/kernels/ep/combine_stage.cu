// Combine, first kernel: put what goes back to the tokens' owners where they can read it.
//
// Each received row becomes the sum of its expert rows, in top-k order, in fp32, rounded once. Its place is source
// rank * M + token: both sides know it. With `by_row` the expert rows lie in the window already, and a table, which all
// threads fill, tells owners where.
#include "ep/sum_rows.cuh"

using namespace epv2;

namespace {

constexpr int kAhead = 4;  // entries that a thread loads before it stores the first

// Where each expert row lies, and its weight, by source rank, token and top-k position.
__device__ void fill_table(const CombineArgs& args) {
  const Common& c = args.common;
  const Counts counts(args.counts, c);
  const int32_t* metadata = reinterpret_cast<const int32_t*>(args.metadata);
  const float* weights = reinterpret_cast<const float*>(args.weights);
  uint8_t* window = peer_pointer(c.window, 0, c.rank);
  int32_t* table = reinterpret_cast<int32_t*>(window + args.table_offset);
  float* weights_out = reinterpret_cast<float*>(window + args.weights_offset);
  const int64_t num_entries = static_cast<int64_t>(counts.total(c.num_local_experts)) * c.num_topk;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; first < num_entries;
       first += kAhead * step) {
    int slot[kAhead], place[kAhead];
    float weight[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      const int64_t entry = first + j * step;
      if (entry >= num_entries) continue;
      const int32_t* row = metadata + entry / c.num_topk * (2 + c.num_topk);
      slot[j] = row[0];
      place[j] = row[2 + entry % c.num_topk];
    }
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      weight[j] = first + j * step < num_entries && c.has_weights && place[j] >= 0 ? weights[place[j]] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      const int64_t entry = first + j * step;
      if (entry >= num_entries) continue;
      const int64_t at = static_cast<int64_t>(slot[j]) * c.num_topk + entry % c.num_topk;
      table[at] = place[j];
      if (c.has_weights) weights_out[at] = weight[j];
    }
  }
}

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
    if (c.has_weights && lane < c.num_topk) {
      const float* weights = reinterpret_cast<const float*>(args.weights);
      float weight = 0;
      if (!args.expand) weight = weights[static_cast<int64_t>(row) * c.num_topk + lane];
      if (args.expand && place >= 0) weight = weights[place];
      reinterpret_cast<float*>(window + args.weights_offset)[static_cast<int64_t>(slot) * c.num_topk + lane] = weight;
    }
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
  if (!c.by_row) init_rings(args);

  // Peers may still be reading what the last combine put there.
  if (!wait_all(c, kCombineDone, *state_word(c, kLastCombine), false, scratch)) return;
  if (c.by_row) {
    fill_table(args);
  } else {
    run_rings(args, [&](int group, const Ring& ring) { produce(args, group, ring); });
  }
  if (last_to_arrive(c, kArrived, scratch)) signal_all(c, kSumsReady, number);
}
