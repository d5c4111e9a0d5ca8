"""Puts the plugin's collectives on `fully_shard`-ed models and takes them off."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from epv2_plugin.config import ConfigError, PluginConfig, load_config
from epv2_plugin.elastic.buffer import resolve_backend
from epv2_plugin.elastic.sizing import session_bytes
from epv2_plugin.fsdp.collectives import Carrier, HostCarrier, PluginAllGather, PluginReduceScatter

logger = logging.getLogger("epv2_plugin")

# FSDP2 has setters for a module with one parameter group; a MoE block, whose experts are sharded over another mesh than
# the rest, has several, and their attributes are set one by one.
_COMMS = ("_all_gather_comm", "_reduce_scatter_comm")
_AHEAD = 2  # layers in the window: one in use, one fetched ahead


@dataclass
class _Installed:
    config: PluginConfig
    before: list[tuple[weakref.ref[Any], Any, Any]]  # parameter group, its two objects before apply
    carriers: dict[dist.ProcessGroup, Carrier]


_installed: weakref.WeakKeyDictionary[nn.Module, _Installed] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Group:
    """A parameter group of FSDP2, and where it is."""

    module: str
    param_group: Any

    @property
    def process_groups(self) -> list[dist.ProcessGroup]:
        """Those that FSDP2 may call our objects with, the group of the shards first."""
        infos = (self.param_group.mesh_info, self.param_group.post_forward_mesh_info)
        found = [getattr(info, "shard_process_group", None) for info in infos]
        found.append(getattr(infos[0], "reduce_scatter_process_group", None))
        return list(dict.fromkeys(group for group in found if group is not None))

    def window_bytes(self, ranks: int) -> int:
        """Bytes of the gathered parameters, or of the gradients before they are reduced, whichever are more."""
        numel, gathered, policy = 0, 0, self.param_group.mp_policy
        widest = torch.float32 if policy.reduce_dtype is None else policy.reduce_dtype
        for param in self.param_group.fsdp_params:
            shard = param.padded_sharded_param_size.numel()
            dtype = policy.param_dtype or param.sharded_param.dtype
            numel, gathered = numel + shard, gathered + shard * dtype.itemsize
            if policy.reduce_dtype is None:
                widest = max(widest, dtype, key=lambda each: each.itemsize)
        return max(session_bytes(ranks, (gathered,), 1), session_bytes(ranks, (numel,), widest.itemsize))


def apply(model: nn.Module, config: str | os.PathLike[str] | dict[str, Any] | PluginConfig | None = None) -> None:
    """Let FSDP2 gather the parameters and reduce the gradients of `model` through the plugin.

    Every rank calls it, after the last `fully_shard` and before the first step. Modules with several parameter groups
    (shards over different meshes) are included. A second call with the same configuration does nothing.

    Args:
        model: itself sharded by `fully_shard`, or with modules in it that are.
        config: a YAML file, a mapping, a `PluginConfig`, or None for the defaults; `fsdp`, `backend` and `timeouts`
            count here. `fsdp.collectives: stock` leaves FSDP2 as it is.

    Raises:
        ConfigError: the configuration is wrong, asks for what this version or machine does not have, or its
            `fsdp.window_bytes` is too small for a layer.
        ValueError: nothing in the model is sharded, or over a mesh without a dimension to shard over.
        RuntimeError: this torch's FSDP2 lacks what this needs, or the model has the plugin's with another
            configuration.
        CommunicationError: not every rank called it in time, or with another configuration.
    """
    loaded = load_config(config)
    if (before := _installed.get(model)) is not None:
        if before.config.model_dump() != loaded.model_dump():
            raise RuntimeError(
                f"the model's collectives were installed with {before.config.source}; call remove before applying "
                f"{loaded.source}"
            )
        return
    if loaded.fsdp.collectives == "stock":
        return
    found = list(_parameter_groups(model))
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without a module that fully_shard was called on")
    _check_backend(loaded, found)
    windows = _windows(loaded, found)
    carriers: dict[dist.ProcessGroup, Carrier] = {}
    try:
        for group, window_bytes in windows.items():
            carriers[group] = HostCarrier(group, window_bytes, loaded)
    except BaseException:
        for carrier in carriers.values():
            carrier.close()
        raise
    installed = _Installed(loaded, [], carriers)
    for each in found:
        installed.before.append((weakref.ref(each.param_group), *(getattr(each.param_group, name) for name in _COMMS)))
        own = {group: carriers[group] for group in each.process_groups}
        each.param_group._all_gather_comm = PluginAllGather(own)
        each.param_group._reduce_scatter_comm = PluginReduceScatter(own)
    _installed[model] = installed
    if dist.get_rank() == 0:
        logger.info(
            "epv2: FSDP2's all-gathers and reduce-scatters of %d parameter groups: host backend over gloo, sums in "
            "fp32 in rank order; %s",
            len(found),
            ", ".join(f"{group.size()} ranks: window of {size} bytes" for group, size in windows.items()),
        )


def remove(model: nn.Module) -> None:
    """Give FSDP2 what it had before `apply(model)`; nothing if the plugin's are not there. Every rank calls it."""
    installed = _installed.pop(model, None)
    if installed is None:
        return
    for reference, *comms in installed.before:
        if (param_group := reference()) is not None:
            for name, comm in zip(_COMMS, comms, strict=True):
                setattr(param_group, name, comm)
    for carrier in installed.carriers.values():
        carrier.close()


