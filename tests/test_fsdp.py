"""FSDP2 over the plugin's collectives: bits of the sums, whole models against one process, what is refused.

On the host and on the emulated device; `test_gpu_fsdp.py` runs the same on a GPU.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import Shard

import epv2_plugin
from epv2_plugin import BufferSizeError, CommunicationError, ConfigError, fsdp
from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic.backends.cuda_shards import Slots
from epv2_plugin.fsdp import install
from epv2_plugin.fsdp.carriers import Carrier, CudaCarrier, HostCarrier
from epv2_plugin.fsdp.collectives import PluginAllGather, PluginReduceScatter
from tests import harness
from tests.buffers import EMULATED_CARRIERS, KINDS, SMS, fsdp_on, take_device
from tests.harness import Pool

CONFIG = {"timeouts": {"host_seconds": 20}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def _config(kind: str, **more: Any) -> dict[str, Any]:
    return {**CONFIG, "backend": "host" if kind == "host" else "cuda", **more}


def make_carrier(kind: str, room: int, seconds: int = 20, sms: int = 0, slots: int = 2) -> Carrier:
    """Of all ranks, for tensors of at most `room` bytes."""
    config, group = PluginConfig(timeouts={"host_seconds": seconds}, sm_budget={"fsdp": sms}), dist.group.WORLD
    if kind == "host":
        return HostCarrier(group, slots * room, config)
    if kind == "cuda":
        take_device()
    carrier = EMULATED_CARRIERS.get(kind, CudaCarrier)
    return carrier(group, Slots(room, slots), Slots(room, slots), config)


def device_of(kind: str) -> torch.device:
    return take_device() if kind == "cuda" else torch.device("cpu")


def both(carrier: Carrier) -> tuple[PluginAllGather, PluginReduceScatter]:
    return PluginAllGather({dist.group.WORLD: carrier}), PluginReduceScatter({dist.group.WORLD: carrier})


def _gradients(rank: int, size: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    gen = torch.Generator().manual_seed(rank)
    # Magnitudes far apart: another order of the sum, or sums in bf16, give other bits.
    return (torch.randn(size * columns, generator=gen) * 10 ** (2 * torch.rand(1, generator=gen))).to(dtype)


def collectives(rank: int, size: int, kind: str, name: str, columns: int) -> None:
    """Both objects on plain tensors, synchronous and not, against sums made by hand in the documented order: each
    node's, then those, on the cuda backend."""
    group, dtype, device = dist.group.WORLD, DTYPES[name], device_of(kind)
    carrier = make_carrier(kind, 1 << 18, sms=2)
    gather, scatter = both(carrier)
    for number, asynchronous in enumerate((False, True, True, False, False)):
        out = gather.allocate((size * columns,), dtype=dtype, device=device)
        if number == 4:
            out = torch.empty_like(out)  # a result that lies elsewhere
        own = out[rank * columns :][:columns]
        if number == 2:
            own = torch.empty(columns, dtype=dtype, device=device)  # a shard that lies elsewhere
        own.copy_(_gradients(rank, 1, columns, dtype))
        work = gather(out, own, group, async_op=asynchronous)
        assert (work is not None) == asynchronous
        if work is not None:
            work.wait()
        assert torch.equal(out.cpu(), torch.cat([_gradients(p, 1, columns, dtype) for p in range(size)]))
        del out, own
    if kind == "emulated":
        assert carrier.runtime.launches == [], "an all-gather is done by copy engines"
    per_node = size if kind == "host" else carrier._shards._runtime.lsa_size
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(columns, dtype=wide)
    for first in range(0, size, per_node):
        of_node = torch.zeros(columns, dtype=wide)
        for source in range(first, first + per_node):
            of_node += _gradients(source, size, columns, dtype).view(size, columns)[rank].to(wide)
        total += of_node
    ops = {"SUM": (dist.ReduceOp.SUM, 1.0), "AVG": (dist.ReduceOp.AVG, 1 / size)}
    ops["PREMUL"] = (dist._make_nccl_premul_sum(0.3), torch.tensor(0.3, dtype=wide).item())
    for op, scale in ops.values():
        for asynchronous, elsewhere in ((False, False), (True, False), (True, True)):
            parts = scatter.allocate((size * columns,), dtype=dtype, device=device)
            reduced = scatter.allocate((columns,), dtype=dtype, device=device)
            if elsewhere:
                parts = torch.empty_like(parts)
            parts.copy_(_gradients(rank, size, columns, dtype))
            work = scatter(reduced, parts, group, op, async_op=asynchronous)
            if work is not None:
                work.wait()
            assert torch.equal(reduced.cpu(), (total * scale).to(dtype))
    if per_node < size:
        part, others = columns * dtype.itemsize, size // per_node - 1
        # Once to each other node; what a node has summed is not rounded yet.
        counted, summed = carrier._shards.traffic, columns * wide.itemsize if per_node > 1 else part
        assert counted.direct_network_bytes == 14 * (size - per_node) * part
        assert counted.network_bytes == others * (5 * part + 9 * summed)
    if kind == "emulated":
        kernels = [launch.kernel for launch in carrier.runtime.launches]
        assert kernels == ["epv2_reduce_scatter"] * 9
        assert all(launch.ctas <= 2 for launch in carrier.runtime.launches)
    carrier.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "columns"), [("fp32", 37), ("bf16", 37), ("bf16", 12000), ("fp16", 16), ("fp64", 18)])
