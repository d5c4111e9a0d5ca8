// Every rank writes rows to every peer's window, sets a flag there, waits for all flags and sums what it was sent.
// Window: flags [ranks], at 4096 rows of 4096 bytes [ranks]. out: the sum of each turn. Waits end
// after ten seconds.
#include "emulator/device.h"
#include "emulator/kernels/args.h"

EPV2_KERNEL(flags, TestArgs, 256) {
  constexpr uint32_t kRow = 4096;
  const auto mine = static_cast<uint32_t>(args.rank), ranks = static_cast<uint32_t>(args.ranks);
  auto raise = [&](uint32_t peer, uint32_t value) {
    uint8_t* flag = epv2::peer_pointer(args.window, 4 * mine, static_cast<int>(peer));
    epv2::store_release_system(reinterpret_cast<uint32_t*>(flag), value);
  };
  auto* shared = reinterpret_cast<uint32_t*>(epv2::shared_memory());
  for (uint32_t turn = 1; turn <= static_cast<uint32_t>(args.count); turn++) {
    for (uint32_t i = threadIdx.x; i < kRow / 4; i += blockDim.x) shared[i] = turn * (mine + 1) + i;
    epv2::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      for (uint32_t peer = 0; peer < ranks; peer++)
        epv2::bulk_store(epv2::peer_pointer(args.window, (1 + mine) * kRow, static_cast<int>(peer)), shared, kRow);
      epv2::bulk_commit();
      args.mode == 0 ? epv2::bulk_wait_all() : epv2::bulk_wait_read<0>();  // the latter is the mistake of mode 1
      for (uint32_t peer = 0; peer < ranks; peer++) raise(peer, 2 * turn - 1);
    }
    auto* flags = reinterpret_cast<uint32_t*>(epv2::peer_pointer(args.window, 0, args.rank));
    auto wait = [&](uint32_t value) {
      const uint64_t start = epv2::global_nanoseconds();
      if (threadIdx.x < ranks)
        while (epv2::load_acquire_system(flags + threadIdx.x) < value &&
               epv2::global_nanoseconds() - start < 10000000000)
          epv2::pause();
      __syncthreads();
    };
    wait(2 * turn - 1);
    uint32_t sum = 0;
    for (uint32_t peer = 0; peer < ranks; peer++) {
      const uint8_t* sent = epv2::peer_pointer(args.window, (1 + peer) * kRow, args.rank);
      const auto* row = reinterpret_cast<const uint32_t*>(sent);
      for (uint32_t i = threadIdx.x; i < kRow / 4; i += blockDim.x) sum += row[i];
    }
    atomicAdd(reinterpret_cast<uint32_t*>(args.out) + turn - 1, sum);
    __syncthreads();
    if (threadIdx.x < ranks) raise(threadIdx.x, 2 * turn);  // read: the peers may write again
    wait(2 * turn);
  }
}
