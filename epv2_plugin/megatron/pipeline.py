"""Megatron's pipeline communication over `ElasticBuffer.pp_send` and `pp_recv_inplace`.

Activations travel on one channel and gradients on another, so that the two keep their order even where the next stage
is the previous one, too (two stages with virtual stages). Receives are posted before sends.

Where the plugin's transport can't be had, and with `pipeline.transport: auto` between nodes of GPUs, Megatron's own
communicator stays in use, and the log says so.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from epv2_plugin.config import ConfigError, PluginConfig
from epv2_plugin.elastic import CommunicationError, ElasticBuffer, EventOverlap
from epv2_plugin.elastic.errors import UnavailableError
from epv2_plugin.patches import Patches

FORWARD, BACKWARD = 0, 1  # channels
UNLIMITED = 1 << 40  # bytes; the host backend sets nothing aside for a tensor before it comes
# Of Megatron: with these it says by `record_stream` which streams use a received tensor.
_RECORDING = ("overlap_moe_expert_parallel_comm", "fine_grained_activation_offloading", "cpu_offloading")
# Where it says that a CUDA graph holds everything; versions differ.
_GRAPHS = ("cuda_graph_scope", "cuda_graph_impl")
logger = logging.getLogger("epv2_plugin")

_patches = Patches()
_config = PluginConfig()
_buffers: dict[dist.ProcessGroup, ElasticBuffer | None] = {}  # None: Megatron's own communicator
_configured: dict[dist.ProcessGroup, int] = {}  # bytes that a tensor may have


class Handle:
    """What Megatron's overlapped schedules wait for."""

    def __init__(self, event: EventOverlap | None = None):
        self._event = event

    def wait(self) -> None:
        """Wait for a received tensor, or until the peer has a sent one, which may be written to then."""
        if self._event is not None:
            self._event.current_stream_wait()


