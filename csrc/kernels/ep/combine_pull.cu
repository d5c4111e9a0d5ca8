// Combine, last kernel: each token's owner reads what the ranks made of it from their windows and adds it up in fp32,
// the bias first, then in top-k order: one sum per rank at the last position that led to the rank, or, with `by_row`,
// every expert row at its own position. What ranks of other nodes made of it has come into this rank's window; in hybrid
// mode that is one sum per node, at the last position that led to the node.
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
  // The slot of this rank's token at the ranks of its node.
  auto slot_of = [&](int token) { return static_cast<int64_t>(c.rank - near_begin(c)) * c.max_tokens + token; };
  // All lanes: the row of the token that came back from another node for this lane's expert, -1 = none.
  auto find_returned = [&](int token, int expert) {
    if constexpr (!kNodes) return -1;
    const int target = target_of(c, expert);
    const uint32_t same = __match_any_sync(0xffffffffu, target < 0 ? -1 - lane : target);
    const uint32_t lasts = __ballot_sync(0xffffffffu, target >= 0 && (same >> lane) == 1u);
    if (target < 0) return -1;
    const uint32_t before = lasts & same ? (lasts & same) - 1 : 0;
    return token * args.num_returns + (c.by_row && !c.rail ? lane : __popc(lasts & before));
  };
  const uint8_t* returned_rows = own_pointer<uint8_t>(c, args.returned_offset);
  auto fetch_place = [&](int token, int expert) {
    if (expert < 0 || !is_near(c, expert / c.num_local_experts)) return -1;
    const int64_t at = slot_of(token) * c.num_topk + lane;
    return reinterpret_cast<const int32_t*>(peers[expert / c.num_local_experts] + args.table_offset)[at];
  };
  auto fetch_weight = [&](int token, int expert, int returned) {
    if (expert < 0 || !c.has_weights) return 0.0f;
    if (kNodes && returned >= 0) {
      const uint8_t* row = returned_rows + static_cast<int64_t>(returned) * args.return_stride;
      return reinterpret_cast<const float*>(row + args.row_bytes)[lane];
    }
    const int64_t at = slot_of(token) * c.num_topk + lane;
    return reinterpret_cast<const float*>(peers[expert / c.num_local_experts] + args.weights_offset)[at];
  };
  int token = blockIdx.x + gridDim.x * group;
  int expert = fetch_expert(token), next_expert = fetch_expert(token + step);
  int place = c.by_row ? fetch_place(token, expert) : -1, returned = find_returned(token, expert);
  float weight = fetch_weight(token, expert, returned);
  for (; token < args.num_tokens; token += step) {
    const int later_expert = fetch_expert(token + 2 * step);
    const int next_place = c.by_row ? fetch_place(token + step, next_expert) : -1;
    const int next_returned = find_returned(token + step, next_expert);
    const float next_weight = fetch_weight(token + step, next_expert, next_returned);
    const int rank = expert < 0 ? -1 : expert / c.num_local_experts;
    const uint8_t* from = nullptr;
    // Whether this is the last position that leads to what it leads to: a rank, or another node.
    const int target = kNodes && c.rail && returned >= 0 ? c.num_ranks + rank / c.lsa_size : rank;
    const uint32_t same = __match_any_sync(0xffffffffu, rank < 0 ? -1 - lane : target);
    const bool last = rank >= 0 && (same >> lane) == 1u;
    if (kNodes && returned >= 0) {
      if (last || (c.by_row && !c.rail)) from = returned_rows + static_cast<int64_t>(returned) * args.return_stride;
    } else if (c.by_row) {
      if (place >= 0) from = peers[rank] + args.rows_offset + static_cast<int64_t>(place) * args.row_bytes;
    } else if (last) {
      from = peers[rank] + args.rows_offset + slot_of(token) * args.row_bytes;
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
        producer.push(shuffle_pointer(from, __ffs(left) - 1) + offset, to, bytes, num_biases == 0 && left == present, (left & (left - 1)) == 0);
      }
    }
    expert = next_expert;
    next_expert = later_expert;
    place = next_place;
    returned = next_returned;
    weight = next_weight;
  }
  producer.end();
}

// All threads of the CTA: wait until other nodes have sent everything that is this rank's.
__device__ bool wait_returned(const Common& c, uint32_t number, uint32_t* scratch) {
  const uint32_t count = *state_word(c, kCombines) + 1;
  for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
    wait_signal(c, kReturned, remote(c, i), count, kSumsReady, number, true, c.contexts);
  }
  const bool gave_up = agree_failed(c, scratch);
  fence_proxy_async();
  return !gave_up;
}

}  // namespace

// Shared memory: see make_ring; the ranks' window addresses follow the rings.
EPV2_KERNEL(epv2_combine_pull, CombineArgs, 768) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  uint8_t** peers = reinterpret_cast<uint8_t**>(behind_rings(args));
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) {
    peers[p] = is_near(c, p) ? near_pointer(c, 0, p) : nullptr;
  }
  init_rings(args);

  bool ready = wait_node(c, kSumsReady, number, true, scratch);
  if constexpr (kNodes) ready = ready && wait_returned(c, number, scratch);
  if (!ready) {
    poison(args.out, static_cast<uint64_t>(args.num_tokens) * args.row_bytes);
    poison(args.out_weights, static_cast<uint64_t>(args.num_tokens) * c.num_topk * 4);
    return;
  }
  run_rings(args, [&](int group, const Ring& ring) { produce(args, group, ring, peers); });
  if (last_to_arrive(c, kArrived, scratch)) {
    signal_node(c, kCombineDone, number);
    if (threadIdx.x == 0) {
      ++*state_word(c, kCombines);
      finish_operation(c, kLastCombine, number);
    }
  }
}
