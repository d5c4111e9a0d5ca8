"""`ElasticBuffer`: expert-parallel dispatch and combine with DeepEP V2's call surface, over whichever backend fits."""

from __future__ import annotations

import functools
import logging
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeVar

import torch
import torch.distributed as dist

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import (
    NUM_CHANNELS,
    Backend,
    EngramTable,
    Traffic,
)
from epv2_plugin.elastic.backends.cuda import CudaBackend
from epv2_plugin.elastic.backends.device import CudaRuntime, Meeting
from epv2_plugin.elastic.backends.host import HostBackend
from epv2_plugin.elastic.errors import BufferSizeError, CommunicationError
from epv2_plugin.elastic.event import Event, EventOverlap, HostEvent, StreamEvent
from epv2_plugin.elastic.handle import EPHandle, Route
from epv2_plugin.elastic.model import num_qps
from epv2_plugin.elastic.modes import ranks_of_a_node

logger = logging.getLogger("epv2_plugin")

FP8 = torch.float8_e4m3fn
# What the model of SMs assumes of a buffer that was made by bytes: DeepSeek-V3's layer.
_USUAL_HIDDEN, _USUAL_TOKENS = 7168, 4096
_DROPPED_SECONDS = 1.0  # for transfers of a buffer that is garbage: what dropped it may have been an error
_WIDEST = 4  # bytes per value of the widest dtype that the host backend takes

Fp8Rows = tuple[torch.Tensor, torch.Tensor]
_Call = TypeVar("_Call", bound=Callable[..., Any])


def _collective(call: _Call) -> _Call:
    """An operation that every rank calls; see `ElasticBuffer._counting_refusals`."""

    @functools.wraps(call)
    def counted(self: ElasticBuffer, *args: Any, **kwargs: Any) -> Any:
        with self._counting_refusals(call.__name__):
            return call(self, *args, **kwargs)

    return counted  # type: ignore[return-value]


def _deepep_names(**ours: str) -> Callable[[_Call], _Call]:
    """Let a call take keywords by DeepEP's names, too: `theirs="ours"`."""

    def decorate(call: _Call) -> _Call:
        @functools.wraps(call)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            for theirs, name in ours.items():
                if theirs in kwargs:
                    if name in kwargs:
                        raise TypeError(f"{call.__name__}() got {name} and {theirs}, which are the same argument")
                    kwargs[name] = kwargs.pop(theirs)
            return call(*args, **kwargs)

        return renamed  # type: ignore[return-value]

    return decorate


class _Capture:
    """`capture`, of a buffer or, as DeepEP has it, of the class."""

    def __get__(self, buffer: ElasticBuffer | None, owner: type) -> Callable[[], EventOverlap]:
        def capture() -> EventOverlap:
            """An event of what the current stream has been given so far; on the host that is done already."""
            if buffer is not None:
                return EventOverlap(buffer._open().capture())
            return EventOverlap(StreamEvent() if torch.cuda.is_available() else HostEvent())

        return capture


