"""What an A/B compares context parallelism with: attention that gathers all keys and values first, then attends.

Megatron's own local attention refuses context parallelism, so there is nothing stock to compare with on a machine
without Transformer Engine. This is the plain way to do it with Megatron's own collectives.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn.functional import scaled_dot_product_attention

from epv2_plugin.megatron.context_parallel import zigzag_split
from epv2_plugin.megatron.local_attention import LocalAttention


class GatherThenAttend(LocalAttention):
    """Causal attention over keys and values gathered by `gather_from_sequence_parallel_region`.

    Raises:
        NotImplementedError: another mask than the causal one, or packed sequences.
    """

    label = "reference gather-then-attend"
    takes_context_parallel = True
    runs_in: torch.dtype | None = None  # None = as queries come

    def forward(
        self,
        query_SBAD: torch.Tensor,
        key_SBAD: torch.Tensor,
        value_SBAV: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """As `LocalAttention.forward`, `query_SBAD` and so on being this rank's zigzag part of the sequence."""
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError(
                f"the {self.label} attention takes neither packed sequences nor an attention bias"
            )
        if not self.is_causal(attention_mask, attn_mask_type):
            raise NotImplementedError(f"the {self.label} attention is causal only")
        group = parallel_state.get_context_parallel_group()
        rank, size = group.rank(), group.size()
        positions = torch.arange(query_SBAD.shape[0] * size, device=query_SBAD.device)
        # Keys stay in the order of ranks; their positions say which of them a query sees.
        key_positions = torch.cat([zigzag_split(positions, 0, peer, size) for peer in range(size)])
        seen = zigzag_split(positions, 0, rank, size).unsqueeze(1) >= key_positions
        key, value = (
            gather_from_sequence_parallel_region(t.contiguous(), group=group)
            for t in (self.complete_gradient(key_SBAD), value_SBAV)
        )
        query, key, value = (t.permute(1, 2, 0, 3).to(self.runs_in or t.dtype) for t in (query_SBAD, key, value))
        out_BASV = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out_BASV.permute(2, 0, 1, 3).flatten(2).to(query_SBAD.dtype)


class GatherThenAttendInFp32(GatherThenAttend):
    """The same in fp32, rounded once: a measure of what rounding does to losses."""

    label = "reference gather-then-attend in fp32"
    runs_in = torch.float32
