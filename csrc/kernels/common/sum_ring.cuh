// Sums in fp32 (fp64 of fp64): a producer warp feeds pieces through a ring of shared memory, consumer warps add them up.
//
// Each consumer warp owns 128 vectors of 16 bytes of the piece, so that all of them take every piece in the same order:
// sums never depend on timing. EPV2_DTYPE: 1 = bf16, 2 = fp16, 3 = fp32, 4 = fp64. A kernel's arguments `Args` have
// num_groups independent rings of a CTA, with num_slots pieces of piece_bytes each.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace epv2 {

using Wide = std::conditional_t<EPV2_DTYPE == 4, double, float>;  // what sums run in
using Value = std::conditional_t<EPV2_DTYPE == 4, uint64_t, std::conditional_t<EPV2_DTYPE == 3, uint32_t, uint16_t>>;
constexpr int kVectors = 4;                     // of 16 bytes that a lane owns
constexpr int kPerVector = 16 / sizeof(Value);  // values in 16 bytes

enum SlotFlags { kFirst = 1, kLast = 2, kZero = 4, kEnd = 8, kRagged = 16 };  // the last is a consumer's own

// One group of warps of the CTA: its first warp produces, the others consume.
struct Ring {
  uint8_t* memory;      // [slots][piece_bytes]
  uint64_t* barriers;   // [slots] of each of the CTA's rings in turn
  int slots, piece_bytes, all_slots;

  __device__ uint64_t* full(int slot) const { return barriers + slot; }
  __device__ uint64_t* empty(int slot) const { return barriers + all_slots + slot; }
  // Address that the sum is written to, and SlotFlags.
  __device__ uint64_t* info(int slot) const { return barriers + 2 * all_slots + slot; }
};

// Where the rings of a CTA lie, after 128 bytes of scratch. See sizing._ring_shape.
template <typename Args>
__device__ inline Ring make_ring(const Args& args, int group) {
  const int all_slots = args.num_groups * args.num_slots, first = group * args.num_slots;
  uint8_t* memory = shared_memory() + 128;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + all_slots * args.piece_bytes);
  return Ring{memory + first * args.piece_bytes, barriers + first, args.num_slots, args.piece_bytes, all_slots};
}

// Behind the rings: room for what a kernel adds.
template <typename Args>
__device__ inline uint64_t* behind_rings(const Args& args) {
  const Ring first = make_ring(args, 0);
  return first.info(first.all_slots);
}

// All threads of the CTA. `others`: warps of a group that do not add.
template <typename Args>
__device__ inline void init_rings(const Args& args, int others = 1) {
  const int consumers = blockDim.x / kWarp / args.num_groups - others;
  const Ring first = make_ring(args, 0);
  for (int i = threadIdx.x; i < first.all_slots; i += blockDim.x) {
    mbarrier_init(first.full(i), 1);
    mbarrier_init(first.empty(i), consumers);
  }
  mbarrier_init_fence();
  __syncthreads();
}

// The producer warp's side. Lane 0 alone touches the ring.
class Producer {
 public:
  __device__ explicit Producer(const Ring& ring) : ring_(ring), lane_(threadIdx.x % kWarp) {}

  // Add `bytes` at `from` to a sum that goes to `out`.
  __device__ void push(const uint8_t* from, uint8_t* out, int bytes, bool first, bool last) {
    if (lane_ == 0) {
      mbarrier_wait(ring_.empty(slot_), parity_ ^ 1);
      *ring_.info(slot_) = reinterpret_cast<uint64_t>(out) | (first ? kFirst : 0) | (last ? kLast : 0);
      mbarrier_arrive_expect(ring_.full(slot_), bytes);
      bulk_load(ring_.memory + slot_ * ring_.piece_bytes, from, bytes, ring_.full(slot_));
    }
    advance();
  }

  // Write zeros to `out`.
  __device__ void push_zero(uint8_t* out) { push_info(reinterpret_cast<uint64_t>(out) | kFirst | kLast | kZero); }

  __device__ void end() { push_info(kEnd); }

 private:
  __device__ void push_info(uint64_t info) {
    if (lane_ == 0) {
      mbarrier_wait(ring_.empty(slot_), parity_ ^ 1);
      *ring_.info(slot_) = info;
      mbarrier_arrive(ring_.full(slot_));
    }
    advance();
  }

  __device__ void advance() {
    __syncwarp();
    if (++slot_ == ring_.slots) {
      slot_ = 0;
      parity_ ^= 1;
    }
  }

  const Ring ring_;
  const int lane_;
  int slot_ = 0;
  uint32_t parity_ = 0;
};

__device__ __forceinline__ void widen(uint4 v, Wide* out) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if EPV2_DTYPE == 4
    if (i % 2 == 0) out[i / 2] = make_double(words[i], words[i + 1]);
#elif EPV2_DTYPE == 3
    out[i] = __uint_as_float(words[i]);
#else
    out[2 * i] = EPV2_DTYPE == 1 ? bf16_low(words[i]) : half_low(words[i]);
    out[2 * i + 1] = EPV2_DTYPE == 1 ? bf16_high(words[i]) : half_high(words[i]);
