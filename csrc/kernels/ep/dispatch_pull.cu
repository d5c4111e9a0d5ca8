// Dispatch, last kernel: every received row is read once from its owner's window and written to each of its places.
//
// A warp keeps `num_stages` pieces of rows in flight: bulk load from the peer, bulk stores from shared memory, and the
// slot is loaded again two pieces later. The rows of the rank after this one come first, so that at any time each rank
// is read by one other. Rows from other nodes are read where they arrived. Needs only the metadata: repeating a dispatch
// starts here (after dispatch_stage).
#include "ep/protocol.cuh"

using namespace epv2;

namespace {

constexpr int kLag = 2;      // pieces between a slot's stores and its next load

// What one warp does: the pieces that it takes, one at a time, from its CTA's share.
class Puller {
 public:
  __device__ Puller(const DispatchPullArgs& args, uint8_t** peers, int32_t* taken, uint8_t* slots, int32_t* places,
                    uint64_t* full)
      : args_(args), c_(args.common), counts_(args.counts, c_), peers_(peers), taken_(taken), slots_(slots),
        places_(places), full_(full), lane_(threadIdx.x % kWarp) {
    num_rows_ = min(counts_.total(c_.num_local_experts), args.rows_capacity);
    num_pieces_ = (args.data_bytes + args.piece_bytes - 1) / args.piece_bytes;
    scale_bytes_ = (args.scale_words * 4 + 15) / 16 * 16;
    // Row numbers grow with the source rank.
    first_row_ = c_.rank + 1 < c_.num_ranks ? counts_.begin(c_.rank + 1, c_.num_local_experts) : 0;
    scales_by_bulk_ = args.scale_column_stride == 1 && args.scale_words % 4 == 0 && args.scale_row_stride % 4 == 0 &&
                      args.out_scales % 16 == 0;
  }

  __device__ void run() {
    prefetch();
    for (int s = 0; s < args_.num_stages; s++) load(s);
    int slot = 0, refill = (args_.num_stages - kLag) % args_.num_stages;
    for (int i = 0; places_[slot * stride()] != kNoMore; i++) {
      mbarrier_wait(&full_[slot], phases_ >> slot & 1);
      phases_ ^= 1u << slot;
      store(slot);
      if (i >= kLag) {
        bulk_wait_read<kLag>();
        __syncwarp();
        load(refill);
      }
      if (++slot == args_.num_stages) slot = 0;
      if (++refill == args_.num_stages) refill = 0;
    }
    bulk_wait_all();
  }

 private:
  static constexpr int kNoMore = -2;

  // Words of a slot's places: piece, then a row of the output for each top-k position, -1 = none.
  __device__ int stride() const { return 1 + kWarp; }

  // Take the next piece and fetch where it comes from and goes to, one piece ahead of its load.
  __device__ void prefetch() {
    int taken = 0;
    if (lane_ == 0) taken = atomicAdd(taken_, 1);
    const int64_t unit = blockIdx.x + static_cast<int64_t>(gridDim.x) * __shfl_sync(0xffffffffu, taken, 0);
    next_place_ = -1;
    next_piece_ = kNoMore;
    if (unit >= static_cast<int64_t>(num_rows_) * num_pieces_) return;
    int row = static_cast<int>(unit / num_pieces_) + first_row_;
    if (row >= num_rows_) row -= num_rows_;
    const int32_t* metadata =
        reinterpret_cast<const int32_t*>(args_.metadata) + static_cast<int64_t>(row) * (2 + c_.num_topk);
    next_piece_ = static_cast<int>(unit % num_pieces_);
    next_source_ = metadata[0];
    if constexpr (kNodes) next_arrival_ = reinterpret_cast<const int32_t*>(args_.origin)[row];
    if (args_.expand) {
      if (lane_ < c_.num_topk) next_place_ = metadata[2 + lane_];
    } else if (lane_ == 0) {
      next_place_ = row;
    }
  }

  __device__ int piece_bytes(int piece) const {
    return min(args_.piece_bytes, args_.data_bytes - piece * args_.piece_bytes);
  }

  __device__ uint8_t* slot_memory(int slot) const { return slots_ + slot * (args_.piece_bytes + scale_bytes_); }

  // All lanes: load the prefetched piece into a slot; the last piece of a row brings the scale factors along.
  __device__ void load(int slot) {
    places_[slot * stride() + 1 + lane_] = next_place_;
    if (lane_ == 0) {
      places_[slot * stride()] = next_piece_;
      if (next_piece_ >= 0) {
        const int bytes = piece_bytes(next_piece_) + (next_piece_ == num_pieces_ - 1 ? scale_bytes_ : 0);
        const int source = next_source_ / c_.max_tokens;
        const int index = is_near(c_, source) ? next_source_ % c_.max_tokens : next_arrival_;
        const uint8_t* from = peers_[source] + static_cast<int64_t>(index) * args_.row_stride +
                              static_cast<int64_t>(next_piece_) * args_.piece_bytes;
        mbarrier_arrive_expect(&full_[slot], bytes);
        bulk_load(slot_memory(slot), from, bytes, &full_[slot]);
      }
    }
    __syncwarp();
    if (next_piece_ >= 0) prefetch();
  }

