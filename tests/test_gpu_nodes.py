"""Between nodes that one machine plays: the cases of the emulator's tests through NCCL's GIN and its host RMA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from epv2_plugin import environment
from epv2_plugin.emulation.cluster import Cluster
from tests import harness, test_cuda
from tests.test_runtime import ROOT

CLUSTERS = [(2, 1), (2, 2), (2, 4), (4, 2)]  # nodes x ranks of each


def run(cluster: tuple[int, int], backend: str, mode: str, seeds: Sequence[int], cases: int) -> list[tuple[str, ...]]:
    """(backend, mode, bytes over the network, those of direct mode) for each seed."""
    arguments = [backend, mode, ",".join(map(str, seeds)), str(cases)]
    said = emulate(cluster, "tests.nodes_ranks", arguments, 300 + 30 * len(seeds))
    found = re.findall(r"cases, (\w+), (\w+): (\d+) bytes, direct (\d+)", said)
    assert len(found) == len(seeds), said
    return found


def emulate(cluster: tuple[int, int], module: str, arguments: Sequence[str], seconds: float) -> str:
    """What the ranks of `module` said."""
    nodes, ranks = map(str, cluster)
    command = [sys.executable, "-m", "epv2_plugin.cli", "emulate", "--nodes", nodes, "--gpus-per-node", ranks]
    command += ["--sms", "4", "--", sys.executable, "-m", module, *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    harness.make_room()
    environment = {**os.environ, "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as started:
        try:
            said, errors = started.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            started.terminate()  # which ends the ranks, too
            said, errors = started.communicate(timeout=60)
    assert started.returncode == 0, said + errors
    return said


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_the_ranks_of_this_test_on_the_host_backend() -> None:
    assert run((2, 1), "host", "direct", [0, 1], 3) == [("host", "direct", "0", "0")] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["direct", "hybrid"])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda cluster: "x".join(map(str, cluster)))
def test_cases_between_emulated_nodes(cluster: tuple[int, int], mode: str) -> None:
    for backend, ran, network, direct in run(cluster, "cuda", mode, [0, 1, 2], 12):
        assert (backend, ran) == ("cuda", mode)
        assert 0 < int(network) <= int(direct)
        assert mode == "hybrid" or network == direct


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [(2, 1), (2, 2)], ids=lambda cluster: "x".join(map(str, cluster)))
def test_tables_between_emulated_nodes(cluster: tuple[int, int]) -> None:
    for backend, ran, network, direct in run(cluster, "cuda", "engram", [0, 1, 2], 8):
        assert (backend, ran) == ("cuda", "engram")
        assert 0 < int(network) == int(direct)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["direct", "hybrid"])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda cluster: "x".join(map(str, cluster)))
def test_twenty_seeds_of_chaos(cluster: tuple[int, int], mode: str) -> None:
    run(cluster, "cuda", mode, range(1, 21), 25 if cluster == (2, 2) else 5)  # 500 random cases, and 100 each


def on_a_node(rank: int, size: int, mode: str, work: Callable[..., Any], *args: Any) -> Any:
    """`work` of tests/test_cuda.py on one of two nodes. `epv2 emulate` ends all ranks when one is killed."""
    cluster = Cluster(2, size // 2, environment.find_gpus()["devices"])
    os.environ.update(cluster.environment(rank, environment.find_loopback()["path"], None, os.environ))
    return work(rank, size, *args, num_bytes=256 << 20, allow_hybrid_mode=mode == "hybrid")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["direct", "hybrid"])
def test_graph_replays(mode: str) -> None:
    harness.run(4, on_a_node, mode, test_cuda.replayed, 40, timeout=200)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["direct", "hybrid"])
def test_one_routing_after_the_other(mode: str) -> None:
    harness.run(4, on_a_node, mode, test_cuda.long_run, 500, timeout=300)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["direct", "hybrid"])
@pytest.mark.parametrize("how", ["never calls", "killed"])
def test_every_rank_reports_a_missing_one(mode: str, how: str) -> None:
    results = harness.outcomes(4, on_a_node, mode, test_cuda.missing, how, timeout=120)
    for rank in (0, 2, 3):
        assert results[rank].error == "", results[rank].error
        assert f"rank {rank}, waiting for rank" in results[rank].value


TRANSFERS = [
    "receives_first",
    "both_ways_at_once",
    "late_receiver",
    "large_and_small",
    "scatters",
    "begins_late",
    "slots_changed_after_their_wait",
    "shards",
]


def transferred(cluster: tuple[int, int], backend: str) -> list[str]:
    said = emulate(cluster, "tests.transfers_ranks", [backend], 300).splitlines()
    return [line.removesuffix(f" on {backend}") for line in said if line.endswith(f" on {backend}")]


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_transfers_of_this_test_on_the_host_backend() -> None:
    assert transferred((2, 2), "host") == TRANSFERS


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [(2, 1), (2, 2)], ids=lambda cluster: "x".join(map(str, cluster)))
def test_transfers_between_emulated_nodes(cluster: tuple[int, int]) -> None:
    assert transferred(cluster, "cuda") == TRANSFERS
