"""A bf16 GEMM again and again, alone and beside transfers that last longer: what transfers take from a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from epv2_plugin.bench.rounds import Rounds, Samples

_SIZE = 8192  # rows and columns
_SECONDS = 0.05
_LONGER = 3  # times that long are the transfers, by the time that one takes without GEMMs
_TRIALS = 5  # whose mean says how many GEMMs fill that time


def beside(rounds: Rounds, transfers: dict[str, tuple[Callable[[], object], float]], iterations: int) -> Samples:
    """Times of the GEMMs "alone" and "beside NAME" for each of `transfers`, on the device alone.

    The GEMMs are queued first, so that no time of the host for transfers is part of theirs.

    Args:
        transfers: what starts one without making the current stream wait, and its microseconds.
    """
    device = rounds.device
    a, b = (torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = torch.cuda.Stream(device)

    def time(count: int, meanwhile: Callable[[], object]) -> float:
        rounds.align()
        begin.record()
        for _ in range(count):
            torch.mm(a, b, out=out)
        end.record()
        with torch.cuda.stream(side):
            meanwhile()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def repeat(start: Callable[[], object], microseconds: float) -> Callable[[], object]:
        def work() -> None:
            for _ in range(max(4, round(_LONGER * _SECONDS * 1e6 / microseconds))):
                start()

        return work

    time(1, lambda: None)
    lone = torch.tensor(time(_TRIALS, lambda: None) / _TRIALS, device=device)
    dist.all_reduce(lone, dist.ReduceOp.MAX)
    count = max(4, round(_SECONDS * 1e6 / lone.item()))
    works = {f"beside {name}": repeat(*transfer) for name, transfer in transfers.items()}
    return rounds.measure({"alone": lambda: None, **works}, iterations, timer=lambda meanwhile: time(count, meanwhile))
