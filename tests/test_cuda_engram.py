"""Engram of the cuda backend: the host's cases, bit by bit, on the emulator, and with mark gpu on a device."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from epv2_plugin import BufferSizeError, CommunicationError, CommunicationTimeout
from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.errors import UnavailableError
from tests import harness, test_engram
from tests.buffers import SMS, emulated_buffer, settle
from tests.harness import Pool
from tests.test_engram import Case

KINDS = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
PINNED_ON_GPUS = [*KINDS, pytest.param("cuda pinned", marks=pytest.mark.gpu)]
KINDS_OF_MEMORY = [*PINNED_ON_GPUS, "emulated pinned"]

# Beyond one tile of a CTA, one turn of a warp's digits, one pass of the sort; all entries one row; rows of any bytes.
LARGE_CASES = {
    "many rows": Case(2, 1500, 8, "fp32", 1, ((700, 2500),), 2, 1.0, 0.1, False, False, False, False, 1),
    "one row": Case(3, 40, 4, "bf16", 1, ((900, 3, 600),), 3, 0.001, 0.0, True, False, False, False, 2),
    "wide rows": Case(2, 30, 1001, "fp16", 1, ((40, 20),), 1, 0.5, 0.2, False, False, False, False, 3),
    "scales": Case(2, 300, 128, "fp8", 3, ((200, 90),), 2, 0.3, 0.2, False, True, False, False, 4),
}
CLUSTERS = {"2x1": (2, "emulated/1"), "2x2": (4, "emulated/2")}  # nodes x ranks of each


def exchange(rank: int, size: int, case: Case, kind: str) -> dict[str, Any]:
    """`test_engram.exchange` within a budget of SMs, which no launch exceeds."""
    buffer = test_engram.shared_buffer(kind)
    budget = SMS - case.seed % SMS
    emulated = kind.startswith("emulated")
    if emulated:
        buffer.runtime.launches.clear()
    result = test_engram.exchange(rank, size, case, kind, num_sms=budget)
    if emulated:
        launches = [launch for launch in buffer.runtime.launches if "engram" in launch.kernel]
        assert len(launches) == len(buffer.runtime.launches) >= 8
        assert all(launch.ctas == budget for launch in launches)
    return result


@pytest.mark.parametrize("kind", PINNED_ON_GPUS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_table(pool: Callable[[int], Pool], ranks: int, kind: str) -> None:
    @settings(max_examples=4, phases=[Phase.generate])
    @given(st.composite(test_engram.cases)(ranks))
    def compare(case: Case) -> None:
        test_engram.check(case, pool(ranks).run(exchange, case, kind, timeout=120), kind)

    compare()


@pytest.mark.parametrize("kind", PINNED_ON_GPUS)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_large_table(pool: Callable[[int], Pool], name: str, kind: str) -> None:
    case = LARGE_CASES[name]
    test_engram.check(case, pool(case.ranks).run(exchange, case, kind, timeout=120), kind)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_any_table_between_nodes(pool: Callable[[int], Pool], cluster: str) -> None:
    ranks, kind = CLUSTERS[cluster]

    @settings(max_examples=4, phases=[Phase.generate])
    @given(st.composite(test_engram.cases)(ranks))
    def compare(case: Case) -> None:
        test_engram.check(case, pool(ranks).run(exchange, case, kind, timeout=120), kind)

    compare()


@pytest.mark.parametrize("name", ["wide rows", "scales"])
def test_large_table_between_nodes(pool: Callable[[int], Pool], name: str) -> None:
    """More entries than a block has threads, or rows that land at once: in tiles."""
    case, (ranks, kind) = LARGE_CASES[name], CLUSTERS["2x1"]
    test_engram.check(case, pool(ranks).run(in_small_tiles, case, kind, timeout=120), kind)


def in_small_tiles(rank: int, size: int, case: Case, kind: str) -> dict[str, Any]:
    kept = sizing._LANDING_BYTES, sizing._LEAST_LANDING_ROWS
    sizing._LANDING_BYTES, sizing._LEAST_LANDING_ROWS = 0, 64
    try:
        return exchange(rank, size, case, kind)
    finally:
        sizing._LANDING_BYTES, sizing._LEAST_LANDING_ROWS = kept


def crossing(rank: int, size: int) -> None:
    """A distinct row crosses the network once, whatever asks for it; rows of this node don't."""
    buffer = emulated_buffer(per_node=2)
    table = torch.arange(5.0 * size).view(-1, 1).expand(-1, 8)
    buffer.engram_write(table[5 * rank :][:5])
    index = torch.arange(5 * size).repeat(4)
    buffer.engram_fetch(index)()
    traffic = buffer.traffic
    assert (traffic.network_bytes, traffic.direct_network_bytes) == (5 * 2 * 32, 5 * 2 * 32)
    assert traffic.sent_bytes == 5 * (size - 1) * 32
    buffer.engram_reduce(index, torch.ones(len(index), 8))()
    assert traffic.network_bytes == 5 * 2 * (32 + 8 + 32)


