"""All-gather and reduce-scatter in sessions: values, several in flight, gradients, limits, ranks that disagree."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin import BufferSizeError, CommunicationError, ElasticBuffer
from epv2_plugin.elastic import autograd, sizing
from tests import harness
from tests.buffers import KINDS, SMS, hold_up, make_buffer, settle
from tests.harness import Pool

NODES = "emulated/2"  # across nodes: 2 x 2 of four ranks, of 1 each else
EVERY = (*KINDS, NODES)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8)


def _values(rank: int, call: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1000 * call + rank)
    values = torch.randn(shape, generator=gen, dtype=torch.float64) * 5
    return values.to(torch.int64).to(dtype) if not dtype.is_floating_point else values.to(dtype)


def gathers(rank: int, size: int, kind: str, calls: list[tuple], order: list[int]) -> None:
    """Every call gathers its shapes; the waits come in another order."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=20)
    need = sum(
        ElasticBuffer.get_agrs_num_max_session_bytes(dist.group.WORLD, shapes, DTYPES[dtype])
        for shapes, dtype, _ in calls
    )
    buffer.agrs_set_config(max(need, 1), len(calls))
    for _ in range(2):
        results = []
        with buffer.agrs_new_session():
            for number, (shapes, dtype, in_place) in enumerate(calls):
                own = [_values(rank, number, shape, DTYPES[dtype]).to(buffer.device) for shape in shapes]
                if in_place:
                    slots = buffer.agrs_get_inplace_tensor(shapes, DTYPES[dtype])
                    for slot, value in zip(slots, own, strict=True):
                        slot.copy_(value)
                    own = list(slots)
                *out, wait = buffer.all_gather(own if len(own) > 1 else own[0])
                if in_place and own[0].numel():
                    assert out[0][rank].data_ptr() == own[0].data_ptr()
                results.append((out, wait))
            for number in order:
                results[number][1]()
        for number, (shapes, dtype, _) in enumerate(calls):
            for shape, out in zip(shapes, results[number][0], strict=True):
                want = torch.stack([_values(p, number, shape, DTYPES[dtype]) for p in range(size)])
                assert torch.equal(out.cpu(), want)
    buffer.destroy()


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, list[tuple], list[int]]:
    shape = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    call = st.tuples(st.lists(shape, min_size=1, max_size=3), st.integers(0, len(DTYPES) - 1), st.booleans())
    calls = draw(st.lists(call, min_size=1, max_size=5))
    order = draw(st.permutations(range(len(calls))))
    return draw(st.integers(1, 3)), calls, order[: draw(st.integers(0, len(calls)))]


@pytest.mark.parametrize("kind", KINDS)
@given(plan=plans())
@settings(max_examples=8)
def test_gathered_tensors(pool: Callable[[int], Pool], kind: str, plan: tuple[int, list[tuple], list[int]]) -> None:
    size, calls, order = plan
    pool(size).run(gathers, kind, calls, order)


@given(plan=plans())
@settings(max_examples=6)
def test_gathered_tensors_across_nodes(pool: Callable[[int], Pool], plan: tuple[int, list[tuple], list[int]]) -> None:
    _, calls, order = plan
    pool(4).run(gathers, NODES, calls, order)


