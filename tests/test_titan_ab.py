"""`epv2 ab` of a recipe for torchtitan: a whole run from the command, and what is refused before one starts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from epv2_plugin import ConfigError, cli
from epv2_plugin.training.recipe import load_recipe
from epv2_plugin.training.titan_recipe import ARMS, check_titan_arms, is_titan, load_titan_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "deepseek_v3_tiny_fsdp.yaml"


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_a_run_from_the_command(tmp_path: Path) -> None:
    words = ["ab", str(RECIPE), "--steps", "2", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "epv2_plugin.cli", *words], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2/2  alltoall" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["arm"], record["step"]) for record in records] == [
        ("alltoall", 0),
        ("epv2", 0),
        ("epv2", 1),
        ("alltoall", 1),
    ]
    for stock, ours in ((records[0], records[1]), (records[3], records[2])):
        assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(stock["grad_norm"], rel=2e-3)
        # Stock sends a copy for each token and expert; its counts and our scores are a few bytes beside the rows.
        assert ours["undeduplicated_bytes"] == pytest.approx(stock["sent_bytes"], rel=0.02)
        assert ours["sent_bytes"] < 0.75 * stock["sent_bytes"]
        for stage in ("dispatch", "expert", "combine", "dispatch_backward", "all_gather", "reduce_scatter"):
            assert 0 < min(ours[f"{stage}_ms"], stock[f"{stage}_ms"]) < stock["step_ms"] + ours["step_ms"]
    report = (tmp_path / "report.md").read_text()
    assert "Losses agree at each of 2 steps" in report
    assert "| alltoall | torchtitan's all-to-all | FSDP2's own |" in report
    assert "EP2 x shard 2" in report
    assert "| parameter all-gathers |" in report


def test_the_recipe_loads() -> None:
    assert is_titan(RECIPE)
    recipe = load_titan_recipe(RECIPE, steps=3)
    assert (recipe.name, recipe.expert, recipe.train.processes, recipe.train.steps) == (RECIPE.stem, 2, 4, 3)
    assert load_titan_recipe(RECIPE).train.steps == 10
    assert recipe.precision == "fp32"
    on_gpu = load_titan_recipe(RECIPE.with_name("deepseek_v3_tiny_fsdp_1gpu.yaml"))
    assert (on_gpu.plugin.backend, on_gpu.precision, on_gpu.model) == ("cuda", "bf16", recipe.model)
    limit = on_gpu.plugin.expert.max_tokens_per_rank
    assert limit == on_gpu.train.global_batch_size // on_gpu.train.processes * on_gpu.model.seq_length
    assert not is_titan(RECIPE.with_name("deepseek_v3_tiny.yaml"))
    with pytest.raises(ConfigError, match="a recipe for torchtitan, which only `epv2 ab` takes"):
        load_recipe(RECIPE)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("plugin", {"parallel": {"expert": 3}}, r"plugin\.parallel\.expert = 3: must divide train\.processes \(4\)"),
        ("plugin", {}, r"plugin\.parallel\.expert = 'auto': must be 2 or more"),
        ("train", {"global_batch_size": 6}, r"train\.global_batch_size = 6: must be a multiple of train\.processes"),
        ("train", {"proceses": 6}, r"train\.proceses = 6: unknown key, did you mean 'processes'"),
        ("torchtitan", {"arguments": {"training.steps": 3}}, r"training\.steps = 3: train\.steps decides this"),
    ],
)
def test_what_a_recipe_must_not_say(tmp_path: Path, section: str, changes: dict, message: str) -> None:
    data = yaml.safe_load(RECIPE.read_text())
    data[section] = {**data[section], **changes} if changes else {}
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=message):
        load_titan_recipe(path)


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = RECIPE.with_name("deepseek_v3_tiny_fsdp_1gpu.yaml")
    assert cli.main(["ab", str(recipe), "--folder", str(tmp_path / "run")]) != 0
    assert "backend = 'cuda': there is no CUDA device here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_can_not_be_compared() -> None:
    recipe = load_titan_recipe(RECIPE)
    with pytest.raises(ConfigError, match="--arms = 'alltoall,allgather': must be alltoall and epv2 for torchtitan"):
        check_titan_arms(recipe, ["alltoall", "allgather"], None)
    with pytest.raises(ConfigError, match=r"--skew = 0\.2: only for recipes of Megatron-Core"):
        check_titan_arms(recipe, list(ARMS), 0.2)
