// Sums of this rank's part over the ranks' windows, in rank order, in fp32 (fp64 of fp64), scaled, rounded once. The
// stream has waited for every rank's part before: no rank waits for another in here.
//
// Each group of warps takes pieces of the part in turn, and its producer feeds every rank's to the ring before it goes
// on. A link between GPUs takes 2 us and more to answer: the rings, which fill an SM's shared memory, hide that.
#include "common/sum_ring.cuh"
#include "sessions/args.h"

using namespace epv2;

namespace {

struct Scaled {
  Wide factor;

  __device__ __forceinline__ Wide finish(Wide sum) const { return sum * factor; }
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
      producer.push(parts[rank] + offset, out + offset, bytes, rank == 0, rank == args.num_ranks - 1);
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
  Value* out = reinterpret_cast<Value*>(args.out);
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
    sum[0] = scaled.finish(sum[0]);
    const uint4 bits = narrow(sum);
    out[i] = static_cast<Value>(static_cast<uint64_t>(bits.y) << 32 | bits.x);
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
  if (args.offset % 16 != 0 || args.count * sizeof(Value) % 16 != 0 || args.out % 16 != 0) {
    sum_values(args, scaled, parts);
    return;
  }
  share_rings(
      args, [&](int group, const Ring& ring) { produce(args, Pieces(args, group), ring, parts); },
      [&](int group, const Ring& ring, int consumer) { add(scaled, Pieces(args, group), ring, consumer); });
}
