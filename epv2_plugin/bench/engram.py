"""`epv2 bench engram` on a rank: rows fetched from all ranks, gradients sent back, and a local gather beside them."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from epv2_plugin.bench import report, rounds
from epv2_plugin.bench.ep import join
from epv2_plugin.elastic import ElasticBuffer
from epv2_plugin.elastic.quant import per_token_cast_to_fp8

_LOCAL_BYTES = 1 << 30  # most that the table of the local gather takes
_SLEEP_CYCLES = 2_000_000  # about a millisecond


@dataclass(frozen=True)
class Setup:
    """What is measured: `ranks` x `rows` of `hidden` values; each rank fetches `tokens` x `entries` of them.

    `sms`: most that a kernel of ours holds on a GPU. `memory`: "gpu" or "cpu", where the cuda backend has the table.
    """

    ranks: int
    rows: int
    hidden: int
    tokens: int
    entries: int
    dtype: str
    iterations: int
    backend: str
    sms: int
    memory: str


def table_bytes(rows: int, hidden: int) -> int:
    """Least bytes that a rank needs at once to make its part of the table: row numbers and values before the cast."""
    return rows * (8 + 4 * hidden)


def run(setup: Setup, command: str, json_file: Path | None) -> int:
    """Measure as one rank; rank 0 prints the report and writes the JSON. Returns the exit code, 1 = a wrong row."""
    device = join(setup.backend)
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}[setup.dtype]
    sizes: dict[str, int] = {}
    if setup.memory == "cpu":
        most = setup.tokens * setup.entries
        gpu, cpu = ElasticBuffer.get_engram_storage_size_hint(setup.rows, setup.hidden, most, dtype)
        sizes = {"num_bytes": gpu + cpu, "num_cpu_bytes": cpu}
    buffer = ElasticBuffer(dist.group.WORLD, backend=setup.backend, **sizes)  # type: ignore[arg-type]
    # Every value of a row is its number modulo 16, exact in any of the dtypes.
    numbers = torch.arange(rank * setup.rows, (rank + 1) * setup.rows, device=device) % 16
    values = numbers.float().unsqueeze(1).expand(-1, setup.hidden).contiguous()
    storage, scales = per_token_cast_to_fp8(values) if setup.dtype == "fp8" else (values.to(dtype), None)
    buffer.engram_write(storage, scales, num_sms=setup.sms)
    row_bytes = storage[0].nbytes + (0 if scales is None else scales[0].nbytes)
    width = row_bytes + -row_bytes % 8
    local_rows = min(setup.ranks * setup.rows, _LOCAL_BYTES // width)
    local = torch.zeros(local_rows, width // 8, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(rank)
    gradients = torch.ones(setup.tokens * setup.entries, setup.hidden, dtype=torch.bfloat16, device=device)
    all_rounds = rounds.Rounds(device)

    def together() -> None:
        """On a GPU: begin when every rank's is here, and only after the host has launched what is measured."""
        if device.type == "cuda":
            torch.cuda._sleep(_SLEEP_CYCLES)
            buffer.barrier()

    fetched: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def fetch(index: torch.Tensor) -> None:
        fetched.append(buffer.engram_fetch(index)())

    def reduce(index: torch.Tensor) -> None:
        buffer.engram_reduce(index, gradients)()

    samples: dict[str, list[float]] = {"fetch": [], "reduce": [], "gather": []}
    for repetition in range(setup.iterations + 1):
        index = torch.randint(setup.ranks * setup.rows, (setup.tokens, setup.entries), generator=generator).to(device)
        near = index.flatten() % local_rows
        times = {
            "fetch": all_rounds.time(functools.partial(fetch, index), together),
            "reduce": all_rounds.time(functools.partial(reduce, index)),
            "gather": all_rounds.time(functools.partial(local.index_select, 0, near), together),
        }
        data, factors = fetched.pop()
        got = data[:, 0].float() * (1 if factors is None else factors.view(data.shape[0], -1)[:, 0])
        if (got - index.flatten() % 16).abs().max() > 0.5:
            print(f"epv2 bench engram: WRONG RESULT: rank {rank} got other rows than it asked for", file=sys.stderr)
            return 1  # without leaving in order: the others are waiting for this rank
        if repetition:  # the first makes what is made once
            for name, time in times.items():
                samples[name].append(time)
    every = all_rounds.gather(samples)
    buffer.destroy()
    document = rounds.document("bench engram", command, device, asdict(setup))
    document["row_bytes"] = {"fetch": row_bytes, "reduce": 4 * setup.hidden, "gather": row_bytes}
    document["samples_us"] = {
        name: [list(ranks) for ranks in zip(*(each[name] for each in every), strict=True)] for name in samples
    }
    return all_rounds.finish(document, report.engram_text, json_file)
