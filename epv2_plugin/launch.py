"""`torchrun ... -m epv2_plugin.launch SCRIPT ARGS`: run a Megatron-LM script with the plugin enabled.

The script runs as if Python had started it: as `__main__`, with its own folder first on `sys.path` and its own
`sys.argv`. Its exceptions and exit code pass through; the launcher's own mistakes end with exit code 2 and one line.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from typing import NoReturn

from epv2_plugin import plugin
from epv2_plugin.config import ConfigError, load_config
from epv2_plugin.megatron import arguments, cpu_bridge

USAGE = """\
usage: torchrun [TORCHRUN OPTIONS] -m epv2_plugin.launch SCRIPT [ARGS ...] [--epv2-config PATH]

Runs SCRIPT (the path of a Megatron-LM script, such as pretrain_gpt.py) with epv2_plugin enabled. ARGS are SCRIPT's own;
the plugin dispatches tokens where they say --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend epv2.
Pipeline and context parallelism between GPUs need CUDA_DEVICE_MAX_CONNECTIONS=32; without a GPU add
--distributed-backend gloo.
--epv2-config PATH names the plugin's YAML file; without it, every key has its default."""

logger = logging.getLogger("epv2_plugin")


def main(argv: list[str] | None = None) -> None:
    """Enable the plugin, then run the script `argv[0]` with the arguments `argv[1:]` (default: the command line's).

    Raises:
        SystemExit: 2 = wrong usage or configuration, said in one line on stderr; else what the script raised.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if not argv or argv[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        _refuse(f"the first argument must be the script's path, got {argv[0]!r}" if argv else "no script given")
    script = argv[0]
    if not os.path.isfile(script):
        _refuse(f"no such script: {script}")
    selection = arguments.read(argv[1:], prog="epv2_plugin.launch")
    sys.argv = argv
    # Before Megatron is looked for: a Megatron-LM checkout brings its own megatron.core, next to the script.
    _put_first_on_path(os.path.dirname(os.path.realpath(script)))
    _enable(selection)
    runpy.run_path(script, run_name="__main__")


def _enable(selection: arguments.Selection) -> None:
    """Enable the plugin and put its flags into Megatron-LM's parser; say on rank 0 what was done."""
    is_first = os.environ.get("RANK", "0") == "0"
    if not logger.handlers:
        # Megatron-LM sets logging up only later, and may keep what is below WARNING to itself.
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
    logger.setLevel(logging.INFO if is_first else logging.ERROR)
    if selection.config is None:
        logger.info("epv2: no --epv2-config, every key has its default")
    if selection.dispatcher:
        logger.warning(
            "epv2: the token dispatcher is stock (%s); to use the plugin's: %s",
            selection.dispatcher,
            arguments.DISPATCHER_FLAGS,
        )
    if not arguments.available():
        _refuse(
            "no megatron.training: run a script of a Megatron-LM checkout, or put the checkout on PYTHONPATH "
            "(with Megatron-Core alone, call epv2_plugin.enable() in the script)"
        )
    try:
        config = load_config(selection.config)
        plugin.enable(config)
    except ConfigError as error:
        _refuse(str(error))
    arguments.install(config)
    if cpu_bridge.bridge_training() and selection.backend != "gloo":
        logger.warning("epv2: no CUDA device: Megatron-LM needs --distributed-backend gloo here")
    # Every rank from here on: what it says now, such as the line for its EP group, no other rank says.
    logger.setLevel(logging.INFO)


def _put_first_on_path(folder: str) -> None:
    """Put `folder` where `python SCRIPT` has it: in place of the launcher's own entry, the current folder."""
    if sys.path and sys.path[0] in ("", os.getcwd()):
        sys.path[0] = folder
    else:
        sys.path.insert(0, folder)


def _refuse(message: str) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the others of this machine would say the same
        print(f"epv2: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
