"""`epv2 bench fsdp` on a rank: a layer's parameter all-gather and gradient reduce-scatter as FSDP2 calls them, ours and
its own; GEMMs beside them; and training steps of a model of such layers.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from epv2_plugin import fsdp
from epv2_plugin.bench import gemms, report, rounds
from epv2_plugin.bench.ep import TIMEOUT, join
from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic.backends.cuda_shards import Slots
from epv2_plugin.fsdp.carriers import Carrier, CudaCarrier, HostCarrier
from epv2_plugin.fsdp.collectives import PluginAllGather, PluginReduceScatter

SLOTS = 2
TOLERANCE = 1e-5  # of fp32 sums in another order, relative to the largest
LAYERS = 4  # of the model that is trained
TOKENS = {"cpu": 64, "cuda": 4096}  # of a rank in a step of it
LOSS_TOLERANCE = 1e-2  # of how far losses have fallen, in bf16 after the same steps


@dataclass(frozen=True)
class Setup:
    """What is measured: a layer of `parameters` in bf16, gradients reduced in fp32 by `sms` CTAs, 0 = the default."""

    ranks: int
    parameters: int
    sms: int
    iterations: int
    backend: str


def run(setup: Setup, command: str, json_file: Path | None) -> int:
    """Measure as one rank; rank 0 prints the report and writes the JSON. Returns the exit code, 1 = a wrong result."""
    device = join(setup.backend)
    all_rounds, bench = rounds.Rounds(device), _Bench(setup, device)
    if wrong := bench.wrong():
        print(f"epv2 bench fsdp: WRONG RESULT: {wrong} of rank {all_rounds.rank}", file=sys.stderr)
        return 1  # without leaving in order: the others are waiting for this rank
    document = rounds.document("bench fsdp", command, device, asdict(setup))
    others = setup.parameters // setup.ranks * (setup.ranks - 1)
    document["sms"] = bench.carrier.groups()["sms"]
    document["gather_bytes"], document["reduce_bytes"] = 2 * others, 4 * others
    works = bench.works()
    for kind in works:
        document[f"{kind}_us"] = all_rounds.measure(works[kind], setup.iterations)
    if device.type == "cuda":
        transfers = {
            f"{name}, {kind}": gemms.Transfer(
                bench.started(work),
                statistics.median(report.slowest(document[f"{kind}_us"][name])),
                document[f"{kind}_bytes"],
                f"torch, {kind}" if name == "epv2" else "",
            )
            for kind in works
            for name, work in works[kind].items()
        }
        document |= gemms.beside(all_rounds, transfers, setup.iterations)
        torch.cuda.synchronize(device)
    bench.carrier.close()
    trainings = {name: _Training(setup, device, name == "epv2") for name in ("epv2", "torch")}
    document["step_us"] = all_rounds.measure({name: each.step for name, each in trainings.items()}, setup.iterations)
    document["layers"], document["tokens"] = LAYERS, TOKENS[device.type]
    fallen = {name: each.end() for name, each in trainings.items()}
    if not fallen["torch"] > 0 or not math.isclose(*fallen.values(), rel_tol=LOSS_TOLERANCE):
        print(f"epv2 bench fsdp: WRONG RESULT: losses of rank {all_rounds.rank} fell by {fallen}", file=sys.stderr)
        return 1
    return all_rounds.finish(document, report.fsdp_text, json_file)


def _config(setup: Setup) -> PluginConfig:
    """What ours runs with."""
    seconds = int(TIMEOUT.total_seconds())
    return PluginConfig.model_validate(
        {"backend": setup.backend, "sm_budget": {"fsdp": setup.sms}, "timeouts": {"host_seconds": seconds}}
    )


class _Bench:
    def __init__(self, setup: Setup, device: torch.device):
        self.setup, self.device, self.group = setup, device, dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        assert self.group is not None
        self.carrier = self._carrier(self.group)
        ours = {self.group: self.carrier}
        self._gathers = {"epv2": PluginAllGather(ours), "torch": DefaultAllGather()}
        self._reduces = {"epv2": PluginReduceScatter(ours), "torch": DefaultReduceScatter()}

    def _carrier(self, group: dist.ProcessGroup) -> Carrier:
        config = _config(self.setup)
        gathered, gradients = 2 * self.setup.parameters, 4 * self.setup.parameters
        if self.device.type == "cpu":
            return HostCarrier(group, SLOTS * gradients, config)
        return CudaCarrier(group, Slots(gathered, SLOTS), Slots(gradients, SLOTS), config)

    def gather(self, name: str, value: float | None = None) -> torch.Tensor:
        """As `foreach_all_gather` of FSDP2, whose shards lie in the gathered tensor; `value` to fill the shard with."""
        comm: Any = self._gathers[name]
        out = comm.allocate((self.setup.parameters,), dtype=torch.bfloat16, device=self.device)
        shard = out.view(self.size, -1)[self.rank]
        if value is not None:
            shard.fill_(value)
        comm(out, shard, self.group)
        return out

    def reduce(self, name: str, values: torch.Tensor | None = None) -> torch.Tensor:
        """As `foreach_reduce`; gloo lacks the mean, so a sum."""
        comm: Any = self._reduces[name]
        options = {"dtype": torch.float32, "device": self.device}
        parts = comm.allocate((self.setup.parameters,), **options)
        out = comm.allocate((self.setup.parameters // self.size,), **options)
        if values is not None:
            parts.copy_(values)
        comm(out, parts, self.group, dist.ReduceOp.SUM)
        return out

    def wrong(self) -> str:
        """Which of our results is not torch's; empty = none."""
        if not torch.equal(self.gather("epv2", self.rank), self.gather("torch", self.rank)):
            return "the all-gather"
        gen = torch.Generator(self.device).manual_seed(self.rank)
        values = torch.randn(self.setup.parameters, generator=gen, device=self.device)
        ours, theirs = self.reduce("epv2", values), self.reduce("torch", values)
        return "" if bool(((ours - theirs).abs() <= TOLERANCE * theirs.abs().max()).all()) else "the reduce-scatter"

    def works(self) -> dict[str, dict[str, Callable[[], object]]]:
        """What is measured, by kind and whose it is."""
        return {
            "gather": {name: functools.partial(self.gather, name) for name in self._gathers},
            "reduce": {name: functools.partial(self.reduce, name) for name in self._reduces},
        }

    def started(self, work: Callable[[], object]) -> Callable[[], None]:
        """`work` as FSDP2 calls it, which makes the current stream wait for it."""

        def call() -> None:
            work()

        return call


