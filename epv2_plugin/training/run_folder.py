"""The folder that a training writes to: one training at a time, and none begins over what another has left there.

Imports no torch: the command looks before it starts ranks.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epv2_plugin.config import ConfigError

METRICS, CHECKPOINTS, LATEST = "metrics.jsonl", "checkpoints", "latest"
_LOCK = ".lock"


@contextmanager
def taken(folder: Path, *, resume: bool) -> Iterator[None]:
    """Make `folder` and hold it until the block or this process ends, so that nobody else trains there.

    Raises:
        ConfigError: somebody does; or, without `resume`, it holds what an earlier training has left.
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
        if not resume:
            _check_unused(folder)
        yield


def _check_unused(folder: Path) -> None:
    for name in (METRICS, f"{CHECKPOINTS}/{LATEST}"):
        path = folder / name
        if path.exists() and path.stat().st_size:  # a training that made no step has left nothing
            allowed = f"has {name} of an earlier training: continue that with --resume, or name another --folder"
            raise ConfigError("epv2", "--folder", str(folder), allowed)
