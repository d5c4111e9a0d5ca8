// How ranks wait for each other: flags in the window, counters in device memory, one error record on the host.
//
// Every operation has a number, the same on all ranks because all call the same operations in the same order. It lives
// in device memory, so that a captured graph counts on at every replay. A rank tells the peers of its node that something
// is ready by writing the operation's number (and the signature of its arguments) into their windows.
//
// Between nodes (EPV2_NODES) the same is told by signals of the network. Who gets them, the *relay*, raises the flags of
// the rank that sent them in its node: in direct mode every rank is its own relay, in hybrid mode the rank in the
// sender's place is, for all ranks of its node.
#pragma once

#include "common/device.cuh"
#include "ep/args.h"

#ifndef EPV2_NODES
#define EPV2_NODES 0
#endif

namespace epv2 {

constexpr bool kNodes = EPV2_NODES != 0;  // ranks are in several nodes
constexpr int kChunk = 32;  // tokens whose expert counts are kept together

// Words of `Common::state`.
enum State {
  kSequence = 0,       // number of the last finished operation
  kLastDispatch = 1,   // number of the last dispatch
  kLastCombine = 2,    // number of the last combine
  kFailed = 3,         // 1 once this rank gave up
  kArrived = 4,        // CTAs of the running kernel that are done
  kCounted = 5,        // CTAs of dispatch_stage that have counted their tokens
  kDispatches = 6,     // finished dispatches, and so on: what signals of the network count
  kCombines = 7,
  kBarriers = 8,
  kNextRow = 9,        // of dispatch_stage: the row that the next free warp takes
  kStateWords = 32,
};

// Window, first bytes: flags [kind][rank]{number, signature}; one uint32 per rank that says that it gave up; this rank's
// record, with which a peer explains a signature that differs from its own; the records of ranks of other nodes; the
// first arrival that each of them gives this rank's rows; the number of rows that arrived here.
enum Flag {
  kCountsReady = 0,   // dispatch: routing, weights and counts
  kRowsReady = 1,     // dispatch: rows
  kDispatchDone = 2,  // dispatch: this rank has read what it needs
  kSumsReady = 3,     // combine: rows to return
  kCombineDone = 4,   // combine: this rank has read what it needs
  kBarrier = 5,
  kBarrierEnd = 6,    // barrier between nodes: the others' nodes came, too
  kFlagKinds = 7,
};
constexpr int kPlaces = 7;  // what a sender waits for at a relay: no flag, but a phase of its own

// Signals of the network: [kind][rank that sends it]. Each grows by kSignalUnit with every operation (twice with a
// barrier), in one step or in as many as the sender has CTAs.
enum Signal { kHello = 0, kAnswer = 1, kRowsSent = 2, kReturnsFree = 3, kReturned = 4, kBarrierSignal = 5, kGaveUp = 6 };
constexpr int kSignalKinds = 7;
constexpr uint64_t kSignalUnit = 1024;

// This CTA's part of a unit, where each CTA has its own in what the operation sends.
__device__ __forceinline__ uint64_t signal_share() { return blockIdx.x == 0 ? kSignalUnit - (gridDim.x - 1) : 1; }

// Words of `Common::error`; kErrorSet is written last.
enum Error {
  kErrorSet = 0,
  kErrorCode,
  kErrorPeer,
  kErrorPhase,
  kErrorExpected,
  kErrorSeen,
  kErrorExtra,
  kErrorOurs,  // this rank's arguments and the peer's, where they differ
  kErrorTheirs = kErrorOurs + 10,
  kErrorWords = kErrorTheirs + 10,
};

constexpr int kArguments = 10;  // words that a signature is made of

enum ErrorCode {
  kTimeout = 1,        // peer did not come in (1 + extra) times the time that there is
  kPeerFailed = 2,     // peer gave up
  kOtherArguments = 3, // peer came with another signature
  kBadExpert = 4,      // topk_idx[seen, extra] = expected is no expert
  kTooManyRows = 5,    // a row number beyond the output's size
  kNoRoom = 6,         // seen rows of other nodes, room for expected
};

__device__ __forceinline__ uint64_t flag_offset(const Common& c, int kind, int from) {
  return (static_cast<uint64_t>(kind) * c.num_ranks + from) * 8;
}

__device__ __forceinline__ uint64_t failure_offset(const Common& c, int from) {
  return static_cast<uint64_t>(kFlagKinds) * c.num_ranks * 8 + from * 4;
}

// A record: number, signature, and the words that the signature is made of.
constexpr int kRecordBytes = (2 + kArguments) * 4;

__device__ __forceinline__ uint64_t record_offset(const Common& c) {
  return failure_offset(c, c.num_ranks + c.num_ranks % 2);
}

__device__ __forceinline__ uint64_t record_offset(const Common& c, int from) {
  return record_offset(c) + (1 + from) * kRecordBytes;
}

__device__ __forceinline__ uint64_t answer_offset(const Common& c, int from) {
  return record_offset(c, c.num_ranks) + from * 8;
}

__device__ __forceinline__ uint64_t arrived_offset(const Common& c) { return answer_offset(c, c.num_ranks); }

// ---- ranks and nodes ------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_near(const Common& c, int rank) {
  return !kNodes || static_cast<uint32_t>(rank - c.lsa_begin) < static_cast<uint32_t>(c.lsa_size);
}

