"""The model across nodes: every count against plain enumeration, published figures, and the window for many ranks."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin.elastic import model, sizing
from epv2_plugin.elastic.model import H200_RATES, Machine, Mode, Phase, Shape, Topology
from epv2_plugin.elastic.sizing import Nodes, WindowLayout
from epv2_plugin.planning.plan import expert_slots

V3 = Shape(tokens=4096, hidden=7168, topk=8, experts=256, ranks=64, fp8=True)
H100 = Machine("H100", 132, H200_RATES, 360.0, nic_gbytes_per_s=45.0)
H800 = replace(H100, gpu="H800", scale_up_gbytes_per_s=160.0)
GIB = 1 << 30


# ---- bytes ----------------------------------------------------------------------------------------------------------


def routings(shape: Shape) -> list[tuple[int, ...]]:
    """Every choice of experts that a token may make, as often as it is made."""
    size = shape.experts // shape.groups
    found = []
    for chosen in itertools.combinations(range(shape.groups), shape.topk_groups):
        available = [e for e in range(shape.experts) if e // size in chosen]
        found += itertools.combinations(available, min(shape.topk, len(available)))
    return found


def count_rows(shape: Shape, place: Topology, tokens: list[tuple[int, ...]]) -> Counter[str]:
    """Rows that move, each followed from its source rank to its experts and back; every rank routes all `tokens`."""
    per_rank, gpus = shape.experts // shape.ranks, place.gpus_per_node
    seen: Counter[str] = Counter()
    for source, experts in itertools.product(range(shape.ranks), tokens):
        node, rail = divmod(source, gpus)
        ranks = {expert // per_rank for expert in experts}
        nodes = {rank // gpus for rank in ranks}
        seen["experts"] += len(experts)
        seen["pairs"] += len(ranks)
        seen["direct network"] += sum(rank // gpus != node for rank in ranks)
        seen["direct link"] += sum(rank // gpus == node and rank != source for rank in ranks)
        seen["hybrid network"] += len(nodes - {node})
        # A row lies on the rail of its source in every node that it went to.
        seen["hybrid link"] += sum(rank % gpus != rail for rank in ranks)
        far = [rank for rank in ranks if rank // gpus != node]
        seen["node sum reads"] += len(far)
        seen["node sum link"] += sum(rank % gpus != rail for rank in far)
        seen["last reads"] += len(ranks) - len(far) + len(nodes - {node})
        seen["last link"] += sum(rank // gpus == node and rank != source for rank in ranks)
    return seen


PLACES = [
    (8, 2, 2, 2, 1, 1),
    (8, 2, 2, 3, 4, 2),  # a rank has one group
    (8, 2, 2, 3, 2, 1),  # a node is a group
    (12, 3, 2, 3, 3, 2),
    (12, 2, 3, 4, 1, 1),
    (12, 3, 1, 3, 1, 1),  # one GPU a node
    (8, 4, 2, 5, 1, 1),
]


@pytest.mark.parametrize(("experts", "nodes", "gpus", "topk", "groups", "topk_groups"), PLACES)
@pytest.mark.parametrize("expanded", [True, False])
def test_bytes_of_every_routing(
    experts: int, nodes: int, gpus: int, topk: int, groups: int, topk_groups: int, expanded: bool
) -> None:
    place = Topology(nodes, gpus)
    shape = Shape(
        1, 256, topk, experts, place.ranks, fp8=True, groups=groups, topk_groups=topk_groups, expanded=expanded
    )
    tokens = routings(shape)
    shape = replace(shape, tokens=len(tokens))
    total = count_rows(shape, place, tokens)
    rows = {name: count / shape.ranks for name, count in total.items()}  # of a rank

    def close(phase: Phase, row: int, **expected: float) -> None:
        seen = {f"{name}_bytes": getattr(phase, f"{name}_bytes") for name in expected}
        assert seen == {f"{name}_bytes": pytest.approx(count * row) for name, count in expected.items()}, phase.name

    held = rows["experts"] if expanded else rows["pairs"]
    for mode in ("direct", "hybrid"):
        dispatch, combine = model.cluster_phases(shape, place, mode)
        assert [phase.name for phase in dispatch] == ["stage", "counts", "pull"]
        network, link = rows[f"{mode} network"], rows[f"{mode} link"]
        close(dispatch[-1], shape.dispatch_row, read=rows["pairs"], write=held, link=link, nic=network)
        local, last, row = combine[0], combine[-1], shape.row
        sent = rows[f"{mode} network"]
        close(local, row, read=held, write=rows["pairs"], link=0, nic=sent if mode == "direct" else 0)
        if mode == "direct":
            close(last, row, read=rows["pairs"], write=shape.tokens, link=link, nic=0)
            continue
        summed = {"read": rows["node sum reads"], "link": rows["node sum link"]}
        close(combine[1], row, **summed, write=sent, nic=sent)
        close(last, row, read=rows["last reads"], write=shape.tokens, link=rows["last link"], nic=0)
        assert dispatch[1].nic_messages == 2 * place.network_peers(mode) == 2 * (nodes - 1)
    assert model.distinct_nodes(shape, nodes) == pytest.approx(
        sum(len({e * nodes // experts for e in token}) for token in tokens) / len(tokens)
    )


def test_one_node_is_the_model_of_a_node() -> None:
    shape = replace(V3, ranks=8)
    for mode in ("direct", "hybrid"):
        phases = model.cluster_phases(shape, Topology(1, 8), mode)
        assert phases == (model.dispatch_phases(shape), model.combine_phases(shape))
    (choice,) = model.choices(shape, Topology(1, 8), H100)
    assert choice.mode == "direct"
    assert choice.dispatch.us == model.operation_us(model.dispatch_phases(shape), H100, choice.num_sms)


def test_copies_of_experts_count_nearly_as_experts_of_their_own() -> None:
    """EP2048 with 8 copies of 256 experts: a token that takes a copy at random reaches as many ranks and nodes."""
    draw = random.Random(5)
    ranks, nodes = 0, 0
    for _ in range(20000):
        places = {expert + 256 * draw.randrange(8) for expert in draw.sample(range(256), 8)}
        ranks += len(places)
        nodes += len({place // 8 for place in places})
    shape = replace(V3, experts=expert_slots(256, 2048, 1), ranks=2048)
    assert shape.experts == 2048
    assert model.distinct_ranks(shape) == pytest.approx(ranks / 20000, rel=0.005)
    assert model.distinct_nodes(shape, 256) == pytest.approx(nodes / 20000, rel=0.005)


@pytest.mark.parametrize(
    ("experts", "ranks", "groups", "slots"), [(256, 64, 8, 256), (256, 320, 1, 320), (256, 96, 8, 288), (16, 12, 1, 24)]
)
def test_expert_slots(experts: int, ranks: int, groups: int, slots: int) -> None:
    assert expert_slots(experts, ranks, groups) == slots


@pytest.mark.parametrize(("place", "mode"), [(Topology(4, 8), "direct"), (Topology(8, 8), "railed")])
def test_what_does_not_fit_is_refused(place: Topology, mode: Mode) -> None:
    with pytest.raises(ValueError, match=r"^(ranks = 64: 4 x 8 ranks are meant|mode = 'railed': must be one of .*)$"):
        model.cluster_phases(V3, place, mode)
    with pytest.raises(ValueError, match=r"^nodes = 0: must be 1 or more$"):
        Topology(0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nic_gbytes_per_s": 0}, "nic_gbytes_per_s = 0: must be above 0"),
        ({"nic_messages_per_us": -1}, "nic_messages_per_us = -1: must be above 0"),
        ({"network_us": -1}, "network_us = -1: must be 0 or more"),
        ({"overhead_us": math.nan}, "overhead_us = nan: must be 0 or more"),
    ],
)
def test_machines_are_checked(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(H100, **change)


# ---- time -----------------------------------------------------------------------------------------------------------

# What DeepEP's users see: GB/s of rows once per token and node, the own node's included, for dispatch (FP8) and combine
# (BF16). Its table names SM90 for V2 (8192 tokens, taken as H100) and H800 for V1 (4096 tokens, groups = nodes, 4 of
# them at most); the NIC is a CX7 of 400 Gbit/s. V2's SMs; V1 held 20 to 24.
PUBLISHED = [
    ("V2 8x2", H100, 8192, 2, 1, 12, (90, 81)),
    ("V2 8x4", H100, 8192, 4, 1, 6, (61, 61)),
    ("V1 8x2", H800, 4096, 2, 1, 20, (43, 43)),
    ("V1 8x4", H800, 4096, 4, 1, 20, (58, 57)),
    ("V1 8x8", H800, 4096, 8, 8, 20, (51, 50)),
]
TOLERANCE = 0.25


@pytest.mark.parametrize(("name", "machine", "tokens", "nodes", "groups", "sms", "published"), PUBLISHED)
def test_published_rates(
    name: str, machine: Machine, tokens: int, nodes: int, groups: int, sms: int, published: tuple[float, float]
) -> None:
    del name
    limit = min(4, groups)
    shape = replace(V3, tokens=tokens, ranks=8 * nodes, groups=groups, topk_groups=limit)
    best = model.choices(shape, Topology(nodes, 8), machine, sms)[0]
    assert best.mode == "hybrid"
    rows = tokens * model.distinct_nodes(shape, nodes)
    predicted = (rows * shape.dispatch_row / best.dispatch.us / 1e3, rows * shape.row / best.combine.us / 1e3)
    assert predicted == pytest.approx(published, rel=TOLERANCE)


@pytest.mark.parametrize(("nodes", "published"), [(2, 12), (4, 6)])
def test_published_sms(nodes: int, published: int) -> None:
    """DeepEP V2's own choices. Within two: the model counts in steps of two and takes the copy rates of an H200."""
    shape = replace(V3, tokens=8192, ranks=8 * nodes)
    chosen = model.choices(shape, Topology(nodes, 8), H100)[0]
    assert abs(chosen.num_sms - published) <= 2


