"""What one step of an arm spends where under Megatron: clocks on its MoE layers, bytes that its communication sends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.moe_layer import MoELayer

from epv2_plugin.patches import Patches
from epv2_plugin.training.instruments import StageClock


def moe_layers(chunks: list[Any]) -> list[MoELayer]:
    """The MoE layers of this rank."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]


def clock_of(chunks: list[Any]) -> StageClock:
    """A clock over the MoE layers and micro-batches of `chunks`."""
    clock = StageClock()
    for layer in moe_layers(chunks):
        dispatcher = layer.token_dispatcher
        for method, brackets in {
            "dispatch_preprocess": ("before dispatch", None),
            "dispatch_postprocess": (None, "after dispatch"),
            "combine_preprocess": ("before combine", None),
            "combine_postprocess": (None, "after combine"),
        }.items():
            setattr(dispatcher, method, clock.bracketed(getattr(dispatcher, method), *brackets))
    return clock


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
