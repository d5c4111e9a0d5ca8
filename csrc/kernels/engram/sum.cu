// Reduce: sums in fp32 over the entries of each row, one after the other. Twice in a reduce: each rank sums its own
// entries into its window, then the owner what all ranks staged for it, in rank order. A sum begins with zero. Between
// nodes put.cu runs in between, and what came from other nodes lies in the owner's window.
#include "engram/engram.cuh"

using namespace epv2;

namespace {

constexpr int kRows = 32;  // that a CTA sums at once

template <int kWidth>
struct Columns {
  float v[kWidth];
};

template <int kWidth>
__device__ __forceinline__ Columns<kWidth> load(const uint8_t* row, int column) {
#if EPV2_DTYPE == 3
  if constexpr (kWidth == 4) {
    const uint4 w = load_streaming(row + 16 * column);
    return {{__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w)}};
  } else {
    return {{reinterpret_cast<const float*>(row)[column]}};
  }
#else
#if EPV2_DTYPE == 1
  const auto low = bf16_low, high = bf16_high;
#else
  const auto low = half_low, high = half_high;
#endif
  if constexpr (kWidth == 4) {
    const uint2 w = reinterpret_cast<const uint2*>(row)[column];
    return {{low(w.x), high(w.x), low(w.y), high(w.y)}};
  } else {
    return {{low(reinterpret_cast<const uint16_t*>(row)[column])}};
  }
#endif
}

struct Source {
  const uint8_t* values;
  int32_t first;  // entry whose row is at `values`
  int32_t end;
};

template <int kWidth>
__device__ void sum_rows(const EngramSumArgs& args, const Source* sources) {
  constexpr int kAhead = 4;
  constexpr int kValueBytes = EPV2_DTYPE == 3 ? 4 : 2;
  const int32_t* items = reinterpret_cast<const int32_t*>(args.items);
  const int32_t* begins = reinterpret_cast<const int32_t*>(args.begins);
  const int columns = args.hidden / kWidth;
  for (int first = blockIdx.x * kRows; first < args.num_rows; first += gridDim.x * kRows) {
    const int rows = min(args.num_rows - first, kRows);
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
      reinterpret_cast<int64_t*>(args.out_rows)[first + i] = reinterpret_cast<const int64_t*>(args.distinct)[first + i];
    }
    for (int unit = threadIdx.x; unit < rows * columns; unit += blockDim.x) {
      const int row = first + unit / columns, column = unit % columns, end = begins[row + 1];
      Columns<kWidth> sum = {};
      int source = 0;
      for (int begin = begins[row]; begin < end; begin += kAhead) {
        Columns<kWidth> next[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
          if (begin + k >= end) continue;
          const int item = items[begin + k];
          while (item >= sources[source].end) source++;
          const Source& from = sources[source];
          const int64_t offset = static_cast<int64_t>(item - from.first) * args.hidden * kValueBytes;
          next[k] = load<kWidth>(from.values + offset, column);
        }
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
          if (begin + k >= end) continue;
#pragma unroll
          for (int i = 0; i < kWidth; i++) sum.v[i] = __fadd_rn(sum.v[i], next[k].v[i]);
        }
      }
      float* out = reinterpret_cast<float*>(args.out) + static_cast<int64_t>(row) * args.hidden + column * kWidth;
      if constexpr (kWidth == 4) {
        store_streaming(out, make_uint4(__float_as_uint(sum.v[0]), __float_as_uint(sum.v[1]),
                                        __float_as_uint(sum.v[2]), __float_as_uint(sum.v[3])));
      } else {
        *out = sum.v[0];
      }
    }
  }
}

}  // namespace

// Shared memory: 16 bytes, then a `Source` for each rank.
EPV2_KERNEL(epv2_engram_sum, EngramSumArgs, 1024) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  Source* sources = reinterpret_cast<Source*>(scratch + 4);
  if (threadIdx.x == 0) {
    if (!args.from_peers) {
      sources[0] = {reinterpret_cast<const uint8_t*>(args.values), 0, 0x7fffffff};
    } else {
      const Told* told = own_pointer<const Told>(c, args.told_offset);
      const uint64_t sum_bytes = static_cast<uint64_t>(args.hidden) * 4;
      int first = 0, arrived = 0;
      for (int p = 0; p < c.num_ranks; p++) {
        const uint8_t* values;
        if (is_near(c, p)) {
          values = node_pointer(c, args.staging, args.sums_offset + told[p].first * sum_bytes, p);
        } else {
          values = node_pointer(c, args.staging, args.arrived_sums_offset + arrived * sum_bytes, c.rank);
          arrived += told[p].rows;
        }
        sources[p] = {values, first, first + told[p].rows};
        first += told[p].rows;
      }
    }
  }
  if (agree_failed(c, scratch)) {
    poison(args.out, static_cast<uint64_t>(args.num_rows) * args.hidden * 4);
    return;
  }
  if (args.width == 4) {
    sum_rows<4>(args, sources);
  } else {
    sum_rows<1>(args, sources);
  }
  if (last_to_arrive(c, kArrived, scratch)) {
    if (!args.from_peers) {
      signal_node(c, kSumsStaged, number);
      return;
    }
    signal_all(c, kReduceDone, number, false);
    if (threadIdx.x == 0) {
      if (kNodes) ++*state_word(c, kReduces);
      finish_operation(c, kLastReduce, number);
    }
  }
}
