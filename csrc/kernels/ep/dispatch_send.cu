// Dispatch between nodes, after dispatch_stage: rows go through the network, each once to every rank of another node that
// has one of its experts, or (hybrid) once to every such node, to the rank there that is in this rank's place.
//
// 1. The first warp of all tells those ranks what is coming and hears the same from them. It gives each the first of the
//    places that its rows get among the arrivals here: nothing is sent before there is room for it, and a place depends on
//    counts alone. What it was told it passes on to its node, whose counts the next warp adds up for the host.
// 2. All other warps take 32 tokens at a time, write behind each row where it goes (its trailer) and put it.
// 3. The first warp hears that rows have arrived and raises the flags for its node.
//
// A repeated dispatch knows its places; then only rows and weights are new.
#include "ep/counts.cuh"

using namespace epv2;

namespace {

struct Warp {
  int16_t* topk;     // [32, K] experts of the chunk's tokens
  uint8_t* order;    // [32, K] number of the expert's target among the token's
  int32_t* next;     // [E] number of the next row for an expert
  uint32_t* comes;   // [P] which tokens go to a rank
  uint32_t* visits;  // [P / G] which tokens go to a node
};

// The first warp: what this rank has for others.
__device__ void announce(const DispatchSendArgs& args, uint32_t number) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp, columns = c.num_local_experts + 1;
  const int32_t* totals = totals_of(args, c.rank);
  if (lane == 0) write_record(c, number);
  __syncwarp();
  for (int i = lane; i < num_remotes(c); i += kWarp) {
    const int to = remote(c, i), node = to / c.lsa_size;
    if (!args.cached) {
      const uint64_t mirror = args.mirror_offset + static_cast<uint64_t>(c.rank) * mirror_words(c) * 4;
      const int rows = c.rail ? totals[c.num_ranks * columns + node] : totals[to * columns + c.num_local_experts];
      network_put(network(c, 0), to, c.window, mirror, args.totals_offset + node * c.lsa_size * columns * 4,
                  c.lsa_size * columns * 4);
      network_put_value(network(c, 0), to, c.window, mirror + mirror_tail(c) * 4,
                        static_cast<uint32_t>(args.num_tokens) | static_cast<uint64_t>(rows) << 32);
    }
    send_record(c, to, kHello);
  }
}

// One thread: raise a flag of a rank of another node, whose signature is this rank's, for those whose relay this rank is.
__device__ void tell_node(const Common& c, int kind, int source, uint32_t number) {
  const int begin = c.rail ? near_begin(c) : c.rank, end = c.rail ? near_end(c) : c.rank + 1;
  for (int p = begin; p < end; p++) raise_flag(c, kind, source, number, c.signature, p);
}

