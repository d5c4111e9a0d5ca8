"""The host backend: dispatch and combine between CPU processes over gloo, on any machine with torch.

Every rank packs each of its tokens once per destination rank into one byte row (`sizing.RowLayout`), sends one message
per peer, and the receiver unpacks them in (source rank, source token) order. Sums run in fp32 in a fixed order.

Legend: T tokens, H hidden, K top-k, P ranks, S rows sent, R rows received, N expanded rows, E local experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.elastic.backends.base import Received, Sessions, Traffic, machine_name
from epv2_plugin.elastic.backends.host_engram import HostEngram
from epv2_plugin.elastic.backends.host_p2p import HostPointToPoint
from epv2_plugin.elastic.backends.host_sessions import HostSessions
from epv2_plugin.elastic.backends.host_transport import Operation, Transport
from epv2_plugin.elastic.errors import BufferSizeError
from epv2_plugin.elastic.event import Event, HostEvent
from epv2_plugin.elastic.quant import per_token_cast_to_fp8
from epv2_plugin.elastic.sizing import RowLayout, align, buffer_bytes, max_expanded_rows, max_received_rows

_HEADER, _ROWS, _LATE_ROWS = range(3)  # steps of an operation
_EARLY_BYTES = 1 << 30  # most that is set aside for rows whose number is not known yet
_HEADER_FIELDS = ("hidden size", "dtype", "top-k", "num_max_tokens_per_rank", "topk_weights", "scales")
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)

Columns = list[tuple[torch.Tensor, torch.Tensor]]


def _words(rows: torch.Tensor) -> torch.Tensor:
    """`rows` `[X, bytes]` viewed in the widest integers that fit: torch gathers those fastest, and knows them all."""
    rows = rows.view(torch.uint8)
    width = rows.shape[1] | rows.stride(0) | int(rows.storage_offset())
    return rows.view(next(word for word in _WORDS if width % word.itemsize == 0))


def _take_rows(source: torch.Tensor, index: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows `index` of `source` `[X, Y]` of any dtype, as bits."""
    if source.numel() == 0:  # such as the scales of no tokens, which torch gives strides that can't be viewed as bits
        return source.new_empty(index.numel(), source.shape[1])
    words = _words(source)
    if out is None:
        return torch.index_select(words, 0, index).view(source.dtype)
    target = out.view(torch.uint8).view(words.dtype)
    return torch.index_select(words, 0, index, out=target)


def _columns(index_XK: torch.Tensor) -> Columns:
    """Split a sum over the valid (>= 0) entries of each row into steps: the first of every row, then the second, ...

    Each step is (rows that have such an entry, ascending; the entry). Rows are unique within a step, so that adding
    the steps one after the other fixes the order of every sum.
    """
    valid_XK = index_XK >= 0
    nth_XK = valid_XK.cumsum(1).masked_fill_(~valid_XK, 0)
    steps = int(nth_XK.max()) if nth_XK.numel() else 0
    entries, columns = index_XK.flatten(), []
    for step in range(1, steps + 1):
        position = (nth_XK == step).flatten().nonzero().squeeze(1)
        row = position.div(index_XK.shape[1], rounding_mode="floor")
        columns.append((row, entries.index_select(0, position)))
    return columns