def scatters(rank: int, size: int, kind: str) -> list[torch.Tensor]:
    """Sums of bf16 that depend on order and on precision; two in flight and an all-gather beside them."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=20)
    buffer.agrs_set_config(1 << 20, 8)
    found = []
    with buffer.agrs_new_session():
        waits = []
        for number, dtype in enumerate((torch.bfloat16, torch.float32, torch.float64)):
            mine = torch.stack([_values(rank, 10 * number + p, (7, 3), dtype) for p in range(size)]).to(buffer.device)
            reduced, wait = buffer.reduce_scatter(mine)
            gathered, wait_gathered = buffer.all_gather(mine)
            waits += [wait_gathered, wait]
            found.append((dtype, number, reduced, gathered))
        for wait in reversed(waits):
            wait()
    for dtype, number, reduced, gathered in found:
        total = torch.zeros(7, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for source in range(size):
            total += _values(source, 10 * number + rank, (7, 3), dtype)
            assert torch.equal(gathered[source, rank].cpu(), _values(source, 10 * number + rank, (7, 3), dtype))
        assert torch.equal(reduced.cpu(), total.to(dtype))
    return [reduced.cpu() for _, _, reduced, _ in found]


def given_targets(rank: int, size: int, kind: str) -> None:
    """Into tensors of the caller: a row of the target as the source, another source; scaled before it is rounded."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=20)
    buffer.agrs_set_config(1 << 16, 8)
    mine = _values(rank, 0, (7, 3), torch.bfloat16)
    first, second = torch.empty(size, 7, 3, dtype=torch.bfloat16), torch.empty(size, 7, 3, dtype=torch.bfloat16)
    first[rank] = mine
    parts, part = torch.stack([mine + p for p in range(size)]), torch.empty(7, 3, dtype=torch.bfloat16)
    with buffer.agrs_new_session():
        for source, target in ((first[rank], first), (mine, second)):
            gathered, wait = buffer.all_gather(source, out=target)
            assert gathered is target
            wait()
        (reduced, wait) = buffer.reduce_scatter(parts, out=part, scale=0.3)
        assert reduced is part
        wait()
        with pytest.raises(ValueError, match="out has 2 tensors: must be 1, one for each of t"):
            buffer.all_gather(mine, out=[first, second])
        with pytest.raises(ValueError, match=r"out has shape \[7, 3\]: must be \[2, 7, 3\]"):
            buffer.all_gather(mine, out=part)
        with pytest.raises(TypeError, match=r"out is torch\.float32"):
            buffer.reduce_scatter(parts, out=part.float())
    want = torch.stack([_values(p, 0, (7, 3), torch.bfloat16) for p in range(size)])
    assert torch.equal(first, want)
    assert torch.equal(second, want)
    assert torch.equal(part, (sum((each + rank).float() for each in want) * 0.3).to(torch.bfloat16))


@pytest.mark.parametrize("kind", EVERY)
def test_results_in_tensors_of_the_caller(pool: Callable[[int], Pool], kind: str) -> None:
    pool(2).run(given_targets, kind)


