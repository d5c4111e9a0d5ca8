"""The plugin's flags in Megatron-LM's own argument parser, so that they show in its `--help` and its argument dump."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epv2_plugin.patches import Patches

DISPATCHER_FLAGS = "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend epv2"

_patches = Patches()


@dataclass(frozen=True)
class Selection:
    """What a command line says about the plugin, read before Megatron-LM parses it."""

    config: str | None
    """Path given as `--epv2-config`."""
    dispatcher: str
    """Flags with which the command line selects a stock token dispatcher; empty if it selects the plugin's, or leaves
    the choice to a Megatron-LM YAML file."""


def read(argv: Sequence[str], prog: str | None = None) -> Selection:
    """Read `argv` (without the script's name); what is not the plugin's business is left to Megatron-LM to judge.

    Raises:
        SystemExit: `--epv2-config` without a path (exit code 2, usage on stderr).
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    _add_flags(parser)
    parser.add_argument("--moe-token-dispatcher-type", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("--moe-flex-dispatcher-backend", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("--yaml-cfg", nargs="?", help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args(list(argv))
    kind, backend = args.moe_token_dispatcher_type, args.moe_flex_dispatcher_backend
    ours = kind == "flex" and backend == "epv2"
    flags = [("--moe-token-dispatcher-type", kind), ("--moe-flex-dispatcher-backend", backend)]
    given = " ".join(f"{flag} {value}" for flag, value in flags if value) or "Megatron-LM's default dispatcher"
    return Selection(args.epv2_config, "" if ours or args.yaml_cfg else given)


def available() -> bool:
    """Whether there is `megatron.training`: in a Megatron-LM checkout, and in newer megatron-core packages.

    Only looks: importing it is for after `enable()`, since Megatron reads the device at import.
    """
    return all(importlib.util.find_spec(name) is not None for name in ("megatron", "megatron.training"))


def install() -> None:
    """Add the group "epv2" to every parser that Megatron-LM builds from now on; a second call changes nothing.

    To be called after `enable()`, by which `--moe-flex-dispatcher-backend` accepts "epv2": Megatron-LM takes that
    flag's choices from `TransformerConfig`.
    """
    if not _patches.names:
        module = importlib.import_module("megatron.training.arguments")
        _patches.attribute(module, "add_megatron_arguments", _with_flags(module.add_megatron_arguments))


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


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(title="epv2")
    group.add_argument(
        "--epv2-config",
        metavar="PATH",
        help="YAML file of epv2_plugin: parallel degrees, SM budgets, one section for each communication primitive "
        f"(default: every key's default). The plugin dispatches tokens with {DISPATCHER_FLAGS}.",
    )
