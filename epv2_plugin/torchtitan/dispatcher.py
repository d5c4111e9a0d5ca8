"""torchtitan's token dispatcher over `ElasticBuffer`.

Dispatch and combine are operators of `torch.library`: activation checkpointing that saves the results of operators by
name can then save theirs, and need not send everything twice. An operator passes tensors only, so a buffer travels as a
number, and the handle of a dispatch as an int64 tensor whose memory owns it: whoever keeps that tensor, be it
autograd or a checkpoint, keeps the handle, and it is gone when nobody does.

Legend: T tokens of this rank, D hidden, K top-k, E experts, e experts of this rank, R rows in expert order.
"""

from __future__ import annotations

import itertools
import logging
import struct
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.models.common.token_dispatcher import BaseEPTokenDispatcher, LocalTokenDispatcher

from epv2_plugin.config import PluginConfig, parse_config
from epv2_plugin.elastic import ElasticBuffer, EPHandle
from epv2_plugin.elastic.budget import buffer_options, expert_sms
from epv2_plugin.elastic.buffer import resolve_backend
from epv2_plugin.elastic.quant import per_token_cast_back

logger = logging.getLogger("epv2_plugin")


@dataclass(frozen=True)
class _Shared:
    """A buffer and how it is used; every layer of a group with the same sizes and configuration has the same."""

    buffer: ElasticBuffer
    num_sms: int
    use_fp8: bool


_shared: dict[tuple[Any, ...], int] = {}  # number of what a group, sizes and configuration share
_by_number: dict[int, _Shared] = {}
_numbers = itertools.count(1)


class _Held(bytearray):
    """The memory of a tensor with a handle's number; holds the handle."""

    handle: EPHandle


_held: weakref.WeakValueDictionary[int, _Held] = weakref.WeakValueDictionary()


def _hold(handle: EPHandle) -> torch.Tensor:
    """int64 `[1]`, through which `_handle` finds the handle as long as the tensor's memory lives."""
    number = next(_numbers)
    held = _Held(struct.pack("=q", number))
    held.handle = handle
    _held[number] = held
    return torch.frombuffer(held, dtype=torch.int64)


def _handle(token: torch.Tensor) -> EPHandle:
    return _held[int(token)].handle


@torch.library.custom_op("epv2::dispatch", mutates_args=())
def _dispatch(
    x_TD: torch.Tensor, scores_TK: torch.Tensor, experts_TK: torch.Tensor, shared: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `[R, D]` in expert order, their scores fp32 `[R]`, rows of each local expert int64 `[e]`, the handle."""
    what = _by_number[shared]
    rows, _, scores_R, handle, _ = what.buffer.dispatch(
        x_TD,
        experts_TK,
        scores_TK,
        num_experts=num_experts,
        use_fp8=what.use_fp8,
        do_expand=True,
        num_sms=what.num_sms,
    )
    rows_RD = rows if isinstance(rows, torch.Tensor) else per_token_cast_back(*rows, dtype=x_TD.dtype)
    counts = torch.tensor(handle.num_recv_tokens_per_expert_list, dtype=torch.int64, device=x_TD.device)
    assert scores_R is not None
    return rows_RD, scores_R, counts, _hold(handle)


@torch.library.custom_op("epv2::combine", mutates_args=())
def _combine(rows_RD: torch.Tensor, token: torch.Tensor, shared: int) -> torch.Tensor:
    """The sum of each token's rows `[T, D]`."""
    what = _by_number[shared]
    return what.buffer.combine(rows_RD, _handle(token), num_sms=what.num_sms)[0]


def _dispatch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.shared = inputs[3]
    ctx.save_for_backward(output[3])


def _dispatch_backward(ctx: Any, grad_rows: Any, grad_scores: Any, *_: Any) -> tuple[Any, ...]:
    what, (token,) = _by_number[ctx.shared], ctx.saved_tensors
    combined = what.buffer.combine(
        grad_rows.contiguous(), _handle(token), topk_weights=grad_scores.contiguous(), num_sms=what.num_sms
    )
    return *combined[:2], None, None, None


def _combine_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.shared = inputs[2]
    ctx.save_for_backward(inputs[1])


def _combine_backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[Any, ...]:
    what, (token,) = _by_number[ctx.shared], ctx.saved_tensors
    grad_RD = what.buffer.dispatch(grad_TD.contiguous(), handle=_handle(token), do_expand=True, num_sms=what.num_sms)[0]
    return grad_RD, None, None


_dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_context)
_combine.register_autograd(_combine_backward, setup_context=_combine_context)


def operators() -> set[Any]:
    """The operators whose results checkpointing should keep."""
    return {torch.ops.epv2.dispatch.default, torch.ops.epv2.combine.default}


@dataclass(frozen=True)
class _Metadata:
    """What combine must know of the dispatch: the handle's tensor and the scores of the rows, fp32 `[R]`."""

    token: torch.Tensor
    scores_R: torch.Tensor


