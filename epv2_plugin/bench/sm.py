"""`epv2 bench sm`: what each SM of a GPU can copy, by the number of SMs that do so at once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from epv2_plugin.bench.timing import Stopwatch
from epv2_plugin.elastic.backends.device import Runtime
from epv2_plugin.elastic.model import Rate
from epv2_plugin.jit.kernels import SM_COPY, args_type

MODES = {"read": (1, 0), "write": (0, 1), "copy": (1, 1), "copy_twice": (1, 2)}  # (reads, writes) of each row
ROW_BYTES, STAGES = 7168, 3
WARPS = (8, 4, 2)  # it takes 8 to fill an SM's copy path; where all SMs wait for memory, fewer in flight are faster
BYTES_PER_SM = 64 << 20  # read or written by each SM in one launch: about a millisecond
MOST_BYTES = 1 << 30  # far above what caches hold
REPETITIONS = 7


def default_sms(everything: int) -> list[int]:
    """Numbers of busy SMs that show where the memory begins to limit, up to all of them."""
    return [sms for sms in (4, 8, 16, 24, 32, 48, 64, 96) if sms < everything] + [everything]


def measure(
    runtime: Runtime, sms: Sequence[int], *, row_bytes: int = ROW_BYTES, bytes_per_sm: int = BYTES_PER_SM
) -> dict[str, Any]:
    """Measure every mode at each number of SMs (ascending) on an otherwise idle device.

    Returns:
        `rates`: for each number of SMs the fields of `model.Rate`, of the median with the best number of warps;
        `samples_us`: {SMs: {mode: its times}}; `warps`: {SMs: {mode: its warps}}.

    Raises:
        RuntimeError: the kernel did not copy what it was told to.
    """
    watch = Stopwatch(runtime.device)
    most_rows = min(bytes_per_sm * max(sms), MOST_BYTES) // row_bytes
    source = torch.randint(0, 256, (most_rows, row_bytes), dtype=torch.uint8, device=runtime.device)
    target = torch.zeros(2 * most_rows, row_bytes, dtype=torch.uint8, device=runtime.device)

    def launch(mode: str, ctas: int, rows: int, warps: int) -> None:
        reads, writes = MODES[mode]
        args = args_type(SM_COPY).pack(
            source=source.data_ptr(),
            target=target.data_ptr(),
            rows=rows,
            row_bytes=row_bytes,
            reads=reads,
            writes=writes,
            stages=STAGES,
        )
        shared = warps * STAGES * (row_bytes + 8)
        runtime.launch(SM_COPY, args, ctas=ctas, threads=32 * warps, shared_bytes=shared)

    rates: list[dict[str, Any]] = []
    samples: dict[str, dict[str, list[float]]] = {}
    best: dict[str, dict[str, int]] = {}
    for ctas in sms:
        rows = min(bytes_per_sm * ctas // row_bytes, most_rows)
        per_sm: dict[str, float] = {}
        samples[str(ctas)], best[str(ctas)] = {}, {}
        for mode, (_, writes) in MODES.items():
            tried: dict[int, list[float]] = {}
            for warps in WARPS:
                times = []
                for _ in range(REPETITIONS):
                    watch.mark()
                    launch(mode, ctas, rows, warps)
                    watch.mark()
                    times += watch.laps()
                tried[warps] = times[1:]  # the first builds the kernel, or wakes the device up
                _check(mode, source[:rows], target, writes)
            warps = min(tried, key=lambda warps: statistics.median(tried[warps]))
            samples[str(ctas)][mode], best[str(ctas)][mode] = tried[warps], warps
            # Bytes a microsecond = 1e-3 GB/s.
            per_sm[mode] = rows * row_bytes * max(writes, 1) / statistics.median(tried[warps]) / 1e3 / ctas
        rates.append({"sms": ctas, **per_sm})
    return {"rates": rates, "samples_us": samples, "warps": best}


def _check(mode: str, source: torch.Tensor, target: torch.Tensor, writes: int) -> None:
    if mode.startswith("copy"):
        rows, row_bytes = source.shape
        copied = target[: rows * writes].view(rows, writes, row_bytes)
        if not all(torch.equal(copied[:, w], source) for w in range(writes)):
            raise RuntimeError(f"epv2_sm_copy, mode {mode}: the {rows} rows copied are not those of the source")
        target[: rows * writes].zero_()


def rates_line(points: Sequence[Rate]) -> str:
    """The rates in one line, for notes."""
    parts = (f"{p.sms} SMs {p.read:.0f}/{p.write:.0f}/{p.copy:.0f}" for p in points)
    return ", ".join(parts) + " GB/s per SM (read/write/copy)"
