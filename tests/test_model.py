"""The analytic model: exact counts, closed forms, monotony, and the measured table of the prototype."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin.elastic import model
from epv2_plugin.elastic.model import H200_RATES, CopyRates, Machine, Rate, Shape

# The prototype on an H200: 4096 tokens, hidden 7168, top-8 of 256, FP8 dispatch, BF16 combine (facts/ep_kernels.md).
V3 = Shape(tokens=4096, hidden=7168, topk=8, experts=256, ranks=4, fp8=True)
SHARED = Machine("NVIDIA H200", 132, H200_RATES, math.inf, sharing=4)
ALONE = Machine("NVIDIA H200", 132, H200_RATES, math.inf)
TOLERANCE = 0.25
# Microseconds with four ranks on the GPU; where a range was seen, its middle. Combine by `direct_rows` 0, 1, 2 and 8.
MEASURED = {
    4: {"stage": 258, "pull": 1152, 0: 1963, 1: 1684, 2: 1463, 8: 1152},
    8: {"stage": 139, "pull": 588, 0: 1083, 1: 946, 2: 812, 8: 610},
    16: {"stage": 100, "pull": 374, 0: 1034, 1: 896, 2: 725, 8: 572},
    24: {"stage": 101, "pull": 377, 0: 986, 1: 856, 2: 713, 8: 555},
}
MEASURED_ALONE = {4: (1450, 1121, 1634), 8: (735, 571, 839), 16: (389, 296, 444), 24: (279, 209, 318)}


@pytest.mark.parametrize("sms", MEASURED)
def test_prediction_of_the_prototype(sms: int) -> None:
    phases = {phase.name: phase for phase in model.dispatch_phases(V3)}
    predicted: dict[str | int, float] = {name: model.predict(phases[name], SHARED, sms).us for name in phases}
    for direct in (0, 1, 2, 8):
        combine = model.combine_phases(V3, zero_copy=True, direct_rows=direct)
        predicted[direct] = sum(model.predict(phase, SHARED, sms).us for phase in combine)
    assert predicted == {key: pytest.approx(us, rel=TOLERANCE) for key, us in MEASURED[sms].items()}


@pytest.mark.parametrize("sms", MEASURED_ALONE)
def test_prediction_of_one_rank_alone(sms: int) -> None:
    combines = [model.combine_phases(V3, zero_copy=True, direct_rows=direct) for direct in (8, 1)]
    sums = [sum(model.predict(phase, ALONE, sms).us for phase in phases) for phases in combines]
    predicted = (model.operation_us(model.dispatch_phases(V3), ALONE, sms), *sums)
    assert predicted == pytest.approx(MEASURED_ALONE[sms], rel=TOLERANCE)


def test_bound_of_a_phase() -> None:
    pull = model.dispatch_phases(V3)[1]
    assert model.predict(pull, SHARED, 8).bound == "SMs"
    assert model.predict(pull, SHARED, 24).bound == "memory"
    assert model.predict(pull, Machine("x", 132, H200_RATES, 50.0), 24).bound == "link"


def test_bytes_of_the_table() -> None:
    """Remote MB of each rank as measured: 159 with local sums, 215 up to two rows directly, 352 all directly."""
    pulls = [model.combine_phases(V3, zero_copy=True, direct_rows=direct)[-1] for direct in (0, 1, 2, 8)]
    assert [round(pull.link_bytes / 1e6) for pull in pulls] == [159, 159, 215, 352]
    stage, pull = model.dispatch_phases(V3)
    assert (stage.read_bytes, stage.write_bytes, V3.dispatch_row) == (4096 * 14336, 4096 * 7392, 7392)
    assert pull.write_bytes == pytest.approx(4096 * 8 * 7392)
    distinct = 4 * (1 - math.comb(192, 8) / math.comb(256, 8))
    assert pull.read_bytes == pytest.approx(4096 * distinct * 7392)
    assert pull.link_bytes == pytest.approx(3 / 4 * pull.read_bytes)


def test_compact_rows_are_written_once() -> None:
    compact = Shape(4096, 7168, 8, 256, 4, fp8=True, expanded=False)
    pull = model.dispatch_phases(compact)[1]
    assert pull.read_bytes == pull.write_bytes
    copy, gather = model.combine_phases(compact)
    assert copy.read_bytes == copy.write_bytes == gather.read_bytes
    assert model.combine_phases(compact, zero_copy=True) == [gather]


def test_a_copy_engine_takes_no_sms() -> None:
    copy, pull = model.combine_phases(V3, copy_engine=True)
    assert model.combine_phases(V3, zero_copy=True, direct_rows=8) == [pull]
    time = model.predict(copy, SHARED, 8)
    assert copy.read_bytes == copy.write_bytes == pytest.approx(4096 * 8 * 14336)
    assert (time.sm_us, time.bound) == (0, "memory")
    # 476 to 478 GB/s with four ranks on the GPU (facts/rig.md).
    assert copy.read_bytes / time.us / 1e3 == pytest.approx(477, rel=0.05)


def test_ordinary_tensors_are_always_summed_into_the_window() -> None:
    assert model.combine_phases(V3, direct_rows=8) == model.combine_phases(V3, zero_copy=True, direct_rows=0)


def enumerate_rows(shape: Shape) -> list[float]:
    """The same distribution by trying every routing there is."""
    size = shape.experts // shape.groups
    seen: Counter[int] = Counter()
    for chosen in itertools.combinations(range(shape.groups), shape.topk_groups):
        available = [e for e in range(shape.experts) if e // size in chosen]
        for experts in itertools.combinations(available, min(shape.topk, len(available))):
            for rank in range(shape.ranks):
                first, end = (shape.experts * r // shape.ranks for r in (rank, rank + 1))
                seen[sum(first <= e < end for e in experts)] += 1
    return [seen[j] / sum(seen.values()) for j in range(shape.topk + 1)]


@pytest.mark.parametrize(
    ("experts", "ranks", "topk", "groups", "topk_groups"),
    [
        (12, 4, 3, 1, 1),
        (12, 4, 3, 4, 2),  # a rank is a group
        (12, 2, 3, 4, 2),  # a rank has two groups
        (12, 4, 2, 2, 1),  # a group has two ranks
        (12, 3, 3, 2, 1),  # a rank in the middle has halves of two groups
        (8, 3, 2, 4, 3),  # experts that do not divide
        (3, 5, 2, 1, 1),  # ranks without experts
        (6, 3, 5, 3, 2),  # more than the groups hold
    ],
)
def test_rows_on_a_rank(experts: int, ranks: int, topk: int, groups: int, topk_groups: int) -> None:
    shape = Shape(1, 16, topk, experts, ranks, groups=groups, topk_groups=topk_groups)
    assert model.rows_on_rank(shape) == pytest.approx(enumerate_rows(shape))


def test_group_limit_halves_the_ranks() -> None:
    """DeepSeek-V3 on 64 ranks: 8 experts in at most 4 of 8 nodes."""
    free = Shape(1, 16, 8, 256, 8)
    limited = Shape(1, 16, 8, 256, 8, groups=8, topk_groups=4)
    assert model.distinct_ranks(free) > 5.2
    assert 3.5 < model.distinct_ranks(limited) < 4


sizes = st.integers(1, 1 << 14)
rates = st.floats(0.01, 1e5)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    groups = draw(st.integers(1, 16))
    return Shape(
        tokens=draw(sizes),
        hidden=draw(sizes),
        topk=draw(st.integers(1, 64)),
        experts=groups * draw(st.integers(1, 64)),
        ranks=draw(st.integers(1, 300)),
        fp8=draw(st.booleans()),
        expanded=draw(st.booleans()),
        groups=groups,
        topk_groups=draw(st.integers(1, groups)),
    )


@st.composite
def tables(draw: st.DrawFn) -> CopyRates:
    sms = sorted(draw(st.sets(st.integers(1, 200), min_size=1, max_size=5)))
    return CopyRates("drawn", tuple(Rate(n, *(draw(rates) for _ in range(4))) for n in sms))


@settings(deadline=None)
@given(shapes(), tables(), st.floats(1e-3, 1e6) | st.just(math.inf), st.integers(1, 200), st.integers(1, 16))
def test_num_sms_of_anything(shape: Shape, table: CopyRates, link: float, sms: int, sharing: int) -> None:
    machine = Machine("drawn", sms, table, link, sharing)
    for zero_copy in (False, True):
        chosen = model.num_sms(shape, machine, zero_copy=zero_copy)
        assert chosen % 2 == 0
        assert 4 <= chosen <= max(4, sms // sharing)


@settings(deadline=None)
@given(shapes(), tables(), st.floats(1e-3, 1e6))
def test_more_sms_are_never_slower_and_more_work_never_faster(shape: Shape, table: CopyRates, link: float) -> None:
    machine = Machine("drawn", 200, table, link)
    larger = Shape(**{**vars(shape), "tokens": shape.tokens + 1, "hidden": shape.hidden + 128})
    for make in (model.dispatch_phases, model.combine_phases):
        times = [model.operation_us(make(shape), machine, sms) for sms in (1, 4, 6, 20, 100, 200)]
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(times))
        assert model.operation_us(make(larger), machine, 8) >= model.operation_us(make(shape), machine, 8)


@given(st.floats(10, 2000), st.floats(1, 10))
def test_a_faster_link_never_takes_fewer_sms(link: float, factor: float) -> None:
    slow, fast = (Machine("x", 132, H200_RATES, rate) for rate in (link, link * factor))
    assert model.num_sms(V3, slow) <= model.num_sms(V3, fast)


def test_num_sms_is_where_the_link_takes_over() -> None:
    machine = Machine("NVIDIA H100", 132, H200_RATES, model.scale_up_rate("NVIDIA H100 80GB HBM3"))
    shape = Shape(**{**vars(V3), "ranks": 8})
    chosen = model.num_sms(shape, machine)
    linked = [*model.dispatch_phases(shape), *model.combine_phases(shape)]
    bounds = {
        sms: {model.predict(phase, machine, sms).bound for phase in linked if phase.link_bytes}
        for sms in (chosen - 2, chosen)
    }
    assert "SMs" in bounds[chosen - 2]
    assert bounds[chosen] == {"link"}


def test_best_direct_rows_trades_the_link_for_sms() -> None:
    assert model.best_direct_rows(V3, ALONE, 8) == 8
    slow = Machine("x", 132, H200_RATES, 20.0)
    assert model.best_direct_rows(V3, slow, 8) <= 1


def test_num_qps() -> None:
    assert model.num_qps(24) == 0
    assert model.num_qps(24, num_scaleout_ranks=4) == 24
    assert model.num_qps(24, num_scaleout_ranks=4, num_allocated=9) == 9


@pytest.mark.parametrize(
    ("gpu", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 360),
        ("NVIDIA H200", 360),
        ("NVIDIA H800", 160),
        ("NVIDIA B200", 720),
        ("NVIDIA GB200", 720),
    ],
)
def test_scale_up_rate_of_known_gpus(gpu: str, rate: float) -> None:
    assert model.scale_up_rate(gpu) == pytest.approx(rate)
    assert model.scale_up_rate(gpu, 123) == 123


@pytest.mark.parametrize("gpu", ["NVIDIA L4", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 NVL", ""])
def test_unknown_scale_up_rate_names_the_key(gpu: str) -> None:
    with pytest.raises(ValueError, match=r"^network.scale_up_gbytes_per_s = 'auto': .*set network.scale_up_gbytes"):
        model.scale_up_rate(gpu)
    assert model.scale_up_rate(gpu, 55.0) == 55.0


@pytest.mark.parametrize("rate", [0, -1, math.nan])
def test_a_rate_of_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"must be above 0"):
        model.scale_up_rate("NVIDIA H200", rate)
    with pytest.raises(ValueError, match=r"scale_up_gbytes_per_s = .*must be above 0"):
        Machine("x", 132, H200_RATES, rate)


def test_rates_between_and_beyond_the_points() -> None:
    assert H200_RATES.read(8) == 8 * 150
    assert H200_RATES.write(4) == 4 * 62
    assert 8 * 62 < H200_RATES.write(16) < 33 * 59
    assert H200_RATES.write(500) == 132 * 33
    assert H200_RATES.memory == 132 * 15 * 2


def test_override() -> None:
    changed = H200_RATES.override(read=300, write=31)
    assert (changed.read(8), changed.write(8)) == (8 * 300, 8 * 31)
    assert changed.memory == H200_RATES.memory
    assert H200_RATES.override() is H200_RATES
    assert changed.source == "built-in table of an H200, overridden"


@pytest.mark.parametrize(
    ("gpu", "nominal"), [("NVIDIA H100 80GB HBM3", 3.35), ("NVIDIA H800", 3.35), ("NVIDIA B200", 8.0), ("H20", 4.0)]
)
def test_memory_is_that_of_the_gpu(tmp_path: Path, gpu: str, nominal: float) -> None:
    rates = model.load_rates(gpu, tmp_path)
    assert rates.memory == pytest.approx(H200_RATES.memory * nominal / 4.8)
    assert rates.read(8) == H200_RATES.read(8)
    assert rates.source == f"built-in table of an H200, memory scaled from 4.8 to {nominal:g} TB/s"
    assert H200_RATES.override(memory=1000).memory == pytest.approx(1000)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 PCIe", "unheard of"])
def test_memory_of_an_unknown_gpu_is_an_h200s_and_says_so(tmp_path: Path, gpu: str) -> None:
    assert model.load_rates(gpu, tmp_path) is H200_RATES


def test_measured_rates_are_kept_by_gpu(tmp_path: Path) -> None:
    assert model.load_rates("NVIDIA H200", tmp_path) is H200_RATES
    points = (Rate(8, 140, 60, 50, 55), Rate(132, 34, 32, 15, 19))
    path = model.save_rates("NVIDIA H200", points, "2026-11-25", tmp_path)
    assert path.parent.parent == tmp_path
    assert model.load_rates("NVIDIA H200", tmp_path) == CopyRates("epv2 bench sm of 2026-11-25", points)
    assert model.load_rates("NVIDIA H100", tmp_path).source.startswith("built-in table of an H200")
    assert [file.name for file in path.parent.iterdir()] == ["NVIDIA_H200.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"version": 99, "date": "", "rates": []}),
        json.dumps({"version": 1, "date": "", "rates": []}),
        json.dumps({"version": 1, "date": "", "rates": [{"sms": 8}]}),
        json.dumps(
            {"version": 1, "date": "", "rates": [{"sms": 8, "read": 0, "write": 1, "copy": 1, "copy_twice": 1}]}
        ),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, text: str) -> None:
    path = model.rates_path("NVIDIA H200", tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"NVIDIA_H200.json: not a table of copy rates .*epv2 bench sm$"):
        model.load_rates("NVIDIA H200", tmp_path)


@pytest.mark.parametrize(
    "points",
    [(), (Rate(8, 1, 1, 1, 1), Rate(8, 1, 1, 1, 1)), (Rate(0, 1, 1, 1, 1),), (Rate(8, math.nan, 1, 1, 1),)],
)
def test_rates_are_checked(points: tuple[Rate, ...]) -> None:
    with pytest.raises(ValueError, match=r"^copy rates from here: "):
        CopyRates("here", points)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens = 0: must be 1 or more"),
        ({"groups": 7}, "groups = 7: must divide the 256 experts"),
        ({"groups": 4, "topk_groups": 5}, "topk_groups = 5: there are 4 groups"),
    ],
)
def test_shapes_are_checked(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Shape(**{**vars(V3), **change})


def test_a_link_that_is_the_memory_is_null_in_json() -> None:
    assert json.loads(json.dumps(model.as_dict(SHARED), allow_nan=False))["scale_up_gbytes_per_s"] is None
