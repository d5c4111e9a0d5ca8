// Sums of this rank's part over the ranks' windows, in rank order, in fp32 (fp64 of fp64), scaled, rounded once. The stream has
// waited for every rank's part before: no rank waits for another in here.
// Resources: registers only. A thread has kVectors loads of 16 bytes in flight, and those of the next rank behind them.
#include "common/device.cuh"
#include "sessions/args.h"

namespace epv2 {
namespace {

constexpr int kVectors = 4;

#if EPV2_DTYPE == 1 || EPV2_DTYPE == 2
struct Sum {
  float values[8];

  static __device__ __forceinline__ float low(uint32_t pair) {
#if EPV2_DTYPE == 1
    return bf16_low(pair);
#else
    return half_low(pair);
#endif
  }
  static __device__ __forceinline__ float high(uint32_t pair) {
#if EPV2_DTYPE == 1
    return bf16_high(pair);
#else
    return half_high(pair);
#endif
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
#if EPV2_DTYPE == 1
    return pack_bf16(low, high);
#else
    return pack_half(low, high);
#endif
  }
  __device__ __forceinline__ void set(uint4 v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) values[2 * i] = low(words[i]), values[2 * i + 1] = high(words[i]);
  }
  __device__ __forceinline__ void add(uint4 v) {
    Sum other;
    other.set(v);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = __fadd_rn(values[i], other.values[i]);
  }
  __device__ __forceinline__ void scale(double factor) {
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = __fmul_rn(values[i], static_cast<float>(factor));
  }
  __device__ __forceinline__ uint4 get() const {
    return {pack(values[0], values[1]), pack(values[2], values[3]), pack(values[4], values[5]),
            pack(values[6], values[7])};
  }
};
using Value = uint16_t;
#elif EPV2_DTYPE == 3
struct Sum {
  float values[4];

  __device__ __forceinline__ void set(uint4 v) {
    values[0] = __uint_as_float(v.x), values[1] = __uint_as_float(v.y);
    values[2] = __uint_as_float(v.z), values[3] = __uint_as_float(v.w);
  }
  __device__ __forceinline__ void add(uint4 v) {
    Sum other;
    other.set(v);
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = __fadd_rn(values[i], other.values[i]);
  }
  __device__ __forceinline__ void scale(double factor) {
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = __fmul_rn(values[i], static_cast<float>(factor));
  }
  __device__ __forceinline__ uint4 get() const {
    return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
            __float_as_uint(values[3])};
  }
};
using Value = uint32_t;
#else
struct Sum {
  double values[2];

  __device__ __forceinline__ void set(uint4 v) { values[0] = make_double(v.x, v.y), values[1] = make_double(v.z, v.w); }
  __device__ __forceinline__ void add(uint4 v) {
    values[0] += make_double(v.x, v.y);
    values[1] += make_double(v.z, v.w);
  }
  __device__ __forceinline__ void scale(double factor) { values[0] *= factor, values[1] *= factor; }
  __device__ __forceinline__ uint4 get() const {
    return {double_low(values[0]), double_high(values[0]), double_low(values[1]), double_high(values[1])};
  }
};
using Value = uint64_t;
#endif

// One value alone: where a rank's part is no multiple of 16 bytes, no other rank's begins at one.
__device__ __forceinline__ uint4 widen(Value value) {
  const uint64_t bits = value;
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), 0, 0};
}

__device__ __forceinline__ Value narrow(uint4 v) {
  return static_cast<Value>(static_cast<uint64_t>(v.y) << 32 | v.x);
}

}  // namespace
}  // namespace epv2

EPV2_KERNEL(epv2_reduce_scatter, ReduceScatterArgs, 512) {
  using namespace epv2;
  const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto part = [&](int rank) {
    const int near = rank - args.first;
    if (near >= 0 && near < args.near) return peer_pointer(args.window, args.offset, near);
    return peer_pointer(args.window, args.incoming + rank * args.count * sizeof(Value), args.own);
  };
  const bool aligned = args.offset % 16 == 0 && args.count * sizeof(Value) % 16 == 0 && args.out % 16 == 0;
  if (!aligned) {
    Value* out = reinterpret_cast<Value*>(args.out);
    for (uint64_t i = thread; i < args.count; i += threads) {
      Sum sum;
      sum.set(widen(reinterpret_cast<const Value*>(part(0))[i]));
      for (int rank = 1; rank < args.num_ranks; rank++) sum.add(widen(reinterpret_cast<const Value*>(part(rank))[i]));
      sum.scale(args.scale);
      out[i] = narrow(sum.get());
    }
    return;
  }
  const uint64_t vectors = args.count * sizeof(Value) / 16;
  uint4* out = reinterpret_cast<uint4*>(args.out);
  for (uint64_t first = thread; first < vectors; first += threads * kVectors) {
    uint4 next[kVectors] = {};
    const auto load = [&](int rank) {
      const uint4* from = reinterpret_cast<const uint4*>(part(rank));
#pragma unroll
      for (int i = 0; i < kVectors; i++)
        if (first + i * threads < vectors) next[i] = load_streaming(from + first + i * threads);
    };
    Sum sums[kVectors];
    load(0);
#pragma unroll
    for (int i = 0; i < kVectors; i++) sums[i].set(next[i]);
    if (args.num_ranks > 1) load(1);
    for (int rank = 1; rank < args.num_ranks; rank++) {
      uint4 now[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; i++) now[i] = next[i];
      if (rank + 1 < args.num_ranks) load(rank + 1);
#pragma unroll
      for (int i = 0; i < kVectors; i++) sums[i].add(now[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; i++)
      if (first + i * threads < vectors) {
        sums[i].scale(args.scale);
        store_streaming(out + first + i * threads, sums[i].get());
      }
  }
}
