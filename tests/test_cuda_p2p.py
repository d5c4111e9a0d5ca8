"""Point-to-point and sessions of the cuda backend on a real device: the cases of the host and the emulator, profiles
without kernels, copies beside kernels that hold every SM, dead peers.

Ranks share the GPUs there are, so one is enough; then NCCL_MULTI_RANK_GPU_ENABLE=1 must be set.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings

from epv2_plugin.bench.timing import Launch, profile
from epv2_plugin.elastic.backends.device import CudaRuntime
from tests import harness, test_context_parallel
from tests import test_point_to_point as p2p
from tests import test_sessions as sessions
from tests.buffers import make_buffer, settle, take_device
from tests.harness import Pool

pytestmark = pytest.mark.gpu

# ---- what this rests on, one by one: if these fail, the rest does, too ---------------------------------------------


def words_and_copies(rank: int, size: int) -> None:
    """Words on own and mapped memory and at a peer, waits EQ and GEQ, copies between ranks with words as data, several
    streams."""
    take_device()
    runtime = CudaRuntime(dist.group.WORLD, 60)
    window, mapped = runtime.window(1 << 20), runtime.mapped(64)
    own, peer, source = (window.peer_pointer((rank + step) % size, 0) for step in (0, 1, -1))
    assert own == window.tensor.data_ptr() == window.part(0, 64).data_ptr()
    first, second = runtime.new_stream(), runtime.new_stream()
    with runtime.on_stream(first):
        runtime.stream_ops([("wait32_eq", own, 0xFFFFFF01), ("write32", mapped.pointer, 1)])
        runtime.stream_ops([("wait32_geq", own + 4, 5), ("write64", own + 64, 1 << 40), ("write32", mapped.pointer, 2)])
    time.sleep(0.2)
    words = mapped.tensor.view(torch.int32)
    assert int(words[0]) == 0  # nothing has come, and nothing holds the other streams
    dist.barrier()
    with runtime.on_stream(second):
        runtime.stream_ops([("write32", own + 128, 0xFFFFFF01), ("write32", own + 132, 7)])
        runtime.copy(peer, own + 128, 4)
        runtime.copy(peer + 4, own + 132, 4)
        runtime.fill(peer + 256, 0xFF, 64)
        runtime.stream_ops([("write32", mapped.pointer + 4, 1)])
    deadline = time.monotonic() + 20
    while int(words[0]) != 2 or int(words[1]) != 1:
        assert time.monotonic() < deadline, words.tolist()
        time.sleep(1e-3)
    dist.barrier()
    torch.cuda.synchronize()
    assert window.tensor[64:72].view(torch.int64).item() == 1 << 40
    assert bool((window.tensor[256:320] == 255).all())
    if runtime.writes_to_peers():
        large = 1 << 19  # bytes in the second half, behind which the words come
        for turn in range(1, 30):
            sent = torch.randint(256, (large,), dtype=torch.uint8, device="cuda", generator=_generator(rank, turn))
            got = torch.empty_like(sent)
            torch.cuda.synchronize()
            runtime.stream_ops(
                [
                    ("copy", peer + large, sent.data_ptr(), large),
                    ("write64", peer + 24, turn << 40),
                    ("write32", peer + 8, turn),
                ],
                second,
            )
            came = [("wait32_eq", own + 8, turn), ("copy", got.data_ptr(), own + large, large)]
            runtime.stream_ops([*came, ("write32", source + 16, turn)], first)
            runtime.stream_ops([("wait32_eq", own + 16, turn), ("write32", mapped.pointer, 2 + turn)], second)
            deadline = time.monotonic() + 20
            while int(words[0]) != 2 + turn:
                assert time.monotonic() < deadline, words.tolist()
                time.sleep(1e-4)
            torch.cuda.synchronize()
            word = window.tensor[24:32].view(torch.int64).item()
            assert word == turn << 40, (turn, word)
            expected = torch.randint(
                256, (large,), dtype=torch.uint8, device="cuda", generator=_generator((rank - 1) % size, turn)
            )
            assert torch.equal(got, expected)
            dist.barrier()  # or the next turn's word may come before this one is read
    runtime.close()


def _generator(rank: int, turn: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(1000 * rank + turn)


@pytest.mark.parametrize("size", [2, 4])
def test_words_and_copies(size: int) -> None:
    harness.run(size, words_and_copies, timeout=90)


def many_streams(rank: int, size: int) -> None:
    """Waits on as many streams as links may have hold neither copies on others nor the compute stream."""
    take_device()
    runtime = CudaRuntime(dist.group.WORLD, 60)
    window = runtime.window(1 << 20)
    own = window.peer_pointer(rank, 0)
    x = torch.ones(256, 256, device="cuda")
    (x @ x).sum()  # loads its kernels, for which the device must be idle
    torch.cuda.synchronize()
    blocked = [runtime.new_stream() for _ in range(12)]
    for number, stream in enumerate(blocked):
        with runtime.on_stream(stream):
            runtime.stream_ops([("wait32_eq", own + 4 * number, 1)])
    done, deadline = torch.cuda.Event(), time.monotonic() + 20
    (x @ x).sum()
    done.record()
    while not done.query():
        assert time.monotonic() < deadline, "the compute stream is held by waits of others"
        time.sleep(1e-3)
    release = runtime.new_stream()
    for number in reversed(range(12)):
        with runtime.on_stream(release):
            runtime.stream_ops([("write32", own + 4 * number, 1)])
    while not all(stream.query() for stream in blocked):
        assert time.monotonic() < deadline, "the releasing stream is held by waits of others"
        time.sleep(1e-3)
    runtime.close()


def test_waits_hold_no_other_stream() -> None:
    harness.run(1, many_streams, timeout=90)


# ---- point-to-point --------------------------------------------------------------------------------------------------


def test_every_interleaving_arrives(pool: Callable[[int], Pool]) -> None:
    @settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
    @given(plan=p2p.plans())
    def draw(plan: tuple[int, int, list[p2p.Message]]) -> None:
        size, slots, messages = plan
        assert sum(pool(size).run(p2p.walk, "cuda", slots, messages, timeout=60)) == len(messages)

    draw()


@pytest.mark.parametrize(
    ("work", "size"),
    [
        (p2p.both_ways_at_once, 3),
        (p2p.bad_input, 2),
        (p2p.beside_collectives, 2),
        (p2p.receives_first, 3),
        (p2p.waited_for_elsewhere, 2),
        (p2p.streams, 2),
        (p2p.full_both_ways, 2),
        (p2p.stay, 3),
        (p2p.still_read, 2),
        (p2p.large_and_small, 2),
    ],
)
def test_cases_of_the_host(work: Callable[..., Any], size: int) -> None:
    harness.run(size, work, "cuda", timeout=90)


def test_a_full_ring_blocks_the_stream_until_one_is_taken() -> None:
    assert 0.7 < harness.run(2, p2p.blocks_until_taken, "cuda", timeout=90)[0] < 10


def test_a_copy_to_the_host_of_what_never_comes_ends() -> None:
    (said, spoiled, took), _ = harness.run(2, p2p.copied_to_the_host, "cuda", timeout=90)
    assert "rank 0, waiting for rank 1 in pp_recv from rank 1, tensor #1, slot 1 of 2" in said
    assert spoiled
    assert took < 14


@pytest.mark.parametrize("what", ["smaller", "same bytes", "in place"])
def test_wrong_shape_or_dtype_is_named_on_both_ranks(what: str) -> None:
    results = harness.outcomes(3, p2p.mismatch, "cuda", what, timeout=60)
    sender, receiver = (r.value or r.error for r in results[:2])
    assert "rank 1, waiting for rank 0 in pp_recv from rank 0, tensor #2, slot 0 of 2" in receiver
    assert "seen #2 [64, 8] float32" in receiver
    assert "rank 0, waiting for rank 1 in pp_send to rank 1, tensor #2, slot 0 of 2" in sender
    assert "a refusal: rank 1 expected #2 " in sender


def test_every_rank_is_told_and_has_no_data() -> None:
    results = harness.outcomes(3, p2p.told, "cuda", timeout=60)
    assert not any(r.error for r in results), results
    (sender, _), (receiver, receiver_nan), (third, third_nan) = (r.value for r in results)
    assert "expected #0 [8] float32, seen #0 [9] float32" in receiver
    assert "a refusal: rank 1 expected #0 [8] float32" in sender
    assert "that rank 1 gave up" in third
    assert receiver_nan
    assert third_nan


@pytest.mark.parametrize(
    ("who", "rank", "text"),
    [
        ("sender", 0, "expected rank 1 to take [3] float32 of pp_send to rank 1, tensor #0, slot 0 of 2, seen nothing"),
        ("receiver", 1, "in pp_recv from rank 0, tensor #0, slot 0 of 2: expected #0 [3] float32, seen nothing within"),
    ],
)
def test_what_never_comes_times_out(who: str, rank: int, text: str) -> None:
    results = harness.outcomes(2, p2p.not_taken, "cuda", who, timeout=60)
    assert results[rank].error == "", results[rank].error
    assert text in results[rank].value


def test_killed_peer() -> None:
    results = harness.outcomes(3, p2p.dies, "cuda", timeout=90)
    for rank, call in ((0, "pp_send to rank 2"), (1, "pp_recv from rank 2")):
        assert results[rank].error == "", results[rank].error
        assert f"rank {rank}, waiting for rank 2 in {call}, tensor #" in results[rank].value
        assert "seen nothing within 4 s" in results[rank].value


@pytest.mark.parametrize("dropped", [False, True])
def test_a_buffer_can_be_destroyed_at_any_time(dropped: bool) -> None:
    assert max(harness.run(2, p2p.destroyed, "cuda", dropped, timeout=90)) < 20


def test_destroying_a_buffer_waits_for_its_transfers() -> None:
    harness.run(2, p2p.late_receiver, "cuda", timeout=90)


# ---- sessions --------------------------------------------------------------------------------------------------------


def test_gathered_tensors(pool: Callable[[int], Pool]) -> None:
    @settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
    @given(plan=sessions.plans())
    def draw(plan: tuple[int, list[tuple], list[int]]) -> None:
        size, calls, order = plan
        pool(size).run(sessions.gathers, "cuda", calls, order, timeout=60)

    draw()


@pytest.mark.parametrize(
    ("work", "size", "arguments"),
    [
        (sessions.scatters, 3, ()),
        (sessions.gradients, 3, ()),
        (sessions.bad_input, 2, ()),
        (sessions.begins_late, 3, ()),
        (sessions.keeps, 2, ()),
        (sessions.sums, 4, (8,)),
        (sessions.sums, 3, (0,)),
    ],
)
def test_sessions_as_on_the_host(work: Callable[..., Any], size: int, arguments: tuple[Any, ...]) -> None:
    harness.run(size, work, "cuda", *arguments, timeout=90)


@pytest.mark.parametrize("what", ["shape", "operation"])
def test_ranks_that_disagree(what: str) -> None:
    results = harness.outcomes(2, sessions.disagree, "cuda", what, timeout=60)
    messages = [r.value or r.error for r in results]
    assert all(f"rank {rank}, waiting for rank {1 - rank} in" in m for rank, m in enumerate(messages)), messages


def test_a_rank_that_is_killed_is_named() -> None:
    results = harness.outcomes(3, sessions.absent, "cuda", "killed", timeout=90)
    for rank in (0, 2):
        assert results[rank].error == "", results[rank].error
        message, no_data = results[rank].value
        assert f"rank {rank}, waiting for rank 1 in all_gather #0 of session #2" in message
        assert no_data


# ---- no kernel -------------------------------------------------------------------------------------------------------


def profiled(rank: int, size: int) -> dict[str, list[Launch]]:
    """The kernels of transfers, of a gather and of a reduce-scatter."""
    buffer = make_buffer("cuda", num_cpu_timeout_secs=60, num_bytes=128 << 20)
    buffer.pp_set_config(8 << 20, 2, max_inplace=1)
    buffer.agrs_set_config(64 << 20, 4, num_sms=4)
    t, into = (torch.ones(2 << 20, device=buffer.device) for _ in range(2))
    many = torch.ones(size, 1 << 20, device=buffer.device)

    def transfer() -> None:
        _, event = buffer.pp_recv_inplace(t.shape, t.dtype, (rank - 1) % size)
        buffer.pp_send(t, (rank + 1) % size)
        buffer.pp_send(t, (rank + 1) % size, async_with_compute_stream=True)
        event.current_stream_wait()
        buffer.pp_recv(into, (rank - 1) % size)
        buffer.pp_flush()

    def gather() -> None:
        with buffer.agrs_new_session():
            _, wait = buffer.all_gather(t)
            wait()

    def scatter() -> None:
        with buffer.agrs_new_session():
            _, wait = buffer.reduce_scatter(many)
            wait()

    def align() -> None:
        torch.cuda.synchronize()
        dist.barrier()

    found = {}
    for work in (transfer, gather, scatter):
        work()
        found[work.__name__] = profile(align, work, buffer.device)
        settle(buffer)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_transfers_and_gathers_launch_no_kernel(size: int) -> None:
    for found in harness.run(size, profiled, timeout=120):
        assert found["transfer"] == []
        assert found["gather"] == []
        assert [launch.name for launch in found["scatter"]] == ["epv2_reduce_scatter"]
        assert found["scatter"][0].ctas <= 4


def test_context_parallel_attention() -> None:
    cases = harness.run(2, attention_cases, timeout=200)
    for found in cases:
        for name, differences in found.items():
            assert max(differences) < 3e-2, (name, differences)


def attention_cases(rank: int, size: int) -> dict[str, list[float]]:
    """Attention on the device in bf16 against dense attention in fp64 on the host; several parts."""
    device = take_device()
    from epv2_plugin.megatron import context_parallel

    context_parallel.ROWS_PER_PART = 3
    test_context_parallel._start(size, {"backend": "cuda", "timeouts": {"host_seconds": 60}})
    found = {}
    for name in ("causal", "GQA", "MLA", "no mask", "packed, causal, GQA", "padding mask, GQA", "dropout"):
        case = test_context_parallel.CASES[name]
        found[name] = test_context_parallel._compare(rank, size, replace(case, dtype=torch.bfloat16), device)
    return found
