"""torchtitan over the plugin, by torchtitan's own flag; its models and trainer stay as they are:

    --override.imports 'epv2_plugin.torchtitan.token_dispatcher={"config": "my.yaml"}' \\
        epv2_plugin.torchtitan.activation_checkpoint 'epv2_plugin.torchtitan.collectives={"config": "my.yaml"}' \\
        --training.disable_cuda_graphs

`token_dispatcher`: dispatch and combine of every MoE layer go through `ElasticBuffer`. `activation_checkpoint`:
selective checkpointing keeps their results instead of sending all again. `collectives`: FSDP2's through the plugin.
Importing this where there is no CUDA device lets torchtitan run on the CPU (`cpu_bridge`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from epv2_plugin import fsdp
from epv2_plugin.config import PluginConfig, load_config, parse_config
from epv2_plugin.torchtitan import cpu_bridge

# Where torchtitan 0.3.0 can be extended; a version without one of these gets nothing installed.
SEAMS = {
    "torchtitan.config": ("override", "derive"),
    "torchtitan.models.common.token_dispatcher": ("AllToAllTokenDispatcher", "BaseEPTokenDispatcher"),
    "torchtitan.distributed.activation_checkpoint": ("SelectiveAC",),
    "torchtitan.components.optimizer": ("OptimizersContainer",),
}


def _check_version() -> None:
    """Raise ImportError where this version of torchtitan lacks a seam."""
    for name, attributes in SEAMS.items():
        module = importlib.import_module(name)
        for attribute in attributes:
            if not hasattr(module, attribute):
                raise ImportError(f"{name} has no {attribute}")


def _version() -> str:
    try:
        return importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


if importlib.util.find_spec("torchtitan") is None:
    raise ImportError("torchtitan is not installed: pip install 'epv2_plugin[torchtitan]'")
try:
    cpu_bridge.install()  # before anything of torchtitan that looks for a device
    _check_version()
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import derive, override
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    from epv2_plugin.torchtitan import dispatcher
except (ImportError, AttributeError) as error:
    cpu_bridge.uninstall()
    raise ImportError(f"epv2_plugin needs torchtitan 0.3.0, this is {_version()}: {error}") from error

Config = str | os.PathLike[str] | dict[str, Any] | PluginConfig | None


class SavingSelectiveAC(SelectiveAC):
    """Selective activation checkpointing that keeps what was dispatched and combined."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set[Any]:
        """torchtitan's operators and the plugin's."""
        return super().get_save_ops() | dispatcher.operators()


class PluginOptimizers(OptimizersContainer):
    """torchtitan's optimizers, which it builds when the model is sharded: the moment to put our collectives on it."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        plugin: dict[str, Any] = field(default_factory=dict)
        """The plugin's configuration (the content of its YAML)."""
        plugin_source: str = "<defaults>"
        """Where that came from, for messages."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]):
        loaded = parse_config(config.plugin, config.plugin_source)
        for part in model_parts:
            # A seed checkpoint is made of a model that is not sharded.
            if any(isinstance(module, FSDPModule) for module in part.modules()):
                fsdp.apply(part, loaded)
        super().__init__(config, model_parts=model_parts)


@override(
    target=AllToAllTokenDispatcher.Config,
    exact=True,
    description="MoE dispatch and combine through epv2_plugin's ElasticBuffer.",
)
def token_dispatcher(cfg: AllToAllTokenDispatcher.Config, *, config: Config = None) -> Any:
    """torchtitan's override for dispatch and combine.

    Args:
        config: the plugin's YAML file (or its content).

    Raises:
        ConfigError: it is wrong, or asks for what this version or machine does not have.
    """
    loaded = load_config(config)
    dispatcher.check(loaded)
    return derive(cfg, dispatcher.EpTokenDispatcher.Config, **_carried(loaded))


@override(
    target=SelectiveAC.Config,
    exact=True,
    description="Selective activation checkpointing that keeps what epv2_plugin dispatched and combined.",
)
def activation_checkpoint(cfg: SelectiveAC.Config) -> Any:
    """torchtitan's override for selective activation checkpointing."""
    return derive(cfg, SavingSelectiveAC.Config)


@override(
    target=OptimizersContainer.Config,
    exact=True,
    description="FSDP2's all-gathers and reduce-scatters through epv2_plugin.",
)
def collectives(cfg: OptimizersContainer.Config, *, config: Config = None) -> Any:
    """torchtitan's override for the collectives of FSDP2.

    Args:
        config: the plugin's YAML file (or its content).

    Raises:
        ConfigError: it is wrong, or asks for what this version or machine does not have.
    """
    loaded = load_config(config)
    if loaded.fsdp.collectives != "stock":
        dispatcher.check_backend(loaded)
    return derive(cfg, PluginOptimizers.Config, **_carried(loaded))


def groups() -> list[dict[str, Any]]:
    """What runs in each expert-parallel group, for `status()`."""
    return dispatcher.groups()


def release() -> None:
    """Release the buffers, which must happen before their groups are destroyed. Every rank must call it."""
    dispatcher.release()


def _carried(config: PluginConfig) -> dict[str, Any]:
    """What a torchtitan configuration, which is plain data, carries of the plugin's."""
    return {"plugin": config.model_dump(exclude_defaults=True), "plugin_source": config.source}
