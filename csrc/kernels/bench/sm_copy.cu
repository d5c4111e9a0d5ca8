// What one SM can move: rows go from global to shared memory and back by bulk copies, one issuing thread a warp.
// Resources: warps x stages x (row_bytes + 8) bytes of shared memory, rows first.
#include "common/device.cuh"
#include "bench/args.h"

EPV2_KERNEL(epv2_sm_copy, SmCopyArgs, 1024) {
  const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, stages = args.stages, row = args.row_bytes;
  uint8_t* ring = epv2::shared_memory() + static_cast<size_t>(warp) * stages * row;
  uint64_t* bars = reinterpret_cast<uint64_t*>(epv2::shared_memory() + static_cast<size_t>(warps) * stages * row) +
                   warp * stages;
  if (threadIdx.x % 32 == 0) {
    for (uint32_t s = 0; s < stages; s++) epv2::mbarrier_init(bars + s, 1);
    epv2::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x % 32 != 0) return;

  // Neighbouring CTAs take neighbouring rows.
  const uint32_t first = warp * gridDim.x + blockIdx.x, stride = gridDim.x * warps;
  const uint32_t count = first < args.rows ? (args.rows - first + stride - 1) / stride : 0;
  const uint8_t* source = reinterpret_cast<const uint8_t*>(args.source) + static_cast<size_t>(first) * row;
  uint8_t* target = reinterpret_cast<uint8_t*>(args.target) + static_cast<size_t>(first) * args.writes * row;
  const auto load = [&](uint32_t s) {
    epv2::mbarrier_arrive_expect(bars + s, row);
    epv2::bulk_load(ring + s * row, source, row, bars + s);
    source += static_cast<size_t>(stride) * row;
  };

  if (args.reads) {
    for (uint32_t i = 0; i + 1 < stages && i < count; i++) load(i);
  }
  uint32_t slot = 0, phases = 0;  // bit s: parity of the load that slot s waits for
  for (uint32_t i = 0; i < count; i++) {
    if (args.reads) {
      epv2::mbarrier_wait(bars + slot, phases >> slot & 1);
      phases ^= 1u << slot;
    }
    for (uint32_t w = 0; w < args.writes; w++) epv2::bulk_store(target + w * row, ring + slot * row, row);
    target += static_cast<size_t>(stride) * args.writes * row;
    if (args.writes) epv2::bulk_commit();
    if (!args.reads) {
      epv2::bulk_wait_read<2>();  // nothing is overwritten: this only bounds what is in flight
    } else if (i + stages - 1 < count) {
      // The slot filled next is the one before this: its stores, all but the newest group, must have read it.
      if (args.writes) epv2::bulk_wait_read<1>();
      load(slot ? slot - 1 : stages - 1);
    }
    if (++slot == stages) slot = 0;
  }
  epv2::bulk_wait_all();
}
