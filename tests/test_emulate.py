"""`epv2 emulate`: which node and GPU each rank gets, MPS for as long as ranks run, real ranks on the host backend."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from epv2_plugin import environment
from epv2_plugin.cli import main
from epv2_plugin.config import ConfigError
from epv2_plugin.emulation import cluster, mps
from epv2_plugin.emulation.cluster import Cluster
from tests.test_runtime import ROOT

EMULATE = [sys.executable, "-m", "epv2_plugin.cli", "emulate"]
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def gpus(count: int, sms: int = 132) -> list[dict[str, Any]]:
    return [{"index": index, "name": "NVIDIA H200", "sms": sms} for index in range(count)]


# ---- where ranks are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "ranks", "count", "ranks_per_gpu", "visible"),
    [
        (2, 1, 1, 2, [None, None]),
        (2, 4, 1, 8, [None] * 8),
        (1, 4, 4, 1, [None] * 4),
        (2, 2, 2, 2, ["0", "0", "1", "1"]),
        (2, 4, 8, 1, ["0,1,2,3"] * 4 + ["4,5,6,7"] * 4),
        (2, 2, 5, 1, ["0,1", "0,1", "2,3", "2,3"]),
        (4, 2, 2, 4, [None] * 8),
        (2, 3, 4, 2, ["0,1"] * 3 + ["2,3"] * 3),
    ],
)
def test_nodes_get_their_share_of_the_gpus(
    nodes: int, ranks: int, count: int, ranks_per_gpu: int, visible: list[str | None]
) -> None:
    made = Cluster(nodes, ranks, gpus(count))
    assert made.ranks_per_gpu == ranks_per_gpu
    variables = [made.environment(rank, "/loopback.so", None, {}) for rank in range(made.ranks)]
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in variables] == visible
    for rank, each in enumerate(variables):
        node = f"node{rank // ranks}"
        assert (each["EPV2_NODE"], each["NCCL_HOSTID"]) == (node, node)
        assert (each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"]) == (str(rank % ranks), str(ranks))
        assert each.get("NCCL_MAX_CTAS") == (str(32 // ranks_per_gpu) if ranks_per_gpu > 1 else None)
        assert each["CUDA_DEVICE_MAX_CONNECTIONS"] == str(min(32, 96 // (2 * ranks_per_gpu)))
        assert each["NCCL_RMA_PLUGIN"] == "/loopback.so"
        assert each["NCCL_GIN_TYPE"] == "2"
        assert "EPV2_RMA_CHAOS" not in each


def test_what_the_user_has_set_wins_where_it_may() -> None:
    made = Cluster(2, 2, gpus(2))
    given = {"NCCL_MAX_CTAS": "3", "NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "5,7", "NCCL_RMA_PLUGIN": "other"}
    found = made.environment(2, "/loopback.so", 9, given)
    assert [found[name] for name in given] == ["3", "INFO", "7", "/loopback.so"]
    assert found["EPV2_RMA_CHAOS"] == "9"


def test_without_a_gpu_nothing_is_said_to_nccl() -> None:
    found = Cluster(2, 2, []).environment(3, "/loopback.so", 5, {})
    assert found["EPV2_NODE"] == "node1"
    assert not [name for name in found if "NCCL" in name or "CHAOS" in name]


def test_sms_must_fit() -> None:
    made = Cluster(2, 4, gpus(1))
    made.check_sms("my.yaml", "sm_budget.expert", 16)
    with pytest.raises(ConfigError) as error:
        made.check_sms("my.yaml", "sm_budget.expert", 17)
    allowed = "8 ranks share a GPU of 132 SMs: at most 16 each"
    assert str(error.value) == f"my.yaml: sm_budget.expert = 17: {allowed}"
    Cluster(2, 4, []).check_sms("my.yaml", "sm_budget.expert", 17)
    assert Cluster(1, 1, [*gpus(1), *gpus(1, sms=78)]).sms == 78


def test_nccl_takes_short_paths_only() -> None:
    cluster.check_path("/" + 253 * "a")
    with pytest.raises(ConfigError, match="255 characters, and NCCL takes at most 254"):
        cluster.check_path("/" + 254 * "a")


# ---- MPS -------------------------------------------------------------------------------------------------------------

CONTROL = """#!{python}
import os, signal, subprocess, sys
pid_file = os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/nvidia-cuda-mps-control.pid"
assert "LD_PRELOAD" not in os.environ
mode = "{mode}"
if "-d" in sys.argv:
    if mode == "refuses":
        sys.exit("no permission")
    daemon = subprocess.Popen(["sleep", "100"], start_new_session=True, stdin=-3, stdout=-3, stderr=-3)
    open(pid_file, "w").write(str(daemon.pid))
    open("{log}", "a").write("started ")
