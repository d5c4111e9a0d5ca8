"""Lets Megatron-Core train on a machine without a CUDA device, over gloo.

Megatron names the CUDA device literally in factory calls, streams, events and random-number state. `install` replaces
exactly those names by host equivalents: a host has one queue of work, so streams and events are always complete, and
one generator, so CUDA's random state is the CPU's. `torch.cuda.is_available()` keeps saying False.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from epv2_plugin.patches import Patches

logger = logging.getLogger("epv2_plugin")

CPU = torch.device("cpu")
FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
# 0.17 and newer import this Triton kernel file without a guard, for a stash that needs a GPU anyway.
TRITON_ONLY = ("megatron.core.transformer.moe.ops.paged_stash", "transformer/moe/ops/paged_stash.py")
TRITON_NAMES = {"GLOBAL_BLOCK_SIZE": 0, "paged_stash_copy_kernel": None, "paged_stash_pop_kernel": None}

_patches = Patches()


class HostEvent:
    """An event that has happened when it is recorded; `elapsed_time` is in milliseconds, as CUDA's."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class HostStream:
    """The one queue of work that a host has, under every name that Megatron gives it."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        event = event or HostEvent()
        event.record(self)
        return event

    def wait_event(self, event: HostEvent) -> None:
        pass

    def wait_stream(self, stream: HostStream) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


_STREAM = HostStream()


@contextlib.contextmanager
def _on_stream(stream: HostStream | None) -> Iterator[None]:
    yield


def _no_op() -> Callable[..., None]:
    """A new function that does nothing; torch._dynamo keeps a table by function, so every name needs its own."""
    return lambda *args, **kwargs: None


def _is_cuda(device: object) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


def _on_host(factory: Callable) -> Callable:
    """`factory`, with a CUDA device replaced by the CPU; pinning has no meaning there."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _cuda_type(type_: Callable) -> Callable:
    """`Tensor.type` that reports, and accepts, the CUDA type names by which Megatron sorts parameters."""

    @functools.wraps(type_)
    def call(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return type_(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return type_(self, dtype, *args, **kwargs)

    return call


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _host_splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What `maybe_move_tensor_to_cpu` gives for a CUDA tensor, for one that is on the CPU already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _torch_replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of torch's part."""
    cuda = torch.cuda
    return [
        *((torch, name, _on_host(getattr(torch, name))) for name in FACTORIES),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (torch.Tensor, "type", _cuda_type(torch.Tensor.type)),
        (torch.Tensor, "record_stream", _no_op()),
        (cuda, "current_device", lambda: CPU),
        (cuda, "set_device", _no_op()),
        (cuda, "synchronize", _no_op()),
        (cuda, "empty_cache", _no_op()),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "Stream", HostStream),
        (cuda, "Event", HostEvent),
        (cuda, "stream", _on_stream),
        (cuda, "set_stream", _no_op()),
        (cuda, "current_stream", lambda *args: _STREAM),
        (cuda, "default_stream", lambda *args: _STREAM),
        (cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (cuda, "set_rng_state", _set_rng_state),
        (cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
        (cuda.random, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    ]


def _megatron_replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of Megatron's part."""
    core = "megatron.core."
    rng = importlib.import_module(core + "tensor_parallel.random")
    moe_utils = importlib.import_module(core + "transformer.moe.moe_utils")
    dispatcher = importlib.import_module(core + "transformer.moe.token_dispatcher")
    local = importlib.import_module("epv2_plugin.megatron.local_attention")
    return [
        (rng, "_set_cuda_rng_state", _set_rng_state),
        (moe_utils, "maybe_move_tensor_to_cpu", _host_splits),
        (dispatcher, "maybe_move_tensor_to_cpu", _host_splits),
        *local.replacements(),
    ]


def _without_triton() -> None:
    """Stand in for the file that can't be imported without Triton, if Megatron has it and Triton is not there."""
    spec = importlib.util.find_spec("megatron.core")
    module, file = TRITON_ONLY
    if spec is None or spec.origin is None or importlib.util.find_spec("triton") is not None:
        return
    if module not in sys.modules and (Path(spec.origin).parent / file).exists():
        stand_in = types.ModuleType(module)
        vars(stand_in).update(TRITON_NAMES)
        _patches.item("sys.modules", sys.modules, module, stand_in)


def install() -> bool:
    """Replace what Megatron-Core needs to run without a CUDA device; a second call changes nothing.

    Returns:
        True if the bridge is in place, False where there is a CUDA device (nothing is replaced then).
    """
    if torch.cuda.is_available():
        return False
    if _patches.once(_replace):
        logger.info("no CUDA device: Megatron-Core runs on the CPU, %d names bridged", len(_patches.names))
    return True


def bridge_training() -> bool:
    """Let `megatron.training`, which a Megatron-LM script starts with, do without a CUDA device, too; a second call
    changes nothing.

    Returns:
        As `install`, which comes before.
    """
    if not _patches.names or "torch.cuda.device_count" in _patches.names:
        return bool(_patches.names)
    arguments = importlib.import_module("megatron.training.arguments")
    initialize = importlib.import_module("megatron.training.initialize").initialize_megatron

    @functools.wraps(initialize)
    def without_cuda(*args: Any, **kwargs: Any) -> Any:
        return initialize(*args, **{**kwargs, "allow_no_cuda": True})

    _patches.everywhere("megatron.training", initialize, without_cuda)
    # It makes its process groups only if there is a device, and asks for its architecture before there is one.
    _patches.attribute(torch.cuda, "device_count", lambda: 1)
    _patches.attribute(arguments, "get_device_arch_version", lambda: 10)  # no demands on queues to the device
    return True


def _replace() -> None:
    # torch.compile would spend 15 s on a C++ build of what runs in 0.1 s as it is.
    _patches.item("os.environ", os.environ, "TORCHDYNAMO_DISABLE", "1")
    if (dynamo := sys.modules.get("torch._dynamo.config")) is not None:
        _patches.attribute(dynamo, "disable", True)
    _without_triton()
    # Megatron first: importing it imports torch._dynamo, which wants to find torch's functions as they were.
    for owner, name, replacement in [*_megatron_replacements(), *_torch_replacements()]:
        _patches.attribute(owner, name, replacement)


def uninstall() -> None:
    """Put every replaced name back as it was."""
    _patches.undo()


def active() -> tuple[str, ...]:
    """Dotted names of what is replaced now, in the order of replacement."""
    return _patches.names
