"""Where ranks compute, decided from the number of GPUs and ranks; no GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from epv2_plugin.config import ConfigError
from epv2_plugin.training import devices
from epv2_plugin.training.recipe import load_recipe

RECIPE = str(Path(__file__).parents[1] / "recipes" / "deepseek_v3_tiny.yaml")


def _places(gpus: int, ranks: int) -> list[devices.Place]:
    return [
        devices.place(gpus, {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), "WORLD_SIZE": "64"})
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(
    ("gpus", "ranks", "numbers", "sharing"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7], 1),
        (8, 2, [0, 1], 1),
        (1, 4, [0, 0, 0, 0], 4),
        (2, 4, [0, 1, 0, 1], 2),
        (2, 3, [0, 1, 0], 2),
        (1, 1, [0], 1),
    ],
)
def test_ranks_are_dealt_out_over_the_gpus(gpus: int, ranks: int, numbers: list[int], sharing: int) -> None:
    places = _places(gpus, ranks)
    assert [where.device for where in places] == [torch.device("cuda", number) for number in numbers]
    assert {where.ranks_per_gpu for where in places} == {sharing}
    assert {where.gpus for where in places} == {min(gpus, ranks)}


def test_no_gpu_is_the_cpu() -> None:
    assert set(_places(0, 4)) == {devices.Place(torch.device("cpu"), 0, 0)}
    assert devices.place(0, {}).environment == {}


def test_ranks_that_no_launcher_counted_are_those_of_the_job() -> None:
    assert devices.place(1, {"LOCAL_RANK": "3", "WORLD_SIZE": "4"}).ranks_per_gpu == 4


def test_ranks_that_share_a_gpu_share_its_queues_and_sms() -> None:
    assert _places(4, 4)[0].environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    shared = _places(1, 4)[0].environment
    few = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "8"}
    assert shared == {"CUDA_DEVICE_MAX_CONNECTIONS": "24", **few}
    assert devices.environment(4, contexts=2) == {"CUDA_DEVICE_MAX_CONNECTIONS": "12", **few}
    assert _places(1, 64)[0].environment["NCCL_MAX_CTAS"] == "1"


def _pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> list[Any]:
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    return taken


def test_sharing_is_set_up_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = _pretend(monkeypatch, 1)
    for name in ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_MAX_CTAS", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_MAX_CTAS", "2")  # the user's own wins
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    where = devices.place(1, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    notice = devices.take(where)
    assert taken == [torch.device("cuda", 0)]
    assert os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert notice.startswith("4 ranks on each of 1 GPU (NVIDIA H200), in turns: without MPS, times say nothing")
    assert "NCCL_MAX_CTAS=2" in notice
    (tmp_path / "nvidia-cuda-mps-control.pid").touch()
    assert "side by side under MPS" in devices.take(where)
    assert devices.take(devices.place(4, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})) == ""
    assert taken[-1] == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("backend", "gpus", "result"),
    [
        ("host", 0, 0),
        ("auto", 0, 0),
        ("auto", 2, 2),
        ("cuda", 2, 2),
        ("cuda", 0, "backend = 'cuda': there is no CUDA device here"),
        ("host", 1, "backend = 'host': the host backend trains on the CPU; hide the GPU"),
    ],
)
def test_backend_and_machine_must_fit(
    monkeypatch: pytest.MonkeyPatch, backend: str, gpus: int, result: int | str
) -> None:
    _pretend(monkeypatch, gpus)
    recipe = load_recipe(RECIPE, {"plugin.backend": backend})
    if isinstance(result, int):
        assert devices.usable_gpus(recipe) == result
    else:
        with pytest.raises(ConfigError) as error:
            devices.usable_gpus(recipe)
        assert result in str(error.value)


def test_the_group_serves_tensors_of_host_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, 0)
    assert devices.process_group_backend() == "gloo"
    _pretend(monkeypatch, 1)
    assert devices.process_group_backend() == "cpu:gloo,cuda:nccl"
