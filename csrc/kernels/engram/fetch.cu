// Rows of the table, from whichever rank has them, for every entry that asks for one. Of the entries that ask for the
// same row one reads it, from the owner's memory; the others copy what that one has written.
//
// Which entry reads depends on timing, what is written does not. No other rank does anything for a fetch but to say that
// its rows are ready to be read. In one node, where none has changed since the last fetch, that is waited for behind the
// reads. The CTA that is done last ends the fetch; the others wait for it only if they have an entry to copy from there.
//
// Between nodes (EPV2_NODES) a row of another node lands behind this rank's part of the table, by a get of one thread, and
// is copied from there. A CTA has a tile of entries under way, so nothing that a fetch needs grows with its entries.
#include "engram/engram.cuh"

using namespace epv2;

namespace {

constexpr int64_t kSkip = -1, kZeros = -2;  // instead of where a row is copied from
constexpr uint32_t kEmpty = 0xffffffffu;
constexpr int kThreads = kNodes ? 512 : kTile;  // calls of the network take more registers
constexpr int kCounters = kNodes ? 3 : 2;

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

// One CTA, of a rank that gave up.
__device__ void poison_outputs(const EngramFetchArgs& args) {
  const uint64_t bytes = static_cast<uint64_t>(args.num_entries) * args.data_bytes;
  poison(args.out, bytes, threadIdx.x, blockDim.x);
  if (threadIdx.x < bytes % 4) reinterpret_cast<uint8_t*>(args.out)[bytes / 4 * 4 + threadIdx.x] = 0xff;
  poison(args.out_scales, static_cast<uint64_t>(args.num_entries) * args.scale_bytes, threadIdx.x, blockDim.x);
}

// One CTA, once none reads a peer's rows any more: say so, and end the operation. In one node its first warps do that
// while the others go on.
__device__ void finish_fetch(const EngramFetchArgs& args, uint32_t number) {
  const Common& c = args.common;
  if constexpr (kNodes) {
    signal_all(c, kFetchDone, number, false);
  } else if (threadIdx.x < kWarp) {
    signal_node_by_warp(c, kFetchDone, number);
  }
  const int other = threadIdx.x - kWarp;
  if (other >= 0 && other < kCounters) {
    reinterpret_cast<uint64_t*>(args.host_counters)[other] = reinterpret_cast<const uint64_t*>(args.counters)[other];
  }
  if (other == kWarp) {
    ++*state_word(c, kFetches);
    finish_operation(c, kLastFetch, number);
  }
}

}  // namespace