def test_sums_run_in_fp32_in_rank_order_and_are_rounded_once(
    pool: Callable[[int], Pool], kind: str, name: str, columns: int
) -> None:
    pool(3).run(collectives, kind, name, columns)


@pytest.mark.parametrize(
    ("kind", "ranks", "name", "columns"),
    [
        ("emulated/1", 3, "bf16", 1200),
        ("emulated/2", 4, "bf16", 12000),
        ("emulated/2", 6, "bf16", 1200),
        ("emulated/3", 6, "fp16", 16),
        ("emulated/2", 4, "fp16", 37),
        ("emulated/2", 4, "fp32", 1200),
        ("emulated/2", 4, "fp64", 200),
    ],
)
def test_sums_and_gathers_between_nodes(
    pool: Callable[[int], Pool], kind: str, ranks: int, name: str, columns: int
) -> None:
    pool(ranks).run(collectives, kind, name, columns)


def in_flight(rank: int, size: int) -> None:
    """More under way than the window holds: the oldest are completed first; waits in any order, twice."""
    group, carrier = dist.group.WORLD, make_carrier("host", size * 64 * 4)
    gather, _ = both(carrier)
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


def in_turn(rank: int, size: int, kind: str, slots: int) -> None:
    """Many turns of few slots, ahead by as many as there are, with a rank that is late each time."""
    group, device, columns = dist.group.WORLD, device_of(kind), 1200
    carrier = make_carrier(kind, size * columns * 4, slots=slots)
    gather, scatter = both(carrier)
    under_way: list[tuple[int, Any, torch.Tensor]] = []
    sums: list[tuple[int, Any, torch.Tensor]] = []

    def check() -> None:
        turn, work, out = under_way.pop(0)
        work.wait()
        assert out.view(size, columns)[:, 7].tolist() == [100.0 * turn + r for r in range(size)]
        out.fill_(-1.0)  # the caller's by now, all of it

    def check_sum() -> None:
        turn, work, out = sums.pop(0)
        work.wait()
        assert out.tolist() == [size * turn + 10.0 * sum(range(size))] * columns

    for turn in range(12):
        if turn % size == rank:
            time.sleep(0.05)
        if under_way and under_way[0][0] == turn - slots:
            check()
        out = gather.allocate((size * columns,), dtype=torch.float32, device=device)
        own = out[rank * columns :][:columns].fill_(100.0 * turn + rank)
        work = gather(out, own, group, async_op=turn != 5)
        if work is not None and turn != 7:  # nobody waits for that one
            under_way.append((turn, work, out))
        del out, own
        parts = scatter.allocate((size * columns,), dtype=torch.float32, device=device)
        reduced = scatter.allocate((columns,), dtype=torch.float32, device=device)
        work = scatter(reduced, parts.fill_(turn + 10.0 * rank), group, dist.ReduceOp.SUM, async_op=True)
        sums.append((turn, work, reduced))
        del parts
        if len(sums) > slots:
            check_sum()
    while under_way:
        check()
    while sums:
        check_sum()
    parts, later = (carrier.unreduced((size, 4), torch.float32).zero_() for _ in range(2))
    carrier.reduce_scatter(torch.empty(4, device=device), later, 1.0)()
    with pytest.raises(ValueError, match="reduce-scatter #12 behind #13: must be in the order of `unreduced`"):
        carrier.reduce_scatter(torch.empty(4, device=device), parts, 1.0)
    carrier.close()
    carrier.close()