// Byte `offset` of the window of a rank of this node.
__device__ __forceinline__ uint8_t* near_pointer(const Common& c, uint64_t offset, int rank) {
  return peer_pointer(c.window, offset, kNodes ? rank - c.lsa_begin : rank);
}

template <typename T>
__device__ __forceinline__ T* own_pointer(const Common& c, uint64_t offset) {
  return reinterpret_cast<T*>(near_pointer(c, offset, c.rank));
}

__device__ __forceinline__ int near_begin(const Common& c) { return kNodes ? c.lsa_begin : 0; }
__device__ __forceinline__ int near_end(const Common& c) { return kNodes ? c.lsa_begin + c.lsa_size : c.num_ranks; }

// The rank of this node that gets what a rank of another node sends here.
__device__ __forceinline__ int relay_of(const Common& c, int source) {
  return c.rail ? c.lsa_begin + source % c.lsa_size : c.rank;
}

// Ranks of other nodes that this rank exchanges messages with, in the order of ranks.
__device__ __forceinline__ int num_remotes(const Common& c) {
  return c.rail ? c.num_ranks / c.lsa_size - 1 : c.num_ranks - c.lsa_size;
}

__device__ __forceinline__ int remote(const Common& c, int i) {
  if (!c.rail) return i < c.lsa_begin ? i : i + c.lsa_size;
  const int place = c.rank - c.lsa_begin;
  return place + (i < c.lsa_begin / c.lsa_size ? i : i + 1) * c.lsa_size;
}

__device__ __forceinline__ Network network(const Common& c, int context) { return {c.network, context, c.rail}; }

__device__ __forceinline__ uint32_t signal_index(const Common& c, int kind, int from) {
  return static_cast<uint32_t>(kind * c.num_ranks + from);
}

// The words that a signature is made of, in the order of CudaBackend's `_ARGUMENTS`.
__device__ inline void write_arguments(const Common& c, uint32_t* out) {
  const int32_t words[kArguments] = {c.operation,   c.route,       c.hidden, c.dtype,      c.scales,
                                     c.num_experts, c.has_weights, c.by_row, c.max_tokens, c.num_topk};
#pragma unroll
  for (int i = 0; i < kArguments; i++) out[i] = static_cast<uint32_t>(words[i]);
}

// One thread: this rank's record of the running operation.
__device__ inline void write_record(const Common& c, uint32_t number) {
  uint32_t* record = own_pointer<uint32_t>(c, record_offset(c));
  record[0] = number;
  record[1] = c.signature;
  write_arguments(c, record + 2);
  __threadfence_system();
}

