"""Sizes: how a row lies on the wire, how many rows can arrive, how large a buffer must be. The one owner of layout.

Legend: T tokens of a rank, K top-k, E experts, P ranks, R received rows (one per token and rank), N expanded rows
(one per token and local expert).
"""

from __future__ import annotations

import functools
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


RING_ALIGNMENT = 256  # bytes; slots of a ring, and the tensors behind a session's words, begin at multiples of it
RECORD_BYTES = 64  # what a receiver is told about a tensor: four words of 64 bits, then one of 32


def ring_slot_bytes(max_tensor_bytes: int) -> int:
    """Bytes of a slot of a ring on the cuda backend."""
    return align(max_tensor_bytes, RING_ALIGNMENT)


class RingLayout:
    """Where a rank keeps the tensors that it sends to others, and the words about them: offsets in its window.

    Attributes:
        slots: where rings begin, one of `ring_bytes` bytes after the other. end: behind the last of `num_rings`.
    """

    def __init__(self, *, num_ranks: int, num_channels: int, max_inflight: int, max_tensor_bytes: int, num_rings: int):
        self._channels, self._inflight = num_channels, max_inflight
        records, links = RECORD_BYTES * num_ranks * num_channels * max_inflight, 4 * num_ranks * num_channels
        sections = _Sections(0)
        self._inbox, self._outbox = sections.take(records), sections.take(records)
        self._taken, self._taken_outbox = sections.take(links), sections.take(links)
        self.slots = align(sections.end, RING_ALIGNMENT)
        self.slot_bytes = ring_slot_bytes(max_tensor_bytes)
        self.ring_bytes = max_inflight * self.slot_bytes
        self.end = self.slots + num_rings * self.ring_bytes

    def record(self, rank: int, channel: int, number: int, *, outgoing: bool) -> int:
        """What is known of tensor `number` from `rank`, or (outgoing) what `rank` is going to be told."""
        place = (rank * self._channels + channel) * self._inflight + number % self._inflight
        return (self._outbox if outgoing else self._inbox) + RECORD_BYTES * place

    def taken(self, rank: int, channel: int, *, outgoing: bool) -> int:
        """How many tensors `rank` has taken, or (outgoing) is going to be told that this rank has."""
        return (self._taken_outbox if outgoing else self._taken) + 4 * (rank * self._channels + channel)


# SMs of a reduce-scatter unless its caller says: one reads 150 GB/s while few are busy, so that these keep up with the
# 450 GB/s that NVLink brings a GPU.
REDUCE_SCATTER_SMS = 4


class SessionLayout:
    """Where all-gather sessions keep their words and tensors: offsets in the window.

    Attributes:
        begun: word of each rank: the session it has begun. begun_outbox: this rank's, for the others to get.
        tensors: where gathered tensors begin. end: behind the last.
    """

    def __init__(self, *, num_ranks: int, max_operations: int, max_session_bytes: int):
        self._num_ranks = num_ranks
        sections = _Sections(0)
        self.begun, self.begun_outbox = sections.take(4 * num_ranks), sections.take(4)
        self._arrived, self._outbox = sections.take(4 * num_ranks * max_operations), sections.take(4 * max_operations)
        self.tensors = align(sections.end, RING_ALIGNMENT)
        self.end = self.tensors + max_session_bytes

    def arrived(self, operation: int, rank: int) -> int:
        """What says that `rank`'s part of an operation is here."""
        return self._arrived + 4 * (operation * self._num_ranks + rank)

    def outbox(self, operation: int) -> int:
        """The same word for the others to get."""
        return self._outbox + 4 * operation


# ---- Engram on the cuda backend -------------------------------------------------------------------------------------

# SMs of an operation unless its caller says: rows of 256 bytes are under way by the hundred, in 96 KiB of an SM's
# registers, and a transfer of a few megabytes is over before more SMs would help.
ENGRAM_SMS = 16
TOLD_BYTES = 16  # what a rank tells each owner in a reduce, `Told` in csrc/kernels/engram/engram.cuh


def engram_control_bytes(num_ranks: int) -> int:
    """Flags and the like, then what each rank has told this one."""
    return control_bytes(num_ranks) + TOLD_BYTES * num_ranks


class EngramStagingLayout:
    """Where a rank puts rows and their sums for the owners: offsets in the window.

    Args:
        max_rows: distinct rows that there is room for.
    """

    def __init__(self, max_rows: int, hidden: int):
        sections = _Sections(0)
        self.rows = sections.take(8 * max_rows)
        self.sums = sections.take(4 * max_rows * hidden)
        self.end = sections.end


# ---- a window for many ranks: sizes for the plan; no kernel uses this layout yet ------------------------------------

