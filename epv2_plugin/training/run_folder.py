"""The folder that a training writes to: one at a time, and none begins unasked over what another has left there.

Imports no torch: the command looks before it starts ranks.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from epv2_plugin.config import ConfigError

METRICS, CHECKPOINTS, LATEST = "metrics.jsonl", "checkpoints", "latest"
_LOCK = ".lock"


@contextmanager
def taken(folder: Path, *, reuse: bool) -> Iterator[None]:
    """Make `folder` and hold it until the block or this process ends, so that nobody else trains there.

    Raises:
        ConfigError: somebody does; or, without `reuse`, it holds what an earlier training has left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            allowed = f"{file.read() or 'another process'} is training there: wait for it, or name another folder"
            raise ConfigError("epv2", "--folder", str(folder), allowed) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        if not reuse:
            _check_unused(folder)
        yield


def taken_by_rank_0(folder: Path, *, reuse: bool) -> AbstractContextManager[None]:
    """As `taken`, for processes that `RANK` numbers: only the first holds it."""
    return taken(folder, reuse=reuse) if os.environ["RANK"] == "0" else nullcontext()


def _check_unused(folder: Path) -> None:
    for name in (METRICS, f"{CHECKPOINTS}/{LATEST}"):
        path = folder / name
        if path.exists() and path.stat().st_size:  # a training that made no step has left nothing
            allowed = f"has {name} of an earlier training: continue that with --resume, or name another --folder"
            raise ConfigError("epv2", "--folder", str(folder), allowed)
