"""Pipeline and context parallelism of Megatron over the cuda backend, on the emulated device: the host's bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from epv2_plugin.config import ConfigError
from epv2_plugin.elastic.backends import inplace
from tests import test_context_parallel
from tests.buffers import EmulatedBuffer
from tests.harness import Pool
from tests.test_layouts_3d import CP, ONE_SLOT, OVERLAPPED, PP, VARIABLE
from tests.test_training import EP, VPP2, WAIT, _arm

_LEAST_BYTES = inplace.LEAST_BYTES
STEPS = 3
LIMIT = {"plugin.pipeline.max_tensor_bytes": 1 << 20}
INPLACE = {"plugin.pipeline.max_inplace": 4}


def _emulate(emulated: bool) -> None:
    from epv2_plugin.elastic import ElasticBuffer
    from epv2_plugin.megatron import context_parallel, pipeline

    for module in (context_parallel, pipeline):
        module.ElasticBuffer = EmulatedBuffer if emulated else ElasticBuffer
    inplace.LEAST_BYTES = 1 if emulated else _LEAST_BYTES


def losses(rank: int, size: int, overrides: dict[str, Any], emulated: bool) -> tuple[list[float], list[Any]]:
    """Of a few steps, and what the groups of pipeline and context are."""
    import epv2_plugin

    _emulate(emulated)
    try:
        arm, stream = _arm(size, overrides, "epv2")
        found = [arm.step(stream.sequences(number)).loss for number in range(STEPS)]
        groups = [group for group in epv2_plugin.status()["groups"] if group["primitive"] != "expert"]
        epv2_plugin.disable()
    finally:
        _emulate(False)
    return found, groups


STOCK = {"primitive": "pipeline", "ranks": [0, 1], "backend": "stock", "transport": "stock"}
CASES = {
    "PP2": (2, PP[2]),
    "PP2, variable lengths, one slot": (2, PP[2] | VARIABLE | ONE_SLOT | LIMIT),
    "PP2 VPP2, overlapped": (2, PP[2] | VPP2 | OVERLAPPED),
    "PP2 VPP2, overlapped, in place": (2, PP[2] | VPP2 | OVERLAPPED | INPLACE),
    "PP2 CP2 EP2": (4, PP[2] | CP[2] | EP[2]),
}


@pytest.mark.parametrize("name", CASES)
def test_training_has_the_host_backends_bits(pool: Callable[[int], Pool], name: str) -> None:
    size, overrides = CASES[name]
    host = pool(size).run(losses, overrides, False, timeout=WAIT)
    emulated = pool(size).run(losses, overrides, True, timeout=WAIT)
    assert [found for found, _ in emulated] == [found for found, _ in host]
    for _, groups in emulated:
        assert {group["primitive"] for group in groups} == ({"pipeline", "context"} if "CP2" in name else {"pipeline"})
        for group in groups:
            assert (group["backend"], group["transport"]) == ("cuda", "emulated")
            assert group["sms"] == (8 if group["primitive"] == "context" else 0)
            assert group["sent_bytes"] > 0
    if "in place" in name:
        # Who comes first differs from run to run; of so many tensors some are called for before they are sent.
        assert sum(group["inplace_bytes"] for _, groups in emulated for group in groups) > 0


def refused(rank: int, size: int) -> str:
    try:
        losses(rank, size, PP[2] | VARIABLE | {"plugin.pipeline.transport": "copy_engine"}, True)
    except ConfigError as error:
        return str(error)
    return ""


def test_variable_lengths_need_a_limit(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).run(refused, timeout=WAIT):
        assert "pipeline.max_tensor_bytes = 'auto': must be a number on the cuda backend" in message


def test_variable_lengths_without_a_limit_are_left_to_megatron(pool: Callable[[int], Pool]) -> None:
    host = pool(2).run(losses, PP[2] | VARIABLE, False, timeout=WAIT)
    emulated = pool(2).run(losses, PP[2] | VARIABLE, True, timeout=WAIT)
    for (found, groups), (expected, _) in zip(emulated, host, strict=True):
        assert found == expected
        assert groups == [STOCK]


@contextmanager
def _stages(size: int, pipeline: dict[str, Any], **of_megatron: Any) -> Iterator[Callable[[], Any]]:
    """What makes communicators of `size` stages on the emulated device."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig

    import epv2_plugin
    from epv2_plugin.megatron.pipeline import PipelineCommunicator

    _emulate(True)
    try:
        parallel_state.destroy_model_parallel()  # an earlier test's on these ranks
        epv2_plugin.disable()
        epv2_plugin.enable({"pipeline": pipeline, "timeouts": {"host_seconds": 30}})
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=size)
        config = ModelParallelConfig(pipeline_model_parallel_size=size, pipeline_dtype=torch.float32)
        for name, value in of_megatron.items():
            setattr(config, name, value)
        yield lambda: PipelineCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
    finally:
        epv2_plugin.disable()
        parallel_state.destroy_model_parallel()
        _emulate(False)