#endif
  }
}

__device__ __forceinline__ uint4 narrow(const Wide* in) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if EPV2_DTYPE == 4
    words[i] = i % 2 == 0 ? double_low(in[i / 2]) : double_high(in[i / 2]);
#elif EPV2_DTYPE == 3
    words[i] = __float_as_uint(in[i]);
#else
    words[i] = EPV2_DTYPE == 1 ? pack_bf16(in[2 * i], in[2 * i + 1]) : pack_half(in[2 * i], in[2 * i + 1]);
#endif
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A lane's vectors of a piece, from its first one on; zero where `is_there(number)` is false.
template <int v = 0, typename IsThere>
__device__ __forceinline__ void load_vectors(SharedPointer data, uint4* raw, IsThere is_there) {
  if constexpr (v < kVectors) {
    raw[v] = is_there(v) ? data.load_128<v * kWarp * 16>() : make_uint4(0, 0, 0, 0);
    load_vectors<v + 1>(data, raw, is_there);
  }
}

// What a consumer does with a sum: 16 bytes of the values that it added, as the `number`-th such of `out`.
struct AddOnly {
  __device__ __forceinline__ void store(uint8_t* out, int number, const Wide* sum) const {
    store_streaming(out + number * 16, narrow(sum));
  }
};

// A consumer warp, number `consumer` of its group: add what comes until the producer's end.
// Sums come piece after piece of a row; the last piece may be narrower. `done`, if any, counts the rows it has written.
template <typename Work = AddOnly>
__device__ inline void consume(const Ring& ring, int consumer, int last_vectors, int num_pieces,
                               uint32_t* done = nullptr, const Work& work = {}) {
  const int lane = keep(threadIdx.x % kWarp), first_vector = keep(consumer * kVectors * kWarp + lane);
  const int full_vectors = ring.piece_bytes / 16, to_empty = keep(8 * ring.all_slots), to_info = keep(16 * ring.all_slots);
  Wide sum[kVectors][kPerVector];
  uint32_t parity = 0;
  int piece = 0;
  const SharedPointer first_barrier(ring.full(0)), end(ring.full(ring.slots)), first_data(ring.memory + first_vector * 16);
  // A warp whose vectors are all there, in every piece, need not look which are: that is nearly every warp.
  const int least = num_pieces == 1 ? last_vectors : min(full_vectors, last_vectors);
  const int ragged = keep((consumer + 1) * kVectors * kWarp <= least ? 0 : kRagged);
  for (SharedPointer barrier = first_barrier, data = first_data;;) {
    barrier.wait(parity);
    const uint64_t info = barrier.load_64(to_info);
    const int flags = static_cast<int>(info);
    if (flags & kEnd) return;
    const int vectors = piece == num_pieces - 1 ? last_vectors : full_vectors;
    uint4 raw[kVectors];
    if (((flags & kZero) | ragged) == 0) {
      load_vectors(data, raw, [](int) { return true; });
    } else {
      load_vectors(data, raw, [&](int v) { return first_vector + v * kWarp < vectors && !(flags & kZero); });
    }
    if (flags & kFirst) {
#pragma unroll
      for (int v = 0; v < kVectors; v++) widen(raw[v], sum[v]);
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
        Wide value[kPerVector];
        widen(raw[v], value);
#pragma unroll
        for (int i = 0; i < kPerVector; i++) sum[v][i] += value[i];
      }
    }
    // Values as wide as their sum begin one as they are: no instruction has waited for these by now, and the next bulk
    // load into their slot must not overtake the reads.
    if constexpr (kPerVector * sizeof(Wide) == 16) fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) barrier.arrive(to_empty);
    barrier.advance(8);
    data.advance(ring.piece_bytes);
    if (barrier == end) {
      barrier = first_barrier;
      data = first_data;
      parity ^= 1;
    }
    if (flags & kLast) {
      uint8_t* out = reinterpret_cast<uint8_t*>(info & ~uint64_t{15});
#pragma unroll
      for (int v = 0; v < kVectors; v++) {
        const int i = first_vector + v * kWarp;
        if (i < vectors) work.store(out, i, sum[v]);
      }
      if (++piece == num_pieces) {
        piece = 0;
        if (done != nullptr) {
          __threadfence_system();
          __syncwarp();
          if (lane == 0) publish(done, *done + 1);
        }
      }
    }
  }
}

// All warps of the CTA: the first of each group calls `produce(group, ring)`, each other `add(group, ring, consumer)`.
template <typename Args, typename Produce, typename Add>
__device__ __forceinline__ void share_rings(const Args& args, Produce produce, Add add) {
  const int warps_per_group = blockDim.x / kWarp / args.num_groups, warp = threadIdx.x / kWarp;
  const int group = warp / warps_per_group, role = warp % warps_per_group;
  const Ring ring = make_ring(args, group);
  if (role == 0) {
    produce(group, ring);
  } else {
    add(group, ring, role - 1);
  }
}

}  // namespace epv2
