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
    rows = max_received_rows(num_ranks, num_max_tokens_per_rank)
    return expanded_rows(rows, num_topk, num_local_experts, alignment)


def expanded_rows(received_rows: int, num_topk: int, num_local_experts: int, alignment: int) -> int:
    """The same for so many rows of one per token and rank."""
    rows = received_rows * min(num_topk, num_local_experts)
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


def ring_bytes(max_tensor_bytes: int, max_inflight: int, num_rings: int, max_inplace: int) -> int:
    """Bytes of `num_rings` rings of `max_inflight` slots each, and of `max_inplace` slots for tensors that stay where
    they arrive."""
    slots = num_rings * max_inflight + max_inplace
    return align(slots * align(max_tensor_bytes, TENSOR_ALIGNMENT), BUFFER_ALIGNMENT)


def session_bytes(num_ranks: int, shape: Sequence[int], itemsize: int) -> int:
    """Bytes of one gathered tensor `[num_ranks, *shape]` in a session."""
    return align(num_ranks * math.prod(shape) * itemsize, TENSOR_ALIGNMENT)


def engram_row_bytes(hidden: int, itemsize: int, use_fp8: bool) -> int:
    """Bytes of a row of an Engram table, in memory and on the wire: the values and, of FP8, their fp32 scales."""
    return RowLayout(hidden * itemsize, 4 * scale_columns(hidden, packed=False) if use_fp8 else 0).stride


# ---- the cuda backend's window and shared memory ------------------------------------------------------------------

CHUNK_TOKENS = 32  # tokens whose expert counts a kernel keeps together
FLAG_KINDS, ARGUMENT_WORDS, SIGNAL_KINDS = 7, 10, 7  # see csrc/kernels/ep/protocol.cuh
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
    """Flags, failure words, records of the running operation, and answers of relays at the start of the window."""
    records = (1 + num_ranks) * (2 + ARGUMENT_WORDS) * 4
    return align(FLAG_KINDS * num_ranks * 8 + align(num_ranks, 2) * 4 + records + num_ranks * 8 + 4, SECTION_ALIGNMENT)


CAPACITY_FACTOR = 1.5  # rows that a rank has room for, over those it gets when routing is balanced
_LEAST_TARGETS = 8  # up to so many ranks or nodes there is room for all their tokens at once


