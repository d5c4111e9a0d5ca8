"""The exchange under Transformer Engine's context parallelism, with a stand-in package that has its seams only."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.buffers import EmulatedBuffer, take_device
from tests.harness import RankError, run

ALL_GATHER = {"context": {"kv_exchange": "all_gather"}, "timeouts": {"host_seconds": 20}}
PLACE = "transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py"
DISTRIBUTED = """
import torch
import torch.distributed as dist

calls = []


def gather_along_first_dim(inp, process_group, async_op=False, quantizer=None):
    calls.append("gather")
    parts = [torch.empty_like(inp) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, inp, group=process_group)
    return torch.cat(parts), None


def reduce_scatter_along_first_dim(inp, tp_group, async_op=False):
    calls.append("reduce-scatter")
    total = inp.clone()
    dist.all_reduce(total, group=tp_group)
    return total.chunk(dist.get_world_size(tp_group))[dist.get_rank(tp_group)], None
"""
CONTEXT_PARALLEL = '''
import torch
import torch.distributed as dist
from transformer_engine.pytorch.distributed import gather_along_first_dim, reduce_scatter_along_first_dim


def attend(q, k, v, rows):
    """Causal attention of the queries at positions `rows` over the whole sequence, all [S, B, A, D]."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    later = torch.arange(k.shape[2]) > rows.unsqueeze(1)
    scores = scores.masked_fill(later.to(scores.device), -torch.inf)
    return (scores.softmax(3) @ v).permute(2, 0, 1, 3)


class AttnFuncWithCPAndKVAllGather(torch.autograd.Function):
    """Causal, chunks r and 2 P - 1 - r on rank r."""

    @staticmethod
    def places(length, group):
        """Positions of the rows as they are gathered, and those of this rank."""
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        chunks = torch.arange(size * length).chunk(2 * size)
        ranks = [torch.cat([chunks[r], chunks[2 * size - 1 - r]]) for r in range(size)]
        return torch.cat(ranks), ranks[rank]

    @staticmethod
    def forward(ctx, q, k, v, cp_group):
        ctx.cp_group = cp_group
        ctx.save_for_backward(q, k, v)
        everywhere, here = AttnFuncWithCPAndKVAllGather.places(len(q), cp_group)
        k_ag, _ = gather_along_first_dim(k, cp_group)
        v_ag, _ = gather_along_first_dim(v, cp_group)
        order = everywhere.argsort()
        return attend(q, k_ag[order], v_ag[order], here)

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        everywhere, here = AttnFuncWithCPAndKVAllGather.places(len(q), ctx.cp_group)
        k_ag, _ = gather_along_first_dim(k, ctx.cp_group)
        v_ag, _ = gather_along_first_dim(v, ctx.cp_group)
        order = everywhere.argsort()
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k_ag, v_ag)]
            out = attend(leaves[0], leaves[1][order], leaves[2][order], here)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        dk, _ = reduce_scatter_along_first_dim(dk, ctx.cp_group)
        dv, _ = reduce_scatter_along_first_dim(dv, ctx.cp_group)
        return dq, dk, dv, None
