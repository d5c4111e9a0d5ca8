"""Works measured in turn on all ranks, each started together: what `epv2 bench pp`, `cp`, `fsdp` and `engram` share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.bench import report
from epv2_plugin.bench.ep import TIMEOUT
from epv2_plugin.bench.timing import Stopwatch

Samples = dict[str, list[list[float]]]  # by name: [repetition][rank], microseconds


class Rounds:
    """The ranks of one run. Collective."""

    def __init__(self, device: torch.device):
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._watch = Stopwatch(device)

    def align(self) -> None:
        """Let every rank go on at the same time, with nothing under way."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.meet()

    def meet(self) -> None:
        """Wait for the hosts of all ranks."""
        dist.barrier(self._control)

    def time(
        self,
        work: Callable[[], object],
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> float:
        """Microseconds of one call, from a common start, after `before`; on a GPU of the current stream. `after` comes
        before the clock is read."""
        self.align()
        before()
        self._watch.mark()
        work()
        self._watch.mark()
        after()
        return self._watch.laps()[0]

    def measure(
        self,
        works: dict[str, Callable[[], Any]],
        iterations: int,
        divisor: float = 1,
        timer: Callable[[Callable[[], Any]], float] | None = None,
    ) -> Samples:
        """Every work `iterations` times, in turn, after a first time that makes what is made once.

        Args:
            timer: does a work and returns its microseconds; None = `time`.
        """
        timer = timer or self.time
        mine: dict[str, list[float]] = {name: [] for name in works}
        for repetition in range(iterations + 1):
            for name, work in works.items():
                time = timer(work) / divisor
                if repetition:
                    mine[name].append(round(time, 3))
        every = self.gather(mine)
        return {name: [list(ranks) for ranks in zip(*(each[name] for each in every), strict=True)] for name in works}

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, by rank."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self._control)
        return every

    def finish(self, document: dict[str, Any], text: Callable[[dict[str, Any]], str], json_file: Path | None) -> int:
        """Print and write what rank 0 has, and leave; returns the exit code."""
        if self.rank == 0:
            print(text(document), flush=True)
            if json_file is not None:
                json_file.write_text(json.dumps(document) + "\n", encoding="utf-8")
        dist.barrier(self._control)
        dist.destroy_process_group()
        return 0


def document(kind: str, command: str, device: torch.device, setup: dict[str, Any]) -> dict[str, Any]:
    """The part of a document that says where its numbers come from."""
    return {"schema": report.SCHEMA, "kind": kind, **report.circumstances(command, device), "setup": setup}
