"""Starts a recipe's ranks: on this machine as it is, or as the nodes that the recipe has it play."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from epv2_plugin import environment
from epv2_plugin.config import ConfigError
from epv2_plugin.emulation import mps
from epv2_plugin.emulation.cluster import Cluster, check_path
from epv2_plugin.training.launcher import run_ranks
from epv2_plugin.training.recipe import Recipe


def find_plugin(cluster: Cluster) -> str:
    """Path of the loopback that NCCL loads; empty where it is neither there nor needed.

    Raises:
        ConfigError: it is needed, and not there or not to be loaded.
    """
    found = environment.find_loopback()
    if cluster.gpus:
        if "error" in found:
            raise ConfigError("epv2 emulate", "epv2_plugin._rma_loopback", None, f"{found['error']}: {found['mend']}")
        check_path(found["path"])
    return found.get("path", "")


def run_recipe(recipe: Recipe, command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run `epv2 COMMAND` as the recipe's ranks; see `run_ranks`. `env`: further variables of all of them.

    Raises:
        ConfigError: the recipe's nodes can't be played here.
    """
    nodes, processes = recipe.train.nodes, recipe.train.processes
    if nodes == 1:
        return run_ranks("epv2_plugin.cli", command, processes, env)
    cluster = Cluster(nodes, processes // nodes, environment.find_gpus()["devices"])
    budget = recipe.plugin.sm_budget.expert
    if budget != "auto":
        cluster.check_sms(recipe.plugin.source, "sm_budget.expert", budget)
    plugin = find_plugin(cluster)
    with mps.served(cluster.ranks_per_gpu > 1) as (service, variables):
        ranks = [
            {**variables, **cluster.environment(rank, plugin, None, os.environ), **(env or {})}
            for rank in range(processes)
        ]
        what = "SMs a rank as the model says" if budget == "auto" else f"{budget} SMs a rank"
        print(f"epv2: playing {cluster.describe(what)}; MPS: {service}", file=sys.stderr)
        return run_ranks("epv2_plugin.cli", command, processes, ranks)
