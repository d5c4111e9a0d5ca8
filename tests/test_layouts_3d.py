"""Whole trainings under pipeline, context and expert parallelism through the plugin: losses and gradients of one
process, whatever the schedule; and the A/B of the recipe that has all three.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.harness import Pool
from tests.test_plugin_training import ROOT, epv2
from tests.test_training import BF16, EP, FULL, MTP, OVERLAP, SELECTIVE, VPP2, WAIT, _apart, _arm

RECIPE_3D = str(ROOT / "recipes" / "deepseek_v3_tiny_3d.yaml")
PP = {size: {"plugin.parallel.pipeline": size} for size in (2, 4)}
CP = {size: {"plugin.parallel.context": size} for size in (2, 4)}
# Megatron frees what it has sent at once, unless told otherwise; the sender must not care.
OVERLAPPED = {"megatron.overlap_p2p_comm": True, "megatron.deallocate_pipeline_outputs": True}
BATCHED = {"megatron.batch_p2p_comm": True, "megatron.deallocate_pipeline_outputs": True}
FLUSH = {"megatron.overlap_p2p_comm_warmup_flush": True}
VARIABLE = {"megatron.variable_seq_lengths": True}
ONE_SLOT = {"plugin.pipeline.max_inflight": 1}
EIGHT_LAYERS = {"model.num_layers": 8, "train.global_batch_size": 8}

SAME_AS_ONE_PROCESS = {
    "PP2 EP2, batched": (4, PP[2] | EP[2] | BATCHED, 20),
    "PP2, one slot, variable lengths": (2, PP[2] | ONE_SLOT | VARIABLE, 4),
    "PP4": (4, PP[4], 20),
    "PP2 VPP2 EP2, overlapped": (4, PP[2] | VPP2 | EP[2] | OVERLAPPED, 20),
    "PP2 VPP2, overlapped, one slot": (2, PP[2] | VPP2 | OVERLAPPED | ONE_SLOT, 4),
    "PP2 VPP2, overlapped, flush": (2, PP[2] | VPP2 | OVERLAPPED | FLUSH, 4),
    "PP2 VPP2, batched, variable lengths": (2, PP[2] | VPP2 | BATCHED | VARIABLE, 4),
    "CP2 EP2": (2, CP[2] | EP[2], 20),
    "CP4 EP2": (4, CP[4] | EP[2], 20),
    "CP2, distributed optimizer, full recompute": (2, CP[2] | OVERLAP | FULL, 4),
    "CP2, selective recompute": (2, CP[2] | SELECTIVE, 4),
    "PP2 VPP2 CP2 EP2, overlapped": (4, PP[2] | VPP2 | CP[2] | EP[2] | OVERLAPPED, 20),
    "TP2 CP2": (4, CP[2] | {"plugin.parallel.tensor": 2}, 4),
}
STOCK_SAME_AS_ONE_PROCESS = {
    "CP2": (2, CP[2], 4),
    "PP2 VPP2 CP2 EP2": (4, PP[2] | VPP2 | CP[2] | EP[2], 4),
}


@pytest.mark.parametrize("name", SAME_AS_ONE_PROCESS)
def test_plugin_gives_the_loss_of_one_process(train: Callable[..., list[Any]], alone: list[Any], name: str) -> None:
    ranks, overrides, steps = SAME_AS_ONE_PROCESS[name]
    assert _apart(train(ranks, overrides, "epv2", steps), alone) < 1e-5


@pytest.mark.parametrize("name", STOCK_SAME_AS_ONE_PROCESS)
def test_what_it_is_compared_with_does_so_too(train: Callable[..., list[Any]], alone: list[Any], name: str) -> None:
    ranks, overrides, steps = STOCK_SAME_AS_ONE_PROCESS[name]
    assert _apart(train(ranks, overrides, "alltoall", steps), alone) < 1e-5


def in_bf16_by(rank: int, size: int, name: str) -> tuple[list[float], torch.dtype]:
    """Losses of three steps with context parallelism, with one of the reference attentions, and what that ran in."""
    from epv2_plugin.training import reference_attention

    arm, stream = _arm(size, CP[2] | BF16, "alltoall", getattr(reference_attention, name))
    attend = reference_attention.scaled_dot_product_attention
    with mock.patch.object(reference_attention, "scaled_dot_product_attention", side_effect=attend) as called:
        losses = [arm.step(stream.sequences(step)).loss for step in range(3)]
    (dtype,) = {call.args[0].dtype for call in called.call_args_list}
    return losses, dtype


def test_the_reference_has_another_that_rounds_otherwise(pool: Callable[[int], Pool]) -> None:
    names = ("GatherThenAttend", "GatherThenAttendInFp32")
    (one, narrow), (other, wide) = (pool(2).run(in_bf16_by, name, timeout=WAIT)[0] for name in names)
    assert (narrow, wide) == (torch.bfloat16, torch.float32)
    assert other == pytest.approx(one, rel=5e-3)


def test_interleaved_over_four_stages(train: Callable[..., list[Any]]) -> None:
    # Dense: among eight MoE layers, 20 steps meet a token whose expert the last bit decides.
    dense = EIGHT_LAYERS | {"model.first_dense_layers": 8}
    expected = train(1, dense, steps=20)
    for further, steps in ((OVERLAPPED, 20), (BATCHED, 3)):
        assert _apart(train(4, dense | PP[4] | VPP2 | further, "epv2", steps), expected) < 1e-5


def test_the_transport_changes_no_bit(train: Callable[..., list[Any]]) -> None:
    layout = EIGHT_LAYERS | PP[4] | VPP2
    stock = train(4, layout | {"plugin.pipeline.transport": "stock"}, "epv2", 3)
    assert train(4, layout | OVERLAPPED, "epv2", 3) == stock


@pytest.mark.parametrize("further", [MTP, BF16], ids=["multi-token prediction", "bf16"])
def test_context_parallel_gives_the_loss_of_the_reference(
    train: Callable[..., list[Any]], further: dict[str, Any]
) -> None:
    tolerance = 5e-3 if further is BF16 else 1e-5
    assert _apart(train(2, CP[2] | further, "epv2"), train(2, CP[2] | further, "alltoall")) < tolerance


def gradients(rank: int, size: int, overrides: dict[str, Any], dispatcher: str) -> dict[str, Any]:
    """The gradient of every parameter on this rank in the first step, by global name."""
    from epv2_plugin.training.model import global_parameters

    arm, stream = _arm(size, overrides, dispatcher)
    found = {}

    def step() -> Any:
        for name, parameter in global_parameters(arm.chunks):
            found[name] = parameter.main_grad.detach().numpy().copy()
        return original()

    original, arm.optimizer.step = arm.optimizer.step, step
    arm.step(stream.sequences(0))
    return found


@pytest.fixture(scope="module")
def gradients_alone(pool: Callable[[int], Pool]) -> dict[str, Any]:
    """`gradients` of one process."""
    return pool(1).run(gradients, {}, "alltoall", timeout=WAIT)[0]


@pytest.mark.parametrize(
    "overrides",
    [PP[2] | VPP2 | EP[2] | OVERLAPPED, PP[4], CP[2] | EP[2], CP[4] | EP[2], PP[2] | CP[2] | EP[2]],
    ids=["PP2 VPP2 EP2", "PP4", "CP2 EP2", "CP4 EP2", "PP2 CP2 EP2"],
)
def test_gradients_of_every_parameter(
    pool: Callable[[int], Pool], gradients_alone: dict[str, Any], overrides: dict[str, Any]
) -> None:
    seen = set()
    for found in pool(4).run(gradients, overrides, "epv2", timeout=WAIT):
        for name, value in found.items():
            want = torch.from_numpy(gradients_alone[name])
            assert (torch.from_numpy(value) - want).abs().max() <= 1e-4 * want.abs().max(), name
            seen.add(name)
    assert seen == set(gradients_alone)


def explicit(rank: int, size: int) -> list[float]:
    """Megatron's schedule with the plugin's communicator given by hand, and what `status` and `disable` say."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    import epv2_plugin
    from epv2_plugin.megatron.pipeline import PipelineCommunicator, schedule_groups

    arm, stream = _arm(size, PP[2], "epv2")
    assert schedules.P2PCommunicator is PipelineCommunicator
    schedules.P2PCommunicator = None  # nobody may look here
    groups = schedule_groups()
    arm._pipeline = {"p2p_communicator": PipelineCommunicator(groups.pp, arm.chunks[0].config), "pg_collection": groups}
    losses = [arm.step(stream.sequences(number)).loss for number in range(2)]
    status = epv2_plugin.status()
    assert status["pipeline"] == "epv2"
    assert "megatron.core.pipeline_parallel.schedules.P2PCommunicator" in status["replaced"]
    (group,) = (g for g in status["groups"] if g["primitive"] == "pipeline")
    assert group["ranks"] == [0, 1]
    assert (group["transport"], group["sms"], group["max_inflight"]) == ("gloo", 0, 4)
    # Two steps of four micro-batches, each sent on by one stage and back by the other.
    assert group["sent_bytes"] >= 2 * 4 * 32 * 64 * 4
    assert parallel_state.get_pipeline_model_parallel_world_size() == 2
    epv2_plugin.disable()
    assert schedules.P2PCommunicator is P2PCommunicator
    return losses


