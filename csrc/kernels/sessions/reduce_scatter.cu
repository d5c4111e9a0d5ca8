// Sums of a rank's part over the ranks' windows, in rank order, in fp32 (fp64 of fp64), scaled, rounded once. The
// stream has waited for every part before: no rank waits for another in here.
//
// Between nodes the same kernel sums what a node has for a rank, which is not rounded, and then what nodes have brought:
// EPV2_SUM_DTYPE is what sums are rounded to, EPV2_DTYPE unless given.
//
// Each group of warps takes pieces of the part in turn, and its producer feeds every rank's to the ring before it goes
// on. A link between GPUs takes 2 us and more to answer: the rings, which fill an SM's shared memory, hide that.
#include "common/sum_ring.cuh"
#include "sessions/args.h"

using namespace epv2;

namespace {

#ifndef EPV2_SUM_DTYPE
#define EPV2_SUM_DTYPE EPV2_DTYPE
#endif

using Sum = std::conditional_t<EPV2_SUM_DTYPE == 4, uint64_t, std::conditional_t<EPV2_SUM_DTYPE == 3, uint32_t, uint16_t>>;

__device__ __forceinline__ uint32_t pack(float low, float high) {
  return EPV2_SUM_DTYPE == 1 ? pack_bf16(low, high) : pack_half(low, high);
}

struct Scaled {
  Wide factor;

  // As AddOnly, but rounded to Sum, which may take half or twice the room.
  __device__ __forceinline__ void store(uint8_t* out, int number, const Wide* sum) const {
    Wide scaled[kPerVector];
#pragma unroll
    for (int i = 0; i < kPerVector; i++) scaled[i] = sum[i] * factor;
    uint8_t* to = out + number * kPerVector * sizeof(Sum);
#if EPV2_SUM_DTYPE == EPV2_DTYPE
    store_streaming(to, narrow(scaled));
#elif EPV2_SUM_DTYPE == 3
#pragma unroll
    for (int i = 0; i < kPerVector; i += 4) {
      store_streaming(to + 4 * i, make_uint4(__float_as_uint(scaled[i]), __float_as_uint(scaled[i + 1]),
                                             __float_as_uint(scaled[i + 2]), __float_as_uint(scaled[i + 3])));
    }
#else
    const uint64_t high = pack(scaled[2], scaled[3]);
    *reinterpret_cast<uint64_t*>(to) = high << 32 | pack(scaled[0], scaled[1]);
#endif
  }

  __device__ __forceinline__ Sum round(Wide sum) const {
#if EPV2_SUM_DTYPE == 4
    const double value = sum * factor;
    return static_cast<uint64_t>(double_high(value)) << 32 | double_low(value);
#elif EPV2_SUM_DTYPE == 3
    return __float_as_uint(sum * factor);
#else
    return static_cast<Sum>(pack(sum * factor, 0));
#endif
  }
};

// Where a group's pieces lie: every `step`-th from `first` on.
struct Pieces {
  uint64_t part_bytes;
  int piece_bytes, first, step, end;

  __device__ Pieces(const ReduceScatterArgs& args, int group)
      : part_bytes(args.count * sizeof(Value)),
        piece_bytes(args.piece_bytes),
        first(blockIdx.x + gridDim.x * group),
        step(gridDim.x * args.num_groups),
        end(static_cast<int>((part_bytes + args.piece_bytes - 1) / args.piece_bytes)) {}

  __device__ uint64_t offset(int piece) const { return static_cast<uint64_t>(piece) * piece_bytes; }
  __device__ int bytes(int piece) const {
    return static_cast<int>(min(static_cast<uint64_t>(piece_bytes), part_bytes - offset(piece)));
  }
};

__device__ void produce(const ReduceScatterArgs& args, const Pieces& pieces, const Ring& ring,
                        const uint8_t* const* parts) {
  fence_proxy_async();  // the parts were written by other ranks, in whatever way
  uint8_t* out = reinterpret_cast<uint8_t*>(args.out);
  Producer producer(ring);
  for (int piece = pieces.first; piece < pieces.end; piece += pieces.step) {
    const uint64_t offset = pieces.offset(piece);
    const int bytes = pieces.bytes(piece);
    for (int rank = 0; rank < args.num_ranks; rank++) {
      producer.push(parts[rank] + offset, out + offset / sizeof(Value) * sizeof(Sum), bytes, rank == 0,
                    rank == args.num_ranks - 1);
    }
  }
  producer.end();
}

__device__ void add(const Scaled& scaled, const Pieces& pieces, const Ring& ring, int consumer) {
  if (pieces.first >= pieces.end) return;
  const int count = (pieces.end - pieces.first - 1) / pieces.step + 1;
  const int last_vectors = pieces.bytes(pieces.first + (count - 1) * pieces.step) / 16;
  consume(ring, consumer, last_vectors, count, nullptr, scaled);
}

// One value after the other, as 16 bytes of which only the first count: where a rank's part is no multiple of 16 bytes,
// no other rank's begins at one.
__device__ void sum_values(const ReduceScatterArgs& args, const Scaled& scaled, const uint8_t* const* parts) {
  Sum* out = reinterpret_cast<Sum*>(args.out);
  const auto load = [&](int rank, uint64_t i, Wide* wide) {
    const uint64_t bits = reinterpret_cast<const Value*>(parts[rank])[i];
    widen(make_uint4(static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), 0, 0), wide);
  };
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count; i += step) {
    Wide sum[kPerVector], value[kPerVector];
    load(0, i, sum);
    for (int rank = 1; rank < args.num_ranks; rank++) {
      load(rank, i, value);
      sum[0] += value[0];
    }
    out[i] = scaled.round(sum[0]);
  }
}

}  // namespace

// Shared memory: see make_ring; behind the rings the addresses of all ranks' parts.
EPV2_KERNEL(epv2_reduce_scatter, ReduceScatterArgs, 768) {
  const uint8_t** parts = reinterpret_cast<const uint8_t**>(behind_rings(args));
  for (int rank = threadIdx.x; rank < args.num_ranks; rank += blockDim.x) {
    const int near = rank - args.first;
    parts[rank] = near >= 0 && near < args.near
                      ? peer_pointer(args.window, args.offset, near)
                      : peer_pointer(args.window, args.incoming + rank * args.count * sizeof(Value), args.own);
  }
  init_rings(args);
  const Scaled scaled{static_cast<Wide>(args.scale)};
  if (args.offset % 16 != 0 || args.incoming % 16 != 0 || args.count * sizeof(Value) % 16 != 0 || args.out % 16 != 0) {
    sum_values(args, scaled, parts);
    return;
  }
  share_rings(
      args, [&](int group, const Ring& ring) { produce(args, Pieces(args, group), ring, parts); },
      [&](int group, const Ring& ring, int consumer) { add(scaled, Pieces(args, group), ring, consumer); });
}