@pytest.mark.parametrize(
    ("kind", "size", "slots"), [("emulated", 3, 2), ("emulated", 4, 3), ("emulated/1", 3, 2), ("emulated/2", 4, 3)]
)
def test_slots_are_used_in_turn(pool: Callable[[int], Pool], kind: str, size: int, slots: int) -> None:
    pool(size).run(in_turn, kind, slots)


class Block(nn.Module):
    """Sizes that no number of ranks divides; `experts` is sharded over another mesh than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.experts = nn.Linear(5, 7), nn.Parameter(torch.randn(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x).tanh() @ self.experts


def _model(device: torch.device | str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(5, 3)).to(device)


def _shard(model: nn.Sequential, mesh: Any, reshard: Any, several: bool, policy: MixedPrecisionPolicy) -> nn.Sequential:
    for block in list(model)[:2]:
        experts = block.experts
        outer, inner = (_fsdp_common.FSDPMeshInfo(mesh[name], shard_mesh_dim=0) for name in ("all", "half"))

        def place(param: nn.Parameter, experts: Any = experts, outer: Any = outer, inner: Any = inner) -> Any:
            return _fsdp_common.ShardPlacementResult(placement=Shard(0), mesh_info=inner if param is experts else outer)

        fully_shard(
            block,
            mesh=mesh["all"],
            reshard_after_forward=reshard,
            mp_policy=policy,
            shard_placement_fn=place if several else None,
        )
    return fully_shard(model, mesh=mesh["all"], mp_policy=policy)


def _meshes(size: int, device: str = "cpu") -> dict[str, Any]:
    """The ranks in one dimension, and in halves."""
    halves = init_device_mesh(device, (2, size // 2), mesh_dim_names=("pair", "half"))
    return {"all": init_device_mesh(device, (size,), mesh_dim_names=("all",))["all"], "half": halves["half"]}


def trained(
    rank: int, size: int, reshard: Any, several: bool, bf16: bool, kind: str, factor: float, prefetch: bool = False
) -> list[Any]:
    """Three steps; losses, whole gradients, the number of parameter groups of the first block, and what ran.

    Args:
        kind: of the carrier; "stock" = FSDP2's own collectives, on the CPU.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    with fsdp_on(kind) as device:
        model = _shard(_model(device), _meshes(size, device.type), reshard, several, policy)
        if factor:
            for module in model.modules():
                if hasattr(module, "set_gradient_divide_factor"):
                    module.set_gradient_divide_factor(factor)
        if prefetch:
            model.set_modules_to_forward_prefetch([model[0], model[1]])
            model[1].set_modules_to_backward_prefetch([model[0]])
        if kind != "stock":
            fsdp.apply(model, _config(kind))
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for step in range(3):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank)).to(device)
            loss = model(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        gradients = [whole(p.grad) for p in model.parameters()]
        groups = epv2_plugin.status()["groups"]
        fsdp.remove(model)
    return [losses, gradients, len(install.param_groups_of(model[0]._get_fsdp_state())), groups]


def whole(tensor: Any) -> torch.Tensor:
    """A sharded tensor, whole and on the CPU; through gloo, the only backend of the groups of these tests."""
    group = tensor.device_mesh.get_group()
    shards: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shards, tensor.to_local().cpu(), group=group)
    return torch.cat(shards)


def same_bits(found: list[list[Any]], others: list[list[Any]]) -> bool:
    return all(
        mine[0] == theirs[0] and all(torch.equal(a, b) for a, b in zip(mine[1], theirs[1], strict=True))
        for mine, theirs in zip(found, others, strict=True)
    )


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


