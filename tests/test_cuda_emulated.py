"""The cuda backend on the emulator: its Python and kernels without a GPU, against the oracle of the host's tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin import BufferSizeError, CommunicationError, CommunicationTimeout
from epv2_plugin.elastic import ElasticBuffer
from epv2_plugin.elastic.quant import per_token_cast_to_fp8
from tests import harness, test_elastic
from tests.buffers import SMS, emulated_buffer
from tests.harness import Pool
from tests.oracle import Case, expected, inputs

WINDOW = 48 << 20
TOKENS, HIDDEN, EXPERTS, TOPK = 5, 32, 12, 2
_buffers: dict[tuple[int, bool], ElasticBuffer] = {}


def round_trip(rank: int, size: int, case: Case) -> dict[str, Any]:
    """`test_elastic.round_trip` on the emulated cuda backend; no kernel has more blocks than the budget."""
    key = (size, case.multiple_reduction)
    if key not in _buffers:
        _buffers[key] = emulated_buffer(num_bytes=WINDOW, allow_multiple_reduction=case.multiple_reduction)
    # dispatch 3, the same again 2 or 3 (weights), combine 2
    return within_budget(_buffers[key], rank, size, case, range(7, 9))


def within_budget(made: Any, rank: int, size: int, case: Case, launches: range) -> dict[str, Any]:
    """`test_elastic.round_trip` in so many launches, none of which has more blocks than the budget."""
    budget = SMS - case.seed % SMS
    made.get_theoretical_num_sms = lambda *_: budget
    made.runtime.launches.clear()
    result = test_elastic.round_trip(rank, size, case, made)
    kernels = [launch for launch in made.runtime.launches if launch.kernel != "epv2_combine_idle"]
    assert len(kernels) in launches
    assert all(launch.ctas == budget for launch in kernels)
    return result


def compare(pool: Callable[[int], Pool], case: Case) -> None:
    case = case.for_cuda()
    test_elastic.check(case, pool(case.ranks).run(round_trip, case, timeout=120), leftovers_are_zero=False)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_shape(pool: Callable[[int], Pool], ranks: int) -> None:
    @settings(max_examples=12)
    @given(st.composite(test_elastic.layouts)(ranks))
    def draw(case: Case) -> None:
        compare(pool, case)

    draw()


@pytest.mark.parametrize("name", test_elastic.EDGE_CASES)
def test_edge_case(pool: Callable[[int], Pool], name: str) -> None:
    compare(pool, test_elastic.EDGE_CASES[name])


# Beyond one chunk of tokens, one piece of a row, one turn of a ring, one vector of a lane, 32 experts of a rank.
LARGE_CASES = {
    "many tokens": Case((130, 33, 64, 1), hidden=64, local_experts=8, topk=6, dtype="bf16", seed=1),
    "compact, many tokens": Case((65, 100, 31), hidden=48, local_experts=3, topk=4, expand=False, seed=2),
    "many experts": Case((40, 50), hidden=16, local_experts=70, topk=12, alignment=4, zero_padding=True, seed=3),
    "top-k 32": Case((20, 35), hidden=16, local_experts=20, topk=32, dtype="fp16", masked=0.2, seed=4),
    "wide rows": Case((9, 4), hidden=11016, topk=3, biases=2, seed=5),
    "wide rows, each sent": Case((5, 9), hidden=9000, topk=3, multiple_reduction=False, dtype="bf16", biases=1, seed=8),
    "V3's row": Case((6, 7), hidden=7168, local_experts=4, topk=4, dtype="bf16", seed=6),
    "V3's row in FP8": Case((6, 7), hidden=7168, local_experts=4, topk=4, scales="fp32", dtype="bf16", seed=7),
    "scales that no bulk copy takes": Case((40, 3), hidden=400, scales="fp32", dtype="bf16", seed=9),
}


@pytest.mark.parametrize("name", LARGE_CASES)
def test_large_case(pool: Callable[[int], Pool], name: str) -> None:
    compare(pool, LARGE_CASES[name])


def repeated(rank: int, size: int, seeds: range) -> None:
    """One routing under many schedules of the kernels' threads: always the same bits."""
    case = Case((37, 70, 5), hidden=32, local_experts=4, topk=5, dtype="bf16")
    mine, want = inputs(case, rank), expected(case, rank)
    made = emulated_buffer(num_bytes=WINDOW)
    for seed in seeds:
        made.runtime.reseed(seed)
        rows, _, _, handle, _ = made.dispatch(
            mine.x, mine.topk_idx, num_experts=case.experts, num_max_tokens_per_rank=70, do_expand=True, num_sms=SMS
        )
        assert all(torch.equal(rows[row], value) for row, value in want["x"].items())
        assert handle.recv_src_metadata.tolist() == [
            [s * 70 + t, *rest] for (s, t), (_, *rest) in zip(want["rows"], want["metadata"], strict=True)
        ]
        # Twice in a row: what a peer still reads of the first must not be overwritten by the second.
        combined = [made.combine(factor * rows, handle, num_sms=1 + seed % SMS)[0] for factor in (1, -2)]
        times = (mine.topk_idx >= 0).sum(1, keepdim=True)
        torch.testing.assert_close(combined[0].float(), mine.x.float() * times, rtol=2e-2, atol=2e-2)
        assert torch.equal(combined[1], -2 * combined[0])