def _ordered_sum(
    source: torch.Tensor, columns: Columns, num_rows: int, dtype: torch.dtype, initial: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum rows of `source` in fp32 in the order of `columns`, on top of `initial` `[num_rows, H]` fp32."""
    dense = bool(columns) and columns[0][0].numel() == num_rows
    if initial is None and dense:
        first = source.index_select(0, columns[0][1])
        if len(columns) == 1:
            return first.to(dtype)
        total, columns = first.float(), columns[1:]
    else:
        total = source.new_zeros(num_rows, source.shape[1], dtype=torch.float32) if initial is None else initial
    for row, entry in columns:
        total.index_add_(0, row, source.index_select(0, entry).float())
    return total.to(dtype)


class _RowExchange:
    """Byte rows from every rank to every rank, gathered into one `[R, stride]` by source rank."""

    def __init__(self, operation: Operation, layout: RowLayout, dtypes: tuple):
        self._operation, self._stride, self._kind = operation, layout.stride, (layout, *dtypes)
        self._early: torch.Tensor | None = None
        self._most_rows = 0
        self._waits: list[Callable[[], None]] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._received = torch.empty(0, layout.stride, dtype=torch.uint8, device="cpu")
        self._own = self._mine = self._received

    def receive_early(self, most_rows: int) -> None:
        """Make room for up to `most_rows` rows of each rank, before anybody said how many come."""
        size = len(self._operation.peers) + 1
        if not 0 < size * most_rows * self._stride <= _EARLY_BYTES:
            return
        self._most_rows = most_rows
        self._early = torch.empty(size, most_rows * self._stride, dtype=torch.uint8, device="cpu")
        room = {p: self._early[p] for p in self._operation.peers}
        self._waits.append(self._operation.receive(_ROWS, room, "rows", self._kind))

    def send(self, rows: torch.Tensor, splits: list[int]) -> None:
        """Send `rows` `[S, stride]`, `splits[p]` of them to rank p."""
        parts = rows.split(splits)
        self._own = parts[self._operation.rank]
        flat = {p: parts[p].view(-1) for p in self._operation.peers}
        late = {p: part for p, part in flat.items() if splits[p] > self._most_rows}
        if self._early is not None:
            # Who has made room gets a message in any case, be it one that only says: none, or later.
            nothing = torch.zeros(1, dtype=torch.uint8, device="cpu")
            early = {p: flat[p] if p not in late and splits[p] else nothing for p in flat}
            self._operation.send(_ROWS, early, "rows", self._kind)
        self._operation.send(_LATE_ROWS, late, "rows", self._kind)

    def receive(self, splits: list[int]) -> None:
        """Receive `splits[p]` rows from rank p, now that their number is known."""
        self._received = torch.empty(sum(splits), self._stride, dtype=torch.uint8, device="cpu")
        parts = self._received.split(splits)
        late = {p: parts[p].view(-1) for p in self._operation.peers if splits[p] > self._most_rows}
        self._waits.append(self._operation.receive(_LATE_ROWS, late, "rows", self._kind))
        if self._early is not None:
            arrived = [p for p in self._operation.peers if p not in late]
            self._copies = [(parts[p].view(-1), self._early[p]) for p in arrived]
        self._mine = parts[self._operation.rank]

    def wait(self) -> torch.Tensor:
        """Wait until everything is here and everything sent was taken; returns the rows `[R, stride]`."""
        for wait in self._waits:
            wait()
        self._operation.wait_sent()
        for target, source in self._copies:
            target.copy_(source[: target.numel()])
        self._mine.copy_(self._own)
        return self._received


class HostRoute:
    """Who gets which token. Built by a dispatch, completed when its rows have arrived, read by everything after."""

    def __init__(self, topk_idx_TK: torch.Tensor, rank: int, num_ranks: int, num_experts: int):
        self.rank, self.num_ranks = rank, num_ranks
        self.num_local_experts = num_experts // num_ranks
        self.topk_idx_TK = topk_idx_TK
        num_tokens, self.num_topk = topk_idx_TK.shape
        self.rank_TK = topk_idx_TK.div(self.num_local_experts, rounding_mode="floor")  # -1 stays -1
        goes_TP = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device="cpu")
        goes_TP.scatter_(1, self.rank_TK.masked_fill(self.rank_TK < 0, num_ranks), True)
        self.goes_PT = goes_TP[:, :num_ranks].t().contiguous()
        self.sent_splits: list[int] = self.goes_PT.sum(1).tolist()
        self.sent_token_S = self.goes_PT.nonzero()[:, 1]
        self.pairs_per_rank: list[int] = []
        self.rows_per_source: list[int] = []
        self.rows_per_expert: list[int] = []
        self.num_max_tokens_per_rank = 0
        self.expert_alignment = 1
        self.expanded = False
        self.number = 0  # of the dispatch that made it: tells routes apart in the tags of what follows
        self.pending = HostEvent()
        self._received: tuple[torch.Tensor, torch.Tensor] | None = None

    def expert_counts(self) -> torch.Tensor:
        """int64 `[P, E]`: (token, expert) pairs of this rank for every expert."""
        counts = torch.bincount(self.topk_idx_TK.flatten() + 1, minlength=self.num_ranks * self.num_local_experts + 1)
        counts_PE = counts[1:].view(self.num_ranks, self.num_local_experts)
        self.pairs_per_rank = counts_PE.sum(1).tolist()
        return counts_PE

    def local_to(self, values_TK: torch.Tensor, fill: float) -> torch.Tensor:
        """`values_TK` for every row sent `[S, K]`, with `fill` at the positions that lead to another rank."""
        destination_S = torch.repeat_interleave(torch.tensor(self.sent_splits, device="cpu"))
        elsewhere_SK = self.rank_TK.index_select(0, self.sent_token_S) != destination_S.unsqueeze(1)
        return values_TK.index_select(0, self.sent_token_S).masked_fill_(elsewhere_SK, fill)

    def complete(self, recv_idx_RK: torch.Tensor, source_token_R: torch.Tensor) -> None:
        """Fill in what came with the rows: local experts `[R, K]` (-1 = elsewhere) and source tokens `[R]`."""
        self._received = (recv_idx_RK, source_token_R)

    def _arrived(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.pending.current_stream_wait()
        assert self._received is not None
        return self._received

    @property
    def num_rows(self) -> int:
        return sum(self.rows_per_source)

    @property
    def received_per_source(self) -> torch.Tensor:
        return torch.tensor(self.rows_per_source, dtype=torch.int32, device="cpu")

    @property
    def received_per_expert(self) -> torch.Tensor:
        return torch.tensor(self.rows_per_expert, dtype=torch.int32, device="cpu")

    @property
    def recv_topk_idx(self) -> torch.Tensor:
        return self._arrived()[0]

    @cached_property
    def _expert_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(position in the flat `[R, K]` of every expanded row, its place in the expanded tensor), by expert."""
        local_RK = self.recv_topk_idx
        flat = local_RK.flatten()
        order = flat.masked_fill(flat < 0, self.num_local_experts).argsort(stable=True)[: sum(self.rows_per_expert)]
        place = torch.arange(order.numel(), device="cpu")
        if self.expert_alignment > 1:
            counts = torch.tensor(self.rows_per_expert, device="cpu")
            gaps = torch.tensor([align(n, self.expert_alignment) - n for n in self.rows_per_expert], device="cpu")
            place += (gaps.cumsum(0) - gaps).repeat_interleave(counts)
        return order, place

    @cached_property
    def expanded_source_N(self) -> torch.Tensor:
        """Received row of every expanded row (gaps left out)."""
        return self._expert_order[0].div(self.num_topk, rounding_mode="floor")

    @property
    def expanded_flat_N(self) -> torch.Tensor:
        """Position in the flat `[R, K]` of every expanded row (gaps left out)."""
        return self._expert_order[0]

    @property
    def expanded_place_N(self) -> torch.Tensor:
        """Place in the expanded tensor of every expanded row (gaps left out)."""
        return self._expert_order[1]

    @cached_property
    def expanded_row_RK(self) -> torch.Tensor:
        """Expanded row of every received (row, top-k position), -1 = none."""
        order, place = self._expert_order
        rows = torch.full((self.num_rows * self.num_topk,), -1, dtype=torch.int64, device="cpu")
        return rows.index_copy_(0, order, place).view(self.num_rows, self.num_topk)

    @cached_property
    def local_columns(self) -> Columns:
        """Steps that sum the expanded rows of each received row, in top-k order."""
        return _columns(self.expanded_row_RK)

    @cached_property
    def pair_splits(self) -> list[int]:
        """Expanded rows (gaps left out) by source rank."""
        valid_R = (self.recv_topk_idx >= 0).sum(1)
        return [int(part.sum()) for part in valid_R.split(self.rows_per_source)]

    @cached_property
    def sent_row_TK(self) -> torch.Tensor:
        """Which sent row serves a token's top-k position, -1 = none."""
        row_PT = self.goes_PT.flatten().cumsum(0).view(self.num_ranks, -1) - 1
        row_TK = row_PT.t().gather(1, self.rank_TK.clamp(min=0))
        return row_TK.masked_fill_(self.rank_TK < 0, -1)

    @cached_property
    def return_columns(self) -> Columns:
        """Steps that sum what comes back for each token: one row per rank, at the last top-k position of that rank."""
        last = torch.ones_like(self.rank_TK, dtype=torch.bool)
        for position in range(self.num_topk - 1):
            later = self.rank_TK[:, position + 1 :] == self.rank_TK[:, position : position + 1]
            last[:, position] = ~later.any(1)
        return _columns(self.sent_row_TK.masked_fill(~last, -1))

    @cached_property
    def sent_pair_TK(self) -> torch.Tensor:
        """As `sent_row_TK` where every (token, expert) pair comes back as a row of its own."""
        flat = self.rank_TK.flatten()
        order = flat.masked_fill(flat < 0, self.num_ranks).argsort(stable=True)[: sum(self.pairs_per_rank)]
        rows = torch.full((flat.numel(),), -1, dtype=torch.int64, device="cpu")
        return rows.index_copy_(0, order, torch.arange(order.numel(), device="cpu")).view_as(self.rank_TK)

    @property
    def dst_buffer_slot_idx(self) -> torch.Tensor:
        first_P = torch.tensor([0, *self.sent_splits], device="cpu").cumsum(0)
        slot_TK = self.sent_row_TK - first_P[self.rank_TK.clamp(min=0)]
        return slot_TK.masked_fill_(self.rank_TK < 0, -1).to(torch.int32)

    @property
    def recv_src_metadata(self) -> torch.Tensor:
        local_RK, token_R = self._arrived()
        source_R = torch.repeat_interleave(torch.tensor(self.rows_per_source, device="cpu"))
        first_R = (local_RK >= 0).to(torch.uint8).argmax(1) if local_RK.numel() else source_R
        rows_RK = self.expanded_row_RK if self.expanded else torch.full_like(local_RK, -1)
        head = torch.stack([source_R * self.num_max_tokens_per_rank + token_R, source_R * self.num_topk + first_R], 1)
        return torch.cat([head, rows_RK], 1).to(torch.int32)


class HostBackend:
    """`Backend` for one group of CPU processes.

    Args:
        timeout_seconds: after which a wait for a peer gives up.
        allow_multiple_reduction: see `ElasticBuffer`.
        limit_bytes: size that no operation may exceed, None = any. Nothing is allocated ahead.
    """

    name = "host"
    device = torch.device("cpu")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    num_sms = 0
    num_nodes, hybrid = 1, False  # one hop between any two ranks
    needs_limit = False

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout_seconds: float,
        allow_multiple_reduction: bool,
        limit_bytes: int | None = None,
    ):
        self.transport = Transport(group, timeout_seconds)
        self.traffic = Traffic()
        self.point_to_point: HostPointToPoint = HostPointToPoint(self.transport, self.traffic)
        self.sessions: Sessions = HostSessions(self.transport, self.traffic)
        self._allow_multiple_reduction, self._limit_bytes = allow_multiple_reduction, limit_bytes
        self._most_tokens = 0  # of any rank in any dispatch so far; every rank has seen the same

    def describe(self) -> dict[str, Any]:
        return {"transport": "gloo"}

    def machines(self) -> list[int]:
        name = hashlib.sha256(machine_name().encode()).digest()
        return self.all_gather("creation of the buffer", int.from_bytes(name[:8], "big", signed=True))

    def theoretical_sms(
        self,
        num_experts: int,
        num_topk: int,
        *,
        hidden: int,
        num_tokens: int,
        use_fp8: bool,
        nvlink_gbs: float,
        rdma_gbs: float,
        sm_read_gbs: float,
        sm_write_gbs: float,
    ) -> int:
        return 0

    def check_size(
        self, *, num_tokens: int, max_tokens: int, num_topk: int, num_experts: int, hidden: int, row: torch.dtype
    ) -> None:
        if self._limit_bytes is None:
            return
        fp8 = row == torch.float8_e4m3fn
        needed = buffer_bytes(
            self.transport.size, max_tokens or num_tokens, hidden, num_topk, fp8, 2 if fp8 else row.itemsize
        )
        if needed > self._limit_bytes:
            raise BufferSizeError(f"the buffer has {self._limit_bytes} bytes, this dispatch needs {needed}")

    def capture(self) -> Event:
        return HostEvent()

    def comm_stream(self) -> None:
        return None

    def combine_buffer(self, route: HostRoute, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(
            sum(align(n, route.expert_alignment) for n in route.rows_per_expert), hidden, dtype=dtype, device="cpu"
        )

    @cached_property
    def engram(self) -> HostEngram:
        return HostEngram(self.transport, self.traffic)

    def refuse(self, call: str, error: BaseException) -> None:
        self.transport.refuse(call, error)

    def close(self, seconds: float | None = None) -> None:
        try:
            if not self.transport.failed:
                self.point_to_point.flush(seconds)  # gloo would drop what a peer has not asked for yet
        finally:
            if "engram" in self.__dict__:
                self.engram.close()
            self.transport.close()

    def all_gather(self, name: str, value: int) -> list[int]:
        """Every rank's `value` (64 bits, signed), by rank."""
        operation, size = self.transport.begin(name), self.transport.size
        values = torch.full((size, 1), value, dtype=torch.int64, device="cpu")
        own = values.view(torch.uint8).clone()
        wait = operation.receive(_ROWS, {p: values.view(torch.uint8)[p] for p in operation.peers}, "value", ())
        operation.send(_ROWS, {p: own[p] for p in operation.peers}, "value", ())
        wait()
        operation.wait_sent()
        return values.flatten().tolist()

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.all_gather("barrier", 0)

    def dispatch(
        self,
        x_TH: torch.Tensor,
        scales: torch.Tensor | None,
        topk_idx_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor | None,
        *,
        num_experts: int,
        num_max_tokens_per_rank: int,
        alignment: int,
        exact: bool,
        expand: bool,
        zero_padding: bool,
        statistics: torch.Tensor | None,
        route: HostRoute | None,
        use_fp8: bool,
        column_major_scales: bool,
        copy_routing: bool,
        num_sms: int,
        previous: Sequence[Event],
        asynchronous: bool,
    ) -> Received:
        """See `Backend.dispatch`; `num_max_tokens_per_rank` 0 = the ranks agree."""
        for earlier in previous:
            earlier.current_stream_wait()
        if not exact and route is None:
            _refuse_repeated_experts(topk_idx_TK)
        if use_fp8:
            x_TH, scales = per_token_cast_to_fp8(x_TH)
        rank, size = self.transport.rank, self.transport.size
        cached = route is not None
        num_topk = topk_idx_TK.shape[1]
        layout = RowLayout(
            x_TH.shape[1] * x_TH.itemsize,
            0 if scales is None else scales.shape[1] * 4,
            0 if cached else num_topk,
            0 if topk_weights_TK is None else num_topk,
        )
        operation = self.transport.begin("cached dispatch" if cached else "dispatch")
        number = 0 if route is None else route.number
        exchange = _RowExchange(operation, layout, (x_TH.dtype, scales is not None and scales.dtype, number))
        if route is None:
            # Rows travel with the header that says how many they are, into space for as many as have come before.
            exchange.receive_early(self._most_tokens)
            if copy_routing:
                topk_idx_TK = topk_idx_TK.clone()
            route = HostRoute(topk_idx_TK, rank, size, num_experts)
            route.expert_alignment, route.expanded, route.number = alignment, expand, operation.sequence
            wait_header = self._exchange_header(
                operation, route, x_TH, scales, topk_weights_TK, num_max_tokens_per_rank
            )
        else:
            exchange.receive(route.rows_per_source)
        sent = self._pack(layout, route, x_TH, scales, topk_weights_TK, with_idx=not cached)
        exchange.send(sent, route.sent_splits)
        pair_bytes = layout.data_bytes + layout.scale_bytes + (4 if layout.num_topk_weights else 0)
        self._count(route, route.sent_splits, layout.stride, route.pairs_per_rank, pair_bytes)
        if not cached:
            wait_header()
            if statistics is not None:
                statistics += torch.tensor(route.rows_per_expert, dtype=statistics.dtype, device="cpu")
            exchange.receive(route.rows_per_source)

        num_recv, num_expanded = route.num_rows, sum(align(n, alignment) for n in route.rows_per_expert)
        if not exact:
            limit = route.num_max_tokens_per_rank
            num_recv = max_received_rows(size, limit)
            num_expanded = max_expanded_rows(size, limit, route.num_topk, route.num_local_experts, alignment)
        num_out = num_expanded if expand else num_recv
        # Rows that a worst-case size leaves over are zero: harmless to whatever computes on all rows.
        gaps = num_out != (sum(route.rows_per_expert) if expand else route.num_rows)
        make = partial(torch.zeros if gaps and (zero_padding or not exact) else torch.empty, device="cpu")
        out_x = make(num_out, x_TH.shape[1], dtype=x_TH.dtype)
        out_scales = None if scales is None else make(num_out, scales.shape[1], dtype=scales.dtype)
        if out_scales is not None and column_major_scales:
            out_scales = out_scales.new_zeros(out_scales.shape[1], align(num_out, 4)).t()[:num_out]
        out_idx = None if expand else torch.full((num_out, num_topk), -1, dtype=torch.int64, device="cpu")
        out_weights = None
        if topk_weights_TK is not None:
            out_weights = make((num_out,) if expand else (num_out, route.num_topk), dtype=torch.float32)

        def finish() -> None:
            received = exchange.wait()
            if not cached:
                route.complete(*_read_idx(received, layout))
            place = route.expanded_place_N if expand and gaps else None
            source = route.expanded_source_N if expand else None
            _unpack(received[:, : layout.data_bytes], source, place, out_x)
            if out_scales is not None:
                arrived = out_scales.new_zeros(out_scales.shape) if column_major_scales else out_scales
                _unpack(received[:, layout.scale_offset :][:, : layout.scale_bytes], source, place, arrived)
                if arrived is not out_scales:
                    out_scales.copy_(arrived)
            if out_idx is not None:
                out_idx[: route.num_rows] = route.recv_topk_idx
            if out_weights is not None:
                weights_RK = received[:, layout.weights_offset :][:, : 4 * route.num_topk].view(torch.float32)
                if not expand:
                    out_weights[: route.num_rows] = weights_RK
                else:
                    values = weights_RK.reshape(-1).index_select(0, route.expanded_flat_N)
                    if place is None:
                        out_weights.copy_(values)
                    else:
                        out_weights.index_copy_(0, place, values)

        event = HostEvent(finish)
        if not cached:
            route.pending = event
        return Received(out_x, out_scales, out_idx, out_weights, route, num_recv, num_expanded, event)

    def combine(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias_TH: Sequence[torch.Tensor],
        route: HostRoute,
        *,
        expanded: bool,
        num_sms: int,
        previous: Sequence[Event],
        asynchronous: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, HostEvent]:
        """See `Backend.combine`."""
        for earlier in previous:
            earlier.current_stream_wait()
        num_tokens, num_topk = route.topk_idx_TK.shape[0], route.num_topk
        operation = self.transport.begin("combine")
        by_pair = expanded and not self._allow_multiple_reduction
        out_splits = route.pair_splits if by_pair else route.rows_per_source
        in_splits = route.pairs_per_rank if by_pair else route.sent_splits
        num_weights = 0 if topk_weights is None else 1 if by_pair else num_topk
        layout = RowLayout(x.shape[1] * x.itemsize, num_topk_weights=num_weights)
        exchange = _RowExchange(operation, layout, (x.dtype, route.number, by_pair))
        exchange.receive(in_splits)
        rows, weights = self._rows_to_return(x, topk_weights, route, expanded, by_pair)
        if weights is None and layout.stride == layout.data_bytes:
            sent = rows.view(torch.uint8)
        else:
            sent = torch.empty(rows.shape[0], layout.stride, dtype=torch.uint8, device="cpu")
            sent[:, : layout.data_bytes] = rows.view(torch.uint8)
            if weights is not None:
                sent[:, layout.weights_offset :][:, : 4 * num_weights] = weights.view(torch.uint8)
        exchange.send(sent, out_splits)
        self._count(route, out_splits, layout.stride, route.pair_splits, layout.data_bytes)
        combined = torch.empty(num_tokens, x.shape[1], dtype=x.dtype, device="cpu")
        combined_weights = (
            None if topk_weights is None else torch.empty(num_tokens, num_topk, dtype=torch.float32, device="cpu")
        )
        columns = _columns(route.sent_pair_TK) if by_pair else route.return_columns

        def finish() -> None:
            received = exchange.wait()
            returned = received[:, : layout.data_bytes].view(x.dtype)
            initial = None
            if bias_TH:
                initial = bias_TH[0].float() if len(bias_TH) == 1 else bias_TH[0].float() + bias_TH[1].float()
                initial = initial.clone() if initial is bias_TH[0] else initial
            combined.copy_(_ordered_sum(returned, columns, num_tokens, x.dtype, initial))
            if combined_weights is not None:
                values = received[:, layout.weights_offset :][:, : 4 * layout.num_topk_weights].view(torch.float32)
                row_TK = route.sent_pair_TK if by_pair else route.sent_row_TK
                if values.shape[0] == 0:
                    combined_weights.zero_()
                    return
                position = 0 if by_pair else torch.arange(num_topk, device="cpu")
                combined_weights.copy_(values[row_TK.clamp(min=0), position].masked_fill_(row_TK < 0, 0))

        return combined, combined_weights, HostEvent(finish)

    def _exchange_header(
        self,
        operation: Operation,
        route: HostRoute,
        x_TH: torch.Tensor,
        scales: torch.Tensor | None,
        topk_weights_TK: torch.Tensor | None,
        num_max_tokens_per_rank: int,
    ) -> Callable[[], None]:
        """Tell every rank how many rows and pairs come, and what they are; returns the wait that reads the answers."""
        size = self.transport.size
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
        shape = [
            x_TH.shape[1],
            dtypes.index(x_TH.dtype),
            route.num_topk,
            num_max_tokens_per_rank,
            int(topk_weights_TK is not None),
            0 if scales is None else scales.shape[1] * (-1 if scales.dtype == torch.int32 else 1),
        ]
        fields = len(shape)
        answers_PF = torch.empty(size, fields + 2 + route.num_local_experts, dtype=torch.int64, device="cpu")
        kind, peers = (route.num_local_experts,), operation.peers
        wait = operation.receive(_HEADER, {p: answers_PF.view(torch.uint8)[p] for p in peers}, "header", kind)
        header_PF = torch.empty_like(answers_PF)
        header_PF[:, :fields] = torch.tensor(shape, device="cpu")
        header_PF[:, fields] = x_TH.shape[0]
        header_PF[:, fields + 1] = torch.tensor(route.sent_splits, device="cpu")
        header_PF[:, fields + 2 :] = route.expert_counts()
        answers_PF[operation.rank] = header_PF[operation.rank]
        operation.send(_HEADER, {p: header_PF.view(torch.uint8)[p] for p in peers}, "header", kind)
        self.traffic.sent_bytes += (size - 1) * header_PF.shape[1] * 8

        def read() -> None:
            wait()
            answers = answers_PF.tolist()
            for peer, answer in enumerate(answers):
                for name, ours, theirs in zip(_HEADER_FIELDS, shape, answer, strict=False):
                    if ours != theirs:
                        told, seen = (dtypes[ours], dtypes[theirs]) if name == "dtype" else (ours, theirs)
                        raise operation.mismatch(peer, "header", f"{name} {told} as on this rank", f"{name} {seen}")
            most_tokens = max(answer[fields] for answer in answers)
            self._most_tokens = max(self._most_tokens, most_tokens)
            route.num_max_tokens_per_rank = num_max_tokens_per_rank or most_tokens
            route.rows_per_source = [answer[fields + 1] for answer in answers]
            route.rows_per_expert = answers_PF[:, fields + 2 :].sum(0).tolist()

        return read

    def _pack(
        self,
        layout: RowLayout,
        route: HostRoute,
        x_TH: torch.Tensor,
        scales: torch.Tensor | None,
        topk_weights_TK: torch.Tensor | None,
        *,
        with_idx: bool,
    ) -> torch.Tensor:
        """uint8 `[S, stride]`: the rows to send, by destination rank and token."""
        token_S = route.sent_token_S
        packed = torch.empty(token_S.numel(), layout.stride, dtype=torch.uint8, device="cpu")
        _take_rows(x_TH, token_S, out=packed[:, : layout.data_bytes])
        if scales is not None:
            _take_rows(scales, token_S, out=packed[:, layout.scale_offset :][:, : layout.scale_bytes])
        if with_idx:
            idx_SK = packed[:, layout.idx_offset :][:, : 4 * (route.num_topk + 1)].view(torch.int32)
            local_TK = route.topk_idx_TK - route.rank_TK * route.num_local_experts
            idx_SK[:, :-1] = route.local_to(local_TK, -1)
            idx_SK[:, -1] = token_S
        if topk_weights_TK is not None:
            weights_SK = packed[:, layout.weights_offset :][:, : 4 * route.num_topk].view(torch.float32)
            weights_SK.copy_(route.local_to(topk_weights_TK, 0.0))
        return packed

    def _rows_to_return(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        route: HostRoute,
        expanded: bool,
        by_pair: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows that go back to their owners, by source rank and token (and top-k position), and their weights."""
        weights = None
        if not expanded:
            if topk_weights is not None:
                weights = topk_weights[: route.num_rows].masked_fill(route.recv_topk_idx < 0, 0.0)
            return x[: route.num_rows], weights
        row_RK = route.expanded_row_RK
        if by_pair:
            pairs = row_RK[row_RK >= 0]
            if topk_weights is not None:
                weights = topk_weights.index_select(0, pairs).unsqueeze(1)
            return x.index_select(0, pairs), weights
        if topk_weights is not None and row_RK.numel():
            weights = topk_weights[row_RK.clamp(min=0)].masked_fill_(row_RK < 0, 0.0)
        elif topk_weights is not None:
            weights = topk_weights.new_empty(row_RK.shape)
        return _ordered_sum(x, route.local_columns, route.num_rows, x.dtype), weights

    def _count(self, route: HostRoute, rows: list[int], row_bytes: int, pairs: list[int], pair_bytes: int) -> None:
        """Count rows and pairs per destination rank, this rank's own left out."""
        own = route.rank
        self.traffic.sent_bytes += (sum(rows) - rows[own]) * row_bytes
        self.traffic.undeduplicated_bytes += (sum(pairs) - pairs[own]) * pair_bytes


def _read_idx(received: torch.Tensor, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor]:
    section = received[:, layout.idx_offset :][:, : 4 * (layout.num_topk_idx + 1)].view(torch.int32)
    return section[:, :-1].to(torch.int64), section[:, -1].to(torch.int64)


def _unpack(rows: torch.Tensor, source: torch.Tensor | None, place: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write received byte rows into `out`: as they came, or row `source[i]` to row i, or to row `place[i]`."""
    if out.shape[1] == 0:
        return
    words = _words(rows)
    target = out.view(torch.uint8).view(words.dtype)
    if source is None:
        target[: rows.shape[0]] = words
    elif place is None:
        torch.index_select(words, 0, source, out=target)
    else:
        target.index_copy_(0, place, words.index_select(0, source))


def _refuse_repeated_experts(topk_idx: torch.Tensor) -> None:
    """The worst-case size counts an expert once per token."""
    ordered = topk_idx.sort(1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        token, position = repeated.nonzero()[0].tolist()
        raise ValueError(
            f"topk_idx[{token}] names expert {int(ordered[token, position])} more than once: not with do_cpu_sync=False"
        )
