// A ring of slots as the kernels have it: thread 0 loads rows of 1 KiB into kSlots slots, all threads add 1 to each
// word in place, thread 0 stores the row and refills the slot once the store has read it. MUTANT leaves something out.
#include "emulator/device.h"
#include "emulator/kernels/args.h"

#ifndef MUTANT
#define MUTANT 0
#endif
// What each mutant does wrong; the names are those of test_emulator.py.
#define REFILL_BEFORE_USE 1
#define NO_WAIT_READ 2
#define NO_SYNCTHREADS 3
#define WRONG_ARRIVALS 4
#define WRONG_PARITY 5
#define NO_WAIT_AT_END 6
#define TOO_FEW_BYTES 7
#define NO_PROXY_FENCE 8
#define NO_INIT_FENCE 9
#define NO_INIT_SYNC 10

constexpr uint32_t kRow = 1024, kSlots = 3;

EPV2_KERNEL(ring, TestArgs, 256) {
  uint8_t* shared = epv2::shared_memory();
  auto* full = reinterpret_cast<uint64_t*>(shared);  // [kSlots]
  uint8_t* slots = shared + 128;                     // [kSlots, kRow]
  const auto* in = reinterpret_cast<const uint8_t*>(args.in);
  auto* out = reinterpret_cast<uint8_t*>(args.out);
  const uint32_t begin = blockIdx.x, rows = static_cast<uint32_t>(args.count);

  if (threadIdx.x == 0) {
    for (uint32_t slot = 0; slot < kSlots; slot++) epv2::mbarrier_init(&full[slot], MUTANT == WRONG_ARRIVALS ? 2 : 1);
    if (MUTANT != NO_INIT_FENCE) epv2::mbarrier_init_fence();
  }
  if (MUTANT != NO_INIT_SYNC) __syncthreads();

  auto refill = [&](uint32_t turn) {
    const uint32_t row = begin + turn * gridDim.x, slot = turn % kSlots;
    if (row >= rows) return;
    epv2::mbarrier_arrive_expect(&full[slot], MUTANT == TOO_FEW_BYTES ? kRow / 2 : kRow);
    epv2::bulk_load(slots + slot * kRow, in + row * kRow, kRow, &full[slot]);
  };
  if (threadIdx.x == 0)
    for (uint32_t turn = 0; turn < kSlots; turn++) refill(turn);

  for (uint32_t turn = 0; begin + turn * gridDim.x < rows; turn++) {
    const uint32_t slot = turn % kSlots;
    epv2::mbarrier_wait(&full[slot], MUTANT == WRONG_PARITY ? 1 : turn / kSlots & 1);
    auto* words = reinterpret_cast<uint32_t*>(slots + slot * kRow);
    if (MUTANT == REFILL_BEFORE_USE && threadIdx.x == 0) refill(turn + kSlots);
    for (uint32_t i = threadIdx.x; i < kRow / 4; i += blockDim.x) words[i] += 1;
    if (MUTANT != NO_PROXY_FENCE) epv2::fence_proxy_async();
    if (MUTANT != NO_SYNCTHREADS) __syncthreads();
    if (threadIdx.x != 0) continue;
    epv2::bulk_store(out + (begin + turn * gridDim.x) * kRow, words, kRow);
    epv2::bulk_commit();
    if (MUTANT != NO_WAIT_READ && MUTANT != NO_WAIT_AT_END) epv2::bulk_wait_read<0>();
    if (MUTANT == NO_WAIT_AT_END && begin + (turn + 1) * gridDim.x < rows) epv2::bulk_wait_read<0>();
    if (MUTANT != REFILL_BEFORE_USE) refill(turn + kSlots);
  }
  if (threadIdx.x == 0 && MUTANT != NO_WAIT_AT_END) epv2::bulk_wait_all();
}
