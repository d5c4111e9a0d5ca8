// Reduce: entries sorted by row, those of a row in their order: a stable radix sort, 8 bits of the keys in a pass. Twice
// in a reduce: each rank's own entries by the rows that they are for, then at the owner the rows that all ranks staged
// for it, in rank order. What comes out depends on prefix sums alone.
//
// Between nodes an owner also tells each rank where the rows for it go: what comes from other nodes has places of its own.
#include "engram/engram.cuh"

using namespace epv2;

namespace {

constexpr int kDigits = 256;
constexpr int kMaxWarps = 16;

struct Shared {
  uint32_t scratch[4];
  int32_t sums[kMaxWarps];
  int32_t next[kDigits];                  // where the next entry with this digit goes
  int32_t of_warp[kMaxWarps][kDigits];    // of a tile: entries of each warp, then where they go
};

// All threads: the sum of `value` over the threads before this one; `total` is that over all.
__device__ int sum_before(Shared& shared, int value, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  int through = value;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const int left = __shfl_up_sync(0xffffffffu, through, d);
    if (lane >= d) through += left;
  }
  if (lane == kWarp - 1) shared.sums[warp] = through;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < num_warps; w++) {
    if (w < warp) before += shared.sums[w];
    total += shared.sums[w];
  }
  __syncthreads();
  return before + through - value;
}

class Grouping {
 public:
  __device__ Grouping(const EngramGroupArgs& args, Shared& shared, int32_t* prefix)
      : args_(args), c_(args.common), shared_(shared), prefix_(prefix),
        counts_(reinterpret_cast<int32_t*>(args.counts)), n_(args.num_entries) {
    const int64_t entries = n_;
    begin_ = static_cast<int>(entries * blockIdx.x / gridDim.x);
    end_ = static_cast<int>(entries * (blockIdx.x + 1) / gridDim.x);
  }

  __device__ uint64_t* keys(int side) const {
    return reinterpret_cast<uint64_t*>(args_.keys) + static_cast<int64_t>(side) * n_;
  }

  __device__ int32_t* items(int side) const {
    return reinterpret_cast<int32_t*>(args_.items) + static_cast<int64_t>(side) * n_;
  }

  // Keys of this CTA's share of the entries; what names no row gets one behind all others.
  __device__ void take_own() {
    for (int i = begin_ + threadIdx.x; i < end_; i += blockDim.x) {
      const int64_t row = reinterpret_cast<const int64_t*>(args_.indices)[i];
      const bool none = row < 0 || static_cast<uint64_t>(row) >= limit();
      if (none && row != -1) refuse_row(c_, kRowsTold, i, row);
      keys(0)[i] = none ? limit() : static_cast<uint64_t>(row);
      items(0)[i] = i;
    }
  }

  __device__ void take_staged() {
    if (threadIdx.x == 0) {
      prefix_[0] = 0;
      for (int p = 0; p < c_.num_ranks; p++) prefix_[p + 1] = prefix_[p] + told(p).rows;
    }
    __syncthreads();
    int p = 0;
    for (int i = begin_ + threadIdx.x; i < end_; i += blockDim.x) {
      while (i >= prefix_[p + 1]) p++;
      keys(0)[i] = rows_of(p)[i - prefix_[p]] - c_.rank * args_.table_rows;
      items(0)[i] = i;
    }
  }

  // Sort by digit `pass`, from one side of the memory to the other.
  __device__ bool sort(int pass) {
    const uint64_t* from = keys(pass % 2);
    const int shift = 8 * pass;
    for (int d = threadIdx.x; d < kDigits; d += blockDim.x) shared_.next[d] = 0;
    __syncthreads();
    for (int i = begin_ + threadIdx.x; i < end_; i += blockDim.x) atomicAdd(&shared_.next[from[i] >> shift & 255], 1);
    __syncthreads();
    for (int d = threadIdx.x; d < kDigits; d += blockDim.x) counts_[d * gridDim.x + blockIdx.x] = shared_.next[d];
    if (!grid_sync(c_, shared_.scratch)) return false;
    int here = 0, all = 0;  // entries with a digit in CTAs before this one, in all
    if (threadIdx.x < kDigits) {
      for (int cta = 0; cta < static_cast<int>(gridDim.x); cta++) {
        const int count = counts_[threadIdx.x * gridDim.x + cta];
        if (cta < static_cast<int>(blockIdx.x)) here += count;
        all += count;
      }
    }
    int total;
    const int smaller = sum_before(shared_, all, total);
    if (threadIdx.x < kDigits) shared_.next[threadIdx.x] = smaller + here;
    for (int first = begin_; first < end_; first += blockDim.x) sort_tile(pass, first);
    return grid_sync(c_, shared_.scratch);
  }

