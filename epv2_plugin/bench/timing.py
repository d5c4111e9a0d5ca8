"""Times of stages on a device, by events on its stream or by the clock of the host, and the launches behind them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


class Stopwatch:
    """Microseconds between marks. On a CUDA device the marks are events on the current stream."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """End one stage and begin the next."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """The times between the marks so far, once the device has reached the last; forgets them."""
        marks, self._marks = self._marks, []
        if self._cuda and marks:
            marks[-1].synchronize()
        pairs = pairwise(marks)
        return [round(a.elapsed_time(b) * 1e3 if self._cuda else (b - a) * 1e6, 3) for a, b in pairs]


@dataclass(frozen=True)
class Launch:
    """One kernel as the profiler saw it: its name, thread blocks and microseconds."""

    name: str
    ctas: int
    us: float


def profile(align: Callable[[], object], work: Callable[[], object], device: torch.device) -> list[Launch]:
    """The kernels that `work` launches on a CUDA device, in order of their start.

    Args:
        align: brings the ranks together and ends with an all-reduce. A profiler starts at its own pace, and a rank that
            came early would hold its SMs while it waits.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    torch.cuda.synchronize(device)
    with torch_profile(activities=[ProfilerActivity.CUDA]) as recorder:
        align()
        work()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        return launches_of(json.loads(path.read_text(encoding="utf-8")))


def launches_of(trace: dict[str, Any]) -> list[Launch]:
    """The kernels in a Chrome trace of torch's profiler, after the last all-reduce."""
    kernels = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    launches = []
    for event in sorted(kernels, key=lambda event: event["ts"]):
        x, y, z = event["args"]["grid"]
        launches.append(Launch(event["name"], x * y * z, float(event["dur"])))
    aligned = [place for place, launch in enumerate(launches) if "AllReduce" in launch.name]
    return launches[aligned[-1] + 1 :] if aligned else launches
