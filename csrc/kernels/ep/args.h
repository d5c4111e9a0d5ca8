// Arguments of the expert-parallel kernels. Python reads this file (epv2_plugin/jit/args.py) and fills the structs in
// elastic/backends/cuda.py: one field a line, in fixed-width types. Addresses are device addresses, 0 = absent;
// offsets are bytes from the start of every rank's window. Slots of a combine: (rank in its node * M + token) for the
// tokens of this node's ranks, then the rows from other nodes in the order in which they were received.
//
// Legend: T tokens of this rank, M most tokens of any rank, K top-k, E experts, L experts of a rank, P ranks,
// G ranks of a node, R received rows (one per token and rank), N rows in expert order, A rows that arrive over the
// network, J rows of a token that come back over it at most.
#pragma once
#include <cstdint>

// What every kernel needs to wait for others and to say why it gave up.
struct Common {
  uint64_t window;          // ncclWindow_t
  uint64_t state;           // uint32 words of this rank's device memory, see protocol.cuh
  uint64_t error;           // uint32 words of mapped host memory, see protocol.cuh
  uint64_t timeout_ns;
  uint32_t signature;       // of the eight words below, M and K, which must be the same on all ranks
  int32_t operation;
  int32_t route;            // number of the dispatch that made the routing
  int32_t hidden;
  int32_t dtype;
  int32_t scales;
  int32_t num_experts;
  int32_t has_weights;
  int32_t by_row;           // combine: 1 = a token's owner adds all expert rows itself, 0 = each rank's sum of them
  int32_t rank;
  int32_t num_ranks;
  int32_t max_tokens;       // M
  int32_t num_topk;         // K
  int32_t num_local_experts;  // L
  int32_t lsa_begin;        // first rank of this node
  int32_t lsa_size;         // G; P where all ranks are in one node
  uint64_t network;         // device communicator, see Network in common/device.cuh; 0 = one node
  int32_t contexts;         // of the network that kernels use
  int32_t rail;             // 1 = hybrid: other nodes are reached through the rank in this rank's place there
};

struct DispatchStageArgs {
  Common common;
  uint64_t x;               // [T, x_bytes]
  uint64_t scales;          // uint32 [T, scale_words]
  uint64_t topk_idx;        // int64 [T, K]
  uint64_t topk_weights;    // fp32 [T, K]
  uint64_t counts;          // int32 [counts_words(P, L)]: what arrives here, see protocol.cuh
  uint64_t host_counts;     // the same in mapped host memory, behind a word that becomes host_tag when they are there
  uint64_t topk_offset;     // int16 [M, K]
  uint64_t weights_offset;  // fp32 [M, K]
  uint64_t prefix_offset;   // int32 [M / 32, P, L + 1]
  uint64_t totals_offset;   // int32 [P, L + 1], then the number of tokens
  uint64_t rows_offset;     // [M, row_stride]
  uint32_t host_tag;
  int32_t cached;           // 1 = the routing is known: only rows and weights
  int32_t num_tokens;       // T
  int32_t x_bytes;          // of a token in x
  int32_t data_bytes;       // of a token in the window: x_bytes, or half (a quarter) of it after a cast to e4m3
  int32_t scale_words;      // scale factors of a token
  int32_t row_stride;
  int32_t expert_alignment;
  int32_t counting_warps;   // of a CTA that count tokens, each in P * (L + 1) words of shared memory
};

// Only between nodes: what goes to ranks of other nodes, and what came from there.
struct DispatchSendArgs {
  Common common;
  uint64_t counts;
  uint64_t host_counts;
  uint64_t topk_idx;        // int64 [T, K]; read if cached
  uint64_t sent_slots;      // int32 [T, J]: where each row was put, by the order of a token's targets; read if cached
  uint64_t topk_offset;
  uint64_t weights_offset;
  uint64_t prefix_offset;
  uint64_t totals_offset;
  uint64_t mirror_offset;   // int32 [P, mirror_words(...)]: what ranks of other nodes counted, see protocol.cuh
  uint64_t rows_offset;
  uint64_t arrivals_offset;  // [A, row_stride]
  uint32_t host_tag;
  int32_t cached;
  int32_t num_tokens;
  int32_t row_stride;       // with the trailer
  int32_t trailer_offset;   // in a row, see protocol.cuh
  int32_t expert_alignment;
  int32_t max_arrivals;     // A
  int32_t max_remote_rows;  // rows from other nodes that combine has room for
  int32_t num_returns;      // J
};

