// Where what goes back lies, and who is told of it between nodes.
#pragma once

#include "ep/protocol.cuh"

namespace epv2 {

// The slot of a received row, see CombineArgs.
class Slots {
 public:
  __device__ explicit Slots(const CombineArgs& args)
      : args_(args), c_(args.common) {
    if constexpr (kNodes) {
      const Counts counts(args.counts, c_);
      begin_ = counts.near_rows_begin(c_);
      near_ = counts.near_rows_end(c_) - begin_;
    }
  }

  // Of row `row`, whose source slot is `source` (rank * M + token).
  __device__ int of(int row, int source) const {
    if constexpr (!kNodes) return source;
    if (is_near(c_, source / c_.max_tokens)) return source - c_.lsa_begin * c_.max_tokens;
    return c_.lsa_size * c_.max_tokens + (row < begin_ ? row : row - near_);
  }

  // One thread: tell the relay of a row from another node where this rank has what belongs to it.
  __device__ void tell(int row, int source, int slot) const {
    if constexpr (kNodes) {
      const int rank = source / c_.max_tokens;
      if (is_near(c_, rank)) return;
      const int64_t arrival = reinterpret_cast<const int32_t*>(args_.origin)[row];
      int32_t* table = reinterpret_cast<int32_t*>(near_pointer(c_, args_.slots_offset, relay_of(c_, rank)));
      table[arrival * c_.lsa_size + c_.rank - c_.lsa_begin] = slot;
    }
  }

 private:
  const CombineArgs& args_;
  const Common& c_;
  int begin_ = 0, near_ = 0;
};

// All threads of the CTA: wait until the ranks of other nodes that this one sends to have room for what goes back to them.
__device__ inline bool wait_owners(const Common& c, uint32_t number, uint32_t count, uint32_t* scratch) {
  for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
    const int owner = remote(c, i);
    wait_signal(c, kReturnsFree, owner, count, kSumsReady, number, false) && check_record(c, owner, kSumsReady);
  }
  const bool gave_up = agree_failed(c, scratch);
  fence_proxy_async();
  return !gave_up;
}

// All threads of the CTA: tell them that what this CTA sent is there. Each CTA has its share of the signal.
__device__ inline void tell_owners(const Common& c, int context, uint32_t* scratch) {
  __syncthreads();
  const uint64_t share = signal_share();
  for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
    network_signal(network(c, context), remote(c, i), signal_index(c, kReturned, c.rank), share);
  }
  finish_transfers(c, context, scratch);
}

}  // namespace epv2
