"""What `ElasticBuffer` asks of a backend, and what passes between them. It checks arguments before it calls.

On a GPU an event or a wait orders the current stream; on the host it blocks the caller.

Legend: T tokens, H hidden, K top-k, E_local experts of a rank, R received rows (one per token and rank), N rows in
expert order.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from epv2_plugin.elastic.errors import BufferSizeError
from epv2_plugin.elastic.event import Event
from epv2_plugin.elastic.handle import Route
from epv2_plugin.elastic.sizing import RowLayout

NUM_CHANNELS = 4  # independent orders of tensors between two ranks
NODE = "EPV2_NODE"  # the machine that this rank plays on, where it plays another (`epv2 emulate`)


def machine_name() -> str:
    """What tells this rank's machine from others."""
    return os.environ.get(NODE) or socket.gethostname()


def describe(tensor: torch.Tensor) -> str:
    """Shape and dtype of a tensor as text: "[4, 8] bfloat16"."""
    return describe_kind(tensor.shape, tensor.dtype)


def describe_kind(shape: torch.Size, dtype: torch.dtype) -> str:
    """The same of tensors yet to come."""
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


@dataclass
class Traffic:
    """Bytes that went to other ranks, counted where they leave unless it says otherwise; rows of the cuda backend's
    dispatches where they come.

    Attributes:
        sent_bytes: everything, headers included.
        undeduplicated_bytes: what the same rows would have been with one copy per (token, expert) pair.
        inplace_bytes: tensors of `pp_recv_inplace` that stay where the sender put them (cuda; counted where they come).
        network_bytes: rows of dispatches and of Engram, and tensors of `pp_recv`, that came over the network to this
            rank (cuda).
        direct_network_bytes: what would have come in direct mode, one row for each rank that wants it.
    """

    sent_bytes: int = 0
    undeduplicated_bytes: int = 0
    inplace_bytes: int = 0
    network_bytes: int = 0
    direct_network_bytes: int = 0


