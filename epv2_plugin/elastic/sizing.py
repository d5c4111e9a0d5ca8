"""Sizes: how a row lies on the wire, how many rows can arrive, how large a buffer must be. The one owner of layout.

Legend: T tokens of a rank, K top-k, E experts, P ranks, R received rows (one per token and rank), N expanded rows
(one per token and local expert).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

FP8_BLOCK = 128  # values that share one scale factor
ROW_ALIGNMENT = 16  # bytes; every section of a row starts at a multiple of it
BUFFER_ALIGNMENT = 2 << 20  # bytes
TENSOR_ALIGNMENT = 32  # bytes; of a tensor in a ring slot or in a session
MAX_TOPK = 32  # what a buffer is sized for when the caller does not name its top-k


def align(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class RowLayout:
    """One row on the wire: data | scale factors | local expert of each top-k position | weights | source token.

    Args:
        data_bytes: bytes of the token itself.
        scale_bytes: bytes of its FP8 scale factors, 0 = none.
        num_topk_idx: top-k positions whose experts travel along, 0 = none (then no source token either).
        num_topk_weights: top-k positions whose weights travel along, 0 = none.
    """

    data_bytes: int
    scale_bytes: int = 0
    num_topk_idx: int = 0
    num_topk_weights: int = 0

    @cached_property
    def scale_offset(self) -> int:
        return align(self.data_bytes, ROW_ALIGNMENT)

    @cached_property
    def idx_offset(self) -> int:
        return align(self.scale_offset + self.scale_bytes, ROW_ALIGNMENT)

    @cached_property
    def weights_offset(self) -> int:
        # The source token is the last int32 of the index section.
        return align(self.idx_offset + 4 * (self.num_topk_idx + 1 if self.num_topk_idx else 0), ROW_ALIGNMENT)

    @cached_property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return align(self.weights_offset + 4 * self.num_topk_weights, ROW_ALIGNMENT)


def scale_columns(hidden: int, packed: bool) -> int:
    """Scale factors per token: one fp32 per 128 values, or one int32 of four UE8M0 exponents per 512."""
    blocks = align(hidden, FP8_BLOCK) // FP8_BLOCK
    return align(blocks, 4) // 4 if packed else blocks


def max_received_rows(num_ranks: int, num_max_tokens_per_rank: int) -> int:
    """Most rows (one per token and rank) that a rank can receive."""
    return num_ranks * num_max_tokens_per_rank


def max_expanded_rows(
    num_ranks: int, num_max_tokens_per_rank: int, num_topk: int, num_local_experts: int, alignment: int
) -> int:
    """Most rows (one per token and local expert, groups padded to `alignment`) that a rank can hold."""
    rows = max_received_rows(num_ranks, num_max_tokens_per_rank) * min(num_topk, num_local_experts)
    return align(rows + (alignment - 1) * num_local_experts, alignment)


def buffer_bytes(
    num_ranks: int, num_max_tokens_per_rank: int, hidden: int, num_topk: int, use_fp8_dispatch: bool, itemsize: int = 2
) -> int:
    """Bytes in flight on one rank in the worst case: a row sent to and received from every rank for every token.

    Args:
        hidden: values per token. itemsize: bytes per value in combine (and in dispatch unless FP8).
        num_topk: 0 = unknown, sized for 32.
    """
    topk = num_topk or MAX_TOPK
    combine = RowLayout(hidden * itemsize, num_topk_weights=topk)
    dispatch = RowLayout(
        hidden if use_fp8_dispatch else hidden * itemsize,
        4 * scale_columns(hidden, packed=False) if use_fp8_dispatch else 0,
        topk,
        topk,
    )
    rows = 2 * max_received_rows(num_ranks, num_max_tokens_per_rank)
    return align(rows * max(combine.stride, dispatch.stride), BUFFER_ALIGNMENT)


def ring_bytes(max_tensor_bytes: int, max_inflight: int, num_peers: int = 2) -> int:
    """Bytes of a send ring and a receive ring of `max_inflight` slots for each of `num_peers` peers."""
    return align(2 * num_peers * max_inflight * align(max_tensor_bytes, TENSOR_ALIGNMENT), BUFFER_ALIGNMENT)


def session_bytes(num_ranks: int, shape: Sequence[int], itemsize: int) -> int:
    """Bytes of one gathered tensor `[num_ranks, *shape]` in a session."""
    return align(num_ranks * math.prod(shape) * itemsize, TENSOR_ALIGNMENT)
