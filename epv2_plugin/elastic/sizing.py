"""Sizes: how a row lies on the wire, how many rows can arrive, how large a buffer must be. The one owner of layout.

Legend: T tokens of a rank, K top-k, E experts, P ranks, R received rows (one per token and rank), N expanded rows
(one per token and local expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

FP8_BLOCK = 128  # values that share one scale factor
ROW_ALIGNMENT = 16  # bytes; every section of a row starts at a multiple of it
BUFFER_ALIGNMENT = 2 << 20  # bytes
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


def engram_row_bytes(hidden: int, itemsize: int, use_fp8: bool) -> int:
    """Bytes of a row of an Engram table, in memory and on the wire: the values and, of FP8, their fp32 scales."""
    return RowLayout(hidden * itemsize, 4 * scale_columns(hidden, packed=False) if use_fp8 else 0).stride


# ---- the cuda backend's window and shared memory ------------------------------------------------------------------

CHUNK_TOKENS = 32  # tokens whose expert counts a kernel keeps together
FLAG_KINDS, ARGUMENT_WORDS = 6, 10  # see csrc/kernels/ep/protocol.cuh
SHARED_BYTES = 227 << 10  # dynamic shared memory of a CTA on Hopper and Blackwell
# With less, the CTAs of two ranks that share a GPU could share an SM, and a budget of SMs would be none.
LEAST_SHARED_BYTES = 117 << 10
SCRATCH_BYTES = 128  # in front of what each kernel keeps in shared memory
EXPECTED_EXPERTS = 1024  # that a window is sized for; more fit where hidden size or tokens are below their limits
SECTION_ALIGNMENT = 128  # bytes; sections of the window start at multiples of it


class _Sections:
    """Hands out consecutive sections, each at a multiple of `SECTION_ALIGNMENT`."""

    def __init__(self, start: int):
        self.end = start

    def take(self, num_bytes: int) -> int:
        begin = self.end
        self.end = align(begin + num_bytes, SECTION_ALIGNMENT)
        return begin


def control_bytes(num_ranks: int) -> int:
    """Flags, failure words and the running operation's arguments at the start of the window."""
    return align(FLAG_KINDS * num_ranks * 8 + align(num_ranks, 2) * 4 + ARGUMENT_WORDS * 4, SECTION_ALIGNMENT)


