// How ranks wait for each other: flags in the window, counters in device memory, one error record on the host.
//
// Every operation has a number, the same on all ranks because all call the same operations in the same order. It lives
// in device memory, so that a captured graph counts on at every replay. A rank tells its peers that something is ready
// by writing the operation's number (and the signature of its arguments) into their windows.
#pragma once

#include "common/device.cuh"
#include "ep/args.h"

namespace epv2 {

constexpr int kWarp = 32;
constexpr int kChunk = 32;  // tokens whose expert counts are kept together

// Words of `Common::state`.
enum State {
  kSequence = 0,       // number of the last finished operation
  kLastDispatch = 1,   // number of the last dispatch
  kLastCombine = 2,    // number of the last combine
  kFailed = 3,         // 1 once this rank gave up
  kArrived = 4,        // CTAs of the running kernel that are done
  kCounted = 5,        // CTAs of dispatch_stage that have counted their tokens
  kStateWords = 32,
};

// Window, first bytes: flags [kind][rank]{number, signature}, one uint32 per rank that says that it gave up, and the
// words behind this rank's signature, with which a peer explains one that differs from its own.
enum Flag {
  kCountsReady = 0,   // dispatch: routing, weights and counts
  kRowsReady = 1,     // dispatch: rows
  kDispatchDone = 2,  // dispatch: this rank has read what it needs
  kSumsReady = 3,     // combine: rows to return
  kCombineDone = 4,   // combine: this rank has read what it needs
  kBarrier = 5,
  kFlagKinds = 6,
};

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
  kTimeout = 1,        // peer did not come
  kPeerFailed = 2,     // peer gave up
  kOtherArguments = 3, // peer came with another signature
  kBadExpert = 4,      // topk_idx[seen, extra] = expected is no expert
  kTooManyRows = 5,    // a row number beyond the output's size
};

__device__ __forceinline__ uint64_t flag_offset(const Common& c, int kind, int from) {
  return (static_cast<uint64_t>(kind) * c.num_ranks + from) * 8;
}

__device__ __forceinline__ uint64_t failure_offset(const Common& c, int from) {
  return static_cast<uint64_t>(kFlagKinds) * c.num_ranks * 8 + from * 4;
}

__device__ __forceinline__ uint64_t arguments_offset(const Common& c) {
  return failure_offset(c, c.num_ranks + c.num_ranks % 2);
}

// The words that a signature is made of, in the order of CudaBackend's `_ARGUMENTS`.
__device__ inline void write_arguments(const Common& c, uint32_t* out) {
  const int32_t words[kArguments] = {c.operation,   c.route,       c.hidden, c.dtype,      c.scales,
                                     c.num_experts, c.has_weights, c.by_row, c.max_tokens, c.num_topk};
#pragma unroll
  for (int i = 0; i < kArguments; i++) out[i] = static_cast<uint32_t>(words[i]);
}

// Counts of what arrives at this rank, int32: where the rows of each (source rank, column) begin, the column's rows
// from each source [P][L + 1] twice; the rows in expert order including gaps; tokens of each source [P].
// Columns 0..L-1 are experts, column L counts rows of the compact layout.
struct Counts {
  int32_t* memory;
  int num_ranks, columns;

  __device__ Counts(uint64_t address, const Common& c)
      : memory(reinterpret_cast<int32_t*>(address)), num_ranks(c.num_ranks), columns(c.num_local_experts + 1) {}

  __device__ int32_t& begin(int source, int column) const { return memory[source * columns + column]; }
  __device__ int32_t& from(int source, int column) const { return memory[(num_ranks + source) * columns + column]; }
  __device__ int32_t& total(int column) const { return memory[2 * num_ranks * columns + column]; }
  __device__ int32_t& tokens(int source) const { return memory[(2 * num_ranks + 1) * columns + source]; }
  __device__ int words() const { return (2 * num_ranks + 1) * columns + num_ranks; }
};

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
    const uint32_t* theirs = reinterpret_cast<uint32_t*>(peer_pointer(c.window, arguments_offset(c), peer));
    for (int i = 0; i < kArguments; i++) record[kErrorTheirs + i] = theirs[i];
  }
  __threadfence_system();
  store_release_system(record + kErrorSet, 1);
  for (int p = 0; p < c.num_ranks; p++) {
    store_release_system(reinterpret_cast<uint32_t*>(peer_pointer(c.window, failure_offset(c, c.rank), p)), 1);
  }
}

