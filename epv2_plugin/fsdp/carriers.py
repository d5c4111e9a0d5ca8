"""What moves FSDP2's parameters and gradients between the ranks of a process group: gloo on the host, windows on GPUs.

Legend: P ranks, N values of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic import BufferSizeError, ElasticBuffer
from epv2_plugin.elastic.backends.cuda_shards import CudaShards, Slots
from epv2_plugin.elastic.backends.device import CudaRuntime, Runtime
from epv2_plugin.elastic.sizing import session_bytes

Wait = Callable[[], None]
_MAX_OPERATIONS = 1 << 16  # of a session; bytes are what bounds it


class Carrier(Protocol):
    """Moves parameters and gradients between the ranks of one process group.

    A wait blocks the host on the CPU, and the current stream on a GPU.

    Attributes:
        device: type of the tensors that it takes.
    """

    device: str

    def gathered(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor that `all_gather` will fill; the caller may put this rank's shard into its row."""

    def unreduced(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for gradients that `reduce_scatter` will read."""

    def all_gather(self, out_PN: torch.Tensor, shard_N: torch.Tensor) -> Wait:
        """Start gathering every rank's shard (which may be this rank's row of `out_PN`); returns the wait for it."""

    def reduce_scatter(self, out_N: torch.Tensor, parts_PN: torch.Tensor, scale: float) -> Wait:
        """Start summing row p of every rank's parts for rank p, times `scale`; returns the wait for it.

        Sums run in fp32 in rank order and are rounded once; between nodes of several GPUs each node's, and then those.
        """

    def groups(self) -> dict[str, Any]:
        """What runs here, for `status()`."""

    def close(self, abandon: bool = False) -> None:
        """Release it; nothing may be under way. Every rank of the group does, unless `abandon`: some may not."""


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

    def gathered(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(size), dtype=dtype, device=self.device)

    unreduced = gathered

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

    def close(self, abandon: bool = False) -> None:
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


class CudaCarrier:
    """`Carrier` between GPUs: an all-gather by copy engines alone, between nodes with a warp that tells the network, a
    reduce-scatter by one kernel of `sm_budget.fsdp` CTAs.

    Every rank of `group` makes it at the same time.

    Args:
        gathers, sums: room for gathered parameters, and for gradients before they are reduced.

    Raises:
        UnavailableError: NCCL can't share memory between these ranks. RuntimeError: the device can't be used.
    """

    device = "cuda"

    def __init__(self, group: dist.ProcessGroup, gathers: Slots, sums: Slots, config: PluginConfig):
        self._group, self._config = group, config
        seconds = config.timeouts.host_seconds
        runtime = self._runtime(group, seconds)
        try:
            self._shards = CudaShards(runtime, seconds, gathers, sums, config.sm_budget.fsdp)
        except BaseException:
            runtime.close(abandon=True)
            raise

    def _runtime(self, group: dist.ProcessGroup, seconds: float) -> Runtime:
        return CudaRuntime(group, seconds)

    def gathered(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self._explained():
            return self._shards.gathered(size, dtype)

    def unreduced(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self._explained():
            return self._shards.unreduced(size, dtype)

    def all_gather(self, out_PN: torch.Tensor, shard_N: torch.Tensor) -> Wait:
        with self._explained():
            return self._shards.all_gather(out_PN, shard_N)

    def reduce_scatter(self, out_N: torch.Tensor, parts_PN: torch.Tensor, scale: float) -> Wait:
        with self._explained():
            return self._shards.reduce_scatter(out_N, parts_PN, scale)

    def groups(self) -> dict[str, Any]:
        return {
            "ranks": dist.get_process_group_ranks(self._group),
            "backend": "cuda",
            **self._shards.describe(),
            "sms": self._shards.num_sms,
            "gather_sms": 0,
            "window_bytes": self._shards.window_bytes,
            "sent_bytes": self._shards.traffic.sent_bytes,
        }

    def close(self, abandon: bool = False) -> None:
        self._shards.close(abandon)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the key that makes room for what does not fit."""
        try:
            yield
        except BufferSizeError as error:
            configured = self._config.fsdp.window_bytes
            raise BufferSizeError(f"{self._config.source}: fsdp.window_bytes = {configured!r}: {error}") from None
