"""`epv2 train RECIPE`: train a recipe through the plugin, with as many processes as it names."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from epv2_plugin import plugin
from epv2_plugin.cli.values import make_folder, positive
from epv2_plugin.emulation.start import run_recipe
from epv2_plugin.training.data import TokenStream
from epv2_plugin.training.devices import usable_gpus
from epv2_plugin.training.recipe import Recipe, load_recipe
from epv2_plugin.training.run_folder import Purpose, taken, taken_by_rank_0


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `train` to the `epv2` command."""
    parser = subparsers.add_parser(
        "train",
        help="train a recipe",
        description="Train a recipe with the plugin's token dispatcher. Starts the recipe's processes on this machine; "
        "under torchrun it runs as one of its ranks. Ctrl-C ends the run after the current step, with a checkpoint.",
    )
    parser.add_argument("recipe", help="the recipe's YAML file")
    parser.add_argument("--folder", help="where metrics.jsonl and checkpoints/ go (default: runs/<recipe name>)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in the folder, if there is one"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="stop after step N (default: the recipe's)")
    parser.add_argument(
        "--megatron-throughput", action="store_true", help="print each step as Megatron-LM's log does, with TFLOP/s"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run `epv2 train`; returns its exit code (130 = interrupted, with a checkpoint; 1 = a checkpoint is damaged).

    Raises:
        ConfigError: the recipe can't be used; the folder is in use, or was used before and `--resume` is not given.
    """
    recipe = load_recipe(args.recipe)
    folder = Path(args.folder or f"runs/{recipe.name}")
    purpose: Purpose = "resume" if args.resume else "train"
    if "RANK" in os.environ:
        with taken_by_rank_0(folder, purpose):
            return _run_rank(args, recipe, folder)
    usable_gpus(recipe)
    plugin.check(recipe.plugin)
    TokenStream(recipe)  # what is wrong with the data is said once, and before anything was started
    make_folder(folder)
    with taken(folder, purpose):
        pass  # so that nothing is started in vain; rank 0 holds the folder while it trains
    command = ["train", args.recipe]
    command += ["--folder", args.folder] if args.folder else []
    command += ["--steps", str(args.steps)] if args.steps is not None else []
    command += ["--resume"] if args.resume else []
    command += ["--megatron-throughput"] if args.megatron_throughput else []
    return run_recipe(recipe, command)


def _run_rank(args: argparse.Namespace, recipe: Recipe, folder: Path) -> int:
    # Here, and not above: this imports Megatron, which takes seconds that only the ranks need to spend.
    from epv2_plugin.training import checkpoint, trainer

    trainer.setup(recipe)
    try:
        code = trainer.train(
            recipe,
            folder,
            resume=args.resume,
            steps=args.steps,
            megatron_throughput=args.megatron_throughput,
        )
    except checkpoint.CheckpointError as error:  # every rank raises it
        print(f"epv2: {error}", file=sys.stderr)
        return 1
    trainer.leave()
    return code