class DispatchLayout:
    """Where in the window a dispatch puts its data: offsets in bytes, `end` after the last section.

    Args:
        start: of the window's dispatch part. data_bytes: of a token as it travels, a multiple of 16.
        scale_words: scale factors of a token. num_local_experts: experts of each rank.
    """

    def __init__(
        self,
        start: int,
        *,
        num_ranks: int,
        max_tokens: int,
        num_topk: int,
        num_local_experts: int,
        data_bytes: int,
        scale_words: int,
    ):
        columns = num_ranks * (num_local_experts + 1)
        sections = _Sections(start)
        self.row_stride = data_bytes + align(4 * scale_words, ROW_ALIGNMENT)
        self.topk = sections.take(2 * max_tokens * num_topk)
        self.weights = sections.take(4 * max_tokens * num_topk)
        self.prefix = sections.take(4 * columns * -(-max_tokens // CHUNK_TOKENS))
        self.totals = sections.take(4 * (columns + 1))
        self.rows = sections.take(max_tokens * self.row_stride)
        self.end = sections.end


class CombineLayout:
    """Where in the window a combine puts its data: offsets in bytes, `end` after the last section.

    Args:
        start: of the window's combine part. row_bytes: of a row, a multiple of 16.
        num_rows: expert rows that lie there as they are; None = one sum per (source rank, token).
    """

    def __init__(
        self, start: int, *, num_ranks: int, max_tokens: int, num_topk: int, row_bytes: int, num_rows: int | None = None
    ):
        slots = max_received_rows(num_ranks, max_tokens)
        sections = _Sections(start)
        self.weights = sections.take(4 * slots * num_topk)
        self.table = sections.take(4 * slots * num_topk)
        self.rows = sections.take((slots if num_rows is None else num_rows) * row_bytes)
        self.end = sections.end


def window_bytes(
    num_ranks: int, max_tokens: int, hidden: int, num_topk: int, use_fp8_dispatch: bool, itemsize: int = 2
) -> tuple[int, int]:
    """(bytes of the window in all, bytes up to its combine part) that dispatch and combine need on the cuda backend.

    Args:
        num_topk: 0 = unknown, sized for 32. itemsize: bytes per value in combine (and in dispatch unless FP8).
    """
    topk = num_topk or MAX_TOPK
    # Even where rows are meant to travel in FP8, gradients of combine are dispatched as they are.
    dispatch = DispatchLayout(
        control_bytes(num_ranks),
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        num_topk=topk,
        num_local_experts=-(-EXPECTED_EXPERTS // num_ranks),
        data_bytes=align(hidden * itemsize, ROW_ALIGNMENT),
        scale_words=scale_columns(hidden, packed=False) if use_fp8_dispatch else 0,
    )
    combine = CombineLayout(
        dispatch.end,
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        num_topk=topk,
        row_bytes=align(hidden * itemsize, ROW_ALIGNMENT),
    )
    return align(combine.end, BUFFER_ALIGNMENT), dispatch.end


def counts_words(num_ranks: int, num_local_experts: int) -> int:
    """int32 words of what a dispatch counts, see `Counts` in csrc/kernels/ep/protocol.cuh."""
    return (2 * num_ranks + 1) * (num_local_experts + 1) + num_ranks


@dataclass(frozen=True)
class LaunchShape:
    """Threads and dynamic shared memory of a launch, and how the kernel divides them."""

    threads: int
    shared_bytes: int
    piece_bytes: int = 0  # of a row that travel at once
    stages: int = 0  # pieces in flight: per warp (dispatch_pull), per group (combine)
    groups: int = 0  # independent rings (combine)
    counting_warps: int = 0  # (dispatch_stage)


def _shape(threads: int, shared_bytes: int, **parts: int) -> LaunchShape:
    return LaunchShape(threads, max(shared_bytes, LEAST_SHARED_BYTES), **parts)


def stage_shape(num_ranks: int, num_local_experts: int) -> LaunchShape:
    """Of dispatch_stage."""
    warps = 28
    fixed, per_warp = 16 + 4 * 32 * warps, 4 * num_ranks * (num_local_experts + 1)
    counting = min(warps, (SHARED_BYTES - fixed) // per_warp)
    if counting < 1:
        raise ValueError(f"num_experts = {num_ranks * num_local_experts}: more than a kernel can count")
    return _shape(32 * warps, fixed + counting * per_warp, counting_warps=counting)


def route_shape(num_local_experts: int) -> LaunchShape:
    """Of dispatch_route."""
    warps = 16
    return _shape(32 * warps, 16 + warps * 4 * (num_local_experts + CHUNK_TOKENS))


def pull_shape(num_ranks: int, data_bytes: int, scale_words: int) -> LaunchShape:
    """Of dispatch_pull: 4 warps with 4 pieces in flight each saturate an SM (docs/performance.md)."""
    warps, stages = 4, 4
    slots, scale_bytes = warps * stages, align(4 * scale_words, ROW_ALIGNMENT)
    fixed = SCRATCH_BYTES + 8 * num_ranks + slots * (8 + 4 * 33 + scale_bytes)
    piece = _piece(data_bytes, (SHARED_BYTES - fixed) // slots)
    return _shape(32 * warps, fixed + slots * piece, piece_bytes=piece, stages=stages)


def sum_shape(num_ranks: int, row_bytes: int) -> LaunchShape:
    """Of combine_stage and combine_pull: groups of one producer and up to 7 consumer warps of 2 KiB each."""
    most_warps, consumer_bytes = 24, 2048
    piece = _piece(row_bytes, 7 * consumer_bytes)
    group_warps = 1 + -(-piece // consumer_bytes)
    groups = most_warps // group_warps
    fixed = SCRATCH_BYTES + 8 * num_ranks
    stages = min(8, (SHARED_BYTES - fixed) // (groups * (piece + 24)))
    return _shape(
        32 * groups * group_warps,
        fixed + groups * stages * (piece + 24),
        piece_bytes=piece,
        stages=stages,
        groups=groups,
    )


def _piece(row_bytes: int, most: int) -> int:
    """Bytes of the equal pieces, at most `most` each, that a row is cut into."""
    pieces = -(-row_bytes // most)
    return align(-(-row_bytes // pieces), ROW_ALIGNMENT)
