"""The cuda backend between nodes on the emulator: direct and hybrid, over a network that delays and reorders."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin import BufferSizeError, CommunicationError
from epv2_plugin.elastic import ElasticBuffer, sizing
from tests import harness, test_cuda_emulated, test_elastic
from tests.buffers import SMS, emulated_buffer
from tests.harness import Pool
from tests.oracle import Case, expected, inputs

WINDOW = 64 << 20
CLUSTERS = [(2, 1), (2, 2), (4, 2), (2, 4)]  # nodes x ranks of each
MODES = ["direct", "hybrid"]
_buffers: dict[tuple[int, int, bool, bool], ElasticBuffer] = {}


def round_trip(rank: int, size: int, case: Case) -> dict[str, Any]:
    """`test_elastic.round_trip` between nodes; no kernel has more blocks than the budget."""
    key = (size, case.per_node, case.hybrid, case.multiple_reduction)
    if key not in _buffers:
        _buffers[key] = emulated_buffer(
            seed=case.seed,
            per_node=case.per_node,
            num_bytes=WINDOW,
            allow_multiple_reduction=case.multiple_reduction,
            allow_hybrid_mode=case.hybrid,
        )
    made = _buffers[key]
    assert made.describe()["mode"] == ("hybrid" if case.hybrid else "direct")
    # dispatch 4, the same again 3 or 4 (weights), combine 3
    return test_cuda_emulated.within_budget(made, rank, size, case, range(10, 12))


def compare(pool: Callable[[int], Pool], case: Case, cluster: tuple[int, int], mode: str) -> None:
    nodes, per_node = cluster
    case = replace(case.for_cuda(), per_node=per_node, hybrid=mode == "hybrid")
    if case.hybrid:
        case = replace(case, multiple_reduction=True)
    assert case.ranks == nodes * per_node
    test_elastic.check(case, pool(case.ranks).run(round_trip, case, timeout=120), leftovers_are_zero=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_any_shape(pool: Callable[[int], Pool], cluster: tuple[int, int], mode: str) -> None:
    ranks = cluster[0] * cluster[1]

    @settings(max_examples=6 if ranks <= 4 else 1)
    @given(st.composite(test_elastic.layouts)(ranks))
    def draw(case: Case) -> None:
        compare(pool, case, cluster, mode)

    draw()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", test_elastic.EDGE_CASES)
def test_edge_case(pool: Callable[[int], Pool], name: str, mode: str) -> None:
    compare(pool, test_elastic.EDGE_CASES[name], (2, 2), mode)


LARGE_CASES = {
    "many tokens": Case((130, 33, 64, 1), hidden=64, local_experts=8, topk=6, dtype="bf16", seed=1),
    "compact, many tokens": Case((65, 100, 31, 40), hidden=48, local_experts=3, topk=4, expand=False, seed=2),
    "top-k 32": Case((20, 35, 3, 9), hidden=16, local_experts=10, topk=32, dtype="fp16", masked=0.2, seed=4),
    "wide rows": Case((9, 4, 3, 6), hidden=11016, topk=3, biases=2, seed=5),
    "V3's row in FP8": Case((6, 7, 3, 5), hidden=7168, local_experts=4, topk=4, scales="fp32", dtype="bf16", seed=7),
}


@pytest.mark.parametrize("mode", MODES)
def test_more_chunks_than_warps(pool: Callable[[int], Pool], mode: str) -> None:
    """A warp that sends takes a second chunk of tokens, with what it keeps of the first."""
    compare(pool, Case((470, 9), hidden=16, local_experts=3, topk=4, seed=SMS - 1), (2, 1), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LARGE_CASES)
def test_large_case(pool: Callable[[int], Pool], name: str, mode: str) -> None:
    compare(pool, LARGE_CASES[name], (2, 2), mode)


def made_for(cluster: tuple[int, int], mode: str, **options: Any) -> ElasticBuffer:
    options = {"num_bytes": WINDOW, "per_node": cluster[1], "allow_hybrid_mode": mode == "hybrid", **options}
    made = emulated_buffer(**options)
    made.get_theoretical_num_sms = lambda *_: SMS  # there is no NIC here whose rate it could be
    return made


def repeated(rank: int, size: int, cluster: tuple[int, int], mode: str, seeds: range) -> None:
    """Random routings under random schedules, and the same one again: always the bits of the oracle."""
    made = made_for(cluster, mode, num_max_tokens_per_rank=40)
    for seed in seeds:
        made.runtime.reseed(seed)
        tokens = torch.randint(0, 40, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
        case = Case(tuple(tokens), hidden=32, local_experts=3, topk=1 + seed % 6, dtype="bf16", seed=seed)
        case = replace(case, max_tokens=40, per_node=cluster[1], hybrid=mode == "hybrid", masked=0.2 * (seed % 3))
        mine, want = inputs(case, rank), expected(case, rank)
        rows, _, weights, handle, _ = made.dispatch(
            mine.x, mine.topk_idx, mine.topk_weights, num_experts=case.experts, do_expand=True, num_sms=1 + seed % SMS
        )
        assert all(torch.equal(rows[row], value) for row, value in want["x"].items())
        assert all(torch.equal(weights[row], value) for row, value in want["weights"].items())
        assert handle.recv_src_metadata.tolist() == want["metadata"]
        # Twice in a row: what a peer still reads, or the network still sends, must not be overwritten by the second.
        times = (mine.topk_idx >= 0).sum(1, keepdim=True)
        first, second = (made.combine(factor * rows, handle, num_sms=1 + seed // 2 % SMS)[0] for factor in (1, -2))
        torch.testing.assert_close(first.float(), mine.x.float() * times, rtol=3e-2, atol=3e-2)
        assert torch.equal(second, -2 * first)
        if seed % 5 == 0:
            made.barrier()


@pytest.mark.parametrize(
    ("cluster", "mode", "seeds"), [((2, 2), "direct", 8), ((2, 2), "hybrid", 8), ((4, 2), "hybrid", 2)], ids=str
)
def test_no_schedule_changes_a_bit(
    pool: Callable[[int], Pool], cluster: tuple[int, int], mode: str, seeds: int
) -> None:
    pool(cluster[0] * cluster[1]).run(repeated, cluster, mode, range(seeds), timeout=240)


def written_in_place(rank: int, size: int, mode: str) -> None:
    """Expert output written into the window: direct mode sends every row as it is, hybrid mode a sum per node."""
    case = Case((11, 40, 7, 9), hidden=32, local_experts=3, topk=4, dtype="bf16", multiple_reduction=False)
    made = made_for((2, 2), mode, num_max_tokens_per_rank=40)
    mine = inputs(case, rank)
    everyone = [inputs(case, r) for r in range(size)]
    for _ in range(3):
        _, _, weights, handle, _ = made.dispatch(
            mine.x, mine.topk_idx, mine.topk_weights, num_experts=case.experts, do_expand=True
        )
        out = made.get_combine_buffer(handle, case.hidden)
        for source_token, _, *places in handle.recv_src_metadata.tolist():
            source, token = divmod(source_token, 40)
            for position, place in enumerate(places):
                if place >= 0:
                    out[place] = everyone[source].y[token, position]
        combined, combined_weights, _ = made.combine(out, handle, topk_weights=weights)
        assert torch.equal(combined_weights, mine.topk_weights)
        if mode == "direct":
            assert torch.equal(combined, expected(case, rank)["combined"])
        else:
            torch.testing.assert_close(combined, expected(case, rank)["combined"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", MODES)
def test_expert_output_written_into_the_window(pool: Callable[[int], Pool], mode: str) -> None:
    pool(4).run(written_in_place, mode)


def crossing(rank: int, size: int, mode: str) -> tuple[int, int, int]:
    """Bytes that came over the network, those that direct mode would bring, and bytes of a row on the way."""
    case = Case((50, 60, 40, 70), hidden=64, local_experts=4, topk=6, dtype="bf16")
    made, mine = made_for((2, 2), mode, num_max_tokens_per_rank=70), inputs(case, rank)
    made.dispatch(mine.x, mine.topk_idx, mine.topk_weights, num_experts=case.experts)
    row = 64 * 2 + 16 * (1 + case.topk)  # data; source, 6 experts with their numbers, 6 weights
    return made.traffic.network_bytes, made.traffic.direct_network_bytes, row


def test_hybrid_mode_sends_a_row_once_to_each_node(pool: Callable[[int], Pool]) -> None:
    case = Case((50, 60, 40, 70), hidden=64, local_experts=4, topk=6, dtype="bf16")
    nodes = ranks = 0
    for rank in range(4):
        for experts in inputs(case, rank).topk_idx.tolist():
            far = {e // 4 for e in experts if e // 4 // 2 != rank // 2}
            ranks += len(far)
            nodes += len({r // 2 for r in far})
    for mode, rows in (("direct", ranks), ("hybrid", nodes)):
        results = pool(4).run(crossing, mode)
        assert sum(sent for sent, _, _ in results) == rows * results[0][2], mode
        assert sum(direct for _, direct, _ in results) == ranks * results[0][2]
    assert nodes < ranks


def gives_up(rank: int, size: int, mode: str, what: str) -> str:
    """The last rank dies, stays away or comes with something else; what every other rank says."""
    made = made_for((2, 2), mode, num_max_tokens_per_rank=8, num_gpu_timeout_secs=7)
    gen = torch.Generator().manual_seed(rank)
    x, idx = torch.randn(5, 32, generator=gen), torch.rand(5, 12, generator=gen).argsort(1)[:, :2]
    rows, _, _, handle, _ = made.dispatch(x, idx, num_experts=12)
    made.barrier()
    if rank == 3 and what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 3 and what == "absent":
        time.sleep(12)
    begin = time.monotonic()
    try:
        if what == "combine":
            combined, _, _ = made.combine(torch.cat([rows, rows], 1) if rank == 3 else rows, handle)
            assert combined.isnan().all()  # nothing that looks like a result
        else:
            made.dispatch(x.bfloat16() if what == "dtype" and rank == 3 else x, idx, num_experts=12)
        made.barrier()
    except CommunicationError as error:
        assert time.monotonic() - begin < 25
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("mode", "what"),
    [("direct", "dies"), ("hybrid", "dies"), ("hybrid", "absent"), ("direct", "dtype"), ("hybrid", "combine")],
)
def test_ranks_of_both_nodes_say_why_they_gave_up(mode: str, what: str) -> None:
    results = harness.outcomes(4, gives_up, mode, what, timeout=90)
    said = {rank: results[rank].value or results[rank].error for rank in range(4) if (rank, what) != (3, "dies")}
    assert all("Communication" in text and f"rank {rank}, waiting for rank" in text for rank, text in said.items()), (
        said
    )
    if what in ("dies", "absent"):
        assert any("waiting for rank 3" in text and "within 7 s" in text for text in said.values()), said
    if what == "dtype":
        assert any("expected dtype" in text for text in said.values()), said
    if what == "combine":
        assert any("expected hidden size" in text for text in said.values()), said


def overflows(rank: int, size: int) -> str:
    """Every token goes to rank 0, which has room for those of one rank of the other node."""
    sizing._LEAST_TARGETS = 1
    sizing.Nodes = functools.partial(sizing.Nodes, capacity_factor=1.0)  # type: ignore[misc, assignment]
    made = made_for((2, 2), "direct", num_max_tokens_per_rank=8, num_gpu_timeout_secs=8)
    for tokens in (4, 8):
        x, idx = torch.randn(tokens, 32), torch.zeros(tokens, 1, dtype=torch.int64)
        try:
            rows, _, _, handle, _ = made.dispatch(x, idx, num_experts=12)
            made.combine(rows, handle)
            made.barrier()
        except (BufferSizeError, CommunicationError) as error:
            return f"{tokens}: {type(error).__name__}: {error}"
    return "no error"


def test_more_rows_than_there_is_room_for(pool: Callable[[int], Pool]) -> None:
    said = harness.run(4, overflows, timeout=60)
    assert said[0].startswith("8: BufferSizeError: 16 rows come to this rank from other nodes")
    assert "room for 8" in said[0]
    assert all(text.startswith("8: CommunicationError") for text in said[1:]), said
