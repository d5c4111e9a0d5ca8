"""Checkpoints of a memory and its optimizer for another number of ranks than wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def reshard_memory(states: Sequence[Mapping[str, Any]], rank: int, num_ranks: int, prefix: str = "") -> dict[str, Any]:
    """What `ShardedNgramMemory.load_state_dict` takes on rank `rank` of `num_ranks`.

    Args:
        states: state dicts of the ranks that wrote the checkpoint, in any order; those without a row of this rank may
            be left out. Loaded with `torch.load(..., mmap=True)`, only the rows needed are read.
        prefix: of the memory's keys, as in "layers.1.engram.", where the state dicts are those of a model.

    Raises:
        KeyError: no memory has that prefix. ValueError: a row of this rank is in none of the states.
    """
    weight, extra = f"{prefix}weight", f"{prefix}_extra_state"
    total, first, share = _share([state[extra] for state in states], rank, num_ranks)
    parts = [(state[extra]["first_row"], state[weight]) for state in states]
    rows = _take(parts, total, first, share)
    return {weight: rows, extra: {**states[0][extra], "first_row": first}}


def reshard_optimizer(states: Sequence[Mapping[str, Any]], rank: int, num_ranks: int) -> dict[str, Any]:
    """What `load_state_dict` of an optimizer of this package takes on that rank; see `reshard_memory`."""
    result: dict[str, Any] = {"state": {}, "param_groups": states[0]["param_groups"]}
    for index, model in states[0]["state"].items():
        each = [state["state"][index] for state in states]
        total, first, share = _share(each, rank, num_ranks)
        result["state"][index] = {
            name: _take([(state["first_row"], state[name]) for state in each], total, first, share)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in model.items()
        } | {"first_row": first}
    return result


def _share(states: Sequence[Mapping[str, Any]], rank: int, num_ranks: int) -> tuple[int, int, int]:
    """(rows of the table, first row of the rank, rows of each rank)."""
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank = {rank}: must be in 0..{num_ranks - 1}")
    total = int(states[0]["num_rows"])
    share = -(-total // num_ranks)
    return total, share * rank, share


def _take(parts: Sequence[tuple[int, torch.Tensor]], total: int, first: int, count: int) -> torch.Tensor:
    """Rows `first` to `first + count` from `parts` (each with the number of its first row); zero beyond `total`."""
    result = parts[0][1].new_zeros(count, *parts[0][1].shape[1:])
    reached, end = first, min(first + count, total)
    for begin, rows in sorted(parts, key=lambda part: part[0]):
        low, high = max(reached, begin), min(end, begin + rows.shape[0])
        if low < high and begin <= reached:
            result[low - first : high - first] = rows[low - begin : high - begin]
            reached = high
    if reached < end:
        raise ValueError(f"row {reached} of {total} is in none of the {len(parts)} states: give those of all ranks")
    return result
