// What ranks count of a routing: where totals lie in the windows, and what they add up to at the receiver.
#pragma once

#include "ep/protocol.cuh"

namespace epv2 {

constexpr int kAhead = 8;  // loads that are on their way together

// Counts of a chunk and totals: rows for each expert of each rank and for the rank, [P][L + 1]; hybrid: for each node, too.
__device__ __forceinline__ int count_width(const Common& c) {
  const int width = c.num_ranks * (c.num_local_experts + 1);
  return kNodes && c.rail ? width + c.num_ranks / c.lsa_size : width;
}

template <typename Args>
__device__ __forceinline__ const int32_t* totals_of(const Args& args, int rank) {
  return reinterpret_cast<const int32_t*>(near_pointer(args.common, args.totals_offset, rank));
}

// What a rank of another node counted, at the relay that it told.
template <typename Args>
__device__ __forceinline__ const int32_t* mirror_of(const Args& args, int source) {
  const Common& c = args.common;
  const uint64_t offset = args.mirror_offset + static_cast<uint64_t>(source) * mirror_words(c) * 4;
  return reinterpret_cast<const int32_t*>(near_pointer(c, offset, relay_of(c, source)));
}

// What rank `source` has for this one: rows of each expert, and (last) of the compact layout.
template <typename Args>
__device__ __forceinline__ const int32_t* counts_for_here(const Args& args, int source) {
  const Common& c = args.common;
  const int columns = c.num_local_experts + 1;
  if constexpr (kNodes) {
    if (!is_near(c, source)) return mirror_of(args, source) + (c.rank - c.lsa_begin) * columns;
  }
  return totals_of(args, source) + c.rank * columns;
}

template <typename Args>
__device__ __forceinline__ int32_t tokens_of(const Args& args, int source) {
  const Common& c = args.common;
  if constexpr (kNodes) {
    if (!is_near(c, source)) return mirror_of(args, source)[mirror_tail(c)];
  }
  return totals_of(args, source)[count_width(c)];
}

// One warp: what arrives here, from everybody's totals. `column_total` holds L + 1 words of shared memory.
template <typename Args>
__device__ void gather_counts(const Args& args, uint32_t number, int32_t* column_total) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp, columns = c.num_local_experts + 1;
  bool here = true;
  for (int p = lane; p < c.num_ranks; p += kWarp) here &= wait_flag(c, kCountsReady, p, number, true);
  if (!__all_sync(0xffffffffu, here)) return;
  __syncwarp();  // what one lane waited for, all may read
  const Counts counts(args.counts, c);
  for (int column = lane; column < columns; column += kWarp) {
    int sum = 0;
    for (int first = 0; first < c.num_ranks; first += kAhead) {
      int rows[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; j++) {
        rows[j] = first + j < c.num_ranks ? counts_for_here(args, first + j)[column] : 0;
      }
#pragma unroll
      for (int j = 0; j < kAhead; j++) {
        if (first + j < c.num_ranks) {
          counts.from(first + j, column) = rows[j];
          counts.begin(first + j, column) = sum;
        }
        sum += rows[j];
      }
    }
    counts.total(column) = sum;
    column_total[column] = sum;
  }
  for (int p = lane; p < c.num_ranks; p += kWarp) {
    counts.tokens(p) = tokens_of(args, p);
  }
  __syncwarp();
  if constexpr (kNodes) {
    const int rows = column_total[c.num_local_experts] - (counts.near_rows_end(c) - counts.near_rows_begin(c));
    if (rows > args.max_remote_rows) {
      if (lane == 0) give_up(c, kNoRoom, c.rank, kCountsReady, args.max_remote_rows, rows);
      return;
    }
  }
  // In expert order each expert's rows follow those of the experts before it, rounded up to the alignment.
  int carry = 0;
  for (int base = 0; base < c.num_local_experts; base += kWarp) {
    const int expert = base + lane;
    const int rows = expert < c.num_local_experts ? column_total[expert] : 0;
    const int aligned = (rows + args.expert_alignment - 1) / args.expert_alignment * args.expert_alignment;
    int sum = aligned;
    for (int d = 1; d < kWarp; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += other;
    }
    if (expert < c.num_local_experts) {
      for (int p = 0; p < c.num_ranks; p++) counts.begin(p, expert) += carry + sum - aligned;
    }
    carry += __shfl_sync(0xffffffffu, sum, kWarp - 1);
  }
  __syncwarp();
  if (args.host_counts == 0) return;
  int32_t* host = reinterpret_cast<int32_t*>(args.host_counts);
  for (int i = lane; i < counts.words(); i += kWarp) host[1 + i] = counts.memory[i];
  __threadfence_system();
  __syncwarp();
  if (lane == 0) store_release_system(reinterpret_cast<uint32_t*>(host), args.host_tag);
}

}  // namespace epv2
