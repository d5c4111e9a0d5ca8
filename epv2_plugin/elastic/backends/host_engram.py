"""Engram on the host backend: a table whose rows are spread over CPU processes, fetched and trained over gloo.

Whoever needs rows sends each owner the rows it wants, once each, and the owner's thread answers: a fetch needs nothing
of its peers but that they start the same fetch. A table's row and its FP8 scales lie and travel together.

Legend: N entries asked for, U distinct rows, H hidden, P ranks, W 8-byte words of a row.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
from collections.abc import Callable

import torch

from epv2_plugin.elastic.backends.base import EngramTable, Traffic
from epv2_plugin.elastic.backends.host_transport import Operation, Transport
from epv2_plugin.elastic.event import HostEvent

_HEADER, _INDICES, _ROWS = range(3)  # steps of an operation
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_ANSWER, _COLLECT, _STOP = range(3)  # what the thread does first when it has the choice


class _Job:
    """Work for the thread; `wait` returns when it is done, or raises what it raised."""

    def __init__(self, work: Callable[[], None] | None):
        self._work = work
        self._error: BaseException | None = None
        self._done = threading.Event()

    def run(self) -> None:
        work, self._work = self._work, None
        try:
            if work is not None:
                work()
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error


class _Worker:
    """A thread that answers peers while this rank computes; started when there is something to do.

    Answers come first, in order: rows of ours may depend on a peer that waits for rows of its own.
    """

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, _Job]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._last_answer = _Job(None)
        self._last_answer.run()

    def submit(self, kind: int, work: Callable[[], None]) -> _Job:
        if self._thread is None:
            # The thread must not keep the buffer alive: it knows the queue only.
            arguments = (self._jobs, torch.get_num_threads())
            self._thread = threading.Thread(target=_work, args=arguments, name="epv2-engram", daemon=True)
            self._thread.start()
        job = _Job(work)
        if kind == _ANSWER:
            self._last_answer = job
        self._jobs.put((kind, next(self._numbers), job))
        return job

    def drain(self) -> None:
        """Wait until every answer that was asked for so far is given."""
        self._last_answer.wait()

    def close(self, wait: bool) -> None:
        """End the thread once it has nothing left to do, and wait for that if asked to."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put((_STOP, next(self._numbers), _Job(None)))
            if wait and thread is not threading.current_thread():  # a garbage collection may run anywhere
                thread.join()


def _work(jobs: queue.PriorityQueue[tuple[int, int, _Job]], num_threads: int) -> None:
    torch.set_num_threads(num_threads)  # OpenMP's setting is one of each thread
    # Callers may be in inference mode, whose tensors can be filled in inference mode only.
    with torch.inference_mode():
        while True:
            kind, _, job = jobs.get()
            if kind == _STOP:
                return
            job.run()
            del job  # and the memory that it holds, while waiting for the next