// Counts of what arrives at this rank, int32: where the rows of each (source rank, column) begin, including the gaps in
// expert order, and how many there are, [P][L + 1] each; the column's rows in all [L + 1]; tokens of each source [P]; rows
// that arrived from other nodes. Columns 0..L-1 are experts, column L counts rows of the compact layout.
struct Counts {
  int32_t* memory;
  int num_ranks, columns;

  __device__ Counts(uint64_t address, const Common& c)
      : memory(reinterpret_cast<int32_t*>(address)), num_ranks(c.num_ranks), columns(c.num_local_experts + 1) {}

  __device__ int32_t& begin(int source, int column) const { return memory[source * columns + column]; }
  __device__ int32_t& from(int source, int column) const { return memory[(num_ranks + source) * columns + column]; }
  __device__ int32_t& total(int column) const { return memory[2 * num_ranks * columns + column]; }
  __device__ int32_t& tokens(int source) const { return memory[(2 * num_ranks + 1) * columns + source]; }
  // Rows from other nodes that came to this rank as their relay.
  __device__ int32_t& arrived() const { return memory[(2 * num_ranks + 1) * columns + num_ranks]; }
  __device__ int words() const { return (2 * num_ranks + 1) * columns + num_ranks + 1; }
  // Which of the rows of the compact layout are from this node's ranks.
  __device__ int near_rows_begin(const Common& c) const { return begin_or_total(near_begin(c)); }
  __device__ int near_rows_end(const Common& c) const { return begin_or_total(near_end(c)); }

 private:
  __device__ int begin_or_total(int source) const {
    return source < num_ranks ? begin(source, columns - 1) : total(columns - 1);
  }
};

// What follows a row that goes to another node, in words: source slot (rank * M + token); for each top-k position the
// expert and the row's number among the token's rows that come back, its number among its source's rows for the expert,
// and its number among its source's rows for the expert's rank; then the top-k weights.
constexpr int kTrailerHead = 4;
constexpr int kTrailerEntry = 3;

__device__ __forceinline__ int trailer_weights(int num_topk) { return kTrailerHead + kTrailerEntry * num_topk; }

__device__ __forceinline__ uint32_t pack_expert(int expert, int order) {
  return static_cast<uint32_t>(expert & 0xffff) | static_cast<uint32_t>(order) << 16;
}
__device__ __forceinline__ int packed_expert(uint32_t word) { return static_cast<int16_t>(word & 0xffff); }
__device__ __forceinline__ int packed_order(uint32_t word) { return static_cast<int>(word >> 16); }

// What a rank of another node counted: its rows for each expert of each rank of this node, [G][L + 1]; then (at an even
// word) its tokens and the rows that it sends to their relay here.
__device__ __forceinline__ int mirror_tail(const Common& c) {
  const int counts = c.lsa_size * (c.num_local_experts + 1);
  return counts + counts % 2;
}
__device__ __forceinline__ int mirror_words(const Common& c) { return mirror_tail(c) + 2; }

// The one that a token's expert leads to among the ranks that this rank sends to: a rank, or (hybrid) a node; -1 = none.
__device__ __forceinline__ int target_of(const Common& c, int expert) {
  if (expert < 0) return -1;
  const int rank = expert / c.num_local_experts;
  if (is_near(c, rank)) return -1;
  return c.rail ? rank / c.lsa_size : rank;
}

// All warps, each with all its lanes: `visit(begin, end)` for the rows below `capacity`, in expert order, that belong to
// no token.
template <typename Visit>
__device__ __forceinline__ void for_each_gap(const Counts& counts, int alignment, int capacity, Visit visit) {
  const int num_experts = counts.columns - 1, last = num_experts - 1;
  const int warp = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp, warps = gridDim.x * (blockDim.x / kWarp);
  for (int e = warp; e < num_experts; e += warps) {
    const int begin = counts.begin(0, e), rows = counts.total(e);
    visit(begin + rows, min(begin + (rows + alignment - 1) / alignment * alignment, capacity));
  }
  const int end = counts.begin(0, last) + (counts.total(last) + alignment - 1) / alignment * alignment;
  const int64_t left = max(capacity - end, 0);
  visit(end + static_cast<int>(left * warp / warps), end + static_cast<int>(left * (warp + 1) / warps));
}

