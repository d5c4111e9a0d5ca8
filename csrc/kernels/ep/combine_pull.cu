// Combine, last kernel: each token's owner reads what the ranks made of it from their windows and adds it up in fp32,
// the bias first, then in top-k order: one sum per rank at the last position that led to the rank, or, with `by_row`,
// every expert row at its own position.
#include "ep/sum_rows.cuh"

using namespace epv2;

namespace {

// The producer warp's walk over this rank's tokens.
__device__ void produce(const CombineArgs& args, int group, const Ring& ring, uint8_t** peers) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp, step = gridDim.x * args.num_groups;
  const int64_t* topk = reinterpret_cast<const int64_t*>(args.topk_idx);
  uint8_t* out = reinterpret_cast<uint8_t*>(args.out);
  const int num_biases = (args.bias_0 != 0 ? 1 : 0) + (args.bias_1 != 0 ? 1 : 0);
  Producer producer(ring);

  // Experts are fetched two tokens ahead, and what depends on them, from far away, one token ahead.
  auto fetch_expert = [&](int token) {
    return lane < c.num_topk && token < args.num_tokens
               ? static_cast<int>(topk[static_cast<int64_t>(token) * c.num_topk + lane])
               : -1;
  };
  auto fetch_place = [&](int token, int expert) {
    if (expert < 0) return -1;
    const int64_t at = (static_cast<int64_t>(c.rank) * c.max_tokens + token) * c.num_topk + lane;
    return reinterpret_cast<const int32_t*>(peers[expert / c.num_local_experts] + args.table_offset)[at];
  };
  auto fetch_weight = [&](int token, int expert) {
    if (expert < 0 || !c.has_weights) return 0.0f;
    const int64_t at = (static_cast<int64_t>(c.rank) * c.max_tokens + token) * c.num_topk + lane;
    return reinterpret_cast<const float*>(peers[expert / c.num_local_experts] + args.weights_offset)[at];
  };
  int token = blockIdx.x + gridDim.x * group;
  int expert = fetch_expert(token), next_expert = fetch_expert(token + step);
  int place = c.by_row ? fetch_place(token, expert) : -1;
  float weight = fetch_weight(token, expert);
  for (; token < args.num_tokens; token += step) {
    const int later_expert = fetch_expert(token + 2 * step);
    const int next_place = c.by_row ? fetch_place(token + step, next_expert) : -1;
    const float next_weight = fetch_weight(token + step, next_expert);
    const int rank = expert < 0 ? -1 : expert / c.num_local_experts;
    const uint8_t* from = nullptr;
    if (c.by_row) {
      if (place >= 0) from = peers[rank] + args.rows_offset + static_cast<int64_t>(place) * args.row_bytes;
    } else {
      const uint32_t same = __match_any_sync(0xffffffffu, rank < 0 ? -1 - lane : rank);
      if (rank >= 0 && (same >> lane) == 1u) {
        from = peers[rank] + args.rows_offset +
               (static_cast<int64_t>(c.rank) * c.max_tokens + token) * args.row_bytes;
      }
    }
    if (c.has_weights && lane < c.num_topk) {
      reinterpret_cast<float*>(args.out_weights)[static_cast<int64_t>(token) * c.num_topk + lane] = weight;
    }
    const uint32_t present = __ballot_sync(0xffffffffu, from != nullptr);
    const int64_t row = static_cast<int64_t>(token) * args.row_bytes;
    for (int offset = 0; offset < args.row_bytes; offset += args.piece_bytes) {
      const int bytes = min(args.piece_bytes, args.row_bytes - offset);
      uint8_t* to = out + row + offset;
      for (int i = 0; i < num_biases; i++) {
        const uint64_t bias = i == 0 ? args.bias_0 : args.bias_1;
        producer.push(reinterpret_cast<const uint8_t*>(bias) + row + offset, to, bytes, i == 0, present == 0 && i == num_biases - 1);
      }
      if (present == 0 && num_biases == 0) producer.push_zero(to);
      for (uint32_t left = present; left != 0; left &= left - 1) {
        const uint64_t pointer = reinterpret_cast<uint64_t>(from);
        const int lead = __ffs(left) - 1;
        const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(pointer), lead);
        const uint32_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(pointer >> 32), lead);
        producer.push(reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(high) << 32 | low) + offset, to, bytes,
                      num_biases == 0 && left == present, (left & (left - 1)) == 0);
      }
    }
    expert = next_expert;
    next_expert = later_expert;
    place = next_place;
    weight = next_weight;
  }
  producer.end();
}

}  // namespace

// Shared memory: see make_ring; the ranks' window addresses follow the rings.
EPV2_KERNEL(epv2_combine_pull, CombineArgs, 768) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  uint8_t** peers = reinterpret_cast<uint8_t**>(behind_rings(args));
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) peers[p] = peer_pointer(c.window, 0, p);
  init_rings(args);

  if (!wait_all(c, kSumsReady, number, true, scratch)) {
    poison(args.out, static_cast<uint64_t>(args.num_tokens) * args.row_bytes);
    poison(args.out_weights, static_cast<uint64_t>(args.num_tokens) * c.num_topk * 4);
    return;
  }
  run_rings(args, [&](int group, const Ring& ring) { produce(args, group, ring, peers); });
  if (last_to_arrive(c, kArrived, scratch)) {
    signal_all(c, kCombineDone, number);
    if (threadIdx.x == 0) finish_operation(c, kLastCombine, number);
  }
}
