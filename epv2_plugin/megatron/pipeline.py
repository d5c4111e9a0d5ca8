"""Megatron's pipeline communication over `ElasticBuffer.pp_send` and `pp_recv`.

Activations travel on one channel and gradients on another, so that the two keep their order even where the next stage
is the previous one, too (two stages with virtual stages). Receives are posted before sends.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic import CommunicationError, ElasticBuffer, EventOverlap
from epv2_plugin.megatron.patches import Patches

FORWARD, BACKWARD = 0, 1  # channels
UNLIMITED = 1 << 40  # bytes; the host backend sets nothing aside for a tensor before it comes
logger = logging.getLogger("epv2_plugin")

_patches = Patches()
_config = PluginConfig()
_buffers: dict[dist.ProcessGroup, ElasticBuffer] = {}


class Handle:
    """What Megatron's overlapped schedules wait for."""

    def __init__(self, event: EventOverlap | None = None):
        self._event = event

    def wait(self) -> None:
        """Wait for a received tensor. A sent one needs no waiting: the buffer holds it until the peer has it."""
        if self._event is not None:
            self._event.current_stream_wait()


class PipelineCommunicator(P2PCommunicator):
    """Megatron's communicator between stages, over an `ElasticBuffer` that all communicators of a group share.

    Pass it to a schedule as `p2p_communicator`, or let `enable()` put it where Megatron's schedules look. What it sends
    it holds until sent: Megatron may free or drop its tensors at once. A sent tensor must not be written to before the
    next stage has it where the schedule overlaps; otherwise it may be, because the buffer has a copy.

    Raises:
        ConfigError: the configuration names other parallel degrees. CommunicationError: as `ElasticBuffer.pp_send`.
    """

    def __init__(self, pp_group: dist.ProcessGroup, config: Any):
        super().__init__(pp_group, config)
        self.buffer = _buffer_for(pp_group, config)
        rank, size = pp_group.rank(), pp_group.size()
        self._next, self._prev = (rank + 1) % size, (rank - 1) % size

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, Handle] | None]:
        prev_shape = next_shape = tensor_shape
        if (recv_prev or recv_next) and tensor_shape is None:
            raise ValueError("tensor_shape = None: must be the shape of the tensor to receive")
        if (recv_prev or recv_next) and self.config.pipeline_dtype is None:
            raise ValueError("config.pipeline_dtype = None: must be the dtype of the tensor to receive")
        if self.config.variable_seq_lengths or getattr(self.config, "mtp_standalone", False):
            prev_shape, next_shape = self._communicate_shapes(tensor_send_next, tensor_send_prev, recv_prev, recv_next)
        handles: dict[str, Handle] = {}
        from_prev = self._receive(prev_shape, self._prev, FORWARD, "recv_prev", handles) if recv_prev else None
        from_next = self._receive(next_shape, self._next, BACKWARD, "recv_next", handles) if recv_next else None
        if tensor_send_next is not None:
            self._send(tensor_send_next, self._next, FORWARD, copy=wait_on_reqs)
            handles["send_next"] = Handle()
        if tensor_send_prev is not None:
            self._send(tensor_send_prev, self._prev, BACKWARD, copy=wait_on_reqs)
            handles["send_prev"] = Handle()
        if not wait_on_reqs:
            return from_prev, from_next, handles
        for handle in handles.values():
            handle.wait()
        return from_prev, from_next, None

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """The shapes of what comes from the previous and the next stage, `[0, 0, 0]` where nothing comes."""
        sizes = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
        events = []
        if recv_prev:
            events.append(self.buffer.pp_recv(sizes[0], self._prev, channel=FORWARD, async_with_compute_stream=True))
        if recv_next:
            events.append(self.buffer.pp_recv(sizes[1], self._next, channel=BACKWARD, async_with_compute_stream=True))
        if tensor_send_next is not None:
            self._send(torch.tensor(tensor_send_next.shape), self._next, FORWARD)
        if tensor_send_prev is not None:
            self._send(torch.tensor(tensor_send_prev.shape), self._prev, BACKWARD)
        for event in events:
            event.current_stream_wait()
        return sizes[0].tolist(), sizes[1].tolist()

    def _send(self, tensor: torch.Tensor, peer: int, channel: int, copy: bool = True) -> None:
        self.buffer.pp_send(tensor.detach(), peer, channel=channel, async_with_compute_stream=not copy)

    def _receive(self, shape: Any, peer: int, channel: int, name: str, handles: dict[str, Handle]) -> torch.Tensor:
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        tensor = torch.empty(tuple(shape), dtype=self.config.pipeline_dtype, device=device)
        event = self.buffer.pp_recv(tensor, peer, channel=channel, async_with_compute_stream=True)
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


def _buffer_for(group: dist.ProcessGroup, config: Any) -> ElasticBuffer:
    _config.check_degrees(
        "Megatron",
        pipeline=config.pipeline_model_parallel_size,
        virtual_pipeline=config.virtual_pipeline_model_parallel_size or 1,
    )
    if group not in _buffers:
        settings = _config.pipeline
        buffer = ElasticBuffer(
            group,
            num_cpu_timeout_secs=_config.timeouts.host_seconds,
            num_gpu_timeout_secs=_config.timeouts.gpu_seconds,
            backend=_config.backend,
        )
        limit = UNLIMITED if settings.max_tensor_bytes == "auto" else settings.max_tensor_bytes
        buffer.pp_set_config(limit, settings.max_inflight)
        _buffers[group] = buffer
        if dist.get_rank(group) == 0:
            logger.info(
                "epv2: pipeline group of %d ranks (first: global rank %d): host backend over gloo, up to %d tensors in "
                "flight each way, 0 SMs",
                dist.get_world_size(group),
                dist.get_rank(),
                settings.max_inflight,
            )
    return _buffers[group]


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
    for buffer in _buffers.values():
        buffer.destroy()
    _buffers.clear()
    _config = PluginConfig()


def _flush() -> None:
    """Let the last tensors of a run be taken before the process ends; where a peer is gone, its users know already."""
    for buffer in _buffers.values():
        with contextlib.suppress(CommunicationError):
            buffer.pp_flush()


def replaced() -> tuple[str, ...]:
    """Dotted names of Megatron's symbols that are replaced."""
    return _patches.names


def groups() -> list[dict[str, Any]]:
    """What runs on each pipeline group of this rank."""
    return [
        {
            "primitive": "pipeline",
            "ranks": dist.get_process_group_ranks(group),
            "backend": "host",
            "transport": "gloo",
            "max_inflight": _config.pipeline.max_inflight,
            "sms": 0,
            "sent_bytes": buffer.traffic.sent_bytes,
        }
        for group, buffer in _buffers.items()
    ]
