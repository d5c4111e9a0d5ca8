// Rows of the table, from whichever rank has them, for every entry that asks for one. Of the entries that ask for the
// same row one reads it, from the owner's window; the others copy what that one has written.
//
// Which entry reads depends on timing, what is written does not. No other rank does anything for a fetch but to say that
// its rows are ready to be read.
#include "engram/engram.cuh"

using namespace epv2;

namespace {

constexpr int64_t kSkip = -1, kZeros = -2;  // instead of where a row is copied from
constexpr uint32_t kEmpty = 0xffffffffu;

// The entry that fetches row `index`, this one if no other does yet.
__device__ int find_leader(const EngramFetchArgs& args, int64_t index, int entry) {
  const int64_t* indices = reinterpret_cast<const int64_t*>(args.indices);
  uint32_t* slots = reinterpret_cast<uint32_t*>(args.slots);
  const uint32_t mask = args.num_slots - 1;
  uint32_t slot = static_cast<uint32_t>(static_cast<uint64_t>(index) * 0x9e3779b97f4a7c15ull >> 32) & mask;
  while (true) {
    const uint32_t seen = atomicCAS(&slots[slot], kEmpty, static_cast<uint32_t>(entry));
    if (seen == kEmpty) return entry;
    if (indices[seen] == index) return static_cast<int>(seen);
    slot = (slot + 1) & mask;
  }
}

__device__ void poison_outputs(const EngramFetchArgs& args) {
  const uint64_t bytes = static_cast<uint64_t>(args.num_entries) * args.data_bytes;
  poison(args.out, bytes);
  if (blockIdx.x == 0 && threadIdx.x < bytes % 4) {
    reinterpret_cast<uint8_t*>(args.out)[bytes / 4 * 4 + threadIdx.x] = 0xff;
  }
  poison(args.out_scales, static_cast<uint64_t>(args.num_entries) * args.scale_bytes);
}

// All threads of one CTA, once no CTA reads a peer's rows any more: say so, and end the operation.
__device__ void finish_fetch(const EngramFetchArgs& args, int flag, uint32_t number, uint32_t* scratch) {
  const Common& c = args.common;
  // Whoever gave up on this rank had said before that its rows are ready: here nothing was missing.
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) {
    const uint32_t* failure = reinterpret_cast<uint32_t*>(peer_pointer(c.window, failure_offset(c, p), c.rank));
    if (load_acquire_system(failure) != 0) give_up(c, kPeerFailed, p, flag, number, number);
  }
  if (agree_failed(c, scratch)) return;
  signal_node(c, kFetchDone, number);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      reinterpret_cast<uint64_t*>(args.host_counters)[i] = reinterpret_cast<const uint64_t*>(args.counters)[i];
    }
    ++*state_word(c, kFetches);
    finish_operation(c, kLastFetch, number);
  }
}

}  // namespace

// Threads: kTile. Shared memory: 16 bytes, kTile numbers, P addresses.
EPV2_KERNEL(epv2_engram_fetch, EngramFetchArgs, 1024) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp;
  const uint32_t number = operation_number(c);
  const int flag = *state_word(c, kFetches) % 2 == 0 ? kFetchEven : kFetchOdd;
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* pulled = scratch + 1;  // rows of other ranks, then entries
  int64_t* sources = reinterpret_cast<int64_t*>(scratch + 4);
  uint8_t** peers = reinterpret_cast<uint8_t**>(sources + kTile);
  const int64_t* indices = reinterpret_cast<const int64_t*>(args.indices);
  int32_t* leaders = reinterpret_cast<int32_t*>(args.leaders);
  // An equal share of the entries for each CTA.
  const int64_t entries = args.num_entries;
  const int begin = static_cast<int>(entries * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(entries * (blockIdx.x + 1) / gridDim.x);

  if (blockIdx.x == 0) signal_node(c, flag, number);
  int64_t index = begin + static_cast<int>(threadIdx.x) < end ? indices[begin + threadIdx.x] : -1;
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) peers[p] = peer_pointer(args.table, 0, p);
  if (threadIdx.x < 2) pulled[threadIdx.x] = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < args.num_slots; i += gridDim.x * blockDim.x) {
    reinterpret_cast<uint32_t*>(args.slots)[i] = kEmpty;
  }
  if (!grid_sync(c, scratch) || !wait_all(c, flag, number, true, scratch)) {
    poison_outputs(args);
    return;
  }

  const Parts parts(args.data_bytes, args.scale_bytes);
  for (int first = begin; first < end; first += kTile) {
    const int entry = first + threadIdx.x;
    bool remote = false, leads = false;
    if (entry < end) {
      int leader = entry;
      int64_t source = kZeros;
      if (index < -1 || index >= args.table_rows * c.num_ranks) {
        refuse_row(c, flag, entry, index);
        source = kSkip;
      } else if (index >= 0) {
        const int64_t owner = index / args.table_rows;
        leader = find_leader(args, index, entry);
        leads = leader == entry;
        remote = owner != c.rank;
        source = leads ? reinterpret_cast<int64_t>(peers[owner] + (index - owner * args.table_rows) * args.row_stride)
                       : kSkip;
      }
      leaders[entry] = leader;
      sources[threadIdx.x] = source;
    }
    index = entry + kTile < end ? indices[entry + kTile] : -1;
    const uint32_t rows = __popc(__ballot_sync(0xffffffffu, remote && leads));
    const uint32_t wanted = __popc(__ballot_sync(0xffffffffu, remote));
    if (lane == 0 && wanted != 0) {
      atomicAdd(&pulled[0], rows);
      atomicAdd(&pulled[1], wanted);
    }
    __syncthreads();
    move_parts<6>(
        min(end - first, kTile), parts.all,
        [&](int i, int part) {
          if (sources[i] < 0) return make_uint4(0, 0, 0, 0);
          return load_streaming(reinterpret_cast<const uint8_t*>(sources[i]) +
                                (parts.is_scale(part) ? args.scale_offset : 0) + parts.offset(part));
        },
        [&](int i, int part, uint4 v) {
          if (sources[i] == kSkip) return;
          store_part(parts.place(args.out, args.out_scales, first + i, part), v, parts.bytes(part));
        });
    __syncthreads();
  }
  if (threadIdx.x < 2) {
    atomicAdd(reinterpret_cast<unsigned long long*>(args.counters) + threadIdx.x,
              static_cast<unsigned long long>(pulled[threadIdx.x]));
  }
  if (!grid_sync(c, scratch)) {
    poison_outputs(args);
    return;
  }
  if (blockIdx.x == 0) finish_fetch(args, flag, number, scratch);
  for (int first = begin; first < end; first += kTile) {
    const int entry = first + threadIdx.x;
    if (entry < end) sources[threadIdx.x] = leaders[entry] == entry ? kSkip : leaders[entry];
    __syncthreads();
    move_parts<4>(
        min(end - first, kTile), parts.all,
        [&](int i, int part) {
          if (sources[i] == kSkip) return make_uint4(0, 0, 0, 0);
          return load_part(parts.place(args.out, args.out_scales, sources[i], part), parts.bytes(part));
        },
        [&](int i, int part, uint4 v) {
          if (sources[i] == kSkip) return;
          store_part(parts.place(args.out, args.out_scales, first + i, part), v, parts.bytes(part));
        });
    __syncthreads();
  }
}