def test_no_schedule_changes_a_bit(pool: Callable[[int], Pool]) -> None:
    pool(3).run(repeated, range(25), timeout=240)


def counted(rank: int, size: int, multiple_reduction: bool) -> list[list[int]]:
    """What a dispatch with weights, then a combine of expert rows with none, add to the traffic."""
    case = Case((37, 20, 5), hidden=32, local_experts=4, topk=5, dtype="bf16")
    mine, found = inputs(case, rank), []
    made = emulated_buffer(num_bytes=WINDOW, allow_multiple_reduction=multiple_reduction)
    rows, *_, handle, _ = made.dispatch(
        mine.x, mine.topk_idx, mine.topk_weights, num_experts=case.experts, num_max_tokens_per_rank=37, do_expand=True
    )
    found.append([made.traffic.sent_bytes, made.traffic.undeduplicated_bytes])
    made.combine(rows, handle)
    total = [made.traffic.sent_bytes, made.traffic.undeduplicated_bytes]
    return [*found, [now - then for now, then in zip(total, found[0], strict=True)]]


@pytest.mark.parametrize("multiple_reduction", [True, False])
def test_traffic_is_rows_there_and_back(pool: Callable[[int], Pool], multiple_reduction: bool) -> None:
    case = Case((37, 20, 5), hidden=32, local_experts=4, topk=5, dtype="bf16")
    rows = pairs = 0
    for rank in range(3):
        owners = inputs(case, rank).topk_idx // case.local_experts
        others = (owners >= 0) & (owners != rank)
        pairs += int(others.sum())
        rows += sum(len({*owner[other].tolist()}) for owner, other in zip(owners, others, strict=True))
    found = torch.tensor(pool(3).run(counted, multiple_reduction)).sum(0).tolist()
    back = rows if multiple_reduction else pairs  # one row a token and rank, or each expert's
    assert found == [[68 * rows, 68 * pairs], [64 * back, 64 * pairs]]


def cast_on_the_way(rank: int, size: int, dtype: torch.dtype) -> None:
    made = emulated_buffer(num_bytes=WINDOW, num_max_tokens_per_rank=8)
    gen = torch.Generator().manual_seed(rank)
    x = (torch.randn(7, 400, generator=gen) * torch.rand(7, 1, generator=gen) * 100).to(dtype)
    x[3] = 0
    x[4, :128] *= 1e-8
    x[5, 200] = float("nan")
    idx = torch.full((7, 1), 1 - rank)
    (rows, scales), *_ = made.dispatch(x, idx, num_experts=2, use_fp8=True)
    gen = torch.Generator().manual_seed(1 - rank)
    sent = (torch.randn(7, 400, generator=gen) * torch.rand(7, 1, generator=gen) * 100).to(dtype)
    sent[3] = 0
    sent[4, :128] *= 1e-8
    sent[5, 200] = float("nan")
    want_rows, want_scales = per_token_cast_to_fp8(sent)
    number = ~want_rows.float().isnan()
    assert torch.equal(~rows.float().isnan(), number)  # with any sign
    assert torch.equal(rows.view(torch.uint8)[number], want_rows.view(torch.uint8)[number])
    assert torch.equal(scales.nan_to_num(-1), want_scales.nan_to_num(-1))
    assert not number[5, 128:256].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_on_the_way_has_the_host_casts_bits(pool: Callable[[int], Pool], dtype: torch.dtype) -> None:
    pool(2).run(cast_on_the_way, dtype)