def test_the_nic_works_beside_the_phases() -> None:
    place = Topology(8, 8)
    dispatch, _ = model.cluster_phases(V3, place, "hybrid")
    done = model.operation(dispatch, H100, 8)
    overhead = model.OVERHEAD_US + model.NETWORK_US
    assert done.bound == "NIC"
    assert done.us == pytest.approx(overhead + sum(phase.nic_us for phase in done.phases))
    fast = model.operation(dispatch, replace(H100, nic_gbytes_per_s=math.inf), 8)
    assert fast.bound == "SMs"
    assert fast.us == pytest.approx(overhead + sum(phase.us for phase in fast.phases))


def test_what_the_nic_sends_is_read_and_what_comes_is_written() -> None:
    sent = model.predict(Phase("x", 0, 0, nic_bytes=1e6), H100, 8)
    assert sent.memory_us == pytest.approx(2e6 / H200_RATES.memory / 1e3)
    assert sent.nic_us == pytest.approx(1e6 / 45 / 1e3)
    assert (sent.sm_us, sent.link_us, sent.us) == (0, 0, sent.memory_us)


def test_messages_bind_where_a_proxy_posts_them() -> None:
    place = Topology(256, 8)
    shape = replace(V3, experts=2048, ranks=2048)
    dispatch, _ = model.cluster_phases(shape, place, "direct")
    proxy = replace(H100, nic_messages_per_us=0.5)
    counts, pull = model.operation(dispatch, proxy, 8).phases[1:]
    assert counts.nic_us == pytest.approx(2 * 2040 / 0.5)
    assert pull.nic_us == pytest.approx((dispatch[-1].nic_bytes / shape.dispatch_row + 2040) / 0.5)


