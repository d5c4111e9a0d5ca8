"""`epv2 bench pp` on a rank: transfers around a ring, ours, a plain copy and torch's; and GEMMs beside them."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.bench import gemms, report, rounds
from epv2_plugin.bench.ep import TIMEOUT, join
from epv2_plugin.elastic import ElasticBuffer, EventOverlap

PINGS = 20  # there and back, in one measurement of latency
IN_A_ROW = 8  # transfers, started before the first is waited for
LONG_ROW = 32  # transfers, as many under way: how such a row begins and ends weighs less
INFLIGHT = 4
INPLACE = LONG_ROW + IN_A_ROW  # those in a row, and those before that streams have not come to the end of
AHEAD = 4  # receives in a row before the first send: as far may a host be behind the one that sends to it
OURS = {"epv2": False, "epv2, in place": True}  # whether tensors may stay where they arrive


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
    all_rounds = rounds.Rounds(device)
    ring = _Ring(setup, all_rounds)
    if not ring.check():
        print(f"epv2 bench pp: WRONG RESULT: rank {ring.rank} received other data than was sent", file=sys.stderr)
        return 1  # without leaving in order: the others are waiting for this rank
    document = rounds.document("bench pp", command, device, asdict(setup))
    document["large_us"] = all_rounds.measure(ring.transfers(setup.large), setup.iterations)
    document["in_a_row"] = IN_A_ROW
    document["in_a_row_us"] = all_rounds.measure(
        ring.transfers(setup.large, IN_A_ROW), setup.iterations, divisor=IN_A_ROW
    )
    document["long_row"] = LONG_ROW
    long_row = ring.transfers(setup.large, LONG_ROW)
    document["queued_us"] = all_rounds.measure(long_row, setup.iterations, LONG_ROW, ring.time_queued)
    document["host_us"] = all_rounds.measure(long_row, setup.iterations, LONG_ROW, ring.time_host)
    inplace_bytes = ring.buffer.traffic.inplace_bytes
    document["small_us"] = all_rounds.measure(ring.pings(setup.small), setup.iterations, divisor=2 * PINGS)
    if device.type == "cuda":
        received = setup.ranks * setup.large * (2 + (setup.iterations + 1) * (1 + IN_A_ROW + 2 * LONG_ROW))
        document["inplace"] = sum(all_rounds.gather(inplace_bytes)) / received
        transfers = {
            name: gemms.Transfer(
                start,
                statistics.median(report.slowest(document["large_us"][name])),
                setup.large,
                "" if name == "torch" else "torch",
            )
            for name, start in ring.starts().items()
        }
        document |= gemms.beside(all_rounds, transfers, setup.iterations)
    ring.close()
    return all_rounds.finish(document, report.pp_text, json_file)


class _Ring:
    """Every rank sends to the next and receives from the one before."""

    def __init__(self, setup: Setup, all_rounds: rounds.Rounds):
        self.setup, self.device, self._rounds = setup, all_rounds.device, all_rounds
        device = self.device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.next, self.prev = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        assert dist.group.WORLD is not None
        self.buffer = ElasticBuffer(dist.group.WORLD, backend=setup.backend)  # type: ignore[arg-type]
        self.buffer.pp_set_config(setup.large, INFLIGHT, max_inplace=INPLACE)
        self.source = torch.full((setup.large,), self.rank, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)
        self._runtime: Any = None
        if device.type == "cuda":
            from epv2_plugin.elastic.backends.device import CudaRuntime

            self._runtime = CudaRuntime(dist.group.WORLD, TIMEOUT.total_seconds())
            self._window = self._runtime.window(setup.large)
            self._gate, self._turn = self._runtime.mapped(4), 0

    def close(self) -> None:
        self.buffer.pp_flush()
        self.buffer.destroy()
        if self._runtime is not None:
            self._runtime.close()

    def check(self) -> bool:
        """Whether what was sent arrives."""
        right = []
        for inplace in (*OURS.values(), *OURS.values()):  # the first tensor of a link never stays
            received, event = self.receive(self.setup.large, self.prev, inplace)
            self.send(self.setup.large)
            event.current_stream_wait()
            right.append(bool((received == self.prev).all()))
        return all(right)

    def send(self, num_bytes: int) -> None:
        self.buffer.pp_send(self.source[:num_bytes], self.next, async_with_compute_stream=True)

    def receive(self, num_bytes: int, source: int, inplace: bool) -> tuple[torch.Tensor, EventOverlap]:
        """The tensor and its event."""
        if inplace:
            return self.buffer.pp_recv_inplace((num_bytes,), torch.uint8, source)
        into = self.target[:num_bytes]
        return into, self.buffer.pp_recv(into, source, async_with_compute_stream=True)

    def start_ours(self, num_bytes: int, inplace: bool) -> Callable[[], object]:
        """Start a transfer; returns what makes the current stream wait for it."""
        _, event = self.receive(num_bytes, self.prev, inplace)
        self.send(num_bytes)
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
        """So many of each kind, `IN_A_ROW` started before the first is waited for."""

        def torchs() -> None:
            waits: deque[Callable[[], object]] = deque()
            for _ in range(count):
                if len(waits) == IN_A_ROW:
                    waits.popleft()()
                waits.append(self.start_torchs(num_bytes))
            for wait in waits:
                wait()

        def ours(inplace: bool) -> None:
            received: deque[tuple[torch.Tensor, EventOverlap]] = deque()
            ahead = min(AHEAD, count - 1)
            for number in range(count + ahead):
                if number < count:
                    if len(received) == IN_A_ROW:
                        received.popleft()[1].current_stream_wait()
                    received.append(self.receive(num_bytes, self.prev, inplace))
                if number >= ahead:
                    self.send(num_bytes)
            for _, event in received:
                event.current_stream_wait()

        return {
            **{name: partial(ours, inplace) for name, inplace in OURS.items()},
            "plain copy": lambda: self.copy(num_bytes, count),
            "torch": torchs,
        }

    def time_queued(self, work: Callable[[], object]) -> float:
        """Microseconds; on a GPU from when all ranks have queued it, as where the host is ahead of the device."""
        try:
            return self._rounds.time(work, self._hold, self._go)
        except BaseException:
            self._open()  # else nothing ends, not even this process
            raise

    def time_host(self, work: Callable[[], object]) -> float:
        """Microseconds of this rank's host; on a GPU to queue it, while what came before it in the row goes on."""
        self._rounds.align()
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e6

    def _hold(self) -> None:
        self.buffer.pp_flush()  # which sees the slots that are free
        self._rounds.meet()
        if self._runtime is not None:
            self._turn += 1
            self._runtime.stream_ops([("wait32_geq", self._gate.pointer, self._turn)])

    def _go(self) -> None:
        self._rounds.meet()
        self._open()

    def _open(self) -> None:
        if self._runtime is not None:
            self._gate.tensor.view(torch.int32)[0] = self._turn

    def pings(self, num_bytes: int) -> dict[str, Callable[[], object]]:
        """A tensor from every even rank to the next and back, `PINGS` times."""
        first = self.rank % 2 == 0
        peer = self.rank + 1 if first else self.rank - 1
        out, into = self.source[:num_bytes], self.target[:num_bytes]

        def ours(inplace: bool) -> None:
            if peer >= self.size:
                return
            for _ in range(PINGS):
                if first:
                    self.buffer.pp_send(out, peer)
                if inplace:
                    self.receive(num_bytes, peer, inplace)[1].current_stream_wait()
                else:
                    self.buffer.pp_recv(into, peer)
                if not first:
                    self.buffer.pp_send(out, peer)

        def torchs() -> None:
            if peer >= self.size:
                return
            for _ in range(PINGS):
                if first:
                    dist.send(out, peer)
                dist.recv(into, peer)
                if not first:
                    dist.send(out, peer)

        return {**{name: partial(ours, inplace) for name, inplace in OURS.items()}, "torch": torchs}

    def starts(self) -> dict[str, Callable[[], Callable[[], object] | None]]:
        """Transfers of large tensors; they return what waits for them, if the current stream does not yet."""
        return {
            **{name: partial(self.start_ours, self.setup.large, inplace) for name, inplace in OURS.items()},
            "plain copy": lambda: self.copy(self.setup.large),
            "torch": lambda: self.start_torchs(self.setup.large),
        }
