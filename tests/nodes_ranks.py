"""One rank of tests/test_gpu_nodes.py, started by `epv2 emulate` with BACKEND MODE SEEDS CASES. MODE "engram": see
`tables`. Else:

For each of SEEDS (as "0,1,2"; 0 = a network in order, any other is chaos) it makes a buffer, dispatches and combines
the edge cases and CASES random ones, and checks every rank's results with the oracle on rank 0. Prints how many bytes
came over the network, and how many direct mode would have sent.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from epv2_plugin.elastic import ElasticBuffer
from epv2_plugin.emulation.cluster import CHAOS
from tests import test_elastic, test_engram
from tests.buffers import take_device
from tests.oracle import Case

SMS = 4


def draw(seed: int, ranks: int) -> Case:
    """A case for a GPU: rows of multiples of 16 bytes, more than a chunk of tokens now and then."""
    choose = random.Random(seed)
    scales, local_experts = choose.choice(["", "", "fp32", "ue8m0"]), choose.randint(1, 6)
    most = choose.choice([5, 40, 150])
    case = Case(
        tokens=tuple(choose.choice([0, choose.randint(0, most), most]) for _ in range(ranks)),
        hidden=choose.choice([16, 128, 400, 7168]),
        local_experts=local_experts,
        topk=choose.randint(1, min(12, ranks * local_experts)),
        dtype=choose.choice(["fp32", "bf16", "fp16"]),
        scales=scales,
        expand=choose.random() < 0.6,
        alignment=choose.choice([1, 16]),
        masked=choose.choice([0.0, 0.3]),
        one_expert=choose.random() < 0.1,
        weights=choose.random() < 0.7,
        biases=choose.randint(0, 2),
        exact=choose.random() < 0.7,
        overlap=choose.random() < 0.5,
        seed=seed,
    )
    return case.for_cuda()


def main() -> None:
    backend, mode, count = sys.argv[1], sys.argv[2], int(sys.argv[4])
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    if backend == "cuda":
        take_device()
    for seed in map(int, sys.argv[3].split(",")):
        os.environ.pop(CHAOS, None)  # read when a communicator is made
        if seed:
            os.environ[CHAOS] = str(seed)
        if mode == "engram":
            tables(backend, seed, count)
        else:
            exchange(backend, mode, seed, count)
    dist.destroy_process_group()


def exchange(backend: str, mode: str, seed: int, count: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    made = ElasticBuffer(
        dist.group.WORLD,
        num_bytes=256 << 20,
        allow_hybrid_mode=mode == "hybrid",
        num_cpu_timeout_secs=120,
        num_gpu_timeout_secs=60,
        backend=backend,
    )
    made.get_theoretical_num_sms = lambda *_: SMS if backend == "cuda" else 0  # type: ignore[method-assign]
    cases = [draw(seed * 1000 + number, size) for number in range(count)]
    cases += [case.for_cuda() for case in test_elastic.EDGE_CASES.values() if case.ranks == size]
    for case in cases:
        case = replace(case, per_node=per_node, hybrid=mode == "hybrid", multiple_reduction=True)
        results: list[dict] = [{}] * size
        dist.all_gather_object(results, test_elastic.round_trip(rank, size, case, made))
        if rank == 0:
            test_elastic.check(case, results, leftovers_are_zero=backend == "host")
    sums = [[]] * size
    dist.all_gather_object(sums, [made.traffic.network_bytes, made.traffic.direct_network_bytes])
    if rank == 0:
        what = made.describe()
        network, direct = (sum(each[i] for each in sums) for i in range(2))
        ran = f"{len(cases)} cases, {what['backend']}, {what['mode']}"
        print(f"seed {seed}: {ran}: {network} bytes, direct {direct}", flush=True)
    made.destroy()


def tables(backend: str, seed: int, count: int) -> None:
    """COUNT random tables and batches of Engram, checked with dense tables on rank 0."""
    rank, size = dist.get_rank(), dist.get_world_size()
    buffer = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=120, num_gpu_timeout_secs=60, backend=backend)
    test_engram._buffers[backend] = buffer
    for number in range(count):
        choose = random.Random(1000 * seed + number)
        case = test_engram.Case(
            ranks=size,
            rows=choose.choice([1, 40, 3000]),
            hidden=choose.choice([3, 128, 1000]),
            dtype=choose.choice(list(test_engram.DTYPES)),
            scale_columns=choose.randint(1, 3),
            tokens=tuple(tuple(choose.choice([0, 9, 700]) for _ in range(size)) for _ in range(2)),
            entries=choose.choice([0, 3]),
            spread=choose.choice([0.01, 1.0]),
            masked=choose.choice([0.0, 0.3]),
            int32=choose.random() < 0.5,
            col_major=choose.random() < 0.5,
            replicated_sf=choose.random() < 0.5,
            inference=False,
            seed=1000 * seed + number,
        )
        results: list[dict] = [{}] * size
        dist.all_gather_object(
            results, test_engram.exchange(rank, size, case, backend, num_sms=SMS * (backend == "cuda"))
        )
        if rank == 0:
            test_engram.check(case, results, backend)
    sums = [[]] * size
    dist.all_gather_object(sums, [buffer.traffic.network_bytes, buffer.traffic.direct_network_bytes])
    if rank == 0:
        network, direct = (sum(each[i] for each in sums) for i in range(2))
        ran = f"{count} cases, {buffer.describe()['backend']}, engram"
        print(f"seed {seed}: {ran}: {network} bytes, direct {direct}", flush=True)
    buffer.destroy()


if __name__ == "__main__":
    main()
