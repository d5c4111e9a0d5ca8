// Wait until no peer reads this rank's rows of the last combine any more: whoever writes expert output straight into the
// window runs this first. One CTA.
#include "ep/protocol.cuh"

using namespace epv2;

EPV2_KERNEL(epv2_combine_idle, BareArgs, 1024) {
  const Common& c = args.common;
  wait_node(c, kCombineDone, *state_word(c, kLastCombine), false, reinterpret_cast<uint32_t*>(shared_memory()));
}
