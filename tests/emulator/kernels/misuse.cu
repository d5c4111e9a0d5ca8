// One mistake for each `mode`; the messages are in test_emulator.py.
#include "emulator/device.h"
#include "emulator/kernels/args.h"

static __noinline__ uint64_t recurse(int depth) {
  volatile uint64_t room[64];
  room[depth % 64] = static_cast<uint64_t>(depth);
  return depth < 0 ? 0 : recurse(depth + 1) + room[depth % 64];
}

EPV2_KERNEL(misuse, TestArgs, 128) {
  const int thread = static_cast<int>(threadIdx.x);
  uint8_t* shared = epv2::shared_memory();
  auto* bar = reinterpret_cast<uint64_t*>(shared);
  uint8_t* data = shared + 128;
  auto* global = reinterpret_cast<uint8_t*>(args.out);
  if (thread == 0) {
    epv2::mbarrier_init(bar, 1);
    epv2::mbarrier_init_fence();
  }
  __syncthreads();
  switch (args.mode) {
    case 0: epv2::barrier_sync(1, thread < 32 ? 64 : 96); break;
    case 1: epv2::barrier_sync(1, 96); break;  // 128 threads come: the rest waits for ever
    case 2: if (thread != 5) __syncwarp(); break;
    case 3: thread % 2 == 0 ? static_cast<void>(__ballot_sync(0xffffffff, 1)) : __syncwarp(); break;
    case 4: __syncwarp(0xffff); break;
    case 5: if (thread == 9) { epv2::mbarrier_arrive_expect(bar, 16); epv2::mbarrier_arrive(bar); } break;
    case 6: epv2::mbarrier_wait(bar + 1, 0); break;
    case 7: epv2::bulk_load(data + 8, global, 16, bar); break;
    case 8: epv2::bulk_load(data, global + 4, 16, bar); break;
    case 9: epv2::bulk_store(global, data, 24); break;
    case 10: epv2::bulk_store(global, data + 1024 * 1024, 16); break;
    case 11: if (thread == 0) epv2::bulk_load(data, global, 64, bar); break;
    case 12: if (thread < 2) epv2::bulk_load(data + 16 * thread, global, 64, bar); break;
    case 13: if (thread == 3) *reinterpret_cast<volatile uint8_t*>(uint64_t{64}) = 1; break;
    case 14: epv2::peer_pointer(args.window, 0, args.ranks); break;
    case 15: epv2::peer_pointer(args.window, 1ull << 40, 0); break;
    case 16: epv2::peer_pointer(12345, 0, 0); break;
    case 17: while (true) epv2::pause();
    case 18: if (thread == 0) { epv2::bulk_store(global, data, 16); epv2::bulk_commit(); } break;
    case 19: if (thread == 0) epv2::bulk_store(global, data, 16); break;
    case 20: epv2::barrier_sync(2, 128 + 32); break;
    case 21: if (thread < 100) __syncthreads(); else epv2::barrier_sync(3, 64); break;
    case 22: if (thread == 0) *reinterpret_cast<volatile uint8_t*>(shared + args.count) = 1; break;
    case 23: if (thread == 7) *reinterpret_cast<volatile uint64_t*>(bar) = 0;
      __syncthreads();
      if (thread == 0) epv2::mbarrier_arrive(bar);
      break;
    case 24: if (thread % 2 == 0 || thread >= 96) epv2::barrier_sync(4, 64); break;  // half of some warps
    case 25: if (thread == 9) epv2::mbarrier_arrive_expect(bar, 1 << 20); break;
    case 26: if (thread == 9) *(bar + 1) = recurse(thread); break;
    case 27: if (thread == 9) epv2::mbarrier_wait(bar, 2); break;
    case 28: if (thread == 9) atomicAdd(reinterpret_cast<uint32_t*>(data + 2), 1); break;
    case 29: if (thread == 9) __syncthreads(); else epv2::barrier_sync(16, 32); break;
    case 30: if (thread == 9) reinterpret_cast<uint4*>(global + 8)->y = 1; break;
    case 31: if (thread == 9) epv2::store_streaming(global + 4, make_uint4(1, 2, 3, 4)); break;
    case 32: if (thread == 9) *global = static_cast<uint8_t>(255u >> (args.mode + thread - 9)); break;
    default: break;
  }
}
