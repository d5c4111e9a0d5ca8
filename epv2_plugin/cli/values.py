"""Types of command-line values, with errors that say what is allowed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from epv2_plugin.config import ConfigError


def share(text: str) -> float:
    """A share: above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


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