class PipelineCommunicator(P2PCommunicator):
    """Megatron's communicator between stages, over an `ElasticBuffer` that all communicators of a group share.

    Pass it to a schedule as `p2p_communicator`, or let `enable()` put it where Megatron's schedules look. What it sends
    it holds until sent: Megatron may free or drop its tensors at once. Where the schedule overlaps, a sent tensor must
    not be written to before its handle was waited for; otherwise it may be, because the buffer has a copy.

    Raises:
        ConfigError: the configuration names other parallel degrees, or `pipeline.max_inplace` beside what says by
            torch's `record_stream` who uses received tensors; or on a GPU, without `pipeline.max_tensor_bytes`, tensors
            get larger within a schedule, or at all with `max_inplace`. CommunicationError: as `ElasticBuffer.pp_send`.
    """

    def __init__(self, pp_group: dist.ProcessGroup, config: Any):
        super().__init__(pp_group, config)
        self.group, self.buffer = pp_group, _buffer_for(pp_group, config)
        rank, size = pp_group.rank(), pp_group.size()
        self._next, self._prev = (rank + 1) % size, (rank - 1) % size
        self._lengths_vary = config.variable_seq_lengths or getattr(config, "mtp_standalone", False)
        self._begun = False

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        if not self._ready([tensor_send_next, tensor_send_prev], tensor_shape):
            return super()._communicate(
                tensor_send_next=tensor_send_next,
                tensor_send_prev=tensor_send_prev,
                recv_prev=recv_prev,
                recv_next=recv_next,
                tensor_shape=tensor_shape,
                wait_on_reqs=wait_on_reqs,
            )
        prev_shape = next_shape = tensor_shape
        if (recv_prev or recv_next) and tensor_shape is None:
            raise ValueError("tensor_shape = None: must be the shape of the tensor to receive")
        if (recv_prev or recv_next) and self.config.pipeline_dtype is None:
            raise ValueError("config.pipeline_dtype = None: must be the dtype of the tensor to receive")
        if self._lengths_vary:
            prev_shape, next_shape = self._exchange_shapes(tensor_send_next, tensor_send_prev, recv_prev, recv_next)
        handles: dict[str, Handle] = {}
        from_prev = self._receive(prev_shape, self._prev, FORWARD, "recv_prev", handles) if recv_prev else None
        from_next = self._receive(next_shape, self._next, BACKWARD, "recv_next", handles) if recv_next else None
        if tensor_send_next is not None:
            handles["send_next"] = self._send(tensor_send_next, self._next, FORWARD, copy=wait_on_reqs)
        if tensor_send_prev is not None:
            handles["send_prev"] = self._send(tensor_send_prev, self._prev, BACKWARD, copy=wait_on_reqs)
        if not wait_on_reqs:
            return from_prev, from_next, handles
        for handle in handles.values():
            handle.wait()
        return from_prev, from_next, None

    def _ready(self, sent: list[torch.Tensor | None], received_shape: Any) -> bool:
        """Whether the plugin's buffer is there and configured. On a GPU, where rings are set aside, the first tensors
        say how large they are, and those of a later schedule, such as an evaluation's, may say so again: every stage
        comes here with the same ones before it needs any."""
        self.buffer = _buffers.get(self.group, self.buffer)  # another communicator may have come here first
        limit, begun = _configured.get(self.group, 0), self._begun
        self._begun = True
        if self.buffer is None or limit == UNLIMITED or (limit and _config.pipeline.max_tensor_bytes != "auto"):
            return self.buffer is not None
        if self._lengths_vary:
            why = "must be a number on the cuda backend, because stages exchange tensors of lengths that vary"
            _leave_to_megatron(self.group, _config.fail("pipeline.max_tensor_bytes", why))
            return False
        sizes = [tensor.nbytes for tensor in sent if tensor is not None]
        if received_shape is not None and self.config.pipeline_dtype is not None:
            sizes.append(math.prod(received_shape) * self.config.pipeline_dtype.itemsize)
        if (needed := max(sizes, default=1)) > limit:
            if limit and (begun or _config.pipeline.max_inplace):
                # Other stages are elsewhere in the schedule, or Megatron still has tensors that lie in the buffer.
                why = f"must be {needed} or more: that many bytes come after smaller tensors"
                raise _config.fail("pipeline.max_tensor_bytes", why)
            self.buffer = _configure(self.group, self.buffer, needed)
        return self.buffer is not None

    def _exchange_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """The shapes of what comes from the previous and the next stage, `[0, 0, 0]` where nothing comes."""
        assert self.buffer is not None
        sizes = [torch.zeros(3, dtype=torch.int64, device=self.buffer.device) for _ in range(2)]
        events = []
        if recv_prev:
            events.append(self.buffer.pp_recv(sizes[0], self._prev, channel=FORWARD, async_with_compute_stream=True))
        if recv_next:
            events.append(self.buffer.pp_recv(sizes[1], self._next, channel=BACKWARD, async_with_compute_stream=True))
        if tensor_send_next is not None:
            self._send(torch.tensor(tensor_send_next.shape, device=self.buffer.device), self._next, FORWARD)
        if tensor_send_prev is not None:
            self._send(torch.tensor(tensor_send_prev.shape, device=self.buffer.device), self._prev, BACKWARD)
        for event in events:
            event.current_stream_wait()
        return sizes[0].tolist(), sizes[1].tolist()

    def _send(self, tensor: torch.Tensor, peer: int, channel: int, copy: bool = True) -> Handle:
        assert self.buffer is not None
        event = self.buffer.pp_send(tensor.detach(), peer, channel=channel, async_with_compute_stream=not copy)
        return Handle(None if copy else event)  # a copy need not be waited for

    def _receive(self, shape: Any, peer: int, channel: int, name: str, handles: dict[str, Handle]) -> torch.Tensor:
        assert self.buffer is not None
        tensor, event = self.buffer.pp_recv_inplace(tuple(shape), self.config.pipeline_dtype, peer, channel=channel)
        handles[name] = Handle(event)
        return tensor.requires_grad_()


