"""Megatron's flex token dispatcher with backend "epv2": dispatch and combine through `ElasticBuffer`.

Legend: T tokens of this rank, H hidden, E experts, K top-k, N rows in expert order, P ranks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic import ElasticBuffer, EPHandle, EventOverlap, autograd
from epv2_plugin.elastic.budget import buffer_options, expert_sms
from epv2_plugin.elastic.buffer import resolve_backend
from epv2_plugin.elastic.sizing import align
from epv2_plugin.patches import Patches

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


@dataclass(frozen=True)
class _Sizes:
    """Layers of a group with equal sizes share a buffer; another model's layers have one of their own."""

    hidden: int
    num_topk: int
    num_experts: int


@dataclass(frozen=True)
class _Shared:
    buffer: ElasticBuffer
    num_sms: int  # that an operation may hold


_shared: dict[tuple[dist.ProcessGroup, _Sizes], _Shared] = {}


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
        _check_model(config)
        self._shared = _share(self.tp_ep_group, config)
        self._options = _config.expert
        # From here on: state of the forward pass that is under way, from preprocess to postprocess.
        self._hidden_shape: torch.Size = torch.Size()
        self._probs_dtype = torch.float32
        self._topk_idx_TK: torch.Tensor | None = None
        self._recv_idx_RK: torch.Tensor | None = None
        self._handle: EPHandle | None = None
        self._event = EventOverlap()
        self._in_flight: torch.Tensor | None = None  # what the communication stream still reads
        self._rows: _CompactRows | None = None
        self._place_N: torch.Tensor | None = None  # place of each row among rows padded per expert

    @property
    def buffer(self) -> ElasticBuffer | None:
        """The buffer of this layer's group; None until the first micro-batch has shown how large it must be."""
        return None if self._shared is None else self._shared.buffer

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
        if self._shared is None:
            self._shared = _share(self.tp_ep_group, self.config, hidden_states)
            assert self._shared is not None
        buffer, expand = self._shared.buffer, self._options.layout == "expanded"
        if 0 < buffer.num_max_tokens_per_rank < hidden_states.shape[0]:
            raise _config.fail(
                "expert.max_tokens_per_rank",
                f"a micro-batch has {hidden_states.shape[0]} tokens on this rank, the buffer was made for "
                f"{buffer.num_max_tokens_per_rank}: set it to the most that a micro-batch can have",
            )
        overlap = self.shared_experts is not None
        recv_x, self._recv_idx_RK, recv_weights, self._handle, event = autograd.dispatch(
            buffer,
            hidden_states,
            self._topk_idx_TK,
            probs,
            num_experts=self.num_experts,
            use_fp8=self._options.dispatch_dtype == "fp8",
            # The compact layout is put in expert order here, and padded then.
            expert_alignment=self._alignment if expand else 1,
            do_expand=expand,
            do_zero_padding=expand,
            num_sms=self._shared.num_sms,
            previous_event=buffer.capture() if overlap else None,
            async_with_compute_stream=overlap,
        )
        if self.shared_experts is not None:
            # After the dispatch, so that a GPU has that first; and its backward comes first, too.
            self.shared_experts.linear_fc1_forward_and_act(recv_x)
            event.current_stream_wait(release_handle=True)
        self._topk_idx_TK = None  # read until here, on the communication stream
        assert recv_weights is not None
        return recv_x, recv_weights

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What arrived -> rows in expert order `[N, H]`, rows of each expert `[E_local]`, probabilities `[N]`.

        The rows of each expert are on the host, where every kind of experts reads them.
        """
        assert self._handle is not None
        # On the host since the dispatch: nothing here waits for a device.
        counts = real = self._handle.num_recv_tokens_per_expert_list
        self._rows = self._place_N = None
        if self._recv_idx_RK is not None:
            self._rows = _CompactRows(self._recv_idx_RK, self.num_local_experts, sum(real))
            hidden_states, probs = self._rows.spread(hidden_states), self._rows.spread_weights(probs)
            self._recv_idx_RK = None
            counts = [align(count, self._alignment) for count in real]
        if self.config.moe_pad_expert_input_to_capacity:
            counts = [self._capacity(max(real, default=0))] * self.num_local_experts
        if counts != real:
            device, total = hidden_states.device, sum(real)
            starts = _running_sums(counts)
            shifts = [start - packed for start, packed in zip(starts, _running_sums(real), strict=True)]
            shift_N = _to_device(shifts, device).repeat_interleave(_to_device(real, device), output_size=total)
            self._place_N = torch.arange(total, device=device) + shift_N
            padded = hidden_states.new_zeros(sum(counts), hidden_states.shape[1])
            hidden_states = padded.index_copy(0, self._place_N, hidden_states)
            probs = probs.new_zeros(sum(counts)).index_copy(0, self._place_N, probs)
        return hidden_states, torch.tensor(counts, dtype=torch.int64), probs.to(self._probs_dtype)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Expert output `[N, H]` -> rows as they arrived; in the compact layout, the sum over this rank's experts."""
        if self._place_N is not None:
            hidden_states = hidden_states.index_select(0, self._place_N)
        return hidden_states if self._rows is None else self._rows.gather(hidden_states)

    def token_combine(
        self, hidden_states: torch.Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> torch.Tensor:
        """Rows as they arrived -> their sums `[T, H]` on the ranks that own the tokens."""
        assert self._handle is not None
        assert self._shared is not None
        buffer, overlap = self._shared.buffer, self.shared_experts is not None
        if self.shared_experts is not None:
            # Their second half runs beside the combine, not beside the routed experts, which need the whole device.
            self.shared_experts.stream.wait_stream(torch.cuda.current_stream())
        combined, self._event = autograd.combine(
            buffer,
            hidden_states,
            self._handle,
            num_sms=self._shared.num_sms,
            previous_event=buffer.capture() if overlap else None,
            async_with_compute_stream=overlap,
        )
        self._handle = self._rows = self._place_N = None
        self._in_flight = hidden_states if overlap else None
        return combined

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sums `[T, H]` -> the layer's output, shared experts added, in the shape that came in."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
        self._event.current_stream_wait(release_handle=True)
        self._in_flight = None
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


class _CompactRows:
    """Rows that arrived once per token, and their copies in expert order: one for each of their experts here.

    Sums over a row's copies run in fp32 in top-k order, on a GPU as on the host: no atomics.
    """

    def __init__(self, recv_idx_RK: torch.Tensor, num_local_experts: int, num_copies: int):
        flat = recv_idx_RK.flatten()
        # The entry of `recv_idx_RK` behind each copy, and the received row that it belongs to.
        self._entry_N = flat.masked_fill(flat < 0, num_local_experts).argsort(stable=True)[:num_copies]
        self._source_N = self._entry_N.div(recv_idx_RK.shape[1], rounding_mode="floor")
        place = torch.full_like(flat, -1)
        place[self._entry_N] = torch.arange(num_copies, device=flat.device)
        self._place_RK = place.view_as(recv_idx_RK)

    def spread(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """Rows as they arrived -> copies in expert order `[N, H]`."""
        return _Spread.apply(rows_RH, self._source_N, self._place_RK)

    def spread_weights(self, weights_RK: torch.Tensor) -> torch.Tensor:
        """Weights as they arrived -> one for each copy `[N]`."""
        return weights_RK.flatten().index_select(0, self._entry_N)

    def gather(self, copies_NH: torch.Tensor) -> torch.Tensor:
        """Copies in expert order -> the sum over each received row's `[R, H]`."""
        return _Gather.apply(copies_NH, self._source_N, self._place_RK)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, source_N: torch.Tensor, place_RK: torch.Tensor) -> torch.Tensor:
        ctx.place_RK = place_RK
        return rows_RH.index_select(0, source_N)

    @staticmethod
    def backward(ctx: Any, grad_NH: torch.Tensor) -> Any:
        return _sum_copies(grad_NH, ctx.place_RK), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies_NH: torch.Tensor, source_N: torch.Tensor, place_RK: torch.Tensor) -> torch.Tensor:
        ctx.source_N = source_N
        return _sum_copies(copies_NH, place_RK)

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> Any:
        return grad_RH.index_select(0, ctx.source_N), None, None


