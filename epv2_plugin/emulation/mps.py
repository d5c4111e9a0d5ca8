"""CUDA's Multi-Process Service for as long as ranks run, where it is wanted, can be had and is not there yet."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from epv2_plugin import environment

PROGRAM = "nvidia-cuda-mps-control"
PIPE, LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
SECONDS = 20  # a client that was killed keeps the server busy for a few
_IN_TURNS = "ranks take turns on a GPU: results are right, times say nothing"


@contextlib.contextmanager
def served(wanted: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """A daemon for the ranks: what was done, in words, and the variables by which they find it.

    One that runs already is used and left alone; one started here is ended with the context.
    """
    if not wanted:
        yield "none, as no two ranks share a GPU", {}
        return
    there = environment.find_mps()
    if there.startswith("daemon"):
        yield f"{there}, which was there before and stays", {}
        return
    program = shutil.which(PROGRAM)
    if program is None:
        yield f"none, as there is no {PROGRAM} on PATH; {_IN_TURNS}", {}
        return
    # In a folder of its own, whose path must be short, as sockets lie there: no other process comes by accident.
    folder = Path(tempfile.mkdtemp(prefix="epv2-mps-", dir="/tmp"))
    found = {PIPE: str(folder), LOG: str(folder)}
    # A library that is loaded into everything, such as another NCCL, has no business in the daemon.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | found
    try:
        if problem := _start(program, env, folder):
            yield f"none, as {PROGRAM} -d failed ({problem}); {_IN_TURNS}", {}
        else:
            yield f"daemon {_daemon(folder)}, started in {folder} and ended with the ranks", found
    finally:
        _stop(program, env, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _start(program: str, env: dict[str, str], folder: Path) -> str:
    """Start the daemon; why it could not be, empty if it runs."""
    try:
        run = subprocess.run([program, "-d"], env=env, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if run.returncode != 0:
        return (run.stderr or run.stdout).strip() or f"exit code {run.returncode}"
    deadline = time.monotonic() + SECONDS
    while _daemon(folder) is None:
        if time.monotonic() > deadline:
            return f"no daemon within {SECONDS} s"
        time.sleep(0.05)
    return ""


def _stop(program: str, env: dict[str, str], folder: Path) -> None:
    daemon = _daemon(folder)
    if daemon is None:
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([program], input="quit\n", env=env, capture_output=True, text=True, timeout=SECONDS)
    deadline = time.monotonic() + SECONDS
    while runs(daemon) and time.monotonic() < deadline:
        time.sleep(0.05)
    if runs(daemon):
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon, signal.SIGKILL)


def runs(process: int) -> bool:
    """Whether a process is there; one that has ended, and whose parent has not asked how, is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _daemon(folder: Path) -> int | None:
    """The process of the daemon in `folder`."""
    try:
        return int((folder / "nvidia-cuda-mps-control.pid").read_text())
    except (OSError, ValueError):
        return None