  // Find where the entries of each distinct row begin. Returns how many distinct rows there are.
  __device__ int find_rows(int side) {
    const uint64_t* sorted = keys(side);
    const auto heads = [&](int i) { return i < end_ && sorted[i] < limit() && (i == 0 || sorted[i] != sorted[i - 1]); };
    int mine = 0, count;
    for (int i = begin_ + threadIdx.x; i < end_; i += blockDim.x) mine += heads(i);
    sum_before(shared_, mine, count);
    int32_t* of_cta = counts_ + kDigits * gridDim.x;
    if (threadIdx.x == 0) of_cta[blockIdx.x] = count;
    if (!grid_sync(c_, shared_.scratch)) return -1;
    int next = 0, distinct = 0;
    for (int cta = 0; cta < static_cast<int>(gridDim.x); cta++) {
      if (cta < static_cast<int>(blockIdx.x)) next += of_cta[cta];
      distinct += of_cta[cta];
    }
    for (int first = begin_; first < end_; first += blockDim.x) {
      const int i = first + threadIdx.x;
      const bool head = heads(i);
      const int place = next + sum_before(shared_, head, count);
      if (head) {
        reinterpret_cast<int32_t*>(args_.begins)[place] = i;
        reinterpret_cast<int64_t*>(args_.distinct)[place] = static_cast<int64_t>(sorted[i]);
      }
      next += count;
    }
    return distinct;
  }

  // Entries with a key below `key`.
  __device__ int entries_below(int side, uint64_t key) const {
    return lower_bound(n_, [&](int i) { return keys(side)[i] < key; });
  }

  __device__ int rows_below(int distinct, int64_t row) const {
    return lower_bound(distinct, [&](int i) { return reinterpret_cast<const int64_t*>(args_.distinct)[i] < row; });
  }

  // Above every row that counts.
  __device__ uint64_t limit() const {
    return static_cast<uint64_t>(args_.table_rows) * (args_.from_peers ? 1 : c_.num_ranks);
  }

  __device__ const Told& told(int source) const { return own_pointer<const Told>(c_, args_.told_offset)[source]; }

 private:
  // What a rank has for this one.
  __device__ const int64_t* rows_of(int source) const {
    if (is_near(c_, source)) {
      return reinterpret_cast<const int64_t*>(node_pointer(c_, args_.staging, args_.rows_offset, source)) +
             told(source).first;
    }
    const int near = source < near_begin(c_) ? 0 : prefix_[near_end(c_)] - prefix_[near_begin(c_)];
    const uint8_t* arrived = node_pointer(c_, args_.staging, args_.arrived_rows_offset, c_.rank);
    return reinterpret_cast<const int64_t*>(arrived) + prefix_[source] - near;
  }

  template <typename Below>
  __device__ static int lower_bound(int count, Below below) {
    int low = 0, high = count;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (below(middle)) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // One entry for each thread. Entries with one digit keep their order: by warp, and by lane in a warp.
  __device__ void sort_tile(int pass, int first) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
    const int i = first + threadIdx.x;
    const uint64_t key = i < end_ ? keys(pass % 2)[i] : 0;
    const int digit = i < end_ ? static_cast<int>(key >> 8 * pass & 255) : kDigits;
    int32_t* of_warp = shared_.of_warp[warp];
    for (int d = lane; d < kDigits; d += kWarp) of_warp[d] = 0;
    const uint32_t same = __match_any_sync(0xffffffffu, digit);
    const int rank = __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (rank == 0 && digit < kDigits) of_warp[digit] = __popc(same);
    __syncthreads();
    for (int d = threadIdx.x; d < kDigits; d += blockDim.x) {
      int next = shared_.next[d];
      for (int w = 0; w < num_warps; w++) {
        const int count = shared_.of_warp[w][d];
        shared_.of_warp[w][d] = next;
        next += count;
      }
      shared_.next[d] = next;
    }
    __syncthreads();
    if (digit < kDigits) {
      const int place = of_warp[digit] + rank;
      keys(1 - pass % 2)[place] = key;
      items(1 - pass % 2)[place] = items(pass % 2)[i];
    }
    __syncthreads();
  }

  const EngramGroupArgs& args_;
  const Common& c_;
  Shared& shared_;
  int32_t* prefix_;
  int32_t* counts_;
  const int n_;
  int begin_, end_;
};

