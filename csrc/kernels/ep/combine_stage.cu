// Combine, first kernel: put what goes back to the tokens' owners where they can read it.
//
// Each received row becomes the sum of its expert rows, in top-k order, in fp32, rounded once. Its place follows from its
// source rank and token: both sides know it. With `by_row` the expert rows lie in the window already, and a table, which
// all threads fill, tells owners where. Rows from other nodes have places of their own, of which their relay is told.
#include "ep/slots.cuh"
#include "ep/sum_rows.cuh"

using namespace epv2;

namespace {

constexpr int kAhead = 4;  // entries that a thread loads before it stores the first

// Where each expert row lies, and its weight, by source rank, token and top-k position.
__device__ void fill_table(const CombineArgs& args) {
  const Common& c = args.common;
  const Counts counts(args.counts, c);
  const Slots slots(args);
  const int32_t* metadata = reinterpret_cast<const int32_t*>(args.metadata);
  const float* weights = reinterpret_cast<const float*>(args.weights);
  uint8_t* window = own_pointer<uint8_t>(c, 0);
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
      const int number = static_cast<int>(entry / c.num_topk);
      const int32_t* row = metadata + static_cast<int64_t>(number) * (2 + c.num_topk);
      slot[j] = slots.of(number, row[0]);
      if (kNodes && entry % c.num_topk == 0) slots.tell(number, row[0], slot[j]);
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
  uint8_t* window = own_pointer<uint8_t>(c, 0);
  const Slots slots(args);
  Producer producer(ring);

  // The metadata of the next row is on its way while this one is fed to the ring.
  int row = blockIdx.x + gridDim.x * group, next_source = 0, next_place = -1;
  auto fetch = [&](int at) {
    next_place = -1;
    if (at >= num_rows) return;
    const int32_t* from = metadata + static_cast<int64_t>(at) * width;
    next_source = from[0];
    if (args.expand && lane < c.num_topk) next_place = from[2 + lane];
    if (!args.expand && lane == 0) next_place = at;
  };
  fetch(row);
  for (; row < num_rows; row += step) {
    const int slot = slots.of(row, next_source), place = next_place;
    if (lane == 0) slots.tell(row, next_source, slot);
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
  if (!wait_node(c, kCombineDone, *state_word(c, kLastCombine), false, scratch)) return;
  if (kNodes && blockIdx.x == 0) {
    // This rank has read what came back from other nodes the last time, too.
    if (threadIdx.x == 0) write_record(c, number);
    __syncthreads();
    for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) send_record(c, remote(c, i), kReturnsFree);
  }
  if (c.by_row) {
    fill_table(args);
  } else {
    run_rings(args, [&](int group, const Ring& ring) { produce(args, group, ring); });
  }
  if (last_to_arrive(c, kArrived, scratch)) signal_node(c, kSumsReady, number);
}