class HostEngram:
    """`Engram` for one group of CPU processes; the table is memory of this process."""

    def __init__(self, transport: Transport, traffic: Traffic):
        self.table: EngramTable | None = None
        self._transport, self._traffic = transport, traffic
        self._worker = _Worker()
        self._answered: collections.deque[tuple[int, int]] = collections.deque()  # (rows, entries) sent by the thread
        self._rows = torch.empty(0, 0, dtype=torch.int64, device="cpu")  # [rows, W]

    def close(self) -> None:
        """End the thread, but first give the rows that peers still need, at most until the timeout."""
        self._worker.close(wait=not self._transport.failed)

    def write(self, table: EngramTable, storage: torch.Tensor, scales: torch.Tensor | None, num_sms: int) -> None:
        """See `Engram.write`."""
        del num_sms
        operation = self._transport.begin("engram_write")
        self._worker.drain()
        facts = table.facts
        ours = [*(facts | {"dtype": _DTYPES.index(table.dtype)}).values()]
        answers_PF = torch.empty(self._transport.size, len(ours), dtype=torch.int64, device="cpu")
        header = torch.tensor(ours, device="cpu")
        answers_PF[operation.rank] = header
        wait = _receive(operation, _HEADER, dict(enumerate(answers_PF)), "header")
        self._traffic.sent_bytes += _send(operation, _HEADER, dict.fromkeys(operation.peers, header), "header")
        wait()
        operation.wait_sent()
        for peer, theirs in enumerate(answers_PF.tolist()):
            for name, a, b in zip(facts, ours, theirs, strict=True):
                if a != b:
                    told, seen = (_DTYPES[a], _DTYPES[b]) if name == "dtype" else (a, b)
                    raise operation.mismatch(peer, "header", f"{name} {told} as on this rank", f"{name} {seen}")
        if self.table != table:
            with torch.inference_mode(False):
                self._rows = torch.zeros(table.rows, table.layout.stride // 8, dtype=torch.int64, device="cpu")
            self.table = table
        _pack(table, storage, scales, self._rows)

    def update(self, rows_U: torch.Tensor, storage_UH: torch.Tensor, scales: torch.Tensor | None) -> None:
        """See `Engram.update`. Peers send nothing: whoever left it out is noticed by the next operation's number."""
        table = self._table()
        self._transport.begin("engram_update")
        self._worker.drain()
        packed = torch.zeros(rows_U.numel(), self._rows.shape[1], dtype=torch.int64, device="cpu")
        _pack(table, storage_UH, scales, packed)
        self._rows.index_copy_(0, rows_U, packed)

    def storage(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Engram.storage`."""
        return self._table().views(self._rows)

    def fetch(self, indices_N: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """See `Engram.fetch`."""
        table = self._table()
        operation = self._transport.begin("engram_fetch")
        wanted_U, place_N, splits = self._distinct(table, indices_N)
        rows_UW = torch.empty(wanted_U.numel(), self._rows.shape[1], dtype=torch.int64, device="cpu")
        *parts, none = rows_UW.split([*splits, wanted_U.numel() - sum(splits)])
        none.zero_()  # what -1 stands for
        wait_rows = _receive(operation, _ROWS, dict(enumerate(parts)), "rows")
        local = self._ask(operation, table, wanted_U, place_N, splits)
        shard = self._rows

        def answer() -> None:
            counts, asked, wait = self._questions(operation, table)
            torch.index_select(shard, 0, local[operation.rank], out=parts[operation.rank])
            wait()
            rows = {p: shard.index_select(0, index) for p, index in asked.items()}
            _send(operation, _ROWS, rows, "rows")
            operation.wait_sent()
            self._answered.append((sum(n for n, _ in counts), sum(n for _, n in counts)))

        answered = self._worker.submit(_ANSWER, answer)
        collected = self._worker.submit(_COLLECT, wait_rows)

        def finish() -> tuple[torch.Tensor, torch.Tensor | None]:
            answered.wait()
            collected.wait()
            self._count_answers(table)
            data, scales = table.views(rows_UW.index_select(0, place_N))
            return data.contiguous(), None if scales is None else scales.contiguous()

        return _once(finish)

    def reduce(
        self, indices_N: torch.Tensor, gradients_NH: torch.Tensor
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """See `Engram.reduce`."""
        table = self._table()
        operation = self._transport.begin("engram_reduce")
        wanted_U, place_N, splits = self._distinct(table, indices_N)
        sums_UH = torch.zeros(wanted_U.numel(), table.hidden, dtype=torch.float32, device="cpu")
        sums_UH.index_add_(0, place_N, gradients_NH.float())  # one after the other, in order of position
        sums = sums_UH[: sum(splits)].split(splits)
        local = self._ask(operation, table, wanted_U, place_N, splits)
        self._traffic.sent_bytes += _send(operation, _ROWS, {p: sums[p] for p in operation.peers}, "rows")
        entries = self._entries(place_N, splits)
        self._traffic.undeduplicated_bytes += 4 * table.hidden * (sum(entries) - entries[operation.rank])
        rows_by_rank, sums_by_rank = {operation.rank: local[operation.rank]}, {operation.rank: sums[operation.rank]}

        def collect() -> None:
            _, asked, wait = self._questions(operation, table)
            rows_by_rank.update(asked)
            theirs = {
                p: torch.empty(index.numel(), table.hidden, dtype=torch.float32, device="cpu")
                for p, index in asked.items()
            }
            sums_by_rank.update(theirs)
            wait_rows = _receive(operation, _ROWS, theirs, "rows")
            wait()
            wait_rows()
            operation.wait_sent()

        collected = self._worker.submit(_ANSWER, collect)

        def finish() -> tuple[torch.Tensor, torch.Tensor]:
            collected.wait()
            ranks = range(self._transport.size)
            rows, place = torch.cat([rows_by_rank[p].to(torch.int64) for p in ranks]).unique(return_inverse=True)
            total = torch.zeros(rows.numel(), table.hidden, dtype=torch.float32, device="cpu")
            return rows, total.index_add_(0, place, torch.cat([sums_by_rank[p] for p in ranks]))

        return _once(finish)

    def _table(self) -> EngramTable:
        assert self.table is not None  # checked by the caller
        return self.table

    def _distinct(self, table: EngramTable, indices_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """The distinct rows wanted, ascending (so by owner; what stands for -1 is last), each entry's place among them,
        and how many there are of each owner."""
        size = self._transport.size
        ends = torch.arange(size + 1, device="cpu") * table.rows
        wanted_U, place_N = indices_N.masked_fill(indices_N < 0, size * table.rows).unique(return_inverse=True)
        return wanted_U, place_N, torch.searchsorted(wanted_U, ends).diff().tolist()

    def _entries(self, place_N: torch.Tensor, splits: list[int]) -> list[int]:
        """How many entries (-1 left out) each rank's rows serve."""
        per_row = torch.bincount(place_N, minlength=sum(splits))[: sum(splits)]
        return [int(part.sum()) for part in per_row.split(splits)]

    def _ask(
        self, operation: Operation, table: EngramTable, wanted_U: torch.Tensor, place_N: torch.Tensor, splits: list[int]
    ) -> list[torch.Tensor]:
        """Send every peer the rows of its shard that are meant, and for how many entries; returns them by rank."""
        local = [rows - p * table.rows for p, rows in enumerate(wanted_U[: sum(splits)].split(splits))]
        counts = torch.tensor([splits, self._entries(place_N, splits)], device="cpu").t().contiguous()
        self._traffic.sent_bytes += _send(operation, _HEADER, {p: counts[p] for p in operation.peers}, "header")
        index = {p: local[p].to(_index_dtype(table)) for p in operation.peers}
        self._traffic.sent_bytes += _send(operation, _INDICES, index, "indices")
        return local

    def _questions(
        self, operation: Operation, table: EngramTable
    ) -> tuple[list[list[int]], dict[int, torch.Tensor], Callable[[], None]]:
        """What `_ask` of the peers says: (rows, entries) of each, and the rows, after the wait returned with them."""
        counts = torch.zeros(self._transport.size, 2, dtype=torch.int64, device="cpu")
        _receive(operation, _HEADER, {p: counts[p] for p in operation.peers}, "header")()
        told = counts.tolist()
        asked = {p: torch.empty(told[p][0], dtype=_index_dtype(table), device="cpu") for p in operation.peers}
        return told, asked, _receive(operation, _INDICES, asked, "indices")

    def _count_answers(self, table: EngramTable) -> None:
        """Add what the thread sent to the traffic, which only the caller's thread may change."""
        while self._answered:
            rows, entries = self._answered.popleft()
            self._traffic.sent_bytes += table.layout.stride * rows
            self._traffic.undeduplicated_bytes += table.layout.stride * entries


def _index_dtype(table: EngramTable) -> torch.dtype:
    return torch.int32 if table.rows < 1 << 31 else torch.int64


def _pack(table: EngramTable, storage: torch.Tensor, scales: torch.Tensor | None, rows: torch.Tensor) -> None:
    """Write values and scales into `rows` `[X, W]`."""
    data, factors = table.views(rows)
    data.copy_(storage)
    if factors is not None and scales is not None:
        factors.copy_(scales)


def _send(operation: Operation, step: int, tensors: dict[int, torch.Tensor], phase: str) -> int:
    """Start sending to each peer p the contiguous `tensors[p]`, unless it is empty; returns the bytes."""
    payloads = {p: tensor.view(-1).view(torch.uint8) for p, tensor in tensors.items() if tensor.numel()}
    operation.send(step, payloads, phase, ())
    return sum(payload.numel() for payload in payloads.values())


def _receive(operation: Operation, step: int, tensors: dict[int, torch.Tensor], phase: str) -> Callable[[], None]:
    """Start receiving into `tensors[p]` (not this rank's own) what `_send` of rank p sends; returns the wait for it."""
    wanted = {p: tensor for p, tensor in tensors.items() if tensor.numel() and p != operation.rank}
    payloads = {p: tensor.view(-1).view(torch.uint8) for p, tensor in wanted.items()}
    wait = operation.receive(step, payloads, phase, ())

    def wait_and_release() -> None:
        wait()
        payloads.clear()  # until now the memory had to stay, even if nobody else wants it any more

    return wait_and_release


def _once(finish: Callable[[], tuple]) -> Callable[[], tuple]:
    """`finish` as a hook: it runs at the first call, every call returns (or raises) the same."""
    results: list[tuple] = []
    event = HostEvent(lambda: results.append(finish()))

    def hook() -> tuple:
        event.current_stream_wait()
        return results[0]

    return hook
