"""The `epv2` command: one file for each subcommand."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

from epv2_plugin.cli import ab, bench, compile, doctor, emulate, plan, recipe_args, train
from epv2_plugin.config import ConfigError
from epv2_plugin.training.launcher import INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """Run `epv2 argv`; returns the exit code. 2 = wrong usage or configuration, one line on stderr says what;
    130 = interrupted."""
    parser = argparse.ArgumentParser(
        prog="epv2", description="Communication of large Mixture-of-Experts training: train, compare, inspect."
    )
    parser.add_argument("--version", action="version", version=f"epv2_plugin {_version()}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (train, ab, bench, emulate, plan, recipe_args, compile, doctor):
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # 0.19 warns on every rank that GPTModel, which both versions have, is deprecated.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("epv2_plugin").setLevel(logging.INFO if is_first else logging.WARNING)
    # Megatron warns of each accelerator library that a machine lacks, on every rank.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        return args.main(args)
    except ConfigError as error:
        # Of an option, or of a file.
        print(error if error.source.split()[:1] == ["epv2"] else f"epv2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the command has said what an interrupt does
        if "RANK" in os.environ:  # the launcher must see that this rank did not end in order, and end the others
            raise
        print("epv2: interrupted", file=sys.stderr)
        return INTERRUPTED


def _version() -> str:
    try:
        return version("epv2_plugin")
    except PackageNotFoundError:
        return "(not installed)"
