"""A recipe: one YAML with `model`, `data`, `train`, `megatron` and `plugin`, which `epv2 train` and `epv2 ab` run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from epv2_plugin.config import ConfigError, Document, PluginConfig, Section, parse, parse_config, read_yaml

DISPATCHERS = ("alltoall", "allgather", "epv2")


class Mla(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434); sizes per head where a head is meant."""

    q_lora_rank: int | None = Field(ge=1)
    kv_lora_rank: int = Field(ge=1)
    qk_head_dim: int = Field(ge=1)
    qk_pos_emb_head_dim: int = Field(ge=1)
    v_head_dim: int = Field(ge=1)


class Moe(Section):
    """Mixture of experts as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)."""

    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    num_groups: int | None = Field(None, ge=1)
    group_top_k: int | None = Field(None, ge=1)
    ffn_hidden_size: int = Field(ge=1)
    num_shared_experts: int = Field(0, ge=0)
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    expert_bias: bool = True
    expert_bias_update_rate: float = Field(1e-3, ge=0)
    routed_scaling_factor: float = Field(1.0, gt=0)
    aux_loss_coeff: float = Field(0.0, ge=0)


class ModelShape(Section):
    """The transformer. `first_dense_layers` layers have a dense MLP of `ffn_hidden_size`, the rest are MoE layers."""

    num_layers: int = Field(ge=1)
    first_dense_layers: int = Field(1, ge=0)
    hidden_size: int = Field(ge=8)
    num_attention_heads: int = Field(ge=1)
    ffn_hidden_size: int = Field(ge=1)
    vocab_size: int = Field(256, ge=256)
    seq_length: int = Field(ge=2)
    rotary_base: float = Field(10000.0, gt=0)
    init_std: float = Field(0.006, gt=0)
    mtp_layers: int = Field(0, ge=0)
    mtp_loss_scale: float = Field(0.1, ge=0)
    mla: Mla
    moe: Moe


class Data(Section):
    """Training text. `stdlib` = the Python standard library's sources; else a file or folder, or a .bin/.idx prefix."""

    kind: Literal["bytes", "megatron"] = "bytes"
    path: str = "stdlib"