def written_in_place(rank: int, size: int) -> None:
    """Expert output written into the window: combine reads it there, sums every row once."""
    case = Case((11, 40, 7), hidden=32, local_experts=3, topk=4, dtype="bf16", multiple_reduction=False)
    made = emulated_buffer(num_bytes=WINDOW, num_max_tokens_per_rank=40)
    mine = inputs(case, rank)
    everyone = [inputs(case, r) for r in range(size)]
    for _ in range(3):  # the next round must not overwrite what a peer still reads
        _, _, weights, handle, _ = made.dispatch(
            mine.x, mine.topk_idx, mine.topk_weights, num_experts=case.experts, do_expand=True
        )
        out = made.get_combine_buffer(handle, case.hidden)
        assert out.shape == (handle.num_rows, case.hidden)
        for source_token, _, *places in handle.recv_src_metadata.tolist():
            source, token = divmod(source_token, 40)
            for position, place in enumerate(places):
                if place >= 0:
                    out[place] = everyone[source].y[token, position]
        combined, combined_weights, _ = made.combine(out, handle, topk_weights=weights)
        assert torch.equal(combined, expected(case, rank)["combined"])
        assert torch.equal(combined_weights, mine.topk_weights)
    # All tokens to one rank: the others have no rows, and still agree on where rows lie.
    idx = torch.zeros(case.tokens[rank], 1, dtype=torch.int64)
    rows, _, _, none, _ = made.dispatch(mine.x, idx, num_experts=case.experts, do_expand=True)
    combined, _, _ = made.combine(made.get_combine_buffer(none, case.hidden).copy_(rows), none)
    assert torch.equal(combined, mine.x)
    with pytest.raises(ValueError, match="not what get_combine_buffer gave"):
        made.combine(out[1:], _with_rows(handle, out.shape[0] - 1))


def _with_rows(handle: Any, rows: int) -> Any:
    handle.num_expanded_tokens = rows
    return handle


def test_expert_output_written_into_the_window(pool: Callable[[int], Pool]) -> None:
    pool(3).run(written_in_place)


def _routing(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(rank)
    return torch.randn(TOKENS, HIDDEN, generator=gen), torch.rand(TOKENS, EXPERTS, generator=gen).argsort(1)[:, :TOPK]


def gives_up(rank: int, size: int, what: str) -> str:
    """Rank 1 dies, stays away or comes with something else; what every other rank says."""
    made = emulated_buffer(num_bytes=WINDOW, num_max_tokens_per_rank=8, seconds=3)
    x, idx = _routing(rank)
    rows, _, _, handle, _ = made.dispatch(x, idx, num_experts=EXPERTS)
    made.barrier()
    if rank == 1 and what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and what == "absent":
        time.sleep(6)
    x = x.bfloat16() if what == "dtype" and rank == 1 else x
    idx = idx[:, :1] if what == "top-k" and rank == 1 else idx
    begin = time.monotonic()
    try:
        if what == "operation" and rank == 1:
            made.combine(rows, handle)
        elif what == "combine":
            if rank == 1:
                rows = torch.cat([rows, rows], 1)
            combined, _, _ = made.combine(rows, handle)
            assert combined.isnan().all()  # nothing that looks like a result
        else:
            made.dispatch(x, idx, num_experts=EXPERTS)
        made.barrier()
    except CommunicationError as error:
        assert time.monotonic() - begin < 20
        with pytest.raises(CommunicationError):  # it stays unusable, at once
            made.dispatch(x, idx, num_experts=EXPERTS)
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("what", ["dies", "absent", "dtype", "top-k", "operation", "combine"])
def test_every_rank_says_why_it_gave_up(what: str) -> None:
    results = harness.outcomes(3, gives_up, what, timeout=90)
    said = {rank: results[rank].value or results[rank].error for rank in range(3) if (rank, what) != (1, "dies")}
    assert all("Communication" in text and f"rank {rank}, waiting for rank" in text for rank, text in said.items()), (
        said
    )
    if what in ("dies", "absent"):
        assert CommunicationTimeout.__name__ in "".join(said.values())
        assert any(
            "waiting for rank 1 in dispatch, counts: expected operation 3 within 3 s" in t for t in said.values()
        )
    if what in ("dtype", "top-k"):
        assert any(f"expected {what}" in text for text in said.values()), said
    if what == "combine":
        assert any("expected hidden size 32 as on this rank, seen hidden size 64" in t for t in said.values()), said


def refused_on_one_rank(rank: int, size: int, what: str) -> str:
    """Every rank makes two calls. Rank 1's first one is refused, and it catches that."""
    made = emulated_buffer(num_bytes=WINDOW, num_max_tokens_per_rank=8, seconds=20)
    x, idx = _routing(rank)
    rows, _, _, handle, _ = made.dispatch(x, idx, num_experts=EXPERTS)
    try:
        for number in range(2):
            if rank == 1 and number == 0:
                with pytest.raises(TypeError, match="float64"):
                    made.combine(rows.double(), handle) if what == "combine" else made.dispatch(x.double())
            elif what == "combine":
                made.combine(number * rows, handle)
            else:
                made.dispatch(number * x, idx, num_experts=EXPERTS)
        made.barrier()
    except CommunicationError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["dispatch", "combine"])
