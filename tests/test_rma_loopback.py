"""The loopback plugin for NCCL: its transport between processes on a stand-in for the driver, and GIN kernels on a GPU.

What NCCL does with the plugin is done here by `tests/rma_ranks.py`, one process for each rank, on the plugin as it is
built. The stand-in (`tests/fakes/fake_gpu.cc`) moves data between processes, in the background.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from epv2_plugin.jit import compiler, toolchain
from tests.rma_ranks import INVALID_ARGUMENT, REMOTE_ERROR, SYSTEM_ERROR
from tests.test_emulator import network_sums
from tests.test_runtime import HEADERS, MISSING, ROOT

SEEDS = range(20)
SECONDS = 120


def _plugin() -> str:
    spec = importlib.util.find_spec("epv2_plugin._rma_loopback")
    assert spec is not None, "not built: python setup.py build_ext --inplace"
    assert spec.origin is not None
    return spec.origin


class FakeGpu:
    """The stand-in as a library, and ranks that find it instead of a driver."""

    def __init__(self, folder: Path):
        self._folder, self._runs = folder, 0
        library = folder / "gpu" / "libcuda.so.1"
        library.parent.mkdir()
        includes = [flag for header in HEADERS for flag in ("-isystem", str(header))]
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", *includes]
        source = ROOT / "tests" / "fakes" / "fake_gpu.cc"
        subprocess.run([*command, str(source), "-o", str(library), "-pthread"], check=True)
        self._env = {"LD_LIBRARY_PATH": str(library.parent), "PATH": os.environ["PATH"]}

    def run(self, case: str, size: int = 2, killed: Sequence[int] = (), **env: str) -> list[Any]:
        """What `case` of rma_ranks.py returned on each rank; `killed` ranks must have been. Nothing may be left."""
        self._runs += 1
        folder = self._folder / f"run{self._runs}"
        folder.mkdir()
        before = set(os.listdir("/dev/shm"))
        command = [sys.executable, "-X", "faulthandler", str(ROOT / "tests" / "rma_ranks.py"), case]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(folder), _plugin()],
                env={**self._env, **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            ended = [process.communicate(timeout=SECONDS) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        errors = {rank: stderr for rank, (_, stderr) in enumerate(ended) if ranks[rank].returncode}
        assert [rank for rank in errors if ranks[rank].returncode != -signal.SIGKILL] == [], errors
        assert list(errors) == list(killed)
        assert set(os.listdir("/dev/shm")) <= before
        assert not any(f"epv2-rma.{process.pid}." in Path("/proc/net/unix").read_text() for process in ranks)
        return [json.loads(stdout.splitlines()[-1]) for stdout, _ in ended if stdout]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> FakeGpu:
    if not HEADERS:
        pytest.skip(f"the loopback can't be built here: {MISSING}")
    return FakeGpu(tmp_path_factory.mktemp("loopback"))


@pytest.mark.parametrize("chaos", ["", "3"])
@pytest.mark.parametrize("size", [2, 3])
def test_puts_gets_and_signals(gpu: FakeGpu, size: int, chaos: str) -> None:
    assert gpu.run("moves", size, EPV2_RMA_CHAOS=chaos) == [{"left": [0, 0], "new descriptors": []}] * size


@pytest.mark.parametrize(("size", "chaos"), [(2, ""), (2, "1"), (13, "")])
def test_more_operations_than_places_and_more_ranks_than_a_socket_queues(gpu: FakeGpu, size: int, chaos: str) -> None:
    if size > 2:  # a queue of abstract sockets holds 10 notes
        assert gpu.run("moves", size) == [{"left": [0, 0], "new descriptors": []}] * size
    else:
        assert gpu.run("many", size, EPV2_RMA_CHAOS=chaos) == [0] * size


def test_without_chaos_everything_comes_in_order(gpu: FakeGpu) -> None:
    seen = gpu.run("order", SEEDS="-,-,-")[1]
    assert seen["weak before earlier bytes"] == seen["complete before it arrived"] == 0


def test_chaos_breaks_what_gin_does_not_promise_and_nothing_else(gpu: FakeGpu) -> None:
    seen = gpu.run("order", SEEDS=",".join(map(str, SEEDS)))[1]
    assert all(count > 0 for count in seen.values()), seen


@pytest.mark.parametrize("seed", [0, 7])
def test_random_traffic_under_chaos(gpu: FakeGpu, seed: int) -> None:
    assert gpu.run("stress", 3, SEEDS=str(seed)) == [0] * 3


def test_errors_say_what_is_wrong(gpu: FakeGpu) -> None:
    said = gpu.run("errors")[0]
    misuse = {name for name, text in said.items() if text[0] == INVALID_ARGUMENT}
    assert misuse == {"no memory", "rank", "context", "operation", "rail"}
    wanted = {
        "no memory": "target = 0: not a handle of registered memory",
        "rank": "rank 2: must be 0 or more and below 2",
        "context": "context 2: must be 0 or more and below 2",
        "host": "a put of 17 bytes from host memory: at most 16",
        "host end": "a put from byte 60 of host memory of 64 bytes",
        "request": "request 1 is none of this communicator's",
        "operation": "signal operation 3: must be 1 (increment) or 2 (add)",
        "rail": "rank 1 is not on the rail of rank 0: rail connections reach every 2. rank",
        "end of target": "put of rank 0 to rank 1, 8 bytes, refused: bytes 250 to 258 of region 0, which has 256 bytes",
        "end of source": "refused: bytes 1099511627776 to 1099511627784 of region 0, which has 256 bytes on rank 0",
        "not shared": "refused: region 1 of rank 0 is not shared between processes (cuMemExportToShareableHandle: CUDA",
        "end of get": "get of rank 0 from rank 1, 8 bytes, refused: bytes 252 to 260 of region 0",
        "end of signals": "refused: bytes 64 to 72 of region 1, which has 64 bytes on rank 1",
        "not registered": "refused: the target is region 98, which is not registered (any more) here",
    }
    assert {name: said[name][1] for name in wanted if wanted[name] not in said[name][1]} == {}
    assert said.keys() == wanted.keys()
    assert said["host"][0] == said["host end"][0] == SYSTEM_ERROR
    assert said["request"][0] == REMOTE_ERROR
    for name in ("end of target", "end of source", "not shared", "end of get", "end of signals", "not registered"):
        # A put to the other rank goes on where it was this rank's own that was refused.
        assert [said[name][0], said[name][2]] == [REMOTE_ERROR, 0 if name == "end of get" else REMOTE_ERROR], name


def test_a_driver_that_fails_on_one_rank_is_an_error_on_all(gpu: FakeGpu) -> None:
    first, second = gpu.run("driver")
    for name in (
        "cuMemHostRegister",
        "cuStreamCreateWithPriority",
        "cuMemImportFromShareableHandle",
        "cuMemMap",
        "cuMemSetAccess",
    ):
        assert first[name][0] == second[name][0] == SYSTEM_ERROR
        assert f"can't take part: {name}" in first[name][1]
        assert name in second[name][1]
        assert "CUDA_ERROR_OUT_OF_MEMORY (in words)" in second[name][1]
    assert first["at work"][0] == REMOTE_ERROR
    assert "rank 1 can't go on: cuMemcpyBatchAsync: CUDA_ERROR_OUT_OF_MEMORY" in first["at work"][1]
    assert (first["failed"], second["failed"]) == (False, True)


def test_death_of_a_rank_is_noticed(gpu: FakeGpu) -> None:
    for result in gpu.run("death", 3, killed=[1]):
        assert result["seconds"] < 5
        for what in ("put", "register"):
            assert result[what][0] in (SYSTEM_ERROR, REMOTE_ERROR)
            assert "rank 1 (process " in result[what][1]
            assert "has died" in result[what][1]
        assert sum("operations on it fail from now on" in line for line in result["said"]) == 1


@pytest.mark.parametrize("how", ["closes", "ends"])
def test_a_rank_that_leaves_in_order_is_not_dead(gpu: FakeGpu, how: str) -> None:
    result = gpu.run("leave", HOW=how)[0]
    assert result["failed"] is False
    assert result["put"][0] in (SYSTEM_ERROR, REMOTE_ERROR)
    assert "has closed the communicator" in result["put"][1]


def test_a_seed_must_be_a_number(gpu: FakeGpu) -> None:
    command = [sys.executable, str(ROOT / "tests" / "rma_ranks.py"), "leave", "0", "1", "/nowhere", _plugin()]
    for value in ("abc", "-1", "1.5", "99999999999999999999"):
        run = subprocess.run(
            command, env={**gpu._env, "EPV2_RMA_CHAOS": value}, capture_output=True, text=True, timeout=SECONDS
        )
        assert f"init: EPV2_RMA_CHAOS = {value}: must be a whole number of 0 or more" in run.stderr


def test_without_a_driver_the_plugin_says_so() -> None:
    if not HEADERS:
        pytest.skip(f"the loopback can't be built here: {MISSING}")
    command = [sys.executable, str(ROOT / "tests" / "rma_ranks.py"), "leave", "0", "1", "/nowhere", _plugin()]
    run = subprocess.run(command, env={}, capture_output=True, text=True, timeout=SECONDS)
    assert "libcuda.so.1: cannot open shared object file" in run.stderr


# ---- on a GPU --------------------------------------------------------------------------------------------------------


GIN, NETWORK = "rma_gin.cu", "emulator/kernels/network.cu"  # NCCL's calls, and the plugin's over them


def _compile_gin(folder: Path, arch: str, source: str) -> Path:
    cubin = folder / "gin.cubin"
    command = [str(toolchain.find_nvcc().path), "-ccbin", str(toolchain.find_gxx().path), "-std=c++20", "-cubin"]
    command += [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}", f"-I{toolchain.find_nccl().include}"]
    command += [f"-I{ROOT / 'csrc' / 'kernels'}", f"-I{ROOT / 'tests'}", str(ROOT / "tests" / source)]
    run = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return cubin


def _cubin(factory: pytest.TempPathFactory, source: str) -> Path:
    import torch

    arch = compiler.device_arch(*torch.cuda.get_device_capability())
    return _compile_gin(factory.mktemp("gin"), arch, source)


@pytest.fixture(scope="module")
def gin_cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _cubin(tmp_path_factory, GIN)


@pytest.fixture(scope="module")
def network_cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _cubin(tmp_path_factory, NETWORK)


def _emulate(
    folder: Path, nodes: int, ranks: int, options: list[str], script: str, cubin: Path, *arguments: object
) -> list[Any]:
    """What the ranks of a script wrote; `options` of `epv2 emulate`."""
    folder.mkdir(exist_ok=True)
    cluster = ["--nodes", str(nodes), "--gpus-per-node", str(ranks), "--sms", "1", *options]
    worker = [sys.executable, str(ROOT / "tests" / script), str(folder), str(cubin), *map(str, arguments)]
    command = [sys.executable, "-m", "epv2_plugin.cli", "emulate", *cluster, "--", *worker]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(nodes * ranks)]


@pytest.mark.parametrize("source", [GIN, NETWORK])
def test_kernels_for_a_gpu_compile(tmp_path: Path, source: str) -> None:
    try:
        toolchain.find_nvcc(), toolchain.find_gxx(), toolchain.find_nccl()
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))
    assert _compile_gin(tmp_path, "sm_90a", source).stat().st_size > 0


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize(("nodes", "ranks"), [(2, 1), (2, 2)])
def test_gin_between_emulated_nodes(tmp_path: Path, gin_cubin: Path, nodes: int, ranks: int, seed: int | None) -> None:
    options = [] if seed is None else ["--chaos", str(seed)]
    for report in _emulate(tmp_path, nodes, ranks, options, "rma_gin.py", gin_cubin, 10, 0):
        assert report["wrong"] == [0, 0, 0]
        assert report["error"] == ""
        found = report["properties"]
        assert (found["gin_type"], found["n_lsa_teams"], found["lsa_size"]) == ("proxy", nodes, ranks)


@pytest.mark.gpu
def test_chaos_finds_a_signal_that_is_too_weak(tmp_path: Path, gin_cubin: Path) -> None:
    """A kernel that would break on a network, and does not in order: 2 of 3 seeds must show it."""
    wrong = [
        sum(
            report["wrong"][0]
            for report in _emulate(tmp_path / seed, 2, 1, ["--chaos", seed], "rma_gin.py", gin_cubin, 10, 1)
        )
        for seed in ("1", "2", "3")
    ]
    assert sum(count > 0 for count in wrong) >= 2, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("rail", [False, True])
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize(("nodes", "ranks"), [(2, 1), (2, 2)])
def test_network_of_kernels_between_emulated_nodes(
    tmp_path: Path, network_cubin: Path, nodes: int, ranks: int, seed: int | None, rail: bool
) -> None:
    """The kernel with which the emulator's network is tested, on NCCL's."""
    options = [] if seed is None else ["--chaos", str(seed)]
    reports = _emulate(tmp_path, nodes, ranks, options, "network_ranks.py", network_cubin, int(rail))
    assert reports == [network_sums(rank, nodes * ranks, rail) for rank in range(nodes * ranks)]
