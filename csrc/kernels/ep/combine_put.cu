// Combine between nodes, direct mode, after combine_stage: put this rank's sums, or with `by_row` its expert rows, into the
// windows of the owners in other nodes. One thread a row; no row is read by an SM.
#include "ep/slots.cuh"

using namespace epv2;

namespace {

// One thread: row `from` of this rank's window, and the weights at `weights`, to a row of the owner's `returned`.
__device__ void put_row(const CombineArgs& args, int context, int to, int64_t row, uint64_t from, uint64_t weights,
                        int first_weight, int num_weights) {
  const Common& c = args.common;
  const uint64_t at = args.returned_offset + static_cast<uint64_t>(row) * args.return_stride;
  network_put(network(c, context), to, c.window, at, from, args.row_bytes);
  if (c.has_weights) {
    network_put(network(c, context), to, c.window, at + args.row_bytes + first_weight * 4, weights, num_weights * 4);
  }
}

__device__ void put_arrival(const CombineArgs& args, int context, int arrival) {
  const Common& c = args.common;
  const int32_t* relayed = reinterpret_cast<const int32_t*>(args.relayed) + static_cast<int64_t>(arrival) * (1 + c.num_topk);
  const int source = relayed[0] / c.max_tokens, place = c.rank - c.lsa_begin;
  const int64_t token = relayed[0] % c.max_tokens;
  const int64_t slot = own_pointer<int32_t>(c, args.slots_offset)[static_cast<int64_t>(arrival) * c.lsa_size + place];
  const uint64_t weights = args.weights_offset + slot * c.num_topk * 4;
  for (int k = 0; k < c.num_topk; k++) {
    const uint32_t word = static_cast<uint32_t>(relayed[1 + k]);
    const int expert = packed_expert(word);
    if (expert < 0 || expert / c.num_local_experts != c.rank) continue;
    if (!c.by_row) {
      put_row(args, context, source, token * args.num_returns + packed_order(word),
              args.rows_offset + slot * args.row_bytes, weights, 0, c.num_topk);
      return;
    }
    const int64_t row = own_pointer<int32_t>(c, args.table_offset)[slot * c.num_topk + k];
    put_row(args, context, source, token * args.num_returns + k, args.rows_offset + row * args.row_bytes,
            weights + k * 4, k, 1);
  }
}

}  // namespace

EPV2_KERNEL(epv2_combine_put, CombineArgs, 256) {
  const Common& c = args.common;
  const uint32_t number = operation_number(c), count = *state_word(c, kCombines) + 1;
  const int context = blockIdx.x % c.contexts;
  uint32_t* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  if (wait_owners(c, number, count, scratch)) {
    const int arrived = Counts(args.counts, c).arrived(), step = gridDim.x * blockDim.x;
    for (int i = blockIdx.x + gridDim.x * threadIdx.x; i < arrived; i += step) put_arrival(args, context, i);
    tell_owners(c, context, scratch);
  }
}