def schedule_groups() -> ProcessGroupCollection:
    """The groups that a Megatron schedule wants beside an explicit communicator, from Megatron's global state."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp = parallel_state.get_data_parallel_group(with_context_parallel=False, partial_data_parallel=False)
    groups.tp_dp_cp = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return groups


def _buffer_for(group: dist.ProcessGroup, config: Any) -> ElasticBuffer | None:
    _config.check_degrees(
        "Megatron",
        pipeline=config.pipeline_model_parallel_size,
        virtual_pipeline=config.virtual_pipeline_model_parallel_size or 1,
    )
    if _config.pipeline.max_inplace and _config.backend != "host":
        for name in _RECORDING:
            if getattr(config, name, False):
                allowed = f"must be 0 with Megatron's {name}: its record_stream does nothing for tensors in place"
                raise _config.fail("pipeline.max_inplace", allowed)
    if group not in _buffers:
        try:
            buffer = ElasticBuffer(
                group,
                num_cpu_timeout_secs=_config.timeouts.host_seconds,
                num_gpu_timeout_secs=_config.timeouts.gpu_seconds,
                backend=_config.backend,
            )
        except UnavailableError as error:
            _leave_to_megatron(group, _config.fail("pipeline.transport", str(error)))
            return None
        _buffers[group] = buffer
        on_host = buffer.describe()["backend"] == "host"
        if not on_host:
            why = ""
            if _config.pipeline.transport == "auto" and buffer.num_rdma_ranks > 1:
                why = "between nodes of GPUs the plugin's has not run over a network yet, copy_engine takes it"
            if any("full_iteration" in str(getattr(config, name, "")) for name in _GRAPHS):
                why = "the plugin's can't be captured in a CUDA graph of the whole iteration"
            if why:
                _leave_to_megatron(group, _config.fail("pipeline.transport", why))
                return None
        limit = _config.pipeline.max_tensor_bytes
        if limit != "auto":
            _configure(group, buffer, limit)
        elif on_host:
            _configure(group, buffer, UNLIMITED)
    return _buffers[group]


def _configure(group: dist.ProcessGroup, buffer: ElasticBuffer, max_tensor_bytes: int) -> ElasticBuffer | None:
    """Set the buffer's rings up; None where that can't be, and Megatron's own communicator is left."""
    inflight = _config.pipeline.max_inflight
    try:
        # Activations come from the previous stage, gradients from the next one, and no others.
        buffer.pp_set_config(max_tensor_bytes, inflight, max_inplace=_config.pipeline.max_inplace, max_senders=2)
    except UnavailableError as error:
        _leave_to_megatron(group, _config.fail("pipeline.transport", str(error)))
        return None
    _configured[group] = max_tensor_bytes
    if dist.get_rank(group) == 0:
        what = buffer.describe()
        logger.info(
            "epv2: pipeline group of %d ranks (first: global rank %d): %s backend over %s, up to %d tensors%s in "
            "flight each way, 0 SMs",
            dist.get_world_size(group),
            dist.get_rank(),
            what["backend"],
            what["transport"],
            inflight,
            "" if max_tensor_bytes == UNLIMITED else f" of {max_tensor_bytes / 2**20:.3g} MiB",
        )
    return buffer


def _leave_to_megatron(group: dist.ProcessGroup, why: ConfigError) -> None:
    """Let Megatron's own communicator run. Raises `why` where the plugin's was asked for by name."""
    if (buffer := _buffers.pop(group, None)) is not None:
        buffer.destroy()
    if _config.pipeline.transport == "copy_engine":
        raise why
    _buffers[group] = None
    if dist.get_rank(group) == 0:
        size, first = dist.get_world_size(group), dist.get_rank()
        logger.warning(
            "epv2: pipeline group of %d ranks (first: global rank %d): Megatron's own transport: %s", size, first, why
        )


def install(config: PluginConfig) -> None:
    """Make Megatron's schedules use `PipelineCommunicator`, unless `config` says stock."""
    global _config
    _config = config
    if config.pipeline.transport != "stock":
        _patches.attribute(schedules, "P2PCommunicator", PipelineCommunicator)
        atexit.register(_flush)


def uninstall() -> None:
    """Restore Megatron's schedules and release the buffers, after what was sent has arrived."""
    global _config
    _patches.undo()
    atexit.unregister(_flush)
    _flush()
    for buffer in _open_buffers():
        buffer.destroy()
    _buffers.clear()
    _configured.clear()
    _config = PluginConfig()


def _flush() -> None:
    """Let the last tensors of a run be taken before the process ends; where a peer is gone, its users know already."""
    for buffer in _open_buffers():
        with contextlib.suppress(CommunicationError):
            buffer.pp_flush()


def _open_buffers() -> list[ElasticBuffer]:
    return [buffer for buffer in _buffers.values() if buffer is not None]


def replaced() -> tuple[str, ...]:
    """Dotted names of Megatron's symbols that are replaced."""
    return _patches.names


def groups() -> list[dict[str, Any]]:
    """What runs on each pipeline group of this rank."""
    found = []
    for group, buffer in _buffers.items():
        entry: dict[str, Any] = {"primitive": "pipeline", "ranks": dist.get_process_group_ranks(group)}
        if buffer is None:
            found.append({**entry, "backend": "stock", "transport": "stock"})
        else:
            what = {name: buffer.describe()[name] for name in ("backend", "transport")}
            traffic = {"sent_bytes": buffer.traffic.sent_bytes, "inplace_bytes": buffer.traffic.inplace_bytes}
            found.append({**entry, **what, "max_inflight": _config.pipeline.max_inflight, "sms": 0, **traffic})
    return found
