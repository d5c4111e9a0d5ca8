// Every rank gets a row from each rank of the other node, a part of it by each thread, and sums it. Window: this rank's
// row, then a row from each rank. out: the sum of each turn. Modes from 1 leave something out, those from 20 are calls
// with a wrong argument; test_emulator.py says which.
#include "common/device.cuh"
#include "emulator/kernels/args.h"

EPV2_KERNEL(gets, NetworkArgs, 64) {
  constexpr uint32_t kRow = 4096, kPart = kRow / 64;
  const uint32_t thread = threadIdx.x, mine = static_cast<uint32_t>(args.rank);
  const epv2::Network network{args.communicator, 0, args.rail};
  const int first_far = args.rank < args.lsa_size ? args.lsa_size : 0;
  auto own = [&](uint64_t offset) {
    return reinterpret_cast<uint32_t*>(epv2::peer_pointer(args.window, offset, args.rank % args.lsa_size));
  };
  auto wait = [&](uint32_t signal, uint64_t value) {
    const uint64_t start = epv2::global_nanoseconds();
    if (thread == 0)
      while (epv2::network_signal_value(network, signal) < value && epv2::global_nanoseconds() - start < 10000000000)
        epv2::pause();
    __syncthreads();
  };
  auto tell = [&](uint32_t signal) {
    if (thread == 0)
      for (int i = 0; i < args.lsa_size; i++) epv2::network_signal(network, first_far + i, signal, 1);
  };

  if (args.mode >= 20) {
    if (thread != 0) return;
    switch (args.mode) {
      case 20: epv2::network_get(network, args.rank ^ 1, args.window, kRow, 0, 64); break;
      case 21: epv2::network_get(network, first_far, args.window, (2 + args.ranks) * kRow - 56, 0, 64); break;
      case 22: epv2::network_get(network, first_far, args.window, 0, (2 + args.ranks) * kRow - 56, 64); break;
      case 23: epv2::network_get(network, first_far, args.window, 0, 0, 0); break;
      default: break;
    }
    return;
  }
  for (uint32_t turn = 1; turn <= static_cast<uint32_t>(args.count); turn++) {
    for (uint32_t i = thread; i < kRow / 4; i += blockDim.x) own(0)[i] = turn * (mine + 1) + i;
    __syncthreads();
    tell(0);
    wait(0, turn * static_cast<uint64_t>(args.lsa_size));
    if (args.mode == 4 && thread == 1) atomicAdd(reinterpret_cast<uint32_t*>(args.out), own((1 + first_far) * kRow)[0]);
    for (int i = 0; i < args.lsa_size; i++) {
      const uint64_t to = (1 + static_cast<uint64_t>(first_far + i)) * kRow;
      epv2::network_get(network, first_far + i, args.window, to + thread * kPart, thread * kPart, kPart);
    }
    __syncthreads();
    if (args.mode == 1) {
      tell(1);
      wait(1, turn * static_cast<uint64_t>(args.lsa_size));
      for (uint32_t i = thread; i < kRow / 4; i += blockDim.x) own(0)[i] = 0;
    }
    const bool last = turn == static_cast<uint32_t>(args.count);
    if (args.mode != 2 && !(args.mode == 3 && last)) epv2::network_flush(network);
    __syncthreads();
    if (args.mode != 1) tell(1);
    uint32_t sum = 0;
    if (args.mode != 3)
      for (int i = 0; i < args.lsa_size; i++)
        for (uint32_t w = thread; w < kRow / 4; w += blockDim.x) sum += own((1 + first_far + i) * kRow)[w];
    atomicAdd(reinterpret_cast<uint32_t*>(args.out) + turn - 1, sum);
    wait(1, turn * static_cast<uint64_t>(args.lsa_size));  // it may be written again
  }
}
