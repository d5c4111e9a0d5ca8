"""Context-parallel attention against dense attention over the whole sequence, on every rank's part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.harness import Pool

CPU = torch.device("cpu")
PADDED, REAL = (0, 8, 32, 40), (0, 7, 24, 29)  # starts of packed sequences; sequence i has REAL[i + 1] - REAL[i] tokens


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention over `tokens` tokens of all ranks together."""

    mask: str = "causal"
    heads: int = 4
    groups: int = 4
    qk: int = 8
    v: int = 8
    tokens: int = 64
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    attention_mask: bool = False
    packed: bool = False
    padded: bool = False
    dropout: float = 0.0


CASES = {
    "causal": Case(),
    "no mask": Case(mask="no_mask"),
    "GQA": Case(groups=2),
    "MQA, no mask": Case(groups=1, mask="no_mask"),
    "MLA": Case(qk=12, v=8, scale=0.4),
    "wide values": Case(qk=4, v=8),
    "GQA, bf16": Case(groups=2, dtype=torch.bfloat16),
    "fp64": Case(dtype=torch.float64),
    "padding mask, GQA": Case(mask="padding", attention_mask=True, groups=2),
    "packed, causal, GQA": Case(packed=True, groups=2, tokens=40),
    "packed, causal, padded": Case(packed=True, padded=True, tokens=48),
    "packed, no mask, MLA": Case(packed=True, mask="padding", qk=12, tokens=40),
    "packed, no mask, padded": Case(packed=True, padded=True, mask="no_mask", tokens=40, groups=2),
    "dropout": Case(dropout=0.3),
    "dropout, packed, GQA": Case(dropout=0.3, packed=True, groups=2, tokens=40),
}


def _start(size: int, config: dict[str, Any] | None = None) -> None:
    from megatron.core import parallel_state

    import epv2_plugin

    epv2_plugin.disable()
    epv2_plugin.enable(config or {"timeouts": {"host_seconds": 30}})
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not written is NaN
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=size)


def _attention(size: int, case: Case) -> Any:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.heads * case.qk,
        num_attention_heads=case.heads,
        num_query_groups=case.groups,
        attention_dropout=case.dropout,
        context_parallel_size=size,
        use_cpu_initialization=True,
    )
    return LocalSpecProvider().core_attention()(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType[case.mask],
        attention_type="self",
        softmax_scale=case.scale,
    )


def _inputs(case: Case) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    batch = 1 if case.packed else 2
    shapes = [(case.heads, case.qk), (case.groups, case.qk), (case.groups, case.v), (case.heads, case.v)]
    return [torch.randn(case.tokens, batch, *shape, generator=gen).to(case.dtype) for shape in shapes]


def _mask(case: Case) -> torch.Tensor:
    return torch.rand(2, 1, case.tokens, case.tokens, generator=torch.Generator().manual_seed(5)) < 0.3


def _sequences(case: Case) -> list[tuple[int, int, int]]:
    """(first token, tokens, tokens that are not padding) of each sequence."""
    if not case.packed:
        return [(0, case.tokens, case.tokens)]
    real = REAL if case.padded else PADDED
    return [(PADDED[i], PADDED[i + 1] - PADDED[i], real[i + 1] - real[i]) for i in range(3)]


