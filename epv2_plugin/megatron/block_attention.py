"""Attention on one block of keys and values, with the log-sum-exp by which blocks merge exactly.

A block's softmax runs over its own keys. With every query's log-sum-exp of scores, the outputs of several blocks
combine to what one softmax over all keys gives; and a block's gradients follow from the merged output and log-sum-exp
alone. torch's flash attention computes a block where it can (on a GPU: 16-bit dtypes, up to 256 features), plain
products do elsewhere (masks, dropout).

Legend: B batch, A query heads, G key/value heads (G divides A), S queries, R keys, D query/key features, V value
features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

_GPU_DTYPES, _GPU_FEATURES, _GPU_ALIGNMENT = (torch.bfloat16, torch.float16), 256, 8
_WORD = (1 << 32) - 1
MOST_KEPT = 3  # times the output, in the dtype of sums, that blocks may take until they are put together


@dataclass(frozen=True)
class Block:
    """What a block computes, beside its tensors.

    Attributes:
        scale: factor on the scores.
        causal: query i sees keys 0 to i (S == R).
        hidden: bool, broadcastable to `[B, A, S, R]`, True = not seen.
        keep: dropout factors of the probabilities `[B, A, S, R]`: 0, or 1 / (1 - p).
    """

    scale: float
    causal: bool = False
    hidden: torch.Tensor | None = None
    keep: torch.Tensor | None = None


def attend(
    query_BASD: torch.Tensor, key_BGRD: torch.Tensor, value_BGRV: torch.Tensor, block: Block
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, A, S, V]` and log-sum-exp of the scores `[B, A, S]` (-inf where no key is seen, output 0 there)."""
    if _takes_flash(query_BASD, value_BGRV, block):
        query, key, value = _flash_heads(query_BASD, key_BGRD, value_BGRV, block)
        width = value.shape[-1]
        query, key, value = _same_width(query, key, value)
        out, lse = _flash(query, key, value, block)
        return _narrow(out, width).reshape(*query_BASD.shape[:3], width), lse.reshape(query_BASD.shape[:3])
    scores = _scores(query_BASD, key_BGRD, block)
    lse = scores.logsumexp(-1)
    probs = torch.exp(scores - _finite(lse).unsqueeze(-1))
    if block.keep is not None:
        probs = probs * block.keep
    out = _by_group(probs, value_BGRV) @ value_BGRV.to(probs.dtype)
    return out.reshape(*query_BASD.shape[:3], -1), lse