def test_rows_cross_the_network_once(pool: Callable[[int], Pool]) -> None:
    pool(4).run(crossing)


def repeated(rank: int, size: int, seeds: range, per_node: int) -> None:
    """The same operations under many schedules of the kernels' threads; tables are overwritten."""
    buffer = emulated_buffer(per_node=per_node)
    gen = torch.Generator().manual_seed(rank)
    index = torch.randint(-1, 5 * size, (40,), generator=gen)
    few, grads = index.where(index % 3 == rank % 3, -1), torch.randn(40, 8, generator=gen)
    want: dict[int, Any] = {}
    for seed in seeds:
        buffer.runtime.reseed(seed)
        table = torch.arange(5 * size).view(-1, 1).expand(-1, 8) + 100.0 * seed
        buffer.engram_write(table[5 * rank :][:5], num_sms=1 + seed % SMS)
        first = buffer.engram_fetch(index)
        buffer.engram_update(torch.arange(5), -table[5 * rank :][:5])
        second = buffer.engram_fetch(index)
        rows = table.index_select(0, index.clamp(min=0)) * (index >= 0).unsqueeze(1)
        assert torch.equal(first()[0], rows)
        assert torch.equal(second()[0], -rows)
        # One right after the other, and other numbers than the last time, so that nothing old passes for the new.
        factor = (-2.0) ** (seed % 8)
        for turn, asked in enumerate((index, few, index)):
            rows, sums = buffer.engram_reduce(asked, factor * grads)()
            first_rows, first_sums = want.setdefault(turn % 2, (rows, sums))
            assert torch.equal(rows, first_rows)
            assert torch.equal(sums, factor * first_sums)


def test_no_schedule_changes_a_bit(pool: Callable[[int], Pool]) -> None:
    pool(3).run(repeated, range(12), 0, timeout=240)


def test_no_schedule_of_the_network_changes_a_bit(pool: Callable[[int], Pool]) -> None:
    pool(4).run(repeated, range(6), 2, timeout=240)


@pytest.mark.parametrize("kind", KINDS_OF_MEMORY)
def test_gradient_against_a_dense_table(pool: Callable[[int], Pool], kind: str) -> None:
    test_engram.check_gradients(pool(3).run(test_engram.gradients, "fp8", kind))


@pytest.mark.parametrize("kind", PINNED_ON_GPUS)
def test_training_has_the_bits_of_the_host(pool: Callable[[int], Pool], kind: str) -> None:
    host, device = (
        pool(2).run(test_engram.train, "adagrad", "fp32", (0, 4), "concat", None, backend, timeout=120)
        for backend in ("host", kind)
    )
    if kind.startswith("emulated"):  # a GPU's own sums in the model around it are others
        assert torch.equal(test_engram.table_of(device), test_engram.table_of(host))
    torch.testing.assert_close(test_engram.table_of(device), test_engram.table_of(host), rtol=1e-5, atol=1e-6)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "kind"),
    [*itertools.product(test_engram.DISAGREEMENTS, ["emulated"]), ("operation", "emulated/1")]
    + [pytest.param(what, "cuda", marks=pytest.mark.gpu) for what in test_engram.DISAGREEMENTS],
)
def test_ranks_that_disagree(what: str, kind: str) -> None:
    messages = harness.run(2, test_engram.disagree, what, kind, timeout=60)
    test_engram.check_disagreement(messages, what)
    if what == "operation":
        assert any(
            "engram_fetch after 1 writes and updates" in text and "engram_fetch after 2" in text for text in messages
        )


@pytest.mark.parametrize("kind", [*KINDS_OF_MEMORY, "emulated/1"])
def test_killed_peer(kind: str) -> None:
    test_engram.check_killed(harness.outcomes(3, test_engram.dies, kind, 3, timeout=60))


