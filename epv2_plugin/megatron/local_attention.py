"""Core attention in plain torch, and the layer specs of a DeepSeek-V3-style GPT for both supported Megatron versions.

Megatron's own local attention takes no separate key and value head sizes, which multi-head latent attention has.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import multi_latent_attention, torch_norm
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from epv2_plugin.patches import Patches

_patches = Patches()

# S sequence, B batch, A attention heads of this rank, D features of a query/key head, V features of a value head


class LocalAttention(MegatronModule):
    """Scaled dot-product attention with head sizes taken from the tensors; deterministic on the CPU.

    Subclasses that set `takes_context_parallel` see to the other ranks' keys and values themselves.

    Raises:
        NotImplementedError: context parallelism, a sliding window or softmax variants, which this does not compute.
    """

    takes_context_parallel = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        super().__init__(config=config)
        unsupported = {
            "context_parallel_size": config.context_parallel_size > 1 and not self.takes_context_parallel,
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
        }
        for name in (name for name, is_set in unsupported.items() if is_set):
            raise NotImplementedError(f"{name} = {getattr(config, name)!r}: not supported by the local attention")
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        if config.apply_query_key_layer_scaling:
            scale = (k_channels or config.kv_channels) ** -0.5 if softmax_scale is None else softmax_scale
            self.softmax_scale = scale / max(1, layer_number)
        self.sums_position_gradient = config.multi_latent_attention and config.tensor_model_parallel_size > 1
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_SBAD: torch.Tensor,
        key_SBAD: torch.Tensor,
        value_SBAV: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            query_SBAD: `[S, B, A, D]`.
            key_SBAD: `[S, B, A or a divisor of it, D]`.
            value_SBAV: `[S, B, as key, V]`.
            attention_mask: bool, broadcastable to `[B, A, S, S]`, True = hidden; not read for the causal mask type.

        Returns:
            `[S, B, A * V]`, dtype of the inputs.

        Raises:
            NotImplementedError: packed sequences or an attention bias.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("the local attention takes neither packed sequences nor an attention bias")
        causal = self.is_causal(attention_mask, attn_mask_type)
        key_SBAD = self.complete_gradient(key_SBAD)
        out_BASV = scaled_dot_product_attention(
            query_SBAD.permute(1, 2, 0, 3),
            key_SBAD.permute(1, 2, 0, 3),
            value_SBAV.permute(1, 2, 0, 3),
            attn_mask=None if causal or attention_mask is None else ~attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query_SBAD.size(2) != key_SBAD.size(2),
        )
        return out_BASV.permute(2, 0, 1, 3).flatten(2)

    def is_causal(self, attention_mask: torch.Tensor | None, attn_mask_type: AttnMaskType | None) -> bool:
        """Whether a token sees those before it, whatever the mask says; else the mask alone decides."""
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        return mask_type == AttnMaskType.causal or (mask_type == AttnMaskType.padding_causal and attention_mask is None)

    def complete_gradient(self, key: torch.Tensor) -> torch.Tensor:
        """The key `[..., A, D]` as it is, with its gradient summed over tensor-parallel ranks where it has to be.

        The rotary part of an MLA key is one vector for all heads, but every rank has the gradient of its own heads
        only, and the column-parallel projection below it takes its rows' gradient for complete.
        """
        if not self.sums_position_gradient:
            return key
        no_position, position = key.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1)
        position = copy_to_tensor_model_parallel_region(position[..., :1, :]).expand_as(position)
        return torch.cat([no_position, position], dim=-1)


def local_norm(cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> nn.Module:
    """torch's norm in the place of Megatron's wrapper of it (`cls`), which refuses sequence parallelism: the weights
    only need the mark by which Megatron sums their gradients over the tensor-parallel ranks.
    """
    kinds: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
    if config.normalization not in kinds or config.layernorm_zero_centered_gamma:
        raise NotImplementedError(f"normalization = {config.normalization!r}: plain LayerNorm and RMSNorm only")
    norm = kinds[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        vars(parameter)["sequence_parallel"] = config.sequence_parallel
    return norm


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of what Megatron needs to build and run a model without Transformer Engine."""
    return [
        # 0.16.1 looks for Transformer Engine by names that exist, or are used, without it as well.
        (moe_utils, "te_general_gemm", None),
        (multi_latent_attention, "HAVE_TE", False),
        (LocalSpecProvider, "core_attention", lambda self: LocalAttention),
        (torch_norm.WrappedTorchNorm, "__new__", local_norm),
    ]


def install() -> bool:
    """Make the replacements where there is a CUDA device but no Transformer Engine; elsewhere, nothing is replaced.
    Without a device the CPU bridge makes them. A second call changes nothing.

    Returns:
        True if they are in place.
    """
    if not torch.cuda.is_available() or gpt_layer_specs.HAVE_TE:
        return False
    if not _patches.names:
        for owner, name, replacement in replacements():
            _patches.attribute(owner, name, replacement)
    return True


def uninstall() -> None:
    """Put every replaced name back as it was."""
    _patches.undo()


def uses_transformer_engine() -> bool:
    """Whether models are built from Transformer Engine's layers: with a CUDA device, where it is installed."""
    return torch.cuda.is_available() and gpt_layer_specs.HAVE_TE


def block_specs(config: TransformerConfig, vp_stage: int | None, core_attention: type | None = None) -> tuple[Any, Any]:
    """Layer specs of this rank's part of the model (virtual stage `vp_stage`): (decoder block, MTP block or None).

    Dense and MoE layers follow `config.moe_layer_freq`. Without Transformer Engine, `LocalAttention` must stand behind
    Megatron's local spec provider, which the CPU bridge or `install` sees to; `core_attention` is taken in its place.
    """
    patches = Patches()
    if core_attention is not None:
        patches.attribute(LocalSpecProvider, "core_attention", lambda self: core_attention)
    try:
        return _block_specs(config, vp_stage)
    finally:
        patches.undo()


def _block_specs(config: TransformerConfig, vp_stage: int | None) -> tuple[Any, Any]:
    te = uses_transformer_engine()
    normalization = config.normalization
    decoder = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=te, normalization=normalization, vp_stage=vp_stage
    )
    if not config.mtp_num_layers:
        return decoder, None
    # This stage may hold no decoder layer at all, so the layer to copy comes from the whole model's list.
    last = gpt_layer_specs.get_gpt_decoder_layer_specs(config, use_transformer_engine=te, normalization=normalization)
    return decoder, gpt_layer_specs.get_gpt_mtp_block_spec(
        config, last[-1], use_transformer_engine=te, vp_stage=vp_stage
    )