__device__ __forceinline__ uint32_t* state_word(const Common& c, int word) {
  return reinterpret_cast<uint32_t*>(c.state) + word;
}

__device__ __forceinline__ uint32_t operation_number(const Common& c) { return *state_word(c, kSequence) + 1; }

__device__ __forceinline__ bool failed(const Common& c) { return load_relaxed(state_word(c, kFailed)) != 0; }

// Give up: the first reason is kept for the host, and peers are told so that they need not wait for this rank.
__device__ __noinline__ void give_up(const Common& c, uint32_t code, int peer, uint32_t phase, uint32_t expected,
                               uint32_t seen, uint32_t extra = 0) {
  if (atomicExch(state_word(c, kFailed), 1u) != 0) return;
  uint32_t* record = reinterpret_cast<uint32_t*>(c.error);
  record[kErrorCode] = code;
  record[kErrorPeer] = peer;
  record[kErrorPhase] = phase;
  record[kErrorExpected] = expected;
  record[kErrorSeen] = seen;
  record[kErrorExtra] = extra;
  if (code == kOtherArguments) {
    write_arguments(c, record + kErrorOurs);
    const uint8_t* theirs = is_near(c, peer) ? near_pointer(c, record_offset(c), peer)
                                             : near_pointer(c, record_offset(c, peer), relay_of(c, peer));
    for (int i = 0; i < kArguments; i++) record[kErrorTheirs + i] = reinterpret_cast<const uint32_t*>(theirs)[2 + i];
  }
  __threadfence_system();
  store_release_system(record + kErrorSet, 1);
  for (int p = near_begin(c); p < near_end(c); p++) {
    store_release_system(reinterpret_cast<uint32_t*>(near_pointer(c, failure_offset(c, c.rank), p)), 1);
  }
  if constexpr (kNodes) {
    for (int i = 0; i < num_remotes(c); i++) {
      network_signal(network(c, 0), remote(c, i), signal_index(c, kGaveUp, c.rank), kSignalUnit);
    }
  }
}

// Whether `from`, or the relay that would tell of it, has told this rank that it gave up.
__device__ inline bool peer_failed(const Common& c, int from) {
  if (is_near(c, from)) return load_acquire_system(own_pointer<uint32_t>(c, failure_offset(c, from))) != 0;
  if constexpr (kNodes) {
    const int relay = relay_of(c, from);
    if (relay != c.rank) return load_acquire_system(own_pointer<uint32_t>(c, failure_offset(c, relay))) != 0;
    return network_signal_value(network(c, 0), signal_index(c, kGaveUp, from)) != 0;
  }
  return false;
}

// One thread: wait until `arrived(&seen)` says that what `from` does in operation `number` is here. `second_hand`: that
// comes only after somebody has waited for others first, who is to give up before this rank, as he knows for whom.
template <typename Arrived>
__device__ inline bool wait_until(const Common& c, uint32_t phase, int from, uint32_t number, bool second_hand,
                                  Arrived arrived) {
  uint32_t seen = 0;
  if (arrived(&seen)) return true;
  const uint64_t start = global_nanoseconds();
  const uint64_t limit = second_hand ? 2 * c.timeout_ns : c.timeout_ns;
  for (;;) {
    pause();
    if (failed(c)) return false;
    if (peer_failed(c, from)) {
      give_up(c, kPeerFailed, from, phase, number, seen);
      return false;
    }
    if (arrived(&seen)) return true;
    if (global_nanoseconds() - start > limit) {
      give_up(c, kTimeout, from, phase, number, seen, second_hand);
      return false;
    }
  }
}

