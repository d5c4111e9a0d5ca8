"""Megatron's flex token dispatcher with backend "epv2": dispatch and combine through `ElasticBuffer`.

Legend: T tokens of this rank, H hidden, E experts, K top-k, N rows in expert order, P ranks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic import ElasticBuffer, EPHandle, EventOverlap, autograd
from epv2_plugin.megatron.patches import Patches

BACKEND = "epv2"
# 0.17 moved the overlapped schedule's helper.
SHOULD_FREE_INPUT = (
    "megatron.core.models.gpt.fine_grained_callables"
    if importlib.util.find_spec("megatron.core.models.common.utils") is None
    else "megatron.core.models.common.utils"
)
logger = logging.getLogger("epv2_plugin")

_patches = Patches()
_config = PluginConfig()
_buffers: dict[dist.ProcessGroup, ElasticBuffer] = {}


class FlexTokenDispatcher(MoEFlexTokenDispatcher):
    """Stands where Megatron looks its flex dispatcher up: ours for backend "epv2", else the stock one unchanged."""

    def __new__(
        cls,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return super().__new__(EpTokenDispatcher if config.moe_flex_dispatcher_backend == BACKEND else cls)


class EpTokenDispatcher(FlexTokenDispatcher):
    """Token dispatcher over `ElasticBuffer`.

    Rows arrive in expert order, so there is no permutation before the experts. With tensor-parallel experts a token
    goes to each of an expert's ranks, which together are treated as experts of their own.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: Any = None,
    ):
        # Not the flex dispatcher's own __init__, which knows only the stock backends.
        MoETokenDispatcher.__init__(self, config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.num_experts = num_local_experts * self.tp_size * self.ep_size
        self.buffer = _buffer_for(self.tp_ep_group, config)
        self._options = _config.expert
        # From here on: state of the forward pass that is under way, from preprocess to postprocess.
        self._hidden_shape: torch.Size = torch.Size()
        self._probs_dtype = torch.float32
        self._topk_idx_TK: torch.Tensor | None = None
        self._recv_idx_RK: torch.Tensor | None = None
        self._handle: EPHandle | None = None
        self._event = EventOverlap()
        self._source_N: torch.Tensor | None = None  # received row of each row in expert order (compact layout)
        self._place_N: torch.Tensor | None = None  # place of each row among rows padded per expert

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Run `shared_experts` while tokens travel."""
        MoETokenDispatcher.set_shared_experts(self, shared_experts)

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """Buffers that experts should write into (asked for since 0.19): none, they write where they like."""
        return None, None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Routing map and probabilities `[T, E]` -> tokens `[T, H]` and their weights `[T, K]`."""
        self._hidden_shape, self._probs_dtype = hidden_states.shape, probs.dtype
        tokens_TH = hidden_states.view(-1, hidden_states.shape[-1])
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        # Probabilities are never negative: -1 puts what was not routed (or dropped) behind everything that was.
        # Entries that only pad an expert to its capacity weigh 0 and lose to real ones; they need not travel.
        with torch.no_grad():
            masked_TE = probs.detach().masked_fill(~routing_map, -1)
            best_TK, expert_TK = masked_TE.topk(min(self.config.moe_router_topk, masked_TE.shape[1]), dim=1)
            absent_TK = best_TK < 0
        weights_TK = probs.gather(1, expert_TK).masked_fill(absent_TK, 0).float()
        if self.tp_size > 1:
            first_TK = expert_TK.div(self.num_local_experts, rounding_mode="floor") * (
                (self.tp_size - 1) * self.num_local_experts
            )
            shards = [expert_TK + first_TK + shard * self.num_local_experts for shard in range(self.tp_size)]
            expert_TK, absent_TK = torch.cat(shards, 1), absent_TK.repeat(1, self.tp_size)
            weights_TK = weights_TK.repeat(1, self.tp_size)
        self._topk_idx_TK = expert_TK.masked_fill(absent_TK, -1)
        return tokens_TH, weights_TK

    def token_dispatch(
        self,
        hidden_states: torch.Tensor,
        probs: torch.Tensor,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[T, H]` and weights `[T, K]` -> what this rank's experts get, with the weights."""
        assert self._topk_idx_TK is not None
        fp8 = self._options.dispatch_dtype == "fp8"
        expand = self._options.layout == "expanded"
        overlap = self.shared_experts is not None and not fp8
        limit = self._options.max_tokens_per_rank
        recv_x, self._recv_idx_RK, recv_weights, self._handle, event = autograd.dispatch(
            self.buffer,
            hidden_states,
            self._topk_idx_TK,
            probs,
            num_experts=self.num_experts,
            use_fp8=fp8,
            num_max_tokens_per_rank=None if limit == "auto" else limit,
            expert_alignment=self._alignment,
            do_expand=expand,
            do_zero_padding=expand,
            async_with_compute_stream=overlap,
        )
        self._topk_idx_TK = None
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(recv_x)
            event.current_stream_wait(release_handle=True)
        assert recv_weights is not None
        return recv_x, recv_weights

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What arrived -> rows in expert order `[N, H]`, rows of each expert `[E_local]`, probabilities `[N]`."""
        assert self._handle is not None
        counts = real = self._handle.num_unaligned_recv_tokens_per_expert.tolist()
        self._source_N = self._place_N = None
        if self._recv_idx_RK is not None:
            flat = self._recv_idx_RK.flatten()
            order_N = flat.masked_fill(flat < 0, self.num_local_experts).argsort(stable=True)[: sum(real)]
            self._source_N = order_N.div(self._recv_idx_RK.shape[1], rounding_mode="floor")
            hidden_states = hidden_states.index_select(0, self._source_N)
            probs = probs.flatten().index_select(0, order_N)
            self._recv_idx_RK = None
        else:
            real = self._handle.num_recv_tokens_per_expert_list
        if self.config.moe_pad_expert_input_to_capacity:
            counts = [self._capacity(max(real, default=0))] * self.num_local_experts
        else:
            counts = self._handle.num_recv_tokens_per_expert_list
        if counts != real:
            starts = torch.tensor([0, *counts[:-1]]).cumsum(0) - torch.tensor([0, *real[:-1]]).cumsum(0)
            self._place_N = torch.arange(sum(real)) + starts.repeat_interleave(torch.tensor(real))
            padded = hidden_states.new_zeros(sum(counts), hidden_states.shape[1])
            hidden_states = padded.index_copy(0, self._place_N, hidden_states)
            probs = probs.new_zeros(sum(counts)).index_copy(0, self._place_N, probs)
        return hidden_states, torch.tensor(counts, dtype=torch.int64), probs.to(self._probs_dtype)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Expert output `[N, H]` -> rows as they arrived; in the compact layout, the sum over this rank's experts."""
        if self._place_N is not None:
            hidden_states = hidden_states.index_select(0, self._place_N)
        if self._source_N is not None:
            assert self._handle is not None
            sums = hidden_states.new_zeros(self._handle.num_rows, hidden_states.shape[1], dtype=torch.float32)
            hidden_states = sums.index_add(0, self._source_N, hidden_states.float()).to(hidden_states.dtype)
        return hidden_states

    def token_combine(
        self, hidden_states: torch.Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> torch.Tensor:
        """Rows as they arrived -> their sums `[T, H]` on the ranks that own the tokens."""
        assert self._handle is not None
        combined, self._event = autograd.combine(
            self.buffer, hidden_states, self._handle, async_with_compute_stream=self.shared_experts is not None
        )
        self._handle = None
        return combined

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sums `[T, H]` -> the layer's output, shared experts added, in the shape that came in."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
        self._event.current_stream_wait(release_handle=True)
        output = hidden_states.view(self._hidden_shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()

    @property
    def _alignment(self) -> int:
        """Multiple that the rows of each expert are padded to, for quantized GEMMs."""
        padded = getattr(self.config, "moe_router_padding_for_quantization", False)
        return get_align_size_for_quantization(self.config) if padded else 1

    def _capacity(self, largest: int) -> int:
        """Rows that each local expert is padded to: its capacity on every rank that can send to it."""
        num_tokens = self._hidden_shape[:-1].numel()
        per_rank = get_capacity(
            num_tokens=num_tokens * self.config.moe_router_topk,
            num_experts=self.config.num_moe_experts,
            capacity_factor=self.config.moe_expert_capacity_factor,
        )
        capacity = per_rank * self.tp_size * self.ep_size
        if largest > capacity:
            raise ValueError(
                f"an expert received {largest} rows, its capacity is {capacity}: padding to capacity needs the same "
                f"number of tokens on every rank (here: {num_tokens})"
            )
        return capacity


def _buffer_for(group: dist.ProcessGroup, config: TransformerConfig) -> ElasticBuffer:
    """The buffer that all layers of a group share, made by the first of them."""
    degrees = {
        "expert": config.expert_model_parallel_size,
        "pipeline": config.pipeline_model_parallel_size,
        "context": config.context_parallel_size,
        "tensor": config.tensor_model_parallel_size,
        "virtual_pipeline": config.virtual_pipeline_model_parallel_size or 1,
    }
    for name, degree in degrees.items():
        if getattr(_config.parallel, name) not in ("auto", degree):
            raise _config.fail(f"parallel.{name}", f"Megatron was started with {degree}")
    _config.check(
        num_experts=config.num_moe_experts,
        world_size=dist.get_world_size(),
        expert_tensor=config.expert_tensor_parallel_size or 1,
    )
    if group not in _buffers:
        limit = _config.expert.max_tokens_per_rank
        _buffers[group] = ElasticBuffer(
            group,
            num_max_tokens_per_rank=0 if limit == "auto" else limit,
            allow_hybrid_mode=_config.expert.mode != "direct",
            num_cpu_timeout_secs=_config.timeouts.host_seconds,
            num_gpu_timeout_secs=_config.timeouts.gpu_seconds,
            backend=_config.backend,
        )
        if dist.get_rank(group) == 0:
            logger.info(
                "epv2: EP group of %d ranks (first: global rank %d): host backend over gloo, direct mode, %s layout, "
                "dispatch in %s, 0 SMs",
                dist.get_world_size(group),
                dist.get_rank(),
                _config.expert.layout,
                "fp8" if _config.expert.dispatch_dtype == "fp8" else "the activations' dtype",
            )
    return _buffers[group]


def _accept_backend(post_init: Any) -> Any:
    """`TransformerConfig.__post_init__`, judging a model with our backend by what the all-to-all dispatcher supports.

    The flex dispatchers that Megatron knows lack shared-expert overlap and padding to capacity; ours has both.
    """

    @functools.wraps(post_init)
    def accept(self: TransformerConfig) -> None:
        ours = self.moe_token_dispatcher_type == "flex" and self.moe_flex_dispatcher_backend == BACKEND
        if ours:
            self.moe_token_dispatcher_type = "alltoall"
        try:
            post_init(self)
        finally:
            if ours:
                self.moe_token_dispatcher_type = "flex"

    return accept


def _keep_inputs(should_free_input: Any) -> Any:
    """Megatron's choice of inputs to free early in overlapped schedules, minus those that our backward still reads."""

    @functools.wraps(should_free_input)
    def choose(name: str, is_moe: bool, config: TransformerConfig, *args: Any, **kwargs: Any) -> bool:
        ours = config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend == BACKEND
        if ours and name in ("mlp", "moe_dispatch"):
            return False
        return should_free_input(name, is_moe, config, *args, **kwargs)

    return choose


def install(config: PluginConfig) -> None:
    """Make Megatron accept backend "epv2" of its flex dispatcher, with `config`."""
    global _config
    _config = config
    try:
        _replace()
    except BaseException:
        uninstall()
        raise


def _replace() -> None:
    field = TransformerConfig.__dataclass_fields__["moe_flex_dispatcher_backend"]
    _patches.attribute(moe_layer, "MoEFlexTokenDispatcher", FlexTokenDispatcher)
    _patches.attribute(TransformerConfig, "__post_init__", _accept_backend(TransformerConfig.__post_init__))
    # Megatron-LM makes its command-line choices from the field's type.
    choices: Any = Literal[(*get_args(field.type), BACKEND)]
    _patches.instance(field, "type", choices, "TransformerConfig.moe_flex_dispatcher_backend.type")
    schedules = importlib.import_module(SHOULD_FREE_INPUT)
    _patches.attribute(schedules, "should_free_input", _keep_inputs(schedules.should_free_input))


def uninstall() -> None:
    """Restore Megatron and release the buffers."""
    global _config
    _patches.undo()
    for buffer in _buffers.values():
        buffer.destroy()
    _buffers.clear()
    _config = PluginConfig()


def replaced() -> tuple[str, ...]:
    """Dotted names of Megatron's symbols that are replaced."""
    return _patches.names


def groups() -> list[dict[str, Any]]:
    """What runs on each expert-parallel group of this rank."""
    return [
        {
            "ranks": dist.get_process_group_ranks(group),
            "backend": "host",
            "mode": "direct",
            "transport": "gloo",
            "sms": 0,
            "qps": 0,
            "sent_bytes": buffer.traffic.sent_bytes,
            "undeduplicated_bytes": buffer.traffic.undeduplicated_bytes,
        }
        for group, buffer in _buffers.items()
    ]
