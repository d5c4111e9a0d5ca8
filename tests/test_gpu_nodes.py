"""Expert parallelism between nodes that one machine plays: the cases of the emulator's tests through NCCL's GIN."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.test_runtime import ROOT

CLUSTERS = [(2, 1), (2, 2), (2, 4), (4, 2)]  # nodes x ranks of each


def run(cluster: tuple[int, int], backend: str, mode: str, seed: int | None, cases: int) -> re.Match[str]:
    nodes, ranks = map(str, cluster)
    options = [] if seed is None else ["--chaos", str(seed)]
    command = [sys.executable, "-m", "epv2_plugin.cli", "emulate", "--nodes", nodes, "--gpus-per-node", ranks, *options]
    command += [
        "--sms",
        "4",
        "--",
        sys.executable,
        "-m",
        "tests.nodes_ranks",
        backend,
        mode,
        str(seed or 0),
        str(cases),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"cases, (\w+), (\w+): (\d+) bytes, direct (\d+)", done.stdout)
    assert found is not None, done.stdout
    return found


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_the_ranks_of_this_test_on_the_host_backend() -> None:
    assert run((2, 2), "host", "direct", None, 6).groups() == ("host", "direct", "0", "0")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["direct", "hybrid"])
@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_cases_between_emulated_nodes(cluster: tuple[int, int], mode: str, seed: int | None) -> None:
    backend, ran, network, direct = run(cluster, "cuda", mode, seed, 12).groups()
    assert (backend, ran) == ("cuda", mode)
    assert 0 < int(network) <= int(direct)
    assert mode == "hybrid" or network == direct


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["direct", "hybrid"])
def test_twenty_seeds_of_chaos(mode: str) -> None:
    for seed in range(1, 21):
        run((2, 2), "cuda", mode, seed, 25)
