// Puts between nodes in the order of a stream: one warp gives them to the network and ends. The data never passes an SM.
//
// Nothing is waited for. The peer's stream waits for the word that the signal raises; that the sources may be written
// again this rank learns from what the peer does next.
#include "common/device.cuh"
#include "transfers/args.h"

using namespace epv2;

namespace {

constexpr uint64_t kPiece = uint64_t{1} << 30;  // NCCL's own pieces are as large, and a put takes 32 bits

}  // namespace

EPV2_KERNEL(epv2_send, SendArgs, 32) {
  const Network network{args.network, 0, 0};
  for (int i = threadIdx.x; i < args.num_puts; i += blockDim.x) {
    const NetworkPut& put = args.puts[i];
    for (uint64_t begin = 0; begin < put.bytes; begin += kPiece) {
      const uint64_t bytes = put.bytes - begin < kPiece ? put.bytes - begin : kPiece;
      network_put(network, put.peer, args.window, put.target + begin, put.source + begin, static_cast<uint32_t>(bytes));
    }
  }
  __syncwarp();
  for (int i = threadIdx.x; i < args.num_signals; i += blockDim.x)
    network_signal_word(network, args.signals[i].peer, args.window, args.signals[i].word, args.signals[i].value);
  __syncwarp();
  if (threadIdx.x == 0) network_leave(network);
}
