"""The plugin's flags in Megatron-LM's own argument parser, so that they show in its `--help` and its argument dump.

And an answer to its demand that `CUDA_DEVICE_MAX_CONNECTIONS` be 1, which on Hopper it makes wherever TP or CP is
larger than 1, for speed, and with which the plugin's transfers between stages and of keys and values can't run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic.backends.cuda_p2p import check_connections
from epv2_plugin.elastic.errors import UnavailableError
from epv2_plugin.patches import Patches

DISPATCHER_FLAGS = "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend epv2"
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
# With these Megatron-LM itself wants or allows more than one.
_WITH_QUEUES = ("use_torch_fsdp2", "use_megatron_fsdp", "overlap_moe_expert_parallel_comm")

_patches = Patches()
logger = logging.getLogger("epv2_plugin")


@dataclass(frozen=True)
class Selection:
    """What a command line says about the plugin, read before Megatron-LM parses it."""

    config: str | None
    """Path given as `--epv2-config`."""
    dispatcher: str
    """Flags with which the command line selects a stock token dispatcher; empty if it selects the plugin's, or leaves
    the choice to a Megatron-LM YAML file."""
    backend: str = ""
    """Of torch.distributed, given as `--distributed-backend`."""


def read(argv: Sequence[str], prog: str | None = None) -> Selection:
    """Read `argv` (without the script's name); what is not the plugin's business is left to Megatron-LM to judge.

    Raises:
        SystemExit: `--epv2-config` without a path (exit code 2, usage on stderr).
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    _add_flags(parser)
    parser.add_argument("--moe-token-dispatcher-type", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("--moe-flex-dispatcher-backend", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("--distributed-backend", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("--yaml-cfg", nargs="?", help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args(list(argv))
    kind, backend = args.moe_token_dispatcher_type, args.moe_flex_dispatcher_backend
    ours = kind == "flex" and backend == "epv2"
    flags = [("--moe-token-dispatcher-type", kind), ("--moe-flex-dispatcher-backend", backend)]
    given = " ".join(f"{flag} {value}" for flag, value in flags if value) or "Megatron-LM's default dispatcher"
    return Selection(args.epv2_config, "" if ours or args.yaml_cfg else given, args.distributed_backend or "")


def available() -> bool:
    """Whether there is `megatron.training`: in a Megatron-LM checkout, and in newer megatron-core packages.

    Only looks: importing it is for after `enable()`, since Megatron reads the device at import.
    """
    return all(importlib.util.find_spec(name) is not None for name in ("megatron", "megatron.training"))


def install(config: PluginConfig) -> None:
    """Add the group "epv2" to every parser that Megatron-LM builds from now on, and let what it judges keep as many
    queues to the device as there are where transfers of `config` need them; a second call changes nothing.

    To be called after `enable()`, by which `--moe-flex-dispatcher-backend` accepts "epv2": Megatron-LM takes that
    flag's choices from `TransformerConfig`.
    """
    if not _patches.names:
        module = importlib.import_module("megatron.training.arguments")
        _patches.attribute(module, "add_megatron_arguments", _with_flags(module.add_megatron_arguments))
        validate = module.validate_args
        _patches.everywhere("megatron.training", validate, _with_queues(validate, config))


def uninstall() -> None:
    """Give Megatron-LM its own function back."""
    _patches.undo()


def replaced() -> tuple[str, ...]:
    """Dotted names of Megatron-LM's symbols that are replaced."""
    return _patches.names


def _with_flags(
    add_megatron_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    @functools.wraps(add_megatron_arguments)
    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_megatron_arguments(parser)
        _add_flags(parser)
        return parser

    return add


def _with_queues(validate_args: Callable[..., Any], config: PluginConfig) -> Callable[..., Any]:
    @functools.wraps(validate_args)
    def validate(args: argparse.Namespace, *rest: Any, **named: Any) -> Any:
        judge = sys.modules[validate_args.__module__]
        # Called as Megatron does, which asks for the architecture in the same breath.
        architecture = getattr(judge, "get_device_arch_version", lambda: 9)
        if not _keeps_queues(args, config) or architecture() >= 10:
            return validate_args(args, *rest, **named)
        if args.rank == 0:
            logger.info(
                "epv2: Megatron-LM wants %s=1 before Blackwell where TP or CP is larger than 1, so that collectives "
                "start ahead of GEMMs; kept at %s, which the plugin's transfers need",
                _QUEUES,
                os.environ[_QUEUES],
            )
        # Not the environment itself: CUDA reads it when the first one here, maybe, asks for a device.
        judge.os = _OneQueue()  # type: ignore[attr-defined]
        try:
            return validate_args(args, *rest, **named)
        finally:
            judge.os = os  # type: ignore[attr-defined]

    return validate


def _keeps_queues(args: argparse.Namespace, config: PluginConfig) -> bool:
    """Whether Megatron-LM would refuse queues that are there, and that transfers of `config` need."""
    if args.tensor_model_parallel_size == 1 and args.context_parallel_size == 1:
        return False
    if any(getattr(args, name, False) for name in _WITH_QUEUES):
        return False
    stages = args.pipeline_model_parallel_size > 1 and config.pipeline.transport != "stock"
    if not stages and not (args.context_parallel_size > 1 and config.context.kv_exchange != "stock"):
        return False
    try:
        check_connections()
    except UnavailableError:
        return False
    return True


class _OneQueue(types.ModuleType):
    """`os`, as if there were one queue to the device."""

    def __init__(self) -> None:
        super().__init__("os")
        self.environ = {**os.environ, _QUEUES: "1"}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(title="epv2")
    group.add_argument(
        "--epv2-config",
        metavar="PATH",
        help="YAML file of epv2_plugin: parallel degrees, SM budgets, one section for each communication primitive "
        f"(default: every key's default). The plugin dispatches tokens with {DISPATCHER_FLAGS}.",
    )
