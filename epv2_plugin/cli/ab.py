"""`epv2 ab RECIPE`: train a recipe with several token dispatchers side by side and report who won."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from pathlib import Path

from epv2_plugin import plugin
from epv2_plugin.cli.values import make_folder, positive, share
from epv2_plugin.config import ConfigError
from epv2_plugin.emulation.start import run_recipe
from epv2_plugin.training.data import TokenStream
from epv2_plugin.training.devices import place, usable_gpus
from epv2_plugin.training.launcher import run_ranks
from epv2_plugin.training.recipe import check_arms, load_recipe
from epv2_plugin.training.report import OURS
from epv2_plugin.training.run_folder import taken, taken_by_rank_0
from epv2_plugin.training.titan_recipe import SEED_FOLDER, check_titan_arms, is_titan, load_titan_recipe

DEFAULT_ARMS = "alltoall,epv2"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `ab` command."""
    parser = subparsers.add_parser(
        "ab",
        help="train a recipe with stock Megatron and with the plugin, and report who won",
        description="Train the same model on the same data with each dispatcher in turn, step by step in one launch, "
        "and write report.md, report.png and metrics.jsonl. Starts its own processes.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe YAML, for example recipes/deepseek_v3_tiny.yaml")
    parser.add_argument(
        "--arms",
        default=DEFAULT_ARMS,
        metavar="A,B,...",
        help="dispatchers, the first is the baseline: alltoall and allgather are stock (default: %(default)s)",
    )
    parser.add_argument("--steps", type=positive, help="steps of each arm (default: the recipe's)")
    parser.add_argument(
        "--skew", type=share, metavar="SHARE", help="send this share of the tokens to one popular expert, in every arm"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write; an earlier comparison there is replaced (default: runs/NAME-ab)"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the comparison; 0 = done, 130 = interrupted (with a report of what was done).

    Raises:
        ConfigError: the recipe can't be used; the folder is in use, or holds a training. An earlier comparison's files
            are overwritten.
    """
    if is_titan(args.recipe):
        return _titan(args)
    recipe = load_recipe(args.recipe)
    if args.steps is not None:
        if args.steps <= recipe.train.warmup_steps:
            allowed = f"must be more than the recipe's train.warmup_steps ({recipe.train.warmup_steps})"
            raise ConfigError("epv2 ab", "--steps", args.steps, allowed)
        recipe = load_recipe(args.recipe, {"train": {"steps": args.steps}})
    arms = args.arms.split(",")
    folder = args.folder or Path("runs") / f"{recipe.name}-ab"
    words = _words(args, folder)
    words += [] if args.skew is None else ["--skew", str(args.skew)]
    if "RANK" not in os.environ:
        check_arms(recipe, arms)
        usable_gpus(recipe)
        if OURS in arms:
            plugin.check(recipe.plugin)
        TokenStream(recipe)  # what is wrong with the data is said once, and before anything was started
        make_folder(folder)
        with taken(folder, "compare"):
            pass  # so that nothing is started in vain; rank 0 holds the folder while it trains
        return run_recipe(recipe, words)
    with taken_by_rank_0(folder, "compare"):
        from epv2_plugin.training.ab import run

        return run(recipe, folder, arms, skew=args.skew, command=shlex.join(["epv2", *words]))


def _words(args: argparse.Namespace, folder: Path) -> list[str]:
    """The command that each rank runs."""
    steps = [] if args.steps is None else ["--steps", str(args.steps)]
    return ["ab", args.recipe, "--arms", args.arms, "--folder", str(folder), *steps]


def _titan(args: argparse.Namespace) -> int:
    """The comparison of a recipe for torchtitan."""
    recipe, arms = load_titan_recipe(args.recipe, args.steps), args.arms.split(",")
    folder = args.folder or Path("runs") / f"{recipe.name}-ab"
    words = _words(args, folder)
    if "RANK" not in os.environ:
        check_titan_arms(recipe, arms, args.skew)
        env = {"CUDA_VISIBLE_DEVICES": ""}
        if recipe.plugin.backend != "host":
            env = place(usable_gpus(recipe), {"LOCAL_WORLD_SIZE": str(recipe.train.processes)}).environment
        make_folder(folder)
        with taken(folder, "compare"):
            # An older seed checkpoint may be of another model.
            shutil.rmtree(folder / SEED_FOLDER, ignore_errors=True)
            code = run_ranks("epv2_plugin.training.titan_ab", [args.recipe, str(folder)], 1, env)
        return code or run_ranks("epv2_plugin.cli", words, recipe.train.processes, env)
    with taken_by_rank_0(folder, "compare"):
        from epv2_plugin.training.titan_ab import run

        return run(recipe, folder, arms, command=shlex.join(["epv2", *words]))
