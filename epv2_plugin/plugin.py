"""`enable`, `disable` and `status`: the one way in, whichever framework or launcher calls it."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from epv2_plugin.config import PluginConfig, load_config
from epv2_plugin.elastic.buffer import resolve_backend

logger = logging.getLogger("epv2_plugin")

# Keys, and whole sections, that have nothing to act on with a backend.
WITHOUT_EFFECT = {
    "host": ("sm_budget", "network", "timeouts.gpu_seconds", "fsdp", "pipeline.max_inplace"),
    "cuda": ("sm_budget.pipeline", "sm_budget.fsdp", "fsdp"),
}
# Where stages are left to Megatron's own communicator.
_OF_OUR_STAGES = ("pipeline.max_inflight", "pipeline.max_tensor_bytes", "pipeline.max_inplace")


@dataclass
class _Enabled:
    config: PluginConfig
    backend: str
    bridged: bool


_enabled: _Enabled | None = None


def enable(config: str | os.PathLike[str] | dict[str, Any] | PluginConfig | None = None) -> None:
    """Put the plugin under Megatron-Core, before any model is built. A second call with the same config does nothing.

    Afterwards `moe_token_dispatcher_type="flex"` with `moe_flex_dispatcher_backend="epv2"` dispatches through
    `ElasticBuffer`; everything else stays as it was. Where there is no CUDA device, Megatron-Core is also made to run
    on the CPU.

    Args:
        config: a YAML file, a mapping, a `PluginConfig`, or None for the defaults.

    Raises:
        ConfigError: the configuration is wrong, or asks for what this version or machine does not have.
        ImportError: Megatron-Core is not installed.
        RuntimeError: the plugin is enabled with another configuration.
    """
    global _enabled
    loaded = load_config(config)
    if _enabled is not None:
        if _enabled.config.model_dump() != loaded.model_dump():
            raise RuntimeError(
                f"the plugin is enabled with {_enabled.config.source}; call disable() before enabling {loaded.source}"
            )
        return
    _show_log()
    backend = check(loaded)
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise ImportError("Megatron-Core is not installed: pip install 'epv2_plugin[megatron]'")
    # Megatron reads the device at import: the bridge comes first.
    from epv2_plugin.megatron import cpu_bridge

    with ExitStack() as undo:
        bridged = cpu_bridge.install()
        undo.callback(cpu_bridge.uninstall)
        for adapter in _adapters():
            undo.callback(adapter.uninstall)
            adapter.install(loaded)
        undo.pop_all()
    _enabled = _Enabled(loaded, backend, bridged)
    logger.info(
        "epv2: enabled (configuration: %s); flex backend 'epv2' is there for expert parallelism, pipeline: %s, "
        "context: %s",
        loaded.source,
        *_who_runs(loaded).values(),
    )
    if unused := _unused(loaded, backend):
        logger.info("epv2: without effect on the %s backend: %s", backend, ", ".join(unused))


def _adapters() -> tuple[Any, ...]:
    """The modules that put the plugin under Megatron."""
    from epv2_plugin.megatron import context_parallel, dispatcher, pipeline, te_context_parallel

    return dispatcher, pipeline, context_parallel, te_context_parallel


def _who_runs(config: PluginConfig) -> dict[str, str]:
    wanted = {"pipeline": config.pipeline.transport, "context": config.context.kv_exchange}
    return {name: "stock" if how == "stock" else "epv2" for name, how in wanted.items()}


def _show_log() -> None:
    """Let the first rank's lines about what runs be seen where nobody has set logging up."""
    if not logger.handlers and not logging.getLogger().handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def _unused(config: PluginConfig, backend: str) -> list[str]:
    """Keys that are set but have nothing to act on with `backend`."""
    given = config.model_dump(exclude_defaults=True)
    sections = {name: section for name, section in given.items() if isinstance(section, dict)}
    keys = [f"{name}.{key}" for name, section in sections.items() for key in section if section[key] != "stock"]
    idle = WITHOUT_EFFECT[backend]
    if config.pipeline.transport == "stock":
        idle += _OF_OUR_STAGES
    return [key for key in keys if key in idle or key.partition(".")[0] in idle]


