"""`epv2 bench cp` on a rank: all-gathers, ours and torch's; causal attention over gathered parts against attention
after a whole gather; and the memory of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.bench import report, rounds
from epv2_plugin.bench.ep import join
from epv2_plugin.elastic import ElasticBuffer

LAYERS = 4  # of a model, in one measurement of attention: the host is ahead of the GPU, as in training
TOLERANCE = 3e-2  # of bf16 outputs and gradients, relative to the largest


@dataclass(frozen=True)
class Setup:
    """What is measured: `tokens` of all ranks together, `heads` query heads, `groups` key/value heads of `width`."""

    ranks: int
    tokens: int
    heads: int
    groups: int
    width: int
    iterations: int
    backend: str


def run(setup: Setup, command: str, json_file: Path | None) -> int:
    """Measure as one rank; rank 0 prints the report and writes the JSON. Returns the exit code, 1 = a wrong result."""
    device = join(setup.backend)
    all_rounds, bench = rounds.Rounds(device), _Bench(setup, device)
    if (apart := bench.difference()) > TOLERANCE:
        print(f"epv2 bench cp: WRONG RESULT: rank {bench.rank} is {apart:.2g} off", file=sys.stderr)
        return 1  # without leaving in order: the others are waiting for this rank
    document = rounds.document("bench cp", command, device, asdict(setup))
    document["gather_bytes"] = bench.key.nbytes
    document["gather_us"] = all_rounds.measure(bench.gathers(), setup.iterations)
    document["layers"] = LAYERS
    document["attention_us"] = all_rounds.measure(bench.attentions(LAYERS), setup.iterations, divisor=LAYERS)
    document["peak_bytes"] = all_rounds.gather(bench.peaks()) if device.type == "cuda" else None
    bench.buffer.destroy()
    return all_rounds.finish(document, report.cp_text, json_file)


class _Bench:
    def __init__(self, setup: Setup, device: torch.device):
        self.setup, self.device = setup, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        assert dist.group.WORLD is not None
        self.buffer = ElasticBuffer(dist.group.WORLD, backend=setup.backend)  # type: ignore[arg-type]
        gen = torch.Generator(device=device).manual_seed(self.rank)
        rows = setup.tokens // self.size
        shapes = [(rows, 1, heads, setup.width) for heads in (setup.heads, setup.groups, setup.groups, setup.heads)]
        self.query, self.key, self.value, self.grad = (
            torch.randn(shape, generator=gen, device=device, dtype=torch.float32).to(torch.bfloat16) for shape in shapes
        )
        self._room = torch.empty(self.size * rows, 1, setup.groups, setup.width, dtype=torch.bfloat16, device=device)

    def gathers(self) -> dict[str, Callable[[], object]]:
        """All-gathers of the keys."""
        from epv2_plugin.megatron.context_parallel import allow_session

        num_bytes = ElasticBuffer.get_agrs_num_max_session_bytes(self.buffer.group, self.key.shape, self.key.dtype)
        allow_session(self.buffer, num_bytes, 1)

        def ours() -> None:
            with self.buffer.agrs_new_session():
                _, wait = self.buffer.all_gather(self.key)
                wait()

        return {"epv2": ours, "torch": lambda: dist.all_gather_into_tensor(self._room, self.key)}

    def _ours(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        from epv2_plugin.megatron.context_parallel import causal_attention

        return causal_attention(query, key, value, self.buffer)

    def _gather_first(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _GatherFirst.apply(query, key, value)

    def _both_ways(self, attention: Callable[..., torch.Tensor], layers: int = 1) -> list[torch.Tensor]:
        """Forward of so many layers, each of the same inputs, and backward; output and gradients of the first."""
        inputs = [[t.detach().requires_grad_() for t in (self.query, self.key, self.value)] for _ in range(layers)]
        outs = [attention(*each) for each in inputs]
        for out in reversed(outs):
            out.backward(self.grad)
        return [outs[0].detach(), *(t.grad for t in inputs[0] if t.grad is not None)]

    def difference(self) -> float:
        """The largest between both ways, of output and gradients, relative to the largest value."""
        pairs = zip(self._both_ways(self._ours), self._both_ways(self._gather_first), strict=True)
        return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)

    def attentions(self, layers: int = 1) -> dict[str, Callable[[], object]]:
        """Forward and backward."""
        return {
            "epv2": lambda: self._both_ways(self._ours, layers),
            "gather, then attend": lambda: self._both_ways(self._gather_first, layers),
        }

    def peaks(self) -> dict[str, int]:
        """Bytes that torch's allocator holds at most, above what is there before; the session's window beside them."""
        from epv2_plugin.megatron.context_parallel import session_bytes_of

        found = {}
        for name, work in self.attentions().items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            found[name] = torch.cuda.max_memory_allocated() - before
        found["epv2"] += session_bytes_of(self.buffer)
        return found


class _GatherFirst(torch.autograd.Function):
    """Keys and values `[S, B, G, D]` gathered by torch, put in the order of the sequence, then flash attention of both
    chunks of this rank's queries over what each sees; gradients summed by torch's reduce-scatter. No overlap.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        from epv2_plugin.megatron.block_attention import Block, Merge, attend

        rank, size, half = dist.get_rank(), dist.get_world_size(), query.shape[0] // 2
        keys, values = _in_order(_gather(key)), _in_order(_gather(value))
        block, own = Block(query.shape[3] ** -0.5), Block(query.shape[3] ** -0.5, causal=True)
        merged = Merge(query, value.shape[3], whole=True)
        for index, chunk in enumerate((rank, 2 * size - 1 - rank)):
            rows, here = slice(index * half, (index + 1) * half), slice(chunk * half, (chunk + 1) * half)
            q = _heads(query[rows])
            merged.add(rows, *attend(q, _heads(keys[here]), _heads(values[here]), own), first=True)
            if chunk:
                merged.add(rows, *attend(q, _heads(keys[: here.start]), _heads(values[: here.start]), block))
        output = merged.output()
        ctx.save_for_backward(query, key, value, output, merged.lse)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        from epv2_plugin.megatron.block_attention import Block, attend_backward

        query, key, value, output, lse = ctx.saved_tensors
        rank, size, half = dist.get_rank(), dist.get_world_size(), query.shape[0] // 2
        keys, values = _in_order(_gather(key)), _in_order(_gather(value))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        block, own = Block(query.shape[3] ** -0.5), Block(query.shape[3] ** -0.5, causal=True)
        dquery = torch.empty_like(query, dtype=torch.float32)
        for index, chunk in enumerate((rank, 2 * size - 1 - rank)):
            rows = slice(index * half, (index + 1) * half)
            merged = _heads(output[rows]), lse[:, :, rows]
            for seen, how in ((slice(chunk * half, (chunk + 1) * half), own), (slice(0, chunk * half), block)):
                if seen.stop > seen.start:
                    tensors = _heads(grad[rows]), _heads(query[rows]), _heads(keys[seen]), _heads(values[seen])
                    dq, dk, dv = attend_backward(*tensors, *merged, how)
                    if how is own:
                        _heads(dquery[rows]).copy_(dq)
                    else:
                        _heads(dquery[rows]).add_(dq)
                    dkeys[seen] += dk.permute(2, 0, 1, 3)
                    dvalues[seen] += dv.permute(2, 0, 1, 3)
        found = [_scatter(_by_rank(t)) for t in (dkeys, dvalues)]
        return dquery.to(query.dtype), *found


def _heads(tensor_SBAX: torch.Tensor) -> torch.Tensor:
    return tensor_SBAX.permute(1, 2, 0, 3)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    room = tensor.new_empty(dist.get_world_size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(room, tensor)
    return room


def _scatter(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of this rank's part; gloo has no reduce-scatter of bf16."""
    size = dist.get_world_size()
    if tensor.device.type == "cuda":
        part = tensor.new_empty(tensor.shape[0] // size, *tensor.shape[1:])
        dist.reduce_scatter_tensor(part, tensor)
        return part
    total = tensor.float()
    dist.all_reduce(total)
    return total.chunk(size)[dist.get_rank()].to(tensor.dtype)


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """Chunks in the order of ranks, two each -> in the order of the sequence."""
    chunks, size = tensor.chunk(2 * dist.get_world_size()), dist.get_world_size()
    return torch.cat([chunks[2 * c if c < size else 2 * (2 * size - 1 - c) + 1] for c in range(2 * size)])


def _by_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The reverse of `_in_order`."""
    chunks, size = tensor.chunk(2 * dist.get_world_size()), dist.get_world_size()
    return torch.cat([chunks[c] for rank in range(size) for c in (rank, 2 * size - 1 - rank)])