@pytest.mark.parametrize("kind", EVERY)
def test_sums_run_in_fp32_in_rank_order(pool: Callable[[int], Pool], kind: str) -> None:
    for first, second in zip(pool(3).run(scatters, kind), pool(3).run(scatters, kind), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def gradients(rank: int, size: int, kind: str) -> tuple[torch.Tensor, ...]:
    """A little network that gathers two tensors and scatters a third; its output and gradients."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=20)
    buffer.agrs_set_config(1 << 16, 4)
    x, y = (_values(rank, n, (2, 3), torch.float64).to(buffer.device).requires_grad_() for n in (0, 1))
    with buffer.agrs_new_session():
        (all_x, all_y), wait = autograd.all_gather(buffer, [x, y.t()])
        wait()
        mixed = (all_x.sin() * (rank + 1)) @ all_y.transpose(1, 2).reshape(size, 2, 3).transpose(1, 2)
        (part,), wait = autograd.reduce_scatter(buffer, [mixed])
        wait()
    part.cos().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    return part.detach().cpu(), x.grad.cpu(), y.grad.cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(pool: Callable[[int], Pool], kind: str) -> None:
    size = 3
    x, y = (torch.stack([_values(r, n, (2, 3), torch.float64) for r in range(size)]).requires_grad_() for n in (0, 1))
    all_y = y.transpose(1, 2)
    total = sum(
        (x.sin() * (rank + 1)) @ all_y.transpose(1, 2).reshape(size, 2, 3).transpose(1, 2) for rank in range(size)
    )
    total.cos().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    for rank, (part, dx, dy) in enumerate(pool(size).run(gradients, kind)):
        torch.testing.assert_close(part, total[rank].detach())
        torch.testing.assert_close(dx, x.grad[rank])
        torch.testing.assert_close(dy, y.grad[rank])


def bad_input(rank: int, size: int, kind: str) -> None:
    buffer = make_buffer(kind, num_bytes=2 << 20, num_cpu_timeout_secs=10)
    torch.set_default_device(buffer.device)
    t = torch.zeros(4)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (RuntimeError, "create_agrs_session before agrs_set_config", buffer.create_agrs_session),
        (ValueError, "max_session_bytes = 0: must be positive", lambda: buffer.agrs_set_config(0, 1)),
        (ValueError, "max_all_gathers_per_session = 0", lambda: buffer.agrs_set_config(64, 0)),
        (ValueError, "num_sms = -1: must be 0", lambda: buffer.agrs_set_config(64, 1, num_sms=-1)),
        (BufferSizeError, "the session needs 4194304", lambda: buffer.agrs_set_config(4 << 20, 1)),
        (RuntimeError, "all_gather outside an all-gather session", lambda: buffer.all_gather(t)),
        (RuntimeError, "destroy_agrs_session outside", buffer.destroy_agrs_session),
        (RuntimeError, "agrs_get_inplace_tensor outside", lambda: buffer.agrs_get_inplace_tensor((2,), t.dtype)),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()
    buffer.agrs_set_config(96, 2)
    with buffer.agrs_new_session(enabled=False):
        assert not buffer.agrs_in_session
    with buffer.agrs_new_session():
        cases = [
            (RuntimeError, "create_agrs_session inside", buffer.create_agrs_session),
            (RuntimeError, "agrs_set_config inside", lambda: buffer.agrs_set_config(96, 2)),
            (ValueError, "t is empty", lambda: buffer.all_gather([])),
            (TypeError, "t must be a tensor or tensors, got int", lambda: buffer.all_gather([3])),
            (ValueError, "must be dense", lambda: buffer.all_gather(torch.zeros(4, 2).t())),
            (ValueError, "t has shape \\[4\\]: must be \\[2 ranks", lambda: buffer.reduce_scatter(t)),
            (TypeError, "t is torch.int64", lambda: buffer.reduce_scatter(torch.zeros(2, 1, dtype=torch.int64))),
            (BufferSizeError, "128 bytes, agrs_set_config allowed 96", lambda: buffer.all_gather(torch.zeros(16))),
        ]
        for kind, match, call in cases:
            with pytest.raises(kind, match=match):
                call()
        buffer.all_gather(t)
        gathered, wait = buffer.all_gather(t + rank)
        with pytest.raises(BufferSizeError, match="had its 2 operations"):
            buffer.all_gather(t)
        wait()
        wait()
        assert torch.equal(gathered, torch.tensor([[0.0] * 4, [1.0] * 4]))
    torch.set_default_device(None)
    single = ElasticBuffer.get_agrs_num_max_session_bytes(dist.group.WORLD, (3, 5), torch.bfloat16)
    assert single == 64
    assert ElasticBuffer.get_agrs_num_max_session_bytes(dist.group.WORLD, [(3, 5), (1,)], torch.bfloat16) == 96
    assert ElasticBuffer.get_agrs_buffer_size_hint(dist.group.WORLD, single) == 2 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused_before_anything_is_sent(pool: Callable[[int], Pool], kind: str) -> None:
    pool(2).run(bad_input, kind)


def disagree(rank: int, size: int, kind: str, what: str) -> str:
    buffer = make_buffer(kind, num_cpu_timeout_secs=3)
    buffer.agrs_set_config(1 << 16, 4)
    tensors = {
        "shape": [torch.zeros(4 + rank)],
        "dtype": [torch.zeros(4, dtype=(torch.float32, torch.int32)[rank])],
        "number": [torch.zeros(4)] * (1 + rank),
        "operation": [torch.zeros(size, 4)],
    }[what]
    operation = buffer.reduce_scatter if what == "operation" and rank else buffer.all_gather

    def session() -> None:
        with buffer.agrs_new_session():
            operation([tensor.to(buffer.device) for tensor in tensors])

    with pytest.raises(CommunicationError) as error:
        settle(buffer, session)
    assert not buffer.agrs_in_session
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *((what, kind) for what in ("shape", "dtype", "number", "operation") for kind in KINDS),
        ("shape", NODES),
    ],
)
def test_ranks_that_disagree(pool: Callable[[int], Pool], what: str, kind: str) -> None:
    messages = pool(2).run(disagree, kind, what, timeout=30)
    assert all(f"rank {rank}, waiting for rank {1 - rank} in" in m for rank, m in enumerate(messages)), messages
    if what != "operation":
        assert any("expected [4] float32 as on this rank, seen" in m for m in messages), messages


# ---- the cuda backend's own ------------------------------------------------------------------------------------------

# From one piece for many groups of warps to many pieces for each group, the last of which is narrower.
PARTS = ((1,), (2, 4), (3, 5), (8,), (4096,), (3, 2731), (40000,))


def sums(rank: int, size: int, kind: str, num_sms: int) -> None:
    """Sums of every dtype and many sizes, scaled or not, parts of multiples of 16 bytes and others: within the SMs."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=60)
    buffer.agrs_set_config(8 << 20, 1, num_sms=num_sms)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for number, shape in enumerate(PARTS):
            every = torch.stack([_values(r, number, (size, *shape), dtype) for r in range(size)])
            every[:, :, 0] = -0.0  # stays what it is
            scale = 0.3 if number % 2 else 1.0
            with buffer.agrs_new_session():
                reduced, wait = buffer.reduce_scatter(every[rank].to(buffer.device), scale=scale)
                wait()
            total = every[0, rank].to(torch.float64 if dtype == torch.float64 else torch.float32)
            for source in range(1, size):
                total = total + every[source, rank]
            got, want = (t.to(dtype).cpu().view(-1).view(torch.uint8) for t in (reduced, total * scale))
            assert torch.equal(got, want), (dtype, shape)
    if kind != "cuda":
        kernels = [launch for launch in buffer.runtime.launches if launch.kernel == "epv2_reduce_scatter"]
        assert len(kernels) == 4 * len(PARTS)
        assert max(launch.ctas for launch in kernels) == min(num_sms or 8, SMS)


@pytest.mark.parametrize(
    ("kind", "size", "num_sms"),
    [
        ("emulated", 1, 2),
        ("emulated", 3, 2),
        ("emulated", 4, 0),
        (NODES, 4, 0),
    ],
)
def test_sums_have_the_bits_of_sums_in_rank_order(
    pool: Callable[[int], Pool], kind: str, size: int, num_sms: int
) -> None:
    pool(size).run(sums, kind, num_sms, timeout=120)


@pytest.mark.parametrize("num_sms", [1, 4, 16])
def test_sums_fill_shared_memory_and_share_the_work_evenly(num_sms: int) -> None:
    sizes = (2, 16, 100, 4096, 80000, 1 << 20, 67108864, 999999984)
    for num_ranks, part_bytes in itertools.product((1, 8, 2048), sizes):
        ctas, shape = sizing.reduce_shape(num_ranks, part_bytes, num_sms)
        groups, ring = ctas * shape.groups, shape.stages * shape.piece_bytes
        assert 1 <= ctas <= num_sms
        assert shape.threads <= 768
        assert shape.threads % (32 * shape.groups) == 0
        assert shape.piece_bytes % 16 == 0
        assert shape.groups * (ring + 24 * shape.stages) + 8 * num_ranks < shape.shared_bytes <= sizing.SHARED_BYTES
        pieces = -(-part_bytes // shape.piece_bytes)
        if part_bytes >= 1 << 20:
            assert shape.groups * ring > 180 << 10  # 2 us of what an SM takes in, and more
            assert -(-pieces // groups) * groups * shape.piece_bytes < 1.05 * part_bytes
        if part_bytes < 4096:
            assert ctas == 1


def begins_late(rank: int, size: int, kind: str) -> None:
    """A rank still reads the last session's tensors while the others are in the next one already."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=20)
    buffer.agrs_set_config(1 << 12, 2)
    for turn in range(6):
        with buffer.agrs_new_session():
            mine = torch.full((16,), 10.0 * turn + rank, device=buffer.device)
            gathered, wait = buffer.all_gather(mine)
            reduced, wait_reduced = buffer.reduce_scatter(torch.stack([mine] * size))
            wait()
            wait_reduced()
        if turn % size == rank:
            time.sleep(0.3)
        assert gathered[:, 5].tolist() == [10.0 * turn + r for r in range(size)]
        assert reduced[3].item() == sum(10.0 * turn + r for r in range(size))


@pytest.mark.parametrize("kind", ["emulated", NODES])
def test_a_session_waits_for_everybody_to_be_done_with_the_last(pool: Callable[[int], Pool], kind: str) -> None:
    pool(3).run(begins_late, kind)


def slots_changed_after_their_wait(rank: int, size: int, kind: str) -> None:
    """What lies in the window belongs to its rank again after the wait, and in a new session before any."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=20)
    buffer.agrs_set_config(1 << 16, 1)
    for turn in range(8):
        with buffer.agrs_new_session():
            (slot,) = buffer.agrs_get_inplace_tensor([(2048,)], torch.float32)
            slot.fill_(10.0 * turn + rank)
            gathered, wait = buffer.all_gather(slot)
            wait()
            want = [10.0 * turn + r for r in range(size)]
            assert gathered.amin(1).tolist() == want
            assert gathered.amax(1).tolist() == want
            if turn % 2:
                slot.fill_(-1.0)
    buffer.destroy()


@pytest.mark.parametrize("kind", ["emulated", NODES])
def test_slots_changed_after_their_wait(pool: Callable[[int], Pool], kind: str) -> None:
    pool(3).run(slots_changed_after_their_wait, kind)


def many(rank: int, size: int, kind: str) -> None:
    """More tensors in a call than a network takes at a time; sessions that do nothing, one right after the other."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=10)
    buffer.agrs_set_config(1 << 16, 2)
    for turn in range(4):
        for _ in range(15):
            with buffer.agrs_new_session():
                pass
        tensors = [torch.full((4,), 100.0 * rank + number + turn, device=buffer.device) for number in range(40)]
        with buffer.agrs_new_session():
            *gathered, wait = buffer.all_gather(tensors)
            *reduced, wait_reduced = buffer.reduce_scatter([torch.stack([t] * size) for t in tensors])
            wait()
            wait_reduced()
        for number, (every, total) in enumerate(zip(gathered, reduced, strict=True)):
            want = [100.0 * peer + number + turn for peer in range(size)]
            assert every[:, 3].tolist() == want
            assert total.tolist() == [sum(want)] * 4


def test_many_tensors_and_sessions_without_any(pool: Callable[[int], Pool]) -> None:
    pool(2).run(many, NODES)


def keeps(rank: int, size: int, kind: str) -> None:
    """Gathered tensors that are to outlive their session do."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=20)
    buffer.agrs_set_config(1 << 12, 2)
    kept = []
    for turn in range(3):
        with buffer.agrs_new_session():
            gathered, wait = buffer.all_gather(torch.full((4,), 1.0 + turn, device=buffer.device), keep=True)
            wait()
        kept.append(gathered)
    assert [t[size - 1, 2].item() for t in kept] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tensors_outlive_the_session(pool: Callable[[int], Pool], kind: str) -> None:
    pool(2).run(keeps, kind)


def absent(rank: int, size: int, kind: str, what: str) -> tuple[str, bool]:
    """Rank 1 is killed, or never begins the session that the others are in. What they say, and if it is no data."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=3)
    buffer.agrs_set_config(1 << 12, 2)
    with buffer.agrs_new_session():
        _, wait = buffer.all_gather(torch.zeros(4, device=buffer.device))
        wait()
    buffer.barrier()
    if rank == 1 and what == "killed":
        settle(buffer, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if rank == 1:
        time.sleep(8)
        return "", True
    begin, results = time.monotonic(), []

    def session() -> None:
        with buffer.agrs_new_session():
            gathered, _ = buffer.all_gather(torch.zeros(4, device=buffer.device))
            reduced, _ = buffer.reduce_scatter(torch.zeros(size, 4, device=buffer.device))
            results.extend([gathered, reduced])

    with pytest.raises(CommunicationError) as error:
        settle(buffer, session)
    assert time.monotonic() - begin < 15
    gathered_is_none = bool(results[0][1].isnan().all())
    buffer.destroy()  # after that nothing is under way
    return str(error.value), gathered_is_none and bool(results[1].isnan().all())


@pytest.mark.parametrize(("kind", "what"), [("emulated", "killed"), ("emulated", "late"), (NODES, "killed")])
def test_a_rank_that_does_not_come_is_named(kind: str, what: str) -> None:
    results = harness.outcomes(3, absent, kind, what, timeout=60)
    for rank in (0, 2):
        assert results[rank].error == "", results[rank].error
        message, no_data = results[rank].value
        assert f"rank {rank}, waiting for rank 1 in all_gather #0 of session #2" in message
        assert "nothing within 3 s" in message
        assert no_data


def configured_again(rank: int, size: int, kind: str) -> None:
    """Sessions of several configurations in one window, then other things that end all that was sent."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=8)
    for most in (8, 8, 4):
        buffer.agrs_set_config(1 << 16, most)
        for number in range(3):
            with buffer.agrs_new_session():
                gathered, wait = buffer.all_gather(torch.full((5,), float(10 * number + rank), device=buffer.device))
                wait()
                assert gathered[:, 0].tolist() == [float(10 * number + peer) for peer in range(size)]
    buffer.pp_set_config(1 << 10, 2)
    buffer.destroy()


@pytest.mark.parametrize("kind", EVERY)
def test_sessions_are_configured_again(pool: Callable[[int], Pool], kind: str) -> None:
    pool(2).run(configured_again, kind)


def given_up(rank: int, size: int, kind: str) -> None:
    """Ranks give a session up after different operations; the next ones are as ever."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=8)
    buffer.agrs_set_config(1 << 16, 4)
    for turn in range(4):
        with contextlib.suppress(ZeroDivisionError), buffer.agrs_new_session():
            for _ in range(2 * rank):
                buffer.all_gather(torch.full((5,), -1.0, device=buffer.device))
            raise ZeroDivisionError
        with buffer.agrs_new_session():
            mine = torch.full((5,), float(10 * turn + rank), device=buffer.device)
            gathered, wait = buffer.all_gather(mine)
            reduced, wait_reduced = buffer.reduce_scatter(torch.stack([mine] * size))
            wait()
            wait_reduced()
            assert gathered[:, 0].tolist() == [float(10 * turn + peer) for peer in range(size)]
            assert reduced.tolist() == [float(sum(10 * turn + peer for peer in range(size)))] * 5
    settle(buffer)


@pytest.mark.parametrize("kind", ["emulated", NODES])
def test_after_a_session_that_was_given_up(pool: Callable[[int], Pool], kind: str) -> None:
    pool(2).run(given_up, kind)


def sum_of_nobody(rank: int, size: int, kind: str) -> tuple[str, int]:
    """Rank 1 sums what rank 0 never brings, while the device is held up for all but words; numbers that it has then."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=3)
    buffer.agrs_set_config(1 << 20, 4)
    over = hold_up(buffer)
    with contextlib.suppress(CommunicationError), buffer.agrs_new_session():
        if rank == 0:
            time.sleep(7)
            return "", 0
        reduced, wait = buffer.reduce_scatter(torch.ones(size, 4096))
        wait()
    over.set()
    said = ""
    try:
        buffer._backend._watch.check()
    except CommunicationError as error:
        said = str(error)
    return said, int(reduced.isfinite().sum())


@pytest.mark.parametrize("kind", ["emulated", NODES])
def test_a_sum_that_failed_does_not_look_like_one(kind: str) -> None:
    _, (said, finite) = harness.run(2, sum_of_nobody, kind, timeout=60)
    assert "rank 1, waiting for rank 0 in reduce_scatter #0 of session #1" in said
    assert finite < 4096


def begins_alone(rank: int, size: int, kind: str) -> str:
    """Rank 0 begins a session and configures another, while rank 1 is gone."""
    buffer = make_buffer(kind, num_cpu_timeout_secs=2)
    buffer.agrs_set_config(1 << 16, 4)
    if rank == 1:
        time.sleep(8)
        return ""
    with buffer.agrs_new_session():
        pass
    try:
        buffer.agrs_set_config(1 << 16, 4)
    except CommunicationError as error:
        return str(error)
    return "no error"


def test_a_session_that_others_do_not_begin_ends() -> None:
    said, _ = harness.run(2, begins_alone, NODES, timeout=60)
    assert "rank 0, waiting for rank 1 in agrs_set_config" in said