def disable() -> None:
    """Put every replaced symbol back and release the buffers; nothing if the plugin is not enabled.

    Raises:
        CommunicationError: see `ElasticBuffer.destroy`. Every symbol is back; a second call releases what is left.
    """
    global _enabled
    if _enabled is None:
        return
    from epv2_plugin.megatron import arguments, cpu_bridge

    with ExitStack() as undo:  # one that fails must not keep the others from it
        for adapter in (cpu_bridge, *_adapters(), arguments):
            undo.callback(adapter.uninstall)
    _enabled = None


def status() -> dict[str, Any]:
    """What is active: `enabled`, `config`, `backend`, `unused` (keys without effect there),
    `expert`/`pipeline`/`context` (who runs it), `replaced` (dotted names of the symbols replaced), `bridge` (likewise,
    for a framework on a CPU), `groups` (one entry for each buffer: primitive, ranks, backend, transport, SMs, bytes
    sent and more). Groups and bridge of what needs no `enable` (`epv2_plugin.fsdp`, `epv2_plugin.torchtitan`) are there
    in any case. On a GPU a buffer is made at the first micro-batch, unless something says how large it must be."""
    others = _without_megatron()
    if _enabled is None:
        return {"enabled": False, "replaced": [], "bridge": _torchtitan_bridge(), "groups": others}
    from epv2_plugin.megatron import arguments, cpu_bridge

    adapters = _adapters()
    groups = [{"primitive": "expert", **group} for adapter in adapters for group in adapter.groups()]
    transports = {group["backend"] for group in groups if group["primitive"] == "pipeline"}
    left = {"pipeline": "stock"} if transports == {"stock"} else {}
    return {
        "enabled": True,
        "config": _enabled.config.source,
        "backend": _enabled.backend,
        "unused": _unused(_enabled.config, _enabled.backend),
        "expert": "epv2",
        **(_who_runs(_enabled.config) | left),
        "replaced": [name for adapter in (*adapters, arguments) for name in adapter.replaced()],
        "bridge": [*(cpu_bridge.active() if _enabled.bridged else ()), *_torchtitan_bridge()],
        "groups": [*groups, *others],
    }


def _without_megatron() -> list[dict[str, Any]]:
    """Groups of what needs no `enable`, as far as it was imported."""
    loaded = (sys.modules.get(f"epv2_plugin.{name}") for name in ("fsdp", "torchtitan"))
    return [group for module in loaded if module is not None for group in module.groups()]


def _torchtitan_bridge() -> list[str]:
    """What is replaced for torchtitan on a CPU."""
    bridge = sys.modules.get("epv2_plugin.torchtitan.cpu_bridge")
    return [] if bridge is None else list(bridge.active())


def check(config: PluginConfig) -> str:
    """Refuse what this version or machine can't do under Megatron; returns the backend that runs.

    Raises:
        ConfigError: which key it is.
    """
    cuda = torch.cuda.is_available()
    config.check(device_sms=torch.cuda.get_device_properties(0).multi_processor_count if cuda else None)
    try:
        backend = resolve_backend(config.backend)
    except RuntimeError as error:
        raise config.fail("backend", str(error)) from None
    if cuda and backend == "host":
        raise config.fail(
            "backend", "the host backend trains on the CPU; hide the GPU (CUDA_VISIBLE_DEVICES=) to use it"
        )
    if config.expert.mode == "hybrid" and backend == "host":
        raise config.fail("expert.mode", "the host backend makes one hop: 'auto' or 'direct'")
    if not config.expert.host_sync:
        raise config.fail("expert.host_sync", "must be true for Megatron, whose experts take exact counts")
    return backend
