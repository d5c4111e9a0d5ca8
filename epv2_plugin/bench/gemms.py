"""A bf16 GEMM again and again, alone and beside transfers that last longer: what transfers take from a GPU."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.bench.rounds import Rounds

_SIZE = 8192  # rows and columns
_SECONDS = 0.05
_LONGER = 3  # times that long are the transfers, by the time that one takes without GEMMs
_TRIALS = 5  # whose mean says how many GEMMs fill that time
_UNDER_WAY = 8  # transfers that the host has started and not seen the end of


@dataclass(frozen=True)
class Transfer:
    """What runs beside the GEMMs, again and again.

    Attributes:
        start: starts one in the order of the current stream; returns what makes that stream wait for its end, None = it
            does already. us: of one without GEMMs. num_bytes: that one moves.
        like: another, as often as which this one runs once more: "NAME, paced".
    """

    start: Callable[[], Callable[[], object] | None]
    us: float
    num_bytes: int
    like: str = ""


def beside(rounds: Rounds, transfers: dict[str, Transfer], iterations: int) -> dict[str, Any]:
    """GEMMs alone and beside each of `transfers`, and how much of those came to its end meanwhile.

    The GEMMs are queued first, so that no time of the host for transfers is part of theirs.

    Returns:
        Parts of a document: `gemm_us`, times of the GEMMs "alone", "beside NAME" and "beside NAME, paced";
        `gemm_moved`, the bytes that ended while they ran, of the same shape.
    """
    device = rounds.device
    a, b = (torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side, after = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
    moved: dict[str, list[int]] = defaultdict(list)

    def measure(count: int, name: str, transfer: Transfer | None, apart_us: float = 0) -> float:
        """Of so many GEMMs, beside transfers that begin at least `apart_us` after each other."""
        rounds.align()
        begin.record()
        for _ in range(count):
            torch.mm(a, b, out=out)
        end.record()
        ends: list[torch.cuda.Event] = []
        if transfer is not None:
            started = time.monotonic()
            for number in range(max(4, round(_LONGER * _SECONDS * 1e6 / max(transfer.us, apart_us)))):
                time.sleep(max(0.0, started + number * apart_us / 1e6 - time.monotonic()))
                if number >= _UNDER_WAY:
                    ends[number - _UNDER_WAY].synchronize()
                with torch.cuda.stream(side):
                    wait = transfer.start()
                with torch.cuda.stream(after):
                    after.wait_stream(side)
                    if wait is not None:
                        wait()
                    ends.append(torch.cuda.Event(enable_timing=True))
                    ends[-1].record()
        torch.cuda.synchronize(device)
        num_bytes = 0 if transfer is None else transfer.num_bytes
        moved[name].append(num_bytes * sum(end.elapsed_time(one) <= 0 for one in ends))
        return begin.elapsed_time(end) * 1e3

    def greatest(value: float) -> float:
        every = torch.tensor(value, device=device)
        dist.all_reduce(every, dist.ReduceOp.MAX)
        return every.item()

    measure(1, "alone", None)
    count = max(4, round(_SECONDS * 1e6 / greatest(measure(_TRIALS, "alone", None) / _TRIALS)))
    works: dict[str, Callable[[], float]] = {"alone": partial(measure, count, "alone", None)}
    for name, transfer in transfers.items():
        works[f"beside {name}"] = partial(measure, count, f"beside {name}", transfer)

    def pace(key: str, num_bytes: int) -> float:
        """Microseconds between the ends of such transfers on the slowest rank."""
        between = [works[key]() / max(1, moved[key][-1] // num_bytes) for _ in range(_TRIALS)]
        return greatest(statistics.median(between[1:]))  # the first makes what is made once

    likes = dict.fromkeys(transfer.like for transfer in transfers.values() if transfer.like)
    apart_us = {like: pace(f"beside {like}", transfers[like].num_bytes) for like in likes}
    for name, transfer in transfers.items():
        if transfer.like:
            key = f"beside {name}, paced"
            works[key] = partial(measure, count, key, transfer, apart_us[transfer.like])
    moved.clear()
    times = rounds.measure(works, iterations, timer=lambda work: work())
    every = rounds.gather({name: list_of[1:] for name, list_of in moved.items()})  # without the first time
    return {
        "gemm_us": times,
        "gemm_moved": {name: [*map(list, zip(*(e[name] for e in every), strict=True))] for name in works},
    }
