"""`ElasticBuffer` on real processes against the dense oracle: shapes by hypothesis, bits compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin.elastic import ElasticBuffer
from tests.harness import Pool
from tests.oracle import Case, expected, inputs

_buffers: dict[bool, ElasticBuffer] = {}


def shared_buffer(multiple_reduction: bool = True) -> ElasticBuffer:
    """This rank's buffer, kept between cases so that one case can trip over what the last one left."""
    if multiple_reduction not in _buffers:
        _buffers[multiple_reduction] = ElasticBuffer(
            dist.group.WORLD, num_cpu_timeout_secs=20, allow_multiple_reduction=multiple_reduction
        )
    return _buffers[multiple_reduction]


def round_trip(rank: int, size: int, case: Case, buffer: ElasticBuffer | None = None) -> dict[str, Any]:
    """Dispatch, cached dispatch and combine of one case; returns everything a caller can see, on the CPU."""
    buffer = buffer or shared_buffer(case.multiple_reduction)
    device = buffer.device
    mine = inputs(case, rank).to(device)
    rows = mine.x if mine.scales is None else (mine.x, mine.scales)
    weights = mine.topk_weights if case.weights else None
    stats = torch.full((case.local_experts,), 7, dtype=torch.int32, device=device)
    before = buffer.traffic.sent_bytes
    x, idx, recv_weights, handle, event = buffer.dispatch(
        rows,
        mine.topk_idx,
        weights,
        cumulative_local_expert_recv_stats=stats,
        num_experts=case.experts,
        num_max_tokens_per_rank=case.max_tokens or None,
        expert_alignment=case.alignment,
        previous_event=buffer.capture(),
        async_with_compute_stream=case.overlap,
        do_cpu_sync=case.exact,
        do_expand=case.expand,
        do_zero_padding=case.zero_padding,
        use_tma_aligned_col_major_sf=case.col_major,
    )
    with event:
        pass
    sent = buffer.traffic.sent_bytes - before
    other_rows = (
        reversed_bytes(mine.x) if mine.scales is None else (reversed_bytes(mine.x), reversed_bytes(mine.scales))
    )
    other_weights = None if weights is None else 2 * weights
    again = buffer.dispatch(
        other_rows, None, other_weights, handle=handle, do_expand=case.expand, do_zero_padding=case.zero_padding
    )
    assert again[3] is handle

    # Build what the experts return from the handle alone: from where each row came and where its copies lie.
    metadata = handle.recv_src_metadata
    everyone = [inputs(case, r).to(device) for r in range(size)]
    dtype = mine.y.dtype
    out = torch.full((handle.num_rows, case.hidden), float("nan"), dtype=dtype, device=device)
    for row, (source_token, lead, *places) in enumerate(metadata.tolist()):
        source, token = divmod(source_token, handle.num_max_tokens_per_rank)
        if case.expand:
            for position, place in enumerate(places):
                if place >= 0:
                    out[place] = everyone[source].y[token, position]
        else:
            assert lead // case.topk == source
            out[row] = everyone[source].y[token, lead % case.topk]
    biases = None if not mine.biases else mine.biases[0] if len(mine.biases) == 1 else tuple(mine.biases)
    combined, combined_weights, event = buffer.combine(
        out, handle, topk_weights=recv_weights, bias=biases, async_with_compute_stream=case.overlap
    )
    event.current_stream_wait()
    payload, scales = x if isinstance(x, tuple) else (x, None)
    payload2, scales2 = again[0] if isinstance(again[0], tuple) else (again[0], None)
    seen = {
        "x": payload.view(torch.uint8),
        "x_again": payload2.view(torch.uint8),
        "scales": scales,
        "scales_again": scales2,
        "scales_stride": None if scales is None else scales.stride(),
        "idx": idx,
        "weights": recv_weights,
        "weights_again": again[2],
        "stats": stats - 7,
        "combined": combined,
        "combined_weights": combined_weights,
        "sent": sent,
        "handle": {
            "num_recv_tokens": handle.num_recv_tokens,
            "num_expanded_tokens": handle.num_expanded_tokens,
            "aligned": handle.num_recv_tokens_per_expert_list,
            "per_expert": handle.num_unaligned_recv_tokens_per_expert.tolist(),
            "psum_rank": handle.psum_num_recv_tokens_per_scaleup_rank.tolist(),
            "psum_expert": handle.psum_num_recv_tokens_per_expert.tolist(),
            "metadata": metadata.tolist(),
            "topk_idx": handle.topk_idx.cpu(),
        },
    }
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in seen.items()}


