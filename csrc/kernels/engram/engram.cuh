// What Engram's kernels share. Operations are numbered, ranks wait for each other and give up as ep/protocol.cuh says,
// with a window, state and error record of Engram's own: its operations have numbers apart from dispatch and combine.
//
// Between nodes ranks tell each other by signals of a network of Engram's own, every rank each other one (direct mode).
#pragma once

#include "engram/args.h"
#include "ep/protocol.cuh"

namespace epv2 {

// Words of `Common::state`, behind those of ep/protocol.cuh.
enum EngramState {
  kLastFetch = 16,    // number of the last fetch
  kLastReduce = 17,   // number of the last reduce
  kFetches = 18,      // how many there were
  kGridArrived = 19,  // CTAs that are at the barrier of the running kernel
  kGridTurn = 20,     // barriers so far
  kReduces = 21,      // how many there were; between nodes only
};

// Flags. A rank that has all it needs of one fetch may begin the next while others still look at its flag: fetches take
// turns with two, and nobody is two fetches ahead.
enum EngramFlag {
  kFetchEven = 0,    // fetch: this rank's rows are what this fetch is to see
  kFetchOdd = 1,
  kFetchDone = 2,    // fetch: this rank has read what it needs
  kRowsTold = 3,     // reduce: how many rows there are for whom
  kSumsStaged = 4,   // reduce: rows and sums
  kReduceDone = 5,   // reduce: this rank has read what it needs
  kRoomTold = 6,     // reduce between nodes: where rows go at their owner
};

constexpr uint32_t kBadRow = 16;  // error code: entry `seen` names row extra * 2^32 + expected, which there is not

// What a rank tells each owner in a reduce.
struct Told {
  int32_t rows;      // for this owner
  int32_t first;     // of them, among all that are staged
  int32_t distinct;  // rows for all owners
  int32_t entries;   // whose gradients are in the owner's rows
};

// Between nodes, what an owner tells each rank in a reduce.
struct Room {
  int32_t place;    // of the rank's first row among those that arrive from other nodes
  int32_t arrived;  // all of these
};

// Byte `offset` of another window of a rank of this node.
__device__ __forceinline__ uint8_t* node_pointer(const Common& c, uint64_t window, uint64_t offset, int rank) {
  return peer_pointer(window, offset, kNodes ? rank - c.lsa_begin : rank);
}

// The signal that tells other nodes of a flag. It counts operations, so the two flags of a fetch need but one.
__device__ __forceinline__ int signal_of(int flag) {
  return flag == kFetchOdd ? kFetchEven : flag == kRoomTold ? kFetchOdd : flag;
}

// All threads of one CTA: raise a flag at all ranks. `call`: the operation begins with it, and so its signature goes to
// other nodes, too: by value, as a rank may have to say so to one that is not there any more.
__device__ inline void signal_all(const Common& c, int flag, uint32_t number, bool call) {
  signal_node(c, flag, number);
  if constexpr (kNodes) {
    for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
      const int to = remote(c, i);
      if (call) {
        // A rank that goes on overwrites its record, but not a flag that others still look at.
        network_put_value(network(c, 0), to, c.window, flag_offset(c, flag, c.rank),
                          number | static_cast<uint64_t>(c.signature) << 32);
        send_record(c, to, signal_of(flag));
      } else {
        network_signal(network(c, 0), to, signal_index(c, signal_of(flag), c.rank), kSignalUnit);
      }
    }
  }
}

// One warp: raise a flag at all ranks of this node, while the others of its CTA go on.
__device__ inline void signal_node_by_warp(const Common& c, int flag, uint32_t number) {
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) write_record(c, number);
  __syncwarp();
  if (failed(c)) return;
  for (int p = near_begin(c) + lane; p < near_end(c); p += kWarp) {
    raise_flag(c, flag, c.rank, number, c.signature, p);
  }
}

// All threads of the CTA: wait until all ranks have raised a flag to `number`, which is the `count`-th time; false = this
// rank gave up. `call`: as above, with the same signature.
__device__ inline bool wait_everybody(const Common& c, int flag, uint32_t number, uint32_t count, bool call,
                                      uint32_t* scratch) {
  if constexpr (kNodes) {
    for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
      const int from = remote(c, i);
      // What does not begin an operation comes after its sender has waited for others in it.
      if (!wait_signal(c, signal_of(flag), from, count, flag, number, !call, c.contexts) || !call) continue;
      const uint32_t signature = own_pointer<uint32_t>(c, flag_offset(c, flag, from))[1];
      if (signature != c.signature) give_up(c, kOtherArguments, from, flag, c.signature, signature);
    }
  }
  return wait_node(c, flag, number, call, scratch);
}