CAPACITY_FACTOR = 1.5  # rows that a rank has room for, over those it gets when routing is balanced


class CapacityError(ValueError):
    """More rows came than a window has room for; the message names the factor with which they fit."""


def chunk_tokens(destinations: int) -> int:
    """Tokens whose counts per destination are kept together: more for more destinations, so that the table of counts
    stays as it is at 64."""
    return CHUNK_TOKENS * -(-destinations // 64)


@dataclass(frozen=True)
class CapacityLayout:
    """Bytes of a window whose rows are those that a rank gets, not one for each token of each rank.

    No kernel uses this layout yet: the cuda backend has `window_bytes`, with a sum slot for each (source rank, token),
    which is linear in the ranks. Here:

    - A row's slot is its place in (source rank, source token) order among the rows that are there, handed out before
      any row moves: the sender tells its count, the receiver answers with the first slot. So a rank needs room for
      `capacity_factor` times the rows of balanced routing, and at most for the worst case, which small groups keep.
    - Where more come, the receiver knows from the counts. It answers every sender with the error (`check`) instead of
      a slot, nothing is sent, and every rank raises with the factor that is needed.
    - `arrivals` (dispatch) and the sums that the NIC sends (combine) share memory: a combine writes after every
      rank of the node has finished its pull, and the next dispatch's answers come after that combine's puts are
      complete and, between two dispatches, after the node's pulls.
    - A token returns at most once from each of the top-k ranks (nodes in hybrid mode): `returned` never overflows.
    - Hybrid mode counts per node along the rail, and per chunk of arrived rows inside the node.

    Args:
        nodes, gpus_per_node: of the ranks that share the experts. max_tokens: that a rank may dispatch at once.
        hidden: values of a token. num_topk: experts of a token. num_local_experts: of a rank.
        ranks_per_token, nodes_per_token: expected distinct ones that hold a token's experts
            (`model.distinct_ranks`, `model.distinct_nodes`).
        itemsize: bytes of a value; FP8 rows need less, but gradients of combine are dispatched as they are.

    Raises:
        ValueError: `capacity_factor` is below 1.
    """

    hybrid: bool
    nodes: int
    gpus_per_node: int
    max_tokens: int
    hidden: int
    num_topk: int
    num_local_experts: int
    ranks_per_token: float
    nodes_per_token: float
    use_fp8_dispatch: bool = False
    itemsize: int = 2
    capacity_factor: float = CAPACITY_FACTOR

    def __post_init__(self) -> None:
        if not 1 <= self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor = {self.capacity_factor}: must be 1 or more")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def balanced_rows(self) -> float:
        """Rows, one per token and rank, that a rank gets when routing is balanced."""
        return self.max_tokens * self.ranks_per_token

    @property
    def received_rows(self) -> int:
        """Rows, one per token and rank, that there is room for."""
        worst = max_received_rows(self.ranks, self.max_tokens)
        return min(worst, math.ceil(self.capacity_factor * self.balanced_rows))

    @property
    def balanced_arrivals(self) -> float:
        """Rows that come over the network when routing is balanced."""
        per_token = self.nodes_per_token if self.hybrid else self.ranks_per_token
        return self.max_tokens * per_token * (self.nodes - 1) / self.nodes

    @property
    def arrivals(self) -> int:
        """Rows that there is room for when they come over the network, one per token and rank or (hybrid) node."""
        worst = (self.nodes - 1) * self.max_tokens * (1 if self.hybrid else self.gpus_per_node)
        return min(worst, math.ceil(self.capacity_factor * self.balanced_arrivals))

    @property
    def returned_rows(self) -> int:
        """Most sums that come back to a rank over the network."""
        sources = (self.nodes - 1) * (1 if self.hybrid else self.gpus_per_node)
        return self.max_tokens * min(self.num_topk, sources)

    def rows(self) -> dict[str, int]:
        """Bytes of the sections with rows."""
        scales = 4 * scale_columns(self.hidden, packed=False) if self.use_fp8_dispatch else 0
        token = RowLayout(self.hidden * self.itemsize, scales, self.num_topk, self.num_topk).stride
        summed = RowLayout(self.hidden * self.itemsize, num_topk_weights=self.num_topk).stride
        sections = {"tokens": self.max_tokens * token, "returned": self.returned_rows * summed}
        if self.hybrid:
            sections["rank sums"] = self.received_rows * summed
            sections["arrivals, node sums"] = self.arrivals * max(token, summed)
        else:
            # What arrives is a part of what is received.
            sections["arrivals, rank sums"] = max(self.arrivals * token, self.received_rows * summed)
        return sections

    def metadata(self) -> dict[str, int]:
        """Bytes of the sections without rows. Those linear in the ranks are flags and counts: some bytes a rank."""
        columns = self.num_local_experts + 1  # rows of each expert, and of the rank
        node = self.gpus_per_node * columns
        if self.hybrid:
            chunks = -(-self.max_tokens // CHUNK_TOKENS) + -(-self.arrivals // CHUNK_TOKENS) + self.nodes
            sent = -(-self.max_tokens // chunk_tokens(self.nodes)) * self.nodes
            return {
                "flags": control_bytes(self.gpus_per_node + self.nodes),
                "counts": 4 * (2 * self.nodes + self.ranks),
                "histograms": 4 * (chunks * node + sent),
                "tables": 4 * (self.arrivals * self.gpus_per_node + self.returned_rows),
            }
        chunks = -(-self.max_tokens // chunk_tokens(self.ranks))
        return {
            "flags": control_bytes(self.ranks),
            "counts": 4 * 2 * self.ranks * columns,
            "histograms": 4 * chunks * self.ranks * columns,
            "tables": 4 * self.max_tokens * min(self.num_topk, self.ranks),
        }

    @property
    def num_bytes(self) -> int:
        """Of the window in all."""
        sections = [*self.rows().values(), *self.metadata().values()]
        return align(sum(align(size, SECTION_ALIGNMENT) for size in sections), BUFFER_ALIGNMENT)

    def check(self, received_rows: int, arrivals: int) -> None:
        """Whether so many rows fit.

        Raises:
            CapacityError: they do not; the message names what is needed.
        """
        for name, seen, room, balanced in (
            ("received rows", received_rows, self.received_rows, self.balanced_rows),
            ("rows from the network", arrivals, self.arrivals, self.balanced_arrivals),
        ):
            if seen > room:
                needed = f"a capacity factor of {math.ceil(100 * seen / balanced) / 100:g}" if balanced else "a network"
                raise CapacityError(f"{seen} {name}: there is room for {room}; {needed} is needed")


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


@functools.cache
def stage_shape(num_ranks: int, num_local_experts: int) -> LaunchShape:
    """Of dispatch_stage."""
    warps = 28
    fixed, per_warp = 16 + 4 * 32 * warps, 4 * num_ranks * (num_local_experts + 1)
    counting = min(warps, (SHARED_BYTES - fixed) // per_warp)
    if counting < 1:
        raise ValueError(f"num_experts = {num_ranks * num_local_experts}: more than a kernel can count")
    return _shape(32 * warps, fixed + counting * per_warp, counting_warps=counting)


@functools.cache
def route_shape(num_local_experts: int, num_topk: int) -> LaunchShape:
    """Of dispatch_route: a warp keeps a chunk's experts and weights, and a counter for each expert."""
    per_warp = 4 * (48 * num_topk + CHUNK_TOKENS + align(num_local_experts, 4))
    warps = min(16, (SHARED_BYTES - 16) // per_warp)
    if warps < 1:
        raise ValueError(f"{num_local_experts} experts on a rank: more than a kernel can count")
    return _shape(32 * warps, 16 + warps * per_warp)


@functools.cache
def pull_shape(num_ranks: int, data_bytes: int, scale_words: int) -> LaunchShape:
    """Of dispatch_pull: 4 warps with 4 pieces in flight each saturate an SM (docs/performance.md)."""
    warps, stages = 4, 4
    slots, scale_bytes = warps * stages, align(4 * scale_words, ROW_ALIGNMENT)
    fixed = SCRATCH_BYTES + 8 * num_ranks + slots * (8 + 4 * 33 + scale_bytes)
    piece = _piece(data_bytes, (SHARED_BYTES - fixed) // slots)
    return _shape(32 * warps, fixed + slots * piece, piece_bytes=piece, stages=stages)


@functools.cache
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


@functools.cache
def engram_shape(kernel: str, num_ranks: int) -> LaunchShape:
    """Of Engram's kernels, "write", "fetch", "group" or "sum": see what each says about its shared memory."""
    warps, digits, tile = 16, 256, 1024
    return {
        "write": _shape(1024, 16 + 8 * tile),
        "fetch": _shape(1024, 16 + 8 * tile + 8 * num_ranks),
        "group": _shape(32 * warps, 16 + 4 * warps + 4 * digits * (warps + 1) + 4 * (num_ranks + 1)),
        "sum": _shape(1024, 16 + 16 * num_ranks),
    }[kernel]


def _piece(row_bytes: int, most: int) -> int:
    """Bytes of the equal pieces, at most `most` each, that a row is cut into."""
    pieces = -(-row_bytes // most)
    return align(-(-row_bytes // pieces), ROW_ALIGNMENT)