// The first warp: hear what comes, hand out places, pass on to the node.
__device__ void welcome(const DispatchSendArgs& args, uint32_t number, uint32_t count) {
  const Common& c = args.common;
  const Counts counts(args.counts, c);
  const int lane = threadIdx.x % kWarp, sources = num_remotes(c);
  int arrived = 0;
  for (int base = 0; base < sources; base += kWarp) {
    const int source = base + lane < sources ? remote(c, base + lane) : -1;
    bool here = true;
    if (source >= 0) {
      here = wait_signal(c, kHello, source, count, kCountsReady, number, false) &&
             check_record(c, source, kCountsReady);
    }
    if (!__all_sync(0xffffffffu, here)) return;
    const int rows = source >= 0 && !args.cached ? mirror_of(args, source)[mirror_tail(c) + 1] : 0;
    int sum = rows;
    for (int d = 1; d < kWarp; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += other;
    }
    if (source >= 0) {
      network_put_value(network(c, 0), source, c.window, answer_offset(c, c.rank), arrived + sum - rows);
    }
    arrived += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
  if (arrived > args.max_arrivals) {
    if (lane == 0) give_up(c, kNoRoom, c.rank, kPlaces, args.max_arrivals, arrived);
    return;
  }
  if (lane == 0 && !args.cached) {
    counts.arrived() = arrived;
    *own_pointer<int32_t>(c, arrived_offset(c)) = arrived;
  }
  __syncwarp();
  __threadfence_system();
  for (int i = lane; i < sources; i += kWarp) {
    const int source = remote(c, i);
    network_signal(network(c, 0), source, signal_index(c, kAnswer, c.rank), kSignalUnit);
    tell_node(c, kCountsReady, source, number);
  }
}

// The first warp: when everything is here, tell the node.
__device__ void pass_on(const Common& c, uint32_t number, uint32_t count) {
  for (int i = threadIdx.x % kWarp; i < num_remotes(c); i += kWarp) {
    const int source = remote(c, i);
    if (!wait_signal(c, kRowsSent, source, count, kRowsReady, number, true, c.contexts)) continue;
    tell_node(c, kRowsReady, source, number);
  }
}

// One warp: number the rows of a chunk and write their trailers. `before`: counts of the chunks in front of it.
__device__ void write_trailers(const DispatchSendArgs& args, int chunk, int num_tokens, const int32_t* before,
                               Warp memory) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp, columns = c.num_local_experts + 1;
  const int num_experts = c.num_ranks * c.num_local_experts, num_entries = num_tokens * c.num_topk;
  uint8_t* rows = own_pointer<uint8_t>(c, args.rows_offset) + static_cast<int64_t>(chunk) * kChunk * args.row_stride +
                  args.trailer_offset;
  for (int e = lane; e < num_experts; e += kWarp) {
    memory.next[e] = before[e / c.num_local_experts * columns + e % c.num_local_experts];
  }
  if (lane < num_tokens) {
    reinterpret_cast<int32_t*>(rows + static_cast<int64_t>(lane) * args.row_stride)[0] =
        c.rank * c.max_tokens + chunk * kChunk + lane;
  }
  __syncwarp();
  // Entries in the order of (token, position), 32 at a time; equal experts among them are numbered by lane.
  for (int base = 0; base < num_entries; base += kWarp) {
    const int i = base + lane;
    const int expert = i < num_entries ? memory.topk[i] : -1;
    const uint32_t same = __match_any_sync(0xffffffffu, expert >= 0 ? expert : -1 - lane);
    int place = -1;
    if (expert >= 0) place = memory.next[expert] + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (expert >= 0 && (same >> lane) == 1u) memory.next[expert] = place + 1;
    __syncwarp();
    if (i >= num_entries) continue;
    const int token = i / c.num_topk, k = i % c.num_topk;
    uint32_t* entry = reinterpret_cast<uint32_t*>(rows + static_cast<int64_t>(token) * args.row_stride) + kTrailerHead +
                      kTrailerEntry * k;
    entry[0] = pack_expert(expert, memory.order[i]);
    entry[1] = place;
    const int rank = expert >= 0 ? expert / c.num_local_experts : 0;
    entry[2] = before[rank * columns + c.num_local_experts] + __popc(memory.comes[rank] & ((1u << token) - 1));
  }
}

// One warp: send the rows of a chunk.
__device__ void send_chunk(const DispatchSendArgs& args, int chunk, Warp memory, int context) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp, width = count_width(c), columns = c.num_local_experts + 1;
  const int first = chunk * kChunk, num_tokens = min(kChunk, args.num_tokens - first);
  const int num_entries = num_tokens * c.num_topk;
  const int64_t first_entry = static_cast<int64_t>(first) * c.num_topk;
  const int nodes = c.num_ranks / c.lsa_size;
  for (int p = lane; p < c.num_ranks; p += kWarp) memory.comes[p] = 0;
  for (int n = lane; n < nodes; n += kWarp) memory.visits[n] = 0;
  __syncwarp();
  for (int i = lane; i < num_entries; i += kWarp) {
    const int expert = args.cached
                           ? static_cast<int>(reinterpret_cast<const int64_t*>(args.topk_idx)[first_entry + i])
                           : own_pointer<int16_t>(c, args.topk_offset)[first_entry + i];
    memory.topk[i] = static_cast<int16_t>(expert);
    if (expert < 0) continue;
    const int rank = expert / c.num_local_experts;
    atomicOr(&memory.comes[rank], 1u << (i / c.num_topk));
    atomicOr(&memory.visits[rank / c.lsa_size], 1u << (i / c.num_topk));
  }
  __syncwarp();
  // A lane takes a token. Its targets count in the order of the last position that leads to each.
  const int16_t* mine = memory.topk + lane * c.num_topk;
  uint32_t leads = 0;  // positions that are the last for their target
  if (lane < num_tokens) {
    int order = 0;
    for (int k = 0; k < c.num_topk; k++) {
      const int target = target_of(c, mine[k]);
      bool last = target >= 0;
      for (int j = k + 1; j < c.num_topk; j++) last = last && target_of(c, mine[j]) != target;
      if (!last) continue;
      for (int j = 0; j <= k; j++) {
        if (target_of(c, mine[j]) == target) memory.order[lane * c.num_topk + j] = static_cast<uint8_t>(order);
      }
      order++;
      leads |= 1u << k;
    }
    for (int k = 0; k < c.num_topk; k++) {
      if (target_of(c, mine[k]) < 0) memory.order[lane * c.num_topk + k] = 0;
    }
  }
  __syncwarp();
  const int32_t* before = own_pointer<int32_t>(c, args.prefix_offset) + static_cast<int64_t>(chunk) * width;
  if (!args.cached) write_trailers(args, chunk, num_tokens, before, memory);
  if (c.has_weights) {
    const uint32_t* weights = own_pointer<uint32_t>(c, args.weights_offset) + first_entry;
    uint8_t* rows = own_pointer<uint8_t>(c, args.rows_offset) + static_cast<int64_t>(first) * args.row_stride +
                    args.trailer_offset + trailer_weights(c.num_topk) * 4;
    for (int i = lane; i < num_entries; i += kWarp) {
      reinterpret_cast<uint32_t*>(rows + static_cast<int64_t>(i / c.num_topk) * args.row_stride)[i % c.num_topk] =
          weights[i];
    }
  }
  __threadfence_system();
  __syncwarp();
  int32_t* slots = reinterpret_cast<int32_t*>(args.sent_slots) + static_cast<int64_t>(first + lane) * args.num_returns;
  const uint64_t from = args.rows_offset + static_cast<uint64_t>(first + lane) * args.row_stride;
  for (; leads != 0; leads &= leads - 1) {  // none of lanes without a token
    const int k = __ffs(leads) - 1, order = memory.order[lane * c.num_topk + k], target = target_of(c, mine[k]);
    const int to = c.rail ? target * c.lsa_size + c.rank - c.lsa_begin : target;
    if (!args.cached) {
      const int ahead = before[c.rail ? c.num_ranks * columns + target : target * columns + c.num_local_experts];
      const uint32_t others = c.rail ? memory.visits[target] : memory.comes[target];
      slots[order] = static_cast<int32_t>(*own_pointer<uint64_t>(c, answer_offset(c, to))) + ahead +
                     __popc(others & ((1u << lane) - 1));
    }
    network_put(network(c, context), to, c.window,
                args.arrivals_offset + static_cast<uint64_t>(slots[order]) * args.row_stride, from, args.row_stride);
  }
  __syncwarp();  // the next chunk takes the place of what some lanes may still read
}

}  // namespace

