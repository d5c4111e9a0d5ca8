"""`epv2 plan CONFIG`: mode, SMs, QPs, bytes, times and buffers that the model predicts, over EP sizes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from epv2_plugin.cli.values import check_file, positive, positives
from epv2_plugin.config import ConfigError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `plan` command."""
    parser = subparsers.add_parser(
        "plan",
        help="predict mode, SMs, QPs, bytes, time and buffer over EP sizes",
        description="Predict what dispatch and combine need at each EP size, by the analytic model: nothing runs. "
        "Every rate that the prediction rests on is listed with its source and how to override it.",
    )
    parser.add_argument("config", metavar="CONFIG", help="plugin YAML, or a recipe (sizes then come from its model)")
    parser.add_argument("--ep", type=positives, metavar="N,N,...", help="EP sizes (default: 8 to 2048)")
    parser.add_argument("--nodes", type=positive, help="one EP size: this many nodes of --gpus-per-node")
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=positive, help="tokens of each rank (default: CONFIG's, else 4096)")
    parser.add_argument("--hidden", type=positive, help="values of a token (default: the recipe's, else 7168)")
    parser.add_argument("--topk", type=positive, help="experts of a token (default: the recipe's, else 8)")
    parser.add_argument("--experts", type=positive, help="experts of all ranks (default: the recipe's, else 256)")
    parser.add_argument("--groups", type=positive, help="groups of experts (default: the recipe's, else no limit)")
    parser.add_argument("--topk-groups", type=positive, help="groups that a token's experts may lie in")
    parser.add_argument("--dtype", choices=["bf16", "fp8"], help="of dispatch (default: CONFIG's)")
    parser.add_argument("--gpu", metavar="NAME", help="such as H200 (default: the GPU here, else H100)")
    parser.add_argument(
        "--assume",
        type=_number,
        action="append",
        default=[],
        metavar="NAME=X",
        help="another value for a number in the list that the report ends with; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON, too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw time, SMs and buffer against EP size")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ConfigError: the configuration or an option is wrong, a rate is not known, or a file can't be written.
    """
    from epv2_plugin.planning import plan, report

    for option, path in (("--json", args.json), ("--png", args.png)):
        if path is not None:
            check_file(option, path)
    if args.png is not None and args.png.suffix.lower() != ".png":
        raise ConfigError("epv2", "--png", str(args.png), "must end in .png")
    if args.ep and args.nodes:
        raise ConfigError("epv2 plan", "--nodes", args.nodes, "not together with --ep: it is one EP size itself")
    assume = dict(args.assume)
    for name, value in assume.items():
        plan.check_assumed(name, value)
    options = {name: getattr(args, name) for name in ("tokens", "hidden", "topk", "experts", "groups", "topk_groups")}
    config, workload = plan.load(args.config, options | {"dtype": args.dtype})
    sizes = _sizes(args, config.parallel.expert)
    left_out: list[int] = []
    if not args.ep and not args.nodes and not plan.knows_network(config, args.gpus_per_node, assume):
        # What nobody asked for by name needs no rate that is not known.
        left_out = [size for size in sizes if size > args.gpus_per_node and size != config.parallel.expert]
        sizes = [size for size in sizes if size not in left_out]
    places = plan.topologies(config, sizes, args.gpus_per_node)
    machine, factor, facts = plan.machine(config, args.gpu, places, args.gpus_per_node, assume)
    document = plan.document(args.config, config, workload, places, machine, factor, facts, left_out)
    print(report.text(document))
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.png is not None:
        report.draw(document, args.png)
    return 0


def _sizes(args: argparse.Namespace, configured: Any) -> list[int]:
    """EP sizes: those asked for, else the usual ones and that of the configuration."""
    from epv2_plugin.planning.plan import SIZES

    if args.nodes:
        return [args.nodes * args.gpus_per_node]
    if args.ep:
        return list(args.ep)
    usual = [size for size in SIZES if size <= args.gpus_per_node or size % args.gpus_per_node == 0]
    return sorted({*usual, *([] if configured == "auto" else [configured])})


def _number(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: must be NAME=X")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: {value!r} is not a number") from None
