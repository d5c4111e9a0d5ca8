"""FSDP2 over the plugin's collectives: bits of the sums, whole models against one process, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard

import epv2_plugin
from epv2_plugin import BufferSizeError, ConfigError, fsdp
from epv2_plugin.config import PluginConfig
from epv2_plugin.fsdp.collectives import HostCarrier, PluginAllGather, PluginReduceScatter
from tests.harness import Pool

CONFIG = {"backend": "host", "timeouts": {"host_seconds": 20}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _gradients(rank: int, size: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    gen = torch.Generator().manual_seed(rank)
    # Magnitudes far apart: another order of the sum, or sums in bf16, give other bits.
    return (torch.randn(size * columns, generator=gen) * 10 ** (2 * torch.rand(1, generator=gen))).to(dtype)


def collectives(rank: int, size: int, name: str) -> None:
    """Both objects on plain tensors, synchronous and not, against sums made by hand in the documented order."""
    group, dtype, columns = dist.group.WORLD, DTYPES[name], 37
    carrier = HostCarrier(group, 1 << 20, PluginConfig())
    gather, scatter = PluginAllGather({group: carrier}), PluginReduceScatter({group: carrier})
    cpu = torch.device("cpu")
    for number, asynchronous in enumerate((False, True, True)):
        out = gather.allocate((size * columns,), dtype=dtype, device=cpu)
        own = out[rank * columns :][:columns]
        if number == 2:
            own = torch.empty(columns, dtype=dtype)  # a shard that lies elsewhere
        own.copy_(_gradients(rank, 1, columns, dtype))
        work = gather(out, own, group, async_op=asynchronous)
        assert (work is not None) == asynchronous
        if work is not None:
            work.wait()
        assert torch.equal(out, torch.cat([_gradients(p, 1, columns, dtype) for p in range(size)]))
    total = torch.zeros(columns)
    for source in range(size):
        total += _gradients(source, size, columns, dtype).view(size, columns)[rank].float()
    ops = {"SUM": (dist.ReduceOp.SUM, 1.0), "AVG": (dist.ReduceOp.AVG, 1 / size)}
    ops["PREMUL"] = (dist.ReduceOp.PREMUL_SUM(0.3), torch.tensor(0.3).item())
    for op, scale in ops.values():
        for asynchronous in (False, True):
            reduced = scatter.allocate((columns,), dtype=dtype, device=cpu)
            work = scatter(reduced, _gradients(rank, size, columns, dtype), group, op, async_op=asynchronous)
            if work is not None:
                work.wait()
            assert torch.equal(reduced, (total * scale).to(dtype))


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_sums_run_in_fp32_in_rank_order_and_are_rounded_once(pool: Callable[[int], Pool], name: str) -> None:
    pool(3).run(collectives, name)


def in_flight(rank: int, size: int) -> None:
    """More under way than the window holds: the oldest are completed first; waits in any order, twice."""
    group = dist.group.WORLD
    carrier = HostCarrier(group, 2 * size * 64 * 4, PluginConfig())
    gather = PluginAllGather({group: carrier})
    outs = [torch.empty(size * 64) for _ in range(5)]
    works = [gather(out, torch.full((64,), float(rank + 10 * n)), group, async_op=True) for n, out in enumerate(outs)]
    for number in (4, 0, 2, 2, 1, 3):
        works[number].wait()
        assert torch.equal(outs[number].view(size, 64)[:, 0], torch.arange(size) + 10.0 * number)
    assert not carrier._buffer.agrs_in_session
    gather(outs[0], torch.zeros(64), group)
    assert not carrier._buffer.agrs_in_session


def test_more_under_way_than_the_window_holds(pool: Callable[[int], Pool]) -> None:
    pool(2).run(in_flight)


class Block(nn.Module):
    """Sizes that no number of ranks divides; `experts` is sharded over another mesh than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.experts = nn.Linear(5, 7), nn.Parameter(torch.randn(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x).tanh() @ self.experts


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(5, 3))


