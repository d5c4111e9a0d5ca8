// Sums of rows: how the combine kernels use the ring of sum_ring.cuh.
#pragma once

#include "common/sum_ring.cuh"
#include "ep/protocol.cuh"

namespace epv2 {

// All lanes: `pointer` of lane `lead`.
__device__ __forceinline__ const uint8_t* shuffle_pointer(const uint8_t* pointer, int lead) {
  const uint64_t bits = reinterpret_cast<uint64_t>(pointer);
  const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits), lead);
  const uint32_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits >> 32), lead);
  return reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(high) << 32 | low);
}

// Pieces of a row, and vectors of 16 bytes in the last.
__device__ __forceinline__ int num_pieces(const CombineArgs& args) {
  return (args.row_bytes + args.piece_bytes - 1) / args.piece_bytes;
}
__device__ __forceinline__ int last_vectors(const CombineArgs& args) {
  return (args.row_bytes - (num_pieces(args) - 1) * args.piece_bytes) / 16;
}

// All warps of the CTA: the first of each group calls `produce(group, ring)`, the others add what it feeds.
template <typename Produce>
__device__ __forceinline__ void run_rings(const CombineArgs& args, Produce produce) {
  share_rings(args, produce, [&](int, const Ring& ring, int consumer) {
    consume(ring, consumer, last_vectors(args), num_pieces(args));
  });
}

}  // namespace epv2