def test_hybrid_wins_where_nodes_share_rows_and_direct_where_they_do_not() -> None:
    assert model.choices(V3, Topology(8, 8), H100)[0].mode == "hybrid"
    # One GPU a node: both send the same, and hybrid sums once more for nothing.
    assert model.choices(V3, Topology(64, 1), replace(H100, nic_gbytes_per_s=400.0))[0].mode == "direct"


def test_the_group_limit_caps_the_rows_on_the_network() -> None:
    """DeepSeek-V3 on 8 nodes: at most 4 of them, so at most 4 rows for 8 experts."""
    limited = replace(V3, groups=8, topk_groups=4)
    rows = []
    for shape in (V3, limited):
        dispatch, _ = model.cluster_phases(shape, Topology(8, 8), "hybrid")
        rows.append(dispatch[-1].nic_bytes / shape.dispatch_row / shape.tokens)
    assert rows[1] < 7 / 8 * 4 < rows[0]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Shape, Topology, Machine]:
    place = Topology(draw(st.integers(1, 40)), draw(st.integers(1, 16)))
    groups = draw(st.integers(1, 8))
    shape = Shape(
        tokens=draw(st.integers(1, 1 << 14)),
        hidden=draw(st.integers(1, 1 << 14)),
        topk=draw(st.integers(1, 32)),
        experts=groups * draw(st.integers(1, 64)),
        ranks=place.ranks,
        fp8=draw(st.booleans()),
        expanded=draw(st.booleans()),
        groups=groups,
        topk_groups=draw(st.integers(1, groups)),
    )
    rates = st.floats(0.01, 1e5)
    machine = replace(
        H100,
        scale_up_gbytes_per_s=draw(rates | st.just(math.inf)),
        nic_gbytes_per_s=draw(rates | st.just(math.inf)),
        nic_messages_per_us=draw(st.floats(1e-3, 1e4)),
    )
    return shape, place, machine


