"""Lets torchtitan train on a machine without a CUDA device, over gloo.

torchtitan takes its device from torch when it is imported, measures CUDA memory, compiles attention for CUDA only, and
reduces gradients by an operation that gloo lacks. `install` replaces exactly those names, before torchtitan's modules
are imported; with a CUDA device it replaces nothing.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from epv2_plugin.patches import Patches

logger = logging.getLogger("epv2_plugin")

# A module of Triton kernels, for a dispatcher that needs NVLink anyway.
TRITON_ONLY = "torchtitan.distributed.minimal_async_ep.kernels"

_patches = Patches()


class _HostDevice(types.ModuleType):
    """`torch.cpu` with what torchtitan asks of `torch.cuda`: name and memory of a device, which nobody knows."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "CPU"

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return types.SimpleNamespace(total_memory=1)  # divides what was used, which is not known

    @staticmethod
    def memory_stats(device: Any = None) -> dict[str, int]:
        return {}

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def current_device() -> int:
        return 0


class _Anything(types.ModuleType):
    """A module in which every public name exists and can't be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _attend(
    self: Any,
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    *,
    attention_masks: torch.Tensor,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> torch.Tensor:
    """In the place of `FlexAttention.forward`, which has no backward on a CPU: the same attention, mask dense."""
    given = [name for name in ("score_mod", "out_transform") if options.get(name) is not None]
    if given:
        raise RuntimeError(f"FlexAttention on a CPU: {given[0]} is not supported by the bridge")
    q, k, v = (each.transpose(1, 2) for each in (q_BLNH, k_BLNH, v_BLNH))
    out = scaled_dot_product_attention(q, k, v, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)


def _dense_mask(
    mask_mod: Callable, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """In the place of a compiled block mask: bool `[B, H, Q_LEN, KV_LEN]`."""
    from torch.nn.attention.flex_attention import create_mask

    return create_mask(mask_mod, B, H, Q_LEN, KV_LEN, device="cpu")


def _by_sums(factors: Callable) -> Callable:
    """FSDP2's choice of a reduce operation, for a device whose collectives can only sum."""

    @functools.wraps(factors)
    def choose(
        reduce_group: Any, all_reduce_group: Any, dtype: torch.dtype, device: str = "", *args: Any, **kwargs: Any
    ) -> Any:
        factor = kwargs.pop("factor", args[0] if args else None)
        return factors(reduce_group, all_reduce_group, dtype, device, factor, True)

    return choose


def install() -> bool:
    """Replace what torchtitan needs to run without a CUDA device; a second call changes nothing.

    Returns:
        True if the bridge is in place, False where there is a CUDA device (nothing is replaced then).
    """
    if torch.cuda.is_available():
        return False
    if _patches.once(_replace):
        logger.info("epv2: no CUDA device: torchtitan runs on the CPU, %d names bridged", len(_patches.names))
    return True


def _replace() -> None:
    utils = importlib.import_module("torchtitan.tools.utils")
    _patches.attribute(utils, "device_type", "cpu")
    _patches.attribute(utils, "device_module", _HostDevice("epv2_plugin.torchtitan.cpu_bridge.host"))
    if TRITON_ONLY not in sys.modules:
        _patches.item("sys.modules", sys.modules, TRITON_ONLY, _Anything(TRITON_ONLY))
    collectives = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    _patches.attribute(collectives, "_get_gradient_divide_factors", _by_sums(collectives._get_gradient_divide_factors))
    attention = importlib.import_module("torchtitan.models.common.attention")
    _patches.attribute(attention.FlexAttention, "forward", _attend)
    _patches.attribute(attention, "_compiled_create_block_mask", _dense_mask)
    distributed = importlib.import_module("torchtitan.distributed.utils")
    _patches.attribute(distributed, "set_pg_timeouts", lambda *args, **kwargs: None)


def uninstall() -> None:
    """Put every replaced name back as it was."""
    _patches.undo()


def active() -> tuple[str, ...]:
    """Dotted names of what is replaced now, in the order of replacement."""
    return _patches.names
