"""The cuda backend: dispatch and combine between GPUs that reach each other's memory, by csrc/kernels/ep.

A dispatch is three kernels: stage (tokens, routing and counts into this rank's window), route (which rows come here),
pull (read them from the peers' windows into their final places). A combine is two: stage (sums of expert rows into the
window), pull (owners read and add). Between nodes each has one more, which sends. Ranks wait for each other inside the
kernels; see csrc/kernels/ep/protocol.cuh.

Legend: T tokens of this rank, M most tokens of any rank, H hidden, K top-k, E_local experts of a rank, P ranks,
R received rows (one per token and rank), N rows in expert order.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from epv2_plugin.elastic import model, network, sizing
from epv2_plugin.elastic.backends import kernel_errors
from epv2_plugin.elastic.backends.base import Received, Traffic
from epv2_plugin.elastic.backends.cuda_engram import CudaEngram
from epv2_plugin.elastic.backends.cuda_p2p import CudaPointToPoint
from epv2_plugin.elastic.backends.cuda_sessions import CudaSessions
from epv2_plugin.elastic.backends.device import Runtime, node_of
from epv2_plugin.elastic.backends.inplace import record_use
from epv2_plugin.elastic.backends.sender import Sender
from epv2_plugin.elastic.backends.watch import Watch
from epv2_plugin.elastic.errors import BufferSizeError, CommunicationError, CommunicationTimeout
from epv2_plugin.elastic.event import Event
from epv2_plugin.elastic.sizing import CombineLayout, DispatchLayout, LaunchShape, align
from epv2_plugin.jit import kernels
from epv2_plugin.jit.args import Arguments
from epv2_plugin.jit.kernels import Kernel

MAX_TOPK = 32  # one lane of a warp for each
MAX_EXPERTS = 1 << 15  # an expert is an int16 on its way
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_STATE_WORDS, _ERROR_WORDS = 32, 32
_CONTEXTS = 4  # of the network, each with a queue pair to every peer, unless the caller says; a CTA uses one

# What csrc/kernels/ep/protocol.cuh numbers: flags, which are what a wait is for, and reasons to give up.
_PHASES = (
    "dispatch, counts",
    "dispatch, rows",
    "dispatch, end of the one before",
    "combine, rows",
    "combine, end of the one before",
    "barrier",
    "barrier",
    "dispatch, places at the receiver",
)
_BAD_EXPERT, _TOO_MANY_ROWS, _NO_ROOM = range(4, 7)
# What all ranks must agree on: fields of `Common`, in the order of the words there, and how users know them.
_ARGUMENTS = {
    "operation": "operation",
    "route": "routing (number of its dispatch)",
    "hidden": "hidden size",
    "dtype": "dtype",
    "scales": "scale factors per token",
    "num_experts": "num_experts",
    "has_weights": "topk_weights",
    "by_row": "rows that travel unsummed",
    "max_tokens": "num_max_tokens_per_rank",
    "num_topk": "top-k",
}
_NOTHING_SHARED = dict.fromkeys(_ARGUMENTS, 0)
_OPERATIONS = ("dispatch", "cached dispatch", "combine", "barrier")
_NAMED_DTYPES = (*_DTYPES, torch.float8_e4m3fn)
logger = logging.getLogger("epv2_plugin")


# Looked up at every launch.
_struct_of = functools.cache(kernels.args_type)


@functools.cache
def _common_struct() -> type[Arguments]:
    return kernels.args_of(kernels.IN_NODE.barrier)["Common"]


class CudaEvent:
    """The end of an operation of the cuda backend. Waiting makes the current stream wait, not the host."""

    def __init__(self, backend: CudaBackend):
        self._backend = backend
        self._event = backend.runtime.record()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the operation.

        Raises:
            CommunicationError: this rank gave up on a peer; known only once the operation ran.
        """
        self._backend.check()
        self._backend.runtime.wait(self._event)


class CudaRoute:
    """One routing: what the kernels counted and where each received row comes from and goes to.

    Attributes:
        topk_idx_TK: int64 `[T, K]`. metadata: int32 `[rows, 2 + K]`, see `EPHandle.recv_src_metadata`; rows as
        allocated. num_expanded_rows: likewise, in expert order. number: of the dispatch, the same on all ranks.
    """

    def __init__(
        self,
        topk_idx_TK: torch.Tensor,
        counts: torch.Tensor,
        *,
        num_ranks: int,
        num_experts: int,
        max_tokens: int,
        alignment: int,
        expanded: bool,
        number: int,
    ):
        self.topk_idx_TK, self.counts = topk_idx_TK, counts
        self.num_ranks, self.num_experts, self.num_local_experts = num_ranks, num_experts, num_experts // num_ranks
        self.num_max_tokens_per_rank, self.expert_alignment, self.expanded = max_tokens, alignment, expanded
        self.number = number
        self.host_counts: Any = None  # numpy int32 [P, E_local + 1]: rows from each rank, if the host knows
        self.metadata = counts.new_empty(0, 2 + topk_idx_TK.shape[1])
        self.num_expanded_rows = 0
        self.recv_topk_idx: torch.Tensor | None = None  # int64 [rows, K], compact layout only
        # Between nodes only, int32: which arrival each row is; what arrived here, [A, 1 + K]; where this rank's rows
        # went, [T, J].
        self.origin: torch.Tensor | None = None
        self.relayed: torch.Tensor | None = None
        self.sent_slots: torch.Tensor | None = None
        self.num_arrivals = 0  # as allocated
        self.in_window = False  # whether expert output was asked to be written into the window

    @property
    def num_topk(self) -> int:
        return self.topk_idx_TK.shape[1]

    @property
    def _from(self) -> torch.Tensor:
        """int32 `[P, E_local + 1]`: rows from each rank for each expert, and (last) in the compact layout."""
        columns = self.num_local_experts + 1
        return self.counts[self.num_ranks * columns : 2 * self.num_ranks * columns].view(self.num_ranks, columns)

    @property
    def received_per_source(self) -> torch.Tensor:
        return self._from[:, -1].contiguous()

    @cached_property
    def received_per_expert(self) -> torch.Tensor:
        return self._from[:, :-1].sum(0, dtype=torch.int32)

    @cached_property
    def rows_per_expert(self) -> list[int]:
        if self.host_counts is None:
            return self.received_per_expert.tolist()
        return self.host_counts[:, :-1].sum(0).tolist()

    @cached_property
    def recv_src_metadata(self) -> torch.Tensor:
        if self.host_counts is not None:
            return self.metadata
        return self.metadata[: int(self._from[:, -1].sum())]

    @cached_property
    def dst_buffer_slot_idx(self) -> torch.Tensor:
        rank_TK = self.topk_idx_TK.div(self.num_local_experts, rounding_mode="floor")  # -1 stays -1
        goes_TP = rank_TK.new_zeros(rank_TK.shape[0], self.num_ranks + 1, dtype=torch.bool)
        goes_TP.scatter_(1, rank_TK.masked_fill(rank_TK < 0, self.num_ranks), True)
        slot_TK = (goes_TP.cumsum(0) - 1).gather(1, rank_TK.clamp(min=0))
        return slot_TK.masked_fill_(rank_TK < 0, -1).to(torch.int32)