@settings(deadline=None)
@given(clusters(), st.floats(1, 100))
def test_any_cluster(cluster: tuple[Shape, Topology, Machine], factor: float) -> None:
    """Never an error; the faster mode first; a faster NIC, and more SMs, never slower; hybrid never sends more."""
    shape, place, machine = cluster
    found = model.choices(shape, place, machine)
    assert [choice.us for choice in found] == sorted(choice.us for choice in found)
    assert all(choice.num_sms % 2 == 0 and 4 <= choice.num_sms <= 132 for choice in found)
    faster = replace(machine, nic_gbytes_per_s=machine.nic_gbytes_per_s * factor)
    slack = 1 + 1e-12
    assert model.choices(shape, place, faster, 8)[0].us <= model.choices(shape, place, machine, 8)[0].us * slack
    assert model.choices(shape, place, machine, 16)[0].us <= model.choices(shape, place, machine, 8)[0].us * slack
    direct, hybrid = (model.cluster_phases(shape, place, mode) for mode in ("direct", "hybrid"))
    for one, other in zip(direct, hybrid, strict=True):
        assert sum(phase.nic_bytes for phase in other) <= sum(phase.nic_bytes for phase in one) * slack


# ---- window ---------------------------------------------------------------------------------------------------------


def window(ranks: int, mode: str, gpus: int = 8, factor: float = sizing.CAPACITY_FACTOR) -> WindowLayout:
    """DeepSeek-V3's shape: hidden 7168, top-8, 4096 tokens."""
    nodes = Nodes(ranks, min(gpus, ranks), mode == "hybrid", factor)
    return WindowLayout(nodes, 4096, 7168, 8, use_fp8_dispatch=True)


@pytest.mark.parametrize(("mode", "most"), [("direct", 2.4), ("hybrid", 3.2)])
def test_deepseek_v3_on_2048_ranks_fits(mode: str, most: float) -> None:
    planned = window(2048, mode)
    assert planned.num_bytes < most * GIB
    assert planned.sections()["metadata"] < 32 << 20
    assert window(2048, mode, gpus=2048).num_bytes > 100 * GIB  # a slot for each token of each rank


@pytest.mark.parametrize("mode", ["direct", "hybrid"])
def test_buffers_and_metadata_grow_slower_than_the_ranks(mode: str) -> None:
    windows = [window(ranks, mode) for ranks in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)]
    for small, large in itertools.pairwise(windows):
        assert large.num_bytes < 1.6 * small.num_bytes
    # With more nodes than a token has experts there is nothing left to grow but flags and counts.
    assert windows[-2].num_bytes < 1.05 * windows[3].num_bytes


def test_small_groups_have_room_for_the_worst_case() -> None:
    for ranks, gpus in ((4, 2), (8, 4), (16, 8)):
        for hybrid in (False, True):
            nodes = Nodes(ranks, gpus, hybrid)
            assert nodes.arrivals(100, 1) == 100 * (1 if hybrid else gpus)
            assert nodes.remote_rows(100, 1) == 100 * gpus
    large = Nodes(64, 8)
    assert (large.arrivals(100, 8), large.arrivals(100, 2)) == (1200, 800)
    assert Nodes(64, 8, capacity_factor=3.0).arrivals(100, 8) == 2400
    assert Nodes(8, 8).arrivals(100, 8) == Nodes(8, 8).returns(8) == 0


def test_returned_rows_never_overflow() -> None:
    """A row that comes back has a place for each top-k position, or (hybrid) for as many nodes as there are."""
    assert Nodes(2048, 8, hybrid=True).returns(8) == 8
    assert Nodes(16, 8, hybrid=True).returns(8) == 1
    assert Nodes(32, 8).returns(8) == 8


@pytest.mark.parametrize("factor", [0.99, math.nan, math.inf])
def test_capacity_is_checked(factor: float) -> None:
    with pytest.raises(ValueError, match=r"^capacity_factor = .*: must be 1 or more$"):
        window(64, "hybrid", factor=factor)