def _sum_copies(copies_NH: torch.Tensor, place_RK: torch.Tensor) -> torch.Tensor:
    """`copies_NH` at the places of each row (-1 = none), summed in fp32: `[R, H]`, dtype of the copies."""
    sums_RH = copies_NH.new_zeros(place_RK.shape[0], copies_NH.shape[1], dtype=torch.float32)
    if copies_NH.shape[0]:
        for place_R in place_RK.unbind(1):
            copy_RH = copies_NH.index_select(0, place_R.clamp(min=0))
            sums_RH += copy_RH.masked_fill((place_R < 0).unsqueeze(1), 0)
    return sums_RH.to(copies_NH.dtype)


def _running_sums(counts: list[int]) -> list[int]:
    """Sum of the counts before each."""
    sums = [0]
    for count in counts[:-1]:
        sums.append(sums[-1] + count)
    return sums[: len(counts)]


def _to_device(values: list[int], device: torch.device) -> torch.Tensor:
    """int64 tensor on `device`, without waiting for it."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=pinned)


def _check_model(config: TransformerConfig) -> None:
    """Refuse a model that the plugin's configuration does not describe."""
    _config.check_degrees(
        "Megatron",
        expert=config.expert_model_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
        context=config.context_parallel_size,
        tensor=config.tensor_model_parallel_size,
        virtual_pipeline=config.virtual_pipeline_model_parallel_size or 1,
    )
    _config.check(
        num_experts=config.num_moe_experts,
        world_size=dist.get_world_size(),
        expert_tensor=config.expert_tensor_parallel_size or 1,
    )


