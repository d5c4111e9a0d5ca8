"""Start the ranks of one machine, pass signals on, and end them all when one fails."""

from __future__ import annotations

import collections
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import IO

import torch.distributed as dist

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
LISTENER = "EPV2_LISTENER"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # by which torchrun says that it keeps the store
ERROR_LINES = 25


def run_ranks(
    module: str,
    args: Sequence[str],
    processes: int,
    env: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
) -> int:
    """Run `python -m module args` as `processes` ranks of this machine and wait for all of them.

    Ranks find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment, and one thread to compute
    with. Rank 0 writes to this process's stdout and stderr; what the others write to stderr is shown if they fail.
    SIGINT and SIGTERM (and SIGHUP, as SIGTERM) are passed on once, so that ranks can end in order; a second one kills
    them. When a rank fails, the others are killed, and its last lines are printed.

    Args:
        env: further environment variables, of all ranks or of each.

    Returns:
        0, the exit code of the rank that failed first (128 + signal number if a signal ended it), or 130 if
        interrupted.
    """
    # The port is taken here and handed to rank 0 as an open socket, so nobody can take it in between.
    with _listen(processes) as listener:
        listener.set_inheritable(True)
        shared = {"LOCAL_WORLD_SIZE": str(processes), LISTENER: str(listener.fileno())}
        each = [env or {}] * processes if env is None or isinstance(env, Mapping) else env
        ranks = [{**shared, "LOCAL_RANK": str(rank), **more} for rank, more in enumerate(each)]
        group = _Ranks([sys.executable, "-m", module, *args], ranks, listener, (listener.fileno(),))
    with group:
        return group.wait()


def run_command(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """As `run_ranks`, for any command: once for each of `environments`, the further variables of each rank.

    As under torchrun, torch's store is this process's, so `init_process_group()` needs no arguments.
    """
    with _listen(len(environments)) as listener:
        host, port = listener.getsockname()
        # Kept until the ranks have ended. It takes the socket over, so that nobody can take the port in between.
        store = dist.TCPStore(host, port, is_master=True, master_listen_fd=os.dup(listener.fileno()))
        ranks = [{AGENT_STORE: "True", **environment} for environment in environments]
        group = _Ranks(command, ranks, listener)
    with group:
        code = group.wait()
    del store
    return code


def _listen(processes: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=max(128, 2 * processes))


def process_group_store(timeout: timedelta) -> dist.TCPStore | None:
    """The store of a rank that `run_ranks` started, None if somebody else did."""
    listener = os.environ.get(LISTENER)
    if listener is None:
        return None
    is_first = os.environ["RANK"] == "0"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_first,
        timeout=timeout,
        master_listen_fd=int(listener) if is_first else None,
        wait_for_workers=False,
    )


class _Ranks:
    """Running ranks; leaving the context kills and reaps what still runs and restores the signal handlers."""

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        listener: socket.socket,
        handed_to_first: tuple[int, ...] = (),
    ):
        processes = len(environments)
        self._ended: queue.Queue[tuple[int, int]] = queue.Queue()
        self._tails = [collections.deque[bytes](maxlen=ERROR_LINES) for _ in range(processes)]
        self._signals = 0
        self._processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._pass_on) for number in handled}
        host, port = listener.getsockname()
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        shared["WORLD_SIZE"] = str(processes)
        try:
            for rank, environment in enumerate(environments):
                process = subprocess.Popen(
                    command,
                    env={**shared, "RANK": str(rank), **environment},
                    stderr=subprocess.PIPE,
                    pass_fds=handed_to_first if rank == 0 else (),
                    start_new_session=True,  # a terminal's Ctrl-C must reach them through this process only
                )
                self._processes.append(process)
                for target in (self._read, self._reap):
                    thread = threading.Thread(target=target, args=(rank, process), daemon=True)
                    thread.start()
                    if target == self._read:
                        self._readers.append(thread)
        except BaseException:
            self.__exit__()
            raise
        if self._signals:
            self._kill()  # ranks started before the signal have it, later ones would wait for them

    def __enter__(self) -> _Ranks:
        return self

    def _read(self, rank: int, process: subprocess.Popen) -> None:
        pipe: IO[bytes] | None = process.stderr
        if pipe is None:
            return
        for line in pipe:
            self._tails[rank].append(line)
            if rank == 0:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()

    def _reap(self, rank: int, process: subprocess.Popen) -> None:
        self._ended.put((rank, process.wait()))

    def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
        self._signals += 1
        number = signal.SIGTERM if number == signal.SIGHUP else number
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number if self._signals == 1 else signal.SIGKILL)

    def wait(self) -> int:
        """Wait for every rank, or for the first failure; see `run_ranks` for the result."""
        interrupted = False
        for _ in self._processes:
            rank, code = self._ended.get()
            if self._signals and code in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL):
                return INTERRUPTED  # it was not ready to end in order, so the others can't either
            if self._signals and code == INTERRUPTED:
                interrupted = True
            elif code != 0:
                return self._fail(rank, code)
        return INTERRUPTED if interrupted else 0

    def _fail(self, rank: int, code: int) -> int:
        self._kill()
        self._readers[rank].join(5)
        how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        print(f"rank {rank} of {len(self._processes)} failed first ({how}); the others were ended.", file=sys.stderr)
        if rank != 0 and self._tails[rank]:
            print(f"Last lines of rank {rank}:", file=sys.stderr)
            sys.stderr.flush()
            sys.stderr.buffer.write(b"".join(self._tails[rank]))
        sys.stderr.flush()
        return code if code > 0 else 128 - code

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def __exit__(self, *error: object) -> None:
        self._kill()
        for reader in self._readers:
            reader.join(5)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
