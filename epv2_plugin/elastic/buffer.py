"""`ElasticBuffer`: expert-parallel dispatch and combine with DeepEP V2's call surface, over whichever backend fits."""

from __future__ import annotations

import hashlib
import socket
from typing import Any, Literal

import torch
import torch.distributed as dist

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.host import HostBackend, HostRoute, Traffic
from epv2_plugin.elastic.errors import BufferSizeError
from epv2_plugin.elastic.event import Event, EventOverlap, HostEvent
from epv2_plugin.elastic.handle import EPHandle

FP8 = torch.float8_e4m3fn
_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 4  # bytes per value of the widest dtype that the host backend takes

Fp8Rows = tuple[torch.Tensor, torch.Tensor]


class ElasticBuffer:
    """Dispatch tokens to the ranks of their experts and combine what the experts made of them.

    Every rank of `group` creates the buffer and calls its operations in the same order. Received rows are ordered by
    (source rank, source token), sums run in fp32 in top-k order: results are the same bits in every run.

    Args:
        group: ranks among which experts are spread; expert e lives on rank e // (num_experts / ranks).
        num_bytes: size of the buffer. On the host backend a limit only: nothing is allocated ahead.
        num_cpu_bytes: part of `num_bytes` in CPU memory (unused by the host backend).
        num_max_tokens_per_rank: most tokens that any rank dispatches at once; 0 = the ranks agree at each dispatch
            (host backend, `do_cpu_sync=True` only).
        hidden, num_topk: largest values per token and top-k; 0 = no limit set.
        use_fp8_dispatch: size the buffer for FP8 rows in dispatch.
        deterministic: accepted for compatibility; every operation is deterministic.
        allow_hybrid_mode: use two hops across nodes where that is faster (unused by the host backend: one hop always).
        allow_multiple_reduction: True = the expert's rank sums its rows of a token first and rounds to the row's dtype
            before it sends them; False = all rows travel and are rounded once.
        prefer_overlap_with_compute, sl_idx, num_allocated_qps: GPU and network tuning (unused by the host backend).
        num_cpu_timeout_secs: seconds after which a wait on the host gives up.
        num_gpu_timeout_secs: the same for waits in GPU kernels (unused by the host backend).
        explicitly_destroy: the caller promises to call `destroy()`; otherwise it happens at garbage collection.
        backend: "auto" takes "host" where there is no CUDA device.

    Attributes:
        group, rank_idx, num_ranks, num_bytes: as above. traffic: bytes sent so far.
        num_scaleout_ranks, num_scaleup_ranks, scaleout_rank_idx, scaleup_rank_idx: logical domain (hops).
        num_rdma_ranks, num_nvlink_ranks: physical domain (machines x ranks per machine).

    Raises:
        ValueError, TypeError: an argument is out of range. RuntimeError: the backend is not available here.
        CommunicationTimeout: not every rank created the buffer in time.
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
        for name, value in sizes.items():
            if value < 0:
                raise ValueError(f"{name} = {value}: must be 0 or more")
        if num_bytes is not None and num_bytes <= 0:
            raise ValueError(f"num_bytes = {num_bytes}: must be positive")
        if num_cpu_timeout_secs <= 0 or num_gpu_timeout_secs <= 0:
            raise ValueError(
                f"num_cpu_timeout_secs = {num_cpu_timeout_secs}, num_gpu_timeout_secs = {num_gpu_timeout_secs}: "
                "must be positive"
            )
        resolve_backend(backend)
        self.group = group
        self.rank_idx, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        self.use_fp8_dispatch, self.explicitly_destroy = use_fp8_dispatch, explicitly_destroy
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.num_allocated_qps = num_allocated_qps
        self._limit_bytes = num_bytes
        self.num_bytes = num_bytes or sizing.buffer_bytes(
            self.num_ranks, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, _WIDEST
        )
        self._backend: HostBackend | None = HostBackend(group, num_cpu_timeout_secs, allow_multiple_reduction)
        self.num_scaleout_ranks, self.num_scaleup_ranks = 1, self.num_ranks
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx
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
        """Bytes that a buffer for these sizes needs, a multiple of 2 MiB; `num_topk` 0 = unknown, sized for 32."""
        del allow_hybrid_mode, allow_multiple_reduction  # the host backend needs the same either way
        return sizing.buffer_bytes(
            dist.get_world_size(group), num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch, _WIDEST
        )

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(machines, ranks on each); (ranks, 1) where machines hold different numbers of them."""
        return self.num_rdma_ranks, self.num_nvlink_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(scale-out ranks, scale-up ranks) of the mode in use; the host backend makes one hop: (1, ranks)."""
        return self.num_scaleout_ranks, self.num_scaleup_ranks

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, **rates: float) -> int:
        """SMs that an operation should hold; the host backend holds none: 0."""
        return 0

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs for `num_sms` SMs; the host backend has none: 0."""
        return 0

    def describe(self) -> dict[str, Any]:
        """What runs: `backend`, `mode` (direct = one hop), `transport`, `sms` and `qps` that an operation holds."""
        self._open()
        return {"backend": "host", "mode": "direct", "transport": "gloo", "sms": 0, "qps": 0}

    def _find_machines(self) -> tuple[int, int]:
        name = hashlib.sha256(socket.gethostname().encode()).digest()
        machines = self._open().all_gather("creation of the buffer", int.from_bytes(name[:8], "big", signed=True))
        counts = {machines.count(machine) for machine in machines}
        return (len(set(machines)), counts.pop()) if len(counts) == 1 else (self.num_ranks, 1)

    # ---- life ---------------------------------------------------------------------------------------------------

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank sent to others so far."""
        return self._open().traffic

    def destroy(self) -> None:
        """Release the buffer; calling it again does nothing. Operations in flight must have been waited for."""
        backend, self._backend = getattr(self, "_backend", None), None
        if backend is not None:
            backend.close()

    def __del__(self) -> None:
        if dist.is_initialized():
            self.destroy()

    def _open(self) -> HostBackend:
        if self._backend is None:
            raise RuntimeError("this ElasticBuffer was destroyed")
        return self._backend

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Wait until every rank of the group is here. The arguments choose streams on a GPU.

        Raises:
            CommunicationError: a peer died or did not come within the timeout.
        """
        self._open().barrier()

    @staticmethod
    def capture() -> EventOverlap:
        """An event of what the current stream has been given so far; on the host that is done already."""
        return EventOverlap(HostEvent())

    def get_comm_stream(self) -> None:
        """The stream that communication runs on: none on the host (`torch.cuda.stream(None)` does nothing)."""
        self._open()

    # ---- operations ---------------------------------------------------------------------------------------------

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
            num_sms, num_qps, allocate_on_comm_stream: GPU tuning (unused by the host backend).
            previous_event, previous_event_before_epilogue: waited for before the data is read, or written.
            async_with_compute_stream: return at once; the outputs hold data after `event.current_stream_wait()`.
            handle: repeat the routing of an earlier dispatch (same layout) with other data.
            do_handle_copy: keep a copy of `topk_idx` in the handle, so that the caller may overwrite it.
            do_cpu_sync: True = outputs of exact size. False = worst-case size, real rows first, the rest zero (experts:
                -1). Default: True without a handle; with one: as its dispatch had it.
            do_expand: a row per (token, local expert), in expert order, instead of one per token.
            do_zero_padding: zero the alignment gaps of the expanded layout; otherwise they hold anything.
            use_tma_aligned_col_major_sf: return the scales column-major, columns padded to 16 bytes.

        Returns:
            recv_x: as `x`, `[R, H]` compact or `[N, H]` expanded.
            recv_topk_idx: int64 `[R, K]`, local expert or -1; None if expanded.
            recv_topk_weights: fp32 `[R, K]` (0 where the expert is elsewhere) or `[N]`; None without `topk_weights`.
            handle: for `combine` and cached dispatches.
            event: the end of the operation.

        Raises:
            TypeError, ValueError: an argument has a wrong type, dtype, shape or value; nothing was sent.
            BufferSizeError: more than the buffer was made for; nothing was sent.
            CommunicationError: a peer died, did not answer within the timeout, or called with other arguments.
        """
        backend = self._open()
        x_TH, scales = self._check_rows(x)
        if handle is None:
            topk_idx, num_experts = self._check_routing(x_TH, topk_idx, num_experts)
            alignment = 1 if expert_alignment is None else expert_alignment
            limit = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
            exact = do_cpu_sync is not False
            route = None
            if alignment < 1:
                raise ValueError(f"expert_alignment = {alignment}: must be 1 or more")
            if limit < 0 or not (exact or limit):
                raise ValueError(
                    f"num_max_tokens_per_rank = {limit}: must be positive with do_cpu_sync=False, whose output sizes "
                    "follow from it"
                )
            if not exact:
                _refuse_repeated_experts(topk_idx)
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
        self._check_size(x_TH, topk_idx, limit, "fp8" if scales is not None else "")
        if x_TH.shape[0] != topk_idx.shape[0]:
            raise ValueError(f"x has {x_TH.shape[0]} tokens, topk_idx has {topk_idx.shape[0]}")
        if topk_weights is not None:
            _check_tensor("topk_weights", topk_weights, (torch.float32,), tuple(topk_idx.shape))
        num_local_experts = num_experts // self.num_ranks
        if cumulative_local_expert_recv_stats is not None:
            _check_tensor(
                "cumulative_local_expert_recv_stats",
                cumulative_local_expert_recv_stats,
                (torch.int32, torch.int64),
                (num_local_experts,),
            )
        if do_zero_padding and not do_expand:
            raise ValueError("do_zero_padding = True: only the expanded layout (do_expand=True) has gaps")
        for event in (previous_event, previous_event_before_epilogue):
            if event is not None:
                event.current_stream_wait()

        received = backend.dispatch(
            x_TH,
            scales,
            topk_idx.clone() if do_handle_copy and handle is None else topk_idx,
            topk_weights,
            num_experts=num_experts,
            num_max_tokens_per_rank=limit,
            alignment=alignment,
            exact=exact,
            expand=do_expand,
            zero_padding=do_zero_padding,
            statistics=cumulative_local_expert_recv_stats,
            route=route,
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
        recv_topk_idx = None
        finish: HostEvent = received.event
        if not do_expand:
            recv_topk_idx = torch.full((handle.num_recv_tokens, topk_idx.shape[1]), -1, dtype=torch.int64)
            target, source = recv_topk_idx, received.route

            def finish_all() -> None:
                received.event.current_stream_wait()
                target[: source.num_rows] = source.recv_topk_idx

            finish = HostEvent(finish_all)
        out_scales = received.scales
        if out_scales is not None and use_tma_aligned_col_major_sf:
            out_scales, finish = _column_major(out_scales, finish)
        if not async_with_compute_stream:
            finish.current_stream_wait()
        recv_x = received.x if out_scales is None else (received.x, out_scales)
        return recv_x, recv_topk_idx, received.topk_weights, handle, EventOverlap(finish)

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
            num_sms, num_qps, allocate_on_comm_stream: GPU tuning (unused by the host backend).
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
        _check_tensor("x", x, _ROW_DTYPES, (handle.num_rows, None))
        num_tokens, num_topk = handle.topk_idx.shape
        if topk_weights is not None:
            rows = handle.num_rows
            shape = (rows,) if handle.do_expand else (rows, num_topk)
            _check_tensor("topk_weights", topk_weights, (torch.float32,), shape)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        if len(biases) > 2:
            raise ValueError(f"bias is a tuple of {len(biases)}: at most two tensors")
        for tensor in biases:
            _check_tensor("bias", tensor, (x.dtype,), (num_tokens, x.shape[1]))
        for event in (previous_event, previous_event_before_epilogue):
            if event is not None:
                event.current_stream_wait()
        combined, weights, finish = backend.combine(
            _dense(x),
            None if topk_weights is None else _dense(topk_weights),
            biases,
            route,
            expanded=handle.do_expand,
        )
        if not async_with_compute_stream:
            finish.current_stream_wait()
        return combined, weights, EventOverlap(finish)

    # ---- checks -------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_rows(x: torch.Tensor | Fp8Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(x, torch.Tensor):
            _check_tensor("x", x, _ROW_DTYPES, (None, None))
            if x.shape[1] == 0:
                raise ValueError(f"x has shape {list(x.shape)}: the hidden size must be 1 or more")
            return _dense(x), None
        if not (isinstance(x, tuple) and len(x) == 2 and all(isinstance(t, torch.Tensor) for t in x)):
            raise TypeError(f"x must be a tensor or a pair of e4m3 tensor and scales, got {type(x).__name__}")
        rows, scales = x
        _check_tensor("x[0]", rows, (FP8,), (None, None))
        if scales.dtype not in (torch.float32, torch.int32):
            raise TypeError(f"x[1] is {scales.dtype}: scales must be torch.float32 or torch.int32 (packed UE8M0)")
        columns = sizing.scale_columns(rows.shape[1], packed=scales.dtype == torch.int32)
        _check_tensor("x[1]", scales, (scales.dtype,), (rows.shape[0], columns))
        return _dense(rows), _dense(scales)

    def _check_routing(
        self, x_TH: torch.Tensor, topk_idx: torch.Tensor | None, num_experts: int | None
    ) -> tuple[torch.Tensor, int]:
        if topk_idx is None or num_experts is None:
            raise ValueError("dispatch needs topk_idx and num_experts, or a cached handle")
        if num_experts < 1 or num_experts % self.num_ranks:
            raise ValueError(f"num_experts = {num_experts}: must be a multiple of the {self.num_ranks} ranks")
        _check_tensor("topk_idx", topk_idx, (torch.int64,), (x_TH.shape[0], None))
        if not 1 <= topk_idx.shape[1] <= num_experts:
            raise ValueError(f"topk_idx has top-k {topk_idx.shape[1]}: must be 1 to {num_experts} (num_experts)")
        if topk_idx.numel():
            smallest, largest = (int(v) for v in topk_idx.aminmax())
            if smallest < -1 or largest >= num_experts:
                bad = (topk_idx < -1) | (topk_idx >= num_experts)
                token, position = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"topk_idx[{token}, {position}] = {int(topk_idx[token, position])}: must be -1 (none) or an "
                    f"expert in 0..{num_experts - 1}"
                )
        return _dense(topk_idx), num_experts

    def _check_handle(self, handle: EPHandle) -> HostRoute:
        if not isinstance(handle, EPHandle):
            raise TypeError(f"handle must be an EPHandle, got {type(handle).__name__}")
        if handle._owner is not self._backend:
            raise ValueError("handle comes from another ElasticBuffer")
        assert isinstance(handle._route, HostRoute)
        return handle._route

    def _check_size(self, x_TH: torch.Tensor, topk_idx: torch.Tensor, limit: int, fp8: str) -> None:
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
        if self._limit_bytes is not None:
            itemsize = 2 if fp8 else x_TH.itemsize
            needed = sizing.buffer_bytes(self.num_ranks, limit or num_tokens, hidden, num_topk, bool(fp8), itemsize)
            if needed > self._limit_bytes:
                raise BufferSizeError(f"the buffer has {self._limit_bytes} bytes, this dispatch needs {needed}")


def resolve_backend(name: str) -> Literal["host"]:
    """The backend that `name` ("auto", "cuda" or "host") stands for on this machine.

    Raises:
        ValueError: no such name. RuntimeError: that backend can't run here.
    """
    if name not in ("auto", "cuda", "host"):
        raise ValueError(f"backend = {name!r}: must be 'auto', 'cuda' or 'host'")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        raise RuntimeError(
            "the cuda backend is not part of this version; backend='host' runs on CPU tensors on any machine"
        )
    return "host"


def _check_tensor(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}: must be {' or '.join(str(d) for d in dtypes)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: the host backend takes CPU tensors")
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}: must be [{wanted}]")


def _refuse_repeated_experts(topk_idx: torch.Tensor) -> None:
    """The worst-case size counts an expert once per token."""
    ordered = topk_idx.sort(1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        token, position = repeated.nonzero()[0].tolist()
        raise ValueError(
            f"topk_idx[{token}] names expert {int(ordered[token, position])} more than once: not with do_cpu_sync=False"
        )


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` row-major in memory. A size-1 dimension may keep any stride in what torch calls contiguous."""
    tensor = tensor.contiguous()
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def _column_major(scales: torch.Tensor, finish: HostEvent) -> tuple[torch.Tensor, HostEvent]:
    """Scales `[R, C]` with stride (1, R rounded up to 16 bytes), filled when `finish` is done."""
    rows, columns = scales.shape
    target = torch.zeros(columns, sizing.align(rows, 4), dtype=scales.dtype).t()[:rows]

    def finish_all() -> None:
        finish.current_stream_wait()
        target.copy_(scales)

    return target, HostEvent(finish_all)
