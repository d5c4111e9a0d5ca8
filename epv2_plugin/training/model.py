"""A recipe's model in Megatron-Core: its configuration, its modules, and weights that no parallel layout changes."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import nn
from torch.nn.functional import silu

from epv2_plugin.megatron.local_attention import block_specs, uses_transformer_engine
from epv2_plugin.training.recipe import DECIDED_BY, DISPATCHERS, Recipe


def transformer_config(recipe: Recipe, dispatcher: str) -> MLATransformerConfig:
    """Megatron's configuration of the recipe's model with one of `DISPATCHERS`.

    Raises:
        ConfigError: `recipe.megatron` names an unknown field or one that the recipe decides elsewhere, or Megatron
            refuses the combination.
        ValueError: unknown dispatcher.
    """
    if dispatcher not in DISPATCHERS:
        raise ValueError(f"dispatcher = {dispatcher!r}: must be one of {', '.join(DISPATCHERS)}")
    decided = _decided(recipe, dispatcher)
    fields = [field.name for field in dataclasses.fields(MLATransformerConfig)]
    for name in recipe.megatron:
        if name in decided:
            raise recipe.fail(f"megatron.{name}", f"is decided by {DECIDED_BY.get(name, 'the recipe')}")
        if name not in fields:
            close = difflib.get_close_matches(name, [f for f in fields if f not in decided], n=1, cutoff=0.5)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise recipe.fail(f"megatron.{name}", f"not a field of Megatron's TransformerConfig{hint}")
    try:
        return MLATransformerConfig(**{**_defaults(recipe), **decided, **recipe.megatron})
    except (ValueError, AssertionError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise recipe.fail("megatron", f"Megatron refuses this model: {reason}") from error


def _defaults(recipe: Recipe) -> dict[str, Any]:
    """Fields that `recipe.megatron` may set otherwise: what this machine can run."""
    cuda, te = torch.cuda.is_available(), uses_transformer_engine()
    return {
        "use_cpu_initialization": not cuda,
        # Without Transformer Engine these are built by torch.compile, on every rank in its first steps.
        "bias_activation_fusion": te,
        "bias_dropout_fusion": te,
        "masked_softmax_fusion": False,
        "moe_permute_fusion": te,
        "moe_grouped_gemm": te,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layernorm_epsilon": 1e-6,
        # In fp32 a run of 20 small steps meets a token whose two best scores differ in the last bit only, and layouts,
        # which sum in another order, part there.
        "moe_router_dtype": "fp32" if cuda else "fp64",
        # gloo pairs the batched sends of two stages that are each other's neighbours on both sides in the wrong order.
        # Megatron has either batches or overlap.
        "batch_p2p_comm": cuda and not recipe.megatron.get("overlap_p2p_comm", False),
        "overlap_p2p_comm": False,
    }


def _decided(recipe: Recipe, dispatcher: str) -> dict[str, Any]:
    """Fields that follow from the recipe's own keys."""
    model, mla, moe, train = recipe.model, recipe.model.mla, recipe.model.moe, recipe.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    virtual = recipe.degree("virtual_pipeline")
    fields = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "init_method_std": model.init_std,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": silu,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "rope_type": "rope",
        "rotary_base": model.rotary_base,
        "rotary_scaling_factor": 1.0,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_head_dim,
        "qk_pos_emb_head_dim": mla.qk_pos_emb_head_dim,
        "v_head_dim": mla.v_head_dim,
        "mtp_num_layers": model.mtp_layers or None,
        "mtp_loss_scaling_factor": model.mtp_loss_scale,
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(layer >= model.first_dense_layers) for layer in range(model.num_layers)],
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.num_shared_experts * moe.ffn_hidden_size or None,
        "moe_router_topk": moe.top_k,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.group_top_k,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor,
        "moe_router_score_function": moe.score_function,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_token_dispatcher_type": "flex" if dispatcher == "epv2" else dispatcher,
        "tensor_model_parallel_size": recipe.degree("tensor"),
        "sequence_parallel": recipe.degree("tensor") > 1,
        "pipeline_model_parallel_size": recipe.degree("pipeline"),
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "expert_model_parallel_size": recipe.degree("expert"),
        "expert_tensor_parallel_size": 1,
        "context_parallel_size": recipe.degree("context"),
        "bf16": train.precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
    }
    if dispatcher == "epv2":
        fields["moe_flex_dispatcher_backend"] = "epv2"
    return fields