def _keep(case: Case, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    from epv2_plugin.megatron.block_attention import dropout_factors

    return dropout_factors(case.dropout, seed, 1 if case.packed else 2, range(case.heads), positions, positions)


def _dense(case: Case, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output `[S, B, A * V]` and gradients of query, key and value, in fp64 by one softmax over a whole sequence."""
    query, key, value, weight = (t.double().requires_grad_() for t in _inputs(case))
    repeats = case.heads // case.groups
    outputs = torch.zeros(case.tokens, query.shape[1], case.heads, case.v, dtype=torch.float64)
    for first, tokens, real in _sequences(case):
        rows = slice(first, first + tokens)
        q, k, v = (t[rows].permute(1, 2, 0, 3) for t in (query, key, value))
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = q @ k.transpose(-1, -2) * (case.qk**-0.5 if case.scale is None else case.scale)
        if case.mask == "causal":
            scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
        else:
            scores = scores.masked_fill(torch.arange(tokens) >= real, -torch.inf)
        if case.attention_mask:
            scores = scores.masked_fill(_mask(case), -torch.inf)
        probs = scores.softmax(-1)
        if case.dropout:
            probs = probs * _keep(case, seed, torch.arange(first, first + tokens))
        outputs = torch.cat([outputs[:first], (probs @ v).permute(2, 0, 1, 3), outputs[first + tokens :]])
    (outputs * weight.detach()).sum().backward()
    return outputs.detach().flatten(2), query.grad, key.grad, value.grad


def _part(case: Case, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    from epv2_plugin.megatron.context_parallel import zigzag_split

    covered = [tensor[first : first + tokens] for first, tokens, _ in _sequences(case)]
    rest = tensor[sum(len(part) for part in covered) :]
    return torch.cat([zigzag_split(part, 0, rank, size) for part in covered] + [rest[: len(rest) // size]])


def compare(rank: int, size: int) -> dict[tuple[int, int, str], list[float]]:
    """Largest relative differences of output and gradients on this rank, for every case."""
    from epv2_plugin.megatron import block_attention, context_parallel

    _start(size)
    found, usual = {}, (context_parallel.ROWS_PER_PART, context_parallel.FEW_RANKS)
    for rows, few in (usual, (3, usual[1]), (3, 1)):  # one part; up to three, then four, which end inside sequences
        context_parallel.ROWS_PER_PART, context_parallel.FEW_RANKS = rows, few
        block_attention.MOST_KEPT = 0 if few == 1 else 3  # 0: whatever comes is put together at once
        found |= {(rows, few, name): _compare(rank, size, case) for name, case in CASES.items()}
    (context_parallel.ROWS_PER_PART, context_parallel.FEW_RANKS), block_attention.MOST_KEPT = usual, 3
    return found


def _compare(rank: int, size: int, case: Case, device: torch.device = CPU) -> list[float]:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    attention = _attention(size, case)
    assert type(attention).__name__ == ("ContextParallelAttention" if size > 1 else "LocalAttention")
    with get_cuda_rng_tracker().fork():  # what the attention is going to draw
        seed = torch.randint(0, 1 << 31, (1,), dtype=torch.int64, device=device).cpu()
    _attention(size, case)  # sets the generators back
    expected = [_part(case, t, rank, size) for t in _dense(case, seed)]
    query, key, value, weight = (_part(case, t, rank, size).to(device).requires_grad_() for t in _inputs(case))
    mask, params, tensors = None, None, [query, key, value]
    if case.attention_mask:
        mask = _part(case, _mask(case).permute(2, 0, 1, 3), rank, size).permute(1, 2, 0, 3).to(device)
    if case.packed:
        params = PackedSeqParams(**_packed(case))
        tensors = [t.squeeze(1) for t in tensors]
    out = attention(*tensors, mask, packed_seq_params=params)
    assert out.dtype == case.dtype
    if case.packed:
        assert out.dim() == 2
        out = out.unsqueeze(1)
    (out * weight.detach().flatten(2)).sum().backward()
    found = [out.detach(), query.grad, key.grad, value.grad]
    return [float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


def _packed(case: Case) -> dict[str, Any]:
    starts = torch.tensor(PADDED, dtype=torch.int32)
    real = torch.tensor(REAL, dtype=torch.int32) if case.padded else starts
    padded = {"cu_seqlens_q_padded": starts, "cu_seqlens_kv_padded": starts} if case.padded else {}
    return {"qkv_format": "thd", "cu_seqlens_q": real, "cu_seqlens_kv": real, **padded}


@pytest.mark.parametrize("size", [2, 4])
def test_attention_is_that_of_the_whole_sequence(pool: Callable[[int], Pool], size: int) -> None:
    check(pool(size).run(compare, timeout=200))


def check(results: list[dict[tuple[int, int, str], list[float]]]) -> None:
    """What every rank found with `compare` is small."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}
    for rank, found in enumerate(results):
        for (*parts, name), differences in found.items():
            assert max(differences) < tolerance[CASES[name].dtype], (rank, parts, name, differences)


@pytest.mark.parametrize(
    ("rows", "size", "back", "count"),
    [
        (8192, 1, False, 0),
        (2046, 4, True, 1),
        (8192, 4, False, 2),
        (8190, 4, True, 3),
        (8190, 5, False, 4),
        (2050, 5, True, 2),
    ],
)
def test_parts(rows: int, size: int, back: bool, count: int) -> None:
    """Few among few ranks; they end where the second chunk begins, and nothing lies between them."""
    from epv2_plugin.megatron.context_parallel import _parts

    parts = _parts(rows, size, back)
    assert len(parts) == count
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows if count else 0))
    assert count < 2 or rows // 2 in [part.stop for part in parts]