def _there_and_back(communicator: Any, rank: int, rows: int) -> float:
    """What arrives of a tensor that two stages exchange."""
    import torch

    shape = (rows, 1, 2)
    if rank == 0:
        communicator.send_forward(torch.full(shape, float(rows)), False)
        return communicator.recv_backward(shape, False).mean().item()
    found = communicator.recv_forward(shape, False).mean().item()
    communicator.send_backward(torch.full(shape, -float(rows)), False)
    return found


def _group() -> dict[str, Any]:
    import epv2_plugin

    (group,) = epv2_plugin.status()["groups"]
    return group


def growing(rank: int, size: int) -> list[float]:
    """Tensors get larger, each sent by a communicator of its own, as schedules have them."""
    from epv2_plugin.megatron import pipeline

    with _stages(size, {}) as make:
        found = [_there_and_back(make(), rank, rows) for rows in (2, 2, 1, 300_000, 4)]
        assert (_group()["backend"], _group()["transport"]) == ("cuda", "emulated")
        (buffer,) = pipeline._open_buffers()
        assert buffer._open().point_to_point._num_rings == 2  # activations from here, gradients from there
    return found


def test_larger_tensors_of_a_later_schedule(pool: Callable[[int], Pool]) -> None:
    sizes = [2.0, 2.0, 1.0, 300_000.0, 4.0]
    assert pool(2).run(growing, timeout=WAIT) == [[-size for size in sizes], sizes]


def too_large(rank: int, size: int, inplace: int) -> str:
    """Tensors get larger where rings can't: within a schedule, and where somebody may have tensors in place."""
    with _stages(size, {"max_inplace": inplace}) as make:
        communicator = make()
        _there_and_back(communicator, rank, 2)
        with pytest.raises(ConfigError) as caught:
            _there_and_back(make() if inplace else communicator, rank, 3)
        return str(caught.value)


@pytest.mark.parametrize("inplace", [0, 2])
def test_tensors_that_get_larger_too_late_are_refused(pool: Callable[[int], Pool], inplace: int) -> None:
    for message in pool(2).run(too_large, inplace, timeout=WAIT):
        assert "pipeline.max_tensor_bytes = 'auto': must be 24 or more: that many bytes come after smaller" in message


