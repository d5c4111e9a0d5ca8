"""What is sent between nodes in the order of a stream: all of it, before the words that say so, and no sooner."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from epv2_plugin import CommunicationError
from epv2_plugin.elastic.backends.device import node_of
from epv2_plugin.elastic.backends.sender import Sender
from epv2_plugin.elastic.backends.watch import Watch
from tests.emulator.runtime import EmulatedRuntime
from tests.harness import Pool

AREA = 1 << 19  # bytes of a window for what one rank sends
PUTS = (1, 3, 4, 8, 4096, 5001, 20_000)
WORDS = 70  # more than two launches take
ROUNDS = 3


def _area(size: int, rank: int) -> int:
    return size * 8 * WORDS + rank * AREA


def exchange(rank: int, size: int, num_puts: int, careless: bool, seed: int) -> int:
    """Bytes that were wrong when their words had been raised. `careless`: sources are written again at once."""
    runtime = EmulatedRuntime(dist.group.WORLD, seed=seed, lsa_size=size // 2)
    watch = Watch(runtime, 20)
    sender = Sender(runtime, watch)
    window = runtime.window(_area(size, size + 1), ordered=True)
    sender.enroll("test", window)
    stream, far = runtime.new_stream(), [peer for peer in range(size) if peer not in node_of(runtime)]
    sizes = [PUTS[n % len(PUTS)] for n in range(num_puts)]
    places = [sum(sizes[:n]) for n in range(num_puts)]
    own, wrong = _area(size, size), 0

    def content(source: int, turn: int) -> torch.Tensor:
        gen = torch.Generator().manual_seed(1000 * seed + 10 * turn + source)
        return torch.randint(0, 256, (sum(sizes),), generator=gen, dtype=torch.uint8)

    def at(source: int, number: int) -> int:
        return 8 * (source * WORDS + number)

    for turn in range(1, ROUNDS + 1):
        window.tensor[own : own + sum(sizes)] = content(rank, turn)
        puts = [
            (peer, _area(size, rank) + place, own + place, count)
            for peer in far
            for place, count in zip(places, sizes, strict=True)
        ]
        words = [(peer, at(rank, number), 1) for peer in far for number in range(WORDS - 1)]
        sender.send("test", puts, words, stream)
        if careless:
            runtime.stream_ops([("write32", window.peer_pointer(rank, own), 0)], stream)
        for peer in far:  # the last of its words
            runtime.stream_ops([("wait32_geq", window.peer_pointer(rank, at(peer, WORDS - 2)), turn)])
            got = window.tensor[_area(size, peer) :][: sum(sizes)]
            wrong += int((got != content(peer, turn)).sum())
        # Only who has read tells the others that they may write.
        sender.send("test", [], [(peer, at(rank, WORDS - 1), 1) for peer in far], stream)
        for peer in far:
            runtime.stream_ops([("wait32_geq", window.peer_pointer(rank, at(peer, WORDS - 1)), turn)])
    sender.meet("the end of the test")
    watch.close()
    runtime.close()
    return wrong


@pytest.mark.parametrize(("size", "num_puts"), [(2, 0), (2, 1), (2, 32), (2, 75), (4, 7)])
def test_all_of_it_is_there_when_its_word_is(pool: Callable[[int], Pool], size: int, num_puts: int) -> None:
    for seed in range(4):
        assert pool(size).run(exchange, num_puts, False, seed) == [0] * size


def test_the_emulator_sees_a_source_that_is_written_too_soon(pool: Callable[[int], Pool]) -> None:
    assert sum(sum(pool(2).run(exchange, 7, True, seed)) for seed in range(8)) > 0


def meets(rank: int, size: int, kind: str) -> str:
    """Whether all has landed after a meeting, though nobody has waited; then `kind` goes wrong."""
    runtime = EmulatedRuntime(dist.group.WORLD, lsa_size=1, limit_seconds=4)
    watch = Watch(runtime, 4)
    sender = Sender(runtime, watch)
    window = runtime.window(1 << 16, ordered=True)
    stream = runtime.new_stream()
    for turn in range(1, 4):
        if turn == 3:
            window.tensor.zero_()
            dist.barrier()
        sender.enroll("test", window)
        window.tensor[1024:2048] = 10 * turn + rank
        sender.send("test", [(1 - rank, 4096, 1024, 1024)] * 9, [(1 - rank, 8 * turn, 3)] * 5, stream)
        sender.meet(f"meeting {turn}")
        assert window.tensor[4096 : 4096 + 1024].tolist() == [10 * turn + 1 - rank] * 1024
        dist.barrier()
    if kind == "absent":
        if rank == 1:
            time.sleep(6)
            return ""
    else:
        sender._raised["test"][1 - rank, 24] += 1  # told, and not sent
    try:
        sender.meet("meeting 4")
    except CommunicationError as error:
        return str(error)
    return "met"


@pytest.mark.parametrize("kind", ["absent", "lost"])
def test_a_meeting_ends_when_all_has_landed_or_says_who_is_missing(pool: Callable[[int], Pool], kind: str) -> None:
    said = pool(2).run(meets, kind)[0]
    assert "rank 0, waiting for rank 1 in meeting 4: expected " in said
    assert ("seen nothing within 4 s" if kind == "lost" else "seen nothing of that rank") in said
