// Each collective, atomic and barrier, with its result in out[collective][CTA][thread].
#include "emulator/device.h"
#include "emulator/kernels/args.h"

EPV2_KERNEL(collectives, TestArgs, 1024) {
  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  auto* out = reinterpret_cast<uint32_t*>(args.out) + blockIdx.x * blockDim.x + thread;
  const unsigned stride = gridDim.x * blockDim.x;
  const unsigned value = thread * 7 + blockIdx.x;
  auto put = [&](uint32_t result) {
    *out = result;
    out += stride;
  };
  put(__shfl_sync(0xffffffff, value, static_cast<int>(lane * 5)));
  put(__shfl_sync(0xffffffff, value, 3, 8));
  put(__shfl_xor_sync(0xffffffff, value, 9));
  put(__shfl_up_sync(0xffffffff, value, 3u));
  put(__shfl_down_sync(0xffffffff, value, 3u, 16));
  put(__ballot_sync(0xffffffff, lane % 3 == 0));
  put(static_cast<uint32_t>(__any_sync(0xffffffff, lane == warp)));
  put(static_cast<uint32_t>(__all_sync(0xffffffff, lane < 32 - warp)));
  put(__match_any_sync(0xffffffff, lane % 5));
  put(static_cast<uint32_t>(__shfl_xor_sync(0xffffffff, uint64_t{value} << 32, 1) >> 32));
  put(static_cast<uint32_t>(__shfl_down_sync(0xffffffff, 0.5f * value, 1u) * 2));

  // Reversed within the CTA through shared memory; half of the threads each with a named barrier of their own.
  auto* shared = reinterpret_cast<uint32_t*>(epv2::shared_memory());
  shared[thread] = value;
  __syncthreads();
  put(shared[blockDim.x - 1 - thread]);
  __syncthreads();
  const unsigned half = blockDim.x / 2, group = thread / half;
  shared[thread] = value + 1;
  epv2::barrier_sync(1 + static_cast<int>(group), static_cast<int>(half));
  put(shared[group * half + (half - 1 - thread % half)]);
  __syncwarp();

  auto* counter = reinterpret_cast<uint32_t*>(args.in);
  atomicAdd(counter, 2);
  atomicMax(counter + 1, value);
  atomicOr(counter + 2, 1u << lane);
  atomicMax(reinterpret_cast<int*>(counter + 3), -static_cast<int>(thread) - 1);
  atomicAdd(reinterpret_cast<unsigned long long*>(counter + 4), 1ull << 31);
  if (atomicCAS(counter + 6, 0u, 1 + value) == 0) atomicExch(counter + 7, value);
  epv2::atomic_add_acq_rel(counter + 8, 1);
  if (thread >= 32) return;  // the others' __syncthreads counts without these
  __syncthreads();
  put(epv2::load_relaxed(counter + 8));
}