def left(rank: int, size: int, pipeline: dict[str, Any], of_megatron: dict[str, Any], nodes: int) -> list[Any]:
    """What two communicators, made before either is used, go by; refused where ours was asked for by name."""
    import epv2_plugin

    with (
        mock.patch.object(EmulatedBuffer, "_find_machines", return_value=(nodes, size // nodes)),
        mock.patch.object(EmulatedBuffer, "destroy", autospec=True, side_effect=EmulatedBuffer.destroy) as destroy,
        _stages(size, pipeline, **of_megatron) as make,
    ):
        try:
            communicators = [make(), make()]
            found = [_there_and_back(each, rank, 2) for each in communicators]
        except ConfigError as error:
            for _ in range(2):  # and again, instead of going on by Megatron's
                with pytest.raises(ConfigError, match=r"transport|max_tensor_bytes"):
                    _there_and_back(make(), rank, 2)
            return [str(error)]
        assert found == [-2.0 if rank == 0 else 2.0] * 2
        return [_group()["backend"], epv2_plugin.status()["pipeline"], destroy.call_count]


VARY = {"variable_seq_lengths": True}


@pytest.mark.parametrize(
    ("pipeline", "of_megatron", "nodes", "expected"),
    [
        ({}, {}, 1, ["cuda", "epv2", 0]),
        ({}, {}, 2, ["stock", "stock", 1]),
        ({"transport": "copy_engine"}, {}, 2, ["cuda", "epv2", 0]),
        ({}, VARY, 1, ["stock", "stock", 1]),
        ({}, {"cuda_graph_scope": ["full_iteration"]}, 1, ["stock", "stock", 1]),
        ({"max_tensor_bytes": 64}, VARY, 1, ["cuda", "epv2", 0]),
        ({"transport": "copy_engine"}, VARY, 1, ["max_tensor_bytes = 'auto': must be a number on the cuda backend"]),
        ({"transport": "copy_engine"}, {"cuda_graph_impl": "full_iteration"}, 1, ["CUDA graph of the whole iteration"]),
    ],
)
def test_who_carries_tensors_between_stages(
    pool: Callable[[int], Pool],
    pipeline: dict[str, Any],
    of_megatron: dict[str, Any],
    nodes: int,
    expected: list[Any],
) -> None:
    for found in pool(2).run(left, pipeline, of_megatron, nodes, timeout=WAIT):
        if len(expected) == 1:
            assert expected[0] in found[0]
        else:
            assert found == expected


def standalone(rank: int, size: int) -> tuple[str, str]:
    """Multi-token prediction has a stage of its own, which alone sends longer tensors."""
    import epv2_plugin

    _emulate(True)
    try:
        layout = {"model.mtp_layers": 1, "megatron.pipeline_model_parallel_layout": "Et|ttt|m|L"}
        arm, stream = _arm(size, PP[4] | layout, "epv2")
        arm.step(stream.sequences(0))
        return epv2_plugin.status()["pipeline"], arm.runs["pipeline"]
    finally:
        epv2_plugin.disable()
        _emulate(False)


def test_a_stage_for_prediction_only_is_left_to_megatron(pool: Callable[[int], Pool]) -> None:
    assert pool(4).run(standalone, timeout=WAIT) == [("stock", "stock P2P")] * 4


def left_to_megatron(rank: int, size: int) -> tuple[list[float], list[Any]]:
    """A device that is reached through one queue can't have our transport; Megatron's does it."""
    with mock.patch.dict("os.environ", CUDA_DEVICE_MAX_CONNECTIONS="1"):
        return losses(rank, size, PP[2], True)


def test_megatrons_own_transport_where_ours_can_not_be(pool: Callable[[int], Pool]) -> None:
    host = pool(2).run(losses, PP[2], False, timeout=WAIT)
    for (found, groups), (expected, _) in zip(pool(2).run(left_to_megatron, timeout=WAIT), host, strict=True):
        assert found == expected
        assert groups == [STOCK]


def insisted(rank: int, size: int) -> str:
    try:
        with mock.patch.dict("os.environ", CUDA_DEVICE_MAX_CONNECTIONS="1"):
            losses(rank, size, PP[2] | {"plugin.pipeline.transport": "copy_engine"}, True)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_transport_asked_for_by_name_is_not_replaced(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).run(insisted, timeout=WAIT):
        assert "pipeline.transport = 'copy_engine': CUDA_DEVICE_MAX_CONNECTIONS=1" in message


def attention(rank: int, size: int) -> dict[tuple[int, str], list[float]]:
    _emulate(True)
    try:
        return test_context_parallel.compare(rank, size)
    finally:
        _emulate(False)


def test_attention_is_that_of_the_whole_sequence(pool: Callable[[int], Pool]) -> None:
    test_context_parallel.check(pool(2).run(attention, timeout=300))
