"""One rank of tests/test_gpu_nodes.py, started by `epv2 emulate` with BACKEND: transfers between nodes, bit for bit."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch.distributed as dist

from tests import test_fsdp as fsdp
from tests import test_point_to_point as p2p
from tests import test_sessions as sessions


def shards(rank: int, size: int, backend: str) -> None:
    """FSDP2's collectives: sums bit for bit, slots in turn."""
    fsdp.collectives(rank, size, backend, "bf16", 1200)
    if backend == "cuda":
        fsdp.in_turn(rank, size, backend, 2)


WORKS = (
    p2p.receives_first,
    p2p.both_ways_at_once,
    p2p.late_receiver,
    p2p.large_and_small,
    sessions.scatters,
    sessions.begins_late,
    sessions.slots_changed_after_their_wait,
    shards,
)


def main() -> None:
    backend = sys.argv[1]
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank, size = dist.get_rank(), dist.get_world_size()
    for work in WORKS:
        work(rank, size, backend)
        dist.barrier()
        if rank == 0:
            print(f"{work.__name__} on {backend}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