def test_a_call_that_only_one_rank_refused_is_an_error_everywhere(what: str) -> None:
    said = harness.run(2, refused_on_one_rank, what, timeout=60)
    assert all(text.startswith(f"rank {rank}, waiting for rank {1 - rank}") for rank, text in enumerate(said)), said
    assert any(f"operation {what} after 1 refused" in text for text in said), said


def no_such_expert(rank: int, size: int) -> str:
    """An expert that only the kernel sees to be wrong."""
    made = emulated_buffer(num_bytes=WINDOW, num_max_tokens_per_rank=8)
    x, idx = _routing(rank)
    if rank == 1:
        idx[3, 1] = EXPERTS
        made._check_routing = lambda x, idx, experts: (idx.contiguous(), experts)
    try:
        made.dispatch(x, idx, num_experts=EXPERTS)
    except (CommunicationError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_wrong_expert_is_named_by_the_rank_that_sent_it(pool: Callable[[int], Pool]) -> None:
    first, second = pool(2).run(no_such_expert)
    assert second == f"ValueError: topk_idx[3, 1] = {EXPERTS}: must be -1 (none) or an expert"
    assert "waiting for rank 1" in first
    assert "gave up" in first


def sizes(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="needs num_bytes, or both"):
        emulated_buffer(hidden=64)
    made = emulated_buffer(num_max_tokens_per_rank=8, hidden=64, num_topk=2)
    x, idx = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(3, 1, dtype=torch.int64)
    good = {"topk_idx": idx, "num_experts": EXPERTS}
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "hidden size 7 in torch.bfloat16 is 14 bytes", lambda: made.dispatch(x[:, :7], **good)),
        (ValueError, "num_experts = 40000", lambda: made.dispatch(x, idx, num_experts=40000)),
        (ValueError, "num_sms = 4: must be 0", lambda: made.dispatch(x, **good, num_sms=4)),
        (ValueError, "num_sms = -1", lambda: made.dispatch(x, **good, num_sms=-1)),
        (
            TypeError,
            "use_fp8 = True: x is",
            lambda: made.dispatch((x.to(torch.float8_e4m3fn), torch.ones(3, 1)), **good, use_fp8=True),
        ),
        (BufferSizeError, "this dispatch needs", lambda: made.dispatch(x, **good, num_max_tokens_per_rank=60000)),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()
    for experts, topk, rates in (
        (16, 2, {}),
        (256, 8, {"nvlink_gbs": 1}),
        (2, 1, {"sm_read_gbs": 1, "sm_write_gbs": 1}),
    ):
        assert made.get_theoretical_num_sms(experts, topk, **rates) == SMS  # 4 at least, but there are no more
    with pytest.raises(ValueError, match="nvlink_gbs = -1"):
        made.get_theoretical_num_sms(16, 2, nvlink_gbs=-1)
    made.runtime.description["device"] = "Some PCIe card"
    with pytest.raises(ValueError, match=r"network.scale_up_gbytes_per_s = 'auto'.*'Some PCIe card'"):
        made.get_theoretical_num_sms(17, 2)
    with pytest.raises(BufferSizeError, match="make it with num_bytes") as error:
        emulated_buffer(num_bytes=2 << 20).dispatch(x, **good, num_max_tokens_per_rank=20000)
    enough = int(str(error.value).split("num_bytes = ")[1].split()[0])
    emulated_buffer(num_bytes=enough).dispatch(x, **good, num_max_tokens_per_rank=20000, num_sms=1)
    big = emulated_buffer(num_bytes=WINDOW)
    with pytest.raises(ValueError, match="num_max_tokens_per_rank = 0: the cuda backend needs"):
        big.dispatch(x, **good)
    assert made.num_bytes == 2 << 20


def test_sizes(pool: Callable[[int], Pool]) -> None:
    pool(2).run(sizes)