@dataclass
class Received:
    """Outputs of a dispatch; they hold no data before `event` was waited for.

    Attributes:
        x: `[R, H]` or `[N, H]`. scales: of FP8 rows. topk_idx: int64 `[R, K]`, compact layout only.
        topk_weights: fp32 `[R, K]` or `[N]`.
        num_recv_rows, num_expanded_rows: rows in either layout, as allocated.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    route: Route
    num_recv_rows: int
    num_expanded_rows: int
    event: Event


class PointToPoint(Protocol):
    """Tensors from one rank to another, in order within each (sender, receiver, channel).

    Where "blocks" is said, a GPU's stream does: the host goes on, and learns of a failure at a later call.
    """

    def configure(self, max_tensor_bytes: int, max_inflight: int, max_inplace: int, max_senders: int) -> None:
        """Collective: what was sent before is taken, then rings of `max_inflight` slots are ready, for `max_senders`
        (rank, channel) pairs at least, and memory for `max_inplace` tensors of `receive_inplace`."""

    def send(self, tensor: torch.Tensor, peer: int, channel: int, copy: bool) -> Event:
        """Start sending; blocks while `max_inflight` tensors for `peer` and `channel` have not been taken.

        `copy` = the caller may overwrite the tensor at once; otherwise its memory is held until the peer has it.
        """

    def receive(self, tensor: torch.Tensor, peer: int, channel: int, wait: bool) -> Event:
        """Start receiving into `tensor`, which holds data after the event. `wait` = that is waited for already."""

    def receive_inplace(
        self, shape: Sequence[int], dtype: torch.dtype, peer: int, channel: int
    ) -> tuple[torch.Tensor, Event]:
        """Likewise into a new tensor, which lies where the sender can write, if such memory is free."""

    def flush(self) -> None:
        """Wait until everything sent has been taken."""


class Sessions(Protocol):
    """All-gathers and reduce-scatters inside sessions, which bound the memory that they take."""

    active: bool

    def configure(self, max_session_bytes: int, max_operations: int, num_sms: int) -> None:
        """Collective: limits of every session from now on; SMs that a reduce-scatter may hold on a GPU, 0 = few."""

    def begin(self) -> None:
        """Start a session."""

    def end(self) -> None:
        """Complete everything that the session started."""

    def abandon(self) -> None:
        """End the session after an error, without waiting for what it started."""

    def own_slots(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        """This rank's part of gathered tensors that are yet to be gathered."""

    def all_gather(
        self, tensors: Sequence[torch.Tensor], keep: bool, out: Sequence[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Start gathering, into `out` if given; returns tensors `[ranks, *shape]` and the wait for their data.

        They hold it to the begin of the next session; `keep` or `out` = as long as they live.
        """

    def reduce_scatter(
        self, tensors: Sequence[torch.Tensor], out: Sequence[torch.Tensor] | None = None, scale: float = 1.0
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Start summing `[ranks, *shape]` over ranks; returns `scale` times this rank's sums, and the wait for them."""


class SessionState:
    """Whether there is a session, what it has started, and what it may still take."""

    def __init__(self) -> None:
        self.active = False
        self._max_bytes = self._max_operations = 0
        self._bytes = self._operations = 0
        self._waits: list[Callable[[], None]] = []  # for what was started; a second one does no harm
        self._slots: dict[int, Any] = {}  # where parts of this rank belong that it writes itself, by their address

    def end(self) -> None:
        """See `Sessions`."""
        self._check_active(True, "destroy_agrs_session")
        waits = self._waits
        self.abandon()
        for wait in waits:
            wait()

    def abandon(self) -> None:
        """See `Sessions`."""
        self.active, self._waits = False, []
        self._slots.clear()

    def _open(self) -> None:
        """Begin a session, empty."""
        self._check_active(False, "create_agrs_session")
        if not self._max_operations:
            raise RuntimeError("create_agrs_session before agrs_set_config")
        self.active, self._bytes, self._operations = True, 0, 0

    def _check_active(self, needed: bool, call: str) -> None:
        if self.active != needed:
            raise RuntimeError(f"{call} {'outside' if needed else 'inside'} an all-gather session")

    def _admit(self, call: str, num_bytes: int) -> tuple[int, int]:
        """Count an operation in; returns its number in the session, and the bytes counted before it."""
        self._check_active(True, call)
        if self._operations >= self._max_operations:
            raise BufferSizeError(
                f"{call}: this session has had its {self._max_operations} operations; "
                "agrs_set_config with a larger max_all_gathers_per_session"
            )
        before = self._take_bytes(call, num_bytes)
        self._operations += 1
        return self._operations - 1, before

    def _take_bytes(self, call: str, num_bytes: int) -> int:
        """Count bytes in; returns those before them."""
        if self._bytes + num_bytes > self._max_bytes:
            raise BufferSizeError(
                f"{call}: the session would hold {self._bytes + num_bytes} bytes, agrs_set_config allowed "
                f"{self._max_bytes}"
            )
        self._bytes += num_bytes
        return self._bytes - num_bytes


@dataclass(frozen=True)
class EngramTable:
    """What a table that is spread over the ranks looks like; the same on every rank.

    Attributes:
        rows: of each rank; row r of the table is row r % rows of rank r // rows.
        hidden: values of a row. dtype: of them.
        scale_columns, scale_dtype: scale factors of an e4m3 row (fp32, or int32 of four UE8M0 exponents); 0 and None.
    """

    rows: int
    hidden: int
    dtype: torch.dtype
    scale_columns: int = 0
    scale_dtype: torch.dtype | None = None

    @cached_property
    def layout(self) -> RowLayout:
        """How a row lies in memory and travels: its scales with it."""
        return RowLayout(self.hidden * self.dtype.itemsize, 4 * self.scale_columns)

    @property
    def facts(self) -> dict[str, Any]:
        """What all ranks must have alike, by name; scales that are packed are counted below zero."""
        packed = -1 if self.scale_dtype == torch.int32 else 1
        return {
            "number of rows": self.rows,
            "hidden size": self.hidden,
            "dtype": self.dtype,
            "scales per row": packed * self.scale_columns,
        }

    def views(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values and scales of rows as they lie in memory, `[X, words]`."""
        layout, num_bytes = self.layout, rows.view(torch.uint8)
        data = num_bytes[:, : layout.data_bytes].view(self.dtype)
        if self.scale_dtype is None:
            return data, None
        return data, num_bytes[:, layout.scale_offset :][:, : layout.scale_bytes].view(self.scale_dtype)


class Engram(Protocol):
    """A table spread over the ranks of a group (legend: N entries asked for, U distinct rows, H hidden).

    Attributes:
        table: what was written, None before that.
    """

    table: EngramTable | None

    def write(self, table: EngramTable, storage: torch.Tensor, scales: torch.Tensor | None, num_sms: int) -> None:
        """See `ElasticBuffer.engram_write`."""

    def update(self, rows_U: torch.Tensor, storage_UH: torch.Tensor, scales: torch.Tensor | None) -> None:
        """See `ElasticBuffer.engram_update`."""

    def storage(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `ElasticBuffer.engram_storage`."""

    def fetch(self, indices_N: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """Rows `[N, H]` of the table and their scales, by int64 row of the whole table, -1 = zeros."""

    def reduce(
        self, indices_N: torch.Tensor, gradients_NH: torch.Tensor
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """See `ElasticBuffer.engram_reduce`."""


class Backend(Protocol):
    """Dispatch and combine for one group of ranks. Arguments come checked from `ElasticBuffer`.

    Attributes:
        name: "host" or "cuda". device: of the tensors it takes. dtypes: of rows, apart from e4m3 with scales.
        num_sms: SMs of the device, 0 on the host. traffic: bytes so far.
        num_nodes: how many sets of ranks reach each other's memory, ranks of each consecutive; 1 on the host.
        hybrid: whether rows go to a node once and are passed on there.
        needs_limit: True where every dispatch must name `num_max_tokens_per_rank`.
    """

    name: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    num_sms: int
    num_nodes: int
    hybrid: bool
    needs_limit: bool
    traffic: Traffic

    @property
    def point_to_point(self) -> PointToPoint:
        """Raises `RuntimeError` where the backend has none."""

    @property
    def sessions(self) -> Sessions:
        """Raises `RuntimeError` where the backend has none."""

    @property
    def engram(self) -> Engram:
        """The table of this group, one for each buffer. Raises `RuntimeError` where the backend has none."""

    def describe(self) -> dict[str, Any]:
        """What carries the data, for `status()`: transport and versions."""

    def machines(self) -> Sequence[object]:
        """What tells each rank's machine from others, by rank. Collective."""

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
        """See `ElasticBuffer.get_theoretical_num_sms`; 0 on the host."""

    def check_size(
        self, *, num_tokens: int, max_tokens: int, num_topk: int, num_experts: int, hidden: int, row: torch.dtype
    ) -> None:
        """Raise `BufferSizeError` with the needed size if such an operation does not fit."""

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
        route: Any,
        use_fp8: bool,
        column_major_scales: bool,
        copy_routing: bool,
        num_sms: int,
        previous: Sequence[Event],
        asynchronous: bool,
    ) -> Received:
        """See `ElasticBuffer.dispatch`. `route` repeats a routing; `copy_routing`: a new one copies `topk_idx`."""

    def combine(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias_TH: Sequence[torch.Tensor],
        route: Any,
        *,
        expanded: bool,
        num_sms: int,
        previous: Sequence[Event],
        asynchronous: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Event]:
        """See `ElasticBuffer.combine`."""

    def combine_buffer(self, route: Any, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """See `ElasticBuffer.get_combine_buffer`."""

    def refuse(self, call: str, error: BaseException) -> None:
        """Count a collective call that `error` ended on this rank.

        Its later calls must not meet calls that its peers made before: where not all ranks refused the same calls, each
        of them raises `CommunicationError`, at the latest in its next operation.
        """

    def barrier(self) -> None:
        """Work submitted later starts once every rank has called this; on the host, return then."""

    def capture(self) -> Event:
        """The end of what the current stream has been given so far."""

    def comm_stream(self) -> Any:
        """The stream that asynchronous operations run on, None on the host."""

    def close(self, seconds: float | None = None) -> None:
        """Release everything, after what the streams of transfers were given; `seconds` = for that, None = the timeout.

        Raises:
            CommunicationError: that did not end; everything is released all the same.
        """
