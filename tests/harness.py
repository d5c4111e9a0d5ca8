"""Run a function on several real processes joined by gloo, and bring every rank's result or error back.

The processes come from a fork server that has imported torch once, so a four-rank case starts in tenths of a second
instead of the seconds that four fresh imports take.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

# Megatron imported before the CPU bridge compiles small functions at their first call, unless told not to.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
PRELOAD = ["torch.distributed", "numpy"]
ON_GPU = os.path.exists("/dev/nvidiactl")
# Ranks that are there at a time where they share a GPU: with as many queues as transfers need, no more contexts fit.
MOST_RANKS = 6
if not ON_GPU:  # Megatron counts the devices, and after that no fork can use them
    PRELOAD += ["megatron.core.models.gpt", "megatron.core.optimizer"]
# Every gloo group leaves threads behind that wake up a hundred times a second.
MAX_THREADS = 120
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()  # that have ranks
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


@dataclass
class Outcome:
    """What one rank left: `value` if it returned, `error` (type name and traceback) if it raised, neither if killed."""

    value: Any = None
    error_type: str = ""
    error: str = ""
    exit_code: int | None = None
    threads: int = 0


class RankError(AssertionError):
    """At least one rank raised, died or did not finish in time."""


def _main(rank: int, size: int, store: str, pipe: Connection, env: dict[str, str], fn: Callable, args: tuple) -> None:
    os.environ.update(env)
    outcome = Outcome()
    try:
        _join(rank, size, store)
        outcome.value = fn(rank, size, *args)
    except BaseException as error:
        outcome.error_type, outcome.error = type(error).__name__, f"{error}\n{traceback.format_exc()}"
    pipe.send(outcome)
    pipe.poll(60)  # until it is taken: tensors in it are fetched from this process
    os._exit(0)  # skips gloo's teardown, which waits for peers that may be gone


def _join(rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)})
    # Before anything asks the driver; where there is none, as the emulated device has them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(96 // max(size, MOST_RANKS)) if ON_GPU else "32")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )


def outcomes(
    size: int, fn: Callable, *args: Any, timeout: float = 120, env: dict[str, str] | None = None
) -> list[Outcome]:
    """Call `fn(rank, size, *args)` on `size` ranks and return each rank's `Outcome`, errors included.

    `fn` must be importable (a module-level function). A rank that is still running after `timeout` seconds is killed.
    """
    make_room(size)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        readers, processes = [], []
        for rank in range(size):
            reader, writer = _context.Pipe()
            process = _context.Process(target=_main, args=(rank, size, store, writer, env or {}, fn, args), daemon=True)
            process.start()
            writer.close()
            readers.append(reader)
            processes.append(process)
        results = [Outcome() for _ in range(size)]
        deadline, pending = time.monotonic() + timeout, dict(zip(readers, range(size), strict=True))
        while pending and (left := deadline - time.monotonic()) > 0:
            for reader in wait(list(pending), timeout=left):
                rank = pending.pop(reader)
                try:
                    results[rank] = reader.recv()
                except EOFError:
                    results[rank] = Outcome(error_type="Killed", error="the process ended without a result")
                reader.close()
        for rank in pending.values():
            results[rank] = Outcome(error_type="Hang", error=f"still running after {timeout} s")
        for rank, process in enumerate(processes):
            if results[rank].error_type == "Hang":
                process.kill()
            process.join(10)
            results[rank].exit_code = process.exitcode
        return results


def run(size: int, fn: Callable, *args: Any, timeout: float = 120, env: dict[str, str] | None = None) -> list[Any]:
    """As `outcomes`, but return the ranks' values.

    Raises:
        RankError: a rank raised, died or hung; the message holds every failed rank's traceback.
    """
    return _values(outcomes(size, fn, *args, timeout=timeout, env=env))


def _values(results: list[Outcome]) -> list[Any]:
    failed = [f"rank {rank}: {r.error_type}: {r.error}" for rank, r in enumerate(results) if r.error_type]
    if failed:
        raise RankError("\n".join(failed))
    return [r.value for r in results]


def make_room(size: int = MOST_RANKS) -> None:
    """End the ranks of pools, which start again when they are used, where `size` more would not fit on a GPU."""
    if ON_GPU and size + sum(pool.size for pool in _pools) > MOST_RANKS:
        for pool in list(_pools):
            pool.close()


class Pool:
    """Ranks that stay, for many small cases: `run` as the function above, without starting processes each time.

    `fn(rank, size, *args)` may keep things in module globals. After a failure the ranks are started afresh.
    """

    def __init__(self, size: int):
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable, *args: Any, timeout: float = 60) -> list[Any]:
        """Call `fn(rank, size, *args)` on every rank and return the values.

        Raises:
            RankError: a rank raised, died or hung.
        """
        if not self._workers:
            self._start()
        results = [Outcome(error_type="Hang", error=f"no answer after {timeout} s") for _ in self._workers]
        for _, pipe in self._workers:
            pipe.send((fn, args))
        deadline, pending = time.monotonic() + timeout, {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        while pending and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(pending), timeout=left):
                rank = pending.pop(pipe)
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    results[rank] = Outcome(error_type="Killed", error="the process ended without a result")
            if any(r.error_type not in ("", "Hang") for r in results):
                deadline = min(deadline, time.monotonic() + 5)  # the rest can only fail, too
        if any(r.error_type or r.threads > MAX_THREADS for r in results):
            self.close()
        return _values(results)

    def close(self) -> None:
        """End the ranks."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []
        _pools.discard(self)
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        make_room(self.size)
        _pools.add(self)
        self._folder = tempfile.TemporaryDirectory()  # the store is needed for every group made later
        for rank in range(self.size):
            ours, theirs = _context.Pipe()
            args = (rank, self.size, os.path.join(self._folder.name, "store"), theirs)
            process = _context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for rank, (_, pipe) in enumerate(self._workers):
            if not pipe.poll(60):
                raise RankError(f"rank {rank} did not start")
            pipe.recv()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    _join(rank, size, store)
    pipe.send("ready")
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            os._exit(0)
        outcome = Outcome()
        try:
            outcome.value = fn(rank, size, *args)
        except BaseException as error:
            outcome.error_type, outcome.error = type(error).__name__, f"{error}\n{traceback.format_exc()}"
        outcome.threads = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
        pipe.send(outcome)