struct DispatchRouteArgs {
  Common common;
  uint64_t counts;
  uint64_t metadata;        // int32 [rows_capacity, 2 + K]
  uint64_t recv_topk_idx;   // int64 [rows_capacity, K], compact layout only; read if cached
  uint64_t recv_weights;    // fp32 [rows_capacity, K] compact, [expanded_capacity] expanded
  uint64_t statistics;      // int32 or int64 [L], added to
  uint64_t topk_offset;
  uint64_t weights_offset;
  uint64_t prefix_offset;
  uint64_t arrivals_offset;
  uint64_t origin;          // int32 [rows_capacity]: which arrival a row from another node is; between nodes only
  uint64_t relayed;         // int32 [A, 1 + K]: of what arrived at this rank, source slot and trailer's expert words
  int32_t row_stride;
  int32_t trailer_offset;
  int32_t cached;           // 1 = the metadata is known: only weights
  int32_t statistics_wide;  // 1 = int64
  int32_t expand;           // 1 = expanded layout
  int32_t rows_capacity;
  int32_t expanded_capacity;
  int32_t expert_alignment;
};

struct DispatchPullArgs {
  Common common;
  uint64_t counts;
  uint64_t metadata;
  uint64_t out;             // [rows, data_bytes]
  uint64_t out_scales;      // uint32, word (r, c) at r * scale_row_stride + c * scale_column_stride
  uint64_t rows_offset;
  uint64_t origin;
  uint64_t arrivals_offset;
  int64_t scale_row_stride;
  int64_t scale_column_stride;
  int32_t data_bytes;
  int32_t scale_words;
  int32_t row_stride;
  int32_t piece_bytes;      // of a row that travel at once
  int32_t num_stages;       // pieces in flight per warp
  int32_t expand;
  int32_t rows_capacity;
  int32_t expanded_capacity;
  int32_t expert_alignment;
  int32_t zero_padding;     // 1 = zero the rows that nothing is written to
};

struct CombineArgs {
  Common common;
  uint64_t counts;
  uint64_t metadata;        // int32 [rows_capacity, 2 + K]
  uint64_t x;               // [rows, row_bytes] that go back; by_row: they lie at rows_offset instead
  uint64_t weights;         // fp32 [rows, K] compact, [rows] expanded
  uint64_t topk_idx;        // int64 [T, K]
  uint64_t bias_0;          // [T, row_bytes]
  uint64_t bias_1;
  uint64_t out;             // [T, row_bytes]
  uint64_t out_weights;     // fp32 [T, K]
  uint64_t rows_offset;     // [slots, row_bytes], a sum per slot; by_row: [N, row_bytes], expert rows
  uint64_t table_offset;    // int32 [slots, K]: by_row: which of them
  uint64_t weights_offset;  // fp32 [slots, K]
  uint64_t origin;
  uint64_t relayed;
  uint64_t slots_offset;    // int32 [A, G]: in which slot a rank of the node has what belongs to an arrival
  uint64_t outgoing_offset;  // [A, return_stride]: sums over the node's ranks, then their weights; hybrid only
  uint64_t returned_offset;  // [M * J, return_stride]: the same, from other nodes
  int32_t return_stride;
  int32_t num_returns;      // J
  int32_t num_tokens;
  int32_t row_bytes;
  int32_t piece_bytes;
  int32_t num_groups;       // independent rings of a CTA
  int32_t num_slots;        // pieces of a ring
  int32_t expand;
};

struct BareArgs {
  Common common;
};
