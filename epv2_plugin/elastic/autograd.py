"""Autograd for `ElasticBuffer`: the backward of dispatch is combine, the backward of combine is a cached dispatch."""

from __future__ import annotations

from typing import Any

import torch

from epv2_plugin.elastic.buffer import ElasticBuffer
from epv2_plugin.elastic.event import EventOverlap, HostEvent
from epv2_plugin.elastic.handle import EPHandle
from epv2_plugin.elastic.quant import per_token_cast_back, per_token_cast_to_fp8


def dispatch(
    buffer: ElasticBuffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    num_experts: int,
    use_fp8: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
    """Differentiable `ElasticBuffer.dispatch` in `x` and `topk_weights`.

    Args:
        x: `[T, H]` fp32, bf16 or fp16. topk_idx, topk_weights, num_experts: as there.
        use_fp8: send e4m3 with one scale per 128 values; `recv_x` comes back in x's dtype (cast when the rows have
            arrived, by the wait for `event`), gradients are not cast.
        options: further arguments of `ElasticBuffer.dispatch` (not `handle`). The backward pass holds as many SMs and
            queue pairs as the forward pass.

    Returns:
        recv_x, recv_topk_idx, recv_topk_weights, handle, event, as `ElasticBuffer.dispatch`.
    """
    return _Dispatch.apply(buffer, x, topk_weights, topk_idx, use_fp8, {"num_experts": num_experts, **options})


def combine(
    buffer: ElasticBuffer, x: torch.Tensor, handle: EPHandle, **options: Any
) -> tuple[torch.Tensor, EventOverlap]:
    """Differentiable `ElasticBuffer.combine` in `x`.

    Args:
        x: rows as dispatch with `handle` returned them.
        options: `async_with_compute_stream` and the tuning arguments of `ElasticBuffer.combine`.

    Returns:
        combined_x `[T, H]` and the event.

    Raises:
        TypeError: `bias` or `topk_weights` is given.
    """
    for name in ("bias", "topk_weights"):
        if name in options:
            raise TypeError(f"{name}: has no gradient here; add it to the result, or use ElasticBuffer.combine")
    return _Combine.apply(buffer, x, handle, options)


_BUDGET = ("num_sms", "num_qps")


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, buffer: ElasticBuffer, x: Any, weights: Any, topk_idx: Any, use_fp8: bool, options: dict
    ) -> Any:
        ctx.buffer, ctx.budget = buffer, {name: options[name] for name in _BUDGET if name in options}
        rows = per_token_cast_to_fp8(x) if use_fp8 else x
        recv_x, recv_idx, recv_weights, handle, event = buffer.dispatch(rows, topk_idx, weights, **options)
        if use_fp8:
            recv_x, event = _cast_back(rows, recv_x, x.dtype, event)
            if not options.get("async_with_compute_stream"):
                event.current_stream_wait()
        ctx.handle = handle
        if recv_idx is not None:
            ctx.mark_non_differentiable(recv_idx)
        return recv_x, recv_idx, recv_weights, handle, event

    @staticmethod
    def backward(ctx: Any, grad_x: Any, _idx: Any, grad_weights: Any, *_: Any) -> Any:
        wanted = grad_weights if ctx.needs_input_grad[2] else None
        dx, dweights, _ = ctx.buffer.combine(grad_x, ctx.handle, topk_weights=wanted, **ctx.budget)
        return None, dx, dweights, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: ElasticBuffer, x: Any, handle: EPHandle, options: dict) -> Any:
        ctx.buffer, ctx.handle = buffer, handle
        ctx.budget = {name: options[name] for name in _BUDGET if name in options}
        combined, _, event = buffer.combine(x, handle, **options)
        return combined, event

    @staticmethod
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        expanded = ctx.handle.do_expand
        # Gap rows took no part in the sum: their gradient is zero.
        dx, *_ = ctx.buffer.dispatch(
            grad, handle=ctx.handle, do_expand=expanded, do_zero_padding=expanded, **ctx.budget
        )
        return None, dx, None, None


def _cast_back(sent: Any, received: Any, dtype: torch.dtype, event: EventOverlap) -> tuple[torch.Tensor, EventOverlap]:
    """Room for the received FP8 rows in `dtype`, and the event that fills it. Until then `sent`, which the dispatch
    may still be reading, is kept alive."""
    rows, scales = received
    target = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    keep = [sent]

    def finish() -> None:
        event.current_stream_wait(release_handle=True)
        keep.clear()
        target.copy_(per_token_cast_back(rows, scales, dtype))

    return target, EventOverlap(HostEvent(finish))
