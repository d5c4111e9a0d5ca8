"""Whole trainings through the plugin against stock ones, and the commands that users type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.harness import Pool
from tests.test_training import (
    BF16,
    CAPACITY,
    EP,
    FULL,
    MTP,
    OVERLAP,
    PP2,
    RECIPE,
    SELECTIVE,
    TP2,
    WAIT,
    _apart,
    run_steps,
)

ROOT = Path(__file__).parents[1]
OVERLAPPED = {"megatron.moe_shared_expert_overlap": True}
SAME_AS_ONE_PROCESS = {
    "EP1": (4, EP[1], 20),
    "EP2": (4, EP[2], 20),
    "EP4": (4, EP[4], 20),
    "TP2 EP2": (2, TP2 | EP[2], 4),
    "TP2 EP2, shared expert overlap": (2, TP2 | EP[2] | OVERLAPPED, 4),
    "PP2 EP2": (4, PP2 | EP[2], 4),
    "distributed optimizer, overlap": (4, EP[2] | OVERLAP, 4),
    "full recompute": (2, EP[2] | FULL, 4),
    "selective recompute": (2, EP[2] | SELECTIVE, 4),
    "shared expert overlap": (2, EP[2] | OVERLAPPED, 4),
    "compact layout": (2, EP[2] | {"plugin.expert.layout": "compact"}, 4),
}
SAME_AS_STOCK = {
    "multi-token prediction": (EP[2] | MTP, 1e-5),
    "capacity, padded": (EP[2] | CAPACITY, 1e-5),
    "bf16": (EP[2] | BF16, 5e-3),
    "bf16, distributed optimizer, recompute": (EP[2] | BF16 | OVERLAP | FULL, 5e-3),
}


@pytest.mark.parametrize("name", SAME_AS_ONE_PROCESS)
def test_plugin_gives_the_loss_of_one_process(train: Callable[..., list[Any]], alone: list[Any], name: str) -> None:
    ranks, overrides, steps = SAME_AS_ONE_PROCESS[name]
    assert _apart(train(ranks, overrides, "epv2", steps), alone) < 1e-5


@pytest.mark.parametrize("name", SAME_AS_STOCK)
def test_plugin_gives_the_loss_of_stock(train: Callable[..., list[Any]], name: str) -> None:
    overrides, tolerance = SAME_AS_STOCK[name]
    assert _apart(train(2, overrides, "epv2"), train(2, overrides, "alltoall")) < tolerance


def test_five_runs_are_bit_equal(train: Callable[..., list[Any]], pool: Callable[[int], Pool]) -> None:
    for _ in range(4):
        assert pool(4).run(run_steps, EP[4], "epv2", 3, timeout=WAIT) == [train(4, EP[4], "epv2", 3)] * 4


def epv2(*words: str, cwd: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run the `epv2` command as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "epv2_plugin.cli", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_ab_reports_every_arm(tmp_path: Path) -> None:
    done = epv2("ab", RECIPE, "--arms", "alltoall,allgather,epv2", "--steps", "4", "--skew", "0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "deepseek_v3_tiny-ab"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_arm = {arm: [r for r in records if r["arm"] == arm] for arm in ("alltoall", "allgather", "epv2")}
    for arm, steps in by_arm.items():
        assert [r["step"] for r in steps] == [0, 1, 2, 3], arm
        for ours, stock in zip(steps, by_arm["alltoall"], strict=True):
            assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5)
            assert ours["step_ms"] > ours["dispatch_ms"] + ours["expert_ms"] + ours["combine_ms"] > 0
            assert min(ours["dispatch_backward_ms"], ours["expert_backward_ms"], ours["combine_backward_ms"]) > 0
    # One copy for each token and expert is what the stock all-to-all sends, but for its counts.
    for ours, stock in zip(by_arm["epv2"], by_arm["alltoall"], strict=True):
        assert ours["undeduplicated_bytes"] == pytest.approx(stock["sent_bytes"], rel=0.02)
        assert ours["sent_bytes"] < 0.75 * ours["undeduplicated_bytes"]
    assert "Losses agree" in (folder / "report.md").read_text()
    assert (folder / "report.png").stat().st_size > 10_000
    assert str(Path("runs/deepseek_v3_tiny-ab/report.md")) in done.stdout


def test_ab_in_bf16_measures_the_noise_of_stock(tmp_path: Path) -> None:
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    recipe["train"] |= {"processes": 2, "precision": "bf16", "global_batch_size": 2, "micro_batch_size": 1, "steps": 3}
    recipe["plugin"]["parallel"] |= {"expert": 2, "context": 2}
    recipe["model"] |= {"seq_length": 32, "num_layers": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = epv2("ab", "recipe.yaml", "--skew", "0.5", "--folder", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    arms = [record["arm"] for record in records]
    assert set(arms[:6]) == {"alltoall", "epv2"}  # the other stock dispatcher comes when they are done
    assert arms[6:] == ["allgather"] * 3
    losses = {(r["arm"], r["step"]): r["loss"] for r in records}
    apart = [abs(losses["allgather", step] / losses["alltoall", step] - 1) for step in range(3)]
    assert 0 < max(apart) < 1e-2
    report = (tmp_path / "out" / "report.md").read_text()
    assert "stock's own allgather and alltoall by" in report
    assert "and attention runs in fp32, rounded once." in report
    assert "sm_budget.expert: auto; host backend over gloo, direct mode, 0 SMs" in report


def test_ab_that_is_interrupted_reports_what_it_has(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "epv2_plugin.cli", "ab", RECIPE, "--folder", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert (tmp_path / "out" / "report.md").exists(), output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ab", RECIPE, "--arms", "alltoall"), "--arms = 'alltoall': must be two or more different ones"),
        (("ab", RECIPE, "--arms", "alltoall,deepep"), "alltoall, allgather, epv2"),
        (("ab", RECIPE, "--skew", "2"), "must be above 0 and at most 1"),
        (("ab", "missing.yaml"), "missing.yaml: (file)"),
        (("ab", RECIPE, "--folder", "/proc/nowhere"), "--folder = '/proc/nowhere': can't be made"),
        (("train", RECIPE, "--folder", "/proc/nowhere"), "--folder = '/proc/nowhere': can't be made"),
        (("train", RECIPE, "--steps", "0"), "must be 1 or more"),
        (("train", "missing.yaml"), "can't be read"),
        (("train", "seed.yaml"), "seed.yaml: train.seed = 1000000000000000000001234: must be"),
        (("train", RECIPE, "--folder", "x", "--steps", "many"), "argument --steps: 'many' is not a whole number"),
        (("ab", RECIPE, "--skew", "much"), "argument --skew: 'much' is not a number"),
        (("train", "no_data.yaml"), "epv2: no_data.yaml: data.path = '/nowhere': "),
        (("ab", "no_data.yaml"), "epv2: no_data.yaml: data.path = '/nowhere': "),
        (("train", "hybrid.yaml"), "epv2: hybrid.yaml: plugin: expert.mode = 'hybrid': the host backend makes one hop"),
        (("ab", "hybrid.yaml"), "epv2: hybrid.yaml: plugin: expert.mode = 'hybrid': the host backend makes one hop"),
        (("recipe-args", "missing.yaml"), "can't be read"),
        (("train", "on_gpu.yaml"), "plugin: backend = 'cuda': there is no CUDA device here"),
        (("ab", "on_gpu.yaml"), "plugin: backend = 'cuda': there is no CUDA device here"),
        ((), "COMMAND"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    wrong = yaml.safe_load(Path(RECIPE).read_text())
    (tmp_path / "no_data.yaml").write_text(yaml.safe_dump(wrong | {"data": {"path": "/nowhere"}}))
    wrong["plugin"]["expert"] = {"mode": "hybrid"}
    (tmp_path / "hybrid.yaml").write_text(yaml.safe_dump(wrong))
    (tmp_path / "seed.yaml").write_text(Path(RECIPE).read_text().replace("seed: ", "seed: 1" + "0" * 20))
    if "on_gpu.yaml" in words:
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        (tmp_path / "on_gpu.yaml").write_text(Path(RECIPE).read_text().replace("backend: host", "backend: cuda"))
    done = epv2(*words, cwd=tmp_path, timeout=60)
    for name in ("on_gpu.yaml", "seed.yaml", "no_data.yaml", "hybrid.yaml"):
        (tmp_path / name).unlink(missing_ok=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "failed first" not in done.stderr  # no rank was started
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
