"""Pipeline and context parallelism of Megatron over the cuda backend, on the emulated device: the host's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

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
    from epv2_plugin.config import ConfigError

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


def growing(rank: int, size: int) -> list[float]:
    """What arrives of tensors that get larger, each sent by a communicator of its own as schedules have them."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig

    import epv2_plugin
    from epv2_plugin.megatron.pipeline import PipelineCommunicator

    _emulate(True)
    found = []
    try:
        parallel_state.destroy_model_parallel()  # an earlier test's on these ranks
        epv2_plugin.disable()
        epv2_plugin.enable({"timeouts": {"host_seconds": 30}})
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=size)
        config = ModelParallelConfig(pipeline_model_parallel_size=size, pipeline_dtype=torch.float32)
        for rows in (2, 2, 1, 300_000, 4):
            communicator = PipelineCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
            shape = (rows, 1, 2)
            if rank == 0:
                communicator.send_forward(torch.full(shape, float(rows)), False)
                found += [communicator.recv_backward(shape, False).mean().item()]
            else:
                found += [communicator.recv_forward(shape, False).mean().item()]
                communicator.send_backward(torch.full(shape, -float(rows)), False)
        (group,) = epv2_plugin.status()["groups"]
        assert (group["backend"], group["transport"]) == ("cuda", "emulated")
    finally:
        epv2_plugin.disable()
        parallel_state.destroy_model_parallel()
        _emulate(False)
    return found


def test_larger_tensors_of_a_later_schedule(pool: Callable[[int], Pool]) -> None:
    sizes = [2.0, 2.0, 1.0, 300_000.0, 4.0]
    assert pool(2).run(growing, timeout=WAIT) == [[-size for size in sizes], sizes]


def between_nodes(rank: int, size: int) -> tuple[list[float], list[Any]]:
    """Ranks of different nodes, as far as anybody can tell."""
    with mock.patch.object(EmulatedBuffer, "_find_machines", return_value=(size, 1)):
        return losses(rank, size, PP[2], True)


def test_stages_on_several_nodes_are_left_to_megatron(pool: Callable[[int], Pool]) -> None:
    for _, groups in pool(2).run(between_nodes, timeout=WAIT):
        assert groups == [STOCK]


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
    from epv2_plugin.config import ConfigError

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
