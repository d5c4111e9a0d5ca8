// Every rank waits here for all others. One CTA.
#include "ep/protocol.cuh"

using namespace epv2;

EPV2_KERNEL(epv2_barrier, BareArgs, 1024) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c);
  signal_all(c, kBarrier, number);
  if (!wait_all(c, kBarrier, number, true, reinterpret_cast<uint32_t*>(shared_memory()))) return;
  if (threadIdx.x == 0) finish_operation(c, kSequence, number);
}
