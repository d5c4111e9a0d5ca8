// Reduce between nodes, after a rank has summed its own entries: put rows and sums for owners in other nodes into their
// windows, where each owner has said. What one owner gets lies together, and goes in pieces, one thread each.
#include "engram/engram.cuh"

using namespace epv2;

namespace {

constexpr int kPiece = 32;  // rows that are put at once

}  // namespace

// Shared memory: 16 bytes, then P + 1 words.
EPV2_KERNEL(epv2_engram_put, EngramPutArgs, 256) {
  const Common& c = args.common;
  const int context = blockIdx.x % c.contexts;
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  int32_t* first = reinterpret_cast<int32_t*>(scratch + 4);  // of the rows for each owner
  const auto* rows = reinterpret_cast<const int64_t*>(node_pointer(c, args.staging, args.rows_offset, c.rank));
  for (int p = threadIdx.x; p <= c.num_ranks; p += blockDim.x) {
    int low = 0, high = args.num_rows;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (rows[middle] < p * args.table_rows) low = middle + 1;
      else high = middle;
    }
    first[p] = low;
  }
  if (agree_failed(c, scratch)) return;
  const uint64_t sum_bytes = static_cast<uint64_t>(args.hidden) * 4;
  const int workers = gridDim.x * blockDim.x;
  for (int i = 0; i < num_remotes(c); i++) {
    const int to = remote(c, i), count = first[to + 1] - first[to];
    // Each owner begins with another thread, or the first ones would have all pieces of small reduces.
    const int worker = (blockIdx.x + gridDim.x * threadIdx.x + i) % workers;
    for (int begin = worker * kPiece; begin < count; begin += workers * kPiece) {
      const int num = min(kPiece, count - begin);
      const uint64_t from = first[to] + begin;
      const uint64_t place = own_pointer<Room>(c, args.room_offset)[to].place + begin;
      network_put(network(c, context), to, args.staging, args.arrived_rows_offset + place * 8,
                  args.rows_offset + from * 8, num * 8);
      network_put(network(c, context), to, args.staging, args.arrived_sums_offset + place * sum_bytes,
                  args.sums_offset + from * sum_bytes, static_cast<uint32_t>(num * sum_bytes));
    }
  }
  __syncthreads();
  // A signal is behind all that its context has put; other CTAs' contexts have signals of their own.
  const uint64_t share = signal_share();
  for (int i = threadIdx.x; i < num_remotes(c); i += blockDim.x) {
    if (!failed(c)) network_signal(network(c, context), remote(c, i), signal_index(c, kSumsStaged, c.rank), share);
  }
  finish_transfers(c, context, scratch);
}
