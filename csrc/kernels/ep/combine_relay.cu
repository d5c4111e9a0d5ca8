// Combine between nodes, hybrid mode, after combine_stage: for every row that came to this rank as the relay, add up what
// the node's ranks made of it, in fp32, in top-k order, and put the sum into its owner's window.
//
// In each group of warps the first feeds the ring, the last sends rows that the others have written.
#include "ep/slots.cuh"
#include "ep/sum_rows.cuh"

using namespace epv2;

namespace {

// The producer warp's walk over this rank's arrivals.
__device__ void produce(const CombineArgs& args, const Ring& ring, uint8_t** peers, int first, int step, int arrived) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp;
  const int32_t* relayed = reinterpret_cast<const int32_t*>(args.relayed);
  const int32_t* slots = own_pointer<int32_t>(c, args.slots_offset);
  uint8_t* outgoing = own_pointer<uint8_t>(c, args.outgoing_offset);
  Producer producer(ring);

  // What is known here is fetched two rows ahead, and what depends on it, from far away, one row ahead.
  auto fetch_rank = [&](int arrival) {
    if (lane >= c.num_topk || arrival >= arrived) return -1;
    const int expert = packed_expert(relayed[static_cast<int64_t>(arrival) * (1 + c.num_topk) + 1 + lane]);
    const int rank = expert < 0 ? -1 : expert / c.num_local_experts;
    return rank >= 0 && is_near(c, rank) ? rank - c.lsa_begin : -1;
  };
  auto fetch_slot = [&](int arrival, int rank) {
    return rank < 0 ? -1 : slots[static_cast<int64_t>(arrival) * c.lsa_size + rank];
  };
  auto fetch_place = [&](int rank, int slot) {
    if (rank < 0) return -1;
    if (!c.by_row) return slot;
    return reinterpret_cast<const int32_t*>(peers[rank] + args.table_offset)[static_cast<int64_t>(slot) * c.num_topk + lane];
  };
  auto fetch_weight = [&](int rank, int slot) {
    if (rank < 0 || !c.has_weights) return 0.0f;
    return reinterpret_cast<const float*>(peers[rank] + args.weights_offset)[static_cast<int64_t>(slot) * c.num_topk + lane];
  };
  int arrival = first;
  int rank = fetch_rank(arrival), next_rank = fetch_rank(arrival + step);
  int slot = fetch_slot(arrival, rank), next_slot = fetch_slot(arrival + step, next_rank);
  int place = fetch_place(rank, slot);
  float weight = fetch_weight(rank, slot);
  for (; arrival < arrived; arrival += step) {
    const int later_rank = fetch_rank(arrival + 2 * step), later_slot = fetch_slot(arrival + 2 * step, later_rank);
    const int next_place = fetch_place(next_rank, next_slot);
    const float next_weight = fetch_weight(next_rank, next_slot);
    uint8_t* out = outgoing + static_cast<int64_t>(arrival) * args.return_stride;
    if (c.has_weights && lane < c.num_topk) reinterpret_cast<float*>(out + args.row_bytes)[lane] = weight;
    __syncwarp();  // the row's first piece, which lane 0 feeds, tells of all lanes' weights
    const uint32_t same = __match_any_sync(0xffffffffu, rank < 0 ? -1 - lane : rank);
    const bool adds = rank >= 0 && place >= 0 && (c.by_row || (same >> lane) == 1u);
    const uint8_t* from = adds ? peers[rank] + args.rows_offset + static_cast<int64_t>(place) * args.row_bytes : nullptr;
    const uint32_t present = __ballot_sync(0xffffffffu, adds);
    for (int offset = 0; offset < args.row_bytes; offset += args.piece_bytes) {
      const int bytes = min(args.piece_bytes, args.row_bytes - offset);
      for (uint32_t left = present; left != 0; left &= left - 1) {
        producer.push(shuffle_pointer(from, __ffs(left) - 1) + offset, out + offset, bytes, left == present,
                      (left & (left - 1)) == 0);
      }
    }
    rank = next_rank;
    next_rank = later_rank;
    slot = next_slot;
    next_slot = later_slot;
    place = next_place;
    weight = next_weight;
  }
  producer.end();
}

// The last warp of a group: send what its consumers have written. `done` has a word for each of them.
__device__ void send(const CombineArgs& args, const uint32_t* done, int consumers, int context, int first, int step,
                     int arrived) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp;
  const int32_t* relayed = reinterpret_cast<const int32_t*>(args.relayed);
  uint32_t rows = 0;
  for (int arrival = first; arrival < arrived; arrival += step) {
    rows++;
    const int32_t* mine = relayed + static_cast<int64_t>(arrival) * (1 + c.num_topk);
    const uint32_t word = lane < c.num_topk ? static_cast<uint32_t>(mine[1 + lane]) : 0;
    const int expert = lane < c.num_topk ? packed_expert(word) : -1;
    const bool here = expert >= 0 && is_near(c, expert / c.num_local_experts);
    const int order = __shfl_sync(0xffffffffu, packed_order(word), __ffs(__ballot_sync(0xffffffffu, here)) - 1);
    if (lane < consumers) {
      while (static_cast<int32_t>(published(done + lane) - rows) < 0) pause();
    }
    __syncwarp();
    if (lane == 0) {
      const int64_t row = static_cast<int64_t>(mine[0] % c.max_tokens) * args.num_returns + order;
      const int bytes = c.has_weights ? args.row_bytes + c.num_topk * 4 : args.row_bytes;
      network_put(network(c, context), mine[0] / c.max_tokens, c.window,
                  args.returned_offset + static_cast<uint64_t>(row) * args.return_stride,
                  args.outgoing_offset + static_cast<uint64_t>(arrival) * args.return_stride, bytes);
    }
  }
}

}  // namespace

// Shared memory: see make_ring; then the addresses of the node's windows, then a word for each consumer warp.
EPV2_KERNEL(epv2_combine_relay, CombineArgs, 640) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c), count = *state_word(c, kCombines) + 1;
  const int context = blockIdx.x % c.contexts;
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  uint8_t** peers = reinterpret_cast<uint8_t**>(behind_rings(args));
  uint32_t* done = reinterpret_cast<uint32_t*>(peers + c.lsa_size);
  for (int p = threadIdx.x; p < c.lsa_size; p += blockDim.x) peers[p] = near_pointer(c, 0, c.lsa_begin + p);
  for (int i = threadIdx.x; i < static_cast<int>(blockDim.x / kWarp); i += blockDim.x) done[i] = 0;
  init_rings(args, 2);

  if (!wait_node(c, kSumsReady, number, true, scratch) || !wait_owners(c, number, count, scratch)) return;
  const int group_warps = blockDim.x / kWarp / args.num_groups, warp = threadIdx.x / kWarp;
  const int group = warp / group_warps, role = warp % group_warps, consumers = group_warps - 2;
  const int first = blockIdx.x + gridDim.x * group, step = gridDim.x * args.num_groups;
  const int arrived = Counts(args.counts, c).arrived();
  const Ring ring = make_ring(args, group);
  if (role == 0) {
    produce(args, ring, peers, first, step, arrived);
  } else if (role == group_warps - 1) {
    send(args, done + group * consumers, consumers, context, first, step, arrived);
  } else {
    consume(ring, role - 1, last_vectors(args), num_pieces(args), done + group * consumers + role - 1);
  }
  tell_owners(c, context, scratch);
}