__device__ __forceinline__ void refuse_row(const Common& c, int flag, int64_t entry, int64_t row) {
  give_up(c, kBadRow, c.rank, flag, static_cast<uint32_t>(row), static_cast<uint32_t>(entry),
          static_cast<uint32_t>(row >> 32));
}

// The barrier of all CTAs, by one thread of each. This CTA has come; true if all others had before. `turn`: what those
// wait for, and this one ends.
__device__ inline bool grid_arrive(const Common& c, uint32_t* turn) {
  *turn = load_acquire_system(state_word(c, kGridTurn));
  if (atomic_add_acq_rel(state_word(c, kGridArrived), 1) != gridDim.x - 1) return false;
  *state_word(c, kGridArrived) = 0;
  return true;
}

// The last one lets the others go on.
__device__ inline void grid_release(const Common& c, uint32_t turn) {
  store_release_system(state_word(c, kGridTurn), turn + 1);
}

// The others wait for that, or until this rank gives up.
__device__ inline void grid_wait(const Common& c, uint32_t turn) {
  while (load_acquire_system(state_word(c, kGridTurn)) == turn && !failed(c)) pause();
}

// All threads of all CTAs: wait for each other. false = this rank gave up. `word` of the shared memory is scratch.
__device__ inline bool grid_sync(const Common& c, uint32_t* word) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    uint32_t turn;
    if (grid_arrive(c, &turn)) {
      grid_release(c, turn);
    } else {
      grid_wait(c, turn);
    }
  }
  return !agree_failed(c, word);
}

// Up to 16 bytes as a vector, whatever they are aligned to.
__device__ __forceinline__ uint4 load_part(const uint8_t* from, int bytes) {
  if (bytes == 16 && reinterpret_cast<uint64_t>(from) % 16 == 0) return load_streaming(from);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; i++)
    if (i < bytes) words[i / 4] |= static_cast<uint32_t>(from[i]) << 8 * (i % 4);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void store_part(uint8_t* to, uint4 v, int bytes) {
  if (bytes == 16 && reinterpret_cast<uint64_t>(to) % 16 == 0) {
    store_streaming(to, v);
    return;
  }
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 16; i++)
    if (i < bytes) to[i] = static_cast<uint8_t>(words[i / 4] >> 8 * (i % 4));
}

// A row in parts of 16 bytes: those of its values, then those of its scale factors.
struct Parts {
  int data_bytes, scale_bytes, data, all;

  __device__ Parts(int data_bytes, int scale_bytes)
      : data_bytes(data_bytes), scale_bytes(scale_bytes), data((data_bytes + 15) / 16),
        all(data + (scale_bytes + 15) / 16) {}

  __device__ bool is_scale(int part) const { return part >= data; }
  __device__ int offset(int part) const { return 16 * (is_scale(part) ? part - data : part); }
  __device__ int bytes(int part) const { return min(16, (is_scale(part) ? scale_bytes : data_bytes) - offset(part)); }

  // Where the part lies if values and scale factors have an array each.
  __device__ uint8_t* place(uint64_t values, uint64_t scales, int64_t row, int part) const {
    return reinterpret_cast<uint8_t*>(is_scale(part) ? scales + row * scale_bytes : values + row * data_bytes) +
           offset(part);
  }
};

constexpr int kTile = 1024;  // rows that a CTA moves at once

// All threads of the CTA: `store(row, part, load(row, part))` for every part of `rows` rows. A thread has
// kInFlight loads under way; neighbours have neighbouring parts. It steps from part to part without dividing, which for short rows
// would take longer than the loads.
template <int kInFlight, typename Load, typename Store>
__device__ __forceinline__ void move_parts(int rows, int parts, Load load, Store store) {
  const int threads = blockDim.x, row_step = threads / parts, part_step = threads % parts;
  const auto step = [&](int& row, int& part) {
    row += row_step;
    part += part_step;
    if (part >= parts) row++, part -= parts;
  };
  int row = static_cast<int>(threadIdx.x) / parts, part = static_cast<int>(threadIdx.x) % parts;
  while (row < rows) {
    uint4 v[kInFlight];
    int next_row = row, next_part = part;
#pragma unroll
    for (int k = 0; k < kInFlight; k++) {
      v[k] = next_row < rows ? load(next_row, next_part) : make_uint4(0, 0, 0, 0);
      step(next_row, next_part);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; k++) {
      if (row < rows) store(row, part, v[k]);
      step(row, part);
    }
  }
}

}  // namespace epv2