SEVERAL_GROUPS = pytest.mark.skipif(
    not hasattr(_fsdp_common, "ShardPlacementResult"), reason="this torch has one parameter group in a module"
)
LAYOUTS = {"reshard": (True, 0), "keep": (False, 0), "to-two-ranks": (2, 0), "divide-by-3": (True, 3.0)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_trains_as_on_one_process(pool: Callable[[int], Pool], name: str) -> None:
    """On the host to rounding, on the device to the host's bits; between nodes, whose sums are added, to rounding."""
    reshard, factor = LAYOUTS[name]
    found = pool(4).run(trained, reshard, False, False, "host", factor)
    losses, gradients = one_process(4, factor)
    torch.testing.assert_close(found[0][0], losses, rtol=1e-5, atol=0)
    for ours, theirs in zip(found[0][1], gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    for kind in ("host", "emulated"):
        assert same_bits(pool(4).run(trained, reshard, False, False, kind, factor), found)
    if name == "reshard":
        between = pool(4).run(trained, reshard, False, False, "emulated/2", factor)
        torch.testing.assert_close(between[0][:2], found[0][:2], rtol=1e-6, atol=1e-7)
        assert same_bits(pool(4).run(trained, reshard, False, False, "emulated/2", factor), between)


@SEVERAL_GROUPS
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_several_parameter_groups_in_a_module(pool: Callable[[int], Pool], bf16: bool) -> None:
    """Experts over half of the ranks, as with expert parallelism; stock sums in another order, in fp32."""
    ours, stock, emulated = (pool(4).run(trained, True, True, bf16, kind, 0) for kind in ("host", "stock", "emulated"))
    assert ours[0][2] == 2
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=0)
        for a, b in zip(mine[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert same_bits(emulated, ours)
    for rank, (*_, groups) in enumerate(emulated):
        assert [group["ranks"] for group in groups] == [[0, 1, 2, 3], [rank // 2 * 2, rank // 2 * 2 + 1]]
        for group in groups:
            kept = {key: group[key] for key in ("primitive", "backend", "transport", "sms", "gather_sms")}
            assert kept == {
                "primitive": "fsdp",
                "backend": "cuda",
                "transport": "emulated",
                "sms": SMS,
                "gather_sms": 0,
            }
            assert group["window_bytes"] == 2 * (2 << 20)  # a window for each kind; they come in such pieces
            assert group["sent_bytes"] > 0


def test_layers_fetched_ahead_by_name(pool: Callable[[int], Pool]) -> None:
    """Windows grow with what FSDP2 has been told to prefetch."""
    host, emulated = (pool(4).run(trained, True, True, False, kind, 0, True) for kind in KINDS)
    assert same_bits(emulated, host)


def installed(rank: int, size: int, kind: str) -> None:
    """apply twice, status, remove, apply again; asynchronous unshard."""
    with fsdp_on(kind) as device:
        config = _config(kind)
        model = _shard(_model(device), _meshes(size, device.type), True, True, MixedPrecisionPolicy())
        groups = [
            group
            for m in model.modules()
            if hasattr(m, "unshard")
            for group in install.param_groups_of(m._get_fsdp_state())
        ]
        before = [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
        fsdp.apply(model, config)
        comms = [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
        assert all(isinstance(a, PluginAllGather) and isinstance(b, PluginReduceScatter) for a, b in comms)
        fsdp.apply(model, config)
        assert comms == [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
        with pytest.raises(RuntimeError, match="call remove before applying <defaults>"):
            fsdp.apply(model)
        seen: list[str] = []

        def wrap(call: Callable[..., Any], name: str) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                seen.append(name)
                return call(*args, **kwargs)

            return noted

        fsdp.watch(model, wrap)
        for _ in range(2):
            handle = model[0].unshard(async_op=True)
            handle.wait()
            torch.testing.assert_close(model[0].experts.detach().cpu(), _model()[0].experts.detach(), rtol=0, atol=0)
            model[0].reshard()
        assert seen == ["all_gather"] * 4  # of two parameter groups, twice
        found = epv2_plugin.status()["groups"]
        assert [group["ranks"] for group in found] == [[0, 1, 2, 3], [rank // 2 * 2, rank // 2 * 2 + 1]]
        assert all(group["primitive"] == "fsdp" and group["backend"] == config["backend"] for group in found)
        assert all(group["sent_bytes"] > 0 for group in found)
        fsdp.remove(model)
        fsdp.remove(model)
        assert before == [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]
        assert epv2_plugin.status()["groups"] == []
        fsdp.apply(model, {**config, "fsdp": {"collectives": "stock"}})
        assert before == [(group._all_gather_comm, group._reduce_scatter_comm) for group in groups]


@pytest.mark.parametrize("kind", KINDS)
def test_apply_and_remove(pool: Callable[[int], Pool], kind: str) -> None:
    pool(4).run(installed, kind)


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
        (f"{path}{rank}.yaml", f"{rank}.yaml: fsdp.window_bytes = 64: 1 needs 192 bytes on 4 ranks"),
        ({"fsdp": {"window_bytes": 0}}, "fsdp.window_bytes = 0: must be greater than or equal to 1"),
        ({"fsdp": {"window": 1}}, "fsdp.window = 1: unknown key, did you mean 'window_bytes'"),
    ]
    for config, message in cases:
        with pytest.raises(ConfigError, match=message):
            fsdp.apply(model, config)
    with fsdp_on("emulated"):
        with pytest.raises(ConfigError, match=r"window_bytes = 191: 1 needs 384 bytes, 2 times 192, on 4 ranks"):
            fsdp.apply(model, _config("emulated", fsdp={"window_bytes": 191}))
        with (
            mock.patch.dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS="1"),
            pytest.raises(ConfigError, match=r"fsdp\.collectives = 'auto': .*CUDA_DEVICE_MAX_CONNECTIONS=1.*stock"),
        ):
            fsdp.apply(model, _config("emulated"))
    assert epv2_plugin.status()["groups"] == []
    group = dist.group.WORLD
    gather, scatter = both(make_carrier("host", 128))
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


def no_room(rank: int, size: int, kind: str) -> None:
    """What slots are for, and what they are not for. The window is as before when a call was refused."""
    device, group, options = device_of(kind), dist.group.WORLD, {"dtype": torch.float32, "device": device_of(kind)}
    with pytest.raises(ValueError, match="num_sms = 1000: must be at most the device's"):
        make_carrier(kind, 64, sms=1000)
    carrier = make_carrier(kind, 64)
    gather, scatter = both(carrier)
    for comm, what in ((gather, "gathered parameters"), (scatter, "gradients")):
        with pytest.raises(
            BufferSizeError, match=f"'auto': {what} of 80 bytes .* a slot of 64 bytes: 2 slots need 160"
        ):
            comm.allocate((20,), **options)
    held = [gather.allocate((16,), **options) for _ in range(2)]
    with pytest.raises(BufferSizeError, match=r"all 2 slots are in use, .*: 3 slots need 192 bytes"):
        gather.allocate((16,), **options)
    view = held.pop(0)[3:]
    with pytest.raises(BufferSizeError, match="all 2 slots are in use"):
        gather.allocate((16,), **options)
    with pytest.raises(ValueError, match="a tensor in the window that was not allocated for this call"):
        gather(held[0][2:10], held[0][:4], group)
    gather(held[0], held[0].view(size, -1)[rank].fill_(rank), group)
    with pytest.raises(ValueError, match="a tensor in the window that was not allocated for this call"):
        gather(held[0], held[0].view(size, -1)[rank], group)
    del view
    again = gather.allocate((16,), **options)
    gather(again, again.view(size, -1)[rank].fill_(rank + 1), group)
    assert again.tolist() == [1.0] * 8 + [2.0] * 8
    empty = gather.allocate((0,), **options)
    gather(empty, empty, group)
    assert empty.device.type == device.type
    carrier.close()


def test_slots_are_not_for_more(pool: Callable[[int], Pool]) -> None:
    pool(2).run(no_room, "emulated")


def through_another(rank: int, size: int, kind: str) -> None:
    """One group's memory, gathered within another, whose watch looks late: its slot is free as soon as it is."""
    device, group = device_of(kind), dist.group.WORLD
    home, other = make_carrier(kind, 64), make_carrier(kind, 64)
    gather = PluginAllGather({group: home})
    with mock.patch.object(other._shards._watch, "_collect"):
        for turn in range(5):
            out = gather.allocate((8 * size,), dtype=torch.float32, device=device).view(size, 8)
            own = out[rank].fill_(10 * turn + rank)
            other.all_gather(out, own)()
            assert out[:, 3].tolist() == [10 * turn + r for r in range(size)]
            del out, own
    home.close()
    other.close()


def test_a_slot_is_free_however_late_the_watch_looks(pool: Callable[[int], Pool]) -> None:
    pool(2).run(through_another, "emulated")


def replicated(rank: int, size: int) -> None:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("copies",))
    model = replicate(_model(), mesh=mesh)
    with pytest.raises(ValueError, match=r"the root module is on the mesh .*'copies': 2.*, which only replicates"):
        fsdp.apply(model, CONFIG)


def test_a_mesh_that_only_replicates(pool: Callable[[int], Pool]) -> None:
    pool(2).run(replicated)


def disagree(rank: int, size: int, kind: str, what: str) -> str:
    """A rank whose layer has another size: every rank raises, at the wait."""
    device, carrier = device_of(kind), make_carrier(kind, 1 << 12, seconds=3)
    gather, scatter = both(carrier)
    columns = 4 + rank

    def work() -> None:
        for _ in range(3):
            if what == "gather":
                gather(
                    torch.zeros(columns * size, device=device), torch.zeros(columns, device=device), dist.group.WORLD
                )
            else:
                parts = torch.zeros(columns * size, device=device)
                scatter(torch.zeros(columns, device=device), parts, dist.group.WORLD, dist.ReduceOp.SUM)
            if device.type == "cuda":
                torch.cuda.synchronize()

    with pytest.raises(CommunicationError) as error:
        work()
    return str(error.value)


@pytest.mark.parametrize("kind", [*KINDS, "emulated/1"])
@pytest.mark.parametrize("what", ["gather", "reduce"])
def test_ranks_with_layers_of_another_size(pool: Callable[[int], Pool], kind: str, what: str) -> None:
    messages = pool(2).run(disagree, kind, what, timeout=30)
    shapes = ("[4] float32", "[5] float32") if what == "gather" else ("[2, 4] float32", "[2, 5] float32")
    assert any(f"expected {shapes[0]}" in message and shapes[1] in message for message in messages), messages


def absent(rank: int, size: int, kind: str, how: str, first: str, who: int = 1) -> tuple[str, bool]:
    """Rank `who` is killed or stays away after some steps, or as soon as it has opened a slot; or is killed and rank 2
    gives up before the others; or the second half of the ranks comes when the first has given up. What the others say,
    and if nothing looks like a result."""
    patience = 2 if how == "known" and rank == 2 else 3
    device, carrier = device_of(kind), make_carrier(kind, 1 << 12, seconds=patience)
    gather, scatter = both(carrier)
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    results: list[torch.Tensor] = []

    def gathers() -> None:
        results[:] = [gather.allocate((4 * size,), **options)]
        gather(results[0], results[0].view(size, -1)[rank].fill_(1.0), dist.group.WORLD)

    def reduces() -> None:
        parts = scatter.allocate((4 * size,), **options)
        results[:] = [scatter.allocate((4,), **options)]
        scatter(results[0], parts.fill_(1.0), dist.group.WORLD, dist.ReduceOp.SUM)

    def steps(*works: Callable[[], None]) -> None:
        for work in works:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()

    steps(*[gathers, reduces] * 3)
    dist.barrier()
    if rank == who and how in ("killed", "known"):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == who:
        if how == "opens":
            results[:] = [gather.allocate((4 * size,), **options)]
        time.sleep(16 if how == "after" else 8)
        return "", True
    if how == "after" and rank >= size // 2:
        time.sleep(7)
    begin, last = time.monotonic(), gathers if first == "gather" else reduces
    with pytest.raises(CommunicationError) as error:
        steps(last, carrier.groups, last)  # on a GPU the error is known some time after the first
    assert time.monotonic() - begin < 15
    nothing = bool(results[0].view(-1, 4)[-1].isnan().all())
    with pytest.raises(CommunicationError):  # it stays unusable, at once
        gathers()
    carrier.close()
    return str(error.value), nothing


@pytest.mark.parametrize(
    ("kind", "how", "first", "who"),
    [
        ("emulated", "killed", "gather", 1),
        ("emulated", "late", "reduce", 1),
        ("emulated/1", "killed", "reduce", 1),
        ("emulated/1", "late", "gather", 1),
        ("emulated/2", "killed", "gather", 1),
        ("emulated/2", "known", "gather", 1),  # rank 2 was to pass on to rank 0, and is not the one that is missing
        ("emulated/2", "after", "reduce", 1),  # what a node that has given up sends is no sum
        ("emulated/2", "late", "reduce", 3),  # rank 2 was to send to rank 0 what both have
        ("emulated/2", "opens", "gather", 1),  # and was to pass on what the other node sends
        ("emulated/2", "opens", "gather", 2),
    ],
)
def test_a_rank_that_does_not_come_is_named(kind: str, how: str, first: str, who: int) -> None:
    ranks = 4 if kind == "emulated/2" else 3
    by_nodes = (kind, first) == ("emulated/2", "reduce")
    check_absent(harness.outcomes(ranks, absent, kind, how, first, who, timeout=60), first, who, by_nodes)


def check_absent(results: list[harness.Outcome], first: str, who: int = 1, by_nodes: bool = False) -> None:
    """`by_nodes`: who waits for another node's sum knows whom that lacks from its rank there."""
    for rank in sorted({*range(len(results))} - {who}):
        assert results[rank].error == "", results[rank].error
        message, nothing = results[rank].value
        name = "all-gather" if first == "gather" else "reduce-scatter"
        assert re.match(rf"rank {rank}, waiting for rank \d in {name} #3", message), message
        assert f"{'' if by_nodes else f'rank {rank}, '}waiting for rank {who} in {name} #3" in message
        assert re.search("nothing within [23] s", message), message
        assert nothing