class _Training:
    """A model of `LAYERS` pairs of matrices, `parameters` in each, sharded one by one over all ranks: bf16, fp32 sums.

    Args:
        ours: whether the plugin moves its parameters and gradients.
    """

    def __init__(self, setup: Setup, device: torch.device, ours: bool):
        width = max(8, math.isqrt(setup.parameters // 8) // 8 * 8)
        torch.manual_seed(0)
        self._model = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
                )
                for _ in range(LAYERS)
            )
        ).to(device)
        mesh = init_device_mesh(device.type, (setup.ranks,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in self._model:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self._model, mesh=mesh, mp_policy=policy)
        if ours:
            fsdp.apply(self._model, _config(setup))
        # One whose steps do not depend on how large gradients are: a wrong one shows in the loss.
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        gen = torch.Generator(device).manual_seed(1 + dist.get_rank())
        self._x = torch.randn(TOKENS[device.type], width, generator=gen, device=device)
        self._losses: list[torch.Tensor] = []  # the first and the last

    def step(self) -> None:
        """One training step."""
        loss = self._model(self._x).float().square().mean()
        loss.backward()
        self._losses[1:] = [loss.detach()]
        self._optimizer.step()
        self._optimizer.zero_grad()

    def end(self) -> float:
        """By what share the loss has fallen; the model is FSDP2's alone again."""
        fsdp.remove(self._model)
        first, last = (loss.item() for loss in self._losses)
        return 1 - last / first
