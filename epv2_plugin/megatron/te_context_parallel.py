"""Transformer Engine's context parallelism of the type "all_gather", with the plugin's exchange under it.

TE gathers keys and values along the sequence, in the backward once more, and then reduce-scatters their gradients. Its
module does so by two functions that it imports by name, called with a tensor and a group and nothing else since 2.3.
Those two names are replaced there, for Megatron's context-parallel group; TE's attention and its order of chunks stay
as they are, and so do its other types ("p2p", "a2a"), which call neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic import ElasticBuffer
from epv2_plugin.megatron.context_parallel import allow_session, buffer_for
from epv2_plugin.patches import Patches

SEAM = "transformer_engine.pytorch.attention.dot_product_attention.context_parallel"
OLDEST = "2.3"
GATHER, REDUCE_SCATTER = "gather_along_first_dim", "reduce_scatter_along_first_dim"
logger = logging.getLogger("epv2_plugin")

_patches = Patches()
_left_alone: set[dist.ProcessGroup] = set()  # groups of which the log has said so

Exchange = Callable[..., tuple[torch.Tensor, Any]]


def _all_gather(inp: torch.Tensor, buffer: ElasticBuffer) -> torch.Tensor:
    """`[S, ...]` of this rank -> `[P * S, ...]`."""
    part = inp.contiguous()
    gathered = part.new_empty(buffer.num_ranks, *part.shape)
    allow_session(buffer, ElasticBuffer.get_agrs_num_max_session_bytes(buffer.group, part.shape, part.dtype), 1)
    with buffer.agrs_new_session():
        # Into memory of its own: TE still needs the gathered keys when the values' session begins.
        _, wait = buffer.all_gather(part, out=gathered)
        wait()
    return gathered.flatten(0, 1)


def _reduce_scatter(inp: torch.Tensor, buffer: ElasticBuffer) -> torch.Tensor:
    """`[P * S, ...]` of this rank -> sums over ranks `[S, ...]`."""
    parts = inp.contiguous().unflatten(0, (buffer.num_ranks, -1))
    shape = parts.shape[1:]
    allow_session(buffer, ElasticBuffer.get_agrs_num_max_session_bytes(buffer.group, shape, parts.dtype), 1)
    with buffer.agrs_new_session():
        summed, wait = buffer.reduce_scatter(parts)
        wait()
    return summed


def _replacement(stock: Exchange, ours: Callable[[torch.Tensor, ElasticBuffer], torch.Tensor]) -> Exchange:
    @wraps(stock)
    def exchange(inp: torch.Tensor, group: dist.ProcessGroup, *options: Any, **named: Any) -> tuple[torch.Tensor, Any]:
        size = dist.get_world_size(group)
        if size == 1 or not _is_ours(group):
            return stock(inp, group, *options, **named)
        if options or named:
            raise NotImplementedError(
                f"{stock.__name__} with {list(options) + list(named)}: the plugin knows Transformer Engine's call with "
                "a tensor and a group; set context.kv_exchange to 'auto' to leave it to Transformer Engine"
            )
        return ours(inp, buffer_for(group, size)), None  # no handle: the current stream has waited

    return exchange


def _is_ours(group: dist.ProcessGroup) -> bool:
    if group is parallel_state.get_context_parallel_group(check_initialized=False):
        return True
    if group not in _left_alone:
        _left_alone.add(group)
        logger.warning(
            "epv2: Transformer Engine exchanges keys and values of ranks %s by itself: not Megatron's context group",
            dist.get_process_group_ranks(group),
        )
    return False


def _find_seam(config: PluginConfig) -> types.ModuleType | None:
    """TE's module of context parallelism; None where TE can't be imported."""
    try:
        engine = importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        logger.warning("epv2: nothing of Transformer Engine is replaced, as it can't be imported: %s", error)
        return None
    package = importlib.import_module("transformer_engine")
    version = getattr(package, "__version__", getattr(engine, "__version__", "of unknown version"))
    missing = [SEAM]
    try:
        seam = importlib.import_module(SEAM)
        missing = [f"{SEAM}.{name}" for name in (GATHER, REDUCE_SCATTER) if not hasattr(seam, name)]
    except ImportError:
        pass
    if missing:
        raise config.fail(
            "context.kv_exchange",
            f"Transformer Engine {version} has no {missing[0]}: must be {OLDEST} or newer, or the value 'auto', which "
            "leaves the exchange to it",
        )
    return seam


def install(config: PluginConfig) -> None:
    """Put the exchange under Transformer Engine, where it is there and `config` says "all_gather".

    Raises:
        ConfigError: this version of Transformer Engine has other names.
    """
    if config.parallel.context == 1 or importlib.util.find_spec("transformer_engine") is None:
        return
    if config.context.kv_exchange != "all_gather":
        logger.info(
            "epv2: Transformer Engine keeps its own exchange of keys and values; context.kv_exchange = all_gather "
            "takes the plugin's for cp_comm_type 'all_gather'"
        )
        return
    seam = _find_seam(config)
    if seam is None:
        return
    for name, ours in ((GATHER, _all_gather), (REDUCE_SCATTER, _reduce_scatter)):
        _patches.attribute(seam, name, _replacement(getattr(seam, name), ours))
    logger.info("epv2: Transformer Engine's cp_comm_type 'all_gather' exchanges keys and values through the plugin")


def uninstall() -> None:
    """Restore Transformer Engine."""
    _patches.undo()
    _left_alone.clear()


def replaced() -> tuple[str, ...]:
    """Dotted names of Transformer Engine's symbols that are replaced."""
    return _patches.names


def groups() -> list[dict[str, Any]]:
    """None of its own: they are `context_parallel`'s."""
    return []
