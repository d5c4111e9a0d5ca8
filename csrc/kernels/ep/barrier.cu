// Every rank waits here for all others: those of its node, then one of each other node, then its node again, which by
// then has heard of all. One CTA.
#include "ep/protocol.cuh"

using namespace epv2;

EPV2_KERNEL(epv2_barrier, BareArgs, 64) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  signal_node(c, kBarrier, number);
  if (!wait_node(c, kBarrier, number, true, scratch)) return;
  if constexpr (kNodes) {
    const uint32_t count = 2 * *state_word(c, kBarriers);
    for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) send_record(c, remote(c, i), kBarrierSignal);
    for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
      const int peer = remote(c, i);
      if (!wait_signal(c, kBarrierSignal, peer, count + 1, kBarrier, number, true)) continue;
      if (!check_record(c, peer, kBarrier)) continue;
      // Only now may that rank go on to another operation, whose record would take this one's place.
      network_signal(network(c, 0), peer, signal_index(c, kBarrierSignal, c.rank), kSignalUnit);
    }
    for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
      wait_signal(c, kBarrierSignal, remote(c, i), count + 2, kBarrier, number, true);
    }
    if (agree_failed(c, scratch)) return;
    signal_node(c, kBarrierEnd, number);
    if (!wait_node(c, kBarrierEnd, number, false, scratch)) return;
  }
  if (threadIdx.x == 0) {
    ++*state_word(c, kBarriers);
    finish_operation(c, kSequence, number);
  }
}