// One thread: wait until rank `from` has raised flag `kind` to `number` or further.
__device__ inline bool wait_flag(const Common& c, int kind, int from, uint32_t number, bool check_signature) {
  const uint32_t* flag = own_pointer<uint32_t>(c, flag_offset(c, kind, from));
  // What ranks of other nodes do is told by a relay, once it has heard of all. And only the flags with which an operation
  // begins, which have a signature, come before their rank has waited for the network.
  const bool second_hand = kNodes && (!is_near(c, from) || !check_signature);
  const bool here = wait_until(c, kind, from, number, second_hand, [&](uint32_t* seen) {
    *seen = load_acquire_system(flag);
    return static_cast<int32_t>(*seen - number) >= 0;
  });
  if (!here) return false;
  if (check_signature && flag[1] != c.signature) {
    give_up(c, kOtherArguments, from, kind, c.signature, flag[1]);
    return false;
  }
  return true;
}

// One thread: wait until rank `from` of another node has signalled `kind` in as many operations as `count`.
// `second_hand` as above; `contexts`: on which it may signal, from the first on.
__device__ inline bool wait_signal(const Common& c, int kind, int from, uint32_t count, uint32_t phase,
                                   uint32_t number, bool second_hand, int contexts = 1) {
  return wait_until(c, phase, from, number, second_hand, [&](uint32_t* seen) {
    *seen = own_pointer<uint32_t>(c, record_offset(c, from))[0];
    uint64_t value = 0;
    for (int i = 0; i < contexts; i++) value += network_signal_value(network(c, i), signal_index(c, kind, from));
    return value >= count * kSignalUnit;
  });
}

// One thread: whether the record of a rank of another node, which has come, is that of the same call.
__device__ inline bool check_record(const Common& c, int from, uint32_t phase) {
  const uint32_t* record = own_pointer<uint32_t>(c, record_offset(c, from));
  if (record[1] == c.signature) return true;
  give_up(c, kOtherArguments, from, phase, c.signature, record[1]);
  return false;
}

// One thread: tell a rank of another node that this rank has come to its operation, whose record is written. By value,
// so that nothing has to be waited for: a rank may have to say so to one that is not there any more.
__device__ inline void send_record(const Common& c, int to, int kind) {
  const uint64_t* record = own_pointer<uint64_t>(c, record_offset(c));
#pragma unroll 1
  for (int i = 0; i < kRecordBytes / 8; i++) {
    network_put_value(network(c, 0), to, c.window, record_offset(c, c.rank) + 8 * i, record[i]);
  }
  network_signal(network(c, 0), to, signal_index(c, kind, c.rank), kSignalUnit);
}

// All threads of the CTA agree whether this rank gave up. `word` of the shared memory is scratch.
__device__ inline bool agree_failed(const Common& c, uint32_t* word) {
  __syncthreads();
  if (threadIdx.x == 0) *word = failed(c);
  __syncthreads();
  return *word != 0;
}

// All threads of the CTA: the end of what it has put and got in a context. A rank that is gone never takes what was put to
// it, so after a failure nobody waits for that: false = this rank gave up, and what it has got is not here.
__device__ inline bool finish_transfers(const Common& c, int context, uint32_t* word) {
  if (agree_failed(c, word)) {
    if (threadIdx.x == 0) network_abandon(network(c, context));
    return false;
  }
  network_flush(network(c, context));
  return true;
}

// All threads of the CTA: wait until the ranks from `begin` to `end` have raised flag `kind` to `number`; false = this rank
// gave up. What peers wrote before raising it can then be read by ordinary and by bulk loads.
__device__ inline bool wait_ranks(const Common& c, int kind, int begin, int end, uint32_t number, bool check_signature,
                                  uint32_t* word) {
  for (int p = begin + threadIdx.x; p < end; p += blockDim.x) wait_flag(c, kind, p, number, check_signature);
  const bool gave_up = agree_failed(c, word);
  fence_proxy_async();
  return !gave_up;
}