def attend_backward(
    grad_BASV: torch.Tensor,
    query_BASD: torch.Tensor,
    key_BGRD: torch.Tensor,
    value_BGRV: torch.Tensor,
    out_BASV: torch.Tensor,
    lse_BAS: torch.Tensor,
    block: Block,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query `[B, A, S, D]`, key `[B, G, R, D]` and value `[B, G, R, V]` that go through this block.

    `out_BASV` and `lse_BAS` are the merged ones, over all blocks of these queries.
    """
    if _takes_flash(query_BASD, value_BGRV, block):
        query, key, value = _flash_heads(query_BASD, key_BGRD, value_BGRV, block)
        grad, out = (t.reshape(*query.shape[:3], -1) for t in (grad_BASV, out_BASV))
        lse = lse_BAS.reshape(query.shape[:3]).contiguous()
        width_qk, width_v = query.shape[-1], value.shape[-1]
        query, key, value = _same_width(query, key, value)
        grad, out = (_wide(t, query.shape[-1]) for t in (grad, out))
        grads = _flash_backward(grad, query, key, value, out, lse, block)
        dq, dk, dv = _narrow(grads[0], width_qk), _narrow(grads[1], width_qk), _narrow(grads[2], width_v)
        if dk.shape[1] != key_BGRD.shape[1]:  # heads that a causal block repeated
            dk, dv = (t.unflatten(1, (key_BGRD.shape[1], -1)).sum(2) for t in (dk, dv))
        return dq.reshape(query_BASD.shape), dk, dv
    scores = _scores(query_BASD, key_BGRD, block)
    probs = torch.exp(scores - _finite(lse_BAS).unsqueeze(-1))
    dtype = probs.dtype
    grad, value = grad_BASV.to(dtype), value_BGRV.to(dtype)
    dropped = probs if block.keep is None else probs * block.keep
    dv = _by_group(dropped, value).transpose(-1, -2) @ _by_group(grad, value)
    dprobs = (_by_group(grad, value) @ value.transpose(-1, -2)).view(probs.shape)
    if block.keep is not None:
        dprobs = dprobs * block.keep
    delta = (grad * out_BASV.to(dtype)).sum(-1, keepdim=True)
    dscores = probs * (dprobs - delta) * block.scale
    dq = (_by_group(dscores, value) @ key_BGRD.to(dtype)).reshape(query_BASD.shape)
    dk = _by_group(dscores, value).transpose(-1, -2) @ _by_group(query_BASD.to(dtype), value)
    return dq, dk, dv


class Merge:
    """Blocks of attention put together: each adds its keys to what some queries have seen.

    Args:
        query_SBAD: all queries. features: of a value. whole: whether every query comes in a block that is its first.

    Attributes:
        lse: log-sum-exp `[B, A, S]` over the blocks so far, -inf where a query has seen no key; fp32, or fp64.
    """

    def __init__(self, query_SBAD: torch.Tensor, features: int, whole: bool):
        rows, batch, heads, _ = query_SBAD.shape
        wide = torch.float64 if query_SBAD.dtype == torch.float64 else torch.float32
        self.lse = query_SBAD.new_full((batch, heads, rows), -torch.inf, dtype=wide)
        self._dtype, self._whole = query_SBAD.dtype, whole
        self._shape = rows, batch, heads, features
        self._blocks: list[tuple[slice, torch.Tensor, torch.Tensor, bool]] = []
        self._kept = 0  # bytes

    def add(self, queries: slice, out_BASV: torch.Tensor, lse_BAS: torch.Tensor, first: bool = False) -> None:
        """A block's result for `queries`; `first`: it is the first for any of them."""
        lse = self.lse[:, :, queries]
        torch.logaddexp(lse, lse_BAS, out=lse)
        self._blocks.append((queries, out_BASV, lse_BAS, first))
        self._kept += out_BASV.untyped_storage().nbytes()  # of a view, too, what it holds
        if not first and self._kept > MOST_KEPT * math.prod(self._shape) * self.lse.itemsize:
            so_far = self._sum()
            self._blocks = [(slice(None), so_far.permute(1, 2, 0, 3), self.lse.clone(), True)]
            self._kept = so_far.nbytes

    def output(self) -> torch.Tensor:
        """`[S, B, A, V]`, dtype of the queries, 0 where no key was seen."""
        out_SBAV = self._sum()
        self._blocks.clear()
        return out_SBAV.to(self._dtype)

    def _sum(self) -> torch.Tensor:
        """`[S, B, A, V]` of the blocks that are kept.

        Not block by block as they come: to scale what those before gave would read and write it once more each time.
        """
        made = torch.empty if self._whole else torch.zeros
        out_SBAV = made(self._shape, dtype=self.lse.dtype, device=self.lse.device)
        out_BASV, total = out_SBAV.permute(1, 2, 0, 3), _finite(self.lse)
        for queries, block_out, block_lse, first in self._blocks:
            share = (block_lse - total[:, :, queries]).exp_().unsqueeze(-1)
            if first:
                torch.mul(block_out, share, out=out_BASV[:, :, queries])
            else:
                out_BASV[:, :, queries].addcmul_(block_out, share)
        return out_SBAV


def dropout_factors(
    rate: float, seed: torch.Tensor, batch: int, heads: range, query_S: torch.Tensor, key_R: torch.Tensor
) -> torch.Tensor:
    """0 with probability `rate`, else 1 / (1 - rate), fp32 `[B, A, S, R]`.

    A hash of seed, batch row, head and the positions of query and key decides: how the work is split changes nothing.

    Args:
        seed: int64 `[1]`. heads: numbers of the heads. query_S, key_R: int64 positions.
    """
    device = query_S.device
    state = _mixed(seed.to(device) & _WORD)
    for index in (
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.tensor(heads, device=device).view(-1, 1, 1),
        query_S.view(-1, 1),
        key_R,
    ):
        state = _mixed(state ^ _mixed(index + 1))
    return (state >= round(rate * (_WORD + 1))).float() / (1 - rate)


def _mixed(word: torch.Tensor) -> torch.Tensor:
    """32-bit words (in int64) with every bit spread over all others: MurmurHash3's finalizer."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & _WORD
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & _WORD
    return word ^ (word >> 16)


def _takes_flash(query: torch.Tensor, value: torch.Tensor, block: Block) -> bool:
    if block.hidden is not None or block.keep is not None:
        return False
    width = max(query.shape[-1], value.shape[-1])
    return query.device.type == "cpu" or (query.dtype in _GPU_DTYPES and width <= _GPU_FEATURES)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: Block
) -> tuple[torch.Tensor, torch.Tensor]:
    aten = torch.ops.aten
    if query.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, block.causal, scale=block.scale)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, block.causal, scale=block.scale)
    return out, lse


def _flash_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block: Block,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    aten = torch.ops.aten
    tensors = (grad, query, key, value, out, lse)
    if query.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(*tensors, 0.0, block.causal, scale=block.scale)
    # All sequences of a batch are as long as each other, and nothing is dropped: neither starts nor a seed.
    starts, seed = (None, None), lse.new_empty((), dtype=torch.int64)
    lengths = (query.shape[2], key.shape[2])
    flash = aten._scaled_dot_product_flash_attention_backward
    return flash(*tensors, *starts, *lengths, 0.0, block.causal, seed, seed, scale=block.scale)


def _flash_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: Block
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same with as many key as query heads: queries of heads that share a key follow one another where no order of
    queries matters; a causal block repeats its keys."""
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return query, key, value
    if block.causal:
        return query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return query.unflatten(1, (-1, repeats)).flatten(2, 3), key, value


def _same_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Zeros appended to the features, which change no score and no output."""
    width = max(t.shape[-1] for t in tensors)
    if tensors[0].device.type != "cpu":
        width += -width % _GPU_ALIGNMENT
    return [_wide(t, width) for t in tensors]


def _wide(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return tensor if tensor.shape[-1] == width else pad(tensor, (0, width - tensor.shape[-1]))


def _narrow(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return tensor if tensor.shape[-1] == width else tensor[..., :width]


def _by_group(tensor_BASX: torch.Tensor, like_BGR: torch.Tensor) -> torch.Tensor:
    """`[B, A, S, X]` as `[B, G, A / G * S, X]`."""
    return tensor_BASX.unflatten(1, (like_BGR.shape[1], -1)).flatten(2, 3)


def _scores(query: torch.Tensor, key: torch.Tensor, block: Block) -> torch.Tensor:
    """`[B, A, S, R]`, fp32 or fp64, -inf where a key is not seen."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = _by_group(query, key).to(dtype) @ key.to(dtype).transpose(-1, -2) * block.scale
    scores = scores.view(*query.shape[:3], key.shape[2])
    if block.causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(above, -torch.inf)
    if block.hidden is not None:
        scores.masked_fill_(block.hidden, -torch.inf)
    return scores


def _finite(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)