def bad_input(rank: int, size: int) -> None:
    """Refused before anything is sent: the good call at the end still works."""
    from megatron.core.packed_seq_params import PackedSeqParams

    import epv2_plugin
    from epv2_plugin.config import ConfigError
    from epv2_plugin.megatron.context_parallel import zigzag_split

    _start(size, {"timeouts": {"host_seconds": 5}})
    status = epv2_plugin.status()
    assert (status["context"], status["pipeline"]) == ("epv2", "epv2")
    assert "megatron.core.models.backends.LocalSpecProvider.core_attention" in status["replaced"]
    assert "megatron.core.pipeline_parallel.schedules.P2PCommunicator" in status["replaced"]
    case = Case()
    attention = _attention(size, case)
    query, key, value, _ = (_part(case, t, rank, size) for t in _inputs(case))
    packed = {**_packed(Case(packed=True)), "qkv_format": "thd"}
    flat = [t[:20, 0] for t in (query, key, value)]
    odd = {**packed, "cu_seqlens_q": torch.tensor([0, 6, 32, 40]), "cu_seqlens_kv": None}
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (NotImplementedError, "no attention bias", lambda: attention(query, key, value, None, attention_bias=query)),
        (ValueError, r"value \[32, 2, 2, 8\]: must be", lambda: attention(query, key, value[:, :, :2], None)),
        (ValueError, r"query \[31, ", lambda: attention(query[:31], key, value, None)),
        (ValueError, "holds 31 rows", lambda: attention(query[:31], key[:31], value[:31], None)),
        (
            NotImplementedError,
            "format 'bshd'",
            lambda: attention(*flat, None, packed_seq_params=PackedSeqParams(**{**packed, "qkv_format": "bshd"})),
        ),
        (
            ValueError,
            "sequence 0 has 6 tokens .* multiple of 4",
            lambda: attention(*flat, None, packed_seq_params=PackedSeqParams(**odd)),
        ),
        (
            ValueError,
            r"cu_seqlens_kv = \[0, 8, 32\]",
            lambda: attention(
                *flat,
                None,
                packed_seq_params=PackedSeqParams(**{**packed, "cu_seqlens_kv": packed["cu_seqlens_kv"][:3]}),
            ),
        ),
        (
            ValueError,
            "end at 40: the ranks hold 36",
            lambda: attention(*(t[:18] for t in flat), None, packed_seq_params=PackedSeqParams(**packed)),
        ),
        (ValueError, "has 30 entries: must be a multiple of 4", lambda: zigzag_split(query[:30], 0, 0, 2)),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()
    assert attention(query, key, value, None).shape == (32, 2, 32)
    context = [group for group in epv2_plugin.status()["groups"] if group["primitive"] == "context"]
    assert len(context) == 1
    assert context[0]["sent_bytes"] > 0
    _start(size, {"parallel": {"context": 4}})
    with pytest.raises(ConfigError, match=r"parallel\.context = 4: Megatron was started with 2"):
        _attention(size, case)
    _start(size, {"context": {"kv_exchange": "stock"}, "pipeline": {"transport": "stock"}})
    assert (epv2_plugin.status()["context"], epv2_plugin.status()["pipeline"]) == ("stock", "stock")
    assert not any("P2PCommunicator" in name for name in epv2_plugin.status()["replaced"])
    with pytest.raises(NotImplementedError, match="context_parallel_size = 2"):
        _attention(size, case)


def test_bad_input_is_refused_before_anything_is_sent(pool: Callable[[int], Pool]) -> None:
    pool(2).run(bad_input)