  // All lanes: write a slot to each of its places.
  __device__ void store(int slot) {
    const int piece = places_[slot * stride()], place = places_[slot * stride() + 1 + lane_];
    const uint8_t* memory = slot_memory(slot);
    const int bytes = piece_bytes(piece);
    const bool scales = scale_bytes_ != 0 && piece == num_pieces_ - 1;
    if (place >= 0) {
      bulk_store(reinterpret_cast<uint8_t*>(args_.out) + static_cast<int64_t>(place) * args_.data_bytes +
                     static_cast<int64_t>(piece) * args_.piece_bytes,
                 memory, bytes);
      if (scales && scales_by_bulk_) {
        bulk_store(reinterpret_cast<uint32_t*>(args_.out_scales) + place * args_.scale_row_stride, memory + bytes,
                   args_.scale_words * 4);
      }
    }
    bulk_commit();
    if (!scales || scales_by_bulk_) return;
    const uint32_t* factors = reinterpret_cast<const uint32_t*>(memory + bytes);
    uint32_t* out = reinterpret_cast<uint32_t*>(args_.out_scales);
    for (uint32_t left = __ballot_sync(0xffffffffu, place >= 0); left != 0; left &= left - 1) {
      const int64_t row = __shfl_sync(0xffffffffu, place, __ffs(left) - 1);
      for (int i = lane_; i < args_.scale_words; i += kWarp) {
        out[row * args_.scale_row_stride + i * args_.scale_column_stride] = factors[i];
      }
    }
    // The next bulk load into this slot must not overtake these reads.
    fence_proxy_async_shared();
    __syncwarp();
  }

  const DispatchPullArgs& args_;
  const Common& c_;
  const Counts counts_;
  uint8_t** peers_;
  int32_t* taken_;
  uint8_t* slots_;
  int32_t* places_;
  uint64_t* full_;
  const int lane_;
  int num_rows_, num_pieces_, scale_bytes_, first_row_;
  bool scales_by_bulk_;
  uint32_t phases_ = 0;
  int next_place_ = -1, next_piece_ = kNoMore, next_source_ = 0, next_arrival_ = 0;
};

__device__ void zero_gaps(const DispatchPullArgs& args, const Counts& counts) {
  const int lane = threadIdx.x % kWarp;
  for_each_gap(counts, args.expert_alignment, args.expanded_capacity, [&](int begin, int end) {
    for (int row = begin; row < end; row++) {
      uint8_t* out = reinterpret_cast<uint8_t*>(args.out) + static_cast<int64_t>(row) * args.data_bytes;
      for (int i = lane * 16; i < args.data_bytes; i += kWarp * 16) store_streaming(out + i, make_uint4(0, 0, 0, 0));
      uint32_t* scales = reinterpret_cast<uint32_t*>(args.out_scales) + row * args.scale_row_stride;
      for (int i = lane; i < args.scale_words; i += kWarp) scales[i * args.scale_column_stride] = 0;
    }
  });
}

}  // namespace

// Shared memory: 128 bytes; per warp num_stages slots of piece_bytes + scales; per warp and stage 33 words; per warp
// and stage an mbarrier; P addresses. See sizing.PullShape.
EPV2_KERNEL(epv2_dispatch_pull, DispatchPullArgs, 256) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const int scale_bytes = (args.scale_words * 4 + 15) / 16 * 16;
  const int slots = num_warps * args.num_stages;
  uint8_t* memory = shared_memory();
  uint32_t* scratch = reinterpret_cast<uint32_t*>(memory);
  int32_t* taken = reinterpret_cast<int32_t*>(memory) + 1;
  uint8_t* slot_memory = memory + 128;
  uint64_t* full = reinterpret_cast<uint64_t*>(slot_memory + slots * (args.piece_bytes + scale_bytes));
  uint8_t** peers = reinterpret_cast<uint8_t**>(full + slots);
  int32_t* places = reinterpret_cast<int32_t*>(peers + c.num_ranks);

  if (threadIdx.x == 0) *taken = 0;
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) {
    peers[p] = is_near(c, p) ? near_pointer(c, args.rows_offset, p)
                             : near_pointer(c, args.arrivals_offset, relay_of(c, p));
  }
  for (int i = threadIdx.x; i < slots; i += blockDim.x) mbarrier_init(&full[i], 1);
  mbarrier_init_fence();
  const Counts counts(args.counts, c);
  if (!wait_all(c, kRowsReady, number, true, scratch)) {
    const int64_t rows = args.expand ? args.expanded_capacity : args.rows_capacity;
    poison(args.out, rows * args.data_bytes);
    return;
  }
  const int first = warp * args.num_stages;
  Puller(args, peers, taken, slot_memory + first * (args.piece_bytes + scale_bytes), places + first * (1 + kWarp),
         full + first)
      .run();
  if (args.zero_padding) zero_gaps(args, counts);
  if (last_to_arrive(c, kArrived, scratch)) {
    signal_node(c, kDispatchDone, number);
    if (threadIdx.x == 0) {
      ++*state_word(c, kDispatches);
      finish_operation(c, kLastDispatch, number);
    }
  }
}
