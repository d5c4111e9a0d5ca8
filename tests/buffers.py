"""`ElasticBuffer`s of every kind, so that one test can run on the host, on the emulated device and on a GPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.elastic import ElasticBuffer, buffer
from epv2_plugin.fsdp import install
from epv2_plugin.fsdp.carriers import CudaCarrier
from epv2_plugin.training import devices
from tests import harness
from tests.emulator.runtime import EmulatedRuntime

KINDS = ("host", "emulated")  # what any machine can run; "cuda" is for tests with mark gpu
SMS = 3  # of the emulated device
_ROOM = 48 << 20


class EmulatedBuffer(ElasticBuffer):
    """An `ElasticBuffer` of the cuda backend whose device is the emulator: `runtime`; nodes of `per_node` ranks."""

    def __init__(self, group: dist.ProcessGroup, *, seed: int = 0, per_node: int = 0, **options: Any):
        def make(group: dist.ProcessGroup, timeout_seconds: float) -> EmulatedRuntime:
            self.runtime = EmulatedRuntime(group, seed=seed, num_sms=SMS, lsa_size=per_node or None)
            return self.runtime

        real = buffer.CudaRuntime, buffer.resolve_backend
        buffer.CudaRuntime, buffer.resolve_backend = make, lambda name: "cuda"
        try:
            super().__init__(group, **options)
        finally:
            buffer.CudaRuntime, buffer.resolve_backend = real


def emulated_buffer(seed: int = 0, seconds: float = 60, **options: Any) -> EmulatedBuffer:
    """An `EmulatedBuffer` over all ranks."""
    options = {"num_cpu_timeout_secs": 60, "num_gpu_timeout_secs": seconds, **options}
    return EmulatedBuffer(dist.group.WORLD, seed=seed, **options)


def make_buffer(kind: str, **options: Any) -> ElasticBuffer:
    """A buffer of the backend `kind` over all ranks; those that need it get `num_bytes`.

    "emulated/2": on nodes of 2 ranks, or of 1 where these make no nodes of the group.
    """
    if kind == "host":
        return ElasticBuffer(dist.group.WORLD, backend="host", **options)
    options = {"num_bytes": _ROOM, **options}
    name, _, per_node = kind.partition("/")
    if name == "emulated":
        if per_node and (dist.get_world_size() % int(per_node) or dist.get_world_size() == int(per_node)):
            per_node = "1"
        return emulated_buffer(per_node=int(per_node or 0), **options)
    take_device()
    return ElasticBuffer(dist.group.WORLD, backend="cuda", **options)


def hold_up(made: Any) -> threading.Event:
    """Let an emulated device do no copy or fill for another thread until the event is set, as a driver may while this
    one copies to pageable memory."""
    over = threading.Event()
    for name in ("copy", "fill"):
        call = getattr(made.runtime, name)

        def held(*arguments: Any, call: Callable[..., None] = call) -> None:
            if threading.current_thread() is not threading.main_thread():
                over.wait()
            call(*arguments)

        setattr(made.runtime, name, held)
    return over


class EmulatedCarrier(CudaCarrier):
    """FSDP2's collectives of the cuda backend on the emulator: `runtime`; nodes of `per_node` ranks, 0 = one."""

    device, per_node = "cpu", 0

    def _runtime(self, group: dist.ProcessGroup, seconds: float) -> EmulatedRuntime:
        nodes = 0 < self.per_node < dist.get_world_size(group)
        self.runtime = EmulatedRuntime(group, num_sms=SMS, lsa_size=self.per_node if nodes else None)
        return self.runtime


class OnNodesOfOne(EmulatedCarrier):
    """Likewise; every rank is a node."""

    per_node = 1


class OnNodesOfTwo(EmulatedCarrier):
    """Likewise; a group of two ranks is one node."""

    per_node = 2


class OnNodesOfThree(EmulatedCarrier):
    """Of three each."""

    per_node = 3


EMULATED_CARRIERS = {
    "emulated": EmulatedCarrier,
    "emulated/1": OnNodesOfOne,
    "emulated/2": OnNodesOfTwo,
    "emulated/3": OnNodesOfThree,
}


@contextmanager
def fsdp_on(kind: str) -> Iterator[torch.device]:
    """Let `fsdp.apply` with backend "cuda" run on the emulator where `kind` is that; gives the device of models."""
    if kind == "cuda":
        yield take_device()
        return
    real = install.CudaCarrier, install.resolve_backend
    if kind in EMULATED_CARRIERS:
        install.CudaCarrier, install.resolve_backend = EMULATED_CARRIERS[kind], lambda name: "cuda"
    try:
        yield torch.device("cpu")
    finally:
        install.CudaCarrier, install.resolve_backend = real


def take_device() -> torch.device:
    """This rank's GPU, reached through as many queues as `harness.MOST_RANKS` that share it can have."""
    os.environ.update(devices.environment(max(dist.get_world_size(), harness.MOST_RANKS)))
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def settle(made: ElasticBuffer, work: Callable[[], object] = lambda: None) -> None:
    """Do `work`, and let what was started end: on a GPU a failure shows, and is raised, only then."""
    work()
    if made.device.type == "cuda":
        torch.cuda.synchronize()
    made.capture().current_stream_wait()