@pytest.mark.parametrize("kind", [*KINDS, "emulated/1"])
def test_absent_peer_times_out_on_every_rank(kind: str) -> None:
    results = harness.run(3, test_engram.never_calls, kind, timeout=60)
    assert all(kind for kind, _ in results)
    assert CommunicationTimeout.__name__ in {results[0][0], results[2][0]}
    assert any("waiting for rank 1 in engram_fetch: expected operation 2 within 2 s" in text for _, text in results)


def nothing_that_looks_like_rows(rank: int, size: int, kind: str, before: int) -> None:
    """Rank 1 stays away after so many fetches: what the others would have got is no number. The first fetch of a table
    waits before it reads, others afterwards."""
    buffer = test_engram.engram_buffer(kind, seconds=1)
    buffer.engram_write(torch.zeros(4, 3, device=buffer.device, dtype=torch.bfloat16))
    index = torch.arange(3, device=buffer.device).repeat(40)  # rows that one entry reads and others copy
    for _ in range(before):
        settle(buffer, buffer.engram_fetch(index))
    if rank == 1:
        time.sleep(3)
        return
    hook = buffer.engram_fetch(index)
    with pytest.raises(CommunicationTimeout):
        settle(buffer, hook)
    assert inspect.getclosurevars(hook).nonlocals["data"].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 1])
def test_rows_that_did_not_come_are_nan(kind: str, before: int) -> None:
    harness.run(2, nothing_that_looks_like_rows, kind, before, timeout=60)


