"""`epv2 emulate --nodes N --gpus-per-node M -- COMMAND`: run a command as the ranks of a cluster, on this machine."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from epv2_plugin import environment
from epv2_plugin.cli.values import positive
from epv2_plugin.config import ConfigError, load_config
from epv2_plugin.emulation.cluster import CHAOS, Cluster
from epv2_plugin.emulation.start import played
from epv2_plugin.training.launcher import run_command


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `emulate` command."""
    parser = subparsers.add_parser(
        "emulate",
        help="run a command as the ranks of several nodes, on the GPUs there are, or on the CPU",
        description="Start COMMAND once for each rank of a cluster of N nodes with M ranks each. Ranks share the GPUs "
        "of this machine, and NCCL's network (GIN) runs through a loopback between their processes; without a GPU they "
        "run on the host backend, which sees the same nodes. For testing what several nodes do, not how fast.",
        usage="epv2 emulate --nodes N --gpus-per-node M [options] -- COMMAND [ARG ...]",
    )
    parser.add_argument("--nodes", type=positive, required=True, metavar="N", help="machines to play")
    parser.add_argument("--gpus-per-node", type=positive, required=True, metavar="M", help="ranks of each")
    parser.add_argument(
        "--chaos",
        type=_seed,
        metavar="SEED",
        help="deliver as late and unordered as GIN allows, drawn from this seed: kernels that count on more break",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--config", metavar="YAML", help="plugin configuration whose sm_budget must fit")
    budget.add_argument("--sms", type=positive, metavar="SMS", help="SMs that each rank will hold, which must fit")
    parser.add_argument("--no-mps", action="store_true", help="don't start CUDA's multi-process service")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="and its arguments, after --")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the ranks; 0 = all ended well, else the exit code of the one that failed first, 130 = interrupted.

    Raises:
        ConfigError: a command that is no program, SMs that don't fit, or a GPU without the loopback.
    """
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or shutil.which(command[0]) is None:
        raise ConfigError("epv2 emulate", "COMMAND", " ".join(command), "must be a program, after --")
    if "RANK" in os.environ:
        raise ConfigError("epv2 emulate", "RANK", os.environ["RANK"], "must not be set: it starts the ranks itself")
    cluster = Cluster(args.nodes, args.gpus_per_node, environment.find_gpus()["devices"])
    budget = _check_budget(args, cluster)
    with played(cluster, chaos=args.chaos, use_mps=not args.no_mps) as (path, service, ranks):
        for line in (cluster.describe(budget), _network(cluster, path, args.chaos), f"MPS: {service}"):
            print(f"epv2 emulate: {line}", file=sys.stderr)
        return run_command(command, ranks)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 64:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 0 or more and below 2^64")
    return int(text)


def _check_budget(args: argparse.Namespace, cluster: Cluster) -> str:
    """Check the SMs that ranks are to hold; what they are, in words."""
    if args.sms is not None:
        cluster.check_sms("epv2 emulate", "--sms", args.sms)
        return f"{args.sms} SMs a rank"
    if args.config is None:
        return "SMs a rank not told (--sms, --config)"
    budget = load_config(args.config).sm_budget
    wanted = {name: value for name, value in budget if value not in ("auto", 0)}
    cluster.check_sms(args.config, "sm_budget (" + " + ".join(wanted) + ")", sum(wanted.values()))
    chosen = ", and for expert what the model chooses" if budget.expert == "auto" else ""
    return f"{sum(wanted.values())} SMs a rank{chosen}"


def _network(cluster: Cluster, plugin: str, chaos: int | None) -> str:
    nodes = f"node0 to node{cluster.nodes - 1}"
    if not cluster.gpus:
        unused = ", --chaos changes nothing" if chaos is not None else ""
        return f"network: gloo between all ranks{unused}; EPV2_NODE={nodes}"
    how = f"chaos {chaos} ({CHAOS})" if chaos is not None else "in order"
    return f"network: GIN by proxy through {plugin}, {how}; NCCL_HOSTID and EPV2_NODE={nodes}"
