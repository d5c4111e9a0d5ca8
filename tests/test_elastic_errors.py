"""Bad input, bad peers: a precise error on the rank concerned, within the timeout, never a hang or a wrong number."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epv2_plugin import BufferSizeError, CommunicationError, CommunicationTimeout, ElasticBuffer, EventOverlap
from epv2_plugin.elastic import autograd, engram
from tests import harness
from tests.harness import Pool

TOKENS, HIDDEN, EXPERTS, TOPK = 4, 32, 12, 2


def _inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(rank)
    idx = torch.rand(TOKENS, EXPERTS, generator=gen).argsort(1)[:, :TOPK].contiguous()
    return torch.randn(TOKENS, HIDDEN, generator=gen), idx, torch.rand(TOKENS, TOPK, generator=gen)


def bad_input(rank: int, size: int) -> list[str]:
    """Everything below is refused before anything is sent, so that the good call at the end still works."""
    buffer = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=8, hidden=64, num_topk=3, num_cpu_timeout_secs=10)
    other = ElasticBuffer(dist.group.WORLD, num_bytes=2 << 20, num_cpu_timeout_secs=10)
    x, idx, weights = _inputs(rank)
    good: dict[str, Any] = {"topk_idx": idx, "topk_weights": weights, "num_experts": EXPERTS}
    _, _, _, handle, _ = buffer.dispatch(x, **good)
    out, _, _, expanded, _ = buffer.dispatch(x, **good, do_expand=True)
    _, _, _, foreign, _ = other.dispatch(x, **good)
    fp8 = x.to(torch.float8_e4m3fn)
    scales = torch.ones(TOKENS, 1)
    stats = torch.zeros(EXPERTS // size, dtype=torch.int32)
    low, high = idx.clone(), idx.clone()
    same = torch.full_like(idx, 3)
    low[1, 0], high[2, 1] = -2, EXPERTS
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "x is torch.float64", lambda: buffer.dispatch(x.double(), **good)),
        (TypeError, "x is torch.float8_e4m3fn", lambda: buffer.dispatch(fp8, **good)),
        (TypeError, "x must be a tensor or a pair", lambda: buffer.dispatch([x], **good)),
        (TypeError, "x\\[0\\] is torch.float32", lambda: buffer.dispatch((x, scales), **good)),
        (TypeError, "x\\[1\\] is torch.float64", lambda: buffer.dispatch((fp8, scales.double()), **good)),
        (ValueError, "x\\[1\\] has shape \\[4, 2\\]", lambda: buffer.dispatch((fp8, scales.repeat(1, 2)), **good)),
        (ValueError, "x has shape \\[128\\]", lambda: buffer.dispatch(x.flatten(), **good)),
        (ValueError, "on meta", lambda: buffer.dispatch(x.to("meta"), **good)),
        (TypeError, "topk_idx is torch.int32", lambda: buffer.dispatch(x, idx.int(), weights, num_experts=EXPERTS)),
        (ValueError, "topk_idx has shape", lambda: buffer.dispatch(x, idx[:3], num_experts=EXPERTS)),
        (ValueError, "topk_idx\\[1, 0\\] = -2", lambda: buffer.dispatch(x, low, num_experts=EXPERTS)),
        (ValueError, "topk_idx\\[2, 1\\] = 12", lambda: buffer.dispatch(x, high, num_experts=EXPERTS)),
        (ValueError, "top-k 0", lambda: buffer.dispatch(x, idx[:, :0], num_experts=EXPERTS)),
        (
            TypeError,
            "topk_weights is torch.bfloat16",
            lambda: buffer.dispatch(x, idx, weights.bfloat16(), num_experts=EXPERTS),
        ),
        (ValueError, "topk_weights has shape", lambda: buffer.dispatch(x, idx, weights[:, :1], num_experts=EXPERTS)),
        (ValueError, "num_experts = 5", lambda: buffer.dispatch(x, idx, num_experts=5)),
        (ValueError, "needs topk_idx and num_experts", lambda: buffer.dispatch(x)),
        (ValueError, "expert_alignment = 0", lambda: buffer.dispatch(x, **good, expert_alignment=0)),
        (ValueError, "do_zero_padding", lambda: buffer.dispatch(x, **good, do_zero_padding=True)),
        (ValueError, "expert 3 more than once", lambda: buffer.dispatch(x, same, num_experts=12, do_cpu_sync=False)),
        (ValueError, "hidden size must be 1", lambda: buffer.dispatch(x[:, :0], **good)),
        (TypeError, "bias: has no gradient", lambda: autograd.combine(buffer, out, expanded, bias=x)),
        (ValueError, "do_cpu_sync=False", lambda: other.dispatch(x, **good, do_cpu_sync=False)),
        (
            ValueError,
            "recv_stats has shape",
            lambda: buffer.dispatch(x, idx, None, stats.repeat(2), num_experts=EXPERTS),
        ),
        (
            BufferSizeError,
            "9 tokens",
            lambda: buffer.dispatch(x.repeat(3, 1)[:9], idx.repeat(3, 1)[:9], num_experts=EXPERTS),
        ),
        (BufferSizeError, "hidden size 96", lambda: buffer.dispatch(x.repeat(1, 3), **good)),
        (BufferSizeError, "top-k 4", lambda: buffer.dispatch(x, idx.repeat(1, 2), num_experts=EXPERTS)),
        (
            BufferSizeError,
            "this dispatch needs",
            lambda: other.dispatch(x.repeat(4000, 1), idx.repeat(4000, 1), num_experts=EXPERTS),
        ),
        (ValueError, "topk_idx = a tensor with a cached handle", lambda: buffer.dispatch(x, idx, handle=handle)),
        (ValueError, "do_cpu_sync = True", lambda: buffer.dispatch(x, handle=handle, do_cpu_sync=True)),
        (ValueError, "do_expand = True", lambda: buffer.dispatch(x, handle=handle, do_expand=True)),
        (ValueError, "x has 3 tokens, topk_idx has 4", lambda: buffer.dispatch(x[:3], handle=handle)),
        (ValueError, "another ElasticBuffer", lambda: buffer.dispatch(x, handle=foreign)),
        (TypeError, "handle must be an EPHandle", lambda: buffer.dispatch(x, handle=7)),
        (ValueError, "another ElasticBuffer", lambda: buffer.combine(out, foreign)),
        (ValueError, "x has shape", lambda: buffer.combine(torch.cat([out, out[:1]]), expanded)),
        (TypeError, "x is torch.int64", lambda: buffer.combine(out.long(), expanded)),
        (ValueError, "topk_weights has shape", lambda: buffer.combine(out, expanded, topk_weights=weights)),
        (ValueError, "bias has shape", lambda: buffer.combine(out, expanded, bias=x[:2])),
        (TypeError, "bias is torch.bfloat16", lambda: buffer.combine(out, expanded, bias=x.bfloat16())),
        (ValueError, "at most two", lambda: buffer.combine(out, expanded, bias=(x, x, x))),
        (TypeError, "group must be", lambda: ElasticBuffer("world")),
        (TypeError, "hidden = 'x': must be a whole number", lambda: ElasticBuffer(dist.group.WORLD, hidden="x")),
        (TypeError, "num_bytes = 1.5: must be a whole", lambda: ElasticBuffer(dist.group.WORLD, num_bytes=1.5)),
        (
            TypeError,
            "num_cpu_timeout_secs = '3': must be a number",
            lambda: ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs="3"),
        ),
        (ValueError, "hidden = -1", lambda: ElasticBuffer(dist.group.WORLD, hidden=-1)),
        (ValueError, "num_bytes = 0", lambda: ElasticBuffer(dist.group.WORLD, num_bytes=0)),
        (
            ValueError,
            "num_cpu_timeout_secs = 0: must be positive",
            lambda: ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=0),
        ),
        (ValueError, "backend = 'mpi'", lambda: ElasticBuffer(dist.group.WORLD, backend="mpi")),
        (RuntimeError, "cuda backend", lambda: ElasticBuffer(dist.group.WORLD, backend="cuda")),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()
    combined, _, _ = buffer.combine(out, expanded)
    torch.testing.assert_close(combined, x * TOPK)
    buffer.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        buffer.dispatch(x, **good)
    with pytest.raises(ValueError, match="another ElasticBuffer"):
        other.combine(out, expanded)
    return [match for _, match, _ in cases]


def test_bad_input_is_refused_before_anything_is_sent(pool: Callable[[int], Pool]) -> None:
    assert len(pool(2).run(bad_input)[0]) > 40


def dies(rank: int, size: int, when: str) -> str:
    """Rank 2 is killed; the others must raise."""
    buffer = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=20)
    x, idx, _ = _inputs(rank)
    rows, _, _, handle, _ = buffer.dispatch(x, idx, num_experts=EXPERTS)
    buffer.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    pending = EventOverlap()
    try:
        *_, pending = buffer.combine(rows, handle, async_with_compute_stream=True)
        for _ in range(3):
            if when == "dispatch":
                buffer.dispatch(x, idx, num_experts=EXPERTS)
            elif when == "combine":
                buffer.combine(rows, handle)
            else:
                buffer.barrier()
    except CommunicationError as error:
        assert time.monotonic() - begin < 15
        assert error.rank == rank
        assert when in error.phase
        with pytest.raises(CommunicationError):  # the buffer stays unusable, at once
            buffer.barrier()
        with pytest.raises(CommunicationError):  # and so does what was under way
            pending.current_stream_wait()
        with pytest.raises(CommunicationError):
            pending.current_stream_wait()
        return str(error)
    return "no error"


@pytest.mark.parametrize("when", ["dispatch", "combine", "barrier"])
def test_killed_peer(when: str) -> None:
    results = harness.outcomes(4, dies, when, timeout=60)
    for rank in (0, 1, 3):
        assert results[rank].error == "", results[rank].error
        assert f"rank {rank}, waiting for rank" in results[rank].value
        assert "closed connection" in results[rank].value
    assert results[2].error_type == "Killed"


def never_calls(rank: int, size: int) -> tuple[str, str]:
    """Rank 1 does not take part in the second dispatch; nobody may hang."""
    buffer = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=2)
    x, idx, _ = _inputs(rank)
    buffer.dispatch(x, idx, num_experts=EXPERTS)
    if rank == 1:
        time.sleep(4)
    begin = time.monotonic()
    try:
        buffer.dispatch(x, idx, num_experts=EXPERTS)
    except CommunicationError as error:
        assert time.monotonic() - begin < 6
        return type(error).__name__, str(error)
    return "", ""


def test_absent_peer_times_out_on_every_rank() -> None:
    results = harness.run(3, never_calls, timeout=60)
    assert all(kind for kind, _ in results)
    kind, message = results[0]
    assert kind == CommunicationTimeout.__name__
    assert message == "rank 0, waiting for rank 1 in dispatch #3, header: expected 96 bytes, seen nothing within 2 s"


def disagree(rank: int, size: int, what: str) -> str:
    """Rank 1 calls with something else than rank 0."""
    buffer = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=3)
    x, idx, weights = _inputs(rank)
    x = x.bfloat16() if what == "dtype" and rank else x
    x = x[:, :16] if what == "hidden size" and rank else x
    experts = 24 if what == "experts" and rank else EXPERTS
    idx = idx[:, :1].contiguous() if what == "top-k" and rank else idx
    weights = weights if what == "topk_weights" and rank else None
    handles = [buffer.dispatch(*_inputs(rank)[:2], num_experts=EXPERTS)[3] for _ in range(2)]
    try:
        if what == "handle":
            handle = handles[rank]
            buffer.combine(torch.zeros(handle.num_rows, HIDDEN), handle)
        elif what == "operation" and rank:
            buffer.barrier()
        else:
            buffer.dispatch(x, idx, weights, num_experts=experts)
    except CommunicationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["dtype", "experts", "top-k", "hidden size", "topk_weights", "operation", "handle"])
def test_ranks_that_disagree(pool: Callable[[int], Pool], what: str) -> None:
    messages = pool(2).run(disagree, what, timeout=30)
    assert all(messages)
    if what not in ("operation", "experts", "handle"):  # these decide the size of the first message
        assert any(f"expected {what}" in message for message in messages), messages


def not_everyone_creates(rank: int, size: int) -> str:
    if rank == 1:
        time.sleep(4)
        return ""
    with pytest.raises(CommunicationTimeout, match="creation of the buffer") as error:
        ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=2)
    return str(error.value)


def test_buffer_that_not_every_rank_creates() -> None:
    assert "within 2 s" in harness.run(2, not_everyone_creates, timeout=60)[0]


def refused_creation(rank: int, size: int, options: dict[str, Any]) -> str:
    """Rank 1 is refused its buffer, catches that, and all make another one."""
    begin = time.monotonic()
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        ElasticBuffer(dist.group.WORLD, **(options if rank == 1 else {}))  # waits for 300 s
    assert time.monotonic() - begin < 20
    ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=20).barrier()
    return f"{error.typename}: {error.value}"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"hidden": -1}, "hidden = -1: must be 0 or more"),
        ({"num_cpu_timeout_secs": "3"}, "num_cpu_timeout_secs = '3': must be a number, got str"),
        ({"backend": "cuda"}, "the cuda backend needs a CUDA device"),
    ],
)
def test_a_creation_that_only_one_rank_refused_is_an_error_everywhere(
    pool: Callable[[int], Pool], options: dict[str, Any], text: str
) -> None:
    zero, one, two = pool(3).run(refused_creation, options)
    assert text in one
    for other in (zero, two):
        assert other.startswith(f"RuntimeError: rank 1 of the group can't take part: {text}")


REFUSED = ("dispatch", "combine", "autograd", "engram_fetch", "engram_update", "engram", "all_gather", "keyword")


def refused_on_one_rank(rank: int, size: int, what: str) -> str:
    """Every rank makes two calls. Rank 1's first one is refused, and it catches that."""
    buffer = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=4)
    x, idx, _ = _inputs(rank)
    everybody = torch.arange(TOKENS).unsqueeze(1) % size  # so that nobody can do without anybody's rows
    rows, _, _, handle, _ = buffer.dispatch(x, everybody, num_experts=size)
    buffer.engram_write(torch.ones(4, 8))
    buffer.agrs_set_config(1 << 20, 4)
    weight, wanted = torch.zeros(4, 8), torch.arange(4 * size)
    good, bad = {
        "dispatch": (lambda v: buffer.dispatch(v * x, idx, num_experts=EXPERTS), lambda: buffer.dispatch(x.double())),
        "combine": (lambda v: buffer.combine(v * rows, handle), lambda: buffer.combine(rows.double(), handle)),
        "autograd": (
            lambda v: autograd.combine(buffer, v * rows, handle),
            lambda: autograd.combine(buffer, rows, handle, bias=x),
        ),
        "engram_fetch": (lambda v: buffer.engram_fetch(wanted)(), lambda: buffer.engram_fetch(wanted + 1)),
        "engram_update": (
            lambda v: buffer.engram_update(torch.tensor([v]), torch.ones(1, 8)),
            lambda: buffer.engram_update(torch.tensor([9]), torch.ones(1, 8)),
        ),
        "engram": (
            lambda v: engram.fetch(buffer, weight, wanted)(),
            lambda: engram.fetch(buffer, weight[:2], wanted),
        ),
        "all_gather": (lambda v: buffer.all_gather(v * x)[-1](), lambda: buffer.all_gather([x, "x"])),
        "keyword": (lambda v: buffer.barrier(), lambda: buffer.barrier(sync=True)),
    }[what]
    begin = time.monotonic()
    try:
        with buffer.agrs_new_session():
            if rank == 1:
                with pytest.raises((TypeError, ValueError)):
                    bad()
            else:
                good(1)
            good(2)
        buffer.barrier()
    except CommunicationError as error:
        assert not isinstance(error, CommunicationTimeout) or rank == 1
        assert time.monotonic() - begin < 15
        with pytest.raises(CommunicationError):
            buffer.barrier()
        return str(error)
    return ""


