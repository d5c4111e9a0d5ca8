"""Puts the plugin's collectives on `fully_shard`-ed models and takes them off."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from epv2_plugin.config import ConfigError, PluginConfig, load_config
from epv2_plugin.elastic.backends.cuda_shards import Slots
from epv2_plugin.elastic.buffer import resolve_backend
from epv2_plugin.elastic.errors import UnavailableError
from epv2_plugin.elastic.sizing import session_bytes
from epv2_plugin.fsdp.carriers import Carrier, CudaCarrier, HostCarrier
from epv2_plugin.fsdp.collectives import PluginAllGather, PluginReduceScatter

logger = logging.getLogger("epv2_plugin")

# FSDP2 has setters for a module with one parameter group; a MoE block, whose experts are sharded over another mesh than
# the rest, has several, and their attributes are set one by one.
_COMMS = ("_all_gather_comm", "_reduce_scatter_comm")
_AHEAD = 2  # layers in a window: one in use, one fetched ahead (or still read by a peer)


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
    state: Any  # FSDP2's, of the module

    @property
    def gather_groups(self) -> list[dist.ProcessGroup]:
        """Those that FSDP2 may gather parameters with, the group of the shards first."""
        infos = (self.param_group.mesh_info, self.param_group.post_forward_mesh_info)
        return _several(getattr(info, "shard_process_group", None) for info in infos)

    @property
    def reduce_groups(self) -> list[dist.ProcessGroup]:
        """The one that FSDP2 reduces gradients with; none where one rank has all."""
        info = self.param_group.mesh_info
        own = getattr(info, "reduce_scatter_process_group", None) or getattr(info, "shard_process_group", None)
        return _several([own])

    def prefetched(self, group: dist.ProcessGroup) -> int:
        """Most parameter groups of `group` that the module fetches ahead at once, where its user has named them."""
        lists = (self.state._states_to_forward_prefetch, self.state._states_to_backward_prefetch)
        return max(
            sum(
                getattr(other.mesh_info, "shard_process_group", None) is group
                for state in states
                for other in param_groups_of(state) or []
            )
            for states in lists
        )

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes of the gathered parameters, from however many ranks, and of the gradients before they are reduced."""
        ranks = self.param_group.mesh_info.shard_mesh_size
        numel, gathered, policy = 0, 0, self.param_group.mp_policy
        widest = torch.float32 if policy.reduce_dtype is None else policy.reduce_dtype
        for param in self.param_group.fsdp_params:
            shard = param.padded_sharded_param_size.numel()
            dtype = policy.param_dtype or param.sharded_param.dtype
            numel, gathered = numel + shard, gathered + shard * dtype.itemsize
            if policy.reduce_dtype is None:
                widest = max(widest, dtype, key=lambda each: each.itemsize)
        return session_bytes(ranks, (gathered,), 1), session_bytes(ranks, (numel,), widest.itemsize)


def _several(groups: Iterable[dist.ProcessGroup | None]) -> list[dist.ProcessGroup]:
    """Without repetitions, and without those of one rank, which FSDP2 never communicates with."""
    return [group for group in dict.fromkeys(groups) if group is not None and group.size() > 1]


@dataclass
class _Need:
    """What one process group must have room for: bytes of the largest layer, and layers at once.

    Attributes:
        gathered_at, reduced_at: names of the modules with these layers.
    """

    gathered: int = 0
    reduced: int = 0
    gathers: int = _AHEAD
    reductions: int = _AHEAD
    gathered_at: str = ""
    reduced_at: str = ""

    @property
    def largest(self) -> tuple[int, str]:
        """Of both kinds, with its module."""
        return max((self.gathered, self.gathered_at), (self.reduced, self.reduced_at))