def _shard(model: nn.Sequential, mesh: Any, reshard: Any, several: bool, policy: MixedPrecisionPolicy) -> nn.Sequential:
    for block in list(model)[:2]:
        experts = block.experts
        outer, inner = (FSDPMeshInfo(mesh[name], shard_mesh_dim=0) for name in ("all", "half"))

        def place(param: nn.Parameter, experts: Any = experts, outer: Any = outer, inner: Any = inner) -> Any:
            return ShardPlacementResult(placement=Shard(0), mesh_info=inner if param is experts else outer)

        fully_shard(
            block,
            mesh=mesh["all"],
            reshard_after_forward=reshard,
            mp_policy=policy,
            shard_placement_fn=place if several else None,
        )
    return fully_shard(model, mesh=mesh["all"], mp_policy=policy)


def _meshes(size: int) -> dict[str, Any]:
    """The ranks in one dimension, and in halves."""
    halves = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pair", "half"))
    return {"all": init_device_mesh("cpu", (size,), mesh_dim_names=("all",))["all"], "half": halves["half"]}


def trained(rank: int, size: int, reshard: Any, several: bool, bf16: bool, ours: bool, factor: float) -> list[Any]:
    """Three steps; losses, whole gradients, and the number of parameter groups of the first block."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    model = _shard(_model(), _meshes(size), reshard, several, policy)
    if factor:
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(factor)
    if ours:
        fsdp.apply(model, CONFIG)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = [p.grad.full_tensor() for p in model.parameters()]
    fsdp.remove(model)
    return [losses, gradients, len(model[0]._get_fsdp_state()._fsdp_param_groups)]


def one_process(size: int, factor: float) -> tuple[list[float], list[torch.Tensor]]:
    """As `trained`, on the batches of all ranks at once; the loss of rank 0's batch."""
    model, losses = _model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        parts = [
            model(torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))).square().mean()
            for rank in range(size)
        ]
        optimizer.zero_grad()
        (sum(parts) / (factor or size)).backward()
        optimizer.step()
        losses.append(parts[0].item())
    return losses, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("reshard", "factor"),
    [(True, 0), (False, 0), (2, 0), (True, 3.0)],
    ids=["reshard", "keep", "to-two-ranks", "divide-by-3"],
)
def test_a_model_trains_as_on_one_process(pool: Callable[[int], Pool], reshard: Any, factor: float) -> None:
    found = pool(4).run(trained, reshard, False, False, True, factor)
    losses, gradients = one_process(4, factor)
    torch.testing.assert_close(found[0][0], losses, rtol=1e-5, atol=0)
    for ours, theirs in zip(found[0][1], gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    again = pool(4).run(trained, reshard, False, False, True, factor)
    assert found[0][0] == again[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], again[0][1], strict=True))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_several_parameter_groups_in_a_module(pool: Callable[[int], Pool], bf16: bool) -> None:
    """Experts over half of the ranks, as with expert parallelism; stock sums in another order, in fp32."""
    ours = pool(4).run(trained, True, True, bf16, True, 0)
    stock = pool(4).run(trained, True, True, bf16, False, 0)
    assert ours[0][2] == 2
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=0)
        for a, b in zip(mine[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def installed(rank: int, size: int) -> None:
    """apply twice, status, remove, apply again; asynchronous unshard."""
    model = _shard(_model(), _meshes(size), True, True, MixedPrecisionPolicy())
    groups = [
        group for m in model.modules() if hasattr(m, "unshard") for group in m._get_fsdp_state()._fsdp_param_groups
    ]
    before = [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
    fsdp.apply(model, CONFIG)
    comms = [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
    assert all(isinstance(a, PluginAllGather) and isinstance(b, PluginReduceScatter) for a, b in comms)
    fsdp.apply(model, CONFIG)
    assert comms == [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
    with pytest.raises(RuntimeError, match="call remove before applying <defaults>"):
        fsdp.apply(model)
    handle = model[0].unshard(async_op=True)
    handle.wait()
    torch.testing.assert_close(model[0].experts.detach(), _model()[0].experts.detach(), rtol=0, atol=0)
    found = epv2_plugin.status()["groups"]
    assert [group["ranks"] for group in found] == [[0, 1, 2, 3], [rank // 2 * 2, rank // 2 * 2 + 1]]
    assert all(group["primitive"] == "fsdp" and group["backend"] == "host" for group in found)
    assert all(group["sent_bytes"] > 0 for group in found)
    fsdp.remove(model)
    fsdp.remove(model)
    assert before == [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
    assert epv2_plugin.status()["groups"] == []
    fsdp.apply(model, {**CONFIG, "fsdp": {"collectives": "stock"}})
    assert before == [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]


def test_apply_and_remove(pool: Callable[[int], Pool]) -> None:
    pool(4).run(installed)


def refused(rank: int, size: int, path: str) -> None:
    """Nothing of what is refused leaves a trace."""
    Path(f"{path}{rank}.yaml").write_text("fsdp: {window_bytes: 64}\n")
    mesh = _meshes(size)
    plain = _model()
    with pytest.raises(ValueError, match="model is a Sequential without a module that fully_shard was called on"):
        fsdp.apply(plain, CONFIG)
    model = _shard(_model(), mesh, True, True, MixedPrecisionPolicy())
    cases: list[tuple[Any, str]] = [
        ({"backend": "cuda"}, "backend = 'cuda': the cuda backend needs a CUDA device"),
        (f"{path}{rank}.yaml", f"{rank}.yaml: fsdp.window_bytes = 64: the root module needs 96 bytes on 4 ranks"),
        ({"fsdp": {"window_bytes": 0}}, "fsdp.window_bytes = 0: must be greater than or equal to 1"),
        ({"fsdp": {"window": 1}}, "fsdp.window = 1: unknown key, did you mean 'window_bytes'"),
    ]
    for config, message in cases:
        with pytest.raises(ConfigError, match=message):
            fsdp.apply(model, config)
    assert epv2_plugin.status()["groups"] == []
    group = dist.group.WORLD
    carrier = HostCarrier(group, 256, PluginConfig())
    gather, scatter = PluginAllGather({group: carrier}), PluginReduceScatter({group: carrier})
    four, whole = torch.zeros(4), torch.zeros(4 * size)
    with pytest.raises(BufferSizeError, match=r"fsdp.window_bytes = 'auto': gathered parameters of 1600 bytes do not"):
        gather(torch.zeros(100 * size), torch.zeros(100), group)
    with pytest.raises(ValueError, match="output_tensor has 15 values: must be 4 ranks times 4"):
        gather(whole[1:], four, group)
    with pytest.raises(ValueError, match="reduce op MAX: must be SUM, AVG or PREMUL_SUM"):
        scatter(four, whole, group, dist.ReduceOp.MAX)
    with pytest.raises(ValueError, match=r"PREMUL_SUM\(inf\): the factor must be finite"):
        scatter(four, whole, group, dist.ReduceOp.PREMUL_SUM(float("inf")))
    with pytest.raises(TypeError, match=r"gradients are torch\.int64: must be torch\.float32 or"):
        scatter(four.long(), whole.long(), group, dist.ReduceOp.SUM)
    with pytest.raises(ValueError, match="device = meta: the carrier of this model takes cpu tensors"):
        gather.allocate((4,), dtype=torch.float32, device=torch.device("meta"))
    with pytest.raises(RuntimeError, match=r"did not have when epv2_plugin\.fsdp\.apply was called"):
        gather(torch.zeros(4 * (size // 2)), four, mesh["half"].get_group())
    gather(whole, four, group)


def test_what_is_refused(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    pool(4).run(refused, str(tmp_path / "small"))


def replicated(rank: int, size: int) -> None:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("copies",))
    model = replicate(_model(), mesh=mesh)
    with pytest.raises(ValueError, match=r"the root module is on the mesh .*'copies': 2.*, which only replicates"):
        fsdp.apply(model, CONFIG)


def test_a_mesh_that_only_replicates(pool: Callable[[int], Pool]) -> None:
    pool(2).run(replicated)


def disagree(rank: int, size: int) -> str:
    """A rank whose layer has another size: every rank raises, at the wait."""
    group = dist.group.WORLD
    carrier = HostCarrier(group, 1 << 16, PluginConfig(**{"timeouts": {"host_seconds": 3}}))
    with pytest.raises(epv2_plugin.CommunicationError) as error:
        PluginAllGather({group: carrier})(torch.zeros((4 + rank) * size), torch.zeros(4 + rank), group)
    return str(error.value)


def test_ranks_with_layers_of_another_size(pool: Callable[[int], Pool]) -> None:
    messages = pool(2).run(disagree, timeout=30)
    assert any("expected [4] float32 as on this rank, seen [5] float32" in message for message in messages), messages