def emptied(rank: int, size: int, kind: str) -> None:
    """Fetches of sizes up and down: the hash table of the next one is empty, and so is what the last one did not use of
    its own."""
    buffer = test_engram.engram_buffer(kind)
    buffer.engram_write(torch.full((200, 3), 1.0 + rank, device=buffer.device))
    engram = buffer._open().engram
    for count in (100, 3, 0, 60, 60, 200, 7, 100):
        index = torch.randperm(200 * size)[:count].to(buffer.device)
        assert engram._slots.eq(-1).all()
        data, _ = buffer.engram_fetch(index)()
        assert torch.equal(data[:, 0], 1.0 + index // 200)
        assert engram._slots.eq(-1).all()
        assert engram._stale[engram._num_stale :].eq(-1).all()
        assert int(engram._stale.ne(-1).sum()) == count


@pytest.mark.parametrize("kind", [*KINDS, "emulated/1"])
def test_a_fetch_finds_its_hash_table_empty(pool: Callable[[int], Pool], kind: str) -> None:
    pool(2).run(emptied, kind, timeout=60)


def wrong_row(rank: int, size: int, kind: str, call: str) -> str:
    """A row that only the kernel sees not to be there: a GPU's values are not looked at before."""
    buffer = test_engram.engram_buffer(kind, seconds=10)
    buffer._check_range = lambda *_: None
    at = buffer.device
    buffer.engram_write(torch.zeros(4, 8, device=at))
    index = torch.arange(6, device=at)
    if rank == 1 and call != "engram_update":
        index[5] = 4 * size if call == "engram_fetch" else -2
    try:
        if call == "engram_update":
            rows = torch.tensor([3, 2 if rank == 0 else 1 << 40], device=at)
            buffer.engram_update(rows, torch.ones(2, 8, device=at))
        if call == "engram_reduce":
            buffer.engram_reduce(index, torch.ones(6, 8, device=at))()
        settle(buffer, buffer.engram_fetch(index))
        settle(buffer, buffer.engram_fetch(index))
    except (CommunicationError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("kind", [*KINDS, "emulated/1"])
@pytest.mark.parametrize("call", ["engram_fetch", "engram_reduce", "engram_update"])
def test_row_that_is_not_there_is_named_by_the_rank_that_asked_for_it(
    pool: Callable[[int], Pool], call: str, kind: str
) -> None:
    first, second = pool(2).run(wrong_row, kind, call, timeout=60)
    assert "waiting for rank 1" in first
    assert "gave up" in first
    allowed = {
        "engram_fetch": "indices.flatten()[5] = 8: must be -1 (zeros) or a row of the table, 0..7",
        "engram_reduce": "indices.flatten()[5] = -2: must be -1 (zeros) or a row of the table, 0..7",
        "engram_update": f"rows[1] = {1 << 40}: must be a row of this rank, 0..3",
    }[call]
    phase = "engram_reduce, counts" if call == "engram_reduce" else call
    assert second == f"ValueError: rank 1, {phase}: {allowed}"


def refused_on_one_rank(rank: int, size: int, kind: str) -> str:
    """Rank 1's first fetch is refused, and it catches that: its second must not meet the others' first."""
    buffer = test_engram.engram_buffer(kind, seconds=5)
    at = buffer.device
    buffer.engram_write(torch.zeros(4, 8, device=at))
    index = torch.arange(4, device=at)
    try:
        for number in range(2):
            if rank == 1 and number == 0:
                with pytest.raises(TypeError):
                    buffer.engram_fetch(index.float())
            else:
                settle(buffer, buffer.engram_fetch(index))
        settle(buffer, buffer.engram_fetch(index))
    except CommunicationError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind", [*KINDS, "emulated/1"])
def test_a_call_that_only_one_rank_refused_is_an_error_everywhere(kind: str) -> None:
    said = harness.run(2, refused_on_one_rank, kind, timeout=60)
    assert all(text.startswith(f"rank {rank}, waiting for rank {1 - rank}") for rank, text in enumerate(said)), said
    assert any("1 refused" in text for text in said), said


def tables_in_turn(rank: int, size: int, kind: str) -> None:
    """Another table in the same buffer: what was fetched and lent before stays as it was."""
    buffer = test_engram.engram_buffer(kind)
    at = buffer.device
    with pytest.raises(RuntimeError, match="engram_fetch before engram_write"):
        buffer.engram_fetch(torch.arange(2, device=at))
    with pytest.raises(ValueError, match=r"num_sms = -1: must be 0 \(as few as do\) to the device's"):
        buffer.engram_write(torch.zeros(4, 8, device=at), num_sms=-1)
    buffer.engram_write(torch.full((4, 8), 1.0 + rank, device=at))
    lent, _ = buffer.engram_storage
    index = torch.arange(4 * size, device=at)
    before = buffer.engram_fetch(index)
    buffer.engram_write(torch.full((9, 3), 7.0 + rank, device=at, dtype=torch.bfloat16))
    after = buffer.engram_fetch(torch.tensor([8, 9], device=at))
    assert before()[0][:, 0].tolist() == [1.0 + row // 4 for row in range(4 * size)]
    assert after()[0].tolist() == [[7.0] * 3, [8.0 if size > 1 else 7.0] * 3]
    assert lent.tolist() == [[1.0 + rank] * 8] * 4
    rows, sums = buffer.engram_reduce(torch.tensor([8, 8], device=at), torch.ones(2, 3, device=at))()
    assert rows.tolist() == ([8] if rank == 0 else [])
    assert sums.tolist() == ([[2.0 * size] * 3] if rank == 0 else [])
    many = torch.arange(9 * size, device=at).repeat(3)
    rows, sums = buffer.engram_reduce(many, torch.ones(len(many), 3, device=at))()  # more than there was room for
    assert rows.tolist() == list(range(9))
    assert sums.unique().tolist() == [3.0 * size]
    settle(buffer)
    buffer.destroy()


@pytest.mark.parametrize("kind", [*KINDS_OF_MEMORY, "emulated/1"])
def test_tables_in_turn(pool: Callable[[int], Pool], kind: str) -> None:
    pool(2).run(tables_in_turn, kind, timeout=60)


def pinned_between_nodes(rank: int, size: int) -> str:
    """A table that can't be read from other nodes is refused everywhere, and the buffer goes on."""
    buffer = emulated_buffer(per_node=1, num_bytes=6 << 20, num_cpu_bytes=2 << 20)
    with pytest.raises(UnavailableError) as caught:
        buffer.engram_write(torch.zeros(4, 8))
    buffer.barrier()
    buffer.destroy()
    return str(caught.value)


def test_pinned_table_between_nodes_is_refused(pool: Callable[[int], Pool]) -> None:
    for said in pool(2).run(pinned_between_nodes, timeout=60):
        assert said.startswith(
            "Engram's tables in CPU memory (num_cpu_bytes) of the cuda backend need ranks that reach"
        )
        assert "on 2 nodes of 1" in said


def pinned_on_one_rank(rank: int, size: int) -> str:
    buffer = test_engram.engram_buffer("emulated pinned" if rank == 0 else "emulated")
    assert buffer.describe().get("engram_tables") == ("pinned CPU memory" if rank == 0 else None)
    with pytest.raises(CommunicationError) as caught:
        buffer.engram_write(torch.zeros(4, 8))
    return str(caught.value)


def test_pinned_table_on_one_rank_is_an_error_everywhere() -> None:
    said = harness.run(2, pinned_on_one_rank, timeout=60)
    places = ["memory of the CPU", "memory of the GPU"]
    for rank, text in enumerate(said):
        assert f"waiting for rank {1 - rank}" in text
        assert f"expected {places[rank]} as on this rank, seen {places[1 - rank]}" in text


def pinned_sizes(rank: int, size: int) -> None:
    """The window has what is left beside the table; more rows than `num_cpu_bytes` are refused."""
    buffer = emulated_buffer(num_bytes=6 << 20, num_cpu_bytes=2 << 20)
    assert buffer.num_bytes == 6 << 20
    assert buffer._backend.num_bytes == 4 << 20
    with pytest.raises(BufferSizeError, match="storage needs 2097408 bytes, num_cpu_bytes is 2097152"):
        buffer.engram_write(torch.zeros(8193, 64))
    buffer.engram_write(torch.zeros(8192, 64))
    table, _ = buffer.engram_storage
    assert table.device == buffer.device
    buffer.engram_fetch(torch.arange(8192).repeat(3))()  # has no limit here
    buffer.destroy()
    buffer = emulated_buffer(num_bytes=2 << 20, num_cpu_bytes=2 << 20, num_max_tokens_per_rank=4096, hidden=4096)
    assert buffer._backend.num_bytes == 2 << 20  # flags only: it is not what dispatch of so much would need
    with pytest.raises(BufferSizeError, match="the buffer has 0 bytes, 1 tensors of 32 bytes in flight need"):
        buffer.pp_set_config(32, 1)
    buffer.engram_write(torch.zeros(8192, 64))
    buffer.destroy()


def test_sizes_of_a_pinned_table(pool: Callable[[int], Pool]) -> None:
    pool(1).run(pinned_sizes)


def captured(rank: int, size: int, kind: str) -> None:
    """A fetch in a CUDA graph: each replay sees the table and the indices of its time."""
    buffer = test_engram.engram_buffer(kind)
    table = torch.arange(8.0 * size, device="cuda").view(-1, 1).expand(-1, 8).contiguous()
    mine = table[8 * rank :][:8]
    buffer.engram_write(mine)
    index = torch.arange(100, device="cuda") % (8 * size)
    buffer.engram_fetch(index)()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, _ = buffer.engram_fetch(index)()
    for step in range(5):
        buffer.engram_update(torch.arange(8, device="cuda"), mine + step)
        index.copy_((torch.arange(100, device="cuda") + step) % (8 * size))
        graph.replay()
        assert torch.equal(rows, table[index] + step)
    settle(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cuda", "cuda pinned"])
def test_fetch_in_a_graph(kind: str) -> None:
    harness.run(2, captured, kind, timeout=120)


def late_peer(rank: int, size: int) -> float:
    """A fetch returns at once, and only its hook waits for a rank that comes late. Seconds that the call took."""
    buffer = test_engram.engram_buffer("cuda")
    buffer.engram_write(torch.full((4, 8), float(rank), device="cuda"))
    index = torch.arange(4 * size, device="cuda")
    matrix = torch.ones(64, 64, device="cuda")
    # The first product loads cuBLAS' kernels. A driver may wait for the device then, whose fetch waits for the peer.
    assert float((matrix @ matrix)[0, 0]) == 64
    settle(buffer, buffer.engram_fetch(index))
    buffer.engram_write(torch.full((4, 8), float(rank), device="cuda"))  # or the fetch would read before it waits
    settle(buffer)
    if rank == 1:
        time.sleep(2)
    begin = time.monotonic()
    hook = buffer.engram_fetch(index)
    called = time.monotonic() - begin
    assert float((matrix @ matrix)[0, 0]) == 64  # the current stream goes on meanwhile
    computed = time.monotonic() - begin
    settle(buffer, hook)
    return max(called, computed)


@pytest.mark.gpu
def test_fetch_returns_at_once() -> None:
    assert max(harness.run(2, late_peer, timeout=60)) < 1.5
