"""`epv2 recipe-args RECIPE`: the Megatron-LM command that runs a recipe, or its parameters and memory."""

from __future__ import annotations

import argparse
import math
import shlex

import yaml

from epv2_plugin.training.recipe import Recipe, load_recipe, megatron_args, memory_per_rank, parameter_count, stages

GPUS_PER_NODE = 8
GIB = 1 << 30


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `recipe-args` command."""
    parser = subparsers.add_parser(
        "recipe-args",
        help="print a recipe as a Megatron-LM command",
        description="Print the shell lines that run a recipe with Megatron-LM's pretrain_gpt.py and the plugin.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe YAML, for example recipes/deepseek_v3_671b.yaml")
    parser.add_argument("--count", action="store_true", help="print parameters and memory per rank instead")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        ConfigError: the recipe is wrong.
    """
    recipe = load_recipe(args.recipe)
    print(count_text(recipe) if args.count else command_text(recipe))
    return 0


def command_text(recipe: Recipe) -> str:
    """Shell lines: write the plugin's YAML, then run torchrun with one argument a line."""
    config_path = f"{recipe.name}.plugin.yaml"
    plugin = yaml.safe_dump(recipe.plugin.model_dump(exclude_defaults=True), sort_keys=False)
    processes = recipe.train.processes
    if recipe.plugin.backend == "host":
        torchrun = f"torchrun --nproc-per-node {processes}"
    else:
        per_node = math.gcd(processes, GPUS_PER_NODE)
        torchrun = f"torchrun --nproc-per-node {per_node}"
        if processes > per_node:
            torchrun += f' --nnodes {processes // per_node} --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:29500"'
    groups: list[list[str]] = []
    for word in megatron_args(recipe, config_path):
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    lines = [f"{torchrun} -m epv2_plugin.launch pretrain_gpt.py", *("  " + shlex.join(group) for group in groups)]
    return f"cat > {shlex.quote(config_path)} <<'YAML'\n{plugin}YAML\n" + " \\\n".join(lines)


def count_text(recipe: Recipe) -> str:
    """Two small tables: parameters of the model, and bytes per rank of each pipeline stage."""
    count = parameter_count(recipe)
    rows = [
        ("embedding and output layer", count.embedding),
        ("attention, norms, dense, shared, routers", count.dense),
        ("routed experts", count.experts),
        ("total", count.total),
        ("active per token", count.active),
        ("multi-token prediction, on top", count.mtp),
    ]
    lines = [f"{recipe.name}: parameters"]
    lines += [f"  {label:<42}{number:>18,}  {_short(number)}" for label, number in rows]
    lines += [
        "",
        "memory per rank in GiB, without activations",
        f"  {'stage':<8}{'layers':<10}weights   grads   optimizer   total",
    ]
    entries: list[tuple[str, str]] = []
    for stage, memory in zip(stages(recipe), memory_per_rank(recipe), strict=True):
        what = ("E+" if stage.embedding else "") + str(len(stage.layers)) + ("+MTP" if stage.mtp_layers else "")
        what += "+out" if stage.head else ""
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.total)
        text = "{:<10}{:>7.3f}{:>8.3f}{:>12.3f}{:>8.3f}".format(what, *(size / GIB for size in sizes))
        entries.append((str(len(entries)), text))
    while entries:
        first, text = entries[0]
        same = next((i for i, (_, other) in enumerate(entries) if other != text), len(entries))
        last = entries[same - 1][0]
        lines.append(f"  {first if first == last else f'{first}-{last}':<8}{text}")
        entries = entries[same:]
    return "\n".join(lines)


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