class CudaBackend:
    """`Backend` on one window of symmetric memory per rank. Collective.

    Args:
        runtime: the device. num_bytes: of the window, which always has room for flags; None = what the sizes below
            need, or nothing to dispatch with where none of them is given.
        max_tokens, hidden, num_topk, use_fp8_dispatch, allow_multiple_reduction: see `ElasticBuffer`.
        hybrid: between nodes a row goes to each node once, and is passed on there; in one node it has no effect.
        num_qps: queue pairs to each peer in another node; 0 = 4.
        tables_on_host: keep tables of Engram in page-locked host memory.
        host_timeout_seconds, gpu_timeout_seconds: after which a wait on the host, in a kernel gives up.

    Raises:
        ValueError: only one of the sizes is given.
    """

    name = "cuda"
    dtypes: tuple[torch.dtype, ...] = tuple(_DTYPES)
    needs_limit = True

    def __init__(
        self,
        runtime: Runtime,
        *,
        num_bytes: int | None,
        max_tokens: int,
        hidden: int,
        num_topk: int,
        use_fp8_dispatch: bool,
        allow_multiple_reduction: bool,
        hybrid: bool,
        num_qps: int,
        tables_on_host: bool,
        host_timeout_seconds: float,
        gpu_timeout_seconds: float,
    ):
        self.runtime, self.device, self.num_sms = runtime, runtime.device, runtime.num_sms
        self.traffic = Traffic()
        self._allow_multiple_reduction = allow_multiple_reduction
        self._host_timeout, self._gpu_timeout = host_timeout_seconds, gpu_timeout_seconds
        self._given_bytes, self._tables_on_host = num_bytes, tables_on_host
        between = runtime.lsa_size < runtime.size
        self._nodes = nodes = sizing.Nodes(runtime.size, runtime.lsa_size, hybrid and between)
        near = node_of(runtime)
        self._near = slice(near.start, near.stop)  # ranks of this node
        self.num_nodes, self.hybrid = runtime.size // runtime.lsa_size, nodes.hybrid
        self._kernels = kernels.BETWEEN_NODES if between else kernels.IN_NODE
        self._contexts = num_qps or _CONTEXTS
        self._network = (
            runtime.network(sizing.SIGNAL_KINDS * runtime.size, self._contexts, nodes.hybrid) if between else 0
        )
        self._shares = sizing.window_split(nodes, num_topk or sizing.MAX_TOPK)
        control = sizing.control_bytes(runtime.size)
        if num_bytes is not None:
            self.num_bytes = align(max(num_bytes, control), sizing.BUFFER_ALIGNMENT)
            split = control + (self.num_bytes - control) * self._shares[0] // sum(self._shares)
            self._combine_start = split // sizing.SECTION_ALIGNMENT * sizing.SECTION_ALIGNMENT
        elif max_tokens and hidden:
            window = sizing.WindowLayout(nodes, max_tokens, hidden, num_topk, use_fp8_dispatch)
            self.num_bytes, self._combine_start = window.num_bytes, window.split
        elif not max_tokens and not hidden:
            self.num_bytes, self._combine_start = align(control, sizing.BUFFER_ALIGNMENT), control
        else:
            raise ValueError(
                f"num_bytes is None, num_max_tokens_per_rank = {max_tokens} and hidden = {hidden}: the cuda backend "
                "allocates its window when the buffer is made and needs num_bytes, or both of the others, or none of "
                "them where nothing is dispatched"
            )
        self._window = runtime.window(self.num_bytes)
        self._state = torch.zeros(_STATE_WORDS, dtype=torch.int32, device=runtime.device)
        self._state_pointer = self._state.data_ptr()
        self._error = runtime.mapped(4 * _ERROR_WORDS)
        self._error_words = self._error.tensor.view(torch.int32).numpy()
        self._host_counts: Any = None  # mapped memory that grows with the number of experts
        self._tag = 0
        self._dispatches = 0
        self._refused = 0  # calls that never reached the device, whose count of operations goes on without them
        # Stream, whether it is being captured, and event of the last operation (first: of the zeros above).
        self._last = (runtime.current_stream(), False, runtime.record())
        self._failure: BaseException | None = None
        self._prepared: set[tuple[str, str]] = set()  # (operation, dtype) whose kernels are loaded

    # ---- what it is ---------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        tables = {"engram_tables": "pinned CPU memory"} if self._tables_on_host else {}
        return self.runtime.description | tables | ({"qps": self._contexts} if self._nodes.others else {})

    def capture(self) -> Event:
        return CudaEvent(self)

    def comm_stream(self) -> Any:
        return self.runtime.comm_stream()

    def close(self, seconds: float | None = None) -> None:
        try:
            if "_watch" in self.__dict__:
                self._end_transfers(seconds)
        finally:
            if "_watch" in self.__dict__:
                self._failure = self._failure or self._watch.failure
            if "engram" in self.__dict__:
                self._failure = self._failure or self.engram.close()
            self._error_words = self._error_words.copy()  # events may outlive the mapped memory
            # After a failure some peer does not take part in anything that all must take part in.
            self.runtime.close(abandon=self._failure is not None or bool(self._error_words[0]))

    def _end_transfers(self, seconds: float | None) -> None:
        if "point_to_point" in self.__dict__ and (held := self.point_to_point.held):
            logger.warning(
                "epv2: rank %d: %d tensors of pp_recv_inplace are still held; their memory goes with the buffer",
                self.runtime.rank,
                held,
            )
        try:
            # Memory must not go while other nodes still put something there, if only words that nobody waits for. Whose
            # buffer is garbage can't wait for others.
            failed = self._failure or self._watch.failure
            if "_sender" in self.__dict__ and seconds is None and failed is None:
                if "point_to_point" in self.__dict__:
                    self.point_to_point.drop_deferred()
                self._watch.drain()  # what waits may have something to send behind
                self._sender.meet("the end of the buffer")
        except BaseException as error:
            self._watch.give_up(error)
            raise
        finally:
            self._watch.close(seconds)

    def check(self) -> None:
        """Raise what made this rank give up, if anything did.

        Raises:
            CommunicationError: a peer did not come, gave up or came with other arguments.
            ValueError: `topk_idx` of an operation named no expert, indices of Engram no row. BufferSizeError: more rows
                came from other nodes than there is room for.
        """
        if self._failure is None and int(self._error_words[0]):
            self._failure = self._read_error()
        if self._failure is None and "_watch" in self.__dict__:
            self._failure = self._watch.failure
        if self._failure is None and "engram" in self.__dict__:
            self._failure = self.engram.failure
        if self._failure is not None:
            raise self._failure

    def _read_error(self) -> CommunicationError | BufferSizeError | ValueError:
        code, peer, phase, expected, seen, extra = (int(word) for word in self._error_words[1:7])
        ours, theirs = (self._error_words[7 + 10 * side : 17 + 10 * side].tolist() for side in range(2))
        rank, name = self.runtime.rank, _PHASES[phase]
        if code == _BAD_EXPERT:
            return ValueError(f"topk_idx[{seen}, {extra}] = {expected}: must be -1 (none) or an expert")
        if error := kernel_errors.of_wait(code, rank, peer, name, expected, seen, self._gpu_timeout, extra):
            return error
        if code == kernel_errors.OTHER_ARGUMENTS:
            different = [
                (f"{title} {_show(field, mine)} as on this rank", f"{title} {_show(field, other)}")
                for (field, title), mine, other in zip(_ARGUMENTS.items(), ours, theirs, strict=True)
                if mine != other
            ]
            # The peer may have gone on to another operation since.
            wanted, got = different[0] if different else ("this rank's arguments", "others")
            return CommunicationError(rank, peer, name, wanted, got)
        if code == _NO_ROOM:
            return BufferSizeError(
                f"{seen} rows come to this rank from other nodes, and the buffer has room for {expected}: routing is "
                "too uneven for so many tokens at once"
            )
        assert code == _TOO_MANY_ROWS
        wanted = f"at most {expected} rows (with do_cpu_sync=False a token must not name an expert twice)"
        return CommunicationError(rank, peer, name, wanted, f"row {seen}")

    def machines(self) -> list[str]:
        return self.runtime.machines

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
        gpu, sharing = self.runtime.description["device"], self.runtime.description["ranks_on_device"]
        one_memory = sharing == self.runtime.size > 1
        link = math.inf if one_memory else model.scale_up_rate(gpu, nvlink_gbs or "auto")
        shape = model.Shape(num_tokens, hidden, num_topk, num_experts, self.runtime.size, fp8=use_fp8)
        rates = model.load_rates(gpu).override(sm_read_gbs, sm_write_gbs)
        if self.num_nodes == 1:
            machine = model.Machine(gpu, self.num_sms, rates, link, sharing)
            return min(model.num_sms(shape, machine), self.num_sms)
        per_node = self._nodes.per_node
        nic, _ = network.rdma_rate(rdma_gbs or "auto", gpus_per_node=per_node)
        machine = model.Machine(gpu, self.num_sms, rates, link, sharing, nic)
        phases = model.cluster_phases(
            shape, model.Topology(self.num_nodes, per_node), "hybrid" if self.hybrid else "direct"
        )
        return min(model.fewest_sms(phases, machine), self.num_sms)

    def check_size(
        self, *, num_tokens: int, max_tokens: int, num_topk: int, num_experts: int, hidden: int, row: torch.dtype
    ) -> None:
        del num_tokens
        if num_topk > MAX_TOPK:
            raise ValueError(f"topk_idx has top-k {num_topk}: the cuda backend takes at most {MAX_TOPK}")
        if num_experts > MAX_EXPERTS:
            raise ValueError(f"num_experts = {num_experts}: the cuda backend takes at most {MAX_EXPERTS}")
        _check_row(hidden, row)
        fp8 = row.itemsize == 1
        layout = self._dispatch_layout(
            max_tokens,
            num_topk,
            num_experts // self.runtime.size,
            hidden * row.itemsize,
            sizing.scale_columns(hidden, packed=False) if fp8 else 0,
        )
        if layout.end > self._combine_start:
            needed = self._window_for(layout.end - sizing.control_bytes(self.runtime.size), self._shares[0])
            raise BufferSizeError(
                f"the buffer has {self._combine_start} of its {self.num_bytes} bytes for what is dispatched, this "
                f"dispatch needs {layout.end}: make it with num_bytes = {needed} or "
                "with num_max_tokens_per_rank, hidden and num_topk"
            )

    def _window_for(self, part: int, share: int) -> int:
        """Bytes of a window of which that `share` is as large as `part`."""
        whole = -(-(part + sizing.SECTION_ALIGNMENT) * sum(self._shares) // share)
        return align(sizing.control_bytes(self.runtime.size) + whole, sizing.BUFFER_ALIGNMENT)

    def _dispatch_layout(
        self, max_tokens: int, num_topk: int, num_local_experts: int, data_bytes: int, scale_words: int
    ) -> DispatchLayout:
        return _dispatch_layout(self._nodes, max_tokens, num_topk, num_local_experts, data_bytes, scale_words)

    def _combine_layout(self, route: CudaRoute, row_bytes: int, by_row: bool) -> CombineLayout:
        layout = CombineLayout(
            self._combine_start,
            nodes=self._nodes,
            max_tokens=route.num_max_tokens_per_rank,
            num_topk=route.num_topk,
            row_bytes=row_bytes,
            num_rows=route.num_expanded_rows if by_row else None,
        )
        if layout.end > self.num_bytes:
            size = layout.end - self._combine_start
            raise BufferSizeError(
                f"the buffer has {self.num_bytes - self._combine_start} of its {self.num_bytes} bytes for what is "
                f"combined, this needs {size}"
                + (f" for {route.num_expanded_rows} expert rows that travel as they are" if by_row else "")
                + f": make it with num_bytes = {self._window_for(size, self._shares[1])} or more"
            )
        return layout

    # ---- launches -----------------------------------------------------------------------------------------------

    def _common(self, route: CudaRoute | None = None, **shared: int) -> bytes:
        """What every kernel of an operation gets: the routing, and what all ranks agree on (keys of `_ARGUMENTS`)."""
        shared = _NOTHING_SHARED | shared
        shared["operation"] += len(_OPERATIONS) * self._refused
        if route is not None:
            shared["route"], shared["num_experts"] = route.number, route.num_experts
            shared["max_tokens"], shared["num_topk"] = route.num_max_tokens_per_rank, route.num_topk
        return _common_struct().pack(
            window=self._window.handle,
            state=self._state_pointer,
            error=self._error.pointer,
            timeout_ns=int(self._gpu_timeout * 1e9),
            signature=zlib.crc32(repr([*shared.values()]).encode()),
            rank=self.runtime.rank,
            num_ranks=self.runtime.size,
            num_local_experts=0 if route is None else route.num_local_experts,
            lsa_begin=self._near.start,
            lsa_size=self.runtime.lsa_size,
            network=self._network,
            contexts=self._contexts,
            rail=int(self._nodes.hybrid),
            **shared,
        )

    def _arguments(self, kernel: Kernel, common: bytes, **fields: int) -> bytes:
        return _struct_of(kernel).pack(common=common, **fields)

    def _launch(self, kernel: Kernel, arguments: bytes, ctas: int, shape: LaunchShape) -> None:
        self.runtime.launch(kernel, arguments, ctas=ctas, threads=shape.threads, shared_bytes=shape.shared_bytes)

    def _prepare(self, operation: str, dtype: str, kernels: Iterable[Kernel]) -> None:
        """Load what an operation launches, before any of it runs: CUDA may load a kernel only while the device is idle,
        which it is not while a kernel waits for peers, nor do other threads' calls return until then. A network that
        needs such calls (NCCL's proxy, the loopback) would stand still, and the wait would never end."""
        if (operation, dtype) not in self._prepared:
            for kernel in kernels:
                self.runtime.prepare(kernel)
            self._prepared.add((operation, dtype))

    def _prepare_combine(self, dtype: torch.dtype, row_bytes: int) -> None:
        launched = (kernel for kernel, _ in self._combine_launches(_DTYPES[dtype], row_bytes))  # only if it must
        self._prepare("combine", _DTYPES[dtype], itertools.chain([self._kernels.combine_idle], launched))

    @contextmanager
    def _operation(self, previous: Sequence[Event], asynchronous: bool, inputs: Iterable[Any]) -> Iterator[_Stream]:
        """Launch what follows on the right stream, after everything that it has to wait for."""
        self.check()
        runtime = self.runtime
        if not asynchronous:
            yield self._begin(previous, None)
            return
        caller = runtime.current_stream()
        # Beside what the caller names: copies of arguments that were made on its stream just now.
        before = [CudaEvent(self)]
        with runtime.on_stream(runtime.comm_stream()):
            for tensor in inputs:
                if tensor is not None and tensor.device.type == "cuda":
                    tensor.record_stream(runtime.comm_stream())
                    record_use(tensor, runtime.comm_stream())
            yield self._begin([*previous, *before], caller)

    def _begin(self, previous: Sequence[Event], caller: Any) -> _Stream:
        runtime = self.runtime
        for event in previous:
            event.current_stream_wait()
        # Operations of a buffer run one by one, whatever streams they are on. Inside a capture, only events of the same
        # capture can be waited for, and those are the caller's.
        stream, capturing = runtime.current_stream(), runtime.is_capturing()
        last_stream, last_captured, last_event = self._last
        if last_stream != stream and not (last_captured or capturing):
            runtime.wait(last_event)
        return _Stream(self, stream, capturing, caller)

    # ---- dispatch -----------------------------------------------------------------------------------------------

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
        route: CudaRoute | None,
        use_fp8: bool,
        column_major_scales: bool,
        copy_routing: bool,
        num_sms: int,
        previous: Sequence[Event],
        asynchronous: bool,
    ) -> Received:
        runtime = self.runtime
        if exact and route is None and runtime.is_capturing():
            raise ValueError(
                "do_cpu_sync = True while a CUDA graph is being captured: the host would wait for a kernel that does "
                "not run yet; use do_cpu_sync=False"
            )
        num_tokens, hidden = x_TH.shape
        out_dtype = torch.float8_e4m3fn if use_fp8 else x_TH.dtype
        _check_row(hidden, out_dtype)
        x_TH = _aligned(x_TH)
        scale_words = sizing.scale_columns(hidden, packed=False) if use_fp8 else 0
        scale_dtype = torch.float32
        if scales is not None:
            scale_words, scale_dtype = scales.shape[1], scales.dtype
        cached = route is not None
        inputs = [x_TH, scales, topk_idx_TK, topk_weights_TK, statistics]
        if route is not None:
            inputs += [route.counts, route.metadata, route.recv_topk_idx, route.origin, route.sent_slots]
        with self._operation(previous, asynchronous, inputs) as place:
            if route is None:
                self._dispatches += 1
                words = sizing.counts_words(runtime.size, num_experts // runtime.size)
                route = CudaRoute(
                    topk_idx_TK,
                    torch.empty(words, dtype=torch.int32, device=self.device),
                    num_ranks=runtime.size,
                    num_experts=num_experts,
                    max_tokens=num_max_tokens_per_rank,
                    alignment=alignment,
                    expanded=expand,
                    number=self._dispatches,
                )
            layout = self._dispatch_layout(
                route.num_max_tokens_per_rank,
                route.num_topk,
                route.num_local_experts,
                hidden * out_dtype.itemsize,
                scale_words,
            )
            common = self._common(
                route,
                operation=_OPERATIONS.index("cached dispatch" if cached else "dispatch"),
                hidden=hidden,
                dtype=_NAMED_DTYPES.index(out_dtype),
                scales=scale_words,
                has_weights=int(topk_weights_TK is not None),
            )
            wants_counts = exact and not cached
            if wants_counts:
                self._make_host_counts(route)
            shape = sizing.stage_shape(self._nodes, route.num_local_experts)
            cast_from = _DTYPES[x_TH.dtype] if use_fp8 else ""
            kernel = self._kernels.dispatch_stage[cast_from]
            needed = [kernel, self._kernels.dispatch_route, self._kernels.dispatch_pull, self._kernels.barrier]
            self._prepare("dispatch", cast_from, needed + [kernels.DISPATCH_SEND] * bool(self._nodes.others))
            if x_TH.dtype in _DTYPES:  # what comes next, while this still waits for peers
                self._prepare_combine(x_TH.dtype, hidden * x_TH.itemsize)
            arguments = self._arguments(
                kernel,
                common,
                x=_pointer(x_TH),
                scales=_pointer(scales),
                topk_idx=_pointer(topk_idx_TK),
                cached=int(cached),
                topk_weights=_pointer(topk_weights_TK),
                counts=_pointer(route.counts),
                host_counts=self._host_counts.pointer if wants_counts else 0,
                host_tag=self._tag,
                topk_offset=layout.topk,
                weights_offset=layout.weights,
                prefix_offset=layout.prefix,
                totals_offset=layout.totals,
                rows_offset=layout.rows,
                num_tokens=num_tokens,
                x_bytes=hidden * x_TH.itemsize,
                data_bytes=hidden * out_dtype.itemsize,
                scale_words=scale_words,
                row_stride=layout.row_stride,
                expert_alignment=alignment,
                counting_warps=shape.counting_warps,
            )
            self._launch(kernel, arguments, num_sms, shape)
            if self._nodes.others:
                self._launch_send(route, layout, common, cached, topk_idx_TK, num_tokens, wants_counts, num_sms)

            # Everything that does not need the counts, while they are on their way: the time of the host behind them is
            # time in which nothing runs.
            data_bytes = hidden * out_dtype.itemsize
            shape = sizing.pull_shape(runtime.size, data_bytes, scale_words)
            pull = self._arguments(
                self._kernels.dispatch_pull,
                common,
                counts=_pointer(route.counts),
                rows_offset=layout.rows,
                arrivals_offset=layout.arrivals,
                data_bytes=data_bytes,
                scale_words=scale_words,
                row_stride=layout.row_stride,
                piece_bytes=shape.piece_bytes,
                num_stages=shape.stages,
                expand=int(expand),
                expert_alignment=route.expert_alignment,
                zero_padding=int(zero_padding),
            )
            to_route = self._route_arguments(route, layout, common, cached, statistics)
            if not cached:
                self._size_outputs(route, exact)
            num_recv, num_expanded = route.metadata.shape[0], route.num_expanded_rows
            if not expand and not cached:
                route.recv_topk_idx = torch.empty(num_recv, route.num_topk, dtype=torch.int64, device=self.device)
            out_weights = None
            if topk_weights_TK is not None:
                size = (num_expanded,) if expand else (num_recv, route.num_topk)
                out_weights = torch.empty(size, dtype=torch.float32, device=self.device)
            if not cached or out_weights is not None:
                self._launch_route(route, to_route, out_weights, num_sms)
            num_out = num_expanded if expand else num_recv
            out_x = torch.empty(num_out, hidden, dtype=out_dtype, device=self.device)
            out_scales = None
            if scale_words and column_major_scales:
                out_scales = torch.empty(scale_words, align(num_out, 4), dtype=scale_dtype, device=self.device)
                out_scales = out_scales.t()[:num_out]
            elif scale_words:
                out_scales = torch.empty(num_out, scale_words, dtype=scale_dtype, device=self.device)
            kernel = self._kernels.dispatch_pull
            arguments = _struct_of(kernel).fill(
                pull,
                origin=_pointer(route.origin),
                metadata=_pointer(route.metadata),
                out=_pointer(out_x),
                out_scales=_pointer(out_scales),
                scale_row_stride=0 if out_scales is None else out_scales.stride(0),
                scale_column_stride=0 if out_scales is None else out_scales.stride(1),
                rows_capacity=num_recv,
                expanded_capacity=num_expanded,
            )
            self._launch(kernel, arguments, num_sms, shape)
            made = [out_x, out_scales, out_weights, route.recv_topk_idx, route.counts, route.metadata]
            made += [route.origin, route.relayed, route.sent_slots]
            if copy_routing and not cached:  # last: the host launches it while rows travel
                route.topk_idx_TK = topk_idx_TK.clone()
                made.append(route.topk_idx_TK)
            event = place.end(made)
        moved = data_bytes + 4 * scale_words + (4 if out_weights is not None else 0)
        self._count(route, moved, moved, network_row_bytes=layout.row_stride)
        return Received(out_x, out_scales, route.recv_topk_idx, out_weights, route, num_recv, num_expanded, event)

    def _route_arguments(
        self,
        route: CudaRoute,
        layout: DispatchLayout,
        common: bytes,
        cached: bool,
        statistics: torch.Tensor | None,
    ) -> bytes:
        """What dispatch_route gets, without what `_launch_route` adds."""
        return self._arguments(
            self._kernels.dispatch_route,
            common,
            counts=_pointer(route.counts),
            statistics=_pointer(statistics),
            topk_offset=layout.topk,
            weights_offset=layout.weights,
            prefix_offset=layout.prefix,
            arrivals_offset=layout.arrivals,
            row_stride=layout.row_stride,
            trailer_offset=layout.trailer,
            cached=int(cached),
            statistics_wide=int(statistics is not None and statistics.dtype == torch.int64),
            expand=int(route.expanded),
            expert_alignment=route.expert_alignment,
        )

    def _launch_route(self, route: CudaRoute, arguments: bytes, out_weights: torch.Tensor | None, num_sms: int) -> None:
        kernel = self._kernels.dispatch_route
        arguments = _struct_of(kernel).fill(
            arguments,
            metadata=_pointer(route.metadata),
            recv_topk_idx=_pointer(route.recv_topk_idx),
            recv_weights=_pointer(out_weights),
            origin=_pointer(route.origin),
            relayed=_pointer(route.relayed),
            rows_capacity=route.metadata.shape[0],
            expanded_capacity=route.num_expanded_rows,
        )
        self._launch(kernel, arguments, num_sms, sizing.route_shape(route.num_local_experts, route.num_topk))

    def _launch_send(
        self,
        route: CudaRoute,
        layout: DispatchLayout,
        common: bytes,
        cached: bool,
        topk_idx_TK: torch.Tensor,
        num_tokens: int,
        wants_counts: bool,
        num_sms: int,
    ) -> None:
        """Between nodes: send this rank's rows to other nodes, and hear from them."""
        nodes, num_topk = self._nodes, route.num_topk
        returns = nodes.returns(num_topk)
        if not cached:
            route.sent_slots = route.counts.new_empty(num_tokens, returns)
        arguments = self._arguments(
            kernels.DISPATCH_SEND,
            common,
            counts=_pointer(route.counts),
            host_counts=self._host_counts.pointer if wants_counts else 0,
            host_tag=self._tag,
            topk_idx=_pointer(topk_idx_TK),
            sent_slots=_pointer(route.sent_slots),
            topk_offset=layout.topk,
            weights_offset=layout.weights,
            prefix_offset=layout.prefix,
            totals_offset=layout.totals,
            mirror_offset=layout.mirror,
            rows_offset=layout.rows,
            arrivals_offset=layout.arrivals,
            cached=int(cached),
            num_tokens=num_tokens,
            row_stride=layout.row_stride,
            trailer_offset=layout.trailer,
            expert_alignment=route.expert_alignment,
            max_arrivals=layout.max_arrivals,
            max_remote_rows=nodes.remote_rows(route.num_max_tokens_per_rank, num_topk),
            num_returns=returns,
        )
        shape = sizing.send_shape(nodes, route.num_local_experts, num_topk)
        self._launch(kernels.DISPATCH_SEND, arguments, num_sms, shape)

    def _make_host_counts(self, route: CudaRoute) -> None:
        """Mapped memory in which a kernel tells what arrives, and the tag that will say that it has."""
        num_bytes = 4 * (1 + route.counts.numel())
        if self._host_counts is None or self._host_counts.tensor.numel() < num_bytes:
            self._host_counts = self.runtime.mapped(num_bytes)
        self._tag = self._tag % 0x7FFFFFFF + 1

    def _size_outputs(self, route: CudaRoute, exact: bool) -> None:
        """Allocate the metadata and say how many rows the outputs have."""
        limit, num_topk = route.num_max_tokens_per_rank, route.num_topk
        if exact:
            route.host_counts, route.num_arrivals = self._wait_for_counts(route)
            received = route.host_counts.sum(0)
            num_rows = int(received[-1])
            alignment = route.expert_alignment
            route.num_expanded_rows = int((-(-received[:-1] // alignment) * alignment).sum())
        else:
            num_rows = self._nodes.slots(limit, num_topk)
            route.num_arrivals = self._nodes.arrivals(limit, num_topk)
            route.num_expanded_rows = sizing.expanded_rows(
                num_rows, num_topk, route.num_local_experts, route.expert_alignment
            )
        route.metadata = route.counts.new_empty(num_rows, 2 + num_topk)
        if self._nodes.others:
            route.origin = route.counts.new_empty(num_rows)
            route.relayed = route.counts.new_empty(route.num_arrivals, 1 + num_topk)

    def _wait_for_counts(self, route: CudaRoute) -> tuple[Any, int]:
        """Rows from each rank for each expert and in all [P, E_local + 1]; rows that came to this rank as a relay."""
        words = self._host_counts.tensor.view(torch.int32).numpy()
        deadline = time.monotonic() + self._host_timeout
        while words[0] != self._tag:
            self.check()
            if time.monotonic() > deadline:
                # The kernel may still be waiting: no later operation may take its number.
                self._failure = CommunicationTimeout(
                    self.runtime.rank, -1, "dispatch, counts", f"counts within {self._host_timeout:g} s", "none"
                )
                raise self._failure
            time.sleep(0)  # other threads of this process need the interpreter
        size, columns = self.runtime.size, route.num_local_experts + 1
        rows = words[1 + size * columns : 1 + 2 * size * columns].reshape(size, columns).copy()
        return rows, int(words[route.counts.numel()])

    def _count(
        self, route: CudaRoute, row_bytes: int, pair_bytes: int, *, by_pair: bool = False, network_row_bytes: int = 0
    ) -> None:
        """Count the rows that came from other ranks, or go back to them: one a token, or (`by_pair`) one an expert of
        his; and those that came over the network. The host does not know of any after `do_cpu_sync=False`."""
        if route.host_counts is None:
            return
        own = self.runtime.rank
        others = route.host_counts.sum(0) - route.host_counts[own]
        pairs = int(others[:-1].sum())
        self.traffic.sent_bytes += row_bytes * (pairs if by_pair else int(others[-1]))
        self.traffic.undeduplicated_bytes += pair_bytes * pairs
        if network_row_bytes and self._nodes.others:
            near = route.host_counts[self._near, -1].sum()
            self.traffic.network_bytes += network_row_bytes * route.num_arrivals
            self.traffic.direct_network_bytes += network_row_bytes * int(route.host_counts[:, -1].sum() - near)

    # ---- combine ------------------------------------------------------------------------------------------------

    def combine(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias_TH: Sequence[torch.Tensor],
        route: CudaRoute,
        *,
        expanded: bool,
        num_sms: int,
        previous: Sequence[Event],
        asynchronous: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Event]:
        hidden = x.shape[1]
        _check_row(hidden, x.dtype)
        row_bytes = hidden * x.itemsize
        in_window = expanded and self._lies_in_window(x, route, row_bytes)
        by_row = expanded and (in_window or not self._allow_multiple_reduction)
        layout = self._combine_layout(route, row_bytes, by_row)
        x = x if by_row else _aligned(x)
        biases = [_aligned(bias) for bias in bias_TH]
        num_tokens = route.topk_idx_TK.shape[0]
        common = self._common(
            route,
            operation=_OPERATIONS.index("combine"),
            hidden=hidden,
            dtype=_NAMED_DTYPES.index(x.dtype),
            has_weights=int(topk_weights is not None),
            by_row=int(by_row),
        )
        inputs = [x, topk_weights, *biases, route.metadata, route.counts, route.topk_idx_TK]
        inputs += [route.origin, route.relayed]
        with self._operation(previous, asynchronous, inputs) as place:
            combined = torch.empty(num_tokens, hidden, dtype=x.dtype, device=self.device)
            combined_weights = None
            if topk_weights is not None:
                combined_weights = torch.empty(num_tokens, route.num_topk, dtype=torch.float32, device=self.device)
            fields = {
                "counts": _pointer(route.counts),
                "metadata": _pointer(route.metadata),
                "x": 0 if by_row else _pointer(x),
                "weights": _pointer(topk_weights),
                "topk_idx": _pointer(route.topk_idx_TK),
                "bias_0": _pointer(biases[0]) if biases else 0,
                "bias_1": _pointer(biases[1]) if len(biases) > 1 else 0,
                "out": _pointer(combined),
                "out_weights": _pointer(combined_weights),
                "rows_offset": layout.rows,
                "table_offset": layout.table,
                "weights_offset": layout.weights,
                "origin": _pointer(route.origin),
                "relayed": _pointer(route.relayed),
                "slots_offset": layout.slots,
                "outgoing_offset": layout.outgoing,
                "returned_offset": layout.returned,
                "return_stride": layout.return_stride,
                "num_returns": self._nodes.returns(route.num_topk),
                "num_tokens": num_tokens,
                "row_bytes": row_bytes,
                "expand": int(expanded),
            }
            self._prepare_combine(x.dtype, row_bytes)
            if by_row and not in_window:
                self._wait_until_idle()
                # A memory copy, which a copy engine can do: copying in a kernel would take SMs.
                self._window_rows(layout, route, x.dtype, hidden).copy_(x)
            for kernel, shape in self._combine_launches(_DTYPES[x.dtype], row_bytes):
                rings = {"piece_bytes": shape.piece_bytes, "num_groups": shape.groups, "num_slots": shape.stages}
                self._launch(kernel, self._arguments(kernel, common, **fields, **rings), num_sms, shape)
            event = place.end((combined, combined_weights))
        weights = 0 if topk_weights is None else 1 if by_row else route.num_topk
        self._count(route, row_bytes + 4 * weights, row_bytes, by_pair=by_row)
        return combined, combined_weights, event

    def _combine_launches(self, dtype: str, row_bytes: int) -> Iterator[tuple[Kernel, LaunchShape]]:
        shape = sizing.sum_shape(self.runtime.size, row_bytes)
        yield self._kernels.combine_stage[dtype], shape
        if self._nodes.hybrid:
            yield kernels.COMBINE_RELAY[dtype], sizing.relay_shape(self._nodes.per_node, row_bytes)
        elif self._nodes.others:
            yield kernels.COMBINE_PUT, LaunchShape(256, sizing.LEAST_SHARED_BYTES)
        yield self._kernels.combine_pull[dtype], shape

    def _lies_in_window(self, x: torch.Tensor, route: CudaRoute, row_bytes: int) -> bool:
        if x.numel() == 0:  # has no address, but all ranks must do the same
            return route.in_window
        begin = self._window.tensor.data_ptr()
        if not begin <= x.data_ptr() < begin + self.num_bytes:
            return False
        if x.data_ptr() != begin + self._combine_layout(route, row_bytes, by_row=True).rows:
            raise ValueError("x lies in the buffer's window, but is not what get_combine_buffer gave for this handle")
        return True

    def combine_buffer(self, route: CudaRoute, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in _DTYPES:
            raise TypeError(f"dtype is {dtype}: must be {' or '.join(map(str, _DTYPES))}")
        _check_row(hidden, dtype)
        layout = self._combine_layout(route, hidden * dtype.itemsize, by_row=True)
        with self._operation((), False, ()) as place:
            self._wait_until_idle()
            place.end(())
        route.in_window = True
        return self._window_rows(layout, route, dtype, hidden)

    def _wait_until_idle(self) -> None:
        """What follows on this stream may overwrite what peers read in the last combine."""
        kernel = self._kernels.combine_idle
        self._launch(kernel, self._arguments(kernel, self._common()), 1, LaunchShape(64, sizing.SCRATCH_BYTES))

    def _window_rows(self, layout: CombineLayout, route: CudaRoute, dtype: torch.dtype, hidden: int) -> torch.Tensor:
        """`[N, hidden]`: where expert rows lie in the window."""
        num_bytes = route.num_expanded_rows * hidden * dtype.itemsize
        return self._window.tensor[layout.rows : layout.rows + num_bytes].view(dtype).view(-1, hidden)

    # ---- point-to-point and sessions --------------------------------------------------------------------------------

    @cached_property
    def _watch(self) -> Watch:
        self.check()
        return Watch(self.runtime, self._host_timeout)

    @cached_property
    def _sender(self) -> Sender:
        return Sender(self.runtime, self._watch)

    @cached_property
    def point_to_point(self) -> CudaPointToPoint:
        return CudaPointToPoint(self.runtime, self._watch, self.traffic, self._given_bytes, lambda: self._sender)

    @cached_property
    def sessions(self) -> CudaSessions:
        return CudaSessions(self.runtime, self._watch, self.traffic, self._refused, lambda: self._sender)

    @cached_property
    def engram(self) -> CudaEngram:
        return CudaEngram(
            self.runtime,
            self.traffic,
            self._operation,
            self.check,
            self._refused,
            on_host=self._tables_on_host,
            contexts=self._contexts,
            host_timeout_seconds=self._host_timeout,
            gpu_timeout_seconds=self._gpu_timeout,
        )

    def refuse(self, call: str, error: BaseException) -> None:
        self._refused += 1
        if "engram" in self.__dict__:
            self.engram.refused = self._refused
        if "sessions" in self.__dict__:
            self.sessions.refused = self._refused

    def barrier(self) -> None:
        with self._operation((), False, ()) as place:
            kernel = self._kernels.barrier
            arguments = self._arguments(kernel, self._common(operation=_OPERATIONS.index("barrier")))
            self._launch(kernel, arguments, 1, LaunchShape(64, sizing.SCRATCH_BYTES))
            place.end(())
        self.check()


class _Stream:
    """Where an operation runs; `end` when all its kernels are launched."""

    def __init__(self, backend: CudaBackend, stream: Any, capturing: bool, caller: Any):
        self._backend, self._stream, self._capturing, self._caller = backend, stream, capturing, caller

    def end(self, outputs: Iterable[torch.Tensor | None]) -> CudaEvent:
        """The operation's event. `outputs` are used on the caller's stream from now on, whichever made them."""
        if self._caller is not None:
            for tensor in outputs:
                if tensor is not None and tensor.device.type == "cuda":
                    tensor.record_stream(self._caller)
        event = CudaEvent(self._backend)
        self._backend._last = (self._stream, self._capturing, event._event)
        return event


@functools.lru_cache(maxsize=256)
def _dispatch_layout(
    nodes: sizing.Nodes, max_tokens: int, num_topk: int, num_local_experts: int, data_bytes: int, scale_words: int
) -> DispatchLayout:
    return DispatchLayout(
        sizing.control_bytes(nodes.num_ranks),
        nodes=nodes,
        max_tokens=max_tokens,
        num_topk=num_topk,
        num_local_experts=num_local_experts,
        data_bytes=data_bytes,
        scale_words=scale_words,
    )


def _check_row(hidden: int, dtype: torch.dtype) -> None:
    if hidden * dtype.itemsize % sizing.ROW_ALIGNMENT:
        raise ValueError(
            f"hidden size {hidden} in {dtype} is {hidden * dtype.itemsize} bytes a row: the cuda backend moves rows of "
            f"multiples of {sizing.ROW_ALIGNMENT} bytes"
        )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` at an address that bulk copies take; a view into a larger tensor may begin anywhere."""
    return tensor if tensor.data_ptr() % sizing.ROW_ALIGNMENT == 0 else tensor.clone()


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _show(field: str, value: int) -> str:
    """How users know the value of one of `_ARGUMENTS`."""
    if field == "operation":
        refused, operation = divmod(value, len(_OPERATIONS))
        return _OPERATIONS[operation] + (f" after {refused} refused" if refused else "")
    return str(_NAMED_DTYPES[value]) if field == "dtype" else str(value)
