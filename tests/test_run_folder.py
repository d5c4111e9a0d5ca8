"""`epv2 train` and its folder: used before, in use, and with a checkpoint that is not there or damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from epv2_plugin.config import ConfigError
from epv2_plugin.training.run_folder import taken

ROOT = Path(__file__).parents[1]


def _recipe(folder: Path, **train: Any) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "deepseek_v3_tiny.yaml").read_text())
    recipe["train"] |= {
        "processes": 1,
        "steps": 4,
        "warmup_steps": 0,
        "micro_batch_size": 1,
        "global_batch_size": 1,
    } | train
    recipe["plugin"]["parallel"]["expert"] = 1
    recipe["model"] |= {"seq_length": 32, "num_layers": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def _train(folder: Path, *words: str, command: str = "train", **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "epv2_plugin.cli", command, "recipe.yaml", "--folder", "run", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_a_folder_from_its_first_training_to_a_damaged_checkpoint(tmp_path: Path) -> None:
    _recipe(tmp_path)
    done = _train(tmp_path, "--resume", "--steps", "1")  # as scripts do that may be started again
    assert done.returncode == 0, done.stderr
    assert "no checkpoint in run/checkpoints: beginning with step 0" in done.stderr
    metrics, latest = tmp_path / "run/metrics.jsonl", tmp_path / "run/checkpoints/latest"
    before = metrics.read_text(), latest.read_text()

    again = _train(tmp_path)
    assert again.returncode == 2
    assert again.stderr == (
        "epv2: --folder = 'run': has metrics.jsonl of an earlier training: "
        "continue that with --resume, or name another --folder\n"
    )
    assert (metrics.read_text(), latest.read_text()) == before

    (data,) = (tmp_path / "run/checkpoints/step_00000001").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    done = _train(tmp_path, "--resume")
    text = "epv2: run/checkpoints/step_00000001 can't be loaded: "
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert text in done.stderr.splitlines()[-2], done.stderr  # the last one says that the rank failed


@pytest.mark.parametrize("command", ["train", "ab", "ab of torchtitan"])
def test_a_folder_in_use_is_refused_with_who_uses_it(tmp_path: Path, command: str) -> None:
    _recipe(tmp_path)
    if "titan" in command:
        pytest.importorskip("torchtitan")
        shutil.copy(ROOT / "recipes" / "deepseek_v3_tiny_fsdp.yaml", tmp_path / "recipe.yaml")
    with taken(tmp_path / "run", "train"):
        # The command, and the rank that would hold the folder.
        tried = [_train(tmp_path, command=command.split()[0], **env) for env in ({}, {"RANK": "0"})]
    for done in tried:
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"epv2: --folder = 'run': process {os.getpid()} on {os.uname().nodename} is training" in done.stderr
    with taken(tmp_path / "run", "train"):  # free again, and nothing was left there
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/latest"])
def test_what_a_training_leaves(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with taken(tmp_path, "train"):  # it made no step
        pass
    path.write_text("something")
    with pytest.raises(ConfigError, match=name), taken(tmp_path, "train"):
        pass
    with taken(tmp_path, "resume"):
        pass


@pytest.mark.parametrize(
    ("left", "purpose", "words"),
    [
        (["metrics.jsonl"], "compare", "metrics.jsonl of a training, which an A/B would replace"),
        (["checkpoints/latest"], "compare", "checkpoints/latest of a training, which an A/B would replace"),
        (["metrics.jsonl", "meta.json", "checkpoints/latest"], "compare", "checkpoints/latest of a training"),
        (["metrics.jsonl", "meta.json"], "train", "metrics.jsonl of an A/B"),
        (["metrics.jsonl", "meta.json"], "resume", "metrics.jsonl of an A/B"),
        (["metrics.jsonl", "meta.json"], "compare", ""),
        (["metrics.jsonl", "checkpoints/latest"], "resume", ""),
        (["meta.json"], "train", ""),
        (["meta.json", "checkpoints/latest"], "resume", ""),
    ],
)
def test_neither_a_training_nor_a_comparison_replaces_the_other(
    tmp_path: Path, left: list[str], purpose: Any, words: str
) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=words) if words else nullcontext(), taken(tmp_path, purpose):
        assert (tmp_path / "meta.json").exists() == (purpose == "compare")