// Threads: kThreads. Shared memory: 24 bytes, kThreads numbers, P addresses.
EPV2_KERNEL(epv2_engram_fetch, EngramFetchArgs, kThreads) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp, context = kNodes ? blockIdx.x % c.contexts : 0;
  const int tile = kNodes ? args.tile : kTile;
  const uint32_t number = operation_number(c), count = *state_word(c, kFetches) + 1;
  const int flag = count % 2 == 1 ? kFetchEven : kFetchOdd;
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* pulled = scratch + 1;  // rows of other ranks, entries, rows of other nodes
  uint32_t* copies = scratch + 4;  // entries whose row another one reads
  int64_t* sources = reinterpret_cast<int64_t*>(scratch + 6);
  uint8_t** peers = reinterpret_cast<uint8_t**>(sources + kThreads);
  const int64_t* indices = reinterpret_cast<const int64_t*>(args.indices);
  int32_t* leaders = reinterpret_cast<int32_t*>(args.leaders);
  // An equal share of the entries for each CTA.
  const int64_t entries = args.num_entries;
  const int begin = static_cast<int>(entries * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(entries * (blockIdx.x + 1) / gridDim.x);

  if (blockIdx.x == 0 && args.settled == 0) signal_all(c, flag, number, true);
  int64_t index = begin + static_cast<int>(threadIdx.x) < end ? indices[begin + threadIdx.x] : -1;
  for (int p = near_begin(c) + threadIdx.x; p < near_end(c); p += blockDim.x) {
    peers[p] = reinterpret_cast<uint8_t* const*>(args.parts)[p - near_begin(c)];
  }
  if (threadIdx.x < kCounters) pulled[threadIdx.x] = 0;
  if (threadIdx.x == 0) *copies = 0;
  bool goes_on = true;
  if (args.settled != 0) {
    __syncthreads();
    // The last warp, which is the first to have no entries of its own.
    if (blockIdx.x == 0 && threadIdx.x / kWarp == blockDim.x / kWarp - 1) signal_node_by_warp(c, flag, number);
  } else {
    goes_on = wait_everybody(c, flag, number, count, true, scratch);
  }

  const Parts parts(args.data_bytes, args.scale_bytes);
  const auto copy_rows = [&](int first) {
    move_parts<6>(
        min(end - first, tile), parts.all,
        [&](int i, int part) {
          if (sources[i] < 0) return make_uint4(0, 0, 0, 0);
          return load_streaming(reinterpret_cast<const uint8_t*>(sources[i]) +
                                (parts.is_scale(part) ? args.scale_offset : 0) + parts.offset(part));
        },
        [&](int i, int part, uint4 v) {
          if (sources[i] == kSkip) return;
          store_part(parts.place(args.out, args.out_scales, first + i, part), v, parts.bytes(part));
        });
  };
  for (int first = begin; goes_on && first < end; first += tile) {
    const int entry = first + threadIdx.x;
    bool remote = false, leads = false, far = false, copied = false;
    int64_t landed = kSkip;
    if (entry < end && (!kNodes || static_cast<int>(threadIdx.x) < tile)) {
      int leader = entry;
      int64_t source = kZeros;
      if (index < -1 || index >= args.table_rows * c.num_ranks) {
        refuse_row(c, flag, entry, index);
        source = kSkip;
      } else if (index >= 0) {
        const int64_t owner = index / args.table_rows;
        leader = find_leader(args, index, entry);
        leads = leader == entry;
        copied = !leads;
        remote = owner != c.rank;
        far = leads && !is_near(c, static_cast<int>(owner));
        const int64_t offset = (index - owner * args.table_rows) * args.row_stride;
        if (far) {
          source = kSkip;
          if constexpr (kNodes) {
            const int64_t place = static_cast<int64_t>(blockIdx.x) * tile + threadIdx.x;
            const uint64_t to = args.landing_offset + static_cast<uint64_t>(place) * args.row_stride;
            network_get(epv2::network(c, context), static_cast<int>(owner), args.table, to, offset, args.row_stride);
            landed = reinterpret_cast<int64_t>(peers[c.rank] + to);
          }
        } else {
          source = leads ? reinterpret_cast<int64_t>(peers[owner] + offset) : kSkip;
        }
      }
      leaders[entry] = leader;
      sources[threadIdx.x] = source;
    }
    index = entry + tile < end ? indices[entry + tile] : -1;
    const uint32_t rows = __popc(__ballot_sync(0xffffffffu, remote && leads));
    const uint32_t wanted = __popc(__ballot_sync(0xffffffffu, remote));
    const uint32_t others = __popc(__ballot_sync(0xffffffffu, copied));
    if (lane == 0 && wanted != 0) {
      atomicAdd(&pulled[0], rows);
      atomicAdd(&pulled[1], wanted);
    }
    if (lane == 0 && others != 0) atomicAdd(copies, others);
    if constexpr (kNodes) {
      const uint32_t gets = __popc(__ballot_sync(0xffffffffu, far));
      if (lane == 0 && gets != 0) atomicAdd(&pulled[2], gets);
    }
    __syncthreads();
    copy_rows(first);
    __syncthreads();
    if constexpr (kNodes) {
      if (!finish_transfers(c, context, scratch)) break;
      __threadfence_system();  // a flush that finds another CTA's done for it acquires nothing
      sources[threadIdx.x] = landed;
      __syncthreads();
      copy_rows(first);
      __syncthreads();
    }
  }
  if (threadIdx.x < kCounters) {
    atomicAdd(reinterpret_cast<unsigned long long*>(args.counters) + threadIdx.x,
              static_cast<unsigned long long>(pulled[threadIdx.x]));
  }
  if (blockIdx.x == 0) {
    for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) {
      if (args.settled != 0) wait_flag(c, flag, p, number, true);
      // Whoever gave up on this rank had said before that its rows are ready: here nothing was missing.
      if (peer_failed(c, p)) give_up(c, kPeerFailed, p, flag, number, number);
    }
  }
  enum { kOthersCome, kLast, kLastAfterFailure };
  __syncthreads();
  uint32_t turn = 0;
  if (threadIdx.x == 0) {
    const bool last = grid_arrive(c, &turn);
    scratch[0] = !last ? kOthersCome : failed(c) ? kLastAfterFailure : kLast;
  }
  __syncthreads();
  if (scratch[0] == kLastAfterFailure) {
    poison_outputs(args);
    return;
  }
  if (scratch[0] == kLast) {
    if (threadIdx.x == 0) grid_release(c, turn);
    finish_fetch(args, number);
  }
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < args.num_stale; i += gridDim.x * blockDim.x) {
    reinterpret_cast<uint32_t*>(args.stale_slots)[i] = kEmpty;
  }
  if (*copies == 0) return;
  if (scratch[0] == kOthersCome) {
    if (threadIdx.x == 0) grid_wait(c, turn);
    if (agree_failed(c, scratch)) return;
  }
  for (int first = begin; first < end; first += kThreads) {
    const int entry = first + threadIdx.x;
    if (entry < end) sources[threadIdx.x] = leaders[entry] == entry ? kSkip : leaders[entry];
    __syncthreads();
    move_parts<4>(
        min(end - first, kThreads), parts.all,
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
