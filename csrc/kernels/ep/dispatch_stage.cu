// Dispatch, first kernel: put this rank's tokens, routing and counts where peers can read them.
//
// 1. Some warps: routing to int16, counts per chunk of 32 tokens. The last CTA to finish turns them into prefix sums and
//    totals and raises kCountsReady.
// 2. One warp then reads what all ranks counted and tells the host how many rows arrive; between nodes dispatch_send does.
// 3. All other warps meanwhile, and these when they are done, take row after row and put it into the window: copied, or
//    cast to e4m3 with a scale factor per 128 values (EPV2_CAST: 0 = copy, 1 = from bf16, 2 = from fp16, 3 = from fp32).
//    kRowsReady follows.
#include "ep/counts.cuh"

using namespace epv2;

namespace {

constexpr int kLeastCounting = 8;  // warps of a CTA that count, where there is memory for so many

// ---- counts ---------------------------------------------------------------------------------------------------

__device__ void count_chunk(const DispatchStageArgs& args, int chunk, int32_t* count, int16_t* topk_out,
                            int32_t* counts_out) {
  const Common& c = args.common;
  const int lane = threadIdx.x % kWarp, columns = c.num_local_experts + 1, width = count_width(c);
  const int num_experts = c.num_ranks * c.num_local_experts;
  for (int i = lane; i < width; i += kWarp) count[i] = 0;
  __syncwarp();
  const int token = chunk * kChunk + lane;
  if (token < args.num_tokens) {
    const int64_t* topk = reinterpret_cast<const int64_t*>(args.topk_idx) + static_cast<int64_t>(token) * c.num_topk;
    for (int k = 0; k < c.num_topk; k++) {
      int64_t expert = topk[k];
      if (expert < -1 || expert >= num_experts) {
        give_up(c, kBadExpert, c.rank, kCountsReady, static_cast<uint32_t>(expert), token, k);
        expert = -1;
      }
      topk_out[static_cast<int64_t>(token) * c.num_topk + k] = static_cast<int16_t>(expert);
      if (expert < 0) continue;
      const int rank = static_cast<int>(expert) / c.num_local_experts;
      atomicAdd(&count[rank * columns + static_cast<int>(expert) % c.num_local_experts], 1);
      bool first = true;  // of this token's experts on that rank
      for (int j = 0; j < k; j++) {
        const int64_t other = topk[j];
        if (other >= 0 && other < num_experts && static_cast<int>(other) / c.num_local_experts == rank) first = false;
      }
      if (first) atomicAdd(&count[rank * columns + c.num_local_experts], 1);
      if constexpr (kNodes) {
        if (!c.rail || !first) continue;
        const int node = rank / c.lsa_size;
        for (int j = 0; j < k; j++) {
          const int64_t other = topk[j];
          if (other >= 0 && other < num_experts && static_cast<int>(other) / c.num_local_experts / c.lsa_size == node) {
            first = false;
          }
        }
        if (first) atomicAdd(&count[c.num_ranks * columns + node], 1);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < width; i += kWarp) counts_out[static_cast<int64_t>(chunk) * width + i] = count[i];
  __syncwarp();
}

// One CTA's team: counts of every chunk -> what came before it, and the totals. `partial` holds a word for each thread.
__device__ void sum_chunks(int32_t* counts, int32_t* totals, int width, int num_chunks, int32_t* partial,
                           Team& team) {
  const int segments = max(1, team.count / width);
  const int length = (num_chunks + segments - 1) / segments;
  for (int base = 0; base < width; base += team.count) {
    const int column = base + threadIdx.x % width, segment = threadIdx.x / width;
    const bool active = segment < segments && column < width;
    const int from = min(segment * length, num_chunks), to = min(from + length, num_chunks);
    int sum = 0;
    if (active) {
#pragma unroll 8
      for (int i = from; i < to; i++) sum += counts[static_cast<int64_t>(i) * width + column];
      partial[threadIdx.x] = sum;
    }
    team.sync();
    if (active) {
      int before = 0;
      for (int s = 0; s < segment; s++) before += partial[s * width + threadIdx.x % width];
      if (segment == segments - 1) totals[column] = before + sum;
      // Some at a time: a load may not pass a store to what could be the same place.
      for (int i = from; i < to; i += kAhead) {
        int here[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; j++) here[j] = i + j < to ? counts[static_cast<int64_t>(i + j) * width + column] : 0;
#pragma unroll
        for (int j = 0; j < kAhead; j++) {
          if (i + j < to) counts[static_cast<int64_t>(i + j) * width + column] = before;
          before += here[j];
        }
      }
    }
    team.sync();
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------

#if EPV2_CAST
constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestAmax = 1e-4f;  // keeps the scale factor of an all-zero block finite
constexpr int kScaleBlock = 128;
constexpr int kSourceVectors = EPV2_CAST == 3 ? 2 : 1;  // of 16 bytes, for 8 values

// 8 values as they came. They are widened twice, which costs less than the registers to keep them wide.
struct Raw {
  uint4 vector[kSourceVectors];

  __device__ __forceinline__ void widen(float* out) const {
#if EPV2_CAST == 3
    const uint4 a = vector[0], b = vector[1];
    const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = __uint_as_float(words[i]);
#else
    const uint32_t words[4] = {vector[0].x, vector[0].y, vector[0].z, vector[0].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[2 * i] = EPV2_CAST == 1 ? bf16_low(words[i]) : half_low(words[i]);
      out[2 * i + 1] = EPV2_CAST == 1 ? bf16_high(words[i]) : half_high(words[i]);
    }
#endif
  }
};

#if EPV2_CAST == 3
// Larger of two magnitudes; NaN wins, as in torch.
__device__ __forceinline__ float max_magnitude(float a, float b) { return a > b || a != a ? a : b; }
#endif

constexpr int kUnroll = 4 / kSourceVectors;     // vectors of 8 values that a lane casts at once
constexpr int kStrip = kUnroll * kWarp * 8;     // values that a warp casts at once

// One warp casts a strip of a row, or the `left` values that its last one has. 16 lanes hold one block of 128 values, 8
// each, so that loads and stores are contiguous.
template <bool kWhole>
__device__ __forceinline__ void cast_strip(const uint8_t* from, uint8_t* to, float* scales, int left) {
  const int lane = threadIdx.x % kWarp;
  Raw raw[kUnroll];
  float amax[kUnroll];
#pragma unroll
  for (int j = 0; j < kUnroll; j++) {
    const int vector = j * kWarp + lane;
#pragma unroll
    for (int i = 0; i < kSourceVectors; i++) {
      raw[j].vector[i] = kWhole || vector * 8 < left ? load_streaming(from + (vector * kSourceVectors + i) * 16)
                                                     : make_uint4(0, 0, 0, 0);
    }
  }
#if EPV2_CAST == 3
#pragma unroll
  for (int j = 0; j < kUnroll; j++) {
    float value[8];
    raw[j].widen(value);
    amax[j] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) amax[j] = max_magnitude(amax[j], fabsf(value[i]));
  }
#pragma unroll
  for (int d = 1; d < 16; d *= 2) {
#pragma unroll
    for (int j = 0; j < kUnroll; j++) amax[j] = max_magnitude(amax[j], __shfl_xor_sync(0xffffffffu, amax[j], d));
  }
#else
  // Magnitudes stay 16 bits wide, two vectors in a word: half the shuffles, and no widening.
  uint32_t most[kUnroll];
#pragma unroll
  for (int j = 0; j < kUnroll; j++) {
    const uint4 v = raw[j].vector[0];
    most[j] = max_halves(max_halves(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu),
                         max_halves(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu));
  }
#pragma unroll
  for (int j = 0; j < kUnroll; j += 2) {
    const uint32_t low = (most[j] & 0xffffu) | most[j + 1] << 16, high = most[j] >> 16 | (most[j + 1] & 0xffff0000u);
    uint32_t pair = max_halves(low, high);
#pragma unroll
    for (int d = 1; d < 16; d *= 2) pair = max_halves(pair, __shfl_xor_sync(0xffffffffu, pair, d));
    amax[j] = EPV2_CAST == 1 ? bf16_low(pair) : half_low(pair);
    amax[j + 1] = EPV2_CAST == 1 ? bf16_high(pair) : half_high(pair);
  }
#endif
  // Lane j of each half warp divides for vector j. A NaN is no smaller than the smallest: it stays, as on the host.
  const int mine = lane % kUnroll;
  float my_amax = amax[0];
#pragma unroll
  for (int j = 1; j < kUnroll; j++) my_amax = mine == j ? amax[j] : my_amax;
  my_amax = my_amax < kSmallestAmax ? kSmallestAmax : my_amax;
  const float my_inverse = __fdiv_rn(kE4m3Max, my_amax);
  const int my_block = mine * 2 + lane / 16;
  if (lane % 16 < kUnroll && (kWhole || my_block * kScaleBlock < left)) {
    scales[my_block] = __fdiv_rn(my_amax, kE4m3Max);
  }
#pragma unroll
  for (int j = 0; j < kUnroll; j++) {
    const float inverse = __shfl_sync(0xffffffffu, my_inverse, lane / 16 * 16 + j);
    const int at = (j * kWarp + lane) * 8;
    if (!kWhole && at >= left) continue;
    float v[8];
    raw[j].widen(v);
    *reinterpret_cast<uint2*>(to + at) =
        make_uint2(pack_e4m3x4(v[0] * inverse, v[1] * inverse, v[2] * inverse, v[3] * inverse),
                   pack_e4m3x4(v[4] * inverse, v[5] * inverse, v[6] * inverse, v[7] * inverse));
  }
}

// One warp casts one row.
__device__ void cast_row(const uint8_t* from, uint8_t* to, float* scales, int hidden) {
  int left = hidden;
  for (; left >= kStrip; left -= kStrip) {
    cast_strip<true>(from, to, scales, kStrip);
    from += kStrip * 2 * (EPV2_CAST == 3 ? 2 : 1);
    to += kStrip;
    scales += kStrip / kScaleBlock;
  }
  if (left > 0) cast_strip<false>(from, to, scales, left);
}
#else
// One warp copies one row of a multiple of 16 bytes.
__device__ void copy_row(const uint8_t* from, uint8_t* to, int bytes) {
  const int vectors = bytes / 16;
  int i = threadIdx.x % kWarp;
  for (; i + 3 * kWarp < vectors; i += 4 * kWarp) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = load_streaming(from + (i + j * kWarp) * 16);
#pragma unroll
    for (int j = 0; j < 4; j++) store_streaming(to + (i + j * kWarp) * 16, v[j]);
  }
  for (; i < vectors; i += kWarp) store_streaming(to + i * 16, load_streaming(from + i * 16));
}
#endif

__device__ void stage_row(const DispatchStageArgs& args, uint8_t* rows, int token) {
  const uint8_t* from = reinterpret_cast<const uint8_t*>(args.x) + static_cast<int64_t>(token) * args.x_bytes;
  uint8_t* to = rows + static_cast<int64_t>(token) * args.row_stride;
#if EPV2_CAST
  cast_row(from, to, reinterpret_cast<float*>(to + args.data_bytes), args.data_bytes);
#else
  copy_row(from, to, args.x_bytes);
  const uint32_t* scales = reinterpret_cast<const uint32_t*>(args.scales);
  uint32_t* scales_out = reinterpret_cast<uint32_t*>(to + args.data_bytes);
  for (int i = threadIdx.x % kWarp; i < args.scale_words; i += kWarp) {
    scales_out[i] = scales[static_cast<int64_t>(token) * args.scale_words + i];
  }
#endif
}

}  // namespace

// Shared memory: 4 words, blockDim.x words, L + 1 words, then P * (L + 1) words for each of as many warps as fit, at
// least one.
EPV2_KERNEL(epv2_dispatch_stage, DispatchStageArgs, 896) {
  const Common& c = args.common;
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const uint32_t number = operation_number(c);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  int32_t* partial = reinterpret_cast<int32_t*>(scratch) + 4;
  int32_t* column_total = partial + blockDim.x;
  int32_t* warp_counts = column_total + c.num_local_experts + 1;
  uint8_t* window = own_pointer<uint8_t>(c, 0);

  // Few warps of many CTAs count; it takes more where the chunks are many.
  const int num_chunks = (args.num_tokens + kChunk - 1) / kChunk;
  const int counting_warps = min(args.counting_warps, max(kLeastCounting, (num_chunks + gridDim.x - 1) / gridDim.x));
  uint64_t* barrier = reinterpret_cast<uint64_t*>(scratch + 2);
  Team counting(kWarp * min(num_warps, counting_warps), barrier);
  if (threadIdx.x == 0) mbarrier_init(barrier, counting.count);
  mbarrier_init_fence();

  // Peers may still be reading what the last dispatch put there.
  if (!wait_node(c, kDispatchDone, *state_word(c, kLastDispatch), false, scratch)) return;

  const int copying = args.cached ? static_cast<int>(blockDim.x) : counting.count;  // threads
  if (args.topk_weights != 0 && static_cast<int>(threadIdx.x) < copying) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(args.topk_weights);
    uint32_t* to = reinterpret_cast<uint32_t*>(window + args.weights_offset);
    const int step = gridDim.x * copying;
    for (int i = blockIdx.x * copying + threadIdx.x; i < args.num_tokens * c.num_topk; i += step) to[i] = from[i];
  }
  if (!args.cached && static_cast<int>(threadIdx.x) < counting.count) {
    const int width = count_width(c);
    int32_t* prefix = reinterpret_cast<int32_t*>(window + args.prefix_offset);
    int32_t* totals = reinterpret_cast<int32_t*>(window + args.totals_offset);
    for (int chunk = blockIdx.x + gridDim.x * warp; chunk < num_chunks; chunk += gridDim.x * (counting.count / kWarp)) {
      count_chunk(args, chunk, warp_counts + warp * width, reinterpret_cast<int16_t*>(window + args.topk_offset), prefix);
    }
    if (last_to_arrive(c, kCounted, scratch + 1, counting)) {
      __threadfence();
      sum_chunks(prefix, totals, width, num_chunks, partial, counting);
      if (threadIdx.x == 0) totals[width] = args.num_tokens;
      counting.sync();
      __threadfence_system();
      signal_node(c, kCountsReady, number, counting);
    }
  }
  if constexpr (!kNodes) {
    if (!args.cached && blockIdx.x == 0 && warp == num_warps - 1) gather_counts(args, number, column_total);
  }

  // A warp that had something else to do takes fewer rows. The next one is asked for while this one is staged.
  uint32_t* next_row = state_word(c, kNextRow);
  auto take = [&] {
    uint32_t row = 0;
    if (threadIdx.x % kWarp == 0) row = atomicAdd(next_row, 1u);
    return static_cast<int>(__shfl_sync(0xffffffffu, row, 0));
  };
  uint8_t* rows = window + args.rows_offset;
  for (int row = take(), next; row < args.num_tokens; row = next) {
    next = take();
    stage_row(args, rows, row);
  }
  if (last_to_arrive(c, kArrived, scratch)) {
    if (threadIdx.x == 0) *next_row = 0;
    signal_node(c, kRowsReady, number);
  }
}