class Train(Section):
    """The run. Batch sizes count sequences; the global batch is split over data-parallel ranks and micro-batches.

    `nodes`: among which `epv2 train` and `epv2 ab` divide the processes of this machine as `epv2 emulate` does.
    """

    processes: int = Field(ge=1)
    nodes: int = Field(1, ge=1)
    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(1, ge=1)
    lr: float = Field(3e-4, gt=0)
    min_lr: float = Field(3e-5, ge=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    clip_grad: float = Field(1.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(1234, ge=0, lt=1 << 63)  # Megatron adds offsets for ranks to it
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    checkpoint_every: int = Field(0, ge=0)


class Recipe(Document):
    """A whole recipe.

    `megatron` holds any further field of Megatron-Core's `TransformerConfig`, by its name there (for example
    `recompute_granularity: full`); it may not repeat what another key of the recipe decides.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    model: ModelShape
    data: Data = Data()
    train: Train
    megatron: dict[str, Any] = Field(default_factory=dict)
    plugin: PluginConfig = PluginConfig()
    _source: str = PrivateAttr("<recipe>")

    def degree(self, name: Literal["expert", "pipeline", "context", "tensor", "virtual_pipeline"]) -> int:
        """A parallel degree of this run; `auto` is 1 here, because no framework says otherwise."""
        degree = getattr(self.plugin.parallel, name)
        return 1 if degree == "auto" else degree

    @property
    def data_parallel(self) -> int:
        """Replicas of the dense parameters that each see other sequences."""
        return self.train.processes // (self.degree("tensor") * self.degree("pipeline") * self.degree("context"))

    @property
    def micro_batches(self) -> int:
        """Forward passes of one data-parallel replica in one step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel)


# TransformerConfig fields that a recipe decides elsewhere, and where.
DECIDED_BY = {
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.num_attention_heads",
    "ffn_hidden_size": "model.ffn_hidden_size",
    "rotary_base": "model.rotary_base",
    "init_method_std": "model.init_std",
    "mtp_num_layers": "model.mtp_layers",
    "mtp_loss_scaling_factor": "model.mtp_loss_scale",
    "multi_latent_attention": "model.mla",
    "q_lora_rank": "model.mla.q_lora_rank",
    "kv_lora_rank": "model.mla.kv_lora_rank",
    "qk_head_dim": "model.mla.qk_head_dim",
    "qk_pos_emb_head_dim": "model.mla.qk_pos_emb_head_dim",
    "v_head_dim": "model.mla.v_head_dim",
    "moe_layer_freq": "model.first_dense_layers",
    "num_moe_experts": "model.moe.num_experts",
    "moe_router_topk": "model.moe.top_k",
    "moe_router_num_groups": "model.moe.num_groups",
    "moe_router_group_topk": "model.moe.group_top_k",
    "moe_ffn_hidden_size": "model.moe.ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "model.moe.num_shared_experts",
    "moe_router_score_function": "model.moe.score_function",
    "moe_router_enable_expert_bias": "model.moe.expert_bias",
    "moe_router_bias_update_rate": "model.moe.expert_bias_update_rate",
    "moe_router_topk_scaling_factor": "model.moe.routed_scaling_factor",
    "moe_aux_loss_coeff": "model.moe.aux_loss_coeff",
    "moe_router_load_balancing_type": "model.moe.aux_loss_coeff",
    "moe_token_dispatcher_type": "plugin",
    "moe_flex_dispatcher_backend": "plugin",
    "moe_enable_deepep": "plugin",
    "tensor_model_parallel_size": "plugin.parallel.tensor",
    "sequence_parallel": "plugin.parallel.tensor",
    "expert_tensor_parallel_size": "plugin.parallel.tensor",
    "pipeline_model_parallel_size": "plugin.parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "plugin.parallel.virtual_pipeline",
    "context_parallel_size": "plugin.parallel.context",
    "expert_model_parallel_size": "plugin.parallel.expert",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "params_dtype": "train.precision",
    "pipeline_dtype": "train.precision",
    "num_layers_in_first_pipeline_stage": "megatron.pipeline_model_parallel_layout",
    "num_layers_in_last_pipeline_stage": "megatron.pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split": "megatron.pipeline_model_parallel_layout",
    "account_for_loss_in_pipeline_split": "megatron.pipeline_model_parallel_layout",
}


def load_recipe(path: str | os.PathLike[str], overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    `plugin` may be a mapping or the path of a plugin YAML, looked up beside the recipe.

    Args:
        path: the recipe's YAML.
        overrides: values to set before checking, by dotted key or nested: `{"train.steps": 10}` or
            `{"train": {"steps": 10}}`.

    Raises:
        ConfigError: the recipe can't be read, a key is unknown, or a value does not fit the others.
    """
    source = str(path)
    data = read_yaml(path)
    if "torchtitan" in data:
        raise ConfigError(
            source, "torchtitan", data["torchtitan"], "a recipe for torchtitan, which only `epv2 ab` takes"
        )
    if data and not set(data) - set(PluginConfig.model_fields):
        allowed = "must be a recipe (name, model, data, train; see recipes/): these are keys of a plugin configuration"
        raise ConfigError(source, "(top level)", ", ".join(data), allowed)
    plugin = data.pop("plugin", None)
    plugin_source, plugin_key = source, "plugin"
    if isinstance(plugin, str):
        plugin_path = Path(path).parent / Path(plugin).expanduser()
        plugin, plugin_source, plugin_key = read_yaml(plugin_path), str(plugin_path), ""
    for dotted, value in _leaves(overrides or {}):
        head, _, rest = dotted.partition(".")
        if head == "plugin":
            plugin = {} if plugin is None else plugin
            _override(plugin, rest, value, source, dotted)
        else:
            _override(data, dotted, value, source, dotted)
    config = parse_config(plugin, plugin_source, key=plugin_key)
    recipe = parse(Recipe, {**data, "plugin": config}, source)
    recipe._source = source
    _check(recipe)
    return recipe


def _leaves(overrides: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping with its dotted key."""
    for key, value in overrides.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _override(data: Any, rest: str, value: Any, source: str, dotted: str) -> None:
    *sections, last = rest.split(".")
    for section in sections:
        data = data.setdefault(section, {}) if isinstance(data, dict) else None
    if not isinstance(data, dict) or not last:
        raise ConfigError(source, dotted, value, "only keys of a section can be overridden")
    data[last] = value


def _check(recipe: Recipe) -> None:
    """Everything that involves more than one key, in the order in which a reader would want to know."""
    model, moe, train = recipe.model, recipe.model.moe, recipe.train
    if model.first_dense_layers > model.num_layers:
        raise recipe.fail("model.first_dense_layers", f"at most model.num_layers ({model.num_layers})")
    if model.mla.qk_pos_emb_head_dim % 2:
        raise recipe.fail("model.mla.qk_pos_emb_head_dim", "must be even, because rotary positions turn pairs")
    _check_moe(recipe)
    if train.warmup_steps >= train.steps:
        raise recipe.fail("train.warmup_steps", f"must be below train.steps ({train.steps})")
    if train.min_lr > train.lr:
        raise recipe.fail("train.min_lr", f"at most train.lr ({train.lr})")
    if train.overlap_param_gather and not (train.distributed_optimizer and train.overlap_grad_reduce):
        raise recipe.fail("train.overlap_param_gather", "needs distributed_optimizer and overlap_grad_reduce")
    if train.processes % train.nodes:
        raise recipe.fail("train.nodes", f"must divide train.processes ({train.processes})")
    recipe.plugin.check(num_experts=moe.num_experts, world_size=train.processes)
    tensor, context = recipe.degree("tensor"), recipe.degree("context")
    split_by_tensor = ["model.num_attention_heads", "model.ffn_hidden_size", "model.vocab_size"]
    split_by_tensor += ["model.moe.ffn_hidden_size"] if moe.num_shared_experts else []
    for key in split_by_tensor:
        section, _, name = key.rpartition(".")
        value = getattr(model if section == "model" else moe, name)
        if value % tensor:
            raise recipe.fail(key, f"must be a multiple of plugin.parallel.tensor ({tensor})")
    # The zigzag split of context parallelism gives every rank two chunks.
    pieces = tensor * (2 * context if context > 1 else 1)
    if model.seq_length % pieces:
        raise recipe.fail(
            "model.seq_length",
            f"must be a multiple of {pieces} (tensor {tensor}, context {context} in two chunks each)",
        )
    per_pass = train.micro_batch_size * recipe.data_parallel
    if train.global_batch_size % per_pass:
        raise recipe.fail(
            "train.global_batch_size",
            f"must be a multiple of {per_pass} (micro_batch_size {train.micro_batch_size} x "
            f"{recipe.data_parallel} data-parallel ranks)",
        )
    virtual, pipeline = recipe.degree("virtual_pipeline"), recipe.degree("pipeline")
    if virtual > 1 and pipeline == 1:
        raise recipe.plugin.fail("parallel.virtual_pipeline", "must be 1 where parallel.pipeline is 1")
    if virtual > 1 and recipe.micro_batches % pipeline:
        raise recipe.fail(
            "train.global_batch_size",
            f"makes {recipe.micro_batches} micro-batches; a virtual pipeline needs a multiple of {pipeline}",
        )
    for name in recipe.megatron:
        if name in DECIDED_BY:
            raise recipe.fail(f"megatron.{name}", f"is decided by {DECIDED_BY[name]}")
    stages(recipe)


def _check_moe(recipe: Recipe) -> None:
    moe = recipe.model.moe
    if moe.top_k > moe.num_experts:
        raise recipe.fail("model.moe.top_k", f"at most model.moe.num_experts ({moe.num_experts})")
    if moe.expert_bias and moe.score_function != "sigmoid":
        raise recipe.fail("model.moe.score_function", "must be 'sigmoid' where expert_bias is true")
    if (moe.num_groups is None) != (moe.group_top_k is None):
        missing = "num_groups" if moe.num_groups is None else "group_top_k"
        raise recipe.fail(f"model.moe.{missing}", "num_groups and group_top_k go together: give both or neither")
    if moe.num_groups is None or moe.group_top_k is None:
        return
    if moe.num_experts % moe.num_groups:
        raise recipe.fail("model.moe.num_groups", f"must divide model.moe.num_experts ({moe.num_experts})")
    if moe.group_top_k > min(moe.num_groups, moe.top_k):
        # Megatron scores a group by its best top_k // group_top_k experts, which must be at least one.
        raise recipe.fail("model.moe.group_top_k", f"at most num_groups ({moe.num_groups}) and top_k ({moe.top_k})")
    reachable = moe.group_top_k * (moe.num_experts // moe.num_groups)
    if moe.top_k > reachable:
        raise recipe.fail("model.moe.top_k", f"at most {reachable}, the experts in {moe.group_top_k} groups")


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds, all its virtual stages together."""

    layers: tuple[int, ...]
    embedding: bool
    mtp_layers: int
    head: bool


def stages(recipe: Recipe) -> list[Stage]:
    """The layers of each pipeline rank.

    Layers are split evenly. Where they can't be, `megatron.pipeline_model_parallel_layout` says how: Megatron's layout
    string (`--pipeline-model-parallel-layout`), stages separated by `|`, with `E` the embedding, `t` a layer, `m` an
    MTP layer and `L` the output layer with the loss; `x*3` and `(xy)*3` repeat.

    Raises:
        ConfigError: the layers can't be split evenly and no layout is given, or the layout does not fit the model.
    """
    model, pipeline = recipe.model, recipe.degree("pipeline")
    total = pipeline * recipe.degree("virtual_pipeline")
    key = "pipeline_model_parallel_layout"
    if recipe.megatron.get(key) is None:
        if model.num_layers % total:
            low, extra = divmod(model.num_layers, total)
            # The last stages are the shorter ones: they hold the output layer (and MTP).
            counts = [low + (place < extra) for place in range(total)]
            parts = ["t" * count for count in counts]
            layout = "|".join(["E" + parts[0], *parts[1:]]) + "m" * model.mtp_layers + "L"
            raise recipe.fail(
                "model.num_layers",
                f"must be a multiple of {total} stages, or set megatron.{key}, for example {layout!r}",
            )
        each = model.num_layers // total
        texts = ["t" * each] * total
        texts[0] = "E" + texts[0]
        texts[-1] += "m" * model.mtp_layers + "L"
    else:
        layout = recipe.megatron[key]
        if not isinstance(layout, str):
            raise recipe.fail(f"megatron.{key}", "must be a layout string such as 'Ett|tt|tL'")
        flat = _unroll(recipe, layout.replace(",", ""))
        wanted = "E" + "t" * model.num_layers + "m" * model.mtp_layers + "L"
        if flat.replace("|", "") != wanted:
            raise recipe.fail(
                f"megatron.{key}", f"must hold E, {model.num_layers} x t, {model.mtp_layers} x m and L in this order"
            )
        texts = flat.split("|")
        if len(texts) != total:
            raise recipe.fail(
                f"megatron.{key}", f"must have {total} stages (pipeline x virtual_pipeline), has {len(texts)}"
            )
        if sum("m" in text for text in texts) > 1:
            raise recipe.fail(f"megatron.{key}", "must have all MTP layers in one stage")
    first = 0
    numbered: list[tuple[str, range]] = []
    for text in texts:
        numbered.append((text, range(first, first + text.count("t"))))
        first += text.count("t")
    result = []
    for rank in range(pipeline):  # virtual stages go round the pipeline ranks
        held = numbered[rank::pipeline]
        text = "".join(part for part, _ in held)
        layers = tuple(layer for _, layers in held for layer in layers)
        result.append(Stage(layers, "E" in text, text.count("m"), "L" in text))
    return result


_LAYOUT_PART = re.compile(r"(?:\((?P<group>[^()]*)\)|(?P<one>[EtmL|]))(?:\*(?P<times>\d+))?")


def _unroll(recipe: Recipe, text: str) -> str:
    """A layout string without repetitions."""
    result, place = "", 0
    while place < len(text):
        part = _LAYOUT_PART.match(text, place)
        if part is None:
            raise recipe.fail(
                "megatron.pipeline_model_parallel_layout", f"{text[place:]!r} is not made of E, t, m, L, | and (...)*n"
            )
        body = part["one"] if part["group"] is None else _unroll(recipe, part["group"])
        result += body * int(part["times"] or 1)
        place = part.end()
    return result


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; `total` and `active` leave out the MTP layers, as published counts do.

    Attributes:
        embedding: input embedding and output layer (untied).
        dense: attention, norms, dense MLPs, shared experts and routers (with the expert bias, 1 per expert).
        experts: routed experts.
        mtp: MTP layers, which share embedding and output layer with the model.
        active: parameters that one token meets; of the input embedding that is one row.
    """

    embedding: int
    dense: int
    experts: int
    mtp: int
    active: int

    @property
    def total(self) -> int:
        """All parameters of the model without MTP."""
        return self.embedding + self.dense + self.experts


@dataclass(frozen=True)
class _LayerCount:
    """Parameters of one transformer layer by how parallelism divides them."""

    replicated: int  # on every tensor-parallel rank
    by_tensor: int  # divided by the tensor-parallel degree
    experts: int  # divided by the expert-parallel degree
    buffers: int  # expert bias: saved, but not trained by the optimizer

    @property
    def dense(self) -> int:
        return self.replicated + self.by_tensor + self.buffers


def _layer_count(recipe: Recipe, moe_layer: bool) -> _LayerCount:
    model, mla, moe = recipe.model, recipe.model.mla, recipe.model.moe
    hidden, heads = model.hidden_size, model.num_attention_heads
    query = heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim)
    replicated = 2 * hidden  # the two norms
    replicated += hidden * (mla.kv_lora_rank + mla.qk_pos_emb_head_dim) + mla.kv_lora_rank
    by_tensor = mla.kv_lora_rank * heads * (mla.qk_head_dim + mla.v_head_dim) + heads * mla.v_head_dim * hidden
    if mla.q_lora_rank is None:
        by_tensor += hidden * query
    else:
        replicated += hidden * mla.q_lora_rank + mla.q_lora_rank
        by_tensor += mla.q_lora_rank * query
    if not moe_layer:
        return _LayerCount(replicated, by_tensor + 3 * hidden * model.ffn_hidden_size, 0, 0)
    expert = 3 * hidden * moe.ffn_hidden_size  # gate, up and down projection
    return _LayerCount(
        replicated=replicated + hidden * moe.num_experts,
        by_tensor=by_tensor + moe.num_shared_experts * expert,
        experts=moe.num_experts * expert,
        buffers=moe.num_experts if moe.expert_bias else 0,
    )


def _mtp_own(recipe: Recipe) -> tuple[int, int]:
    """Parameters of an MTP layer outside its transformer layer: (replicated norms, projection split by tensor)."""
    hidden = recipe.model.hidden_size
    return 3 * hidden, 2 * hidden * hidden


def check_arms(recipe: Recipe, arms: list[str]) -> None:
    """Refuse dispatchers that an A/B can't compare.

    Raises:
        ConfigError: unknown or repeated dispatcher, or fewer than two.
    """
    if len(arms) < 2 or len(set(arms)) != len(arms) or not set(arms) <= set(DISPATCHERS):
        allowed = f"must be two or more different ones of {', '.join(DISPATCHERS)}"
        raise ConfigError(recipe.source, "--arms", ",".join(arms), allowed)


def parameter_count(recipe: Recipe) -> ParameterCount:
    """The exact number of parameters of the recipe's model (norms have no bias, queries and keys are normed)."""
    model, moe = recipe.model, recipe.model.moe
    plain, sparse = _layer_count(recipe, False), _layer_count(recipe, True)
    num_moe = model.num_layers - model.first_dense_layers
    embedding = 2 * model.vocab_size * model.hidden_size
    dense = model.first_dense_layers * plain.dense + num_moe * sparse.dense + model.hidden_size
    experts = num_moe * sparse.experts
    idle = num_moe * sparse.experts * (moe.num_experts - moe.top_k) // moe.num_experts
    unread = (model.vocab_size - 1) * model.hidden_size
    mtp_layer = _layer_count(recipe, model.first_dense_layers < model.num_layers)
    mtp = model.mtp_layers * (mtp_layer.dense + mtp_layer.experts + sum(_mtp_own(recipe)))
    return ParameterCount(embedding, dense, experts, mtp, embedding + dense + experts - idle - unread)


@dataclass(frozen=True)
class StageMemory:
    """Bytes that every rank of one pipeline stage holds before activations, buffers of NCCL and the allocator."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer states together, in bytes."""
        return self.weights + self.gradients + self.optimizer


def memory_per_rank(recipe: Recipe) -> list[StageMemory]:
    """Bytes per rank for each pipeline stage, in the layout of the recipe.

    A rank of a stage holds, of the parameters of its layers, all that are replicated (norms, routers and the MLA down
    projections, which Transformer Engine replicates), 1/tensor of those that tensor parallelism splits and 1/expert of
    the routed experts (whose own tensor-parallel degree is 1). A stage with MTP layers holds the input embedding, too.
    Each parameter costs, as in Megatron's mixed precision:

    - weights: 2 bytes in bf16, 4 in fp32;
    - gradients: 4 bytes (main gradients are fp32 in either case);
    - optimizer: 8 bytes of Adam moments, plus in bf16 4 of the fp32 master weight. The distributed optimizer
      divides this by the number of replicas: world / (tensor x pipeline) for dense parameters, and
      world / (expert x pipeline) for routed experts.
    """
    model, train = recipe.model, recipe.train
    tensor, pipeline, expert = recipe.degree("tensor"), recipe.degree("pipeline"), recipe.degree("expert")
    weight_bytes, optimizer_bytes = (2, 12) if train.precision == "bf16" else (4, 8)
    dense_shards = train.processes // (tensor * pipeline) if train.distributed_optimizer else 1
    expert_shards = train.processes // (expert * pipeline) if train.distributed_optimizer else 1
    has_moe = model.first_dense_layers < model.num_layers
    table = model.vocab_size * model.hidden_size // tensor
    result = []
    for stage in stages(recipe):
        layers = [_layer_count(recipe, layer >= model.first_dense_layers) for layer in stage.layers]
        layers += [_layer_count(recipe, has_moe)] * stage.mtp_layers
        mtp_replicated, mtp_by_tensor = _mtp_own(recipe)
        dense = sum(layer.replicated + layer.by_tensor // tensor for layer in layers)
        dense += stage.mtp_layers * (mtp_replicated + mtp_by_tensor // tensor)
        dense += table * (stage.embedding or stage.mtp_layers > 0)
        dense += (table + model.hidden_size) * stage.head
        experts = sum(layer.experts for layer in layers) // expert
        optimizer = -(-dense // dense_shards) - (-experts // expert_shards)
        result.append(
            StageMemory(
                parameters=dense + experts,
                weights=weight_bytes * (dense + experts),
                gradients=4 * (dense + experts),
                optimizer=optimizer_bytes * optimizer,
            )
        )
    return result


# TransformerConfig fields whose Megatron-LM argument is not the field's name with dashes (0.16.1 to 0.20).
RENAMED = {
    "fp4": "--fp4-format",
    "fp8": "--fp8-format",
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "microbatch_group_size_per_vp_stage": "--microbatch-group-size-per-virtual-pipeline-stage",
    "overlap_p2p_comm_warmup_flush": "--overlap-p2p-communication-warmup-flush",
}
# Fields that are on in Megatron-LM unless this argument is given.
SWITCHED_OFF_BY = {
    "add_bias_linear": "--disable-bias-linear",
    "apply_rope_fusion": "--no-rope-fusion",
    "barrier_with_L1_time": "--no-barrier-with-level-1-timing",
    "bias_activation_fusion": "--no-bias-swiglu-fusion",
    "bias_dropout_fusion": "--no-bias-dropout-fusion",
    "clone_scatter_output_in_embedding": "--no-clone-scatter-output-in-embedding",
    "fp8_wgrad": "--no-fp8-wgrad",
    "gradient_accumulation_fusion": "--no-gradient-accumulation-fusion",
    "masked_softmax_fusion": "--no-masked-softmax-fusion",
    "overlap_p2p_comm": "--no-overlap-p2p-communication",
    "perform_initialization": "--no-initialization",
    "persist_layer_norm": "--no-persist-layer-norm",
    "tp_comm_bulk_dgrad": "--no-tp-comm-bulk-dgrad",
    "tp_comm_bulk_wgrad": "--no-tp-comm-bulk-wgrad",
    "tp_comm_overlap_ag": "--no-tp-comm-overlap-ag",
    "tp_comm_overlap_rs": "--no-tp-comm-overlap-rs",
    "tp_comm_split_ag": "--no-tp-comm-split-ag",
    "tp_comm_split_rs": "--no-tp-comm-split-rs",
}
# Fields that Megatron-LM derives or leaves at their default: it has no argument for them.
WITHOUT_ARGUMENT = frozenset(
    {
        "batch_p2p_comm",
        "batch_p2p_sync",
        "beta_fast",
        "beta_slow",
        "cpu_offloading",
        "deallocate_pipeline_outputs",
        "disable_parameter_transpose_cache",
        "enable_autocast",
        "fp8_dot_product_attention",
        "fp8_multi_head_attention",
        "fused_single_qkv_rope",
        "gated_linear_unit",
        "memory_efficient_layer_norm",
        "moe_token_dropping",
        "original_max_position_embeddings",
        "softmax_scale",
        "tp_only_amax_red",
        "use_te_rng_tracker",
        "variable_seq_lengths",
    }
)


def megatron_args(recipe: Recipe, config_path: str | os.PathLike[str] | None = None) -> list[str]:
    """The arguments with which Megatron-LM's `pretrain_gpt.py`, started through `epv2_plugin.launch`, runs the recipe.

    `bytes` data has no counterpart in Megatron-LM and becomes `--mock-data`. Routed experts get a tensor-parallel
    degree of 1. Names hold for Megatron-LM 0.16.1 to 0.20.

    Args:
        config_path: the plugin's YAML; `None` leaves `--epv2-config` out.

    Raises:
        ConfigError: a value of the recipe that Megatron-LM has no argument for.
    """
    model, mla, moe, train = recipe.model, recipe.model.mla, recipe.model.moe, recipe.train
    if model.rotary_base != int(model.rotary_base):
        raise recipe.fail("model.rotary_base", "Megatron-LM's --rotary-base takes whole numbers only")
    tensor, virtual = recipe.degree("tensor"), recipe.degree("virtual_pipeline")
    layout = recipe.megatron.get("pipeline_model_parallel_layout")
    has_moe = model.first_dense_layers < model.num_layers
    values: dict[str, object] = {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": model.ffn_hidden_size,
        "num-attention-heads": model.num_attention_heads,
        "seq-length": model.seq_length,
        "max-position-embeddings": model.seq_length,
        "position-embedding-type": "rope",
        "rope-type": "rope",
        "rotary-base": int(model.rotary_base),
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": True,
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        "init-method-std": model.init_std,
        "multi-latent-attention": True,
        "qk-layernorm": True,
        "q-lora-rank": mla.q_lora_rank,
        "kv-lora-rank": mla.kv_lora_rank,
        "qk-head-dim": mla.qk_head_dim,
        "qk-pos-emb-head-dim": mla.qk_pos_emb_head_dim,
        "v-head-dim": mla.v_head_dim,
    }
    if has_moe:
        values |= {
            "num-experts": moe.num_experts,
            "moe-layer-freq": f"[0]*{model.first_dense_layers}+[1]*{model.num_layers - model.first_dense_layers}",
            "moe-ffn-hidden-size": moe.ffn_hidden_size,
            "moe-shared-expert-intermediate-size": moe.num_shared_experts * moe.ffn_hidden_size or None,
            "moe-router-topk": moe.top_k,
            "moe-router-num-groups": moe.num_groups,
            "moe-router-group-topk": moe.group_top_k,
            "moe-router-score-function": moe.score_function,
            "moe-router-enable-expert-bias": moe.expert_bias,
            "moe-router-bias-update-rate": moe.expert_bias_update_rate if moe.expert_bias else None,
            "moe-router-topk-scaling-factor": moe.routed_scaling_factor,
            "moe-router-load-balancing-type": "seq_aux_loss" if moe.aux_loss_coeff else "none",
            "moe-aux-loss-coeff": moe.aux_loss_coeff or None,
            "moe-token-dispatcher-type": "flex",
            "moe-flex-dispatcher-backend": "epv2",
            "expert-model-parallel-size": recipe.degree("expert"),
            "expert-tensor-parallel-size": 1,
        }
    values |= {
        "mtp-num-layers": model.mtp_layers or None,
        "mtp-loss-scaling-factor": model.mtp_loss_scale if model.mtp_layers else None,
        "tensor-model-parallel-size": tensor,
        "sequence-parallel": tensor > 1,
        "pipeline-model-parallel-size": recipe.degree("pipeline"),
        # A layout says the number of virtual stages by itself, and Megatron refuses to be told twice.
        "num-virtual-stages-per-pipeline-rank": virtual if virtual > 1 and layout is None else None,
        "context-parallel-size": recipe.degree("context"),
        "micro-batch-size": train.micro_batch_size,
        "global-batch-size": train.global_batch_size,
        "train-iters": train.steps,
        "optimizer": "adam",
        "lr": train.lr,
        "min-lr": train.min_lr,
        "lr-decay-style": "cosine",
        "lr-decay-iters": train.steps,
        "lr-warmup-iters": train.warmup_steps,
        "weight-decay": train.weight_decay,
        "adam-beta1": train.adam_beta1,
        "adam-beta2": train.adam_beta2,
        "clip-grad": train.clip_grad,
        "bf16": train.precision == "bf16",
        "seed": train.seed,
        "use-distributed-optimizer": train.distributed_optimizer,
        "overlap-grad-reduce": train.overlap_grad_reduce,
        "overlap-param-gather": train.overlap_param_gather,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": model.vocab_size,
        "padded-vocab-size": model.vocab_size,
    }
    if recipe.data.kind == "megatron":
        values |= {"data-path": recipe.data.path.removesuffix(".bin").removesuffix(".idx"), "split": "100,0,0"}
    else:
        values["mock-data"] = True
    values |= {"eval-iters": 0, "log-interval": 1, "log-throughput": True}
    # What `training.model` sets unless the recipe says otherwise.
    fields: dict[str, Any] = {"layernorm_epsilon": 1e-6, "apply_rope_fusion": False}  # the fusion is for YaRN alone
    if has_moe:
        fields["moe_router_dtype"] = "fp64" if recipe.plugin.backend == "host" else "fp32"
    fields |= recipe.megatron
    if recipe.plugin.backend == "host":  # no Transformer Engine and no fused kernels without a GPU
        values["transformer-impl"] = "local"
        for name in (
            *("bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion"),
            *("masked_softmax_fusion", "persist_layer_norm"),
        ):
            fields.setdefault(name, False)
    elif has_moe:
        fields = {"moe_grouped_gemm": True, "moe_permute_fusion": True, **fields}
    values["epv2-config"] = None if config_path is None else os.fspath(config_path)
    result: list[str] = []
    for name, value in values.items():
        result += _argument(f"--{name}", value)
    for name, value in fields.items():
        if name in WITHOUT_ARGUMENT:
            raise recipe.fail(f"megatron.{name}", "Megatron-LM has no argument for this field")
        if name in SWITCHED_OFF_BY:
            result += _argument(SWITCHED_OFF_BY[name], value is False)
        else:
            result += _argument(RENAMED.get(name, "--" + name.replace("_", "-")), value)
    return result


def _argument(flag: str, value: object) -> list[str]:
    """One argument as the words of a command line: nothing for None and False, the flag alone for True."""
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    return [flag, *([str(v) for v in value] if isinstance(value, list | tuple) else [str(value)])]
