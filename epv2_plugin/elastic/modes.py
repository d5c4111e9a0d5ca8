"""Direct or hybrid: how many ranks of a group share a node, and which mode is faster between nodes."""

from __future__ import annotations

import os
from typing import Literal

import torch
import torch.distributed as dist

from epv2_plugin.elastic import model, network

Auto = Literal["auto"]


def ranks_of_a_node(group: dist.ProcessGroup) -> int:
    """Ranks of `group` in each node as `torchrun` started them (LOCAL_WORLD_SIZE, which `epv2 emulate` sets, too).

    The group's size where it says nothing, or where nodes hold different numbers of the group's ranks.
    """
    ranks = dist.get_process_group_ranks(group)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or dist.get_world_size()
    nodes = [rank // local for rank in ranks]
    counts = {nodes.count(node) for node in nodes}
    return counts.pop() if nodes == sorted(nodes) and len(counts) == 1 else len(ranks)


def allow_hybrid(
    mode: Literal["auto", "direct", "hybrid"],
    group: dist.ProcessGroup,
    shape: model.Shape,
    *,
    nvlink_gbs: float | Auto,
    rdma_gbs: float | Auto,
) -> bool:
    """What `expert.mode` means for `group` on the GPUs of this machine; `auto` asks the model.

    Args:
        nvlink_gbs, rdma_gbs: what one GPU reaches in one direction inside its node, and over the network.

    Raises:
        ValueError: `auto` between nodes, and a rate is neither given nor known; the message names the key to set.
    """
    size, per_node = dist.get_world_size(group), ranks_of_a_node(group)
    if mode != "auto" or per_node == size or not torch.cuda.is_available():
        return mode != "direct"
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    nic, _ = network.rdma_rate(rdma_gbs, gpus_per_node=per_node)
    link = model.scale_up_rate(device.name, nvlink_gbs)
    rank = model.Machine(
        device.name, device.multi_processor_count, model.load_rates(device.name), link, nic_gbytes_per_s=nic
    )
    return model.choices(shape, model.Topology(size // per_node, per_node), rank)[0].mode == "hybrid"