def groups() -> list[dict[str, Any]]:
    """What runs in each process group of the models that have the plugin's collectives, for `status()`."""
    return [
        {"primitive": "fsdp", **carrier.groups()}
        for installed in _installed.values()
        for carrier in installed.carriers.values()
    ]


def _parameter_groups(model: nn.Module) -> Iterator[_Group]:
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        param_groups = getattr(state, "_fsdp_param_groups", None)
        if param_groups is None or any(not hasattr(group, comm) for group in param_groups for comm in _COMMS):
            raise RuntimeError(
                f"torch {torch.__version__}: its FSDP2 can't be given collectives for each parameter group; tested "
                "with torch 2.13"
            )
        for param_group in param_groups:
            found = _Group(name or "the root module", param_group)
            if not found.process_groups:
                mesh = param_group.mesh_info.mesh
                raise ValueError(
                    f"{found.module} is on the mesh {dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))}, "
                    "which only replicates: a mesh dimension to shard over is needed"
                )
            yield found


def _check_backend(config: PluginConfig, found: list[_Group]) -> None:
    try:
        backend = resolve_backend(config.backend)
    except RuntimeError as error:
        raise config.fail("backend", str(error)) from None
    if backend == "cuda":
        raise config.fail(
            "backend",
            "collectives of FSDP2 exist on the host backend only in this version: fsdp.collectives: stock leaves them "
            "to FSDP2",
        )
    for each in found:
        if each.param_group.device.type != HostCarrier.device:
            raise config.fail(
                "backend", f"the parameters of {each.module} are on {each.param_group.device}, host takes the CPU's"
            )


def _windows(config: PluginConfig, found: list[_Group]) -> dict[dist.ProcessGroup, int]:
    """Bytes of each process group's window."""
    windows: dict[dist.ProcessGroup, int] = {}
    for each in found:
        for group in each.process_groups:
            needed, limit = each.window_bytes(group.size()), config.fsdp.window_bytes
            if limit != "auto" and needed > limit:
                raise ConfigError(
                    config.source,
                    "fsdp.window_bytes",
                    limit,
                    f"{each.module} needs {needed} bytes on {group.size()} ranks",
                )
            windows[group] = max(windows.get(group, 0), _AHEAD * needed if limit == "auto" else limit)
    return windows
