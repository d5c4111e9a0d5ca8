"""Readies this machine to play a cluster, and starts a recipe's ranks, on it as it is or as the nodes it is to play."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from epv2_plugin import environment
from epv2_plugin.config import ConfigError
from epv2_plugin.emulation import mps
from epv2_plugin.emulation.cluster import Cluster, check_path
from epv2_plugin.training import devices
from epv2_plugin.training.launcher import run_ranks
from epv2_plugin.training.recipe import Recipe


@contextmanager
def played(
    cluster: Cluster, *, chaos: int | None = None, use_mps: bool = True
) -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """What a cluster's ranks need, for as long as they run: the loopback's path (empty where it is neither there nor
    needed), what was done about MPS, in words, and each rank's variables.

    Raises:
        ConfigError: the loopback is needed, and not there or not to be loaded.
    """
    found = environment.find_loopback()
    if cluster.gpus:
        if "error" in found:
            raise ConfigError("epv2 emulate", "epv2_plugin._rma_loopback", None, f"{found['error']}: {found['mend']}")
        check_path(found["path"])
    path = found.get("path", "")
    with mps.served(cluster.ranks_per_gpu > 1 and use_mps) as (service, variables):
        ranks = [cluster.environment(rank, path, chaos, os.environ) for rank in range(cluster.ranks)]
        yield path, service, [variables | rank for rank in ranks]


def run_recipe(recipe: Recipe, command: Sequence[str]) -> int:
    """Run `epv2 COMMAND` as the recipe's ranks; see `run_ranks`.

    Raises:
        ConfigError: the recipe's nodes can't be played here.
    """
    nodes, processes = recipe.train.nodes, recipe.train.processes
    gpus = environment.find_gpus()["devices"]
    if nodes == 1:
        where = devices.place(len(gpus), {"LOCAL_WORLD_SIZE": str(processes)})
        return run_ranks("epv2_plugin.cli", command, processes, where.environment)
    cluster = Cluster(nodes, processes // nodes, gpus)
    budget = recipe.plugin.sm_budget.expert
    if budget != "auto":
        cluster.check_sms(recipe.plugin.source, "sm_budget.expert", budget)
    with played(cluster) as (_, service, ranks):
        what = "SMs a rank as the model says" if budget == "auto" else f"{budget} SMs a rank"
        print(f"epv2: playing {cluster.describe(what)}; MPS: {service}", file=sys.stderr)
        return run_ranks("epv2_plugin.cli", command, processes, ranks)