// One thread: wait until rank `from` has raised flag `kind` to `number` or further.
__device__ inline bool wait_flag(const Common& c, int kind, int from, uint32_t number, bool check_signature) {
  const uint32_t* flag = reinterpret_cast<uint32_t*>(peer_pointer(c.window, flag_offset(c, kind, from), c.rank));
  const uint32_t* failure = reinterpret_cast<uint32_t*>(peer_pointer(c.window, failure_offset(c, from), c.rank));
  uint32_t seen = load_acquire_system(flag);
  if (static_cast<int32_t>(seen - number) < 0) {
    const uint64_t start = global_nanoseconds();
    do {
      pause();
      if (failed(c)) return false;
      if (load_acquire_system(failure) != 0) {
        give_up(c, kPeerFailed, from, kind, number, seen);
        return false;
      }
      seen = load_acquire_system(flag);
      if (static_cast<int32_t>(seen - number) < 0 && global_nanoseconds() - start > c.timeout_ns) {
        give_up(c, kTimeout, from, kind, number, seen);
        return false;
      }
    } while (static_cast<int32_t>(seen - number) < 0);
  }
  if (check_signature && flag[1] != c.signature) {
    give_up(c, kOtherArguments, from, kind, c.signature, flag[1]);
    return false;
  }
  return true;
}

// All threads of the CTA agree whether this rank gave up. `word` of the shared memory is scratch.
__device__ inline bool agree_failed(const Common& c, uint32_t* word) {
  __syncthreads();
  if (threadIdx.x == 0) *word = failed(c);
  __syncthreads();
  return *word != 0;
}

// All threads of the CTA: wait until every rank has raised flag `kind` to `number`; false = this rank gave up.
// What peers wrote before raising it can then be read by ordinary and by bulk loads.
__device__ inline bool wait_all(const Common& c, int kind, uint32_t number, bool check_signature, uint32_t* word) {
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) wait_flag(c, kind, p, number, check_signature);
  const bool gave_up = agree_failed(c, word);
  fence_proxy_async();
  return !gave_up;
}

// All threads of the CTA: what this CTA wrote is there for everybody; true in the last CTA that says so.
// `word` of the shared memory is scratch. The counter is back at 0 afterwards.
__device__ inline bool last_to_arrive(const Common& c, int counter, uint32_t* word) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    *word = atomic_add_acq_rel(state_word(c, counter), 1);
  }
  __syncthreads();
  const bool last = *word == gridDim.x - 1;
  if (last && threadIdx.x == 0) {
    *state_word(c, counter) = 0;
    __threadfence_system();
  }
  __syncthreads();
  return last;
}

// All threads of one CTA: raise flag `kind` at all ranks.
__device__ inline void signal_all(const Common& c, int kind, uint32_t number) {
  if (threadIdx.x == 0) {
    write_arguments(c, reinterpret_cast<uint32_t*>(peer_pointer(c.window, arguments_offset(c), c.rank)));
    __threadfence_system();
  }
  __syncthreads();
  for (int p = threadIdx.x; p < c.num_ranks; p += blockDim.x) {
    uint32_t* flag = reinterpret_cast<uint32_t*>(peer_pointer(c.window, flag_offset(c, kind, c.rank), p));
    flag[1] = c.signature;
    __threadfence_system();
    store_release_system(flag, number);
  }
}

// One thread of the operation's last CTA.
__device__ __forceinline__ void finish_operation(const Common& c, int last_word, uint32_t number) {
  *state_word(c, last_word) = number;
  *state_word(c, kSequence) = number;
}

// All bits set: NaN in every floating-point format, -1 in every integer. What a rank that gave up returns.
__device__ inline void poison(uint64_t address, uint64_t bytes) {
  if (address == 0) return;
  uint32_t* words = reinterpret_cast<uint32_t*>(address);
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes / 4; i += step) {
    words[i] = 0xffffffffu;
  }
}

}  // namespace epv2
