// Every rank puts a row and a value to each rank that its network leads to, signals, and sums what it was sent. Window:
// this rank's row, a row and in the last one a value from each rank. out: the sum of each turn. Modes from 1 leave
// something out, those from 20 are calls with a wrong argument; test_emulator.py says which. Mode 0 runs on a GPU, too
// (test_rma_loopback.py).
#include "common/device.cuh"
#include "emulator/kernels/args.h"

EPV2_KERNEL(network, NetworkArgs, 64) {
  constexpr uint32_t kRow = 4096;
  const uint32_t thread = threadIdx.x, mine = static_cast<uint32_t>(args.rank);
  const uint64_t values = (1 + static_cast<uint64_t>(args.ranks)) * kRow;
  const epv2::Network network{args.communicator, 0, args.rail}, other{args.communicator, 1, args.rail};
  const int lsa_rank = args.rank % args.lsa_size;
  auto own = [&](uint64_t offset) { return epv2::peer_pointer(args.window, offset, lsa_rank); };
  auto for_each_peer = [&](auto visit) {
    for (int peer = 0; peer < args.ranks; peer++)
      if (peer / args.lsa_size != args.rank / args.lsa_size &&
          (args.rail == 0 || peer % args.lsa_size == lsa_rank))
        visit(peer);
  };
  uint32_t peers = 0;
  for_each_peer([&](int) { peers++; });
  auto wait = [&](auto done) {
    const uint64_t start = epv2::global_nanoseconds();
    if (thread == 0)
      while (!done() && epv2::global_nanoseconds() - start < 10000000000) epv2::pause();
    if (args.mode != 7) epv2::fence_proxy_async();
    __syncthreads();
  };

  if (args.mode >= 20) {
    if (thread != 0) return;
    const uint64_t end = values + kRow;
    const int across = (args.rank + args.lsa_size) % args.ranks;
    switch (args.mode) {
      case 20: epv2::network_put(network, args.rank ^ 1, args.window, 0, 0, 64); break;
      case 21: epv2::network_signal(network, across ^ 1, 0, 1); break;
      case 22: epv2::network_put_value(network, args.ranks, args.window, 0, 1); break;
      case 23: epv2::network_signal_value({args.communicator, 2, args.rail}, 0); break;
      case 24: epv2::network_signal(network, across, 2, 1); break;
      case 25: epv2::network_put(network, across, args.window, end - 56, 0, 64); break;
      case 26: epv2::network_put(network, across, args.window, 0, end - 56, 64); break;
      case 27: epv2::network_put_value(network, across, args.window, 12, 1); break;
      case 28: epv2::network_flush({args.communicator, 0, 0}); break;
      case 29: epv2::network_flush({12345, 0, 1}); break;
      case 30: epv2::peer_pointer(args.window, 0, args.lsa_size); break;
      case 31: epv2::network_put(network, across, args.window, 0, 0, 0); break;
      case 32: epv2::network_signal_word(network, across, args.window, 12, 1); break;
      case 33: epv2::network_signal_word(network, args.rank ^ 1, args.window, 16, 1); break;
      case 34: epv2::network_leave({12345, 0, 1}); break;
      case 35: epv2::network_signal_word(network, across, args.window, 16, 1); break;
      default: break;
    }
    return;
  }

  uint8_t* shared = epv2::shared_memory();
  auto* bar = reinterpret_cast<uint64_t*>(shared + kRow);
  if (thread == 0) {
    epv2::mbarrier_init(bar, 1);
    epv2::mbarrier_init_fence();
  }
  for (uint32_t turn = 1; turn <= static_cast<uint32_t>(args.count); turn++) {
    auto* row = reinterpret_cast<uint32_t*>(own(0));
    for (uint32_t i = thread; i < kRow / 4; i += blockDim.x) row[i] = turn * (mine + 1) + i;
    if (args.mode != 5) __syncthreads();
    if (thread == 0) {
      if (args.mode == 8) epv2::bulk_store(row, shared, 64);
      for_each_peer([&](int peer) {
        epv2::network_put(network, peer, args.window, (1 + mine) * kRow, 0, kRow / 2);
        epv2::network_put(network, peer, args.window, (1 + mine) * kRow + kRow / 2, kRow / 2, kRow / 2);
        epv2::network_put_value(network, peer, args.window, values + 8 * mine, 1000 * turn + mine);
        epv2::network_signal(args.mode == 2 ? other : network, peer, 0, turn);
      });
    }
    const bool last = turn == static_cast<uint32_t>(args.count);
    if (args.mode == 4 && thread == 0) row[0] = 0;
    const bool flushes = thread == (args.mode == 6 && last ? 32u : 0u) && !(args.mode == 3 && last);
    if (args.mode == 0 || flushes) epv2::network_flush(network);
    if (args.mode == 1)
      wait([&] {
        bool all = true;
        for_each_peer([&](int peer) {
          const auto* value = reinterpret_cast<const uint32_t*>(own(values + 8 * static_cast<uint64_t>(peer)));
          all &= epv2::load_acquire_system(value) == 1000 * turn + static_cast<uint32_t>(peer);
        });
        return all;
      });
    else
      wait([&] {
        return epv2::network_signal_value(args.mode == 2 ? other : network, 0) >= peers * turn * (turn + 1) / 2;
      });
    uint32_t sum = 0;
    for_each_peer([&](int peer) {
      const auto from = static_cast<uint64_t>(peer);
      if (thread == 0) {
        epv2::mbarrier_arrive_expect(bar, kRow);
        epv2::bulk_load(shared, own((1 + from) * kRow), kRow, bar);
        sum += *reinterpret_cast<const uint32_t*>(own(values + 8 * from));
      }
      epv2::mbarrier_wait(bar, 0);
      const auto* sent = reinterpret_cast<const uint32_t*>(shared);
      for (uint32_t i = thread; i < kRow / 4; i += blockDim.x) sum += sent[i];
      __syncthreads();
      if (thread == 0) {
        epv2::mbarrier_init(bar, 1);
        epv2::mbarrier_init_fence();
      }
      __syncthreads();
    });
    atomicAdd(reinterpret_cast<uint32_t*>(args.out) + turn - 1, sum);
    __syncthreads();
    if (thread == 0) for_each_peer([&](int peer) { epv2::network_signal(network, peer, 1, 1); });  // it may put again
    wait([&] { return epv2::network_signal_value(network, 1) >= peers * turn; });
  }
}