// Likewise for every rank.
__device__ inline bool wait_all(const Common& c, int kind, uint32_t number, bool check_signature, uint32_t* word) {
  return wait_ranks(c, kind, 0, c.num_ranks, number, check_signature, word);
}

// Likewise for the ranks of this node.
__device__ inline bool wait_node(const Common& c, int kind, uint32_t number, bool check_signature, uint32_t* word) {
  return wait_ranks(c, kind, near_begin(c), near_end(c), number, check_signature, word);
}

// The first `count` threads of the CTA, which do something together. (racecheck sees neither the order that a named
// barrier makes nor that of one arrival for a warp.)
class Team {
 public:
  const int count;

  // Every thread of the CTA.
  __device__ Team() : count(static_cast<int>(blockDim.x)), barrier_(nullptr) {}

  // `barrier` of the shared memory takes as many arrivals as the team has threads.
  __device__ Team(int count, uint64_t* barrier) : count(count), barrier_(barrier) {}

  __device__ void sync() {
    if (barrier_ == nullptr) {
      __syncthreads();
      return;
    }
    mbarrier_arrive(barrier_);
    mbarrier_wait(barrier_, parity_);
    parity_ ^= 1;
  }

 private:
  uint64_t* barrier_;
  uint32_t parity_ = 0;
};

// All threads of the team: what they wrote is there for everybody; true in the last CTA whose team says so.
// `word` of the shared memory is scratch. The counter is back at 0 afterwards.
__device__ inline bool last_to_arrive(const Common& c, int counter, uint32_t* word, Team& team) {
  team.sync();
  if (threadIdx.x == 0) {
    __threadfence_system();
    *word = atomic_add_acq_rel(state_word(c, counter), 1);
  }
  team.sync();
  const bool last = *word == gridDim.x - 1;
  if (last && threadIdx.x == 0) {
    *state_word(c, counter) = 0;
    __threadfence_system();
  }
  team.sync();
  return last;
}
__device__ inline bool last_to_arrive(const Common& c, int counter, uint32_t* word) {
  Team everybody;
  return last_to_arrive(c, counter, word, everybody);
}

// One thread: raise flag `kind` of rank `from` at a rank of this node.
__device__ inline void raise_flag(const Common& c, int kind, int from, uint32_t number, uint32_t signature, int at) {
  uint32_t* flag = reinterpret_cast<uint32_t*>(near_pointer(c, flag_offset(c, kind, from), at));
  flag[1] = signature;
  __threadfence_system();
  store_release_system(flag, number);
}

// All threads of one CTA's team: raise flag `kind` at all ranks of this node; not if this rank gave up, of which they hear
// while they wait.
__device__ inline void signal_node(const Common& c, int kind, uint32_t number, Team& team) {
  if (threadIdx.x == 0) write_record(c, number);
  team.sync();
  if (failed(c)) return;
  for (int p = near_begin(c) + threadIdx.x; p < near_end(c); p += team.count) {
    raise_flag(c, kind, c.rank, number, c.signature, p);
  }
}
__device__ inline void signal_node(const Common& c, int kind, uint32_t number) {
  Team everybody;
  signal_node(c, kind, number, everybody);
}

// One thread of the operation's last CTA.
__device__ __forceinline__ void finish_operation(const Common& c, int last_word, uint32_t number) {
  *state_word(c, last_word) = number;
  *state_word(c, kSequence) = number;
}

// All bits set: NaN in every floating-point format, -1 in every integer. What a rank that gave up returns. Thread `first`
// of `step` that do it together, those of all CTAs unless said otherwise.
__device__ inline void poison(uint64_t address, uint64_t bytes, uint64_t first, uint64_t step) {
  if (address == 0) return;
  uint32_t* words = reinterpret_cast<uint32_t*>(address);
  for (uint64_t i = first; i < bytes / 4; i += step) words[i] = 0xffffffffu;
}

__device__ inline void poison(uint64_t address, uint64_t bytes) {
  poison(address, bytes, static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x,
         static_cast<uint64_t>(gridDim.x) * blockDim.x);
}

}  // namespace epv2
