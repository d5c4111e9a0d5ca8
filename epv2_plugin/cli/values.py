"""Types of command-line values, with errors that say what is allowed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from epv2_plugin.config import ConfigError


def share(text: str) -> float:
    """A share: above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def positives(text: str) -> list[int]:
    """Whole numbers of 1 or more with commas between them, each once, in ascending order."""
    return sorted({positive(part) for part in text.split(",")})


def check_file(option: str, path: Path) -> None:
    """Make sure, before the work for it begins, that a file can be written.

    Raises:
        ConfigError: its folder is not there, or it can't be written.
    """
    if path.is_dir():
        problem = "is a folder"
    elif not path.parent.is_dir():
        problem = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "can't be written to"
    else:
        return
    raise ConfigError("epv2", option, str(path), problem)


def make_folder(folder: Path) -> None:
    """Make the folder that a run writes to.

    Raises:
        ConfigError: it can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("epv2", "--folder", str(folder), f"can't be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("epv2", "--folder", str(folder), "can't be written to")
