"""Where ranks compute: on the GPUs of this machine, which they may share, or on the CPU; and the clock that fits.

Everything else asks here, or Megatron, which computes on the current CUDA device where there is one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epv2_plugin.jit.toolchain import loaded_nccl_version
from epv2_plugin.training.recipe import Recipe
from epv2_plugin.training.titan_recipe import TitanRecipe

CPU = torch.device("cpu")
# CTAs of NCCL's own kernels on one GPU, all its ranks together. A kernel waits for those of the other ranks, so all of
# them must fit beside each other, with more than one communicator at work.
SHARED_NCCL_CTAS = 32
# Queues to one GPU of all processes together: with 112 their contexts could be made on an H200 under MPS, with 128 not
# ("out of memory"). And of one process: streams that wait hold others once all but four of its queues are taken.
SHARED_QUEUES, QUEUES = 96, 32


def environment(ranks_per_gpu: int, contexts: int = 1, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that CUDA and NCCL must find when a rank first uses its GPU.

    Args:
        ranks_per_gpu: most ranks on one GPU; 0 = none is used.
        contexts: that each of them makes on it.
        env: what is set already, and wins.
    """
    if not ranks_per_gpu:
        return {}
    queues = min(QUEUES, max(1, SHARED_QUEUES // (ranks_per_gpu * contexts)))
    found = {"CUDA_DEVICE_MAX_CONNECTIONS": str(queues)}
    if ranks_per_gpu > 1:
        ctas = max(1, SHARED_NCCL_CTAS // ranks_per_gpu)
        found |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": str(ctas)}
    return {name: env.get(name, value) for name, value in found.items()}


@dataclass(frozen=True)
class Place:
    """Where one rank computes.

    Attributes:
        device: `cuda:N` or `cpu`.
        gpus: GPUs that the ranks of this machine compute on, 0 = none.
        ranks_per_gpu: most ranks on one of them.
    """

    device: torch.device
    gpus: int
    ranks_per_gpu: int

    @property
    def environment(self) -> dict[str, str]:
        """See the function of this name."""
        return environment(self.ranks_per_gpu)


def usable_gpus(recipe: Recipe | TitanRecipe) -> int:
    """GPUs of this machine that the recipe's ranks can compute on; 0 = they compute on the CPU.

    Raises:
        ConfigError: the recipe's backend needs a GPU and there is none, or it is the host backend and there is one.
    """
    gpus = torch.cuda.device_count()  # unlike is_available, without the driver, which reads its variables only once
    if recipe.plugin.backend == "cuda" and not gpus:
        raise recipe.plugin.fail("backend", "there is no CUDA device here")
    if recipe.plugin.backend == "host" and gpus:
        raise recipe.plugin.fail(
            "backend", "the host backend trains on the CPU; hide the GPU (CUDA_VISIBLE_DEVICES=) to use it"
        )
    return gpus


def place(gpus: int, env: Mapping[str, str] = os.environ) -> Place:
    """The place of the rank whose `LOCAL_RANK` and `LOCAL_WORLD_SIZE` are in `env`, on a machine with `gpus` GPUs.

    Each rank has a GPU of its own where there are enough; otherwise ranks are dealt out in turn.
    """
    rank = int(env.get("LOCAL_RANK", "0"))
    ranks = int(env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", "1")))
    if not gpus:
        return Place(CPU, 0, 0)
    used = min(gpus, ranks)
    return Place(torch.device("cuda", rank % used), used, -(-ranks // used))


def take(where: Place) -> str:
    """Make this process compute at `where`. Call it before anything has used a GPU.

    Returns:
        What users must know about ranks that share a GPU, empty if none do.
    """
    if where.device.type == "cpu":
        torch.set_num_threads(1)
        return ""
    os.environ.update(where.environment)
    torch.cuda.set_device(where.device)
    if where.ranks_per_gpu <= 1:
        return ""
    settings = ", ".join(f"{name}={os.environ[name]}" for name in where.environment)
    how = "side by side under MPS" if mps_runs() else "in turns: without MPS, times say nothing"
    what = f"{where.ranks_per_gpu} ranks on each of {where.gpus} GPU{'s' if where.gpus > 1 else ''}"
    return f"{what} ({torch.cuda.get_device_name(where.device)}), {how}; {settings}"


def mps_runs() -> bool:
    """Whether the daemon of CUDA's Multi-Process Service, by which processes share a GPU at the same time, is there."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return (Path(folder) / "nvidia-cuda-mps-control.pid").exists()


def facts(where: Place) -> dict[str, Any]:
    """For reports: GPU, number of GPUs, ranks on each, MPS, CUDA and NCCL; empty on the CPU."""
    if where.device.type == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(where.device)
    return {
        "gpu": f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB",
        "gpus": where.gpus,
        "ranks per gpu": where.ranks_per_gpu,
        "mps": mps_runs(),
        "cuda": torch.version.cuda,
        "nccl": loaded_nccl_version(),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
    }


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def current() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else CPU


def process_group_backend() -> str:
    """torch.distributed's backend: NCCL for tensors on a GPU, gloo for those on the host."""
    return "cpu:gloo,cuda:nccl" if on_gpu() else "gloo"


def mark() -> Any:
    """The time now: of the current stream on a GPU, which need not have come here yet, of the host elsewhere."""
    if not on_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Seconds between two marks. On a GPU both must have been reached: call `synchronize` first."""
    return begin.elapsed_time(end) * 1e-3 if on_gpu() else end - begin


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if on_gpu():
        torch.cuda.synchronize()