def apply(model: nn.Module, config: str | os.PathLike[str] | dict[str, Any] | PluginConfig | None = None) -> None:
    """Let FSDP2 gather the parameters and reduce the gradients of `model` through the plugin.

    Every rank calls it, after the last `fully_shard` and before the first step. Modules with several parameter groups
    (shards over different meshes) are included. A second call with the same configuration does nothing.

    Args:
        model: itself sharded by `fully_shard`, or with modules in it that are.
        config: a YAML file, a mapping, a `PluginConfig`, or None for the defaults; `fsdp`, `sm_budget.fsdp`, `backend`
            and `timeouts` count here. `fsdp.collectives: stock` leaves FSDP2 as it is.

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
        logger.info("epv2: FSDP2 keeps its own collectives: fsdp.collectives = stock in %s", loaded.source)
        return
    found = list(_parameter_groups(model))
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without a module that fully_shard was called on")
    backend, needs = _backend(loaded, found), _needs(found)
    for group, need in needs.items():
        _check_window(loaded, backend, group, need)
    carriers: dict[dist.ProcessGroup, Carrier] = {}
    try:
        for group, need in needs.items():
            carriers[group] = _carrier(loaded, backend, group, need)
    except BaseException as error:
        for carrier in carriers.values():
            with contextlib.suppress(Exception):  # what is raised below is why
                carrier.close(abandon=True)
        if isinstance(error, UnavailableError):
            raise loaded.fail("fsdp.collectives", f"{error}. 'stock' leaves them to FSDP2") from error
        raise
    installed = _Installed(loaded, [], carriers)
    for each in found:
        installed.before.append((weakref.ref(each.param_group), *(getattr(each.param_group, name) for name in _COMMS)))
        kinds = ((PluginAllGather, each.gather_groups), (PluginReduceScatter, each.reduce_groups))
        for name, (kind, groups_of_kind) in zip(_COMMS, kinds, strict=True):
            if groups_of_kind:
                setattr(each.param_group, name, kind({group: carriers[group] for group in groups_of_kind}))
    _installed[model] = installed
    if dist.get_rank() == 0:
        for carrier in carriers.values():
            what = carrier.groups()
            logger.info(
                "epv2: FSDP2's all-gathers and reduce-scatters among %d ranks: %s backend over %s, 0 and %d SMs, sums "
                "in fp32 in a fixed order; windows of %d bytes",
                len(what["ranks"]),
                what["backend"],
                what["transport"],
                what["sms"],
                what["window_bytes"],
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
    with contextlib.ExitStack() as steps:  # one that fails must not keep the others from it
        for carrier in reversed(installed.carriers.values()):
            steps.callback(carrier.close)


def watch(model: nn.Module, wrap: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> None:
    """Let every all-gather and reduce-scatter of `model` be called through `wrap(call, name)`, whoever does it.

    Args:
        wrap: returns what is called instead of `call`; `name` is "all_gather" or "reduce_scatter".
    """
    for each in _parameter_groups(model):
        for name, watched in zip(_COMMS, ("all_gather", "reduce_scatter"), strict=True):
            setattr(each.param_group, name, _Watched(getattr(each.param_group, name), wrap, watched))


class _Watched:
    """One of FSDP2's two objects, called through something else."""

    def __init__(self, comm: Any, wrap: Callable[[Callable[..., Any], str], Callable[..., Any]], name: str):
        self.allocate, self._call = comm.allocate, wrap(comm, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def groups() -> list[dict[str, Any]]:
    """What runs in each process group of the models that have the plugin's collectives, for `status()`."""
    return [
        {"primitive": "fsdp", **carrier.groups()}
        for installed in _installed.values()
        for carrier in installed.carriers.values()
    ]


def param_groups_of(state: Any) -> list[Any] | None:
    """FSDP2's parameter groups of a module with this state, before torch 2.13 one at most; None = not to be found."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    if hasattr(state, "_fsdp_param_group"):
        return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return None


def _parameter_groups(model: nn.Module) -> Iterator[_Group]:
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        param_groups = param_groups_of(state)
        if param_groups is None or any(not hasattr(group, comm) for group in param_groups for comm in _COMMS):
            raise RuntimeError(
                f"torch {torch.__version__}: its FSDP2 can't be given collectives for each parameter group; tested "
                "with torch 2.11 and 2.13"
            )
        for param_group in param_groups:
            found = _Group(name or "the root module", param_group, state)
            if getattr(param_group.mesh_info, "shard_process_group", None) is None:
                mesh = param_group.mesh_info.mesh
                raise ValueError(
                    f"{found.module} is on the mesh {dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))}, "
                    "which only replicates: a mesh dimension to shard over is needed"
                )
            yield found


def _backend(config: PluginConfig, found: list[_Group]) -> str:
    """The backend that runs, "host" or "cuda"."""
    try:
        backend = resolve_backend(config.backend)
    except RuntimeError as error:
        raise config.fail("backend", str(error)) from None
    takes = (CudaCarrier if backend == "cuda" else HostCarrier).device
    for each in found:
        if each.param_group.device.type != takes:
            raise config.fail(
                "backend",
                f"the parameters of {each.module} are on {each.param_group.device}, {backend} takes {takes} tensors",
            )
    if takes == "cuda":
        config.check(device_sms=torch.cuda.get_device_properties(found[0].param_group.device).multi_processor_count)
    return backend


def _needs(found: list[_Group]) -> dict[dist.ProcessGroup, _Need]:
    """What each process group must have room for."""
    needs: dict[dist.ProcessGroup, _Need] = {}
    for each in found:
        for group in each.gather_groups:
            need = needs.setdefault(group, _Need())
            num_bytes, _ = each.num_bytes
            need.gathered, need.gathered_at = max((need.gathered, need.gathered_at), (num_bytes, each.module))
            # Beside the layers that a module fetches ahead by name lies what was gathered for itself.
            need.gathers = max(need.gathers, 1 + each.prefetched(group))
        for group in each.reduce_groups:
            need = needs.setdefault(group, _Need())
            _, num_bytes = each.num_bytes
            need.reduced, need.reduced_at = max((need.reduced, need.reduced_at), (num_bytes, each.module))
            need.reductions = max(need.reductions, 1 + getattr(each.param_group, "reduce_scatter_max_input_buffers", 1))
    return needs


def _check_window(config: PluginConfig, backend: str, group: dist.ProcessGroup, need: _Need) -> None:
    """Raise where the configured window is too small."""
    limit, (largest, module) = config.fsdp.window_bytes, need.largest
    at_once = 1 if backend == "host" else _AHEAD
    if limit != "auto" and limit < at_once * largest:
        more = "" if at_once == 1 else f", {at_once} times {largest},"
        raise ConfigError(
            config.source,
            "fsdp.window_bytes",
            limit,
            f"{module} needs {at_once * largest} bytes{more} on {group.size()} ranks",
        )


def _carrier(config: PluginConfig, backend: str, group: dist.ProcessGroup, need: _Need) -> Carrier:
    limit = config.fsdp.window_bytes
    if backend == "host":
        return HostCarrier(group, _AHEAD * need.largest[0] if limit == "auto" else limit, config)
    slots = [
        Slots(num_bytes, (count if limit == "auto" else limit // num_bytes) if num_bytes else 0)
        for num_bytes, count in ((need.gathered, need.gathers), (need.reduced, need.reductions))
    ]
    return CudaCarrier(group, slots[0], slots[1], config)