// Shared memory: 128 bytes and L + 1 words; for each warp 24 * K + E + P + P / G words, rounded up to 4. See
// sizing.send_shape.
EPV2_KERNEL(epv2_dispatch_send, DispatchSendArgs, 512) {
  const Common& c = args.common;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, num_warps = blockDim.x / kWarp;
  const uint32_t number = operation_number(c), count = *state_word(c, kDispatches) + 1;
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  int32_t* column_total = reinterpret_cast<int32_t*>(scratch) + 32;
  const int context = blockIdx.x % c.contexts;
  if (agree_failed(c, scratch)) return;

  if (blockIdx.x == 0 && warp == 0) {
    announce(args, number);
    welcome(args, number, count);
  } else if (blockIdx.x == 0 && warp == 1) {
    if (!args.cached) gather_counts(args, number, column_total);
  } else {
    const int busy = blockIdx.x == 0 ? 2 : 0;
    if (warp == busy) {  // for all other warps of the CTA
      bool free = true;
      for (int i = lane; i < num_remotes(c); i += kWarp) {
        free &= wait_signal(c, kAnswer, remote(c, i), count, kPlaces, number, true);
      }
      free = __all_sync(0xffffffffu, free);
      if (lane == 0) scratch[1] = free;
    }
    barrier_sync(1, static_cast<int>(blockDim.x) - busy * kWarp);
    if (scratch[1] != 0) {
      const int num_experts = c.num_ranks * c.num_local_experts, nodes = c.num_ranks / c.lsa_size;
      const int words = (24 * c.num_topk + num_experts + c.num_ranks + nodes + 3) / 4 * 4;
      int32_t* memory = column_total + (c.num_local_experts + 4) / 4 * 4 + warp * words;
      const Warp mine{reinterpret_cast<int16_t*>(memory), reinterpret_cast<uint8_t*>(memory + 16 * c.num_topk),
                      memory + 24 * c.num_topk, reinterpret_cast<uint32_t*>(memory + 24 * c.num_topk + num_experts),
                      reinterpret_cast<uint32_t*>(memory + 24 * c.num_topk + num_experts + c.num_ranks)};
      const int num_chunks = (args.num_tokens + kChunk - 1) / kChunk, workers = gridDim.x * num_warps - 2;
      // Counted without the two warps above, which are 0 and gridDim.x.
      int worker = blockIdx.x + gridDim.x * warp;
      worker -= worker > static_cast<int>(gridDim.x) ? 2 : 1;
      for (int chunk = worker; chunk < num_chunks; chunk += workers) send_chunk(args, chunk, mine, context);
    }
  }
  __syncthreads();
  // A signal is behind all that its context has put; other CTAs' contexts have signals of their own.
  const uint64_t share = signal_share();
  for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
    if (!failed(c)) network_signal(network(c, context), remote(c, i), signal_index(c, kRowsSent, c.rank), share);
  }
  if (blockIdx.x == 0 && warp == 0) pass_on(c, number, count);
  finish_transfers(c, context, scratch);
}