@dataclass(frozen=True)
class Nodes:
    """How the ranks of a group lie in nodes, and what goes between these.

    Rows that arrive over the network have places of their own, handed out by the receiver before any is sent. So a rank
    needs room for those that it gets, not for each token of each rank: `capacity_factor` times those of balanced
    routing, where every token goes to as many places as it has experts; small groups have room for the worst case.

    Args:
        num_ranks: of the group. per_node: of each node, consecutive; `num_ranks` = there is one node.
        hybrid: a row crosses the network once for each node, not for each rank.

    Raises:
        ValueError: `capacity_factor` is below 1.
    """

    num_ranks: int
    per_node: int
    hybrid: bool = False
    capacity_factor: float = CAPACITY_FACTOR

    def __post_init__(self) -> None:
        if not 1 <= self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor = {self.capacity_factor}: must be 1 or more")

    @property
    def remotes(self) -> int:
        """Ranks of other nodes that a rank exchanges messages with."""
        return self.num_ranks // self.per_node - 1 if self.hybrid else self.num_ranks - self.per_node

    @property
    def others(self) -> int:
        """Ranks of other nodes."""
        return self.num_ranks - self.per_node

    def returns(self, num_topk: int) -> int:
        """Rows of a token that come back over the network at most."""
        return min(num_topk, self.remotes) if self.hybrid else num_topk * (self.others > 0)

    def arrivals(self, max_tokens: int, num_topk: int) -> int:
        """Rows from other nodes that a relay has room for."""
        return max_tokens * self._with_room(self.remotes, num_topk)

    def remote_rows(self, max_tokens: int, num_topk: int) -> int:
        """Rows of other nodes' ranks for which a rank has room when they go back."""
        return max_tokens * self._with_room(self.others, num_topk)

    def slots(self, max_tokens: int, num_topk: int) -> int:
        """Rows that a rank can send back, one per token and rank."""
        return self.per_node * max_tokens + self.remote_rows(max_tokens, num_topk)

    def mirror_words(self, num_local_experts: int) -> int:
        """int32 words of what a rank of another node counted."""
        return align(self.per_node * (num_local_experts + 1), 2) + 2

    def count_width(self, num_local_experts: int) -> int:
        """Columns of the counts of a chunk of tokens."""
        columns = self.num_ranks * (num_local_experts + 1)
        return columns + (self.num_ranks // self.per_node if self.hybrid else 0)

    def _with_room(self, sources: int, num_topk: int) -> int:
        """As many times the tokens of a rank as there is room for, of rows from so many others."""
        return min(sources, max(_LEAST_TARGETS, math.ceil(self.capacity_factor * min(num_topk, sources))))


def trailer_bytes(num_topk: int) -> int:
    """What follows a row on its way to another node, see csrc/kernels/ep/protocol.cuh."""
    return align(4 * (4 + 4 * num_topk), ROW_ALIGNMENT)


class DispatchLayout:
    """Where in the window a dispatch puts its data: offsets in bytes, `end` after the last section.

    Args:
        start: of the window's dispatch part. data_bytes: of a token as it travels, a multiple of 16.
        scale_words: scale factors of a token. num_local_experts: experts of each rank.

    Attributes:
        max_arrivals: rows from other nodes that there is room for. trailer: where it lies in a row.
    """

    def __init__(
        self,
        start: int,
        *,
        nodes: Nodes,
        max_tokens: int,
        num_topk: int,
        num_local_experts: int,
        data_bytes: int,
        scale_words: int,
    ):
        columns = nodes.count_width(num_local_experts)
        sections = _Sections(start)
        self.trailer = data_bytes + align(4 * scale_words, ROW_ALIGNMENT)
        self.row_stride = self.trailer + (trailer_bytes(num_topk) if nodes.others else 0)
        self.max_arrivals = nodes.arrivals(max_tokens, num_topk)
        self.topk = sections.take(2 * max_tokens * num_topk)
        self.weights = sections.take(4 * max_tokens * num_topk)
        self.prefix = sections.take(4 * columns * -(-max_tokens // CHUNK_TOKENS))
        self.totals = sections.take(4 * (columns + 1))
        mirrors = nodes.num_ranks if nodes.others else 0
        self.mirror = sections.take(4 * mirrors * nodes.mirror_words(num_local_experts))
        self.rows = sections.take(max_tokens * self.row_stride)
        self.arrivals = sections.take(self.max_arrivals * self.row_stride)
        self.end = sections.end


class CombineLayout:
    """Where in the window a combine puts its data: offsets in bytes, `end` after the last section.

    Args:
        start: of the window's combine part. row_bytes: of a row, a multiple of 16.
        num_rows: expert rows that lie there as they are; None = one sum per (source rank, token).

    Attributes:
        return_stride: bytes of a row, and its weights, on the way back to another node.
    """

    def __init__(
        self, start: int, *, nodes: Nodes, max_tokens: int, num_topk: int, row_bytes: int, num_rows: int | None = None
    ):
        slots, arrivals = nodes.slots(max_tokens, num_topk), nodes.arrivals(max_tokens, num_topk)
        sections = _Sections(start)
        self.return_stride = row_bytes + align(4 * num_topk, ROW_ALIGNMENT)
        self.weights = sections.take(4 * slots * num_topk)
        self.table = sections.take(4 * slots * num_topk)
        self.slots = sections.take(4 * arrivals * nodes.per_node)
        self.outgoing = sections.take(arrivals * self.return_stride if nodes.hybrid else 0)
        self.returned = sections.take(max_tokens * nodes.returns(num_topk) * self.return_stride)
        # Last: where expert rows lie there as they are, their number is what differs.
        self.rows = sections.take((slots if num_rows is None else num_rows) * row_bytes)
        self.end = sections.end


def window_split(nodes: Nodes, num_topk: int) -> tuple[int, int]:
    """How many rows dispatch and combine have in the window for each token that a rank may dispatch."""
    arrivals, returns = nodes.arrivals(1, num_topk), nodes.returns(num_topk)
    return 1 + arrivals, nodes.slots(1, num_topk) + returns + (arrivals if nodes.hybrid else 0)


class WindowLayout:
    """The window that dispatch and combine need on the cuda backend.

    Args:
        num_topk: 0 = unknown, sized for 32. itemsize: bytes per value in combine (and in dispatch unless FP8).

    Attributes:
        split: bytes up to its combine part. num_bytes: in all.
    """

    def __init__(
        self, nodes: Nodes, max_tokens: int, hidden: int, num_topk: int, use_fp8_dispatch: bool, itemsize: int = 2
    ):
        topk, row_bytes = num_topk or MAX_TOPK, align(hidden * itemsize, ROW_ALIGNMENT)
        # Even where rows are meant to travel in FP8, gradients of combine are dispatched as they are.
        self._dispatch = DispatchLayout(
            control_bytes(nodes.num_ranks),
            nodes=nodes,
            max_tokens=max_tokens,
            num_topk=topk,
            num_local_experts=-(-EXPECTED_EXPERTS // nodes.num_ranks),
            data_bytes=row_bytes,
            scale_words=scale_columns(hidden, packed=False) if use_fp8_dispatch else 0,
        )
        self.split = self._dispatch.end
        self._combine = CombineLayout(
            self.split, nodes=nodes, max_tokens=max_tokens, num_topk=topk, row_bytes=row_bytes
        )
        self.num_bytes = align(self._combine.end, BUFFER_ALIGNMENT)

    def sections(self) -> dict[str, int]:
        """Bytes of the sections with rows, and of all the rest as "metadata"."""
        dispatch, combine = self._dispatch, self._combine
        rows = {
            "tokens": dispatch.arrivals - dispatch.rows,
            "arrivals": dispatch.end - dispatch.arrivals,
            "rank sums": combine.end - combine.rows,
            "node sums": combine.returned - combine.outgoing,
            "returned": combine.rows - combine.returned,
        }
        return rows | {"metadata": self.num_bytes - sum(rows.values())}


RING_ALIGNMENT = 256  # bytes; slots of a ring, and the tensors behind a session's words, begin at multiples of it
RECORD_BYTES = 64  # what a receiver is told of a tensor: three words of 64 bits, then one of 32 for each piece
MOST_PIECES = 8
# A copy of this inside a GPU takes 48 us, more than the calls of the driver for one more piece at both ends
# (docs/performance.md).
LEAST_PIECE_BYTES = 64 << 20
PIECE_ALIGNMENT = 64 << 10


def pieces_of(num_bytes: int) -> list[tuple[int, int]]:
    """(offset, bytes) of what of a tensor is copied by itself: one leaves its slot while the next comes."""
    count = min(max(1, num_bytes // LEAST_PIECE_BYTES), MOST_PIECES)
    step = align(max(1, -(-num_bytes // count)), PIECE_ALIGNMENT)
    return [(offset, min(step, num_bytes - offset)) for offset in range(0, max(1, num_bytes), step)]


def ring_slot_bytes(max_tensor_bytes: int) -> int:
    """Bytes of a slot of a ring on the cuda backend."""
    return align(max_tensor_bytes, RING_ALIGNMENT)


class RingLayout:
    """Where a rank keeps the tensors that come to it, and the words about them: offsets in its window.

    Between nodes (`far`) there are as many rings for tensors on their way to other nodes.

    Attributes:
        max_inflight: slots of a ring. arrivals: where rings for what comes begin, of `ring_bytes` bytes each.
        staging: those for what goes to other nodes, likewise. inplace: where tensors that stay there are, of
            `slot_bytes` each.
        end: behind the last.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        num_channels: int,
        max_inflight: int,
        max_tensor_bytes: int,
        num_rings: int,
        max_inplace: int = 0,
        far: bool = False,
    ):
        self._channels, self.max_inflight = num_channels, max_inflight
        records, links = RECORD_BYTES * num_ranks * num_channels * max_inflight, 8 * num_ranks * num_channels
        sections = _Sections(0)
        self._inbox, self._outbox = sections.take(records), sections.take(records)
        self._taken, self._taken_outbox = sections.take(links), sections.take(links)
        self._landed = sections.take(links if far else 0)
        self.arrivals = align(sections.end, RING_ALIGNMENT)
        self.slot_bytes = ring_slot_bytes(max_tensor_bytes)
        self.ring_bytes = max_inflight * self.slot_bytes
        self.staging = self.arrivals + num_rings * self.ring_bytes
        self.inplace = self.staging + (num_rings * self.ring_bytes if far else 0)
        self.end = self.inplace + max_inplace * self.slot_bytes

    def record(self, rank: int, channel: int, number: int, *, outgoing: bool) -> int:
        """What is known of tensor `number` from `rank`, or (outgoing) what `rank` is going to be told."""
        return (self._outbox if outgoing else self._inbox) + RECORD_BYTES * self._slot(rank, channel, number)

    def taken(self, rank: int, channel: int, *, outgoing: bool) -> int:
        """How many tensors `rank` has taken, or (outgoing) is going to be told that this rank has; 64 bits."""
        return (self._taken_outbox if outgoing else self._taken) + 8 * (rank * self._channels + channel)

    def landed(self, rank: int, channel: int) -> int:
        """How many tensors of `rank`, of another node, are here; 64 bits."""
        return self._landed + 8 * (rank * self._channels + channel)

    def _slot(self, rank: int, channel: int, number: int) -> int:
        return (rank * self._channels + channel) * self.max_inflight + number % self.max_inflight


# SMs of a reduce-scatter unless its caller says: over NVLink 8 take 788 to 838 us where 4 take 1240, more gain little,
# and GEMMs keep as much of their speed beside them, 98 % (docs/performance.md).
REDUCE_SCATTER_SMS = 8


class SessionLayout:
    """Where all-gather sessions keep their words and tensors: offsets in the window.

    Attributes:
        begun: words of the ranks: the session that each has begun. Between nodes (`far`) twice as many of 64 bits
            behind them, which ranks of other nodes raise. begun_bytes: of all these. begun_outbox: this rank's, for
            the others to get.
        row_bytes: of the words about an operation. tensors: where gathered tensors begin. incoming: as much, or
            `incoming_bytes`, for what is on its way between nodes; none in one node. end: behind the last.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        max_operations: int,
        max_session_bytes: int,
        far: bool = False,
        incoming_bytes: int | None = None,
    ):
        self._far_words = align(4 * num_ranks, 8)
        self.row_bytes = self._far_words + 8 * num_ranks if far else 4 * num_ranks
        sections = _Sections(0)
        self._num_ranks = num_ranks
        self.begun_bytes = self.row_bytes + (8 * num_ranks if far else 0)
        self.begun, self.begun_outbox = sections.take(self.begun_bytes), sections.take(4)
        self._arrived = sections.take(self.row_bytes * max_operations)
        self._outbox = sections.take(4 * max_operations)
        self._passing = sections.take(4 * num_ranks * max_operations if far else 0)
        self.tensors = align(sections.end, RING_ALIGNMENT)
        self.incoming = align(self.tensors + max_session_bytes, RING_ALIGNMENT)
        incoming_bytes = max_session_bytes if incoming_bytes is None else incoming_bytes
        self.end = self.incoming + incoming_bytes if far else self.tensors + max_session_bytes

    def begun_far(self, rank: int) -> int:
        """How many sessions `rank`, of another node, has begun; 64 bits."""
        return self.begun + self._far_words + 8 * rank

    def ready(self, rank: int) -> int:
        """How many of them `rank`, of another node, has seen other nodes begin; likewise."""
        return self.begun_far(rank) + 8 * self._num_ranks

    def arrived(self, operation: int, rank: int) -> int:
        """What says that `rank`'s part of an operation is here."""
        return self._arrived + operation * self.row_bytes + 4 * rank

    def landed(self, operation: int, rank: int) -> int:
        """How often `rank`, of another node, has brought its part of an operation; 64 bits, in one row with those."""
        return self.arrived(operation, 0) + self._far_words + 8 * rank

    def outbox(self, operation: int) -> int:
        """What the others are told of this rank's part."""
        return self._outbox + 4 * operation

    def passing(self, operation: int, rank: int) -> int:
        """What this node's ranks are to be told of the part of `rank`, of another node, that this one passes on; or
        (`rank` is this one) other nodes of what this one has summed."""
        return self._passing + 4 * (operation * self._num_ranks + rank)


# ---- Engram on the cuda backend -------------------------------------------------------------------------------------

# SMs of an operation unless its caller says: rows of 256 bytes are under way by the hundred, in 96 KiB of an SM's
# registers, and a transfer of a few megabytes is over before more SMs would help.
ENGRAM_SMS = 16
TOLD_BYTES, ROOM_BYTES = 16, 8  # what ranks tell each other in a reduce, see csrc/kernels/engram/engram.cuh
_ENGRAM_TILE = 512  # entries that a thread block fetches at once between nodes, one of each thread
_LANDING_BYTES, _LEAST_LANDING_ROWS = 16 << 20, 256  # under way to a rank at once; a row of each block at least


class EngramControlLayout:
    """Where ranks keep what they tell each other: offsets in the window, behind flags and the like.

    Attributes:
        told: what each rank has for this one. room: between nodes, where that goes at each rank.
    """

    def __init__(self, num_ranks: int):
        sections = _Sections(control_bytes(num_ranks))
        self.told = sections.take(TOLD_BYTES * num_ranks)
        self.room = sections.take(ROOM_BYTES * num_ranks)
        self.end = sections.end


class EngramTableLayout:
    """Where a rank's part of a table lies, and rows of other nodes on their way: offsets in the window.

    Args:
        between_nodes: whether there are other nodes.
    """

    def __init__(self, num_rows: int, row_stride: int, between_nodes: bool):
        sections = _Sections(0)
        sections.take(num_rows * row_stride)
        self._landing_rows = max(_LANDING_BYTES // row_stride, _LEAST_LANDING_ROWS) if between_nodes else 0
        self.landing = sections.take(self._landing_rows * row_stride)
        self.end = sections.end

    def tile(self, num_sms: int) -> int:
        """Entries that each of so many thread blocks, at most 256, can have under way."""
        return min(_ENGRAM_TILE, self._landing_rows // num_sms)


class EngramStagingLayout:
    """Where a rank puts rows and their sums for the owners, and gets them from other nodes: offsets in the window.

    Args:
        max_rows: distinct rows that there is room for. max_arrived: likewise, from other nodes.
    """

    def __init__(self, max_rows: int, max_arrived: int, hidden: int):
        sections = _Sections(0)
        self.rows = sections.take(8 * max_rows)
        self.sums = sections.take(4 * max_rows * hidden)
        self.arrived_rows = sections.take(8 * max_arrived)
        self.arrived_sums = sections.take(4 * max_arrived * hidden)
        self.end = sections.end


def counts_words(num_ranks: int, num_local_experts: int) -> int:
    """int32 words of what a dispatch counts, see `Counts` in csrc/kernels/ep/protocol.cuh."""
    return (2 * num_ranks + 1) * (num_local_experts + 1) + num_ranks + 1


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
def stage_shape(nodes: Nodes, num_local_experts: int) -> LaunchShape:
    """Of dispatch_stage."""
    warps = 28
    fixed = 16 + 4 * 32 * warps + 4 * (num_local_experts + 1)
    per_warp = 4 * nodes.count_width(num_local_experts)
    counting = min(warps, (SHARED_BYTES - fixed) // per_warp)
    if counting < 1:
        raise ValueError(f"num_experts = {nodes.num_ranks * num_local_experts}: more than a kernel can count")
    return _shape(32 * warps, fixed + counting * per_warp, counting_warps=counting)


@functools.cache
def send_shape(nodes: Nodes, num_local_experts: int, num_topk: int) -> LaunchShape:
    """Of dispatch_send: a warp keeps a chunk's experts, a counter for each expert, and who goes where."""
    experts, num_nodes = nodes.num_ranks * num_local_experts, nodes.num_ranks // nodes.per_node
    fixed = SCRATCH_BYTES + 4 * align(num_local_experts + 1, 4)
    per_warp = 4 * align(24 * num_topk + experts + nodes.num_ranks + num_nodes, 4)
    warps = min(16, (SHARED_BYTES - fixed) // per_warp)
    if warps < 3:  # two tell and hear what comes
        raise ValueError(f"num_experts = {experts}: more than a kernel can send to from 32 tokens at once")
    return _shape(32 * warps, fixed + warps * per_warp)


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
    return _ring_shape(row_bytes, addresses=num_ranks, others=1, most_warps=24)


@functools.cache
def relay_shape(per_node: int, row_bytes: int) -> LaunchShape:
    """Of combine_relay: the same with a warp more in each group, which sends, and a word for each warp."""
    return _ring_shape(row_bytes, addresses=per_node, others=2, most_warps=20, words=20)


def reduce_shape(num_ranks: int, part_bytes: int, num_sms: int) -> tuple[int, LaunchShape]:
    """CTAs of reduce_scatter, at most `num_sms`, and their shape: groups as those of `sum_shape`.

    Pieces are equal and as many for each group: 3 of a CTA where they are large, more, of fewer warps, where not.
    """
    groups = 3
    ctas = min(num_sms, -(-part_bytes // (groups * _LARGEST_PIECE)))
    share = -(-part_bytes // (ctas * groups))
    # Sums that take half the room begin at multiples of 16 bytes, too.
    return ctas, _ring_shape(share, addresses=num_ranks, others=1, most_warps=24, alignment=2 * ROW_ALIGNMENT)


_CONSUMER_BYTES = 2048  # of a piece that a warp adds
_LARGEST_PIECE = 7 * _CONSUMER_BYTES


def _ring_shape(
    row_bytes: int, *, addresses: int, others: int, most_warps: int, words: int = 0, alignment: int = ROW_ALIGNMENT
) -> LaunchShape:
    piece = _piece(row_bytes, _LARGEST_PIECE, alignment)
    group_warps = others + -(-piece // _CONSUMER_BYTES)
    groups = most_warps // group_warps
    fixed = SCRATCH_BYTES + 8 * addresses + 4 * words
    stages = min(8, (SHARED_BYTES - fixed) // (groups * (piece + 24)))
    return _shape(
        32 * groups * group_warps,
        fixed + groups * stages * (piece + 24),
        piece_bytes=piece,
        stages=stages,
        groups=groups,
    )


@functools.cache
def engram_shape(kernel: str, num_ranks: int, between_nodes: bool) -> LaunchShape:
    """Of Engram's kernels, "write", "fetch", "group", "sum" or "put": see what each says about its shared memory."""
    warps, digits, tile = 16, 256, 1024
    fetching = _ENGRAM_TILE if between_nodes else tile
    return {
        "write": _shape(1024, 16 + 8 * tile),
        "fetch": _shape(fetching, 24 + 8 * fetching + 8 * num_ranks),
        "group": _shape(32 * warps, 16 + 4 * warps + 4 * digits * (warps + 1) + 4 * (num_ranks + 1)),
        "sum": _shape(1024, 16 + 16 * num_ranks),
        "put": _shape(256, 16 + 4 * (num_ranks + 1)),
    }[kernel]


def _piece(row_bytes: int, most: int, alignment: int = ROW_ALIGNMENT) -> int:
    """Bytes of the equal pieces, at most `most` each, that a row is cut into."""
    pieces = -(-row_bytes // most)
    return align(-(-row_bytes // pieces), alignment)
