"""Gradients through dispatch and combine against the same computation on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epv2_plugin.elastic import ElasticBuffer, autograd
from epv2_plugin.elastic.quant import per_token_cast_back, per_token_cast_to_fp8
from tests.harness import Pool

HIDDEN, LOCAL_EXPERTS, TOPK = 12, 3, 4


def _tokens(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(rank)
    count = [5, 0, 9][rank % 3]
    idx = torch.rand(count, LOCAL_EXPERTS * 3, generator=gen).argsort(1)[:, :TOPK].contiguous()
    idx[torch.rand(idx.shape, generator=gen) < 0.2] = -1
    return torch.randn(count, HIDDEN, generator=gen), idx, torch.rand(count, TOPK, generator=gen)


def _expert_weights(experts: int) -> torch.Tensor:
    return torch.randn(experts, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(99)) * 0.3


def distributed_layer(
    rank: int, size: int, expand: bool, exact: bool, overlap: bool, use_fp8: bool
) -> tuple[torch.Tensor, ...]:
    """An MoE layer with linear experts; returns output and gradients of tokens, routing weights and experts."""
    buffer = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=10, num_cpu_timeout_secs=20)
    x, idx, weights = _tokens(rank)
    experts = _expert_weights(size * LOCAL_EXPERTS)[rank * LOCAL_EXPERTS :][:LOCAL_EXPERTS].clone().requires_grad_()
    x, weights = x.requires_grad_(), weights.requires_grad_()
    recv_x, recv_idx, recv_weights, handle, event = autograd.dispatch(
        buffer,
        x,
        idx,
        weights,
        num_experts=size * LOCAL_EXPERTS,
        use_fp8=use_fp8,
        expert_alignment=4,
        do_expand=expand,
        do_zero_padding=expand,
        do_cpu_sync=exact,
        async_with_compute_stream=overlap,
    )
    event.current_stream_wait()
    assert recv_weights is not None
    if expand:
        ends = handle.psum_num_recv_tokens_per_expert.tolist()
        out = torch.zeros_like(recv_x)
        for expert, (end, count) in enumerate(
            zip(ends, handle.num_unaligned_recv_tokens_per_expert.tolist(), strict=True)
        ):
            rows = slice(end - count, end)
            part = (recv_x[rows] @ experts[expert]).tanh() * recv_weights[rows, None]
            out = torch.cat([out[: rows.start], part, out[rows.stop :]])
    else:
        assert recv_idx is not None
        out = torch.zeros_like(recv_x)
        for expert in range(LOCAL_EXPERTS):
            share = (recv_weights * (recv_idx == expert)).sum(1, keepdim=True)
            out = out + (recv_x @ experts[expert]).tanh() * share
    combined, event = autograd.combine(buffer, out, handle, async_with_compute_stream=overlap)
    event.current_stream_wait()
    (combined * torch.arange(1.0, HIDDEN + 1)).square().sum().backward()
    buffer.destroy()
    assert x.grad is not None
    assert weights.grad is not None
    assert experts.grad is not None
    return combined.detach(), x.grad, weights.grad, experts.grad


def one_rank(size: int, use_fp8: bool) -> list[tuple[torch.Tensor, ...]]:
    """The same on one rank, by plain indexing."""
    experts = _expert_weights(size * LOCAL_EXPERTS).requires_grad_()
    leaves, results = [], []
    for rank in range(size):
        x, idx, weights = _tokens(rank)
        x, weights = x.requires_grad_(), weights.requires_grad_()
        seen = (
            x + (per_token_cast_back(*per_token_cast_to_fp8(x.detach()), dtype=x.dtype) - x.detach()) if use_fp8 else x
        )
        rows = torch.einsum("th,tkhj->tkj", seen, experts[idx.clamp(min=0)]).tanh()
        combined = (rows * (weights * (idx >= 0)).unsqueeze(2)).sum(1)
        (combined * torch.arange(1.0, HIDDEN + 1)).square().sum().backward()
        leaves.append((combined.detach(), x.grad, weights.grad))
    assert experts.grad is not None
    for rank, (combined, dx, dweights) in enumerate(leaves):
        mine = experts.grad[rank * LOCAL_EXPERTS :][:LOCAL_EXPERTS]
        results.append((combined, dx, dweights, mine))
    return results


@pytest.mark.parametrize(
    ("expand", "exact", "overlap", "use_fp8"),
    [
        (True, True, False, False),
        (True, True, True, False),
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, False),
        (True, True, False, True),
        (False, True, False, True),
        (True, True, True, True),
        (False, True, True, True),
    ],
)
def test_gradients(pool: Callable[[int], Pool], expand: bool, exact: bool, overlap: bool, use_fp8: bool) -> None:
    found = pool(3).run(distributed_layer, expand, exact, overlap, use_fp8)
    for got, want in zip(found, one_rank(3, use_fp8), strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Recorder:
    """A buffer that notes the tuning arguments of every operation."""

    def __init__(self, buffer: ElasticBuffer):
        self._buffer, self.calls = buffer, []
        self._counting_refusals = buffer._counting_refusals

    def dispatch(self, *args: Any, **options: Any) -> Any:
        self.calls.append(("dispatch", options.get("num_sms"), options.get("num_qps")))
        return self._buffer.dispatch(*args, **options)

    def combine(self, *args: Any, **options: Any) -> Any:
        self.calls.append(("combine", options.get("num_sms"), options.get("num_qps")))
        return self._buffer.combine(*args, **options)


def budgets(rank: int, size: int) -> list[Any]:
    buffer: Any = Recorder(ElasticBuffer(dist.group.WORLD))
    x, idx, _ = _tokens(0)
    recv_x, *_, handle, _ = autograd.dispatch(buffer, x.requires_grad_(), idx, num_experts=9, num_sms=6, num_qps=2)
    combined, _ = autograd.combine(buffer, recv_x, handle, num_sms=4)
    combined.sum().backward()
    return buffer.calls


def test_the_backward_pass_keeps_the_budget(pool: Callable[[int], Pool]) -> None:
    (calls,) = pool(1).run(budgets)
    assert calls == [("dispatch", 6, 2), ("combine", 4, None), ("dispatch", 4, None), ("combine", 6, 2)]


def test_fp8_cast_keeps_three_bits() -> None:
    x = torch.randn(7, 300) * torch.logspace(-3, 3, 7).unsqueeze(1)
    x[2] = 0
    values, scales = per_token_cast_to_fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (7, 3)
    assert (
        (per_token_cast_back(values, scales, torch.float32) - x).abs()
        <= x.abs() / 16 + scales.max(1)[0].unsqueeze(1) * 2**-9
    ).all()
    exponents = torch.randint(120, 134, (7, 4), dtype=torch.uint8)
    powers = (2.0 ** (exponents.float() - 127))[:, :3]
    packed = exponents.view(torch.int32)
    assert torch.equal(
        per_token_cast_back(values, packed, torch.float32), per_token_cast_back(values, powers, torch.float32)
    )