class ElasticBuffer:
    """Dispatch tokens to the ranks of their experts and combine what the experts made of them.

    Every rank of `group` creates the buffer and calls its operations in the same order. Received rows are ordered by
    (source rank, source token), sums run in fp32 in top-k order: results are the same bits in every run.

    A call that is refused (TypeError, ValueError, ...) counts: if all ranks refuse it, the buffer goes on as if it had
    not been made; if only some do, `CommunicationError` follows on every rank, and the buffer can't be used any more.

    Args:
        group: ranks among which experts are spread; expert e lives on rank e // (num_experts / ranks).
        num_bytes: size of the buffer. On the host backend a limit only: nothing is allocated ahead. On the cuda backend
            the bytes of the window; without it the MoE sizes below say how many, for rows of 2 bytes per value. Rings
            of `pp_send` and sessions have windows of their own, made when they are configured; `num_bytes` limits them,
            less `num_cpu_bytes`. So has an Engram table, made when it is written: what `engram_reduce` needs has no
            limit, and the table has none but `num_cpu_bytes`.
        num_cpu_bytes: part of `num_bytes` that an Engram table may take, in CPU memory, which the cuda backend pins:
            GPUs of one machine read rows there. The rest is the window (cuda), or most that a fetch returns (host). 0 =
            no limit set, and tables in GPU memory on the cuda backend.
        num_max_tokens_per_rank: most tokens that any rank dispatches at once; 0 = the ranks agree at each dispatch
            (host backend, `do_cpu_sync=True` only).
        hidden, num_topk: largest values per token and top-k; 0 = no limit set.
        use_fp8_dispatch: size the buffer for FP8 rows in dispatch.
        deterministic: accepted for compatibility; every operation is deterministic.
        allow_hybrid_mode: between nodes, on the cuda backend, send a row once to each node that wants it and pass it on
            there, and add up what a node returns before it travels (another rounding), which takes
            `allow_multiple_reduction`. False = one hop, as always on the host backend; `elastic.modes` chooses.
        allow_multiple_reduction: True = the expert's rank sums its rows of a token first and rounds to the row's dtype
            before it sends them; False = all rows travel and are rounded once.
        num_allocated_qps: queue pairs to each peer in another node on the cuda backend; 0 = 4.
        prefer_overlap_with_compute, sl_idx: accepted for compatibility.
        num_cpu_timeout_secs: seconds after which a wait on the host gives up.
        num_gpu_timeout_secs: the same for waits in GPU kernels (unused by the host backend).
        explicitly_destroy: the caller promises to call `destroy()`; otherwise it happens at garbage collection.
        backend: "auto" takes "host" where there is no CUDA device.

    Attributes:
        group, rank_idx, num_ranks, num_bytes: as above. traffic: bytes sent so far.
        num_scaleout_ranks, num_scaleup_ranks, scaleout_rank_idx, scaleup_rank_idx: logical domain (hops).
        num_rdma_ranks, num_nvlink_ranks: physical domain (machines x ranks per machine).

    Raises:
        ValueError, TypeError: an argument is out of range. RuntimeError: the backend is not available here; or another
            rank raised any of these, then the message names it.
        CommunicationError: another rank's backend is another. CommunicationTimeout: not every rank created the buffer
            in time.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float = 300,
        num_gpu_timeout_secs: float = 100,
        explicitly_destroy: bool = False,
        *,
        backend: Literal["auto", "cuda", "host"] = "auto",
    ):
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed ProcessGroup, got {type(group).__name__}")
        sizes = {
            "num_cpu_bytes": num_cpu_bytes,
            "num_max_tokens_per_rank": num_max_tokens_per_rank,
            "hidden": hidden,
            "num_topk": num_topk,
            "num_allocated_qps": num_allocated_qps,
        }
        timeouts = {"num_cpu_timeout_secs": num_cpu_timeout_secs, "num_gpu_timeout_secs": num_gpu_timeout_secs}

        def check() -> str:
            _check_sizes(num_bytes, sizes, timeouts)
            return resolve_backend(backend)

        kind = _agreed(group, num_cpu_timeout_secs, check)
        self.group = group
        self.rank_idx, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        self.use_fp8_dispatch, self.explicitly_destroy = use_fp8_dispatch, explicitly_destroy
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.num_allocated_qps, self.num_cpu_bytes = num_allocated_qps, num_cpu_bytes
        self.deterministic, self.prefer_overlap_with_compute = deterministic, prefer_overlap_with_compute
        self._limit_bytes = None if num_bytes is None else num_bytes - num_cpu_bytes  # of rings and sessions
        self._max_tensor_bytes = 0  # of pp_send and pp_recv
        self._theoretical_sms: dict[tuple[float, ...], int] = {}
        self._backend: Backend | None
        if kind == "host":
            self.num_bytes = num_bytes or sizing.buffer_bytes(
                self.num_ranks, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, _WIDEST
            )
            self._backend = HostBackend(group, num_cpu_timeout_secs, allow_multiple_reduction, num_bytes)
        else:
            self._backend = CudaBackend(
                CudaRuntime(group, num_cpu_timeout_secs),
                num_bytes=self._limit_bytes,
                max_tokens=num_max_tokens_per_rank,
                hidden=hidden,
                num_topk=num_topk,
                use_fp8_dispatch=use_fp8_dispatch,
                allow_multiple_reduction=allow_multiple_reduction,
                # Hybrid mode adds up the rows of a node before they travel.
                hybrid=allow_hybrid_mode and allow_multiple_reduction,
                num_qps=num_allocated_qps,
                tables_on_host=num_cpu_bytes > 0,
                host_timeout_seconds=num_cpu_timeout_secs,
                gpu_timeout_seconds=num_gpu_timeout_secs,
            )
            self.num_bytes = self._backend.num_bytes + num_cpu_bytes
        self.num_scaleout_ranks = self._backend.num_nodes if self._backend.hybrid else 1
        self.num_scaleup_ranks = self.num_ranks // self.num_scaleout_ranks
        self.scaleout_rank_idx, self.scaleup_rank_idx = divmod(self.rank_idx, self.num_scaleup_ranks)
        self.num_rdma_ranks, self.num_nvlink_ranks = self._find_machines()

    # ---- sizes and topology -------------------------------------------------------------------------------------

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes that a buffer for these sizes needs, a multiple of 2 MiB; `num_topk` 0 = unknown, sized for 32.

        For the backend that "auto" takes on this machine, with rows of at most 2 bytes per value on the cuda backend,
        and nodes as `torchrun` started them (LOCAL_WORLD_SIZE).
        """
        size = dist.get_world_size(group)
        if resolve_backend("auto") == "cuda":
            nodes = sizing.Nodes(size, ranks_of_a_node(group), allow_hybrid_mode and allow_multiple_reduction)
            return sizing.WindowLayout(nodes, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch).num_bytes
        return sizing.buffer_bytes(size, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, _WIDEST)

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(machines, ranks on each); (ranks, 1) where machines hold different numbers of them."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks) of the mode in use; the host backend makes one hop: (1, ranks)."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 0,
        sm_write_gbs: float = 0,
    ) -> int:
        """SMs that an operation should hold by the model (`elastic.model`): even, 4 or more; 0 on the host backend.

        Args:
            num_scaleout_topk: unused: the model knows how many nodes hold a token's experts.
            rdma_gbs: what one GPU reaches over the network in one direction; 0 = as the machine's ports say.
            nvlink_gbs: what one GPU reaches in one direction; 0 = what is known of this model of GPU.
            sm_read_gbs, sm_write_gbs: what one of few busy SMs copies; 0 = what `epv2 bench sm` measured, or an H200's.

        Raises:
            ValueError: a rate is negative, or the bandwidth between GPUs, or (between nodes) of the network, is neither
                given nor known.
        """
        rates = {"nvlink_gbs": nvlink_gbs, "rdma_gbs": rdma_gbs}
        rates |= {"sm_read_gbs": sm_read_gbs, "sm_write_gbs": sm_write_gbs}
        for name, rate in rates.items():
            if rate < 0:
                raise ValueError(f"{name} = {rate}: must be 0 (as known) or more")
        key = (num_experts, num_topk, *rates.values())
        if key not in self._theoretical_sms:
            self._theoretical_sms[key] = self._open().theoretical_sms(
                num_experts,
                num_topk,
                hidden=self.hidden or _USUAL_HIDDEN,
                num_tokens=self.num_max_tokens_per_rank or _USUAL_TOKENS,
                use_fp8=self.use_fp8_dispatch,
                **rates,
            )
        return self._theoretical_sms[key]

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs for `num_sms` SMs: 0 where all ranks reach each other by load and store, or on the host."""
        return num_qps(num_sms, self._open().num_nodes, self.num_allocated_qps)

    def describe(self) -> dict[str, Any]:
        """What runs: `backend`, `mode` (direct = one hop), `transport`, `qps`, and what the backend tells of itself."""
        backend = self._open()
        mode = "hybrid" if backend.hybrid else "direct"
        return {"backend": backend.name, "mode": mode, "qps": 0, **backend.describe()}

    def _find_machines(self) -> tuple[int, int]:
        backend = self._open()
        if backend.num_nodes > 1:  # also those of an emulated cluster, which are one machine
            return backend.num_nodes, self.num_ranks // backend.num_nodes
        machines = backend.machines()
        counts = {machines.count(machine) for machine in machines}
        return (len(set(machines)), counts.pop()) if len(counts) == 1 else (self.num_ranks, 1)

    # ---- life ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Of the tensors that operations take and return."""
        return self._open().device

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank sent to others so far."""
        return self._open().traffic

    def destroy(self) -> None:
        """Release the buffer; calling it again does nothing. Operations in flight must have been waited for; sends, and
        transfers that a GPU's streams still have to make, are waited for here: one that nobody receives costs the
        timeout. Not so while an exception is handled: then peers are to see soon that this rank has ended.

        Raises:
            CommunicationError: such a transfer did not end within the timeout. The buffer is released all the same.
        """
        if sys.exc_info()[0] is None:
            self._release(None)
        else:
            self._drop()

    def __del__(self) -> None:
        if dist.is_initialized():
            self._drop()

    def _drop(self) -> None:
        try:
            self._release(_DROPPED_SECONDS)
        except CommunicationError as error:
            logger.warning("epv2: an ElasticBuffer was dropped before its transfers had ended: %s", error)

    def _release(self, seconds: float | None) -> None:
        backend, self._backend = getattr(self, "_backend", None), None
        if backend is not None:
            backend.close(seconds)

    def _open(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("this ElasticBuffer was destroyed")
        return self._backend

    @contextmanager
    def _counting_refusals(self, call: str) -> Iterator[None]:
        """Around what may end a collective call on this rank alone: whoever catches the error and goes on must not meet
        what the peers called this time with what it calls next."""
        backend = self._open()
        try:
            yield
        except CommunicationError:
            raise  # the backend has given up already
        except BaseException as error:
            backend.refuse(call, error)
            raise

    @_collective
    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Wait until every rank of the group is here.

        Args:
            use_comm_stream, sequential: accepted for compatibility; operations of a buffer always run one by one.
            with_cpu_sync: on a GPU, return only then; otherwise the current stream waits. The host always does.

        Raises:
            CommunicationError: a peer died or did not come within the timeout.
        """
        backend = self._open()
        backend.barrier()
        if with_cpu_sync and backend.device.type == "cuda":
            torch.cuda.current_stream(backend.device).synchronize()
            backend.capture().current_stream_wait()

    capture = _Capture()

    def get_comm_stream(self) -> Any:
        """The stream of asynchronous operations: none on the host (`torch.cuda.stream(None)` does nothing)."""
        return self._open().comm_stream()

    def get_combine_buffer(self, handle: EPHandle, hidden: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Where experts may write their output so that `combine` need not copy it; on the host, any tensor.

        Combine then reads every expert row from where it lies and rounds once. One such buffer is in use at a time:
        it holds data from this call to the end of the next combine.

        Args:
            handle: of a dispatch in the expanded layout. hidden: values per row.

        Returns:
            `[N, hidden]`, N as dispatch returned it; contents undefined.

        Raises:
            ValueError: the handle is of the compact layout. BufferSizeError: N rows do not fit.
        """
        backend = self._open()
        route = self._check_handle(handle)
        if not handle.do_expand:
            raise ValueError("get_combine_buffer needs a handle of the expanded layout (do_expand=True)")
        return backend.combine_buffer(route, hidden, dtype)

    # ---- operations ---------------------------------------------------------------------------------------------

    @_collective
    @torch.no_grad()
    def dispatch(
        self,
        x: torch.Tensor | Fp8Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event | None = None,
        previous_event_before_epilogue: Event | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        *,
        use_fp8: bool = False,
    ) -> tuple[torch.Tensor | Fp8Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Send every token to the ranks of its experts, once per rank.

        Args:
            x: `[T, H]` fp32, bf16 or fp16; or a pair of e4m3 `[T, H]` and its scales, fp32 `[T, ceil(H / 128)]` or
                int32 `[T, ceil(H / 512)]` (four packed UE8M0 exponents).
            topk_idx: int64 `[T, K]`, experts of each token, -1 = none. Not with `handle`.
            topk_weights: fp32 `[T, K]`.
            cumulative_local_expert_recv_stats: int32 or int64 `[E_local]`; the rows of each local expert are added.
            num_experts: experts over all ranks; needed without `handle`.
            num_max_tokens_per_rank: default: the buffer's.
            expert_alignment: rows of each local expert are counted (and, expanded, laid out) in multiples of this.
            num_sms: most thread blocks of any kernel of this operation; 0 = `get_theoretical_num_sms`.
            num_qps, allocate_on_comm_stream: accepted for compatibility.
            previous_event, previous_event_before_epilogue: waited for before the data is read, or written.
            async_with_compute_stream: return at once; the outputs hold data after `event.current_stream_wait()`.
            handle: repeat the routing of an earlier dispatch (same layout) with other data.
            do_handle_copy: keep a copy of `topk_idx` in the handle, so that the caller may overwrite it.
            do_cpu_sync: True = outputs of exact size. False = worst-case size, real rows first; the rest has experts -1
                and weights 0, and holds zeros on the host backend, anything on the cuda backend. Default: True without
                a handle; with one: as its dispatch had it.
            do_expand: a row per (token, local expert), in expert order, instead of one per token.
            do_zero_padding: zero the rows of the expanded layout that belong to no token; otherwise they hold anything.
            use_tma_aligned_col_major_sf: return the scales column-major, columns padded to 16 bytes.
            use_fp8: cast `x` (fp32, bf16 or fp16) to e4m3 on its way, as `quant.per_token_cast_to_fp8` does; recv_x is
                then the pair of e4m3 rows and fp32 scales.

        Returns:
            recv_x: as `x`, `[R, H]` compact or `[N, H]` expanded.
            recv_topk_idx: int64 `[R, K]`, local expert or -1; None if expanded.
            recv_topk_weights: fp32 `[R, K]` (0 where the expert is elsewhere) or `[N]`; None without `topk_weights`.
            handle: for `combine` and cached dispatches.
            event: the end of the operation.

        Raises:
            TypeError, ValueError: an argument has a wrong type, dtype, shape or value; nothing was sent.
            BufferSizeError: more than the buffer was made for; nothing was sent. Or, between nodes, more rows came to
                this rank than it has room for; the buffer can't be used any more, and its peers raise, too.
            CommunicationError: a peer died, did not answer within the timeout, or called with other arguments.
        """
        backend = self._open()
        x_TH, scales = self._check_rows(x)
        if use_fp8 and scales is not None:
            raise TypeError(f"use_fp8 = True: x is {x_TH.dtype} already")
        route: Route | None
        if handle is None:
            topk_idx, num_experts = self._check_routing(x_TH, topk_idx, num_experts)
            alignment = 1 if expert_alignment is None else expert_alignment
            limit = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
            exact = do_cpu_sync is None or bool(do_cpu_sync)
            route = None
            if alignment < 1:
                raise ValueError(f"expert_alignment = {alignment}: must be 1 or more")
            if limit < 0 or not (exact or limit):
                raise ValueError(
                    f"num_max_tokens_per_rank = {limit}: must be positive with do_cpu_sync=False, whose output sizes "
                    "follow from it"
                )
            if backend.needs_limit and not limit:
                raise ValueError(
                    "num_max_tokens_per_rank = 0: the cuda backend needs the most tokens that any rank dispatches, "
                    "here or when the buffer is made"
                )
        else:
            route = self._check_handle(handle)
            same = {
                "topk_idx": (topk_idx, None),
                "num_experts": (num_experts, handle.num_experts),
                "expert_alignment": (expert_alignment, handle.expert_alignment),
                "num_max_tokens_per_rank": (num_max_tokens_per_rank, handle.num_max_tokens_per_rank),
                "do_cpu_sync": (do_cpu_sync or None, None),
                "do_expand": (do_expand, handle.do_expand),
                "cumulative_local_expert_recv_stats": (cumulative_local_expert_recv_stats, None),
            }
            for name, (value, needed) in same.items():
                if value is not None and (needed is None or value != needed):
                    allowed = "must not be given" if needed is None else f"the handle has {needed}"
                    shown = "a tensor" if isinstance(value, torch.Tensor) else value
                    raise ValueError(f"{name} = {shown} with a cached handle: {allowed}")
            topk_idx, num_experts, alignment = handle.topk_idx, handle.num_experts, handle.expert_alignment
            limit, exact = handle.num_max_tokens_per_rank, handle._exact
        self._check_size(x_TH, topk_idx, limit, num_experts, FP8 if scales is not None or use_fp8 else x_TH.dtype)
        if x_TH.shape[0] != topk_idx.shape[0]:
            raise ValueError(f"x has {x_TH.shape[0]} tokens, topk_idx has {topk_idx.shape[0]}")
        if topk_weights is not None:
            self._check_tensor("topk_weights", topk_weights, (torch.float32,), tuple(topk_idx.shape))
        num_local_experts = num_experts // self.num_ranks
        if cumulative_local_expert_recv_stats is not None:
            self._check_tensor(
                "cumulative_local_expert_recv_stats",
                cumulative_local_expert_recv_stats,
                (torch.int32, torch.int64),
                (num_local_experts,),
            )
        if do_zero_padding and not do_expand:
            raise ValueError("do_zero_padding = True: only the expanded layout (do_expand=True) has gaps")
        previous = [event for event in (previous_event, previous_event_before_epilogue) if event is not None]

        received = backend.dispatch(
            x_TH,
            scales,
            topk_idx,
            topk_weights if topk_weights is None else _dense(topk_weights),
            num_experts=num_experts,
            num_max_tokens_per_rank=limit,
            alignment=alignment,
            exact=exact,
            expand=do_expand,
            zero_padding=do_zero_padding,
            statistics=cumulative_local_expert_recv_stats,
            route=route,
            use_fp8=use_fp8,
            column_major_scales=use_tma_aligned_col_major_sf,
            copy_routing=do_handle_copy,
            num_sms=self._sms(num_sms, num_experts, topk_idx.shape[1]),
            previous=previous,
            asynchronous=async_with_compute_stream,
        )
        if handle is None:
            handle = EPHandle(
                owner=backend,
                route=received.route,
                do_expand=do_expand,
                topk_idx=received.route.topk_idx_TK,
                num_experts=num_experts,
                expert_alignment=alignment,
                num_max_tokens_per_rank=received.route.num_max_tokens_per_rank,
                num_sms=num_sms,
                num_recv_tokens=received.num_recv_rows,
                num_expanded_tokens=received.num_expanded_rows,
                exact=exact,
            )
        if not async_with_compute_stream:
            received.event.current_stream_wait()
        recv_x = received.x if received.scales is None else (received.x, received.scales)
        return recv_x, received.topk_idx, received.topk_weights, handle, EventOverlap(received.event)

    @_collective
    @torch.no_grad()
    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Event | None = None,
        previous_event_before_epilogue: Event | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Sum the rows of each token back on the rank that it came from; the reverse of `dispatch`.

        The sum is unweighted and runs in fp32: the bias first, then the rows in top-k order.

        Args:
            x: fp32, bf16 or fp16 `[R, H]` or `[N, H]`, rows as dispatch with `handle` returned them.
            handle: what dispatch returned.
            topk_weights: fp32 `[R, K]` or `[N]`; each value goes back to the (token, top-k position) it belongs to.
            bias: one or two `[T, H]` of x's dtype, added to the result.
            num_sms: most thread blocks of any kernel of this operation; 0 = `get_theoretical_num_sms`.
            num_qps, allocate_on_comm_stream: accepted for compatibility.
            previous_event, previous_event_before_epilogue: waited for before the data is read, or written.
            async_with_compute_stream: return at once; the outputs hold data after `event.current_stream_wait()`.

        Returns:
            combined_x `[T, H]`; combined_topk_weights fp32 `[T, K]` (0 where topk_idx is -1) or None; the event.

        Raises:
            TypeError, ValueError: an argument has a wrong type, dtype, shape or value; nothing was sent.
            CommunicationError: a peer died or did not answer within the timeout.
        """
        backend = self._open()
        route = self._check_handle(handle)
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        self._check_tensor("x", x, backend.dtypes, (handle.num_rows, None))
        num_tokens, num_topk = handle.topk_idx.shape
        if topk_weights is not None:
            rows = handle.num_rows
            shape = (rows,) if handle.do_expand else (rows, num_topk)
            self._check_tensor("topk_weights", topk_weights, (torch.float32,), shape)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        if len(biases) > 2:
            raise ValueError(f"bias is a tuple of {len(biases)}: at most two tensors")
        for tensor in biases:
            self._check_tensor("bias", tensor, (x.dtype,), (num_tokens, x.shape[1]))
        combined, weights, finish = backend.combine(
            _dense(x),
            None if topk_weights is None else _dense(topk_weights),
            [_dense(tensor) for tensor in biases],
            route,
            expanded=handle.do_expand,
            num_sms=self._sms(num_sms, handle.num_experts, num_topk),
            previous=[event for event in (previous_event, previous_event_before_epilogue) if event is not None],
            asynchronous=async_with_compute_stream,
        )
        if not async_with_compute_stream:
            finish.current_stream_wait()
        return combined, weights, EventOverlap(finish)

    # ---- Engram: one table, its rows spread over the ranks -------------------------------------------------------

    @staticmethod
    def get_engram_storage_size_hint(
        num_entries: int, hidden: int, num_max_tokens_per_rank: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[int, int]:
        """(GPU bytes for the rows of a fetch, CPU bytes for this rank's part of a table), multiples of 2 MiB.

        A buffer for both is `ElasticBuffer(group, num_bytes=gpu + cpu, num_cpu_bytes=cpu)`, whose table lies in CPU
        memory. On the cuda backend a fetch takes no memory of the buffer, and one with neither of the two keeps its
        table in GPU memory.

        Args:
            num_entries: rows of each rank. hidden: values of a row.
            num_max_tokens_per_rank: most rows that a rank fetches at once, duplicates counted once.
            dtype: of the values; e4m3 is sized with a scale factor for every 128 values.
        """
        row = sizing.engram_row_bytes(hidden, dtype.itemsize, dtype == FP8)
        gpu, cpu = row * num_max_tokens_per_rank, row * num_entries
        return sizing.align(gpu, sizing.BUFFER_ALIGNMENT), sizing.align(cpu, sizing.BUFFER_ALIGNMENT)

    @_collective
    @torch.no_grad()
    def engram_write(self, storage: torch.Tensor, sf: torch.Tensor | None = None, *, num_sms: int = 0) -> None:
        """Make `storage` this rank's part of the table. Every rank calls it, with as many rows.

        Row r of the table is row r % num_entries of rank r // num_entries. Fetches that started before still return the
        old rows, later ones the new. On the cuda backend a table of another kind gets memory of its own, and that of
        the one before stays until `destroy`: CUDA graphs and `engram_storage` may go on reading it.

        Args:
            storage: `[num_entries, H]` bf16, fp16, fp32, or e4m3; copied.
            sf: scale factors of e4m3, fp32 or int32 (four packed UE8M0) `[num_entries, S]`, any S. A row's travel with
                it. The scales of all ranks `[ranks * num_entries, S]`, which DeepEP V2 keeps on each, are taken, too:
                this rank's part is kept.
            num_sms: most thread blocks of any kernel of this table's operations from now on; 0 = 16 (unused on the
                host).

        Raises:
            TypeError, ValueError, BufferSizeError: wrong dtype, shape or number of SMs, or above `num_cpu_bytes`;
                nothing was sent. RuntimeError: a CUDA graph is being captured, or a rank has not so much memory.
            UnavailableError: on every rank, with `num_cpu_bytes` on the cuda backend: the ranks are on several nodes,
                or can't open each other's CPU memory.
            CommunicationError: a peer died, did not answer within the timeout, or has rows of another kind.
        """
        engram = self._open().engram
        self._check_tensor("storage", storage, (*self._open().dtypes, FP8), (None, None))
        entries, hidden = storage.shape
        if not storage.numel():
            raise ValueError(f"storage has shape {list(storage.shape)}: must have 1 row and 1 value or more")
        if sf is not None and sf.dim() == 2 and sf.shape[0] == self.num_ranks * entries:
            sf = sf[self.rank_idx * entries :][:entries]
        sf = self._check_scales(storage, sf, None)
        columns, kind = (0, None) if sf is None else (sf.shape[1], sf.dtype)
        table = EngramTable(entries, hidden, storage.dtype, columns, kind)
        needed = entries * table.layout.stride
        if self.num_cpu_bytes and needed > self.num_cpu_bytes:
            raise BufferSizeError(f"storage needs {needed} bytes, num_cpu_bytes is {self.num_cpu_bytes}")
        self._check_sms(num_sms, "as few as do")
        engram.write(table, _dense(storage), sf, num_sms)

    @_collective
    @torch.no_grad()
    def engram_update(self, rows: torch.Tensor, storage: torch.Tensor, sf: torch.Tensor | None = None) -> None:
        """Replace some rows of this rank's part of the table, as `engram_write` does all. Every rank calls it.

        Args:
            rows: int64 `[U]` in 0..num_entries - 1, each at most once; may be empty.
            storage, sf: `[U, H]` and `[U, S]`, of the table's dtypes.

        Raises:
            TypeError, ValueError: an argument has a wrong dtype, shape or value. RuntimeError: no table was written.
            CommunicationError: a fetch that started before has failed.
        """
        table = self._engram_table("engram_update")
        self._check_tensor("rows", rows, (torch.int64,), (None,))
        self._check_tensor("storage", storage, (table.dtype,), (rows.numel(), table.hidden))
        self._check_range("rows", rows, 0, table.rows - 1, "a row of this rank")
        if rows.device.type == "cpu" and rows.unique().numel() < rows.numel():
            values, counts = rows.unique(return_counts=True)
            raise ValueError(f"rows names row {int(values[counts > 1][0])} more than once")
        self._open().engram.update(rows, _dense(storage), self._check_scales(storage, sf, table))

    @property
    def engram_storage(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's part of the table and its scales, as they lie in the buffer: change them by the calls above only.

        Tensors of the buffer's device even where their memory is the CPU's: what a GPU does there goes over the bus.

        Raises:
            RuntimeError: no table was written.
        """
        self._engram_table("engram_storage")
        return self._open().engram.storage()

    @_collective
    @torch.no_grad()
    def engram_fetch(
        self, indices: torch.Tensor, num_qps: int = 0, use_tma_aligned_col_major_sf: bool = False
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """Start to fetch rows of the table, each distinct row once; returns at once.

        Every rank calls it equally often, be it with no index. Hooks may be called in any order, or not at all; owners
        answer while they compute.

        Args:
            indices: int32 or int64 `[T]` or `[T, K]`: rows of the whole table, -1 = zeros.
            num_qps: accepted for compatibility.
            use_tma_aligned_col_major_sf: return the scales column-major, columns padded to 16 bytes.

        Returns:
            hook: waits for the rows; returns data `[T * K, H]` (as DeepEP says; its code gives `[T, K * H]`, the same
            memory) and, for an e4m3 table, their scales `[T, K * S]`, else None. Every call returns the same tensors.

        Raises:
            TypeError, ValueError, BufferSizeError: wrong dtype, shape or value, or more than the buffer was made for;
                nothing was sent. RuntimeError: no table was written.
            CommunicationError: from here or from the hook: a peer died or did not answer within the timeout.
        """
        table = self._engram_table("engram_fetch")
        indices_N = self._check_indices(indices, table)
        room, stride = self.num_bytes - self.num_cpu_bytes, table.layout.stride
        if self.num_cpu_bytes and self._open().name == "host" and indices_N.numel() * stride > room:
            distinct = indices_N[indices_N >= 0].unique().numel()
            if distinct * stride > room:
                raise BufferSizeError(
                    f"indices name {distinct} distinct rows: they need {distinct * stride} bytes, the buffer has "
                    f"{room} beside num_cpu_bytes"
                )
        hook = self._open().engram.fetch(indices_N)
        if not table.scale_columns:
            return hook
        tokens = indices.shape[0]
        columns = table.scale_columns * (indices.shape[1] if indices.dim() == 2 else 1)
        arranged: list[torch.Tensor] = []

        def hook_with_scales() -> tuple[torch.Tensor, torch.Tensor | None]:
            data, scales = hook()
            assert scales is not None
            if not arranged:
                scales = scales.view(tokens, columns)
                if use_tma_aligned_col_major_sf:
                    padded = scales.new_zeros(columns, sizing.align(tokens, 4)).t()[:tokens]
                    scales = padded.copy_(scales)
                arranged.append(scales)
            return data, arranged[0]

        return hook_with_scales

    @_collective
    @torch.no_grad()
    def engram_reduce(
        self, indices: torch.Tensor, gradients: torch.Tensor
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Start to send rows' gradients to their owners and to sum them; the backward of `engram_fetch`.

        Every rank calls it equally often. Sums run in fp32: first over a rank's entries of a row, in order, then over
        the ranks, in order.

        Args:
            indices: as there; -1 is left out.
            gradients: `[T * K, H]` bf16, fp16 or fp32.

        Returns:
            hook: waits for all ranks; returns int64 rows of this rank `[U]`, ascending, and their sums fp32 `[U, H]`.

        Raises:
            As `engram_fetch`.
        """
        table = self._engram_table("engram_reduce")
        indices_N = self._check_indices(indices, table)
        self._check_tensor("gradients", gradients, self._open().dtypes, (indices_N.numel(), table.hidden))
        return self._open().engram.reduce(indices_N, _dense(gradients))

    def _engram_table(self, call: str) -> EngramTable:
        table = self._open().engram.table
        if table is None:
            raise RuntimeError(f"{call} before engram_write: this buffer has no table yet")
        return table

    def _check_indices(self, indices: torch.Tensor, table: EngramTable) -> torch.Tensor:
        """int64 `[T * K]`, a copy that the caller can't change."""
        if isinstance(indices, torch.Tensor) and indices.dim() != 1:
            self._check_tensor("indices", indices, (torch.int32, torch.int64), (None, None))
        else:
            self._check_tensor("indices", indices, (torch.int32, torch.int64), (None,))
        self._check_range("indices", indices, -1, self.num_ranks * table.rows - 1, "-1 (zeros) or a row of the table")
        return indices.reshape(-1).to(torch.int64, copy=True)

    def _check_range(self, name: str, values: torch.Tensor, low: int, high: int, what: str) -> None:
        # On a GPU the kernel looks at the values: reading them here would make the host wait.
        if values.numel() and values.device.type == "cpu":
            smallest, largest = (int(v) for v in values.aminmax())
            if smallest < low or largest > high:
                position = ((values < low) | (values > high)).nonzero()[0].tolist()
                raise ValueError(
                    f"{name}[{', '.join(map(str, position))}] = {int(values[tuple(position)])}: must be {what}, "
                    f"{max(low, 0)}..{high}"
                )

    def _check_scales(
        self, storage: torch.Tensor, sf: torch.Tensor | None, table: EngramTable | None
    ) -> torch.Tensor | None:
        if (sf is not None) != (storage.dtype == FP8):
            given = "not given" if sf is None else "given"
            raise ValueError(f"sf is {given}, storage is {storage.dtype}: e4m3 needs scale factors, others have none")
        if sf is None:
            return None
        kinds = (torch.float32, torch.int32) if table is None or table.scale_dtype is None else (table.scale_dtype,)
        columns = None if table is None else table.scale_columns
        self._check_tensor("sf", sf, kinds, (storage.shape[0], columns))
        if sf.shape[1] == 0:
            raise ValueError(f"sf has shape {list(sf.shape)}: must have 1 column or more")
        return _dense(sf)

    # ---- checks -------------------------------------------------------------------------------------------------

    def _check_sms(self, num_sms: int, what_zero_is: str) -> None:
        most = self._open().num_sms
        if num_sms < 0 or (most and num_sms > most):
            allowed = f"to the device's {most}" if most else "or more"
            raise ValueError(f"num_sms = {num_sms}: must be 0 ({what_zero_is}) {allowed}")

    def _sms(self, num_sms: int, num_experts: int, num_topk: int) -> int:
        self._check_sms(num_sms, "by the model")
        return num_sms or self.get_theoretical_num_sms(num_experts, num_topk)

    def _check_rows(self, x: torch.Tensor | Fp8Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(x, torch.Tensor):
            self._check_tensor("x", x, self._open().dtypes, (None, None))
            if x.shape[1] == 0:
                raise ValueError(f"x has shape {list(x.shape)}: the hidden size must be 1 or more")
            return _dense(x), None
        if not (isinstance(x, tuple) and len(x) == 2 and all(isinstance(t, torch.Tensor) for t in x)):
            raise TypeError(f"x must be a tensor or a pair of e4m3 tensor and scales, got {type(x).__name__}")
        rows, scales = x
        self._check_tensor("x[0]", rows, (FP8,), (None, None))
        if scales.dtype not in (torch.float32, torch.int32):
            raise TypeError(f"x[1] is {scales.dtype}: scales must be torch.float32 or torch.int32 (packed UE8M0)")
        columns = sizing.scale_columns(rows.shape[1], packed=scales.dtype == torch.int32)
        self._check_tensor("x[1]", scales, (scales.dtype,), (rows.shape[0], columns))
        return _dense(rows), _dense(scales)

    def _check_routing(
        self, x_TH: torch.Tensor, topk_idx: torch.Tensor | None, num_experts: int | None
    ) -> tuple[torch.Tensor, int]:
        if topk_idx is None or num_experts is None:
            raise ValueError("dispatch needs topk_idx and num_experts, or a cached handle")
        if num_experts < 1 or num_experts % self.num_ranks:
            raise ValueError(f"num_experts = {num_experts}: must be a multiple of the {self.num_ranks} ranks")
        self._check_tensor("topk_idx", topk_idx, (torch.int64,), (x_TH.shape[0], None))
        if not 1 <= topk_idx.shape[1] <= num_experts:
            raise ValueError(f"topk_idx has top-k {topk_idx.shape[1]}: must be 1 to {num_experts} (num_experts)")
        # On a GPU the kernel looks at the values: reading them here would make the host wait.
        if topk_idx.numel() and topk_idx.device.type == "cpu":
            smallest, largest = (int(v) for v in topk_idx.aminmax())
            if smallest < -1 or largest >= num_experts:
                bad = (topk_idx < -1) | (topk_idx >= num_experts)
                token, position = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"topk_idx[{token}, {position}] = {int(topk_idx[token, position])}: must be -1 (none) or an "
                    f"expert in 0..{num_experts - 1}"
                )
        return _dense(topk_idx), num_experts

    def _check_handle(self, handle: EPHandle) -> Route:
        if not isinstance(handle, EPHandle):
            raise TypeError(f"handle must be an EPHandle, got {type(handle).__name__}")
        if handle._owner is not self._backend:
            raise ValueError("handle comes from another ElasticBuffer")
        return handle._route

    def _check_size(
        self, x_TH: torch.Tensor, topk_idx: torch.Tensor, limit: int, num_experts: int, row: torch.dtype
    ) -> None:
        num_tokens, hidden = x_TH.shape
        num_topk = topk_idx.shape[1]
        if limit and num_tokens > limit:
            raise BufferSizeError(
                f"x has {num_tokens} tokens, num_max_tokens_per_rank is {limit}: make the buffer (or call dispatch) "
                f"with at least {num_tokens}"
            )
        if self.hidden and hidden > self.hidden:
            raise BufferSizeError(f"x has hidden size {hidden}, the buffer was made for at most {self.hidden}")
        if self.num_topk and num_topk > self.num_topk:
            raise BufferSizeError(f"topk_idx has top-k {num_topk}, the buffer was made for at most {self.num_topk}")
        self._open().check_size(
            num_tokens=num_tokens,
            max_tokens=limit,
            num_topk=num_topk,
            num_experts=num_experts,
            hidden=hidden,
            row=row,
        )

    def _check_tensor(
        self, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
    ) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} is {tensor.dtype}: must be {' or '.join(str(d) for d in dtypes)}")
        self._check_device(name, tensor)
        fits = tensor.dim() == len(shape) and all(
            want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise ValueError(f"{name} has shape {list(tensor.shape)}: must be [{wanted}]")

    def _check_device(self, name: str, tensor: torch.Tensor) -> None:
        backend = self._open()
        if tensor.device != backend.device:
            takes = "CPU tensors" if backend.device.type == "cpu" else f"tensors on {backend.device}"
            raise ValueError(f"{name} is on {tensor.device}: the {backend.name} backend takes {takes}")

    # ---- point-to-point, all-gather and reduce-scatter ----------------------------------------------------------

    @staticmethod
    @_deepep_names(num_max_tensor_bytes="max_tensor_bytes", num_max_inflight_tensors="max_inflight")
    def get_pp_buffer_size_hint(
        max_tensor_bytes: int, max_inflight: int, num_peers: int = 2, *, max_inplace: int = 0
    ) -> int:
        """Bytes for `pp_set_config` with these values and `num_peers` ranks to exchange with, each of which sends on
        two channels; a multiple of 2 MiB."""
        _check_positive(num_peers=num_peers)
        return _ring_bytes(max_tensor_bytes, max_inflight, 2 * num_peers, max_inplace)

    @_collective
    @_deepep_names(num_max_tensor_bytes="max_tensor_bytes", num_max_inflight_tensors="max_inflight")
    def pp_set_config(
        self, max_tensor_bytes: int, max_inflight: int, *, max_inplace: int = 0, max_senders: int = 4
    ) -> None:
        """Make `pp_send` and `pp_recv` ready. Every rank calls it, with the same values; earlier sends are completed.

        Args:
            max_tensor_bytes: largest tensor.
            max_inflight: tensors on their way from one rank to another, per channel, before `pp_send` blocks (on a GPU:
                before the stream of such sends does).
            max_inplace: tensors of `pp_recv_inplace` that may lie at once where they have arrived, each of which takes
                `max_tensor_bytes` of every rank's GPU; 0 = all are copied out of a ring, once more.
            max_senders: (rank, channel) pairs that may send to a rank, and that it may send to; for each, a rank's GPU
                sets a ring of `max_inflight` tensors aside. More, if `num_bytes` of the buffer has room for more. Who
                sends first takes a ring; a sender that finds none is refused. The host has no such limit.

        Raises:
            TypeError, ValueError: a value is no int, or too small. BufferSizeError: more than the buffer's `num_bytes`.
            RuntimeError: on a GPU, somebody has tensors of `pp_recv_inplace`.
            CommunicationError: another rank came with other values, or a peer died or did not come in time.
        """
        _check_positive(max_senders=max_senders)
        needed = _ring_bytes(max_tensor_bytes, max_inflight, max_senders, max_inplace)
        if self._limit_bytes is not None and needed > self._limit_bytes:
            inplace = f" and {max_inplace} in place" if max_inplace else ""
            raise BufferSizeError(
                f"the buffer has {self._limit_bytes} bytes, {max_inflight} tensors of {max_tensor_bytes} bytes in "
                f"flight{inplace} need {needed}"
            )
        self._open().point_to_point.configure(max_tensor_bytes, max_inflight, max_inplace, max_senders)
        self._max_tensor_bytes = max_tensor_bytes

    @_deepep_names(dst_rank_idx="dst_rank")
    def pp_send(
        self,
        t: torch.Tensor,
        dst_rank: int,
        num_sms: int = 0,
        *,
        channel: int = 0,
        async_with_compute_stream: bool = False,
    ) -> EventOverlap:
        """Send a tensor of any shape and dtype to any other rank.

        The n-th send to a rank on a channel meets the n-th `pp_recv` there, which must name the same shape and dtype.
        Calls that raise TypeError or ValueError do not count.

        Args:
            t: on return the caller may overwrite it; with `async_with_compute_stream` only after the event, but its
                memory is held till then, so that he may drop it.
            dst_rank: rank in the group.
            num_sms: GPU tuning (unused: no transfer takes SMs; on the legacy default stream the driver copies up to
                1 MiB inside a device by SMs).
            channel: 0 to 3; tensors of one channel keep their order, channels do not wait for each other.
            async_with_compute_stream: do not copy `t`.

        Returns:
            The event at which the peer has the tensor.

        Raises:
            TypeError, ValueError, BufferSizeError: a wrong argument; nothing was sent. RuntimeError: no pp_set_config.
            CommunicationError: the peer died, or took none of the last `max_inflight` tensors within the timeout. On a
                GPU streams wait instead of the host: the error comes at the first call after it is known.
        """
        self._check_transfer("dst_rank", t, dst_rank, channel)
        event = self._open().point_to_point.send(t, dst_rank, channel, copy=not async_with_compute_stream)
        return EventOverlap(event)

    @_deepep_names(src_rank_idx="src_rank")
    def pp_recv(
        self,
        t: torch.Tensor,
        src_rank: int,
        num_sms: int = 0,
        *,
        channel: int = 0,
        async_with_compute_stream: bool = False,
    ) -> EventOverlap:
        """Receive into `t` what `src_rank` sends by `pp_send`; arguments as there.

        Returns:
            The event after which `t` holds data; waited for already unless `async_with_compute_stream`.

        Raises:
            As `pp_send`; CommunicationError also where a tensor of another shape or dtype came. Both ranks raise then.
        """
        self._check_transfer("src_rank", t, src_rank, channel)
        event = self._open().point_to_point.receive(t, src_rank, channel, wait=not async_with_compute_stream)
        return EventOverlap(event)

    def pp_recv_inplace(
        self, shape: Sequence[int], dtype: torch.dtype, src_rank: int, *, channel: int = 0
    ) -> tuple[torch.Tensor, EventOverlap]:
        """Receive into a new tensor what `src_rank` sends by `pp_send`, as the next receive from it on the channel.

        On a GPU, inside a node, the sender copies straight into the tensor if that has 1 MiB or more, is not the first
        one between the two on the channel, and one of `max_inplace` slots is free when the first of the two comes to it
        (a receive at most 64 such tensors ahead of its send; a send likewise, if the last such receive on the channel
        was one in place, too); otherwise it is copied out of a ring, as by `pp_recv`. A
        slot is free again once both the tensor and its event are dropped and the streams that waited for the event have
        come that far, which receives and `pp_flush` look for. Asynchronous operations of buffers are waited for, too;
        for any other stream that uses the tensor let these wait, as torch's `record_stream` does nothing here.

        Returns:
            The tensor, of the memory of this buffer maybe, which goes with it (`destroy` warns); and the event after
            which it holds data. It must not be written to or read before.

        Raises:
            As `pp_recv`.
        """
        self._check_rings()
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        try:
            sizes = torch.Size(shape)
        except TypeError as error:
            raise TypeError(f"shape = {shape!r}: must be a sequence of ints") from error
        if any(size < 0 for size in sizes):
            raise ValueError(f"shape = {list(sizes)}: sizes must be 0 or more")
        self._check_peer("src_rank", src_rank, channel, math.prod(sizes) * dtype.itemsize, "the tensor")
        tensor, event = self._open().point_to_point.receive_inplace(sizes, dtype, src_rank, channel)
        return tensor, EventOverlap(event)

    def pp_flush(self) -> None:
        """Wait until everything sent by `pp_send` has arrived. Raises CommunicationError as `pp_send`."""
        self._open().point_to_point.flush()

    def _check_transfer(self, name: str, t: torch.Tensor, peer: int, channel: int) -> None:
        self._check_rings()
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"t must be a tensor, got {type(t).__name__}")
        self._check_device("t", t)
        if t.is_conj() or t.is_neg():
            raise ValueError("t is a conjugated or negated view: must be resolved (resolve_conj, resolve_neg)")
        self._check_peer(name, peer, channel, t.nbytes, "t")

    def _check_rings(self) -> None:
        if not self._max_tensor_bytes:
            raise RuntimeError("call pp_set_config before pp_send and pp_recv")

    def _check_peer(self, name: str, peer: int, channel: int, num_bytes: int, what: str) -> None:
        _check_ints(**{name: peer, "channel": channel})
        if not 0 <= peer < self.num_ranks or peer == self.rank_idx:
            raise ValueError(
                f"{name} = {peer}: must be another rank of the group (0 to {self.num_ranks - 1}, not {self.rank_idx})"
            )
        if not 0 <= channel < NUM_CHANNELS:
            raise ValueError(f"channel = {channel}: must be 0 to {NUM_CHANNELS - 1}")
        if num_bytes > self._max_tensor_bytes:
            raise BufferSizeError(
                f"rank {self.rank_idx}, {name} {peer}: {what} has {num_bytes} bytes, pp_set_config allowed "
                f"{self._max_tensor_bytes}"
            )

    @staticmethod
    def get_agrs_num_max_session_bytes(
        group: dist.ProcessGroup, shapes: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype
    ) -> int:
        """Bytes of a session that gathers one tensor of each of `shapes` (one shape, or several) from every rank."""
        ranks = dist.get_world_size(group)
        return sum(sizing.session_bytes(ranks, shape, dtype.itemsize) for shape in _shapes(shapes)[0])

    @staticmethod
    @_deepep_names(num_max_session_bytes="max_session_bytes")
    def get_agrs_buffer_size_hint(group: dist.ProcessGroup, max_session_bytes: int) -> int:
        """Bytes for `agrs_set_config` with `max_session_bytes`, a multiple of 2 MiB."""
        _check_positive(max_session_bytes=max_session_bytes)
        return sizing.align(max_session_bytes, sizing.BUFFER_ALIGNMENT)

    @_collective
    @_deepep_names(
        num_max_session_bytes="max_session_bytes", num_max_all_gathers_per_session="max_all_gathers_per_session"
    )
    def agrs_set_config(self, max_session_bytes: int, max_all_gathers_per_session: int, *, num_sms: int = 0) -> None:
        """Make all-gather sessions ready. Every rank calls it, with the same values.

        Args:
            max_session_bytes: of all gathered (or scattered) tensors of a session, each rounded up to 32.
            max_all_gathers_per_session: calls of `all_gather` and `reduce_scatter` in a session.
            num_sms: that a `reduce_scatter` may hold on a GPU; 0 = 8 (unused on the host). An `all_gather` holds none.

        Raises:
            As `pp_set_config`. RuntimeError: inside a session. ValueError: more SMs than the device has.
        """
        _check_positive(max_session_bytes=max_session_bytes, max_all_gathers_per_session=max_all_gathers_per_session)
        if self._limit_bytes is not None and max_session_bytes > self._limit_bytes:
            raise BufferSizeError(f"the buffer has {self._limit_bytes} bytes, the session needs {max_session_bytes}")
        backend = self._open()
        self._check_sms(num_sms, "8")
        backend.sessions.configure(max_session_bytes, max_all_gathers_per_session, num_sms)

    def create_agrs_session(self) -> None:
        """Begin a session; every rank does. RuntimeError: there is one, or no `agrs_set_config` yet."""
        self._open().sessions.begin()

    def destroy_agrs_session(self) -> None:
        """End the session, after everything in it. Gathered tensors hold data until the next session begins, on the
        current stream of that time; on the host, as long as they live."""
        self._open().sessions.end()

    @contextmanager
    def agrs_new_session(self, enabled: bool = True) -> Iterator[None]:
        """A session as long as the `with` block; none if not `enabled`."""
        if not enabled:
            yield
            return
        self.create_agrs_session()
        try:
            yield
        except BaseException:
            self._open().sessions.abandon()  # what is under way may never come
            raise
        self.destroy_agrs_session()

    @property
    def agrs_in_session(self) -> bool:
        """Whether there is a session."""
        return self._open().sessions.active

    def agrs_get_inplace_tensor(
        self, shapes: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Memory to write tensors into that `all_gather` then need not copy: one tensor for a shape, a tuple for
        several. RuntimeError: outside a session."""
        every, single = _shapes(shapes)
        slots = self._open().sessions.own_slots(every, dtype)
        return slots[0] if single else tuple(slots)

    @_collective
    @torch.no_grad()
    def all_gather(
        self,
        t: torch.Tensor | Sequence[torch.Tensor],
        *,
        keep: bool = False,
        out: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Start gathering a tensor, or several at once, from every rank; several calls may be under way.

        Args:
            t: contiguous, any dtype, the same shape on every rank; not to be changed before the wait.
            keep: the gathered tensors outlive the session on a GPU, too, where they are copied out of the window.
            out: where to, a dense `[ranks, *shape]` for each of `t`, which may be this rank's row of it; default: new.

        Returns:
            `(gathered, wait)`, or one gathered tensor for each of `t` and the wait: gathered is `[ranks, *shape]` and
            holds data after `wait()`.

        Raises:
            TypeError, ValueError: a wrong argument. RuntimeError: outside a session.
            BufferSizeError: more than `agrs_set_config` allowed.
            CommunicationError: (at the wait) another rank came with other tensors, died, or did not come in time.
        """
        tensors = self._check_group_of("t", t)
        targets = None
        if out is not None:
            targets = self._check_out(out, [(each.dtype, (self.num_ranks, *each.shape)) for each in tensors])
        gathered, wait = self._open().sessions.all_gather(tensors, keep, targets)
        return (*gathered, wait)

    @_collective
    @torch.no_grad()
    def reduce_scatter(
        self,
        t: torch.Tensor | Sequence[torch.Tensor],
        *,
        out: torch.Tensor | Sequence[torch.Tensor] | None = None,
        scale: float = 1.0,
    ) -> tuple[Any, ...]:
        """Start summing a tensor, or several at once, over the ranks; each rank gets its part of the sums.

        Sums run in fp32 (fp64 for fp64) in rank order and are rounded once: the same bits in every run.

        Args:
            t: floating, `[ranks, *shape]`: row p goes to rank p. Not to be changed before the wait.
            out: where to, one dense `[*shape]` for each of `t`, apart from it in memory; default: new.
            scale: factor on every sum, before it is rounded.

        Returns:
            `(reduced, wait)` or `(*reduced, wait)`, reduced `[*shape]`, dtype of `t`.

        Raises:
            As `all_gather`.
        """
        tensors = self._check_group_of("t", t)
        for tensor in tensors:
            if tensor.dim() == 0 or tensor.shape[0] != self.num_ranks:
                raise ValueError(f"t has shape {list(tensor.shape)}: must be [{self.num_ranks} ranks, ...]")
            if tensor.dtype not in (*self._open().dtypes, torch.float64):
                raise TypeError(f"t is {tensor.dtype}: must be a floating dtype of 16 bits or more")
        targets = None
        if out is not None:
            targets = self._check_out(out, [(each.dtype, tuple(each.shape[1:])) for each in tensors])
        reduced, wait = self._open().sessions.reduce_scatter(tensors, targets, scale)
        return (*reduced, wait)

    def _check_out(
        self,
        out: torch.Tensor | Sequence[torch.Tensor],
        wanted: list[tuple[torch.dtype, tuple[int, ...]]],
    ) -> list[torch.Tensor]:
        """The tensors to write to."""
        targets = self._check_group_of("out", out)
        if len(targets) != len(wanted):
            raise ValueError(f"out has {len(targets)} tensors: must be {len(wanted)}, one for each of t")
        for target, (dtype, shape) in zip(targets, wanted, strict=True):
            self._check_tensor("out", target, (dtype,), shape)
        return targets

    def _check_group_of(self, name: str, t: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        tensors = [t] if isinstance(t, torch.Tensor) else list(t)
        if not tensors:
            raise ValueError(f"{name} is empty: must be a tensor or some tensors")
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor or tensors, got {type(tensor).__name__}")
            self._check_device(name, tensor)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has shape {list(tensor.shape)} and strides {tensor.stride()}: must be dense")
        return tensors


def _agreed(group: dist.ProcessGroup, timeout_seconds: float, check: Callable[[], str]) -> str:
    """The backend that `check` finds, on every rank the same; what it raises on one rank, every rank hears of."""
    rank, phase = dist.get_rank(group), "creation of the buffer"
    kinds = Meeting(group, timeout_seconds).agree("arguments", check, phase)
    for peer, kind in enumerate(kinds):
        if kind != kinds[rank]:
            raise CommunicationError(rank, peer, phase, f"backend {kinds[rank]} as on this rank", f"backend {kind}")
    return kinds[rank]


def _check_sizes(num_bytes: int | None, sizes: dict[str, int], timeouts: dict[str, float]) -> None:
    for name, value in (sizes | {"num_bytes": 1 if num_bytes is None else num_bytes}).items():
        if not isinstance(value, SupportsIndex):
            raise TypeError(f"{name} = {value!r}: must be a whole number, got {type(value).__name__}")
    for name, seconds in timeouts.items():
        if not isinstance(seconds, SupportsFloat):
            raise TypeError(f"{name} = {seconds!r}: must be a number, got {type(seconds).__name__}")
        if seconds <= 0:
            raise ValueError(f"{name} = {seconds}: must be positive")
    for name, value in sizes.items():
        if value < 0:
            raise ValueError(f"{name} = {value}: must be 0 or more")
    if num_bytes is not None and num_bytes <= 0:
        raise ValueError(f"num_bytes = {num_bytes}: must be positive")
    num_cpu_bytes = sizes["num_cpu_bytes"]
    if num_cpu_bytes and (num_bytes is None or num_cpu_bytes > num_bytes):
        raise ValueError(f"num_cpu_bytes = {num_cpu_bytes}: must be a part of num_bytes, which is {num_bytes}")


def _check_positive(**values: int) -> None:
    _check_ints(**values)
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be positive")


def _check_ints(**values: int) -> None:
    for name, value in values.items():
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"{name} = {value!r}: must be an int") from None


def _ring_bytes(max_tensor_bytes: int, max_inflight: int, num_rings: int, max_inplace: int) -> int:
    _check_positive(max_tensor_bytes=max_tensor_bytes, max_inflight=max_inflight)
    _check_ints(max_inplace=max_inplace)
    if max_inplace < 0:
        raise ValueError(f"max_inplace = {max_inplace}: must be 0 or more")
    return sizing.ring_bytes(max_tensor_bytes, max_inflight, num_rings, max_inplace)


def _shapes(shapes: Sequence[int] | Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], bool]:
    """(every shape, whether only one was given and not a sequence of them)."""
    single = all(isinstance(size, int) for size in shapes)
    return [tuple(shape) for shape in ([shapes] if single else shapes)], single  # type: ignore[arg-type]


def resolve_backend(name: str) -> Literal["cuda", "host"]:
    """The backend that `name` ("auto", "cuda" or "host") stands for on this machine.

    Raises:
        ValueError: no such name. RuntimeError: that backend can't run here.
    """
    if name not in ("auto", "cuda", "host"):
        raise ValueError(f"backend = {name!r}: must be 'auto', 'cuda' or 'host'")
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "the cuda backend needs a CUDA device, and torch finds none; backend='host' takes CPU tensors anywhere"
        )
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "host"
    return "cuda" if name == "cuda" else "host"


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` row-major in memory. A size-1 dimension may keep any stride in what torch calls contiguous."""
    tensor = tensor.contiguous()
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
