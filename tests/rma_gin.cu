// What tests/test_rma_loopback.py runs on a GPU: NCCL's public GIN calls between all ranks, checked where they arrive.
#include <nccl_device.h>

#include <cstdint>

struct Args {
  ncclDevComm comm;
  ncclWindow_t window;
  uint32_t* wrong;   // 0 too early, 1 values, 2 gets
  uint64_t words;    // of a block, even
  uint64_t turn;     // from 1
  uint64_t is_weak;  // count on a signal for bytes that it does not tell of
};

// The window: this rank's block, a block from each rank, the peer's block as got, a value from each rank.
__device__ uint64_t word(uint64_t rank, uint64_t turn, uint64_t index) {
  return (rank * 0x9e3779b97f4a7c15 + turn) * 0xbf58476d1ce4e5b9 + index;
}

extern "C" __global__ void kernel_gin(const __grid_constant__ Args args) {
  const ncclCoopCta cta;
  const ncclTeam world = ncclTeamWorld(args.comm);
  const ncclGin first{args.comm, 0}, second{args.comm, 1};
  const uint64_t ranks = args.comm.nRanks, rank = args.comm.rank, turn = args.turn, words = args.words;
  const uint64_t bytes = words * 8, half = bytes / 2;
  const uint64_t got = (1 + ranks) * bytes, values = got + bytes;
  auto* memory = static_cast<uint64_t*>(ncclGetLocalPointer(args.window, 0));
  for (uint64_t i = threadIdx.x; i < words; i += blockDim.x) memory[i] = word(rank, turn, i);
  __syncthreads();

  if (threadIdx.x == 0)
    for (uint64_t step = 0; step < ranks; step++) {
      const int peer = static_cast<int>((rank + step) % ranks);
      const uint64_t to = (1 + rank) * bytes;
      first.put(world, peer, args.window, to, args.window, 0, half);
      if (args.is_weak)
        first.put(world, peer, args.window, to + half, args.window, half, half, ncclGin_WeakSignalInc{0});
      else
        first.put(world, peer, args.window, to + half, args.window, half, half, ncclGin_StrongSignalInc{0});
      second.putValue(world, peer, args.window, values + rank * 8, word(rank, turn, 7), ncclGin_WeakSignalAdd{0, 3});
    }

  first.waitSignal(cta, 0, turn * ranks);
  for (uint64_t i = threadIdx.x; i < words * ranks; i += blockDim.x) {
    const uint64_t* place = memory + words + i;
    if (*reinterpret_cast<const volatile uint64_t*>(place) != word(i / words, turn, i % words)) atomicAdd(args.wrong, 1);
  }
  second.waitSignal(cta, 0, 3 * turn * ranks);
  if (threadIdx.x < ranks &&
      reinterpret_cast<volatile uint64_t*>(memory)[values / 8 + threadIdx.x] != word(threadIdx.x, turn, 7))
    atomicAdd(args.wrong + 1, 1);

  // A block by get; `flush` also makes what was got visible.
  const int peer = static_cast<int>((rank + 1) % ranks);
  if (threadIdx.x == 0) second.get(world, peer, args.window, 0, args.window, got, bytes);
  __syncthreads();
  second.flush(cta);
  for (uint64_t i = threadIdx.x; i < words; i += blockDim.x)
    if (reinterpret_cast<volatile uint64_t*>(memory)[got / 8 + i] != word(peer, turn, i)) atomicAdd(args.wrong + 2, 1);

  // Everybody has looked, and every source may be written again.
  first.flush(cta);
  __syncthreads();
  if (threadIdx.x == 0)
    for (uint64_t to = 0; to < ranks; to++) first.signal(world, static_cast<int>(to), ncclGin_StrongSignalInc{1});
  first.waitSignal(cta, 1, turn * ranks);
}
