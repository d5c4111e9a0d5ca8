"""FSDP2's collectives on a real device: the cases of `test_fsdp.py`, what overlap must not change, profiles without
kernels, GEMMs at full speed, dead peers; and torchtitan.

Ranks share the GPUs there are, so one is enough; then NCCL_MULTI_RANK_GPU_ENABLE=1 must be set.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from epv2_plugin import fsdp
from epv2_plugin.bench.timing import Launch, profile
from tests import harness, test_fsdp

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("work", "size", "arguments"),
    [
        (test_fsdp.collectives, 3, ("fp32", 37)),
        (test_fsdp.collectives, 4, ("bf16", 30000)),
        (test_fsdp.collectives, 2, ("fp16", 16)),
        (test_fsdp.in_turn, 3, (2,)),
        (test_fsdp.in_turn, 4, (3,)),
        (test_fsdp.no_room, 2, ()),
        (test_fsdp.through_another, 2, ()),
        pytest.param(test_fsdp.installed, 4, (), marks=test_fsdp.SEVERAL_GROUPS),
    ],
)
def test_as_on_the_host(work: Callable[..., Any], size: int, arguments: tuple[Any, ...]) -> None:
    harness.run(size, work, "cuda", *arguments, timeout=90)


@pytest.mark.parametrize("name", test_fsdp.LAYOUTS)
@pytest.mark.parametrize("several", [False, pytest.param(True, marks=test_fsdp.SEVERAL_GROUPS)])
def test_a_model_trains_as_on_the_host(name: str, several: bool) -> None:
    reshard, factor = test_fsdp.LAYOUTS[name]
    host, cuda, again = (
        harness.run(4, test_fsdp.trained, reshard, several, False, kind, factor, timeout=120)
        for kind in ("host", "cuda", "cuda")
    )
    assert test_fsdp.same_bits(cuda, again)
    for mine, theirs in zip(cuda, host, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=0)
        for a, b in zip(mine[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


LAYERS, WIDTH, BATCH = 8, 1024, 2048


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def _deep(device: torch.device, size: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*[_Layer() for _ in range(LAYERS)]).to(device)
    mesh = init_device_mesh("cuda", (size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    fsdp.apply(model, {"backend": "cuda", "timeouts": {"host_seconds": 60}})
    return model


def overlapped(rank: int, size: int, one_by_one: bool) -> list[float]:
    """Losses of some steps, with transfers beside GEMMs as FSDP2 prefetches, or with the device idle around each."""
    device = test_fsdp.take_device()
    model = _deep(device, size)
    if one_by_one:

        def wrap(call: Callable[..., Any], name: str) -> Callable[..., Any]:
            def alone(*args: Any, **kwargs: Any) -> Any:
                torch.cuda.synchronize()
                result = call(*args, **kwargs)
                torch.cuda.synchronize()
                return result

            return alone

        fsdp.watch(model, wrap)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for step in range(6):
        x = torch.randn(BATCH, WIDTH, device=device, generator=torch.Generator(device).manual_seed(10 * step + rank))
        loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    fsdp.remove(model)
    return losses


def test_overlap_changes_no_bit() -> None:
    alone, beside, again = (harness.run(4, overlapped, one_by_one, timeout=200) for one_by_one in (True, False, False))
    assert alone[0][-1] < alone[0][0]
    assert beside == alone
    assert again == alone


def profiled(rank: int, size: int) -> dict[str, list[Launch]]:
    """The kernels of an all-gather and of a reduce-scatter."""
    device = test_fsdp.take_device()
    carrier = test_fsdp.make_carrier("cuda", 32 << 20, sms=4)
    gather, scatter = test_fsdp.both(carrier)
    group, values = dist.group.WORLD, 4 << 20

    def gathers() -> None:
        out = gather.allocate((values,), dtype=torch.float32, device=device)
        gather(out, out.view(size, -1)[rank], group)

    def reduces() -> None:
        parts = scatter.allocate((values,), dtype=torch.float32, device=device)
        out = scatter.allocate((values // size,), dtype=torch.float32, device=device)
        scatter(out, parts, group, dist.ReduceOp.AVG)

    def align() -> None:
        torch.cuda.synchronize()
        dist.barrier()

    found = {}
    for work in (gathers, reduces):
        work()
        found[work.__name__] = profile(align, work, device)
        torch.cuda.synchronize()
        dist.barrier()
    carrier.close()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_all_gathers_launch_no_kernel(size: int) -> None:
    for found in harness.run(size, profiled, timeout=120):
        assert found["gathers"] == []
        assert [launch.name for launch in found["reduces"]] == ["epv2_reduce_scatter"]
        assert found["reduces"][0].ctas <= 4


@pytest.mark.parametrize("what", ["gather", "reduce"])
def test_ranks_with_layers_of_another_size(what: str) -> None:
    results = harness.outcomes(2, test_fsdp.disagree, "cuda", what, timeout=60)
    messages = [result.value or result.error for result in results]
    assert all(f"rank {rank}, waiting for rank {1 - rank} in" in m for rank, m in enumerate(messages)), messages


@pytest.mark.parametrize(("how", "first"), [("killed", "gather"), ("late", "gather"), ("killed", "reduce")])
def test_a_rank_that_does_not_come_is_named(how: str, first: str) -> None:
    test_fsdp.check_absent(harness.outcomes(3, test_fsdp.absent, "cuda", how, first, timeout=90), first)


def _epv2(*words: str, cwd: Path) -> None:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "epv2_plugin.cli", *words]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bench(tmp_path: Path) -> None:
    _epv2(
        "bench", "fsdp", "--ranks", "4", "--parameters", str(1 << 20), "--iters", "2", "--json", "b.json", cwd=tmp_path
    )
    document = json.loads((tmp_path / "b.json").read_text())
    beside = [f"beside {name}, {kind}" for kind in ("gather", "reduce") for name in ("epv2", "torch")]
    paced = [f"beside epv2, {kind}, paced" for kind in ("gather", "reduce")]
    assert [*document["gemm_us"]] == ["alone", *beside, *paced]


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_torchtitan_from_the_command(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "deepseek_v3_tiny_fsdp_1gpu.yaml"
    _epv2("ab", str(recipe), "--steps", "8", "--folder", "run", cwd=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {arm: [r["loss"] for r in records if r["arm"] == arm] for arm in ("alltoall", "epv2", "alltoall, TP 2")}
    assert losses["epv2"] == pytest.approx(losses["alltoall"], rel=2e-2)
    assert losses["alltoall, TP 2"] == pytest.approx(losses["alltoall"], rel=2e-2)
    for record in records:
        assert min(record[f"{stage}_ms"] for stage in ("dispatch", "combine", "all_gather", "reduce_scatter")) > 0
    assert "cuda backend over" in (tmp_path / "run" / "report.md").read_text()
