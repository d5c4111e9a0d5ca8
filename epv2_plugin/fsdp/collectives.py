"""The objects that FSDP2 calls for its all-gathers and reduce-scatters, and what carries the bytes for them.

FSDP2 knows an `AllGather` and a `ReduceScatter` for each parameter group: `allocate` gives the memory that it copies
shards or gradients into, the call moves it. Both hand on to the `Carrier` of the process group. The host's is below;
one for GPUs allocates in windows and has copy engines move the bytes, with nothing else here to change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic import BufferSizeError, ElasticBuffer
from epv2_plugin.elastic.sizing import session_bytes

Wait = Callable[[], None]
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_OPERATIONS = 1 << 16  # of a session; bytes are what bounds it


class Carrier(Protocol):
    """Moves parameters and gradients between the ranks of one process group (legend: P ranks, N values of a shard).

    Attributes:
        device: type of the tensors that it takes.
    """

    device: str

    def allocate(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that a collective reads from or writes to; contents undefined."""

    def all_gather(self, out_PN: torch.Tensor, shard_N: torch.Tensor) -> Wait:
        """Start gathering every rank's shard (which may be this rank's row of `out_PN`); returns the wait for it."""

    def reduce_scatter(self, out_N: torch.Tensor, parts_PN: torch.Tensor, scale: float) -> Wait:
        """Start summing row p of every rank's parts for rank p, times `scale`; returns the wait for it.

        Sums run in fp32 in rank order and are rounded once.
        """

    def groups(self) -> dict[str, Any]:
        """What runs here, for `status()`."""

    def close(self) -> None:
        """Release it; nothing may be under way."""


class HostCarrier:
    """`Carrier` between CPU processes: sessions of an `ElasticBuffer` of its own.

    Every rank of `group` makes it at the same time.

    Args:
        window_bytes: most bytes of gathered (or unreduced) tensors under way at once.
    """

    device = "cpu"

    def __init__(self, group: dist.ProcessGroup, window_bytes: int, config: PluginConfig):
        self._group, self._window_bytes, self._config = group, window_bytes, config
        self._buffer = ElasticBuffer(group, num_cpu_timeout_secs=config.timeouts.host_seconds, backend="host")
        self._buffer.agrs_set_config(window_bytes, _MAX_OPERATIONS)
        self._used = 0  # bytes of the window, since the session began
        self._session: set[object] = set()  # operations of the running session that nobody has waited for

    def allocate(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(size), dtype=dtype)

    def all_gather(self, out_PN: torch.Tensor, shard_N: torch.Tensor) -> Wait:
        self._admit(out_PN, "gathered parameters")
        return self._under_way(self._buffer.all_gather(shard_N, out=out_PN)[-1])

    def reduce_scatter(self, out_N: torch.Tensor, parts_PN: torch.Tensor, scale: float) -> Wait:
        self._admit(parts_PN, "gradients")
        return self._under_way(self._buffer.reduce_scatter(parts_PN, out=out_N, scale=scale)[-1])

    def groups(self) -> dict[str, Any]:
        return {
            "ranks": dist.get_process_group_ranks(self._group),
            "backend": "host",
            "transport": "gloo",
            "sms": 0,
            "window_bytes": self._window_bytes,
            "sent_bytes": self._buffer.traffic.sent_bytes,
        }

    def close(self) -> None:
        self._buffer.destroy()

    def _admit(self, whole_PN: torch.Tensor, what: str) -> None:
        """Make room in the window. A session counts all that it ever held; ending one completes what is under way."""
        needed = session_bytes(whole_PN.shape[0], whole_PN.shape[1:], whole_PN.itemsize)
        if needed > self._window_bytes:
            configured = self._config.fsdp.window_bytes
            raise BufferSizeError(
                f"{self._config.source}: fsdp.window_bytes = {configured!r}: {what} of {needed} bytes do not fit the "
                f"window of {self._window_bytes} bytes: set it to {needed} or more"
            )
        if self._buffer.agrs_in_session and self._used + needed > self._window_bytes:
            self._buffer.destroy_agrs_session()
        if not self._buffer.agrs_in_session:
            self._buffer.create_agrs_session()
            self._used, self._session = 0, set()
        self._used += needed

    def _under_way(self, wait: Wait) -> Wait:
        """`wait` for an operation just started, which also ends the session after its last operation."""
        operation, session = object(), self._session
        session.add(operation)

        def finish() -> None:
            wait()
            session.discard(operation)
            if not session and session is self._session and self._buffer.agrs_in_session:
                self._buffer.destroy_agrs_session()

        return finish


