"""Autograd for `ElasticBuffer`: the backward of dispatch is combine, the backward of combine is a cached dispatch; the
backward of an all-gather is a reduce-scatter, and the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from epv2_plugin.elastic.buffer import ElasticBuffer
from epv2_plugin.elastic.event import EventOverlap, HostEvent
from epv2_plugin.elastic.handle import EPHandle
from epv2_plugin.elastic.quant import per_token_cast_back


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
    with buffer._counting_refusals("combine"):
        for name in ("bias", "topk_weights"):
            if name in options:
                raise TypeError(f"{name}: has no gradient here; add it to the result, or use ElasticBuffer.combine")
    return _Combine.apply(buffer, x, handle, options)


def all_gather(buffer: ElasticBuffer, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Differentiable `ElasticBuffer.all_gather`, inside a session; the gradients are summed over ranks.

    The backward is a collective operation: every rank must run it, in the same order. It waits for its data, in the
    session that there is then, or in one of its own.

    Args:
        tensors: floating, as there.

    Returns:
        The gathered tensors `[ranks, *shape]`, and the wait after which they hold data.
    """
    *gathered, wait = _AllGather.apply(buffer, *tensors)
    return gathered, wait


def reduce_scatter(
    buffer: ElasticBuffer, tensors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Differentiable `ElasticBuffer.reduce_scatter`; the backward gathers the gradients. See `all_gather`."""
    *reduced, wait = _ReduceScatter.apply(buffer, *tensors)
    return reduced, wait


_BUDGET = ("num_sms", "num_qps")


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, buffer: ElasticBuffer, x: Any, weights: Any, topk_idx: Any, use_fp8: bool, options: dict
    ) -> Any:
        ctx.buffer, ctx.budget = buffer, {name: options[name] for name in _BUDGET if name in options}
        recv_x, recv_idx, recv_weights, handle, event = buffer.dispatch(
            x, topk_idx, weights, use_fp8=use_fp8, **options
        )
        if use_fp8:
            recv_x, event = _cast_back(x, recv_x, event)
            if not options.get("async_with_compute_stream"):
                event.current_stream_wait()
        ctx.handle = handle
        if recv_idx is not None:
            ctx.mark_non_differentiable(recv_idx)
        return recv_x, recv_idx, recv_weights, handle, event

    @staticmethod
    @once_differentiable
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
    @once_differentiable
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        expanded = ctx.handle.do_expand
        # Gap rows took no part in the sum: their gradient is zero.
        dx, *_ = ctx.buffer.dispatch(
            grad, handle=ctx.handle, do_expand=expanded, do_zero_padding=expanded, **ctx.budget
        )
        return None, dx, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: ElasticBuffer, *tensors: torch.Tensor) -> Any:
        ctx.buffer = buffer
        return buffer.all_gather([tensor.contiguous() for tensor in tensors], keep=True)  # for the backward

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *_complete(ctx.buffer, ctx.buffer.reduce_scatter, grads[:-1])


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: ElasticBuffer, *tensors: torch.Tensor) -> Any:
        ctx.buffer = buffer
        return buffer.reduce_scatter([tensor.contiguous() for tensor in tensors])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *_complete(ctx.buffer, partial(ctx.buffer.all_gather, keep=True), grads[:-1])


def _complete(buffer: ElasticBuffer, operation: Callable, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The finished result of a collective on gradients, in the running session or one of its own."""
    with buffer.agrs_new_session(enabled=not buffer.agrs_in_session):
        *results, wait = operation([grad.contiguous() for grad in grads])
        wait()
    return results


def _cast_back(sent: torch.Tensor, received: Any, event: EventOverlap) -> tuple[torch.Tensor, EventOverlap]:
    """Room for the received FP8 rows in the dtype of `sent`, and the event that fills it. Until then `sent`, which the
    dispatch may still be reading, is kept alive."""
    rows, scales = received
    target = torch.empty(rows.shape, dtype=sent.dtype, device=rows.device)
    keep = [sent]

    def finish() -> None:
        event.current_stream_wait(release_handle=True)
        keep.clear()
        target.copy_(per_token_cast_back(rows, scales, target.dtype))

    return target, EventOverlap(HostEvent(finish))
