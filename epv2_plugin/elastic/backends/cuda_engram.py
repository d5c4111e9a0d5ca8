"""Engram on GPUs: a table in windows of symmetric memory, or in page-locked host memory, by csrc/kernels/engram.

A fetch is one kernel: it waits until every rank has come to the same fetch, reads each distinct row once, from where it
lies, and writes it to every entry that asked for it. Inside a node, where no row has changed since the last fetch, it
reads first and waits then, so that ranks that disagree, or are gone, are noticed as ever. A write or update waits until
no rank reads the rows any more. A reduce is four: each rank groups its entries by row and sums them into its window,
then each owner does the same with what all ranks have there for it. The host waits in between, as it does not know how
much comes. Between nodes the network gets rows of a fetch, and a fifth kernel of a reduce puts sums.

Operations of all kinds have numbers of their own, apart from those of dispatch and combine; flags and error record are
as csrc/kernels/ep/protocol.cuh says.

Legend: N entries asked for, U distinct rows, H hidden, P ranks.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends import kernel_errors
from epv2_plugin.elastic.backends.base import EngramTable, Traffic
from epv2_plugin.elastic.backends.device import Runtime, Window, node_of, require_one_node
from epv2_plugin.elastic.errors import BufferSizeError, CommunicationError, CommunicationTimeout, UnavailableError
from epv2_plugin.elastic.event import Event
from epv2_plugin.elastic.sizing import EngramControlLayout, EngramStagingLayout, EngramTableLayout, align
from epv2_plugin.jit import kernels
from epv2_plugin.jit.kernels import Kernel

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_STATE_WORDS, _ERROR_WORDS = 32, 32
_MAX_ENTRIES = 1 << 28  # of which each of two hash tables, a power of two above twice as many, has 2^30 slots
_DIGITS = 256  # of a pass of the sort

# Flags of csrc/kernels/engram/engram.cuh, which are what a wait is for; reasons to give up, as in ep/protocol.cuh.
_PHASES = (
    "engram_fetch",
    "engram_fetch",
    "engram_fetch, end of the one before",
    "engram_reduce, counts",
    "engram_reduce, sums",
    "engram_reduce, end of the one before",
    "engram_reduce, places at the owners",
)
_UPDATE_PHASE = 2  # rows that engram_update is given are looked at behind this wait
_BAD_ROW = 16  # error code, see csrc/kernels/engram/engram.cuh
_OPERATIONS = ("engram_fetch", "engram_reduce", "engram_write", "engram_update")

# `CudaBackend._operation`: (events to wait for, asynchronous, inputs).
OperationContext = Callable[[Sequence[Event], bool, Iterable[Any]], AbstractContextManager[Any]]

_struct_of = functools.cache(kernels.args_type)


class CudaEngram:
    """`Engram` in the windows of one group of GPUs.

    Args:
        runtime: the device. traffic: counts rows pulled from other ranks.
        on_host: keep tables in page-locked host memory; inside a node only.
        contexts: of a network of its own between nodes.
        operation: launches what follows in the order of the buffer's operations. check: raises why the buffer failed.
        refused: see the attribute.

    Attributes:
        table: as in `Engram`. refused: collective calls that never got here; all ranks must have refused as many.
    """

    def __init__(
        self,
        runtime: Runtime,
        traffic: Traffic,
        operation: OperationContext,
        check: Callable[[], None],
        refused: int,
        *,
        on_host: bool,
        contexts: int,
        host_timeout_seconds: float,
        gpu_timeout_seconds: float,
    ):
        self.table: EngramTable | None = None
        self.refused = refused
        self._runtime, self._traffic, self._operation, self._check = runtime, traffic, operation, check
        self._host_timeout, self._gpu_timeout = host_timeout_seconds, gpu_timeout_seconds
        self._on_host, self._contexts = on_host, contexts
        self._between_nodes = runtime.lsa_size < runtime.size
        self._kernels = kernels.ENGRAM_BETWEEN_NODES if self._between_nodes else kernels.ENGRAM_IN_NODE
        near = node_of(runtime)
        self._near = slice(near.start, near.stop)  # ranks of this node
        self._num_sms = 0
        self._writes = 0  # engram_write
        self._changes = 0  # and engram_update, which peers learn of by this number alone
        self._control: _Control | None = None
        self._rows: Window | None = None  # of the table
        self._place: EngramTableLayout | None = None  # of what is in it
        # int64 [ranks of the node]: where their parts lie, of each table so far, as graphs go on reading theirs.
        self._parts: list[torch.Tensor] = []
        # Hash tables, int32: of the next fetch, all ones, and of the last one, of which the next one empties what it
        # used.
        self._slots = self._stale = torch.empty(0, dtype=torch.int32, device=runtime.device)
        self._num_stale = 0
        self._settled = (-1, 0)  # changes and refused calls before the last fetch
        self._staging: Window | None = None
        self._failure: BaseException | None = None
        self._tag = 0  # with which a kernel tells the host that its words are there
        self._counted = [0, 0, 0]

    # ---- failures ---------------------------------------------------------------------------------------------------

    @property
    def failure(self) -> BaseException | None:
        """Why this rank gave up, None if it did not."""
        if self._failure is None and self._control is not None and int(self._control.errors[0]):
            self._failure = self._read_error(self._control.errors)
        return self._failure

    def close(self) -> BaseException | None:
        """Forget the memory that is about to go. Returns why this rank gave up, if it did."""
        self._count()
        if self._control is not None:
            self._control.detach()
        return self.failure

    def _read_error(self, words: Any) -> CommunicationError | ValueError:
        code, peer, phase, expected, seen, extra = (int(word) for word in words[1:7])
        rank = self._runtime.rank
        if code == _BAD_ROW:
            assert self.table is not None
            low, high = expected & 0xFFFFFFFF, extra
            call, name, what, ranks = _PHASES[phase], "indices.flatten()", "-1 (zeros) or a row of the table", None
            if phase == _UPDATE_PHASE:
                call, name, what, ranks = "engram_update", "rows", "a row of this rank", 1
            return ValueError(
                f"rank {rank}, {call}: {name}[{seen}] = {high << 32 | low}: must be {what}, "
                f"0..{(ranks or self._runtime.size) * self.table.rows - 1}"
            )
        name = _PHASES[phase]
        if error := kernel_errors.of_wait(code, rank, peer, name, expected, seen, self._gpu_timeout, extra):
            return error
        assert code == kernel_errors.OTHER_ARGUMENTS
        ours, theirs = (_describe(*words[7 + 10 * side : 9 + 10 * side].tolist()) for side in range(2))
        # The peer may have gone on to another operation since.
        return CommunicationError(rank, peer, name, f"{ours} as on this rank", theirs if theirs != ours else "another")

    # ---- the table --------------------------------------------------------------------------------------------------

    def write(self, table: EngramTable, storage: torch.Tensor, scales: torch.Tensor | None, num_sms: int) -> None:
        """See `Engram.write`."""
        self._check()
        if self._runtime.is_capturing():
            raise RuntimeError("engram_write while a CUDA graph is being captured: the ranks agree on the table first")
        self._agree(table)
        self._num_sms = min(num_sms or sizing.ENGRAM_SMS, self._runtime.num_sms)
        if self.table != table:
            if self.table is not None:  # peers may still be reading it
                self._change("engram_write", None, storage[:0], None, tell_host=True)
                self._await("engram_write, end of the last fetch")
                self._count()
                self.table = self._rows = None
            self._place = EngramTableLayout(table.rows, table.layout.stride, self._between_nodes)
            make = self._runtime.host_window if self._on_host else self._runtime.window
            self._rows = rows = make(align(self._place.end, sizing.BUFFER_ALIGNMENT))
            node = range(self._near.start, self._near.stop)
            self._parts.append(torch.tensor([rows.peer_pointer(p, 0) for p in node], device=self._runtime.device))
            self.table = table
        self._change("engram_write", None, storage, scales)

    def update(self, rows_U: torch.Tensor, storage_UH: torch.Tensor, scales: torch.Tensor | None) -> None:
        """See `Engram.update`. Peers are sent nothing: whoever left it out is noticed in the next fetch or reduce."""
        self._change("engram_update", rows_U.contiguous(), storage_UH, scales)

    def storage(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Engram.storage`."""
        table, window, _ = self._open()
        stride = table.layout.stride
        return table.views(window.tensor[: table.rows * stride].view(table.rows, stride))

    def _agree(self, table: EngramTable) -> None:
        """Make sure that all ranks write the same kind of table; the first time, make what operations need."""
        self._writes += 1
        runtime, phase = self._runtime, f"engram_write #{self._writes}"
        facts = table.facts | {
            "memory": "of the CPU" if self._on_host else "of the GPU",
            "number of refused calls": self.refused,
            "number of changes": self._changes,
        }

        def step() -> str:
            if self._on_host:
                require_one_node(runtime, "Engram's tables in CPU memory (num_cpu_bytes)")
            for kernel in [*self._kernels.all(), *[kernels.ENGRAM_PUT] * self._between_nodes]:
                runtime.prepare(kernel)
            return "; ".join(f"{name} {value}" for name, value in facts.items())

        try:
            texts = runtime.meeting.agree(phase, step, phase)
            for peer, text in enumerate(texts):
                for ours, theirs in zip(texts[runtime.rank].split("; "), text.split("; "), strict=True):
                    if ours != theirs:
                        raise CommunicationError(runtime.rank, peer, phase, f"{ours} as on this rank", theirs)
            if self._control is None:
                self._control = _Control(runtime, self._contexts if self._between_nodes else 0)
        except UnavailableError:
            raise  # on every rank alike
        except BaseException as error:
            self._failure = error  # the others go on without this rank, or not at all
            raise

    def _change(
        self,
        call: str,
        rows_U: torch.Tensor | None,
        storage: torch.Tensor,
        scales: torch.Tensor | None,
        tell_host: bool = False,
    ) -> None:
        """Replace rows of this rank, all of them without `rows_U`, on the current stream."""
        table, window, control = self._open()
        layout = table.layout
        with self._operation((), False, ()) as place:
            self._changes += 1
            self._launch(
                self._kernels.write,
                "write",
                call,
                table=window.tensor.data_ptr(),
                rows=0 if rows_U is None else rows_U.data_ptr(),
                data=storage.data_ptr(),
                scales=0 if scales is None else scales.data_ptr(),
                host=control.host.pointer if tell_host else 0,
                num_rows=storage.shape[0],
                table_rows=table.rows,
                host_tag=self._next_tag() if tell_host else 0,
                data_bytes=layout.data_bytes,
                scale_bytes=layout.scale_bytes,
                scale_offset=layout.scale_offset,
                row_stride=layout.stride,
            )
            place.end(())

    # ---- fetch ------------------------------------------------------------------------------------------------------

    def fetch(self, indices_N: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """See `Engram.fetch`. Can be captured into a CUDA graph, hook included."""
        table, window, control = self._open()
        layout, num_entries = table.layout, _num_entries(indices_N)
        self._count()
        device = self._runtime.device
        assert self._place is not None
        num_slots = 1 << (2 * num_entries).bit_length()  # at most half of them get used
        with self._operation((), True, (indices_N,)) as place:
            data = torch.empty(num_entries, table.hidden, dtype=table.dtype, device=device)
            scales = None
            if table.scale_dtype is not None:
                scales = torch.empty(num_entries, table.scale_columns, dtype=table.scale_dtype, device=device)
            leaders = torch.empty(num_entries, dtype=torch.int32, device=device)
            # A graph has a hash table of its own, which it fills itself, and may be replayed after other changes.
            now, capturing = (self._changes, self.refused), self._runtime.is_capturing()
            # Between nodes a get from a rank that is gone has no end.
            settled = self._settled == now and not capturing and not self._between_nodes
            slots, stale, num_stale = self._slots, self._stale, self._num_stale
            if capturing:
                slots, num_stale = torch.full((num_slots,), -1, dtype=torch.int32, device=device), 0
            elif slots.numel() < num_slots:
                slots, stale = torch.full((2, num_slots), -1, dtype=torch.int32, device=device)
                num_stale = 0
            self._launch(
                self._kernels.fetch,
                "fetch",
                "engram_fetch",
                parts=self._parts[-1].data_ptr(),
                table=window.handle,
                indices=indices_N.data_ptr(),
                out=data.data_ptr(),
                out_scales=0 if scales is None else scales.data_ptr(),
                slots=slots.data_ptr(),
                stale_slots=stale.data_ptr(),
                leaders=leaders.data_ptr(),
                counters=control.counters.data_ptr(),
                host_counters=control.host_counters.pointer,
                table_rows=table.rows,
                num_entries=num_entries,
                num_slots=num_slots,
                num_stale=num_stale,
                landing_offset=self._place.landing,
                tile=self._place.tile(self._num_sms),
                settled=int(settled),
                data_bytes=layout.data_bytes,
                scale_bytes=layout.scale_bytes,
                scale_offset=layout.scale_offset,
                row_stride=layout.stride,
            )
            if not capturing:
                self._settled = now
                self._slots, self._stale, self._num_stale = stale, slots, num_slots
            event = place.end((data, scales))

        def hook() -> tuple[torch.Tensor, torch.Tensor | None]:
            event.current_stream_wait()
            self._count()
            return data, scales

        return hook

    def _count(self) -> None:
        """Add the rows that were pulled since the last time: the device counts them, and tells when a fetch ends."""
        if self._control is None:
            return
        stride = 0 if self.table is None else self.table.layout.stride
        rows, entries, far_rows = (int(count) for count in self._control.counted)
        self._traffic.sent_bytes += stride * (rows - self._counted[0])
        self._traffic.undeduplicated_bytes += stride * (entries - self._counted[1])
        self._traffic.network_bytes += stride * (far_rows - self._counted[2])
        self._traffic.direct_network_bytes += stride * (far_rows - self._counted[2])
        self._counted = [rows, entries, far_rows]

    # ---- reduce -----------------------------------------------------------------------------------------------------

    def reduce(
        self, indices_N: torch.Tensor, gradients_NH: torch.Tensor
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """See `Engram.reduce`. On the current stream; the host waits for all ranks to come here."""
        table, _, _ = self._open()
        runtime, num_entries = self._runtime, _num_entries(indices_N)
        if runtime.is_capturing():
            raise RuntimeError("engram_reduce while a CUDA graph is being captured: the host waits for sizes")
        with self._operation((), False, ()) as place:
            mine = _Groups(num_entries, self._num_sms, runtime.device)
            with self._begun():
                self._group(mine, runtime.size * table.rows, indices=indices_N.data_ptr())
                words = self._await("engram_reduce, counts")
                told = words[: 3 * runtime.size].reshape(runtime.size, 3)
                rows_from, staged, entries_from = (column.tolist() for column in told.T)
                layout = EngramStagingLayout(max(staged), int(words[3 * runtime.size]), table.hidden)
                own = self._make_room(layout.end).tensor.data_ptr()
                width = 4 if table.hidden % 4 == 0 and gradients_NH.data_ptr() % (4 * gradients_NH.itemsize) == 0 else 1
                self._sum(
                    mine,
                    gradients_NH.dtype,
                    num_rows=staged[runtime.rank],
                    values=gradients_NH.data_ptr(),
                    out=own + layout.sums,
                    out_rows=own + layout.rows,
                    width=width,
                )
                if self._between_nodes:
                    self._put(layout, staged[runtime.rank])
                theirs = _Groups(sum(rows_from), self._num_sms, runtime.device)
                self._group(
                    theirs, table.rows, from_peers=1, rows_offset=layout.rows, arrived_rows_offset=layout.arrived_rows
                )
                num_rows = int(self._await("engram_reduce, sums")[0])
                rows = torch.empty(num_rows, dtype=torch.int64, device=runtime.device)
                sums = torch.empty(num_rows, table.hidden, dtype=torch.float32, device=runtime.device)
                self._sum(
                    theirs,
                    torch.float32,
                    num_rows=num_rows,
                    from_peers=1,
                    sums_offset=layout.sums,
                    arrived_sums_offset=layout.arrived_sums,
                    out=sums.data_ptr(),
                    out_rows=rows.data_ptr(),
                    width=4 if table.hidden % 4 == 0 else 1,
                )
            event = place.end(())
        row_bytes = 8 + 4 * table.hidden
        far_bytes = row_bytes * (sum(rows_from) - sum(rows_from[self._near]))
        self._traffic.network_bytes += far_bytes
        self._traffic.direct_network_bytes += far_bytes
        self._traffic.sent_bytes += row_bytes * (sum(rows_from) - rows_from[runtime.rank])
        self._traffic.undeduplicated_bytes += row_bytes * (sum(entries_from) - entries_from[runtime.rank])

        def hook() -> tuple[torch.Tensor, torch.Tensor]:
            event.current_stream_wait()
            return rows, sums

        return hook

    def _group(self, groups: _Groups, num_keys: int, **fields: int) -> None:
        """Sort entries by keys below `num_keys`, or just that: none."""
        table, _, control = self._open()
        groups.num_passes = -(-num_keys.bit_length() // 8)
        self._launch(
            self._kernels.group,
            "group",
            "engram_reduce",
            staging=0 if self._staging is None else self._staging.handle,
            keys=groups.keys.data_ptr(),
            items=groups.items.data_ptr(),
            counts=groups.counts.data_ptr(),
            begins=groups.begins.data_ptr(),
            distinct=groups.distinct.data_ptr(),
            host=control.host.pointer,
            host_tag=self._next_tag(),
            told_offset=control.layout.told,
            room_offset=control.layout.room,
            table_rows=table.rows,
            num_entries=groups.num_entries,
            num_passes=groups.num_passes,
            **fields,
        )

    def _sum(self, groups: _Groups, dtype: torch.dtype, **fields: int) -> None:
        table, _, control = self._open()
        assert self._staging is not None
        self._launch(
            self._kernels.sum[_DTYPES[dtype]],
            "sum",
            "engram_reduce",
            staging=self._staging.handle,
            items=groups.items.data_ptr() + 4 * groups.num_entries * (groups.num_passes % 2),
            begins=groups.begins.data_ptr(),
            distinct=groups.distinct.data_ptr(),
            told_offset=control.layout.told,
            hidden=table.hidden,
            **fields,
        )

    def _put(self, layout: EngramStagingLayout, num_rows: int) -> None:
        """Between nodes: send the sums of this rank's entries to owners in other nodes."""
        table, _, control = self._open()
        assert self._staging is not None
        self._launch(
            kernels.ENGRAM_PUT,
            "put",
            "engram_reduce",
            staging=self._staging.handle,
            room_offset=control.layout.room,
            rows_offset=layout.rows,
            sums_offset=layout.sums,
            arrived_rows_offset=layout.arrived_rows,
            arrived_sums_offset=layout.arrived_sums,
            table_rows=table.rows,
            num_rows=num_rows,
            hidden=table.hidden,
        )

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """Others were told of an operation, so what keeps this rank from its end is the end of the buffer."""
        try:
            yield
        except BaseException as error:
            self._failure = self.failure or error
            raise

    def _make_room(self, num_bytes: int) -> Window:
        """The window for rows and sums, made larger if need be: all ranks know the same sizes, so all do the same."""
        if self._staging is None or self._staging.num_bytes < num_bytes:
            self._staging = None  # every rank has come to this reduce, so none reads what was there for the last
            self._staging = self._runtime.window(align(max(2 * num_bytes, 1), sizing.BUFFER_ALIGNMENT))
        return self._staging

    # ---- launches ---------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[EngramTable, Window, _Control]:
        assert self.table is not None  # checked by the caller
        assert self._rows is not None
        assert self._control is not None
        return self.table, self._rows, self._control

    def _next_tag(self) -> int:
        self._tag = self._tag % 0x7FFFFFFF + 1
        return self._tag

    def _launch(self, kernel: Kernel, name: str, call: str, **fields: int) -> None:
        runtime, (_, _, control) = self._runtime, self._open()
        shared = (_OPERATIONS.index(call) + len(_OPERATIONS) * self.refused, self._changes)
        common = kernels.args_of(kernel)["Common"].pack(
            window=control.window.handle,
            state=control.state.data_ptr(),
            error=control.error.pointer,
            timeout_ns=int(self._gpu_timeout * 1e9),
            signature=zlib.crc32(repr(shared).encode()),
            operation=shared[0],
            route=shared[1],
            rank=runtime.rank,
            num_ranks=runtime.size,
            lsa_begin=self._near.start,
            lsa_size=runtime.lsa_size,
            network=control.network,
            contexts=self._contexts,
        )
        shape = sizing.engram_shape(name, runtime.size, self._between_nodes)
        arguments = _struct_of(kernel).pack(common=common, **fields)
        runtime.launch(kernel, arguments, ctas=self._num_sms, threads=shape.threads, shared_bytes=shape.shared_bytes)

    def _await(self, phase: str) -> Any:
        """Wait for what a kernel tells the host; returns its words."""
        words = self._open()[2].told
        deadline = time.monotonic() + self._host_timeout
        while int(words[0]) != self._tag:
            self._check()
            if time.monotonic() > deadline:
                # The kernel may still be waiting: no later operation may take its number.
                self._failure = CommunicationTimeout(
                    self._runtime.rank, -1, phase, f"an answer within {self._host_timeout:g} s", "none"
                )
                raise self._failure
            time.sleep(0)  # other threads of this process need the interpreter
        return words[1:].copy()


class _Control:
    """What operations need beside the table, for as long as the buffer lives. Collective.

    Attributes:
        window, layout: flags and what ranks told this one. network: between nodes, to all ranks. state: words of the
            kernels. counters: rows pulled, entries served and rows of other nodes so far. error, host, host_counters:
            what they tell the host, which reads it as `errors`, `told` (a tag first) and `counted`.
    """

    def __init__(self, runtime: Runtime, contexts: int):
        self.layout = EngramControlLayout(runtime.size)
        self.network = runtime.network(sizing.SIGNAL_KINDS * runtime.size, contexts, False) if contexts else 0
        self.state = torch.zeros(_STATE_WORDS, dtype=torch.int32, device=runtime.device)
        self.counters = torch.zeros(3, dtype=torch.int64, device=runtime.device)
        self.error, self.host = runtime.mapped(4 * _ERROR_WORDS), runtime.mapped(4 * (2 + 3 * runtime.size))
        self.host_counters = runtime.mapped(24)
        self.errors: Any = self.error.tensor.view(torch.int32).numpy()
        self.told: Any = self.host.tensor.view(torch.int32).numpy()
        self.counted: Any = self.host_counters.tensor.view(torch.int64).numpy()
        self.window = runtime.window(align(self.layout.end, sizing.BUFFER_ALIGNMENT))

    def detach(self) -> None:
        """Keep the words: events may outlive the mapped memory."""
        self.errors, self.told, self.counted = self.errors.copy(), self.told.copy(), self.counted.copy()


class _Groups:
    """Memory for entries sorted by row, and for the rows."""

    def __init__(self, num_entries: int, num_sms: int, device: torch.device):
        self.num_entries, self.num_passes = num_entries, 0
        self.keys = torch.empty(2, num_entries, dtype=torch.int64, device=device)
        self.items = torch.empty(2, num_entries, dtype=torch.int32, device=device)
        self.counts = torch.empty(_DIGITS + 1, num_sms, dtype=torch.int32, device=device)
        self.begins = torch.empty(num_entries + 1, dtype=torch.int32, device=device)
        self.distinct = torch.empty(num_entries, dtype=torch.int64, device=device)


def _num_entries(indices_N: torch.Tensor) -> int:
    if indices_N.numel() > _MAX_ENTRIES:
        raise BufferSizeError(f"indices has {indices_N.numel()} entries: the cuda backend takes at most {_MAX_ENTRIES}")
    return indices_N.numel()


def _describe(operation: int, changes: int) -> str:
    """How users know what all ranks must come with."""
    refused, call = divmod(operation, len(_OPERATIONS))
    return f"{_OPERATIONS[call]} after {changes} writes and updates" + (f", {refused} refused" if refused else "")
