"""A bf16 GEMM again and again, alone and beside transfers that last longer: what transfers take from a GPU's SMs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

_SIZE = 8192  # rows and columns
_SECONDS = 0.05
_TRIALS = 5  # whose mean says how many fill that time


def beside(
    transfers: dict[str, tuple[Callable[[], object], float]], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Works to measure: "alone", and "beside NAME" for each of `transfers`.

    Args:
        transfers: what starts one without making the current stream wait, and its microseconds.
    """
    a, b = (torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.mm(a, b, out=out)
    dist.barrier()  # ranks that share a device take their part of it now, as they will
    begin.record()
    for _ in range(_TRIALS):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    lone_ms = torch.tensor(begin.elapsed_time(end) / _TRIALS, device=device)
    dist.all_reduce(lone_ms, dist.ReduceOp.MAX)
    count = max(4, round(_SECONDS * 1e3 / lone_ms.item()))

    def alone() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    def with_transfers(start: Callable[[], object], microseconds: float) -> Callable[[], object]:
        def work() -> None:
            for _ in range(max(4, round(2 * _SECONDS * 1e6 / microseconds))):
                start()
            alone()

        return work

    works = {f"beside {name}": with_transfers(*transfer) for name, transfer in transfers.items()}
    return {"alone": alone, **works}
