"""The folder that a training or an A/B writes to: one at a time, and none begins unasked over a training's results.

Imports no torch: the command looks before it starts ranks.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from epv2_plugin.config import ConfigError

METRICS, CHECKPOINTS, LATEST = "metrics.jsonl", "checkpoints", "latest"
META = "meta.json"  # what only an A/B writes, before its metrics
Purpose = Literal["train", "resume", "compare"]
_LOCK = ".lock"


@contextmanager
def taken(folder: Path, purpose: Purpose) -> Iterator[None]:
    """Make `folder` and hold it until the block or this process ends, so that nobody else trains there.

    Raises:
        ConfigError: somebody does; or it holds what a training has left, unless that is to be resumed; or an A/B,
            unless another is to replace it.
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
        _check(folder, purpose)
        if purpose != "compare":
            (folder / META).unlink(missing_ok=True)  # of an A/B that ended before its first step
        yield


def taken_by_rank_0(folder: Path, purpose: Purpose) -> AbstractContextManager[None]:
    """As `taken`, for processes that `RANK` numbers: only the first holds it."""
    return taken(folder, purpose) if os.environ["RANK"] == "0" else nullcontext()


def _check(folder: Path, purpose: Purpose) -> None:
    compared = (folder / META).exists()
    for name in (METRICS, f"{CHECKPOINTS}/{LATEST}"):
        path = folder / name
        if not path.exists() or not path.stat().st_size:  # a training that made no step has left nothing
            continue
        if compared and name == METRICS:
            allowed = None if purpose == "compare" else f"has {name} of an A/B: name another --folder"
        elif purpose == "compare":
            allowed = f"has {name} of a training, which an A/B would replace: name another --folder"
        else:
            allowed = f"has {name} of an earlier training: continue that with --resume, or name another --folder"
            allowed = None if purpose == "resume" else allowed
        if allowed is not None:
            raise ConfigError("epv2", "--folder", str(folder), allowed)
