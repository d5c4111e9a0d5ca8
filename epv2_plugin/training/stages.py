"""What one step of an arm spends where: time of dispatch, experts and combine, bytes sent, memory.

The stages are bracketed by identity functions in the graph, which note the time when the forward and when the backward
pass comes through. Between the bracket before dispatch and the one behind it lies the dispatch, and so on; the
backward pass meets the brackets in reverse. Waiting for slower ranks falls into the stage that waits.
"""

from __future__ import annotations

import functools
import itertools
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.moe_layer import MoELayer

from epv2_plugin.patches import Patches
from epv2_plugin.training import devices

# The brackets in the order in which the forward pass meets them, and the stage that ends at each.
BRACKETS = ("before dispatch", "after dispatch", "before combine", "after combine")
STAGE_ENDING_AT = {"after dispatch": "dispatch", "before combine": "expert", "after combine": "combine"}
STAGE_STARTING_AT = dict(zip(BRACKETS, ("dispatch", "expert", "combine"), strict=False))
STAGES = ("dispatch", "expert", "combine")


def moe_layers(chunks: list[Any]) -> list[MoELayer]:
    """The MoE layers of this rank."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]


class _Bracket(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: StageClock, name: str) -> torch.Tensor:
        ctx.clock, ctx.name = clock, name
        clock.forward(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.clock.backward(ctx.name)
        return grad, None, None


class StageClock:
    """Seconds per stage since `reset`, summed over the MoE layers and micro-batches of `chunks`.

    On a GPU the time is that of the stream that runs the layer: work on other streams counts where that one waits.
    """

    def __init__(self, chunks: list[Any]):
        self.reset()
        for layer in moe_layers(chunks):
            dispatcher = layer.token_dispatcher
            for method, brackets in {
                "dispatch_preprocess": ("before dispatch", None),
                "dispatch_postprocess": (None, "after dispatch"),
                "combine_preprocess": ("before combine", None),
                "combine_postprocess": (None, "after combine"),
            }.items():
                setattr(dispatcher, method, self._bracketed(getattr(dispatcher, method), *brackets))

    def reset(self) -> None:
        """Start counting anew."""
        self._passed: list[tuple[str | None, Any]] = []  # stage that ended, time

    def seconds(self) -> dict[str, float]:
        """Forward seconds by stage, and backward seconds by stage + "_backward". Waits for the device."""
        devices.synchronize()
        sums = {stage + suffix: 0.0 for suffix in ("", "_backward") for stage in STAGES}
        for (_, begin), (stage, end) in itertools.pairwise(self._passed):
            if stage is not None:
                sums[stage] += devices.seconds_between(begin, end)
        return sums

    def forward(self, bracket: str) -> None:
        """The forward pass is at `bracket`."""
        self._pass(STAGE_ENDING_AT.get(bracket))

    def backward(self, bracket: str) -> None:
        """The backward pass is at `bracket`."""
        stage = STAGE_STARTING_AT.get(bracket)
        self._pass(stage and stage + "_backward")

    def _pass(self, stage: str | None) -> None:
        self._passed.append((stage, devices.mark()))

    def _bracketed(self, method: Callable, before: str | None, after: str | None) -> Callable:
        @functools.wraps(method)
        def call(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if before is not None:
                hidden_states = _Bracket.apply(hidden_states, self, before)
            result = method(hidden_states, *args, **kwargs)
            if after is None:
                return result
            if isinstance(result, tuple):
                return (_Bracket.apply(result[0], self, after), *result[1:])
            return _Bracket.apply(result, self, after)

        return call


class StockTraffic:
    """Bytes that this rank hands to Megatron's communication for other ranks.

    A collective counts as what must leave this rank: an all-to-all its rows for others, an all-gather its part for each
    of the others, a reduce-scatter the parts of the others.

    Attributes:
        sent_bytes: in expert-parallel groups. pipeline_bytes: to other stages, by Megatron's own communicator.
        context_bytes: in the context-parallel group.
    """

    def __init__(self, chunks: list[Any]):
        layers = moe_layers(chunks)
        self._groups = {
            group for layer in layers for group in (layer.token_dispatcher.ep_group, layer.token_dispatcher.tp_ep_group)
        }
        self._context = parallel_state.get_context_parallel_group()
        self.sent_bytes = self.pipeline_bytes = self.context_bytes = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is sent inside the block, forward and backward."""
        patches = Patches()
        patches.attribute(dist, "all_to_all_single", self._all_to_all(dist.all_to_all_single))
        patches.attribute(mappings, "dist_all_gather_func", self._all_gather(mappings.dist_all_gather_func))
        patches.attribute(mappings, "dist_reduce_scatter_func", self._reduce_scatter(mappings.dist_reduce_scatter_func))
        patches.attribute(P2PCommunicator, "_communicate", self._communicate(P2PCommunicator._communicate))
        try:
            yield
        finally:
            patches.undo()

    def _communicate(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for name in ("tensor_send_next", "tensor_send_prev"):
                if kwargs.get(name) is not None:
                    self.pipeline_bytes += kwargs[name].nbytes
            return function(*args, **kwargs)

        return call

    def _all_to_all(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(
            output: torch.Tensor,
            input: torch.Tensor,
            output_split_sizes: Any = None,
            input_split_sizes: Any = None,
            group: Any = None,
            **kwargs: Any,
        ) -> Any:
            if group in self._groups:
                rank, size = dist.get_rank(group), dist.get_world_size(group)
                own = input.shape[0] // size if input_split_sizes is None else input_split_sizes[rank]
                self.sent_bytes += (input.shape[0] - int(own)) * input[:1].numel() * input.itemsize
            return function(output, input, output_split_sizes, input_split_sizes, group=group, **kwargs)

        return call

    def _all_gather(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            num_bytes = input.nbytes * (dist.get_world_size(group) - 1)
            if group in self._groups:
                self.sent_bytes += num_bytes
            elif group is self._context:
                self.context_bytes += num_bytes
            return function(output, input, *args, group=group, **kwargs)

        return call

    def _reduce_scatter(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            if group in self._groups:
                self.sent_bytes += input.nbytes - output.nbytes
            elif group is self._context:
                self.context_bytes += input.nbytes - output.nbytes
            return function(output, input, *args, group=group, **kwargs)

        return call


class SkewedRouting:
    """Routing with one popular expert, in the place of Megatron's `RouterReplay`: the same for every arm and every run.

    A fixed share of the tokens sends its last choice to expert 0 instead, unless it chose that already; the scores stay
    the router's.
    """

    def __init__(self, share: float):
        self._share = share

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Callable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[T, E]` -> scores and experts `[T, K]`; called by Megatron's router."""
        _, chosen_TK = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        # Multiples of the golden ratio spread the popular tokens evenly whatever their number.
        token_T = torch.arange(scores.shape[0], device=scores.device, dtype=torch.float64)
        popular_T = (token_T * 0.6180339887498949 % 1.0 < self._share) & (chosen_TK != 0).all(1)
        chosen_TK = chosen_TK.clone()
        chosen_TK[:, -1] = chosen_TK[:, -1].masked_fill(popular_T, 0)
        return scores.gather(1, chosen_TK), chosen_TK


def skew_routing(chunks: list[Any], share: float) -> None:
    """Give every MoE layer a `SkewedRouting`."""
    for layer in moe_layers(chunks):
        layer.router.router_replay = SkewedRouting(share)


class PeakMemory:
    """Peak memory of this process in bytes since `reset`: on a GPU, what torch allocated there; on the CPU, resident
    memory, since the start of the process where Linux can't reset it."""

    _clear, _status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def reset(self) -> None:
        """Forget the peak so far."""
        if devices.on_gpu():
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            self._clear.write_text("5")
            self._resettable = True
        except OSError:
            self._resettable = False

    def read(self) -> int:
        """The peak in bytes."""
        if devices.on_gpu():
            return torch.cuda.max_memory_allocated()
        if self._resettable:
            for line in self._status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
