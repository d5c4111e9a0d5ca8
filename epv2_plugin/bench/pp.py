"""`epv2 bench pp` on a rank: transfers around a ring, ours, a plain copy and torch's; and GEMMs beside them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.bench import gemms, report, rounds
from epv2_plugin.bench.ep import TIMEOUT, join
from epv2_plugin.elastic import ElasticBuffer

PINGS = 20  # there and back, in one measurement of latency
IN_A_ROW = 8  # transfers, in one measurement of what goes through
INFLIGHT = 4


@dataclass(frozen=True)
class Setup:
    """What is measured: tensors of `large` and of `small` bytes from each rank to the next."""

    ranks: int
    large: int
    small: int
    iterations: int
    backend: str


def run(setup: Setup, command: str, json_file: Path | None) -> int:
    """Measure as one rank; rank 0 prints the report and writes the JSON. Returns the exit code, 1 = wrong data."""
    device = join(setup.backend)
    ring = _Ring(setup, device)
    all_rounds = rounds.Rounds(device)
    if not ring.check():
        print(f"epv2 bench pp: WRONG RESULT: rank {ring.rank} received other data than was sent", file=sys.stderr)
        return 1  # without leaving in order: the others are waiting for this rank
    document = rounds.document("bench pp", command, device, asdict(setup))
    document["large_us"] = all_rounds.measure(ring.transfers(setup.large), setup.iterations)
    document["in_a_row"] = IN_A_ROW
    document["in_a_row_us"] = all_rounds.measure(
        ring.transfers(setup.large, IN_A_ROW), setup.iterations, divisor=IN_A_ROW
    )
    document["small_us"] = all_rounds.measure(ring.pings(setup.small), setup.iterations, divisor=2 * PINGS)
    if device.type == "cuda":
        transfers = {
            name: gemms.Transfer(start, statistics.median(report.slowest(document["large_us"][name])), setup.large)
            for name, start in ring.starts().items()
        }
        document |= gemms.beside(all_rounds, transfers, setup.iterations)
    ring.close()
    return all_rounds.finish(document, report.pp_text, json_file)


class _Ring:
    """Every rank sends to the next and receives from the one before."""

    def __init__(self, setup: Setup, device: torch.device):
        self.setup, self.device = setup, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.next, self.prev = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        assert dist.group.WORLD is not None
        self.buffer = ElasticBuffer(dist.group.WORLD, backend=setup.backend)  # type: ignore[arg-type]
        self.buffer.pp_set_config(setup.large, INFLIGHT)
        self.source = torch.full((setup.large,), self.rank, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)
        self._runtime: Any = None
        if device.type == "cuda":
            from epv2_plugin.elastic.backends.device import CudaRuntime

            self._runtime = CudaRuntime(dist.group.WORLD, TIMEOUT.total_seconds())
            self._window = self._runtime.window(setup.large)

    def close(self) -> None:
        self.buffer.pp_flush()
        self.buffer.destroy()
        if self._runtime is not None:
            self._runtime.close()

    def check(self) -> bool:
        """Whether what was sent arrives."""
        self.start_ours(self.setup.large)()
        return bool((self.target == self.prev).all())

    def start_ours(self, num_bytes: int) -> Callable[[], object]:
        """Start a transfer; returns what makes the current stream wait for it."""
        self.buffer.pp_send(self.source[:num_bytes], self.next, async_with_compute_stream=True)
        event = self.buffer.pp_recv(self.target[:num_bytes], self.prev, async_with_compute_stream=True)
        return event.current_stream_wait

    def start_torchs(self, num_bytes: int) -> Callable[[], object]:
        """Likewise, by torch."""
        operations = [
            dist.P2POp(dist.isend, self.source[:num_bytes], self.next),
            dist.P2POp(dist.irecv, self.target[:num_bytes], self.prev),
        ]
        works = dist.batch_isend_irecv(operations)
        return lambda: [work.wait() for work in works]

    def copy(self, num_bytes: int, count: int = 1) -> None:
        """Out of the previous rank's memory, by nothing but copies; on the host, of this rank's own."""
        if self._runtime is None:
            for _ in range(count):
                self.target[:num_bytes].copy_(self.source[:num_bytes])
            return
        current, event = self._runtime.comm_stream(), self._runtime.record()
        with self._runtime.on_stream(current):
            self._runtime.wait(event)
            for _ in range(count):
                self._runtime.copy(self.target.data_ptr(), self._window.peer_pointer(self.prev, 0), num_bytes)
            event = self._runtime.record()
        self._runtime.wait(event)

    def transfers(self, num_bytes: int, count: int = 1) -> dict[str, Callable[[], object]]:
        """So many of each kind, all started before the first is waited for."""

        def all_of(start: Callable[[int], Callable[[], object]]) -> None:
            for wait in [start(num_bytes) for _ in range(count)]:
                wait()

        return {
            "epv2": lambda: all_of(self.start_ours),
            "plain copy": lambda: self.copy(num_bytes, count),
            "torch": lambda: all_of(self.start_torchs),
        }

    def pings(self, num_bytes: int) -> dict[str, Callable[[], object]]:
        """A tensor from every even rank to the next and back, `PINGS` times."""
        first = self.rank % 2 == 0
        peer = self.rank + 1 if first else self.rank - 1
        out, into = self.source[:num_bytes], self.target[:num_bytes]

        def ours() -> None:
            if peer >= self.size:
                return
            for _ in range(PINGS):
                if first:
                    self.buffer.pp_send(out, peer, async_with_compute_stream=True)
                self.buffer.pp_recv(into, peer)
                if not first:
                    self.buffer.pp_send(out, peer, async_with_compute_stream=True)

        def torchs() -> None:
            if peer >= self.size:
                return
            for _ in range(PINGS):
                if first:
                    dist.send(out, peer)
                dist.recv(into, peer)
                if not first:
                    dist.send(out, peer)

        return {"epv2": ours, "torch": torchs}

    def starts(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """Transfers of large tensors; they return what waits for them."""
        return {
            "epv2": lambda: self.start_ours(self.setup.large),
            "torch": lambda: self.start_torchs(self.setup.large),
        }
