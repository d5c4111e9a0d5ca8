"""The cuda backend on the emulator: its Python and its kernels, without a GPU, against the same oracle as the host's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin.elastic import ElasticBuffer, buffer
from tests import test_elastic
from tests.emulator.runtime import EmulatedRuntime
from tests.harness import Pool
from tests.oracle import Case

WINDOW = 32 << 20
SMS = 3
_buffers: dict[tuple[int, bool], ElasticBuffer] = {}


def emulated_buffer(seed: int = 0, **options: Any) -> ElasticBuffer:
    """An `ElasticBuffer` whose device is the emulator."""
    runtimes: list[EmulatedRuntime] = []

    def make(group: dist.ProcessGroup, timeout_seconds: float) -> EmulatedRuntime:
        runtimes.append(EmulatedRuntime(group, seed=seed, num_sms=SMS))
        return runtimes[0]

    real = buffer.CudaRuntime, buffer.resolve_backend
    buffer.CudaRuntime, buffer.resolve_backend = make, lambda name: "cuda"
    try:
        made = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=60, num_gpu_timeout_secs=60, **options)
    finally:
        buffer.CudaRuntime, buffer.resolve_backend = real
    made.runtime = runtimes[0]
    return made


def round_trip(rank: int, size: int, case: Case) -> dict[str, Any]:
    """`test_elastic.round_trip` on the emulated cuda backend, at most SMS blocks a kernel."""
    key = (size, case.multiple_reduction)
    if key not in _buffers:
        _buffers[key] = emulated_buffer(num_bytes=WINDOW, allow_multiple_reduction=case.multiple_reduction)
    made = _buffers[key]
    test_elastic._buffers[case.multiple_reduction] = made
    made.get_theoretical_num_sms = lambda *_: 1 + case.seed % SMS
    result = test_elastic.round_trip(rank, size, case)
    assert all(launch.ctas <= 1 + case.seed % SMS for launch in made.runtime.launches)
    made.runtime.launches.clear()
    return result


def on_cuda(case: Case) -> Case:
    """`case` with what the cuda backend wants: rows of multiples of 16 bytes, a limit of tokens."""
    step = 16 if case.scales else {"fp32": 4, "bf16": 8, "fp16": 8}[case.dtype]
    return dataclasses.replace(
        case,
        hidden=-(-case.hidden // step) * step,
        max_tokens=case.max_tokens or max(1, *case.tokens),
        topk=min(case.topk, 32),
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_shape(pool: Callable[[int], Pool], ranks: int) -> None:
    @settings(max_examples=15)
    @given(st.composite(test_elastic.layouts)(ranks))
    def compare(case: Case) -> None:
        case = on_cuda(case)
        test_elastic.check(case, pool(ranks).run(round_trip, case), leftovers_are_zero=False)

    compare()


@pytest.mark.parametrize("name", test_elastic.EDGE_CASES)
def test_edge_case(pool: Callable[[int], Pool], name: str) -> None:
    case = on_cuda(test_elastic.EDGE_CASES[name])
    test_elastic.check(case, pool(4).run(round_trip, case), leftovers_are_zero=False)