def reversed_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Other data of the same shape and dtype, with the bytes of each row in reverse order."""
    return rows.contiguous().view(torch.uint8).flip(-1).view(rows.dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [torch.empty(t.numel(), dtype=t.dtype).copy_(t.flatten()).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and torch.equal(*bits)


def check(case: Case, results: list[dict[str, Any]], leftovers_are_zero: bool = True) -> None:
    """Compare what every rank returned with the oracle. Only some backends zero what a worst-case size leaves over."""
    for rank, got in enumerate(results):
        want, handle = expected(case, rank), got["handle"]
        for name in ("aligned", "per_expert", "psum_rank", "psum_expert", "metadata"):
            assert handle[name] == want[name], (rank, name)
        assert got["stats"].tolist() == want["per_expert"]
        num_rows = want["num_expanded"] if case.expand else len(want["rows"])
        allocated = got["x"].shape[0]
        if case.exact:
            assert allocated == num_rows
            assert handle["num_recv_tokens"] == len(want["rows"])
            assert handle["num_expanded_tokens"] == want["num_expanded"]
        else:
            assert allocated >= num_rows
            assert allocated == handle["num_expanded_tokens" if case.expand else "num_recv_tokens"]
        for row, value in want["x"].items():
            assert same_bits(got["x"][row], value.view(torch.uint8)), (rank, row)
            assert same_bits(got["x_again"][row], value.view(torch.uint8).flip(-1)), (rank, row)
        for row, value in want["scales"].items():
            assert same_bits(got["scales"][row], value), (rank, row)
            assert same_bits(got["scales_again"][row], reversed_bytes(value)), (rank, row)
        if case.scales and case.col_major and allocated:
            assert got["scales_stride"][0] == 1
            assert got["scales_stride"][1] % 4 == 0
        if case.weights:
            for row, value in want["weights"].items():
                assert same_bits(got["weights"][row], value), (rank, row)
                assert same_bits(got["weights_again"][row], 2 * value), (rank, row)
            assert torch.equal(got["combined_weights"], want["combined_weights"])
        else:
            assert got["weights"] is None
            assert got["combined_weights"] is None
        gaps = sorted(set(range(allocated)) - set(want["x"]))
        if case.zero_padding or (leftovers_are_zero and not case.exact):
            assert not got["x"][gaps].any()
        if case.zero_padding or not case.exact:
            assert not case.weights or not got["weights"][gaps].any()
        if case.expand:
            assert got["idx"] is None
        else:
            assert got["idx"][:num_rows].tolist() == want["local"]
            assert (got["idx"][num_rows:] == -1).all()
        assert torch.equal(got["combined"], want["combined"]), (rank, got["combined"], want["combined"])
        if case.ranks == 1:
            assert got["sent"] == 0


def layouts(draw: Callable, ranks: int) -> Case:
    local_experts = draw(st.integers(1, 4))
    expand = draw(st.booleans())
    tokens = tuple(draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks)))
    exact = draw(st.booleans())
    scales = draw(st.sampled_from(["", "", "fp32", "ue8m0"]))
    return Case(
        tokens=tokens,
        hidden=draw(st.sampled_from([16, 24, 130] if scales else [1, 8, 16, 36])),
        local_experts=local_experts,
        topk=draw(st.integers(1, ranks * local_experts)),
        dtype=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        scales=scales,
        expand=expand,
        alignment=draw(st.sampled_from([1, 1, 4, 16])),
        zero_padding=expand and draw(st.booleans()),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        one_expert=draw(st.integers(0, 4)) == 0,
        weights=draw(st.booleans()),
        biases=draw(st.integers(0, 2)),
        exact=exact,
        max_tokens=0 if exact and draw(st.booleans()) else max(tokens) + draw(st.integers(0 if max(tokens) else 1, 3)),
        multiple_reduction=draw(st.booleans()),
        overlap=draw(st.booleans()),
        col_major=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_shape(pool: Callable[[int], Pool], ranks: int) -> None:
    @settings(max_examples=40)
    @given(st.composite(layouts)(ranks))
    def compare(case: Case) -> None:
        check(case, pool(ranks).run(round_trip, case))

    compare()


EDGE_CASES = {
    "no token anywhere": Case((0, 0, 0, 0)),
    "one rank has every token": Case((0, 13, 0, 0)),
    "one rank has none": Case((5, 0, 7, 3)),
    "all to one expert": Case((6, 6, 6, 6), one_expert=True),
    "k = 1": Case((5, 6, 7, 8), topk=1),
    "k = E": Case((3, 4, 5, 6), topk=8),
    "nothing selected": Case((4, 4, 4, 4), masked=1.0, biases=1),
    "FP8 compact": Case((4, 5, 6, 7), hidden=256, scales="fp32", expand=False, dtype="bf16"),
    "FP8 expanded, column-major": Case((4, 5, 6, 7), hidden=640, scales="ue8m0", col_major=True, dtype="bf16"),
    "aligned, zero-padded": Case((9, 1, 4, 2), alignment=128, zero_padding=True),
    "worst-case sizes": Case((9, 1, 4, 2), exact=False, max_tokens=11, alignment=8),
    "every row rounded once": Case((9, 8, 7, 6), dtype="bf16", topk=5, multiple_reduction=False, biases=2),
    "in flight": Case((9, 8, 7, 6), overlap=True, expand=False),
}


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_case(pool: Callable[[int], Pool], name: str) -> None:
    case = EDGE_CASES[name]
    check(case, pool(4).run(round_trip, case))


def test_larger_case_and_bytes(pool: Callable[[int], Pool]) -> None:
    """A token travels once per destination rank: bytes sent = rows x row size + headers."""
    case = Case((60, 50, 70, 40), hidden=64, local_experts=4, topk=6)
    results = pool(4).run(round_trip, case)
    check(case, results)
    row = 64 * 4 + 32 + 32  # data, 6 local experts + source token, 6 weights, in steps of 16 bytes
    header = 3 * 8 * (6 + 2 + case.local_experts)
    for rank, got in enumerate(results):
        assert got["sent"] == expected(case, rank)["sent_rows"] * row + header


def test_same_bits_every_time(pool: Callable[[int], Pool]) -> None:
    case = Case((9, 8, 7, 6), topk=5, dtype="bf16", biases=1)
    first, *others = [pool(4).run(round_trip, case) for _ in range(3)]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert same_bits(a["combined"], b["combined"])
            assert same_bits(a["x"], b["x"])


def subgroup_round_trip(rank: int, size: int) -> list[int]:
    """Two buffers in two halves of the world, used in different orders on different ranks."""
    halves = [dist.new_group([0, 1]), dist.new_group([3, 2])]
    half = rank // 2
    buffer = ElasticBuffer(halves[half], num_cpu_timeout_secs=20)
    case = Case((4, 5), topk=3)
    mine = inputs(case, buffer.rank_idx)
    x, _, _, handle, _ = buffer.dispatch(mine.x, mine.topk_idx, num_experts=case.experts, do_expand=True)
    combined, _, _ = buffer.combine(x, handle)
    times = (mine.topk_idx >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(combined, mine.x * times)
    buffer.barrier()
    assert buffer.get_logical_domain_size() == (1, 2)
    assert buffer.get_physical_domain_size() == (1, 2)
    buffer.destroy()
    buffer.destroy()
    return [buffer.num_ranks, buffer.rank_idx]


def test_subgroups(pool: Callable[[int], Pool]) -> None:
    assert pool(4).run(subgroup_round_trip) == [[2, 0], [2, 1], [2, 0], [2, 1]]


def many_in_flight(rank: int, size: int) -> None:
    """Several dispatches and combines open at once, waited for in another order."""
    buffer = shared_buffer()
    cases = [Case((5, 3, 4, 6), topk=3, seed=s, expand=bool(s % 2)) for s in range(4)]
    opened = []
    for case in cases:
        mine = inputs(case, rank)
        opened.append(
            buffer.dispatch(
                mine.x,
                mine.topk_idx,
                num_experts=case.experts,
                do_expand=case.expand,
                async_with_compute_stream=True,
            )
        )
    for case, (x, _, _, handle, event) in reversed(list(zip(cases, opened, strict=True))):
        event.current_stream_wait()
        want = expected(case, rank)["x"]
        assert all(torch.equal(x[row], value) for row, value in want.items())
        assert handle.recv_src_metadata.shape[0] == handle.num_recv_tokens


def test_many_in_flight(pool: Callable[[int], Pool]) -> None:
    pool(4).run(many_in_flight)


def test_frozen_case_is_reproducible() -> None:
    case = Case((3, 4), seed=5)
    assert same_bits(inputs(case, 1).x, inputs(dataclasses.replace(case), 1).x)
