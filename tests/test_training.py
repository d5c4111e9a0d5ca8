"""Training through Megatron-Core on the CPU: the same numbers in every layout, checkpoints, signals, the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import Pool

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "deepseek_v3_tiny.yaml")
SMALL = {
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 128,
    "model.seq_length": 32,
    "model.moe.ffn_hidden_size": 32,
    "model.moe.num_experts": 8,
    "model.moe.top_k": 3,
    "train.steps": 20,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
}
WAIT = 300  # seconds; a loaded machine is slow, not wrong
EP = {size: {"plugin.parallel.expert": size} for size in (1, 2, 4)}
TP2 = {"plugin.parallel.tensor": 2, "train.micro_batch_size": 4}  # one replica: one micro-batch
PP2 = {"plugin.parallel.pipeline": 2, "train.micro_batch_size": 1}
VPP2 = {"plugin.parallel.virtual_pipeline": 2}
OVERLAP = {"train.distributed_optimizer": True, "train.overlap_grad_reduce": True, "train.overlap_param_gather": True}
BF16 = {"train.precision": "bf16"}
FULL = {
    "megatron.recompute_granularity": "full",
    "megatron.recompute_method": "uniform",
    "megatron.recompute_num_layers": 1,
}
SELECTIVE = {
    "megatron.recompute_granularity": "selective",
    "megatron.recompute_modules": ["core_attn", "moe", "mla_up_proj"],
}
CAPACITY = {"megatron.moe_expert_capacity_factor": 2.0, "megatron.moe_pad_expert_input_to_capacity": True}
MTP = {"model.mtp_layers": 1}


def _arm(size: int, overrides: dict[str, Any], dispatcher: str = "alltoall", *attention: Any) -> tuple[Any, Any]:
    """An arm of the small recipe, with what attention there is by default, and its data, on this rank."""
    from epv2_plugin import plugin
    from epv2_plugin.training import trainer
    from epv2_plugin.training.data import TokenStream
    from epv2_plugin.training.recipe import load_recipe

    plugin.disable()  # what an earlier test on these ranks enabled
    recipe = load_recipe(RECIPE, {**SMALL, "train.processes": size, **EP[1], **overrides})
    trainer.setup(recipe)
    return trainer.Arm(recipe, dispatcher, *attention), TokenStream(recipe)


def _steps(arm: Any, stream: Any, count: int) -> list[Any]:
    return [arm.step(stream.sequences(arm.steps_done)) for _ in range(count)]


def run_steps(rank: int, size: int, overrides: dict[str, Any], dispatcher: str, count: int) -> list[Any]:
    """What `count` steps of a training gave on this rank."""
    return _steps(*_arm(size, overrides, dispatcher), count)


def _apart(results: list[Any], expected: list[Any]) -> float:
    return max(abs(a.loss - b.loss) for a, b in zip(results, expected[: len(results)], strict=True))


LAYOUTS = {
    "DP4": (4, EP[1], "alltoall", 4),
    "EP2": (4, EP[2], "alltoall", 20),
    "EP4": (4, EP[4], "alltoall", 20),
    "EP4, allgather": (4, EP[4], "allgather", 20),
    "TP2": (2, TP2, "alltoall", 4),
    "TP2 EP2": (2, TP2 | EP[2], "alltoall", 4),
    "PP2": (2, PP2, "alltoall", 4),
    "PP2 EP2": (4, PP2 | EP[2], "alltoall", 4),
    "PP2 VPP2": (2, PP2 | VPP2, "alltoall", 4),
    "distributed optimizer, overlap": (4, EP[2] | OVERLAP, "alltoall", 4),
    "full recompute": (2, EP[2] | FULL, "alltoall", 4),
    "selective recompute": (2, EP[2] | SELECTIVE, "alltoall", 4),
    "shared expert overlap": (2, EP[2] | {"megatron.moe_shared_expert_overlap": True}, "alltoall", 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_loss_of_one_process(
    train: Callable[..., list[Any]], alone: list[Any], name: str
) -> None:
    assert _apart(train(*LAYOUTS[name]), alone) < 1e-5


def test_multi_token_prediction_is_trained_but_not_reported(train: Callable[..., list[Any]], alone: list[Any]) -> None:
    results = train(2, EP[2] | MTP)
    assert results[0].loss == pytest.approx(alone[0].loss, abs=1e-6)  # the same main model
    assert results[0].grad_norm > alone[0].grad_norm  # but more gradients
    assert _apart(train(2, PP2 | MTP), results) < 1e-5


@pytest.mark.parametrize("further", [{}, OVERLAP | FULL], ids=["plain", "distributed optimizer, full recompute"])
def test_bf16_follows_fp32(train: Callable[..., list[Any]], alone: list[Any], further: dict[str, Any]) -> None:
    assert 0 < _apart(train(2, EP[2] | BF16 | further), alone) < 1e-2


def test_capacity_with_padding_trains(train: Callable[..., list[Any]]) -> None:
    results = train(2, EP[2] | CAPACITY)
    assert results[-1].loss < results[0].loss


def test_two_runs_are_bit_equal(train: Callable[..., list[Any]], pool: Callable[[int], Pool]) -> None:
    again = pool(4).run(run_steps, EP[4], "alltoall", 4, timeout=WAIT)
    assert again == [train(4, EP[4])] * 4


def _released(rank: int, size: int) -> tuple[int, int, list[Any], list[Any]]:
    """Bytes of an arm's tensors before and after it gave its memory back, and the steps of the arm and of the next."""
    from epv2_plugin.training.model import global_parameters

    overrides = EP[2] | BF16 | {"train.distributed_optimizer": True}
    arm, stream = _arm(size, overrides)
    first = _steps(arm, stream, 2)
    parameters = [parameter for _, parameter in global_parameters(arm.chunks)]
    storages = [tensor.untyped_storage() for p in parameters for tensor in (p, p.main_grad)]
    for optimizer in arm.optimizer.chained_optimizers:
        for parameter, state in optimizer.optimizer.state.items():
            storages += [tensor.untyped_storage() for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
    before = sum(storage.nbytes() for storage in storages)
    arm.release()
    after = sum(storage.nbytes() for storage in storages)
    return before, after, first, _steps(*_arm(size, overrides), 2)


def test_an_arm_gives_its_memory_back(pool: Callable[[int], Pool]) -> None:
    for before, after, first, second in pool(2).run(_released, timeout=WAIT):
        assert before > 1_000_000
        assert after == 0
        assert first == second


def _weights(arm: Any) -> dict[str, Any]:
    from epv2_plugin.training.model import global_buffers, global_parameters

    named = [*global_parameters(arm.chunks), *global_buffers(arm.chunks)]
    return {name: tensor.detach().clone() for name, tensor in named}


def _resume(rank: int, size: int, folder: str, overrides: dict[str, Any]) -> Any:
    import torch

    arm, stream = _arm(size, overrides)
    _steps(arm, stream, 2)
    arm.save(folder)
    straight, weights = _steps(arm, stream, 3), _weights(arm)
    arm, stream = _arm(size, overrides)
    arm.load(folder)
    assert arm.steps_done == 2
    resumed = _steps(arm, stream, 3)
    again = _weights(arm)
    return straight, resumed, [name for name in weights if not torch.equal(weights[name], again[name])]


CHECKPOINTED = {
    "EP2": EP[2],
    "TP2": TP2,
    "PP2 VPP2": PP2 | VPP2,
    "bf16, MTP": EP[2] | BF16 | MTP,
    "distributed optimizer": EP[2] | OVERLAP,
    "distributed optimizer, bf16": EP[2] | OVERLAP | BF16,
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_resuming_is_bit_identical(pool: Callable[[int], Pool], tmp_path: Path, name: str) -> None:
    for straight, resumed, different in pool(2).run(_resume, str(tmp_path), CHECKPOINTED[name], timeout=WAIT):
        assert straight == resumed
        assert not different


def _move(rank: int, size: int, folder: str, before: dict[str, Any], after: dict[str, Any]) -> Any:
    from epv2_plugin.config import ConfigError

    arm, stream = _arm(size, before)
    _steps(arm, stream, 2)
    arm.save(folder)
    straight = _steps(arm, stream, 3)
    arm, stream = _arm(size, after)
    try:
        arm.load(folder)
    except ConfigError as error:
        return straight, str(error)
    return straight, _steps(arm, stream, 3)


@pytest.mark.parametrize("after", [EP[1], PP2], ids=["EP1", "PP2"])
def test_a_checkpoint_loads_in_another_layout(
    pool: Callable[[int], Pool], tmp_path: Path, after: dict[str, Any]
) -> None:
    straight, moved = pool(2).run(_move, str(tmp_path), EP[2], after, timeout=WAIT)[0]
    assert _apart(moved, straight) < 1e-5


REFUSED = {
    "plugin.parallel.tensor": (EP[1], TP2),
    "plugin.parallel.expert": (EP[2] | OVERLAP, EP[1] | OVERLAP),
    "train.precision": (EP[2], EP[2] | BF16),
    "model.num_layers": (EP[2], EP[2] | {"model.num_layers": 3}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused(pool: Callable[[int], Pool], tmp_path: Path, key: str) -> None:
    for _, message in pool(2).run(_move, str(tmp_path), *REFUSED[key], timeout=WAIT):
        assert f": {key} = " in message
        assert str(tmp_path) in message


DAMAGE = {  # file of the checkpoint, what stands in it, what the error says
    "metadata": (".metadata", b"\x80\x04nonsense", "step_00000001 can't be loaded: UnpicklingError"),
    "state": ("state.json", b"[1]", "step_00000001/state.json is damaged"),
    "latest": ("../latest", b"step_00000009", "names 'step_00000009', which is not a complete checkpoint"),
    "no state": ("state.json", None, "'step_00000001', which is not a complete checkpoint"),
}


def _half_written(rank: int, size: int, folder: str) -> tuple[int, str, dict[str, str]]:
    import torch.distributed as dist

    from epv2_plugin.training import checkpoint

    arm, stream = _arm(size, EP[2])
    _steps(arm, stream, 1)
    good = arm.save(folder)
    # What a kill leaves in the middle of the next save: a part with some of the files, and `latest` as it was.
    part = Path(folder) / ".step_00000002.part"
    part.mkdir(exist_ok=True)
    (part / "__0_0.distcp").write_bytes(b"half")
    dist.barrier()
    _steps(arm, stream, 1)
    loaded = arm.load(folder)
    step, messages = arm.steps_done, {}
    for name, (file, content, _) in DAMAGE.items():
        path = good / file
        before = path.read_bytes()
        dist.barrier()
        if rank == 0:
            path.unlink() if content is None else path.write_bytes(content)
        dist.barrier()
        try:
            arm.load(folder)
        except checkpoint.CheckpointError as error:
            messages[name] = str(error)
        dist.barrier()
        if rank == 0:
            path.write_bytes(before)
        dist.barrier()
    return step, str(loaded), messages


def test_a_half_written_or_damaged_checkpoint_is_not_taken(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    for step, loaded, messages in pool(2).run(_half_written, str(tmp_path), timeout=WAIT):
        assert step == 1
        assert loaded == str(tmp_path / "step_00000001")
        for name, (_, _, text) in DAMAGE.items():
            assert text in messages[name]


def _not_finite(rank: int, size: int) -> str:
    import torch

    arm, stream = _arm(size, EP[2])
    if rank == 1:
        with torch.no_grad():
            next(arm.chunks[0].parameters()).fill_(float("nan"))
    try:
        arm.step(stream.sequences(0))
    except FloatingPointError as error:
        return str(error)
    return ""


def test_a_loss_that_is_not_finite_raises_everywhere(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).run(_not_finite, timeout=WAIT):
        assert message.startswith("step 0: loss nan")


def _refusals(rank: int, size: int) -> list[str]:
    from epv2_plugin.config import ConfigError
    from epv2_plugin.training.model import transformer_config
    from epv2_plugin.training.recipe import load_recipe

    messages = []
    for overrides in ({"moe_router_fuson": True}, {"normalization": "LayerNorm"}, {"recompute_granularity": "half"}):
        recipe = load_recipe(RECIPE, {f"megatron.{name}": value for name, value in overrides.items()})
        try:
            transformer_config(recipe, "alltoall")
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_megatron_fields_are_checked(pool: Callable[[int], Pool]) -> None:
    unknown, decided, refused = pool(1).run(_refusals, timeout=WAIT)[0]
    assert "megatron.moe_router_fuson = True" in unknown
    assert "did you mean 'moe_router_fusion'?" in unknown
    assert "megatron.normalization = 'LayerNorm': is decided" in decided
    assert "Megatron refuses" in refused


def _overlapped(rank: int, size: int) -> list[tuple[bool, bool]]:
    """(overlap, batches) of sends between stages, without and with a GPU."""
    from unittest import mock

    import torch

    from epv2_plugin.training.model import transformer_config
    from epv2_plugin.training.recipe import load_recipe

    found = []
    for cuda, overlap in [(False, False), (False, True), (True, False), (True, True)]:
        stages = {"plugin.parallel.pipeline": 2, "plugin.parallel.virtual_pipeline": 2, "plugin.parallel.expert": 1}
        recipe = load_recipe(RECIPE, {**stages, "model.num_layers": 4, "megatron.overlap_p2p_comm": overlap})
        with mock.patch.object(torch.cuda, "is_available", lambda cuda=cuda: cuda):
            config = transformer_config(recipe, "alltoall")
        found.append((config.overlap_p2p_comm, config.batch_p2p_comm))
    return found


def test_sends_are_batched_on_gpus_unless_they_overlap(pool: Callable[[int], Pool]) -> None:
    assert pool(1).run(_overlapped, timeout=WAIT) == [[(False, False), (True, False), (False, True), (True, False)]]


def _bridge(rank: int, size: int) -> None:
    import torch

    owners = [torch, torch.Tensor, torch.cuda, torch.cuda.random]
    before = [dict(vars(owner)) for owner in owners]
    environment = dict(os.environ)
    from epv2_plugin.megatron import cpu_bridge

    # Importing modules adds names; what the bridge replaced must be what it was.
    assert cpu_bridge.active() == ()
    assert cpu_bridge.install()
    assert cpu_bridge.install()
    assert "torch.cuda.current_device" in cpu_bridge.active()
    assert len(set(cpu_bridge.active())) == len(cpu_bridge.active())
    assert not torch.cuda.is_available()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(2).type("torch.cuda.DoubleTensor").dtype == torch.float64
    cpu_bridge.uninstall()
    assert cpu_bridge.active() == ()
    assert dict(os.environ) == environment
    for owner, names in zip(owners, before, strict=True):
        assert {name: vars(owner).get(name) for name in names} == names
    assert "type" not in vars(torch.Tensor) or vars(torch.Tensor)["type"] is dict(before[1]).get("type")


def test_the_bridge_puts_everything_back() -> None:
    harness.run(1, _bridge)


SCRIPT = """
import os, signal, sys, time
mode, rank = sys.argv[1], int(os.environ["RANK"])
if mode == "raise" and rank == 2:
    raise ValueError("rank two is broken")
if mode == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode in ("orderly", "stubborn"):
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(mode == "orderly"))
    open(f"ready{rank}", "w").close()
    while not any(asked):
        time.sleep(0.02)
    sys.exit(130)
if mode in ("raise", "kill"):
    time.sleep(60)
"""


def _launch(mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch, signals: int = 0) -> int:
    from epv2_plugin.training.launcher import run_ranks

    (folder / "ranks.py").write_text(SCRIPT)
    monkeypatch.chdir(folder)

    def interrupt() -> None:
        while not all((folder / f"ready{rank}").exists() for rank in range(3)):
            time.sleep(0.02)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=interrupt if signals else lambda: None)
    thread.start()
    begin = time.monotonic()
    try:
        return run_ranks("ranks", [mode], 3, env={"PYTHONPATH": str(folder)})
    finally:
        thread.join()
        assert time.monotonic() - begin < 30


def test_ranks_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _launch("fine", tmp_path, monkeypatch) == 0


def test_the_rank_that_failed_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _launch("raise", tmp_path, monkeypatch) == 1
    errors = capfd.readouterr().err
    assert "rank 2 of 3 failed first (exit code 1)" in errors
    assert "ValueError: rank two is broken" in errors


def test_a_killed_rank_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _launch("kill", tmp_path, monkeypatch) == 128 + signal.SIGKILL
    assert "rank 1 of 3 failed first (signal SIGKILL)" in capfd.readouterr().err


@pytest.mark.parametrize(("mode", "signals"), [("orderly", 1), ("stubborn", 2)])
def test_an_interrupt_ends_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, signals: int) -> None:
    assert _launch(mode, tmp_path, monkeypatch, signals) == 130


def test_ctrl_c_leaves_a_checkpoint_to_continue_from(tmp_path: Path) -> None:
    import yaml

    recipe = yaml.safe_load(Path(RECIPE).read_text())
    recipe["train"] |= {"processes": 2, "steps": 1000, "micro_batch_size": 1, "global_batch_size": 2}
    recipe["plugin"]["parallel"]["expert"] = 2
    recipe["model"] |= {"seq_length": 32, "num_layers": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "epv2_plugin.cli", "train", "recipe.yaml", "--folder", "run"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + WAIT
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert process.returncode == 130
    done = metrics.read_text().count("\n")
    assert f"interrupted after step {done}: checkpoint run/checkpoints/step_{done:08d}" in output
    further = subprocess.run(
        [*command, "--resume", "--steps", str(done + 2)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert further.returncode == 0, further.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(done + 2))
    assert set(lines[-1]) == {"step", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s"}
    assert lines[-1]["loss"] < lines[0]["loss"]
