"""Context parallelism for Megatron's local layer specs: core attention that gathers keys and values chunk by chunk.

A sequence is cut into 2 P chunks, P ranks, and rank r holds chunks r and 2 P - 1 - r ("zigzag"), so that causal
attention costs every rank the same. A rank's queries meet its own keys first, while the first gather is under way;
then, part by part, those of the others. Every such meeting is of whole blocks: rank j's first chunk lies before all of
rank r's queries if j < r and before those of its second chunk otherwise; its second chunk lies before rank r's second
chunk if j > r, and else behind everything that rank r has.

The backward gathers again, part by part, and hands every part's gradients back while it works on the next.

Legend: S sequence rows of this rank, B batch, A query heads, G key/value heads, D query/key features, V value features,
P ranks.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic import ElasticBuffer
from epv2_plugin.elastic.sizing import REDUCE_SCATTER_SMS, session_bytes
from epv2_plugin.megatron.block_attention import Block, Merge, attend, attend_backward, dropout_factors
from epv2_plugin.megatron.local_attention import LocalAttention
from epv2_plugin.patches import Patches

AHEAD = 2  # gathers under way
ROWS_PER_PART = 1024  # on fewer a GPU works for less time than the host needs to start that
# Parts of a chunk. Each costs the host some 0.3 ms each way, and reads and writes the results of all queries that meet
# it. But among many ranks the first gather is long for what it hides behind, and the last sums hide behind nothing.
MAX_PARTS, FEW_RANKS = 2, 4
logger = logging.getLogger("epv2_plugin")

_patches = Patches()
_config = PluginConfig()
_buffers: dict[dist.ProcessGroup, ElasticBuffer] = {}
_session_limits: dict[ElasticBuffer, tuple[int, int]] = {}


def zigzag_split(tensor: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    """Chunks `rank` and `2 * size - 1 - rank` of `2 * size` equal ones along `dim`: what a context-parallel rank holds.

    Raises:
        ValueError: the size of `dim` is not a multiple of `2 * size`.
    """
    if size == 1:
        return tensor
    if tensor.shape[dim] % (2 * size):
        raise ValueError(f"dimension {dim} has {tensor.shape[dim]} entries: must be a multiple of {2 * size}")
    chunks = tensor.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim)


@dataclass(frozen=True)
class Segment:
    """One sequence as the ranks hold it.

    Attributes:
        start: its first row on every rank. rows: its rows on every rank.
        length: its tokens; what is beyond them in `rows * P` is padding.
        offset: position of its first token, for dropout.
    """

    start: int
    rows: int
    length: int
    offset: int

    def positions(self, first: int, last: int, rank: int, size: int) -> torch.Tensor:
        """Positions in the sequence of rows `first` to `last` (exclusive) of `rank`, int64."""
        row = torch.arange(first - self.start, last - self.start)
        if size == 1:
            return row
        half = self.rows // 2
        return torch.where(row < half, rank * half + row, (2 * size - 2 - rank) * half + row)


@dataclass(frozen=True)
class _Meeting:
    """Queries (rows of this rank) that see keys: `rows` of a gathered part, on each of `ranks`."""

    segment: Segment
    queries: slice
    rows: slice
    ranks: range


@dataclass(frozen=True)
class Exchange:
    """Everything about one attention that is not a differentiable tensor.

    Attributes:
        buffer: None for one rank. device: of the tensors.
        mask: bool `[B or 1, A or 1, S or 1, P * S]`, True = hidden.
        dropout: rate. seed: int64 `[1]`. heads: numbers of this rank's heads over all tensor-parallel ranks.
    """

    buffer: ElasticBuffer | None
    device: torch.device
    rows: int
    rank: int
    size: int
    segments: list[Segment]
    causal: bool
    scale: float
    mask: torch.Tensor | None
    dropout: float
    seed: torch.Tensor
    heads: range

    @property
    def whole(self) -> bool:
        """Whether every row of this rank belongs to a segment."""
        return sum(segment.rows for segment in self.segments) == self.rows

    def meetings(self, part: slice) -> Iterator[_Meeting]:
        """What this rank computes with a part of the other ranks' keys."""
        before, behind = range(self.rank), range(self.rank + 1, self.size)
        for segment in self.segments:
            start, middle, end = segment.start, segment.start + segment.rows // 2, segment.start + segment.rows
            everything, second = slice(start, end), slice(middle, end)
            if not self.causal:
                cases = [(start, end, everything, before), (start, end, everything, behind)]
            else:
                cases = [(start, middle, everything, before), (start, middle, second, behind)]
                cases += [(middle, end, second, behind)]
            for first, last, queries, ranks in cases:
                first, last = max(first, part.start), min(last, part.stop)
                if first < last and ranks:
                    yield _Meeting(segment, queries, slice(first - part.start, last - part.start), ranks)

    def unmet(self, meetings: list[_Meeting], part: slice) -> list[tuple[int, int]]:
        """Other ranks (first, behind the last) of whose keys in the part none, or not all, come in the meetings."""
        rows, ranges = part.stop - part.start, [(0, self.rank), (self.rank + 1, self.size)]
        met = [sum(m.rows.stop - m.rows.start for m in meetings if first in m.ranks) for first, _ in ranges]
        return [each for each, count in zip(ranges, met, strict=True) if each[0] < each[1] and count < rows]

    def local_block(self, segment: Segment, batch: int) -> Block:
        """A segment's own queries and keys. Rows are in the order of positions, so causal is causal."""
        rows = (segment.start, segment.start + segment.rows)
        return self._block(segment, slice(*rows), rows, range(self.rank, self.rank + 1), batch, self.causal)

    def block(self, meeting: _Meeting, part: slice, batch: int) -> Block:
        """Queries and keys of a meeting; all of its keys that are not masked are seen."""
        rows = (part.start + meeting.rows.start, part.start + meeting.rows.stop)
        return self._block(meeting.segment, meeting.queries, rows, meeting.ranks, batch, False)

    def _block(
        self, segment: Segment, queries: slice, rows: tuple[int, int], ranks: range, batch: int, causal: bool
    ) -> Block:
        """Queries, and the keys of rows `rows` of `ranks`."""
        if self.causal and self.mask is None and not self.dropout:  # positions, of many small tensors, change nothing
            return Block(self.scale, causal)
        hidden, keep = None, None
        key_positions = torch.cat([segment.positions(*rows, rank, self.size) for rank in ranks])
        if not self.causal and int(key_positions.max()) >= segment.length:
            hidden = (key_positions >= segment.length).view(1, 1, 1, -1).to(self.device)
        if self.mask is not None:
            seen_by = queries if self.mask.shape[2] > 1 else slice(None)
            masked = self.mask[:, :, seen_by].index_select(3, key_positions.to(self.mask.device))
            hidden = masked if hidden is None else masked | hidden.to(masked.device)
        if self.dropout:
            query_positions = segment.positions(queries.start, queries.stop, self.rank, self.size)
            offset = segment.offset
            positions = ((t + offset).to(self.device) for t in (query_positions, key_positions))
            keep = dropout_factors(self.dropout, self.seed, batch, self.heads, *positions)
        return Block(self.scale, causal, hidden, keep)