// All threads of one CTA, between nodes: tell all ranks where rows for this one go, and how many come from other nodes.
__device__ bool tell_room(const EngramGroupArgs& args, const Grouping& grouping, Shared& shared, uint32_t number,
                          uint32_t count) {
  const Common& c = args.common;
  const auto coming = [&](int p) { return p < c.num_ranks && !is_near(c, p) ? grouping.told(p).rows : 0; };
  int mine = 0, arrived, before = 0, step;
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) mine += coming(p);
  sum_before(shared, mine, arrived);
  for (int first = 0; first < c.num_ranks; first += blockDim.x) {
    const int p = first + threadIdx.x, place = before + sum_before(shared, coming(p), step);
    before += step;
    if (p >= c.num_ranks) continue;
    const uint64_t at = args.room_offset + c.rank * sizeof(Room);
    if (is_near(c, p)) {
      *reinterpret_cast<Room*>(near_pointer(c, at, p)) = {place, arrived};
    } else {
      network_put_value(network(c, 0), p, c.window, at,
                        static_cast<uint32_t>(place) | static_cast<uint64_t>(arrived) << 32);
    }
  }
  __syncthreads();
  signal_all(c, kRoomTold, number, false);
  return wait_everybody(c, kRoomTold, number, count, false, shared.scratch);
}

// Threads of one CTA: tell every owner how many rows there are for it, hear from all, and tell the host.
__device__ void tell_owners(const EngramGroupArgs& args, const Grouping& grouping, Shared& shared, int side,
                            int distinct, uint32_t number) {
  const Common& c = args.common;
  uint32_t* scratch = shared.scratch;
  const uint32_t reduces = kNodes ? *state_word(c, kReduces) : 0;
  // Peers may still be reading what was told and staged for the last reduce.
  if (!wait_everybody(c, kReduceDone, *state_word(c, kLastReduce), reduces, false, scratch)) return;
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) {
    const int64_t begin = p * args.table_rows, end = begin + args.table_rows;
    const int first = grouping.rows_below(distinct, begin);
    const int entries = grouping.entries_below(side, end) - grouping.entries_below(side, begin);
    const Told told = {grouping.rows_below(distinct, end) - first, first, distinct, entries};
    const uint64_t at = args.told_offset + c.rank * sizeof(Told);
    if (is_near(c, p)) {
      *reinterpret_cast<Told*>(near_pointer(c, at, p)) = told;
    } else {
      const auto word = [](int low, int high) {
        return static_cast<uint32_t>(low) | static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32;
      };
      network_put_value(network(c, 0), p, c.window, at, word(told.rows, told.first));
      network_put_value(network(c, 0), p, c.window, at + 8, word(told.distinct, told.entries));
    }
  }
  __syncthreads();
  signal_all(c, kRowsTold, number, true);
  if (!wait_everybody(c, kRowsTold, number, reduces + 1, true, scratch)) return;
  if constexpr (kNodes) {
    if (!tell_room(args, grouping, shared, number, reduces + 1)) return;
  }
  if (threadIdx.x == 0) {
    int32_t* words = reinterpret_cast<int32_t*>(args.host) + 1;
    for (int p = 0; p < c.num_ranks; p++) {
      const Told& told = grouping.told(p);
      words[3 * p] = told.rows, words[3 * p + 1] = told.distinct, words[3 * p + 2] = told.entries;
    }
    if constexpr (kNodes) {
      int most = 0;
      for (int p = 0; p < c.num_ranks; p++) most = max(most, own_pointer<Room>(c, args.room_offset)[p].arrived);
      words[3 * c.num_ranks] = most;
    }
    __threadfence_system();
    store_release_system(reinterpret_cast<uint32_t*>(args.host), args.host_tag);
  }
}

}  // namespace

// Shared memory: `Shared`, then P + 1 words.
EPV2_KERNEL(epv2_engram_group, EngramGroupArgs, 512) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  Grouping grouping(args, shared, reinterpret_cast<int32_t*>(shared_memory() + sizeof(Shared)));
  if (args.from_peers) {
    const uint32_t count = kNodes ? *state_word(c, kReduces) + 1 : 0;
    if (!wait_everybody(c, kSumsStaged, number, count, !kNodes, shared.scratch)) return;
    grouping.take_staged();
  } else {
    grouping.take_own();
  }
  __syncthreads();
  for (int pass = 0; pass < args.num_passes; pass++)
    if (!grouping.sort(pass)) return;
  const int side = args.num_passes % 2, distinct = grouping.find_rows(side);
  if (distinct < 0 || !last_to_arrive(c, kArrived, shared.scratch)) return;
  if (threadIdx.x == 0) {
    reinterpret_cast<int32_t*>(args.begins)[distinct] = grouping.entries_below(side, grouping.limit());
  }
  if (!args.from_peers) {
    tell_owners(args, grouping, shared, side, distinct, number);
  } else if (threadIdx.x == 0) {
    reinterpret_cast<int32_t*>(args.host)[1] = distinct;
    __threadfence_system();
    store_release_system(reinterpret_cast<uint32_t*>(args.host), args.host_tag);
  }
}
