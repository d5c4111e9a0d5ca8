"""Training on the GPUs of this machine, shared by the ranks where there are too few: against the host, and A/B."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import harness

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "deepseek_v3_tiny.yaml")
STEPS = 8
OVERLAP = {"moe_shared_expert_overlap": True}


def _epv2(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    harness.make_room()
    done = subprocess.run(
        [sys.executable, "-m", "epv2_plugin.cli", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **env},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _write_recipe(folder: Path, backend: str, expert: dict[str, Any], megatron: dict[str, Any]) -> str:
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    recipe["train"] |= {"precision": "bf16", "steps": STEPS}
    recipe["plugin"] |= {"backend": backend, "expert": expert, "sm_budget": {"expert": 4}}
    recipe["megatron"] = megatron
    path = folder / f"{backend}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path.name


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "shared expert overlapped": ({}, OVERLAP),
    "fp8, shared expert overlapped": ({"dispatch_dtype": "fp8"}, OVERLAP),
    "compact": ({"layout": "compact"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gpu_gives_the_losses_of_the_host(tmp_path: Path, case: str) -> None:
    expert, megatron = CASES[case]
    _epv2(
        "train",
        _write_recipe(tmp_path, "host", expert, megatron),
        "--folder",
        "h",
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="",
    )
    _epv2("train", _write_recipe(tmp_path, "cuda", expert, megatron), "--folder", "c", cwd=tmp_path)
    host, cuda = _losses(tmp_path / "h"), _losses(tmp_path / "c")
    assert len(cuda) == STEPS
    assert cuda == pytest.approx(host, rel=2e-2)
    assert cuda[-1] < cuda[0] - 0.3


def test_a_checkpoint_continues(tmp_path: Path) -> None:
    name = _write_recipe(tmp_path, "cuda", {}, {})
    _epv2("train", name, "--folder", "straight", cwd=tmp_path)
    _epv2("train", name, "--folder", "run", "--steps", "4", cwd=tmp_path)
    _epv2("train", name, "--folder", "run", "--resume", cwd=tmp_path)
    assert _losses(tmp_path / "run") == pytest.approx(_losses(tmp_path / "straight"), rel=5e-3)


def test_ab_on_the_gpu(tmp_path: Path) -> None:
    done = _epv2("ab", _write_recipe(tmp_path, "cuda", {}, OVERLAP), "--folder", "out", cwd=tmp_path)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {record["arm"] for record in records} == {"alltoall", "epv2", "allgather"}
    for record in records:
        assert record["step_ms"] > record["dispatch_ms"] + record["expert_ms"] + record["combine_ms"] > 0
        assert record["peak_mib"] > 1
        assert record["sent_bytes"] > 0
    (group,) = meta["expert_parallel"]
    assert (group["backend"], group["sms"], group["ranks"]) == ("cuda", 4, [0, 1, 2, 3])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "cuda backend over" in report
    assert "4 SMs" in report
    assert "machine: gpu" in report
    assert "stock's own allgather and alltoall by" in report
    if meta["machine"]["ranks per gpu"] > 1:
        assert "ranks on each of" in done.stderr
        assert meta["machine"]["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"


def streams(rank: int, size: int) -> dict[str, Any]:
    """Status, and the stream of each kernel of a step: the plugin's and the others'."""
    import torch
    import torch.distributed as dist

    import epv2_plugin
    from epv2_plugin.training import trainer
    from epv2_plugin.training.data import TokenStream
    from epv2_plugin.training.recipe import load_recipe

    dist.destroy_process_group()  # the harness's, which is for the host alone
    overrides = {"plugin.backend": "cuda", "train.precision": "bf16", "plugin.sm_budget": {"expert": 4}}
    recipe = load_recipe(RECIPE, overrides | {"megatron": OVERLAP})
    trainer.setup(recipe)
    arm, data = trainer.Arm(recipe, "epv2"), TokenStream(recipe)
    for step in range(2):
        arm.step(data.sequences(step))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        arm.step(data.sequences(2))
        torch.cuda.synchronize()
    used: dict[str, list[int]] = {"ours": [], "others": []}
    for event in profile.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and "mem" not in event.name().lower():
            used["ours" if event.name().startswith("epv2_") else "others"].append(event.device_resource_id())
    status = epv2_plugin.status()
    trainer.leave()
    return {"status": status, **used}


def test_communication_has_a_stream_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    results = harness.run(4, streams, timeout=500, env={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    for found in results:
        status = found["status"]
        assert status["backend"] == "cuda"
        assert status["bridge"] == []
        (group,) = status["groups"]
        assert (group["backend"], group["mode"], group["sms"]) == ("cuda", "direct", 4)
        assert group["sent_bytes"] > 0
        # Forward: dispatch (3 kernels) and combine (2) on a stream of the plugin's own. Backward: combine (2) and
        # cached dispatch (2) on the current one, where the shared expert has its own stream.
        own = set(found["ours"]) - set(found["others"])
        assert len(own) == 1, found
        forward = sum(stream in own for stream in found["ours"])
        assert forward > 0
        assert 4 * forward == 5 * (len(found["ours"]) - forward)