class _Work(dist.Work):
    """What FSDP2 waits for after an asynchronous call."""

    def __init__(self, wait: Wait):
        super().__init__()
        self._wait = wait

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Complete the operation. `timeout` has no effect: waits have the configuration's."""
        self._wait()
        return True


class _Comm:
    """What both objects share.

    Args:
        carriers: of every group that FSDP2 may call with; the first allocates.
    """

    def __init__(self, carriers: Mapping[dist.ProcessGroup, Carrier]):
        self._carriers = dict(carriers)
        self._home = next(iter(self._carriers.values()))

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `Comm.allocate` of torch. Raises ValueError for a device that the carrier does not serve."""
        if torch.device(device).type != self._home.device:
            raise ValueError(f"device = {device}: the carrier of this model takes {self._home.device} tensors")
        return self._home.allocate([int(extent) for extent in size], dtype)

    def _carrier(self, group: dist.ProcessGroup) -> Carrier:
        carrier = self._carriers.get(group)
        if carrier is None:
            raise RuntimeError(
                f"FSDP2 came with a group of ranks {dist.get_process_group_ranks(group)} that the model did not have "
                "when epv2_plugin.fsdp.apply was called: remove and apply again, after the model's groups are final"
            )
        return carrier

    @staticmethod
    def _finish(wait: Wait, async_op: bool) -> dist.Work | None:
        if async_op:
            return _Work(wait)
        wait()
        return None


class PluginAllGather(_Comm, AllGather):
    """All-gather of a parameter group, any dtype."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather `input_tensor` `[N]` of every rank into `output_tensor` `[P * N]`, by rank.

        Raises:
            ValueError: the sizes do not belong together. BufferSizeError: larger than the window.
            RuntimeError: an unknown group. CommunicationError: a peer died, or came with other sizes or too late.
        """
        out_PN = _rows("output_tensor", output_tensor, group, input_tensor.numel())
        return self._finish(self._carrier(group).all_gather(out_PN, input_tensor.view(-1)), async_op)


class PluginReduceScatter(_Comm, ReduceScatter):
    """Reduce-scatter of a parameter group's gradients: fp32, bf16 or fp16, summed in fp32 in rank order."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce `input_tensor` `[P * N]` of every rank; rank p gets part p in `output_tensor` `[N]`.

        Args:
            op: SUM, AVG, or PREMUL_SUM with a factor.

        Raises:
            ValueError, TypeError: another op, sizes that do not belong together, another dtype. Rest as all-gather.
        """
        scale = _scale(op, dist.get_world_size(group))
        if input_tensor.dtype not in GRADIENT_DTYPES:
            raise TypeError(
                f"gradients are {input_tensor.dtype}: must be {' or '.join(str(dtype) for dtype in GRADIENT_DTYPES)}; "
                "see MixedPrecisionPolicy.reduce_dtype"
            )
        parts_PN = _rows("input_tensor", input_tensor, group, output_tensor.numel())
        return self._finish(self._carrier(group).reduce_scatter(output_tensor.view(-1), parts_PN, scale), async_op)


def _rows(name: str, tensor: torch.Tensor, group: dist.ProcessGroup, columns: int) -> torch.Tensor:
    """`tensor` `[P * N]` as `[P, N]`."""
    ranks = dist.get_world_size(group)
    if tensor.numel() != ranks * columns:
        raise ValueError(f"{name} has {tensor.numel()} values: must be {ranks} ranks times {columns}")
    return tensor.view(ranks, columns)


def _scale(op: Any, ranks: int) -> float:
    """The factor on a sum that makes it the result of `op`."""
    reduce_op: Any = op if isinstance(op, dist.ReduceOp) else dist.ReduceOp(op)
    if reduce_op == dist.ReduceOp.SUM:
        return 1.0
    if reduce_op == dist.ReduceOp.AVG:
        return 1.0 / ranks
    if reduce_op == dist.ReduceOp.PREMUL_SUM:
        factor = float(reduce_op.__getstate__()[1])
        if not math.isfinite(factor):
            raise ValueError(f"reduce op PREMUL_SUM({factor}): the factor must be finite")
        return factor
    raise ValueError(f"reduce op {str(op).rpartition('.')[2]}: must be SUM, AVG or PREMUL_SUM")