def _share(
    group: dist.ProcessGroup, config: TransformerConfig, tokens_TH: torch.Tensor | None = None
) -> _Shared | None:
    """What layers like this one share in `group`, made by the first of them that knows how large a buffer must be.

    Args:
        tokens_TH: this rank's tokens of a micro-batch, None = there has been none.

    Returns:
        None if nothing but a micro-batch can tell how many tokens a rank has at once.
    """
    # With tensor-parallel experts, each of an expert's ranks counts as an expert.
    expert_tensor = dist.get_world_size(group) // config.expert_model_parallel_size
    sizes = _Sizes(
        hidden=getattr(config, "moe_latent_size", None) or config.hidden_size,
        num_topk=min(config.moe_router_topk, config.num_moe_experts) * expert_tensor,
        num_experts=config.num_moe_experts * expert_tensor,
    )
    if (group, sizes) not in _shared:
        limit = _most_tokens(group, config, tokens_TH)
        if limit is None:
            return None
        _shared[group, sizes] = _make_shared(group, sizes, limit)
    return _shared[group, sizes]


def _most_tokens(group: dist.ProcessGroup, config: TransformerConfig, tokens_TH: torch.Tensor | None) -> int | None:
    """Most tokens that a rank of `group` dispatches at once; 0 = the backend needs no limit, None = not known yet."""
    limit = _config.expert.max_tokens_per_rank
    if limit != "auto":
        return limit
    if resolve_backend(_config.backend) == "host":
        return 0
    if tokens_TH is None:
        return _tokens_in_megatron_lm(config)
    most = torch.tensor([tokens_TH.shape[0]], dtype=torch.int64, device=tokens_TH.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return max(1, int(most))


def _tokens_in_megatron_lm(config: TransformerConfig) -> int | None:
    """Tokens of a micro-batch on each rank by Megatron-LM's arguments; None where Megatron-LM does not run.

    `TransformerConfig` knows neither the sequence length nor the micro-batch size.
    """
    args = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    length, sequences = getattr(args, "seq_length", None), getattr(args, "micro_batch_size", None)
    if not length or not sequences:
        return None
    pieces = config.context_parallel_size
    pieces *= config.tensor_model_parallel_size if config.sequence_parallel else 1
    return -(-max(length, getattr(args, "decoder_seq_length", None) or 0) * sequences // pieces)


def _make_shared(group: dist.ProcessGroup, sizes: _Sizes, limit: int) -> _Shared:
    fp8 = _config.expert.dispatch_dtype == "fp8"
    options = buffer_options(
        _config,
        group,
        max_tokens=limit,
        hidden=sizes.hidden,
        num_topk=sizes.num_topk,
        num_experts=sizes.num_experts,
    )
    buffer = ElasticBuffer(group, **options)
    what = buffer.describe()
    num_sms = expert_sms(_config, buffer, sizes.num_experts, sizes.num_topk)
    if dist.get_rank(group) == 0:
        logger.info(
            "epv2: EP group of %d ranks (first: global rank %d): %s backend over %s, %s mode, %s layout, "
            "dispatch in %s, %d SMs%s",
            dist.get_world_size(group),
            dist.get_rank(),
            what["backend"],
            what["transport"],
            what["mode"],
            _config.expert.layout,
            "fp8" if fp8 else "the activations' dtype",
            num_sms,
            f", at most {limit} tokens per rank" if limit else "",
        )
    return _Shared(buffer, num_sms)


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
    release()
    _config = PluginConfig()


def release() -> None:
    """Release the buffers, which must happen before their groups are destroyed. Every rank must call it."""
    for shared in _shared.values():
        shared.buffer.destroy()
    _shared.clear()


def replaced() -> tuple[str, ...]:
    """Dotted names of Megatron's symbols that are replaced."""
    return _patches.names


def groups() -> list[dict[str, Any]]:
    """What runs in each expert-parallel group of this rank, one entry for each buffer."""
    return [
        {
            "ranks": dist.get_process_group_ranks(group),
            **shared.buffer.describe(),
            "sms": shared.num_sms,
            "sent_bytes": shared.buffer.traffic.sent_bytes,
            "undeduplicated_bytes": shared.buffer.traffic.undeduplicated_bytes,
        }
        for (group, _), shared in _shared.items()
    ]
