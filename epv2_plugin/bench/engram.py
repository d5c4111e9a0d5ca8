"""`epv2 bench engram` on a rank: rows fetched from all ranks, gradients sent back, and a local gather beside them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.bench import report
from epv2_plugin.bench.ep import join
from epv2_plugin.bench.timing import Stopwatch
from epv2_plugin.elastic import ElasticBuffer
from epv2_plugin.elastic.quant import per_token_cast_to_fp8

_LOCAL_BYTES = 1 << 30  # most that the table of the local gather takes


@dataclass(frozen=True)
class Setup:
    """What is measured: `ranks` x `rows` of `hidden` values; each rank fetches `tokens` x `entries` of them."""

    ranks: int
    rows: int
    hidden: int
    tokens: int
    entries: int
    dtype: str
    iterations: int
    backend: str = "host"


def table_bytes(rows: int, hidden: int) -> int:
    """Least bytes that a rank needs at once to make its part of the table: row numbers and values before the cast."""
    return rows * (8 + 4 * hidden)


def run(setup: Setup, command: str, json_file: Path | None) -> int:
    """Measure as one rank; rank 0 prints the report and writes the JSON. Returns the exit code, 1 = a wrong row."""
    device = join(setup.backend)
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    buffer = ElasticBuffer(dist.group.WORLD, backend="host")
    # Every value of a row is its number modulo 16, exact in any of the dtypes.
    numbers = torch.arange(rank * setup.rows, (rank + 1) * setup.rows) % 16
    values = numbers.float().unsqueeze(1).expand(-1, setup.hidden).contiguous()
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    storage, scales = per_token_cast_to_fp8(values) if setup.dtype == "fp8" else (values.to(dtypes[setup.dtype]), None)
    buffer.engram_write(storage, scales)
    row_bytes = storage[0].nbytes + (0 if scales is None else scales[0].nbytes)
    width = row_bytes + -row_bytes % 8
    local = torch.zeros(min(setup.ranks * setup.rows, _LOCAL_BYTES // width), width // 8, dtype=torch.int64)
    watch, generator = Stopwatch(device), torch.Generator().manual_seed(rank)
    samples: dict[str, list[float]] = {"fetch": [], "reduce": [], "gather": []}
    gradients = torch.ones(setup.tokens * setup.entries, setup.hidden, dtype=torch.bfloat16)
    for repetition in range(setup.iterations + 1):
        index = torch.randint(setup.ranks * setup.rows, (setup.tokens, setup.entries), generator=generator)
        near = index.flatten() % local.shape[0]
        laps = []
        for work in (
            lambda index=index: buffer.engram_fetch(index)(),
            lambda index=index: buffer.engram_reduce(index, gradients)(),
            lambda near=near: local.index_select(0, near),
        ):
            dist.barrier()
            watch.mark()
            result: Any = work()
            watch.mark()
            laps.append((watch.laps()[0], result))
        data, factors = laps[0][1]
        got = data[:, 0].float() * (1 if factors is None else factors.view(data.shape[0], -1)[:, 0])
        if (got - index.flatten() % 16).abs().max() > 0.5:
            print(f"epv2 bench engram: WRONG RESULT: rank {rank} got other rows than it asked for", file=sys.stderr)
            return 1  # without leaving in order: the others are waiting for this rank
        if repetition:  # the first makes what is made once
            for name, (time, _) in zip(samples, laps, strict=True):
                samples[name].append(time)
    every: list[Any] = [None] * setup.ranks
    dist.all_gather_object(every, samples)
    buffer.destroy()
    if rank == 0:
        document = {
            "schema": report.SCHEMA,
            "kind": "bench engram",
            **report.circumstances(command, device),
            "setup": asdict(setup),
            "row_bytes": {"fetch": row_bytes, "reduce": 4 * setup.hidden, "gather": row_bytes},
            "samples_us": {
                name: [list(ranks) for ranks in zip(*(e[name] for e in every), strict=True)] for name in samples
            },
        }
        print(report.engram_text(document), flush=True)
        if json_file is not None:
            json_file.write_text(json.dumps(document) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    return 0
