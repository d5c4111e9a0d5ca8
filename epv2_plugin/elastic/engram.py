"""Autograd for Engram: the backward of a fetch sends each row's gradient to the rank that owns the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from epv2_plugin.elastic.buffer import ElasticBuffer
from epv2_plugin.elastic.quant import per_token_cast_back
from epv2_plugin.elastic.sizing import scale_columns


def fetch(
    buffer: ElasticBuffer,
    weight: torch.Tensor,
    indices: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    gradient_scale: float = 1.0,
) -> Callable[[], torch.Tensor]:
    """Differentiable `ElasticBuffer.engram_fetch` in `weight`.

    The backward is a collective operation, too: every rank runs it, in the same order as the others.

    Args:
        weight: fp32 `[num_entries, H]`: this rank's rows, to whose `grad` the backward adds a sparse tensor with the
            rows that any rank fetched (as `torch.nn.Embedding(sparse=True)` does). Its values are not read: what is
            fetched is what the buffer holds.
        indices: as there.
        dtype: of the result; default: the table's, bf16 for an e4m3 table.
        gradient_scale: the sum of all ranks' gradients is multiplied by it: 1 / ranks where the ranks' losses are
            averaged.

    Returns:
        hook: waits for the rows and returns `[T * K, H]`.

    Raises:
        TypeError, ValueError: `weight` is not fp32 or not of the table's shape; the scales are not one per 128 values;
            and as `engram_fetch`.
    """
    with buffer._counting_refusals("engram_fetch"):
        _check(weight, *buffer.engram_storage)
    raw = buffer.engram_fetch(indices)
    kept = indices.reshape(-1).clone()
    results: list[torch.Tensor] = []

    def hook() -> torch.Tensor:
        if not results:
            results.append(_Fetch.apply(weight, buffer, kept, raw, dtype, gradient_scale))
        return results[0]

    return hook


def _check(weight: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor | None) -> None:
    if weight.dtype != torch.float32 or weight.shape != rows.shape:
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}: must be torch.float32 {list(rows.shape)}, the rows of "
            "this rank"
        )
    if factors is not None:
        needed = scale_columns(weight.shape[1], packed=factors.dtype == torch.int32)
        if factors.shape[1] != needed:
            raise ValueError(
                f"the table has {factors.shape[1]} scales a row: {needed}, one per 128 values, can be cast back"
            )


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        buffer: ElasticBuffer,
        indices: torch.Tensor,
        raw: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
        dtype: torch.dtype | None,
        gradient_scale: float,
    ) -> torch.Tensor:
        ctx.buffer, ctx.indices, ctx.shape, ctx.scale = buffer, indices, weight.shape, gradient_scale
        data, scales = raw()
        if scales is not None:
            rows = scales.reshape(data.shape[0], -1)
            return per_token_cast_back(data, rows, dtype or torch.bfloat16)
        return data.to(dtype or data.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        rows, sums = ctx.buffer.engram_reduce(ctx.indices, grad)()
        if ctx.scale != 1.0:
            sums = sums * ctx.scale
        sparse = torch.sparse_coo_tensor(rows.unsqueeze(0), sums, ctx.shape, check_invariants=False, is_coalesced=True)
        return sparse, None, None, None, None, None
