"""A cluster that the ranks of one machine play: which node and GPU each rank has, and what NCCL must be told for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epv2_plugin.config import ConfigError
from epv2_plugin.elastic.backends.base import NODE
from epv2_plugin.environment import PLUGIN_VARIABLE
from epv2_plugin.training import devices

CHAOS = "EPV2_RMA_CHAOS"
MOST_PATH = 254  # characters of a plugin's path; NCCL ignores a longer one
# What NCCL needs to find its network in the loopback, and nowhere else; GIN type 2 is the proxy.
NCCL = {
    "NCCL_GIN_TYPE": "2",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
}


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `ranks_per_node` ranks on this machine.

    Attributes:
        gpus: this machine's, as `environment.find_gpus` tells of them; without any, ranks compute on the CPU.
    """

    nodes: int
    ranks_per_node: int
    gpus: Sequence[Mapping[str, Any]]

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus_per_node(self) -> int:
        """GPUs that a node's ranks compute on: its share of them, or all where there are fewer GPUs than nodes."""
        return len(self.gpus) if self._nodes_share else len(self.gpus) // self.nodes

    @property
    def ranks_per_gpu(self) -> int:
        """Most ranks on one GPU; 0 without a GPU."""
        if not self.gpus:
            return 0
        of_a_node = -(-self.ranks_per_node // min(self.gpus_per_node, self.ranks_per_node))
        return of_a_node * (self.nodes if self._nodes_share else 1)

    @property
    def sms(self) -> int:
        """SMs of the smallest GPU."""
        return min(gpu["sms"] for gpu in self.gpus)

    @property
    def most_sms(self) -> int:
        """SMs that each rank may hold so that the kernels of all ranks of a GPU run at once."""
        return self.sms // self.ranks_per_gpu

    @property
    def _nodes_share(self) -> bool:
        return len(self.gpus) < self.nodes

    def check_sms(self, source: str, key: str, sms: int) -> None:
        """Make sure that all ranks of a GPU can hold `sms` SMs at once: one whose kernel can't start is waited for.

        Raises:
            ConfigError: they can't.
        """
        if self.gpus and sms > self.most_sms:
            allowed = f"{self.ranks_per_gpu} ranks share a GPU of {self.sms} SMs: at most {self.most_sms} each"
            raise ConfigError(source, key, sms, allowed)

    def environment(self, rank: int, plugin: str, chaos: int | None, env: Mapping[str, str]) -> dict[str, str]:
        """Variables of one rank.

        Args:
            plugin: path of the loopback, unused without a GPU.
            chaos: seed of it, None = in order.
            env: what the ranks have anyway; its NCCL_MAX_CTAS, CUDA_DEVICE_MAX_CONNECTIONS and NCCL_DEBUG win.
        """
        node, local = divmod(rank, self.ranks_per_node)
        found = {NODE: f"node{node}", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(self.ranks_per_node)}
        found |= {"GROUP_RANK": str(node), "GROUP_WORLD_SIZE": str(self.nodes)}
        if not self.gpus:
            return found
        found |= NCCL | {"NCCL_HOSTID": f"node{node}", PLUGIN_VARIABLE: plugin}
        # Of each rank's two contexts one is the loopback's. Its errors are warnings.
        found["NCCL_DEBUG"] = env.get("NCCL_DEBUG", "WARN")
        found |= devices.environment(self.ranks_per_gpu, contexts=2, env=env)
        if chaos is not None:
            found[CHAOS] = str(chaos)
        if not self._nodes_share and self.nodes > 1:
            here = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
            names = here if len(here) == len(self.gpus) else [str(gpu["index"]) for gpu in self.gpus]
            mine = slice(node * self.gpus_per_node, (node + 1) * self.gpus_per_node)
            found["CUDA_VISIBLE_DEVICES"] = ",".join(names[mine])
        return found

    def describe(self, budget: str) -> str:
        """Where the ranks are, and what becomes of their SMs; `budget` is what was asked for."""
        what = f"{self.nodes} nodes x {self.ranks_per_node} ranks"
        if not self.gpus:
            return f"{what} on the CPU, as there is no usable GPU: host backend over gloo"
        count = f"{len(self.gpus)} GPU{'s' if len(self.gpus) > 1 else ''}"
        return (
            f"{what} on {count} ({self.gpus[0]['name']}, {self.sms} SMs), up to {self.ranks_per_gpu} on each: "
            f"{budget}, at most {self.most_sms} fit"
        )


def check_path(plugin: str) -> None:
    """Make sure that NCCL takes a plugin of this path.

    Raises:
        ConfigError: it is too long.
    """
    if len(plugin) > MOST_PATH:
        allowed = f"{len(plugin)} characters, and NCCL takes at most {MOST_PATH}: install to a shorter path"
        raise ConfigError("epv2 emulate", PLUGIN_VARIABLE, plugin, allowed)