def build_model(
    recipe: Recipe, config: MLATransformerConfig, core_attention: type | None = None
) -> list[DistributedDataParallel]:
    """This rank's part of the model, one module for each virtual pipeline stage, wrapped for data parallelism.

    Megatron's parallel state must be initialised. The weights are Megatron's initial ones; see `seed_weights`.
    `core_attention` replaces the core attention of Megatron's local specs.
    """
    train = recipe.train
    chunks: list[DistributedDataParallel] = []
    virtual = config.virtual_pipeline_model_parallel_size
    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=train.overlap_grad_reduce,
        overlap_param_gather=train.overlap_param_gather,
        use_distributed_optimizer=train.distributed_optimizer,
    )
    for index in range(virtual or 1):
        stage = index if virtual else None
        decoder, mtp = block_specs(config, stage, core_attention)
        module: nn.Module = GPTModel(
            config=config,
            transformer_layer_spec=decoder,
            vocab_size=recipe.model.vocab_size,
            max_sequence_length=recipe.model.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=virtual is None, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=virtual is None, vp_stage=stage),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=recipe.model.rotary_base,
            mtp_block_spec=mtp,
            vp_stage=stage,
        )
        if config.tensor_model_parallel_size > 1:
            _mark_experts(module)
        if torch.cuda.is_available():
            module.cuda()
        if config.bf16:
            module = Float16Module(config, module)
        chunks.append(DistributedDataParallel(config, data_parallel, module, disable_bucketing=index > 0))
    return chunks


def _mark_experts(model: nn.Module) -> None:
    """Have the experts' gradients summed over expert-data-parallel ranks, which Megatron leaves out where EP is 1: the
    tensor-parallel ranks of a sequence hold the same experts but saw different tokens.
    """
    parameter: Any
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def unwrap(chunk: Any) -> Any:
    """The GPT model inside the wrappers of data parallelism and bf16."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def global_name(model: Any, name: str) -> str:
    """`name` of a parameter or buffer of `model`, with layer and expert numbers counted over all ranks.

    Weights of grouped experts get the names that they have when every expert is a module of its own.
    """
    config = model.config
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer:
        number = model.get_submodule(layer.group(0)[:-1]).layer_number - 1
        name = f"decoder.layers.{number}.{name[layer.end() :]}"
    # The layer inside an MTP layer was called transformer_layer before it was called mtp_model_layer.
    name = re.sub(r"^(mtp\.layers\.\d+)\.transformer_layer\.", r"\1.mtp_model_layer.", name)
    name = re.sub(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$", r".experts.local_experts.\3.\1.\2", name)
    first = (
        parallel_state.get_expert_model_parallel_rank() * config.num_moe_experts // config.expert_model_parallel_size
    )
    return re.sub(r"(?<=\.local_experts\.)\d+", lambda match: str(first + int(match.group())), name)


def global_parameters(chunks: list[Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter on this rank with its `global_name`."""
    for model in map(unwrap, chunks):
        for name, parameter in model.named_parameters():
            yield global_name(model, name), parameter


def global_buffers(chunks: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every buffer on this rank that belongs to the model's state (the experts' bias), with its `global_name`."""
    for model in map(unwrap, chunks):
        for prefix, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield global_name(model, f"{prefix}.{name}"), buffer


@torch.no_grad()
def seed_weights(chunks: list[Any], seed: int) -> None:
    """Overwrite every weight by one that depends on `seed` and its global name alone, not on the parallel layout.

    Each matrix is drawn at its full shape in fp32, N(0, init_std), the projections that write to the residual stream
    narrower by sqrt(2 x layers), and cut for tensor parallelism. Norms are 1 and biases 0. Call it before the optimizer
    is made, which may copy the weights.
    """
    config = unwrap(chunks[0]).config
    for name, parameter in global_parameters(chunks):
        if parameter.dim() < 2:
            parameter.fill_(float(name.endswith("weight")))
            continue
        std = config.init_method_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * config.num_layers)
        # Experts are not split by tensor parallelism here: their own tensor-parallel degree is 1.
        split = config.tensor_model_parallel_size if getattr(parameter, "tensor_model_parallel", False) else 1
        if ".local_experts." in name:
            split = 1
        shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", 0) if split > 1 else 0
        shape[dim] *= split
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
        if split > 1:
            # A gated MLP's first matrix is two matrices, gate over up, each of which every rank holds a part of.
            parts = 2 if config.gated_linear_unit and name.endswith("linear_fc1.weight") else 1
            rank = parallel_state.get_tensor_model_parallel_rank()
            full = torch.cat([part.chunk(split, dim)[rank] for part in full.chunk(parts, dim)], dim)
        parameter.copy_(full)