'''


def write_package(folder: Path, context_parallel: str | None = CONTEXT_PARALLEL, engine: str = "") -> str:
    """A `transformer_engine` in `folder`, which is returned; without its module of context parallelism for None."""
    package = folder / "transformer_engine"
    place = folder / PLACE
    place.parent.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "2.9.0"\n')
    (package / "pytorch" / "__init__.py").write_text(engine)
    (package / "pytorch" / "distributed.py").write_text(DISTRIBUTED)
    if context_parallel is not None:
        place.write_text(context_parallel)
    return str(folder)


def _attend(group: dist.ProcessGroup, size: int, device: torch.device | None = None) -> list[float]:
    """Largest relative differences of output and gradients from those of dense attention, on this rank."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel as te

    from epv2_plugin.megatron.context_parallel import zigzag_split

    gen = torch.Generator().manual_seed(3)
    whole = [torch.randn(16 * size, 2, 3, width, generator=gen, dtype=torch.float64) for width in (8, 8, 4, 4)]
    dense = [t.clone().requires_grad_() for t in whole[:3]]
    query, key, value = (t.permute(1, 2, 0, 3) for t in dense)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).permute(2, 0, 1, 3)
    out.backward(whole[3])
    expected = [zigzag_split(t, 0, dist.get_rank(group), size) for t in (out, *(t.grad for t in dense))]
    *inputs, weight = (zigzag_split(t, 0, dist.get_rank(group), size) for t in whole)
    # As TE has them at times: not dense.
    inputs = [t.to(device).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in inputs]
    found = te.AttnFuncWithCPAndKVAllGather.apply(*inputs, group)
    found.backward(weight.to(device))
    results = [t.cpu() for t in (found, *(t.grad for t in inputs))]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, expected, strict=True)]


def _module() -> Any:
    return sys.modules[PLACE.removesuffix(".py").replace("/", ".")]


def exchange(rank: int, size: int, folder: str, kind: str) -> None:
    device = take_device() if kind == "cuda" else None
    # Before the stand-in is there, which has little of what Megatron imports from TE.
    import megatron.core.models.gpt  # noqa: F401
    from megatron.core import parallel_state

    import epv2_plugin
    from epv2_plugin.megatron import context_parallel

    sys.path.insert(0, folder)
    if kind == "emulated":
        vars(context_parallel)["ElasticBuffer"] = EmulatedBuffer
    epv2_plugin.enable(ALL_GATHER)
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    from transformer_engine.pytorch import distributed

    names = [f"{_module().__name__}.{name}_along_first_dim" for name in ("gather", "reduce_scatter")]
    assert [name for name in epv2_plugin.status()["replaced"] if name.startswith("transformer_engine")] == names
    group = parallel_state.get_context_parallel_group()
    assert max(_attend(group, size, device)) < 1e-12
    assert distributed.calls == []
    found = next(g for g in epv2_plugin.status()["groups"] if g["primitive"] == "context")
    assert found["backend"] == ("host" if kind == "host" else "cuda")
    rows, others = 16 * 2 * 3, size - 1
    assert found["sent_bytes"] >= others * 3 * rows * (8 + 4) * 8  # forward, backward, gradients: keys and values
    with pytest.raises(NotImplementedError, match=r"gather_along_first_dim with \['async_op'\]"):
        _module().gather_along_first_dim(torch.ones(2), group, async_op=True)
    if kind != "cuda":  # the stand-in's own exchange is gloo's
        stranger = dist.new_group(list(range(size)))
        assert max(_attend(stranger, size)) < 1e-12
        assert distributed.calls == ["gather"] * 4 + ["reduce-scatter"] * 2
    epv2_plugin.disable()
    assert _module().gather_along_first_dim is distributed.gather_along_first_dim
    assert _module().reduce_scatter_along_first_dim is distributed.reduce_scatter_along_first_dim


@pytest.mark.parametrize(
    ("size", "kind"), [(2, "host"), (4, "host"), (2, "emulated"), pytest.param(2, "cuda", marks=pytest.mark.gpu)]
)
def test_attention_is_that_of_the_whole_sequence(tmp_path: Path, size: int, kind: str) -> None:
    run(size, exchange, write_package(tmp_path), kind)


def disagree(rank: int, size: int, folder: str) -> None:
    sys.path.insert(0, folder)
    from megatron.core import parallel_state

    import epv2_plugin
    from epv2_plugin.config import ConfigError
    from epv2_plugin.elastic.errors import CommunicationError

    epv2_plugin.enable({**ALL_GATHER, "parallel": {"context": 4}})
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    group = parallel_state.get_context_parallel_group()
    with pytest.raises(ConfigError, match=r"parallel\.context = 4: Megatron was started with 2"):
        _module().gather_along_first_dim(torch.ones(2), group)
    epv2_plugin.disable()
    epv2_plugin.enable(ALL_GATHER)
    _module().gather_along_first_dim(torch.ones(4), group)
    with pytest.raises(CommunicationError, match=r"all_gather .* float32 as on this rank"):
        _module().gather_along_first_dim(torch.ones(2 + rank), group)


def test_ranks_that_disagree_raise(tmp_path: Path) -> None:
    run(2, disagree, write_package(tmp_path))


def enable_alone(rank: int, size: int, folder: str, config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Symbols of TE that `enable` replaced, and what it logged."""
    sys.path.insert(0, folder)
    import epv2_plugin

    lines: list[str] = []
    logging.getLogger("epv2_plugin").setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("epv2_plugin").addHandler(handler)
    epv2_plugin.enable(config)
    return [name for name in epv2_plugin.status()["replaced"] if "transformer_engine" in name], lines


def test_it_is_asked_for_by_name(tmp_path: Path) -> None:
    folder = write_package(tmp_path)
    for config in ({}, {"context": {"kv_exchange": "stock"}}, {**ALL_GATHER, "parallel": {"context": 1}}):
        replaced, lines = run(1, enable_alone, folder, config)[0]
        assert replaced == []
        assert any("keeps its own exchange" in line for line in lines) == ("parallel" not in config)
    assert len(run(1, enable_alone, folder, ALL_GATHER)[0][0]) == 2


def test_another_transformer_engine_is_refused(tmp_path: Path) -> None:
    one_function = "from transformer_engine.pytorch.distributed import gather_along_first_dim"
    for name, text, missing in (("module", None, "parallel:"), ("function", one_function, "reduce_scatter_along")):
        folder = write_package(tmp_path / name, text)
        with pytest.raises(RankError, match=rf"ConfigError: .*kv_exchange.*Engine 2\.9\.0 has no .*{missing}"):
            run(1, enable_alone, folder, ALL_GATHER)


def test_one_that_cannot_be_imported_is_named_and_left_alone(tmp_path: Path) -> None:
    folder = write_package(tmp_path, engine="raise ImportError('no libcudart')")
    replaced, lines = run(1, enable_alone, folder, ALL_GATHER)[0]
    assert replaced == []
    assert any("can't be imported: no libcudart" in line for line in lines)
