// Accesses to shared memory that something orders (even modes), and the same with that thing left out (odd modes).
#include "emulator/device.h"
#include "emulator/kernels/args.h"

EPV2_KERNEL(order, TestArgs, 128) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const bool good = args.mode % 2 == 0;
  uint8_t* shared = epv2::shared_memory();
  auto* full = reinterpret_cast<uint64_t*>(shared);  // [2]
  auto* empty = full + 2;                            // [2]
  auto* words = reinterpret_cast<uint32_t*>(shared + 128);
  auto* out = reinterpret_cast<uint32_t*>(args.out) + blockIdx.x * 128 + thread;
  if (thread == 0) {
    for (int i = 0; i < 2; i++) {
      epv2::mbarrier_init(&full[i], 32);
      epv2::mbarrier_init(&empty[i], good ? 96 : 64);
    }
    epv2::mbarrier_init_fence();
  }
  __syncthreads();
  switch (args.mode / 2) {
    case 0:  // within a warp
      words[thread] = static_cast<uint32_t>(thread);
      good ? __syncwarp() : static_cast<void>(__ballot_sync(0xffffffff, 1));
      *out = words[thread ^ 1];
      break;
    case 1:  // bytes of one word are different places, the same byte is not
      shared[128 + (good ? thread : thread & ~1)] = static_cast<uint8_t>(thread);
      break;
    case 2:  // atomics don't race with each other, plain accesses do with them
      if (thread == 0) words[0] = 0;
      __syncthreads();
      atomicAdd(words, 1);
      if (good) __syncthreads();
      *out = words[0];
      break;
    case 3: {  // a warp produces, three consume, through a ring of two slots
      constexpr uint32_t turns = 20;
      uint32_t sum = 0;
      for (uint32_t turn = 0; turn < turns; turn++) {
        const uint32_t slot = turn % 2, parity = turn / 2 & 1;
        if (warp == 0) {
          epv2::mbarrier_wait(&empty[slot], parity ^ 1);
          words[slot * 32 + lane] = turn + lane;
          epv2::mbarrier_arrive(&full[slot]);
        } else {
          epv2::mbarrier_wait(&full[slot], parity);
          sum += words[slot * 32 + 31 - lane];
          if (good || warp != 3) epv2::mbarrier_arrive(&empty[slot]);  // else the third warp is not waited for
        }
      }
      *out = sum;
      break;
    }
    case 4: {  // a flag in global memory
      auto* flag = reinterpret_cast<uint32_t*>(args.in) + blockIdx.x;
      if (thread == 64) {
        words[0] = 7;
        if (good) epv2::store_release_system(flag, 1); else atomicExch(flag, 1);
      } else if (thread == 3) {
        while (epv2::load_acquire_system(flag) == 0) epv2::pause();
        *out = words[0];
      }
      break;
    }
    case 5:  // a named barrier orders those who come to it
      if (warp < 2) words[thread] = 5;
      if (warp != 1) epv2::barrier_sync(3, 96); else if (good) epv2::barrier_sync(4, 32);
      if (warp == 2) *out = words[good ? lane : 32 + lane];
      break;
    case 6:  // many read what nobody writes; then one writes it
      if (thread == 0) words[0] = 3;
      __syncthreads();
      *out = words[0];
      if (good) __syncthreads();
      if (thread == 127) words[0] = 4;
      break;
    case 7:  // after bulk_wait_read a slot may be written, after one of the two groups only that one's
      words[thread] = 1;
      epv2::fence_proxy_async();
      __syncthreads();
      if (thread == 0) {
        for (int i = 0; i < 2; i++) {
          epv2::bulk_store(reinterpret_cast<uint8_t*>(args.out) + 512 * blockIdx.x + 256 * i, words + 64 * i, 256);
          epv2::bulk_commit();
        }
        epv2::bulk_wait_read<1>();
        words[good ? 63 : 64] = 2;
        epv2::bulk_wait_all();
      }
      break;
    case 8: {  // a peer's flag, then a bulk load of its data
      uint8_t* window = epv2::peer_pointer(args.window, 0, 0);
      if (thread == 40)
        while (epv2::load_acquire_system(reinterpret_cast<uint32_t*>(window)) == 0) epv2::pause();
      __syncthreads();
      if (good) epv2::fence_proxy_async();
      if (thread == 0) {
        epv2::mbarrier_arrive_expect(&full[0], 256);
        epv2::bulk_load(words, window + 256, 256, &full[0]);
      } else if (thread < 32) {
        epv2::mbarrier_arrive(&full[0]);
      }
      epv2::mbarrier_wait(&full[0], 0);
      *out = words[lane];
      break;
    }
    case 9:  // global memory
      *out = static_cast<uint32_t>(thread);
      if (good) __syncthreads();
      if (thread == 77) out[-77] = out[-76] + 1;
      break;
    default: break;
  }
}