elif sys.stdin.read().startswith("quit") and mode != "stubborn":
    os.kill(int(open(pid_file).read()), signal.SIGTERM)
    open("{log}", "a").write("quit ")
"""


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`control(mode)`: a stand-in for NVIDIA's program on PATH, and the file that it writes to."""

    def make(mode: str) -> Path:
        log, program = tmp_path / "log", tmp_path / mps.PROGRAM
        program.write_text(CONTROL.format(python=sys.executable, mode=mode, log=log))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "none"))
        monkeypatch.setenv("LD_PRELOAD", "")
        return log

    return make


def test_mps_is_started_and_ended(control: Any) -> None:
    log = control("works")
    with mps.served(True) as (what, variables):
        folder = Path(variables["CUDA_MPS_PIPE_DIRECTORY"])
        daemon = int((folder / "nvidia-cuda-mps-control.pid").read_text())
        assert what == f"daemon {daemon}, started in {folder} and ended with the ranks"
        assert mps.runs(daemon)
        assert len(str(folder)) < 60
    assert log.read_text() == "started quit "
    assert not folder.exists()
    assert not mps.runs(daemon)


def test_mps_that_does_not_quit_is_killed(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    control("stubborn")
    monkeypatch.setattr(mps, "SECONDS", 1)
    with contextlib.suppress(KeyError), mps.served(True) as (_, variables):
        daemon = int((Path(variables["CUDA_MPS_PIPE_DIRECTORY"]) / "nvidia-cuda-mps-control.pid").read_text())
        raise KeyError("of a rank")
    assert not mps.runs(daemon)


def test_mps_that_can_not_be_had_is_said(control: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    control("refuses")
    with mps.served(True) as (what, variables):
        assert what.startswith("none, as nvidia-cuda-mps-control -d failed (no permission); ranks take turns")
        assert variables == {}
    monkeypatch.setenv("PATH", "/nowhere")
    with mps.served(True) as (what, variables):
        assert what.startswith("none, as there is no nvidia-cuda-mps-control on PATH; ranks take turns")
        assert variables == {}


def test_mps_of_somebody_else_is_left_alone(control: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = control("works")
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text("1\n")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with mps.served(True) as (what, variables):
        assert (what, variables) == (f"daemon 1 in {tmp_path}, which was there before and stays", {})
    with mps.served(False) as (what, variables):
        assert (what, variables) == ("none, as no two ranks share a GPU", {})
    assert not log.exists()


# ---- the command -----------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys
import torch.distributed as dist
from epv2_plugin import ElasticBuffer

dist.init_process_group("gloo")
buffer = ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=8, hidden=16, num_topk=1)
seen = buffer.get_physical_domain_size(), buffer.get_logical_domain_size(), buffer.describe()["backend"]
place = [int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
node = ElasticBuffer(groups[dist.get_rank() // 2], num_max_tokens_per_rank=8, hidden=16, num_topk=1)
print(json.dumps([place, seen, node.get_physical_domain_size()]), file=open(f"{sys.argv[1]}/{place[0]}", "w"))
"""


def test_ranks_see_the_nodes_they_play(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    options = ["--nodes", "2", "--gpus-per-node", "2", "--chaos", "3", "--sms", "500"]
    command = [*EMULATE, *options, "--", sys.executable, str(tmp_path / "worker.py"), str(tmp_path)]
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for rank in range(4):
        place, seen, node = json.loads((tmp_path / str(rank)).read_text())
        assert place == [rank, rank % 2, 4, 2]
        assert seen == [[2, 2], [1, 4], "host"]  # one hop: the host backend has no other mode
        assert node == [1, 2]
    assert run.stderr.splitlines()[:3] == [
        "epv2 emulate: 2 nodes x 2 ranks on the CPU, as there is no usable GPU: host backend over gloo",
        "epv2 emulate: network: gloo between all ranks, --chaos changes nothing; EPV2_NODE=node0 to node1",
        "epv2 emulate: MPS: none, as no two ranks share a GPU",
    ]


def test_what_ranks_on_a_gpu_are_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "find_gpus", lambda: {"devices": gpus(1)})
    monkeypatch.setattr(environment, "find_loopback", lambda: {"path": "/the/loopback.so"})
    monkeypatch.setattr(mps, "PROGRAM", "no-such-program")
    (tmp_path / "config.yaml").write_text("sm_budget: {expert: 12, pipeline: 4}\n")
    script = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['RANK'], 'w'))"
    words = [
        "emulate",
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--chaos",
        "3",
        "--config",
        str(tmp_path / "config.yaml"),
    ]
    assert main([*words, "--", sys.executable, "-c", script, f"{tmp_path}/rank"]) == 0
    for rank in range(8):
        found = json.loads((tmp_path / f"rank{rank}").read_text())
        wanted = Cluster(2, 4, gpus(1)).environment(rank, "/the/loopback.so", 3, os.environ)
        assert wanted.items() <= found.items()
        assert (found["RANK"], found["WORLD_SIZE"]) == (str(rank), "8")
    assert capfd.readouterr().err.splitlines() == [
        "epv2 emulate: 2 nodes x 4 ranks on 1 GPU (NVIDIA H200, 132 SMs), up to 8 on each: 16 SMs a rank, "
        "at most 16 fit",
        "epv2 emulate: network: GIN by proxy through /the/loopback.so, chaos 3 (EPV2_RMA_CHAOS); "
        "NCCL_HOSTID and EPV2_NODE=node0 to node1",
        "epv2 emulate: MPS: none, as there is no no-such-program on PATH; ranks take turns on a GPU: "
        "results are right, times say nothing",
    ]


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "find_gpus", lambda: {"devices": gpus(1)})
    config = tmp_path / "config.yaml"
    config.write_text("sm_budget: {expert: 12, context: 8}\n")
    options = ["emulate", "--nodes", "2", "--gpus-per-node", "4"]

    def said(*words: str) -> str:
        assert main([*options, *words]) == 2
        return capsys.readouterr().err

    assert said() == "epv2 emulate: COMMAND = '': must be a program, after --\n"
    assert said("--", "no-such-program", "x") == (
        "epv2 emulate: COMMAND = 'no-such-program x': must be a program, after --\n"
    )
    fit = "8 ranks share a GPU of 132 SMs: at most 16 each\n"
    assert said("--sms", "24", "--", "true") == f"epv2 emulate: --sms = 24: {fit}"
    assert said("--config", str(config), "--", "true") == f"epv2: {config}: sm_budget (expert + context) = 20: {fit}"
    monkeypatch.setattr(environment, "find_loopback", lambda: {"error": "not built", "mend": "build it"})
    assert said("--", "true") == "epv2 emulate: epv2_plugin._rma_loopback = None: not built: build it\n"
    monkeypatch.setenv("RANK", "0")
    assert said("--", "true") == "epv2 emulate: RANK = '0': must not be set: it starts the ranks itself\n"
    for words in (["--chaos", "-1"], ["--chaos", str(1 << 64)], ["--nodes", "0"], ["--sms", "1", "--config", "x"]):
        with pytest.raises(SystemExit) as error:
            main([*options, *words, "--", "true"])
        assert error.value.code == 2


def test_the_rank_that_fails_first_ends_the_others(tmp_path: Path) -> None:
    script = "import os, sys, time; os.environ['RANK'] == '2' and sys.exit('rank two is broken'); time.sleep(60)"
    command = [*EMULATE, "--nodes", "2", "--gpus-per-node", "2", "--", sys.executable, "-c", script]
    begin = time.monotonic()
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "rank 2 of 4 failed first (exit code 1); the others were ended." in run.stderr
    assert "Last lines of rank 2:\nrank two is broken" in run.stderr
    assert time.monotonic() - begin < 40


def test_an_interrupt_reaches_the_ranks(tmp_path: Path) -> None:
    script = f"import os, time; open('{tmp_path}/' + os.environ['RANK'], 'w'); time.sleep(60)"
    command = [*EMULATE, "--nodes", "2", "--gpus-per-node", "1", "--", sys.executable, "-c", script]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130


def test_a_recipe_has_its_ranks_play_nodes(tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes/deepseek_v3_tiny.yaml").read_text())
    recipe["train"] |= {"processes": 2, "nodes": 2, "steps": 1, "warmup_steps": 0}
    recipe["plugin"]["parallel"]["expert"] = 2
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe))
    recipe["train"]["nodes"] = 3
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(recipe))

    def train(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "epv2_plugin.cli", "train", name]
        return subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)

    run = train("two.yaml")
    assert run.returncode == 0, run.stderr
    half = recipe["train"]["processes"] // 2
    assert f"epv2: playing 2 nodes x {half} ranks on the CPU" in run.stderr
    assert "train.nodes = 3: must divide train.processes" in train("three.yaml").stderr
