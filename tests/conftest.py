"""Shared fixtures: pools of real processes, one for each number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.harness import Pool

settings.register_profile(
    "ci", deadline=None, derandomize=bool(os.environ.get("CI")), suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n)`: n ranks that live until the end of the session."""
    pools: dict[int, Pool] = {}
    yield lambda size: pools.setdefault(size, Pool(size))
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def train(pool: Callable[[int], Pool]) -> Callable[..., list[Any]]:
    """`train(ranks, overrides, dispatcher, steps)`: what the steps of a training of the small recipe gave.

    A training that was made is not made again: its first steps do for whoever asks for fewer.
    """
    from tests.test_training import WAIT, run_steps

    made: dict[str, list[Any]] = {}

    def call(ranks: int, overrides: dict[str, Any], dispatcher: str = "alltoall", steps: int = 4) -> list[Any]:
        key = repr((ranks, sorted(overrides.items()), dispatcher))
        if len(made.get(key, [])) < steps:
            first, *others = pool(ranks).run(run_steps, overrides, dispatcher, steps, timeout=WAIT)
            assert all(other == first for other in others)
            made[key] = first
        return made[key][:steps]

    return call


@pytest.fixture(scope="session")
def alone(train: Callable[..., list[Any]]) -> list[Any]:
    """20 steps of one process."""
    results = train(1, {}, steps=20)
    assert results[-1].loss < results[0].loss - 0.5
    return results


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
