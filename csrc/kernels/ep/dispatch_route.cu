// Dispatch, second kernel: which rows come from where. A warp takes 32 tokens of one rank at a time, finds which of
// them come here and numbers their rows by prefix sums alone: no row number depends on timing.
//
// Rows from other nodes come with their numbers, and have to be here before they can be read.
//
// Writes the metadata that dispatch_pull and combine follow, and everything small that is received: local experts and
// weights. A repeated dispatch has the metadata; then this kernel only brings new weights.
#include "ep/counts.cuh"

using namespace epv2;

namespace {

struct Warp {
  int16_t* topk;   // [32, K] experts of the chunk's tokens
  float* weights;  // [32, K]
  int32_t* next;   // [L] row in expert order that the next copy for an expert gets
  int32_t* lead;   // [32] K - the first top-k position of a token that leads here, 0 = none does
};

// One warp: `bytes` from far away, all loads at once.
__device__ __forceinline__ void fetch(void* to, const uint8_t* from, int bytes) {
  for (int i = threadIdx.x % kWarp; i * 16 < bytes; i += kWarp) {
    static_cast<uint4*>(to)[i] = load_streaming(from + i * 16);
  }
}

// One thread: what is known of a top-k position of a received row. `expanded` is its row in expert order if it is `here`.
__device__ __forceinline__ void place_entry(const DispatchRouteArgs& args, int row, int k, int local, bool here,
                                            int expanded, int source, float weight) {
  const Common& c = args.common;
  int32_t* metadata = reinterpret_cast<int32_t*>(args.metadata) + static_cast<int64_t>(row) * (2 + c.num_topk);
  if (!args.expand) {
    metadata[2 + k] = -1;
    const int64_t at = static_cast<int64_t>(row) * c.num_topk + k;
    reinterpret_cast<int64_t*>(args.recv_topk_idx)[at] = here ? local : -1;
    if (args.recv_weights != 0) reinterpret_cast<float*>(args.recv_weights)[at] = here ? weight : 0.0f;
  } else {
    if (here && expanded >= args.expanded_capacity) {
      give_up(c, kTooManyRows, source, kRowsReady, args.expanded_capacity, expanded);
      expanded = -1;
    }
    metadata[2 + k] = expanded;
    if (expanded >= 0 && args.recv_weights != 0) reinterpret_cast<float*>(args.recv_weights)[expanded] = weight;
  }
}

__device__ void route_chunk(const DispatchRouteArgs& args, int source, int chunk, Warp memory) {
  const Common& c = args.common;
  const Counts counts(args.counts, c);
  const int lane = threadIdx.x % kWarp, num_experts = c.num_local_experts, columns = num_experts + 1;
  const int first_expert = c.rank * num_experts;
  const int num_tokens = min(kChunk, counts.tokens(source) - chunk * kChunk);
  const int num_entries = num_tokens * c.num_topk;
  const uint8_t* peer = near_pointer(c, 0, source);
  const int64_t first_entry = static_cast<int64_t>(chunk) * kChunk * c.num_topk;
  fetch(memory.topk, peer + args.topk_offset + first_entry * 2, num_entries * 2);
  if (args.recv_weights != 0) fetch(memory.weights, peer + args.weights_offset + first_entry * 4, num_entries * 4);
  const int16_t* topk = memory.topk;
  const int32_t* before = reinterpret_cast<const int32_t*>(peer + args.prefix_offset) +
                          static_cast<int64_t>(chunk) * count_width(c) + c.rank * columns;

  for (int e = lane; e < num_experts; e += kWarp) memory.next[e] = counts.begin(source, e) + before[e];
  memory.lead[lane] = 0;
  __syncwarp();
  for (int i = lane; i < num_entries; i += kWarp) {
    if (static_cast<uint32_t>(topk[i] - first_expert) < static_cast<uint32_t>(num_experts)) {
      atomicMax(&memory.lead[i / c.num_topk], c.num_topk - i % c.num_topk);
    }
  }
  __syncwarp();
  const int lead = memory.lead[lane];
  const uint32_t comes = __ballot_sync(0xffffffffu, lead > 0);
  const int first_row = counts.begin(source, num_experts) + before[num_experts];
  const int stride = 2 + c.num_topk;
  int32_t* metadata = reinterpret_cast<int32_t*>(args.metadata);
  if (lead > 0) {
    const int row = first_row + __popc(comes & ((1u << lane) - 1));
    if (row < args.rows_capacity) {
      metadata[static_cast<int64_t>(row) * stride] = source * c.max_tokens + chunk * kChunk + lane;
      metadata[static_cast<int64_t>(row) * stride + 1] = source * c.num_topk + c.num_topk - lead;
    } else {
      give_up(c, kTooManyRows, source, kCountsReady, args.rows_capacity, row);
    }
  }
  // Entries in the order of (token, position), 32 at a time; equal experts among them are numbered by lane.
  for (int base = 0; base < num_entries; base += kWarp) {
    const int i = base + lane;
    const int local = i < num_entries ? topk[i] - first_expert : -1;
    const bool here = static_cast<uint32_t>(local) < static_cast<uint32_t>(num_experts);
    const uint32_t same = __match_any_sync(0xffffffffu, here ? local : -1 - lane);
    int expanded = -1;
    if (here) expanded = memory.next[local] + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (here && (same >> lane) == 1u) memory.next[local] = expanded + 1;
    __syncwarp();
    if (i >= num_entries || !(comes >> (i / c.num_topk) & 1)) continue;
    const int token = i / c.num_topk, k = i % c.num_topk;
    const int row = first_row + __popc(comes & ((1u << token) - 1));
    if (row >= args.rows_capacity) continue;
    place_entry(args, row, k, local, here, expanded, source, args.recv_weights != 0 && here ? memory.weights[i] : 0.0f);
  }
  __syncwarp();
}

// The trailer of a row that arrived at a rank of this node.
template <typename T>
__device__ __forceinline__ const T* trailer_of(const DispatchRouteArgs& args, int relay, int arrival) {
  return reinterpret_cast<const T*>(near_pointer(args.common, args.arrivals_offset, relay) +
                                    static_cast<int64_t>(arrival) * args.row_stride + args.trailer_offset);
}

// One warp: rows that arrived at a rank of this node, as many at a time as have all their top-k positions in a warp.
__device__ void route_arrivals(const DispatchRouteArgs& args, int relay, int first, int num_arrivals) {
  const Common& c = args.common;
  const Counts counts(args.counts, c);
  const int lane = threadIdx.x % kWarp, k = lane % c.num_topk, which = lane / c.num_topk;
  const int arrival = first + which, columns = c.num_local_experts + 1;
  const bool present = which < kWarp / c.num_topk && arrival < num_arrivals;
  const uint32_t* trailer = present ? trailer_of<uint32_t>(args, relay, arrival) : nullptr;
  uint32_t head = 0, entry[kTrailerEntry] = {};
  float weight = 0;
  if (present) {
    head = trailer[0];
    for (int i = 0; i < kTrailerEntry; i++) entry[i] = trailer[kTrailerHead + kTrailerEntry * k + i];
    if (args.recv_weights != 0) weight = __uint_as_float(trailer[trailer_weights(c.num_topk) + k]);
    if (relay == c.rank) {
      int32_t* relayed = reinterpret_cast<int32_t*>(args.relayed) + static_cast<int64_t>(arrival) * (1 + c.num_topk);
      if (k == 0) relayed[0] = head;
      relayed[1 + k] = entry[0];
    }
  }
  const int local = present ? packed_expert(entry[0]) - c.rank * c.num_local_experts : -1;
  const bool here = static_cast<uint32_t>(local) < static_cast<uint32_t>(c.num_local_experts);
  const uint32_t all = __ballot_sync(0xffffffffu, here);
  if (!present) return;
  const uint32_t comes = all >> (which * c.num_topk) & (c.num_topk == kWarp ? ~0u : (1u << c.num_topk) - 1);
  if (comes == 0) return;
  const int lead = __ffs(comes) - 1, source = head / c.max_tokens;
  const int row = counts.begin(source, columns - 1) + trailer[kTrailerHead + kTrailerEntry * lead + 2];
  if (row >= args.rows_capacity) {
    give_up(c, kTooManyRows, source, kCountsReady, args.rows_capacity, row);
    return;
  }
  int32_t* metadata = reinterpret_cast<int32_t*>(args.metadata) + static_cast<int64_t>(row) * (2 + c.num_topk);
  if (k == lead) {
    metadata[0] = head;
    metadata[1] = source * c.num_topk + lead;
    reinterpret_cast<int32_t*>(args.origin)[row] = arrival;
  }
  place_entry(args, row, k, local, here, here ? counts.begin(source, local) + static_cast<int>(entry[1]) : -1, source,
              weight);
}

// One warp: the weights of one received row whose metadata is known.
__device__ void bring_weights(const DispatchRouteArgs& args, int row) {
  const Common& c = args.common;
  const int k = threadIdx.x % kWarp;
  if (k >= c.num_topk) return;
  const int32_t* metadata =
      reinterpret_cast<const int32_t*>(args.metadata) + static_cast<int64_t>(row) * (2 + c.num_topk);
  const int source = metadata[0] / c.max_tokens, token = metadata[0] % c.max_tokens;
  const float* weights = nullptr;
  if (is_near(c, source)) {
    weights = reinterpret_cast<const float*>(near_pointer(c, args.weights_offset, source)) +
              static_cast<int64_t>(token) * c.num_topk;
  } else if constexpr (kNodes) {
    const int arrival = reinterpret_cast<const int32_t*>(args.origin)[row];
    weights = trailer_of<float>(args, relay_of(c, source), arrival) + trailer_weights(c.num_topk);
  }
  const float weight = weights[k];
  float* out = reinterpret_cast<float*>(args.recv_weights);
  if (args.expand) {
    if (metadata[2 + k] >= 0) out[metadata[2 + k]] = weight;
  } else {
    const int64_t at = static_cast<int64_t>(row) * c.num_topk + k;
    out[at] = reinterpret_cast<const int64_t*>(args.recv_topk_idx)[at] >= 0 ? weight : 0.0f;
  }
}

// What no row is routed to: -1 as expert and metadata, 0 as weight.
__device__ void fill_rest(const DispatchRouteArgs& args) {
  const Common& c = args.common;
  const Counts counts(args.counts, c);
  const int64_t worker = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int rows = counts.total(c.num_local_experts), width = 2 + c.num_topk;
  int32_t* metadata = reinterpret_cast<int32_t*>(args.metadata);
  for (int64_t i = static_cast<int64_t>(rows) * width + worker; i < static_cast<int64_t>(args.rows_capacity) * width;
       i += step) {
    metadata[i] = -1;
  }
  float* weights = reinterpret_cast<float*>(args.recv_weights);
  if (!args.expand) {
    for (int64_t i = static_cast<int64_t>(rows) * c.num_topk + worker;
         i < static_cast<int64_t>(args.rows_capacity) * c.num_topk; i += step) {
      reinterpret_cast<int64_t*>(args.recv_topk_idx)[i] = -1;
      if (args.recv_weights != 0) weights[i] = 0;
    }
  } else if (args.recv_weights != 0) {
    for_each_gap(counts, args.expert_alignment, args.expanded_capacity, [&](int begin, int end) {
      for (int row = begin + threadIdx.x % kWarp; row < end; row += kWarp) weights[row] = 0;
    });
  }
}

}  // namespace