class ContextParallelAttention(LocalAttention):
    """Core attention of a rank that holds a zigzag part of every sequence; with one rank, of the whole.

    Keys and values are gathered over the context-parallel group, whatever `config.cp_comm_type` says. Dropout follows
    from a seed that each call draws from Megatron's tensor-parallel generator; with equal seeds the same probabilities
    are dropped in any context-parallel layout.

    Raises:
        NotImplementedError: see `LocalAttention`. ConfigError: the configuration names another context-parallel degree.
    """

    takes_context_parallel = True

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(
            *(config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale),
            *(k_channels, v_channels, cp_comm_type, pg_collection),
        )
        has_groups = pg_collection is not None and hasattr(pg_collection, "cp") and hasattr(pg_collection, "tp")
        self.group = pg_collection.cp if has_groups else parallel_state.get_context_parallel_group()
        tensor_group = pg_collection.tp if has_groups else parallel_state.get_tensor_model_parallel_group()
        self.rank, self.size = self.group.rank(), self.group.size()
        self.tensor_rank = tensor_group.rank()
        self.buffer = buffer_for(self.group, config.context_parallel_size) if self.size > 1 else None

    def forward(
        self,
        query_SBAD: torch.Tensor,
        key_SBAD: torch.Tensor,
        value_SBAV: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attention of one layer; every rank of the group calls it.

        Args:
            query_SBAD: `[S, B, A, D]`, or packed `[T, A, D]`, T tokens of this rank.
            key_SBAD: `[S, B, G, D]` or `[T, G, D]`. value_SBAV: `[S, B, G, V]` or `[T, G, V]`.
            attention_mask: bool, broadcastable to `[B, A, S, P * S]`, True = hidden: queries of this rank, keys of the
                whole sequence. Not read for the causal mask type, nor with packed sequences.
            packed_seq_params: Megatron's `PackedSeqParams` in the "thd" format. Every sequence is cut zigzag by itself;
                its padded length must be a multiple of 2 P.

        Returns:
            `[S, B, A * V]` or `[T, A * V]`, dtype of the inputs; zero in rows behind the last packed sequence.

        Raises:
            ValueError: shapes or sequence lengths that can't be. NotImplementedError: an attention bias.
            CommunicationError: a peer died, came with other tensors, or did not answer within the timeout.
        """
        if attention_bias is not None:
            raise NotImplementedError("context-parallel attention takes no attention bias")
        packed = packed_seq_params is not None
        causal = self.is_causal(None if packed else attention_mask, attn_mask_type)
        key_SBAD = self.complete_gradient(key_SBAD)
        query, key, value = (t.unsqueeze(1) if packed else t for t in (query_SBAD, key_SBAD, value_SBAV))
        self._check(query, key, value)
        rows, heads = query.shape[0], query.shape[2]
        dropout = self.dropout if self.training else 0.0
        exchange = Exchange(
            buffer=self.buffer,
            device=query.device,
            rows=rows,
            rank=self.rank,
            size=self.size,
            segments=self._packed_segments(packed_seq_params, rows)
            if packed
            else [Segment(0, rows, rows * self.size, 0)],
            causal=causal,
            scale=query.shape[3] ** -0.5 if self.softmax_scale is None else self.softmax_scale,
            mask=None if causal or packed else attention_mask,
            dropout=dropout,
            seed=_draw_seed(query.device) if dropout else torch.zeros(1, dtype=torch.int64),
            heads=range(self.tensor_rank * heads, (self.tensor_rank + 1) * heads),
        )
        out_SBAV = _Attention.apply(query, key.contiguous(), value.contiguous(), exchange)
        return out_SBAV.flatten(2).squeeze(1) if packed else out_SBAV.flatten(2)

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        same = query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
        if (
            not same
            or key.shape[2] != value.shape[2]
            or query.shape[2] % key.shape[2]
            or query.shape[3] != key.shape[3]
        ):
            raise ValueError(
                f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}: must be [S, B, A, D], "
                "[S, B, G, D] and [S, B, G, V] with G a divisor of A"
            )
        if self.size > 1 and query.shape[0] % 2:
            raise ValueError(f"this rank holds {query.shape[0]} rows: must be two chunks of equal length")

    def _packed_segments(self, params: Any, rows: int) -> list[Segment]:
        if params.qkv_format != "thd":
            raise NotImplementedError(f"packed sequences in the format {params.qkv_format!r}: 'thd' only")
        if getattr(params, "local_cp_size", None) not in (None, self.size):
            raise NotImplementedError(f"local_cp_size = {params.local_cp_size}: must be the group's {self.size}")
        real = _list(params.cu_seqlens_q)
        padded = real if params.cu_seqlens_q_padded is None else _list(params.cu_seqlens_q_padded)
        for name, expected in (("cu_seqlens_kv", real), ("cu_seqlens_kv_padded", padded)):
            given = getattr(params, name)
            if given is not None and _list(given) != expected:
                raise ValueError(f"{name} = {_list(given)}: must be as for the queries, {expected}")
        segments = []
        for number, (first, last) in enumerate(itertools.pairwise(padded)):
            if self.size > 1 and (last - first) % (2 * self.size):
                raise ValueError(
                    f"packed sequence {number} has {last - first} tokens (padding included): must be a multiple of "
                    f"{2 * self.size}, two chunks for each of {self.size} context-parallel ranks"
                )
            if last > first:
                length = real[number + 1] - real[number]
                segments.append(Segment(first // self.size, (last - first) // self.size, length, first))
        if padded[-1] > rows * self.size:
            raise ValueError(f"cu_seqlens end at {padded[-1]}: the ranks hold {rows * self.size} tokens")
        return segments


class _Attention(torch.autograd.Function):
    """Queries `[S, B, A, D]`, keys `[S, B, G, D]` and values `[S, B, G, V]` of this rank -> output `[S, B, A, V]`."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, exchange: Exchange) -> Any:
        query_BASD, own = _heads_first(query), [_heads_first(t) for t in (key, value)]
        batch, merged = query.shape[1], Merge(query, value.shape[3], exchange.whole)
        with _Gathers(exchange, [key, value], back=False) as gathers:
            for segment in exchange.segments:
                rows = slice(segment.start, segment.start + segment.rows)
                block = exchange.local_block(segment, batch)
                result = attend(query_BASD[:, :, rows], own[0][:, :, rows], own[1][:, :, rows], block)
                merged.add(rows, *result, first=True)
            for part, (keys, values) in gathers:
                for meeting in exchange.meetings(part):
                    block, met = exchange.block(meeting, part, batch), query_BASD[:, :, meeting.queries]
                    result = attend(met, _rows_of(keys, meeting), _rows_of(values, meeting), block)
                    merged.add(meeting.queries, *result)
        output = merged.output()
        ctx.save_for_backward(query, key, value, output, merged.lse)
        ctx.exchange = exchange
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        query_BASD, out, grad_BASV = _heads_first(query), _heads_first(output), _heads_first(grad.contiguous())
        own = [_heads_first(t) for t in (key, value)]
        batch = query.shape[1]
        made = torch.empty_like if exchange.whole else torch.zeros_like
        dquery = made(query, dtype=lse.dtype, memory_format=torch.contiguous_format)
        dquery_BASD = _heads_first(dquery)
        dkey, dvalue = (made(t, memory_format=torch.contiguous_format) for t in (key, value))

        def meet(
            queries: slice, keys: torch.Tensor, values: torch.Tensor, block: Block
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            tensors = (grad_BASV[:, :, queries], query_BASD[:, :, queries], keys, values)
            return attend_backward(*tensors, out[:, :, queries], lse[:, :, queries], block)

        with _Gathers(exchange, [key, value], back=True) as gathers:
            for segment in exchange.segments:
                rows = slice(segment.start, segment.start + segment.rows)
                block = exchange.local_block(segment, batch)
                dq, dk, dv = meet(rows, own[0][:, :, rows], own[1][:, :, rows], block)
                dquery_BASD[:, :, rows] = dq
                dkey[rows], dvalue[rows] = dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)
            for part, (keys, values) in gathers:
                dkeys, dvalues = torch.empty_like(keys), torch.empty_like(values)
                meetings = [*exchange.meetings(part)]
                for first, last in exchange.unmet(meetings, part):
                    for target in (dkeys, dvalues):
                        target[first:last].zero_()
                for meeting in meetings:
                    block = exchange.block(meeting, part, batch)
                    dq, dk, dv = meet(meeting.queries, _rows_of(keys, meeting), _rows_of(values, meeting), block)
                    dquery_BASD[:, :, meeting.queries] += dq
                    ranks = slice(meeting.ranks.start, meeting.ranks.stop)
                    for target, found in ((dkeys, dk), (dvalues, dv)):
                        place = target[ranks, meeting.rows]
                        place.copy_(found.permute(2, 0, 1, 3).view(place.shape))
                # What this rank's own queries contribute to its own keys is summed with what the others send.
                dkeys[exchange.rank], dvalues[exchange.rank] = dkey[part], dvalue[part]
                gathers.give_back([dkeys, dvalues], [dkey[part], dvalue[part]])
        return dquery.to(query.dtype), dkey, dvalue, None


class _Gathers:
    """Parts of this rank's tensors `[S, ...]`, gathered from all ranks, `AHEAD` of them under way; in one session, in
    which each part's gradients are handed `back`, too, or not."""

    def __init__(self, exchange: Exchange, tensors: list[torch.Tensor], back: bool):
        self._exchange, self._tensors = exchange, tensors
        self._parts, self._per_part = _parts(exchange.rows, exchange.size, back), 1 + back  # operations
        self._under_way: list[tuple[slice, list[torch.Tensor], Callable[[], None]]] = []
        self._next = 0

    def __enter__(self) -> _Gathers:
        buffer = self._exchange.buffer
        if buffer is None:
            return self
        num_bytes = sum(
            self._per_part * session_bytes(self._exchange.size, (part.stop - part.start, *t.shape[1:]), t.itemsize)
            for part in self._parts
            for t in self._tensors
        )
        allow_session(buffer, num_bytes, self._per_part * len(self._parts))
        self._session = buffer.agrs_new_session()
        self._session.__enter__()
        for _ in range(AHEAD):
            self._start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._exchange.buffer is None:
            return
        self._session.__exit__(*error)

    def __iter__(self) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Rows, and the tensors `[P, rows, ...]` gathered for them."""
        while self._under_way:
            part, gathered, wait = self._under_way.pop(0)
            wait()
            self._start()
            yield part, gathered

    def give_back(self, tensors: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
        """Start summing `tensors` `[P, rows, ...]` over ranks; this rank's sums are in `targets` at the end."""
        assert self._exchange.buffer is not None
        self._exchange.buffer.reduce_scatter(tensors, out=targets)

    def _start(self) -> None:
        if self._next < len(self._parts):
            assert self._exchange.buffer is not None
            part = self._parts[self._next]
            self._next += 1
            *gathered, wait = self._exchange.buffer.all_gather([t[part] for t in self._tensors])
            self._under_way.append((part, gathered, wait))


def _heads_first(tensor_SBAX: torch.Tensor) -> torch.Tensor:
    """`[B, A, S, X]`, in the same memory."""
    return tensor_SBAX.permute(1, 2, 0, 3)


def _rows_of(gathered: torch.Tensor, meeting: _Meeting) -> torch.Tensor:
    """`[P, rows, B, G, X]` -> the keys (or values) of a meeting `[B, G, R, X]`."""
    ranks = slice(meeting.ranks.start, meeting.ranks.stop)
    return _heads_first(gathered[ranks, meeting.rows].flatten(0, 1))


def _parts(rows: int, size: int, back: bool) -> list[slice]:
    """The rows of a rank in parts that are gathered at a time, one ending where a sequence's second chunk begins;
    all at once if few, none for one rank. `back`: their gradients are handed back."""
    if size == 1:
        return []
    half = rows // 2
    most = min(half // ROWS_PER_PART, MAX_PARTS)
    if most == 0:
        return [slice(0, rows)]
    first, second = (most if size > FEW_RANKS else 1), (most if size > FEW_RANKS or back else 1)
    bounds = [half * index // first for index in range(first)]
    bounds += [half + (rows - half) * index // second for index in range(second + 1)]
    return [slice(*each) for each in itertools.pairwise(bounds)]


def _list(cumulative: torch.Tensor) -> list[int]:
    return cumulative.tolist()


def _draw_seed(device: torch.device) -> torch.Tensor:
    with get_cuda_rng_tracker().fork():
        return torch.randint(0, 1 << 31, (1,), dtype=torch.int64, device=device)


def allow_session(buffer: ElasticBuffer, num_bytes: int, operations: int) -> None:
    """Raise the buffer's session limits where they are too low; every rank comes here with the same sizes."""
    limits = _session_limits.get(buffer, (0, 0))
    if num_bytes > limits[0] or operations > limits[1]:
        limits = (max(limits[0], 1 << math.ceil(math.log2(num_bytes))), max(limits[1], operations))
        buffer.agrs_set_config(*limits, num_sms=_config.sm_budget.context)
        _session_limits[buffer] = limits


def session_bytes_of(buffer: ElasticBuffer) -> int:
    """Bytes that the sessions of a buffer may take."""
    return _session_limits.get(buffer, (0, 0))[0]


def causal_attention(
    query_SBAD: torch.Tensor, key_SBGD: torch.Tensor, value_SBGV: torch.Tensor, buffer: ElasticBuffer
) -> torch.Tensor:
    """Causal attention `[S, B, A, V]` of this rank's zigzag part of a sequence, without a model around it."""
    rows, width = query_SBAD.shape[0], query_SBAD.shape[3]
    exchange = Exchange(
        buffer=buffer,
        device=query_SBAD.device,
        rows=rows,
        rank=buffer.rank_idx,
        size=buffer.num_ranks,
        segments=[Segment(0, rows, rows * buffer.num_ranks, 0)],
        causal=True,
        scale=width**-0.5,
        mask=None,
        dropout=0.0,
        seed=torch.zeros(1, dtype=torch.int64),
        heads=range(query_SBAD.shape[2]),
    )
    return _Attention.apply(query_SBAD, key_SBGD, value_SBGV, exchange)


def buffer_for(group: dist.ProcessGroup, degree: int) -> ElasticBuffer:
    """The buffer that all layers of a group share, made by the first of them.

    Raises:
        ConfigError: the configuration names another context-parallel degree than Megatron's, `degree`.
    """
    _config.check_degrees("Megatron", context=degree)
    if group not in _buffers:
        _buffers[group] = ElasticBuffer(
            group,
            num_cpu_timeout_secs=_config.timeouts.host_seconds,
            num_gpu_timeout_secs=_config.timeouts.gpu_seconds,
            backend=_config.backend,
        )
        if dist.get_rank(group) == 0:
            what = _buffers[group].describe()
            logger.info(
                "epv2: context group of %d ranks (first: global rank %d): %s backend over %s, keys and values gathered "
                "by 0 SMs, their gradients summed by %d",
                dist.get_world_size(group),
                dist.get_rank(),
                what["backend"],
                what["transport"],
                _sms(what["backend"]),
            )
    return _buffers[group]


def _sms(backend: str) -> int:
    """SMs that a reduce-scatter holds; nothing else takes one."""
    return 0 if backend == "host" else _config.sm_budget.context or REDUCE_SCATTER_SMS


class CoreAttention(MegatronModule):
    """Stands where Megatron's local specs name their core attention: ours with context parallelism, else `stock`."""

    stock: type

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> Any:
        chosen = ContextParallelAttention if config.context_parallel_size > 1 else cls.stock
        return chosen(config, *args, **kwargs)


def _choosing(core_attention: Callable[[Any], type]) -> Callable[[Any], type]:
    @wraps(core_attention)
    def choose(self: Any) -> type:
        return type("CoreAttention", (CoreAttention,), {"stock": core_attention(self)})

    return choose


def install(config: PluginConfig) -> None:
    """Let Megatron's local specs train with context parallelism, unless `config` says stock."""
    global _config
    _config = config
    if config.context.kv_exchange != "stock":
        _patches.attribute(LocalSpecProvider, "core_attention", _choosing(LocalSpecProvider.core_attention))


def uninstall() -> None:
    """Restore Megatron and release the buffers."""
    global _config
    _patches.undo()
    for buffer in _buffers.values():
        buffer.destroy()
    _buffers.clear()
    _session_limits.clear()
    _config = PluginConfig()


def replaced() -> tuple[str, ...]:
    """Dotted names of Megatron's symbols that are replaced."""
    return _patches.names


def groups() -> list[dict[str, Any]]:
    """What runs on each context-parallel group of this rank."""
    found = []
    for group, buffer in _buffers.items():
        what = {name: buffer.describe()[name] for name in ("backend", "transport")}
        entry = {"primitive": "context", "ranks": dist.get_process_group_ranks(group), **what}
        found.append({**entry, "sms": _sms(what["backend"]), "sent_bytes": buffer.traffic.sent_bytes})
    return found