class EpTokenDispatcher(BaseEPTokenDispatcher):
    """Dispatch and combine through `ElasticBuffer`; without expert parallelism, torchtitan's local dispatcher."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        plugin: dict[str, Any] = field(default_factory=dict)
        """The plugin's configuration (the content of its YAML)."""
        plugin_source: str = "<defaults>"
        """Where that came from, for messages."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._config = parse_config(config.plugin, config.plugin_source)
        self._number = 0  # of what the layers share, made by the first dispatch

    def dispatch(
        self,
        x_TD: torch.Tensor,
        topk_scores_TK: torch.Tensor,
        topk_expert_ids_TK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """See `LocalTokenDispatcher.dispatch`; the number of tokens may differ between ranks.

        Raises:
            ConfigError: more tokens than `expert.max_tokens_per_rank`. CommunicationError: a peer died or is too late.
        """
        if self.ep_mesh is None:
            return LocalTokenDispatcher.dispatch(
                self, x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E
            )
        limit = self._config.expert.max_tokens_per_rank
        if limit != "auto" and x_TD.shape[0] > limit:
            raise self._config.fail(
                "expert.max_tokens_per_rank", f"a micro-batch has {x_TD.shape[0]} tokens on this rank"
            )
        if not self._number:
            self._number = self._share(self.ep_mesh.get_group(), x_TD.shape[1])
        rows_RD, scores_R, counts_e, token = _dispatch(
            x_TD, topk_scores_TK.float(), topk_expert_ids_TK, self._number, self.num_experts
        )
        return rows_RD, counts_e, _Metadata(token, scores_R)

    def combine(self, routed_output_RD: torch.Tensor, metadata: Any, x_TD: torch.Tensor) -> torch.Tensor:
        """See `LocalTokenDispatcher.combine`. Scores are applied in fp32, and sums over a token's rows run in fp32."""
        if not isinstance(metadata, _Metadata):
            return LocalTokenDispatcher.combine(self, routed_output_RD, metadata, x_TD)
        scored_RD = (routed_output_RD.float() * metadata.scores_R.unsqueeze(1)).to(routed_output_RD.dtype)
        return _combine(scored_RD, metadata.token, self._number)

    def _share(self, group: dist.ProcessGroup, hidden: int) -> int:
        config = self._config
        key = (group, hidden, self.top_k, self.num_experts, config.model_dump_json())
        if key in _shared:
            return _shared[key]
        config.check_degrees("torchtitan", expert=group.size())
        config.check(num_experts=self.num_experts)
        limit, fp8 = config.expert.max_tokens_per_rank, config.expert.dispatch_dtype
        options = buffer_options(
            config,
            group,
            max_tokens=0 if limit == "auto" else limit,
            hidden=hidden,
            num_topk=self.top_k,
            num_experts=self.num_experts,
        )
        buffer = ElasticBuffer(group, **options)
        what = buffer.describe()
        num_sms = expert_sms(config, buffer, self.num_experts, self.top_k)
        if dist.get_rank(group) == 0:
            logger.info(
                "epv2: EP group of %d ranks (first: global rank %d): %s backend over %s, dispatch in %s, %d SMs%s",
                group.size(),
                dist.get_rank(),
                what["backend"],
                what["transport"],
                fp8 if fp8 == "fp8" else "the activations' dtype",
                num_sms,
                "" if limit == "auto" else f", at most {limit} tokens per rank",
            )
        number = _shared[key] = next(_numbers)
        _by_number[number] = _Shared(buffer, num_sms, fp8 == "fp8")
        return number


def check_backend(config: PluginConfig) -> str:
    """The backend that runs, "host" or "cuda": torchtitan computes on the GPU where there is one.

    Raises:
        ConfigError: it can't run here, or needs more SMs than there are.
    """
    try:
        backend = resolve_backend(config.backend)
    except RuntimeError as error:
        raise config.fail("backend", str(error)) from None
    cuda = torch.cuda.is_available()
    if cuda and backend == "host":
        raise config.fail(
            "backend", "the host backend trains on the CPU; hide the GPU (CUDA_VISIBLE_DEVICES=) to use it"
        )
    config.check(device_sms=torch.cuda.get_device_properties(0).multi_processor_count if cuda else None)
    return backend


def check(config: PluginConfig) -> None:
    """Refuse what the dispatcher can't do with this configuration or on this machine.

    Raises:
        ConfigError: a key, its value and what is allowed.
    """
    backend = check_backend(config)
    if config.expert.mode == "hybrid" and backend == "host":
        raise config.fail("expert.mode", "the host backend makes one hop: 'auto' or 'direct'")
    if config.expert.layout != "expanded":
        raise config.fail("expert.layout", "torchtitan's experts take rows in expert order: 'expanded'")
    if not config.expert.host_sync:
        raise config.fail("expert.host_sync", "must be true for torchtitan, whose experts take exact counts")
    if backend == "cuda" and config.expert.max_tokens_per_rank == "auto":
        raise config.fail(
            "expert.max_tokens_per_rank",
            "the cuda backend needs a number here: the most tokens of a micro-batch on a rank (batch x sequence)",
        )


def release() -> None:
    """Release the buffers, which must happen before their groups are destroyed. Every rank must call it."""
    for what in _by_number.values():
        what.buffer.destroy()
    _shared.clear()
    _by_number.clear()


def groups() -> list[dict[str, Any]]:
    """What runs in each expert-parallel group of this rank, one entry for each buffer."""
    return [
        {
            "primitive": "expert",
            "ranks": dist.get_process_group_ranks(what.buffer.group),
            **what.buffer.describe(),
            "sms": what.num_sms,
            "sent_bytes": what.buffer.traffic.sent_bytes,
            "undeduplicated_bytes": what.buffer.traffic.undeduplicated_bytes,
        }
        for what in _by_number.values()
    ]