// Shared memory: 4 words, then for each warp 48 * K + 32 words and L, rounded up to 4. See sizing.route_shape.
EPV2_KERNEL(epv2_dispatch_route, DispatchRouteArgs, 512) {
  const Common& c = args.common;
  const Counts counts(args.counts, c);
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  // The first dispatch of a routing has seen everybody's counts, which come after the weights; a repeated one has not.
  const bool ready = args.cached || kNodes ? wait_all(c, kRowsReady, operation_number(c), true, scratch)
                                           : !agree_failed(c, scratch);
  if (!ready) {
    const int64_t rows = args.rows_capacity;
    if (!args.cached) {
      poison(args.metadata, rows * (2 + c.num_topk) * 4);
      poison(args.recv_topk_idx, rows * c.num_topk * 8);
    }
    poison(args.recv_weights, (args.expand ? args.expanded_capacity : rows * c.num_topk) * 4);
    return;
  }
  if (args.cached) {
    const int num_rows = min(counts.total(c.num_local_experts), args.rows_capacity);
    for (int i = blockIdx.x + gridDim.x * warp; i < num_rows; i += gridDim.x * num_warps) bring_weights(args, i);
    fill_rest(args);
    return;
  }
  const int words_per_warp = 48 * c.num_topk + kChunk + (c.num_local_experts + 3) / 4 * 4;
  int32_t* words = reinterpret_cast<int32_t*>(shared_memory()) + 4 + warp * words_per_warp;
  const Warp memory{reinterpret_cast<int16_t*>(words), reinterpret_cast<float*>(words + 16 * c.num_topk),
                    words + 48 * c.num_topk + kChunk, words + 48 * c.num_topk};
  const int near = near_end(c) - near_begin(c);
  int most_chunks = 0;
  for (int p = near_begin(c); p < near_end(c); p++) {
    most_chunks = max(most_chunks, (counts.tokens(p) + kChunk - 1) / kChunk);
  }
  const int worker = blockIdx.x + gridDim.x * warp, workers = gridDim.x * num_warps;
  for (int i = worker; i < most_chunks * near; i += workers) {
    const int chunk = i / near, source = near_begin(c) + (i + chunk + c.rank) % near;
    if (chunk * kChunk < counts.tokens(source)) route_chunk(args, source, chunk, memory);
  }
  if constexpr (kNodes) {
    const int step = kWarp / c.num_topk;
    for (int i = 0; i < (c.rail ? near : 1); i++) {
      const int relay = c.rail ? near_begin(c) + (c.rank + i) % near : c.rank;
      const int arrived = *reinterpret_cast<const int32_t*>(near_pointer(c, arrived_offset(c), relay));
      for (int first = worker * step; first < arrived; first += workers * step) {
        route_arrivals(args, relay, first, arrived);
      }
    }
  }
  fill_rest(args);
  if (args.statistics != 0) {
    for (int e = blockIdx.x * blockDim.x + threadIdx.x; e < c.num_local_experts; e += gridDim.x * blockDim.x) {
      if (args.statistics_wide) {
        reinterpret_cast<int64_t*>(args.statistics)[e] += counts.total(e);
      } else {
        reinterpret_cast<int32_t*>(args.statistics)[e] += counts.total(e);
      }
    }
  }
}
