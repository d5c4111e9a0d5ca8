"""The objects that FSDP2 calls for its all-gathers and reduce-scatters.

FSDP2 knows an `AllGather` and a `ReduceScatter` for each parameter group: `allocate` gives the memory that it copies
shards or gradients into, the call moves it. Both hand on to the `Carrier` of the process group.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from epv2_plugin.fsdp.carriers import Carrier, Wait

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        self._group, self._home = next(iter(self._carriers.items()))

    def _check(self, device: torch.device) -> None:
        """Raise ValueError for a device that the carrier does not serve."""
        if torch.device(device).type != self._home.device:
            raise ValueError(f"device = {device}: the carrier of this model takes {self._home.device} tensors")

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

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for gathered parameters, see `Comm.allocate` of torch.

        Raises:
            ValueError: a device that the carrier does not serve. BufferSizeError: no room, see `fsdp.window_bytes`.
        """
        self._check(device)
        return self._home.gathered([int(extent) for extent in size], dtype)

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
    """Reduce-scatter of a parameter group's gradients: fp32, bf16 or fp16, summed in fp32, or fp64; see `Carrier`."""

    def __init__(self, carriers: Mapping[dist.ProcessGroup, Carrier]):
        super().__init__(carriers)
        self._input: weakref.ref[torch.Tensor] | None = None  # the last that was handed out, until it is reduced

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for gradients before they are reduced, or after; see `Comm.allocate` of torch.

        FSDP2 asks for both in turn, and does not say for which. What comes out becomes the parameters' gradients, which
        live on: ordinary memory.

        Raises:
            As `PluginAllGather.allocate`.
        """
        self._check(device)
        shape = [int(extent) for extent in size]
        before = None if self._input is None else self._input()
        if before is not None and before.numel() == dist.get_world_size(self._group) * math.prod(shape):
            return torch.empty(shape, dtype=dtype, device=device)
        unreduced = self._home.unreduced(shape, dtype)
        self._input = weakref.ref(unreduced)
        return unreduced

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
        self._input = None
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