@pytest.mark.parametrize("what", REFUSED)
def test_a_call_that_only_one_rank_refused_is_an_error_everywhere(what: str) -> None:
    zero, one, two = harness.run(3, refused_on_one_rank, what, timeout=60)
    assert one.startswith("rank 1, waiting for rank "), one
    assert "to refuse it as this rank did" in one
    for rank, text in ((0, zero), (2, two)):
        assert text.startswith(f"rank {rank}, waiting for rank 1 in"), text
        assert "seen a refusal: #" in text
        assert "on rank 1: " in text


def refused_on_all_ranks(rank: int, size: int) -> None:
    """Different calls, refused for different reasons, at different times; what was under way goes on."""
    buffer = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=20)
    x, idx, _ = _inputs(rank)
    for repetition in range(3):
        rows, _, _, handle, event = buffer.dispatch(x, idx, num_experts=EXPERTS, async_with_compute_stream=True)
        with pytest.raises((TypeError, ValueError)):
            buffer.dispatch(x.double() if rank else x[0])
        time.sleep(0.3 * (rank == repetition))
        with pytest.raises(TypeError):
            buffer.combine(rows, "handle") if rank else buffer.dispatch("x")
        event.current_stream_wait()
        combined, _, _ = buffer.combine(rows, handle)
        torch.testing.assert_close(combined, x * (idx // (EXPERTS // size)).sort(1).values.diff(dim=1).ne(0).add(1))
        assert not buffer._backend.transport._refusals
    buffer.destroy()


def test_calls_that_all_ranks_refused_are_forgotten(pool: Callable[[int], Pool]) -> None:
    pool(3).run(refused_on_all_ranks)