def test_communicator_given_by_hand(pool: Callable[[int], Pool], alone: list[Any]) -> None:
    for losses in pool(2).run(explicit, timeout=WAIT):
        assert max(abs(a - b.loss) for a, b in zip(losses, alone, strict=False)) < 1e-5


def dies(rank: int, size: int) -> str:
    import os
    import signal

    from epv2_plugin import CommunicationError

    arm, stream = _arm(size, PP[2] | {"plugin.timeouts.host_seconds": 20}, "epv2")
    arm.step(stream.sequences(0))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        arm.step(stream.sequences(1))
    except CommunicationError as error:
        return str(error)
    return ""


def test_a_stage_that_dies_is_named() -> None:
    from tests import harness

    results = harness.outcomes(2, dies, timeout=100)
    assert results[0].error == "", results[0].error
    assert "rank 0, waiting for rank 1 in pp_" in results[0].value
    assert "tensor #" in results[0].value


def test_ab_of_three_dimensions(tmp_path: Path) -> None:
    recipe = tmp_path / "deepseek_v3_tiny_3d.yaml"
    recipe.write_text(Path(RECIPE_3D).read_text().replace("warmup_steps: 2", "warmup_steps: 1"))
    done = epv2("ab", str(recipe), "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "deepseek_v3_tiny_3d-ab"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stock, ours = ([r for r in records if r["arm"] == arm] for arm in ("alltoall", "epv2"))
    assert len(stock) == len(ours) == 2
    for a, b in zip(stock, ours, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        # Headers apart, stages exchange the same; the reference keeps what it gathered and does not gather again.
        assert 1 <= b["pipeline_bytes"] / a["pipeline_bytes"] < 1.05
        assert 1.4 < b["context_bytes"] / a["context_bytes"] < 1.6
    report = (folder / "report.md").read_text()
    assert "| alltoall | alltoall | stock P2P | reference gather-then-attend |" in report
    assert "| epv2 | epv2 | epv2 | epv2 |" in report
    assert "Losses agree" in report
