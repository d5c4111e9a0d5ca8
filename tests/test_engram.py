"""Engram on real processes against a dense table in one process: fetched bits, gradients, training, checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from epv2_plugin import BufferSizeError, CommunicationError, CommunicationTimeout, ElasticBuffer, cli
from epv2_plugin.elastic import engram as autograd
from epv2_plugin.elastic.quant import per_token_cast_back, per_token_cast_to_fp8
from epv2_plugin.engram import (
    NgramHash,
    RowwiseAdagrad,
    ShardedNgramMemory,
    SparseAdam,
    reshard_memory,
    reshard_optimizer,
)
from tests import harness
from tests.buffers import make_buffer, settle
from tests.harness import Pool

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8 ue8m0": torch.float8_e4m3fn,
}
_buffers: dict[str, ElasticBuffer] = {}


def engram_buffer(kind: str, seconds: float = 20) -> ElasticBuffer:
    """A buffer for a table of the backend `kind`, whose waits for peers end after `seconds`.

    "emulated pinned", "cuda pinned": the table in CPU memory.
    """
    if kind == "host":
        return make_buffer(kind, num_cpu_timeout_secs=seconds)
    kind, _, pinned = kind.partition(" ")
    sizes = {"num_bytes": 34 << 20, "num_cpu_bytes": 32 << 20} if pinned else {"num_bytes": None}
    return make_buffer(kind, **sizes, num_cpu_timeout_secs=60, num_gpu_timeout_secs=seconds)


def shared_buffer(kind: str) -> ElasticBuffer:
    """This rank's buffer, kept between cases so that one case can trip over what the last one left."""
    if kind not in _buffers:
        _buffers[kind] = engram_buffer(kind)
    return _buffers[kind]


@dataclass(frozen=True)
class Case:
    """One table and a few batches of every rank: `tokens[batch][rank]` x `entries` indices."""

    ranks: int
    rows: int
    hidden: int
    dtype: str
    scale_columns: int
    tokens: tuple[tuple[int, ...], ...]
    entries: int  # 0 = indices are 1-D
    spread: float  # share of the table that indices come from: small = many duplicates
    masked: float
    int32: bool
    col_major: bool
    replicated_sf: bool
    inference: bool
    seed: int

    def shard(self, rank: int, version: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values and scales of a rank's rows."""
        gen = torch.Generator().manual_seed(1000 * self.seed + 10 * rank + version)
        values = torch.randn(self.rows, self.hidden, generator=gen).to(DTYPES[self.dtype])
        if not self.dtype.startswith("fp8"):
            return values, None
        scales = torch.rand(self.rows, self.scale_columns, generator=gen)
        return values, scales if self.dtype == "fp8" else scales.view(torch.int32)

    def indices(self, rank: int, batch: int) -> torch.Tensor:
        gen = torch.Generator().manual_seed(7000 * self.seed + 10 * rank + batch)
        tokens = self.tokens[batch][rank]
        shape = (tokens, self.entries) if self.entries else (tokens,)
        high = max(1, int(self.ranks * self.rows * self.spread))
        index = self.ranks * self.rows - 1 - torch.randint(high, shape, generator=gen)
        index[torch.rand(shape, generator=gen) < self.masked] = -1
        return index.to(torch.int32) if self.int32 else index

    def gradients(self, rank: int, batch: int) -> torch.Tensor:
        gen = torch.Generator().manual_seed(9000 * self.seed + 10 * rank + batch)
        grads = torch.randn(self.indices(rank, batch).numel(), self.hidden, generator=gen)
        return grads if self.dtype.startswith("fp8") else grads.to(DTYPES[self.dtype])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(torch.uint8)


def exchange(rank: int, size: int, case: Case, kind: str, num_sms: int = 0) -> dict[str, Any]:
    """Every batch fetched, all in flight at once, with an update between two of them; then their gradients."""
    buffer = shared_buffer(kind)
    at = buffer.device
    storage, scales = (None if part is None else part.to(at) for part in case.shard(rank))
    if scales is not None and case.replicated_sf:
        scales = torch.cat([case.shard(r)[1] for r in range(size)]).to(at)
    changed = torch.arange(rank % 2, case.rows, 3, device=at).flip(0).repeat_interleave(2)[::2]  # strided
    new, new_scales = (None if part is None else part.to(at) for part in case.shard(rank, version=1))
    last = len(case.tokens) - 1
    with torch.inference_mode(case.inference):
        buffer.engram_write(storage, scales, num_sms=num_sms)
        hooks, sent, plain = [], [], []
        for batch in range(len(case.tokens)):
            if batch == last:
                buffer.engram_update(changed, new[changed], None if new_scales is None else new_scales[changed])
            index = case.indices(rank, batch).to(at)
            hooks.append(buffer.engram_fetch(index, use_tma_aligned_col_major_sf=case.col_major))
            index.fill_(0)  # the call has what it needs
        order = list(range(len(hooks)))
        fetched: dict[int, Any] = {}
        for batch in order[rank % len(order) :] + order[: rank % len(order)]:
            fetched[batch] = hooks[batch]()
            assert hooks[batch]() == fetched[batch]
        settle(buffer)
        hooks[-1]()  # counts what a GPU has pulled by now
        before = buffer.traffic.sent_bytes, buffer.traffic.undeduplicated_bytes
        hook = buffer.engram_fetch(case.indices(rank, 0).to(at))
        settle(buffer, hook)
        hook()
        sent.append(buffer.traffic.sent_bytes - before[0])
        plain.append(buffer.traffic.undeduplicated_bytes - before[1])
        pending = []
        for batch in range(len(case.tokens)):
            grads = case.gradients(rank, batch).to(at)
            pending.append(buffer.engram_reduce(case.indices(rank, batch).to(at), grads))
            grads.zero_()
        reduced = [hook() for hook in reversed(pending)][::-1]
        again = buffer.engram_reduce(case.indices(rank, 0).to(at), case.gradients(rank, 0).to(at))()
        assert all(torch.equal(a, b) for a, b in zip(again, reduced[0], strict=True))
        return {
            "data": [bits(fetched[batch][0]) for batch in order],
            "sf": [None if fetched[b][1] is None else bits(fetched[b][1]) for b in order],
            "strides": [None if fetched[b][1] is None else fetched[b][1].stride() for b in order],
            "shapes": [fetched[batch][0].shape for batch in order],
            "storage": bits(buffer.engram_storage[0]),
            "reduced": [(rows.cpu(), sums.cpu()) for rows, sums in reduced],
            "sent": sent[0],
            "plain": plain[0],
        }


def rows_wanted(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rows = bits(table)[index.flatten().long().clamp(min=0)]
    rows[index.flatten() < 0] = 0
    return rows


def check(case: Case, results: list[dict[str, Any]], kind: str) -> None:
    ranks, last = range(case.ranks), len(case.tokens) - 1
    shards = [case.shard(r) for r in ranks]
    tables = [torch.cat([values for values, _ in shards])]
    factors = [None if shards[0][1] is None else torch.cat([scales for _, scales in shards])]
    changed = [torch.arange(r % 2, case.rows, 3) for r in ranks]
    updated = [[part.clone() for part in case.shard(r) if part is not None] for r in ranks]
    for r in ranks:
        for part, new in zip(updated[r], case.shard(r, version=1), strict=False):
            part.view(torch.uint8)[changed[r]] = new.view(torch.uint8)[changed[r]]
    tables.append(torch.cat([parts[0] for parts in updated]))
    factors.append(None if factors[0] is None else torch.cat([parts[1] for parts in updated]))
    for rank, got in enumerate(results):
        for batch in range(last + 1):
            index, version = case.indices(rank, batch), int(batch == last)
            assert got["shapes"][batch] == (index.numel(), case.hidden)
            assert torch.equal(got["data"][batch], rows_wanted(tables[version], index)), (rank, batch)
            scales = factors[version]
            if scales is None:
                assert got["sf"][batch] is None
            else:
                want = rows_wanted(scales, index).view(index.shape[0], max(case.entries, 1) * scales.shape[1] * 4)
                assert torch.equal(got["sf"][batch], want)
                if case.col_major and index.numel():
                    assert got["strides"][batch] == (1, -(-index.shape[0] // 4) * 4)
        assert torch.equal(got["storage"], bits(updated[rank][0]))
        for batch in range(last + 1):
            total = torch.zeros(case.ranks * case.rows, case.hidden)
            touched: set[int] = set()
            for source in ranks:  # one after the other, as documented: position by position, then rank by rank
                part = torch.zeros_like(total)
                grads, index = case.gradients(source, batch).float(), case.indices(source, batch).flatten().tolist()
                for position, row in enumerate(index):
                    if row >= 0:
                        part[row] += grads[position]
                touched.update(row for row in index if row >= 0)
                total += part
            rows, sums = got["reduced"][batch]
            want_rows = sorted(row - rank * case.rows for row in touched if row // case.rows == rank)
            assert rows.tolist() == want_rows
            assert torch.equal(sums, total[rank * case.rows :][want_rows])
        sent, plain = traffic(case, rank) if kind == "host" else traffic_pulled(case, rank)
        assert (got["sent"], got["plain"]) == (sent, plain)


def row_bytes(case: Case) -> int:
    stride = -(-case.hidden * DTYPES[case.dtype].itemsize // 16) * 16
    return stride + (-(-4 * case.scale_columns // 16) * 16 if case.dtype.startswith("fp8") else 0)


def remote_rows(case: Case, rank: int, owner: int) -> torch.Tensor:
    """The rows of `owner` that `rank` asks for in the first batch, duplicates included."""
    index = case.indices(rank, 0).flatten().long()
    return index[index.div(case.rows, rounding_mode="floor") == owner]


def traffic(case: Case, rank: int) -> tuple[int, int]:
    """What the host sends in a fetch: questions, and answers to the others'; bytes, and with duplicates."""
    others = [r for r in range(case.ranks) if r != rank]
    questions = sum(16 + 4 * remote_rows(case, rank, r).unique().numel() for r in others)
    answers = sum(remote_rows(case, r, rank).unique().numel() for r in others)
    return questions + row_bytes(case) * answers, row_bytes(case) * sum(len(remote_rows(case, r, rank)) for r in others)


def traffic_pulled(case: Case, rank: int) -> tuple[int, int]:
    """What a GPU pulls in a fetch."""
    wanted = [remote_rows(case, rank, r) for r in range(case.ranks) if r != rank]
    return row_bytes(case) * sum(w.unique().numel() for w in wanted), row_bytes(case) * sum(map(len, wanted))


def cases(draw: Callable, ranks: int) -> Case:
    batches = draw(st.integers(1, 3))
    return Case(
        ranks=ranks,
        rows=draw(st.sampled_from([1, 2, 7, 40])),
        hidden=draw(st.sampled_from([1, 3, 8, 36])),
        dtype=draw(st.sampled_from(list(DTYPES))),
        scale_columns=draw(st.integers(1, 3)),
        tokens=tuple(tuple(draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))) for _ in range(batches)),
        entries=draw(st.integers(0, 4)),
        spread=draw(st.sampled_from([0.05, 0.5, 1.0])),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        int32=draw(st.booleans()),
        col_major=draw(st.booleans()),
        replicated_sf=draw(st.booleans()),
        inference=draw(st.integers(0, 3)) == 0,
        seed=draw(st.integers(0, 2**20)),
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_table(pool: Callable[[int], Pool], ranks: int) -> None:
    @settings(max_examples=15, phases=[Phase.generate])
    @given(st.composite(cases)(ranks))
    def compare(case: Case) -> None:
        check(case, pool(ranks).run(exchange, case, "host"), "host")

    compare()


# ---- life and errors ------------------------------------------------------------------------------------------------


def _engram_threads() -> int:
    return sum(thread.name == "epv2-engram" for thread in threading.enumerate())


def answers_while_computing(rank: int, size: int) -> tuple[int, int]:
    """Rank 1 does not call its hook before the others have their rows. One hook is never called."""
    buffer = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=20)
    buffer.engram_write(torch.full((4, 8), float(rank)))
    hook = buffer.engram_fetch(torch.arange(4 * size))
    buffer.engram_fetch(torch.arange(2))
    x, idx = torch.ones(2, 16), torch.tensor([[0], [size - 1]])
    *_, event = buffer.dispatch(x, idx, num_experts=size, async_with_compute_stream=True)
    if rank == 1:
        dist.barrier()
    data, _ = hook()
    if rank != 1:
        dist.barrier()
    event.current_stream_wait()
    assert torch.equal(data, torch.arange(size).repeat_interleave(4).float().unsqueeze(1).expand(-1, 8))
    threads = _engram_threads()
    buffer.destroy()
    return threads, _engram_threads()


def test_owners_answer_while_they_compute(pool: Callable[[int], Pool]) -> None:
    results = pool(3).run(answers_while_computing)
    assert all(threads - left == 1 for threads, left in results)


def bad_input(rank: int, size: int) -> int:
    """Everything below is refused before anything is sent, so that the good calls at the end still work."""
    gpu, cpu = ElasticBuffer.get_engram_storage_size_hint(10, 32, 6, torch.float8_e4m3fn)
    assert (gpu, cpu) == (2 << 20, 2 << 20)
    assert ElasticBuffer.get_engram_storage_size_hint(1 << 20, 128, 1 << 16) == (16 << 20, 256 << 20)
    assert ElasticBuffer.get_engram_storage_size_hint(1 << 20, 128, 1, torch.float8_e4m3fn)[1] == 144 << 20
    buffer = ElasticBuffer(dist.group.WORLD, gpu + cpu, cpu, num_cpu_timeout_secs=10)
    empty = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=10)
    fp8, ones = torch.zeros(5, 32).to(torch.float8_e4m3fn), torch.ones(5, 1)
    three = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=10)
    three.engram_write(fp8, torch.ones(5, 3))
    table = torch.randn(5, 32)
    buffer.engram_write(table)
    index, wide = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(4, 40000)
    low, high = index.clone(), index.clone()
    low[2, 1], high[1, 0] = -2, 5 * size
    rows, weight = torch.tensor([4, 0]), torch.zeros(5, 32, requires_grad=True)
    many = torch.arange(5 * size).repeat(100)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (RuntimeError, "engram_fetch before engram_write", lambda: empty.engram_fetch(index)),
        (RuntimeError, "engram_reduce before engram_write", lambda: empty.engram_reduce(index, table)),
        (RuntimeError, "engram_update before engram_write", lambda: empty.engram_update(rows, table[:2])),
        (RuntimeError, "engram_storage before engram_write", lambda: empty.engram_storage),
        (TypeError, "storage is torch.float64", lambda: buffer.engram_write(table.double())),
        (TypeError, "storage must be a tensor", lambda: buffer.engram_write([table])),
        (ValueError, "storage has shape \\[160\\]", lambda: buffer.engram_write(table.flatten())),
        (ValueError, "storage has shape \\[0, 32\\]", lambda: buffer.engram_write(table[:0])),
        (ValueError, "on meta", lambda: buffer.engram_write(table.to("meta"))),
        (ValueError, "sf is not given, storage is torch.float8_e4m3fn", lambda: buffer.engram_write(fp8)),
        (ValueError, "sf is given, storage is torch.float32", lambda: buffer.engram_write(table, ones)),
        (TypeError, "sf is torch.float64", lambda: buffer.engram_write(fp8, ones.double())),
        (ValueError, "sf has shape \\[4, 1\\]: must be \\[5, any\\]", lambda: buffer.engram_write(fp8, ones[:4])),
        (ValueError, "sf has shape \\[5, 0\\]", lambda: buffer.engram_write(fp8, ones[:, :0])),
        (BufferSizeError, "storage needs 16000000 bytes", lambda: buffer.engram_write(torch.zeros(100, 40000))),
        (TypeError, "indices is torch.float32", lambda: buffer.engram_fetch(index.float())),
        (TypeError, "indices must be a tensor", lambda: buffer.engram_fetch([1])),
        (ValueError, "indices has shape \\[3, 2, 1\\]", lambda: buffer.engram_fetch(index.unsqueeze(2))),
        (ValueError, "indices\\[2, 1\\] = -2: must be -1", lambda: buffer.engram_fetch(low)),
        (
            ValueError,
            f"indices\\[1, 0\\] = {5 * size}: must be -1 \\(zeros\\) or a row of the table, 0..{5 * size - 1}",
            lambda: buffer.engram_fetch(high),
        ),
        (
            ValueError,
            "indices\\[3\\] = 10",
            lambda: buffer.engram_reduce(high.flatten()[:3].new_tensor([0, 1, 2, 10]), table),
        ),
        (
            ValueError,
            "gradients has shape \\[5, 32\\]: must be \\[6, 32\\]",
            lambda: buffer.engram_reduce(index, table),
        ),
        (TypeError, "gradients is torch.int64", lambda: buffer.engram_reduce(index, index)),
        (TypeError, "storage is torch.bfloat16", lambda: buffer.engram_update(rows, table[:2].bfloat16())),
        (ValueError, "storage has shape", lambda: buffer.engram_update(rows, table[:3])),
        (
            ValueError,
            "rows\\[0\\] = 5: must be a row of this rank, 0..4",
            lambda: buffer.engram_update(rows + 1, table[:2]),
        ),
        (ValueError, "row 4 more than once", lambda: buffer.engram_update(rows[[0, 0]], table[:2])),
        (ValueError, "sf has shape", lambda: three.engram_update(rows, fp8[:2], ones[:2])),
        (ValueError, "weight is torch.float32 \\[4, 32\\]", lambda: autograd.fetch(buffer, weight[:4], index)),
        (ValueError, "3 scales a row: 1, one per", lambda: autograd.fetch(three, weight, index)),
        (ValueError, "num_cpu_bytes = 9", lambda: ElasticBuffer(dist.group.WORLD, 8, 9)),
        (ValueError, "row_dim = 0", lambda: ShardedNgramMemory(buffer, NgramHash([9, 9]), 0)),
        (ValueError, "combine = 'mean'", lambda: ShardedNgramMemory(buffer, NgramHash([9, 9]), 4, combine="mean")),
        (ValueError, "dtype = torch.int8", lambda: ShardedNgramMemory(buffer, NgramHash([9, 9]), 4, dtype=torch.int8)),
        (ValueError, "init_std = -1", lambda: ShardedNgramMemory(buffer, NgramHash([9, 9]), 4, init_std=-1)),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match):
            call()
    # Within the limits: duplicates need no room. Then a row of nearly half of what there is for rows.
    assert torch.equal(buffer.engram_fetch(many)()[0][: 5 * size][5 * rank :][:5], table)
    buffer.engram_write(wide)
    buffer.engram_write(torch.zeros(7, 40000))
    with pytest.raises(BufferSizeError, match="14 distinct rows: they need 2240000 bytes, the buffer has 2097152"):
        buffer.engram_fetch(torch.arange(14))
    with pytest.raises(TypeError, match="memories must be"):
        SparseAdam([torch.nn.Linear(2, 2)])
    memory = ShardedNgramMemory(buffer, NgramHash([3, 3]), 4)
    with pytest.raises(ValueError, match="betas = \\(1, 0\\)"):
        SparseAdam(memory, betas=(1, 0))
    with pytest.raises(ValueError, match="lr = -1"):
        RowwiseAdagrad(memory, lr=-1)
    memory.weight.grad = torch.zeros_like(memory.weight)
    with pytest.raises(ValueError, match="dense"):
        RowwiseAdagrad(memory).step()
    for each in (buffer, empty, three):
        each.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        buffer.engram_fetch(index)
    return len(cases)


def test_bad_input_is_refused_before_anything_is_sent(pool: Callable[[int], Pool]) -> None:
    assert pool(2).run(bad_input)[0] > 30


def disagree(rank: int, size: int, what: str, kind: str) -> str:
    buffer = engram_buffer(kind, seconds=2)
    table = torch.zeros(4 + rank * (what == "number of rows"), 8 + rank * (what == "hidden size"))
    table = table.bfloat16() if what == "dtype" and rank else table
    scales = None
    if what == "scales per row":
        table, scales = per_token_cast_to_fp8(table)
        scales = scales.view(torch.int32) if rank else scales
    table, scales = table.to(buffer.device), None if scales is None else scales.to(buffer.device)
    try:
        buffer.engram_write(table, scales)
        if what == "operation" and rank:
            buffer.engram_update(torch.arange(0, device=buffer.device), table[:0])
        settle(buffer, buffer.engram_fetch(torch.arange(3, device=buffer.device)))
        settle(buffer, buffer.engram_fetch(torch.arange(3, device=buffer.device)))
    except CommunicationError as error:
        with pytest.raises(CommunicationError):
            buffer.barrier()
        return str(error)
    return ""


DISAGREEMENTS = ["number of rows", "hidden size", "dtype", "scales per row", "operation"]


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree(pool: Callable[[int], Pool], what: str) -> None:
    check_disagreement(pool(2).run(disagree, what, "host", timeout=30), what)


def check_disagreement(messages: list[str], what: str) -> None:
    assert all(messages)
    if what != "operation":
        expected = {"number of rows": "4", "hidden size": "8", "dtype": "torch.float32", "scales per row": "1"}[what]
        assert any(f"expected {what} {expected} as on this rank, seen {what}" in message for message in messages)


def dies(rank: int, size: int, kind: str, seconds: float) -> str:
    buffer = engram_buffer(kind, seconds)
    table, index = torch.zeros(4, 8, device=buffer.device), torch.arange(4 * size, device=buffer.device)
    buffer.engram_write(table)
    buffer.engram_fetch(index)()
    buffer.barrier()
    settle(buffer)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    hook = None
    try:
        hook = buffer.engram_fetch(index)
        settle(buffer, hook)
    except CommunicationError as error:
        assert time.monotonic() - begin < 15
        if hook is not None:
            with pytest.raises(CommunicationError):
                hook()
        with pytest.raises(CommunicationError):
            buffer.engram_write(table)
        buffer.destroy()
        assert time.monotonic() - begin < 15
        return str(error)
    return "no error"


def test_killed_peer() -> None:
    check_killed(harness.outcomes(3, dies, "host", 20, timeout=60))


def check_killed(results: list[harness.Outcome]) -> None:
    for rank in (0, 1):
        assert results[rank].error == "", results[rank].error
        assert f"rank {rank}, waiting for rank" in results[rank].value
        assert "engram_fetch" in results[rank].value
    assert results[2].error_type == "Killed"


def never_calls(rank: int, size: int, kind: str) -> tuple[str, str]:
    buffer = engram_buffer(kind, seconds=2)
    buffer.engram_write(torch.zeros(4, 8, device=buffer.device))
    settle(buffer)
    if rank == 1:
        time.sleep(4)
    begin = time.monotonic()
    try:
        settle(buffer, buffer.engram_fetch(torch.arange(4 * size, device=buffer.device)))
    except CommunicationError as error:
        assert time.monotonic() - begin < 6
        return type(error).__name__, str(error)
    return "", ""


def test_absent_peer_times_out_on_every_rank() -> None:
    results = harness.run(3, never_calls, "host", timeout=60)
    assert all(kind for kind, _ in results)
    assert CommunicationTimeout.__name__ in {results[0][0], results[2][0]}
    assert any("rank 1 in engram_fetch #3, header: expected 16 bytes, seen nothing" in text for _, text in results)


# ---- hash -----------------------------------------------------------------------------------------------------------


def test_hash_against_plain_loops() -> None:
    token_map = torch.arange(50) // 2
    hashing = NgramHash([90, 90, 7], orders=(1, 2, 4), heads=3, pad_id=3, token_map=token_map, seed=5)
    assert hashing.sizes == [97, 101, 103, 107, 109, 113, 7, 11, 13]
    assert hashing.num_rows == sum(hashing.sizes)
    tokens = torch.randint(50, (2, 9), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    rows = hashing(tokens)
    assert rows.shape == (2, 9, hashing.num_tables)
    multipliers = hashing.multipliers.tolist()
    for sequence in range(2):
        for position in range(9):
            want, offset = [], 0
            for order in (1, 2, 4):
                mix = 0
                for back in range(order):
                    token = int(tokens[sequence, position - back]) if position >= back else 3
                    mix ^= (token // 2 * multipliers[back]) % 2**64
                mix -= 2**64 if mix >= 2**63 else 0
                for size in hashing.sizes[len(want) : len(want) + 3]:
                    want.append(mix % size + offset)
                    offset += size
            assert rows[sequence, position].tolist() == want
    for cut in (0, 1, 5, 9):
        later = hashing(tokens[:, cut:], history=tokens[:, :cut])
        assert torch.equal(later, rows[:, cut:])
    assert torch.equal(hashing(tokens[:, 7:], history=tokens[:, 4:7]), rows[:, 7:])
    assert not torch.equal(NgramHash([90], orders=(2,), seed=1)(tokens), NgramHash([90], orders=(2,), seed=2)(tokens))
    for match, call in {
        "orders = \\[3, 2\\]": lambda: NgramHash([9, 9], orders=(3, 2)),
        "table_sizes = \\[9\\]": lambda: NgramHash([9]),
        "heads = 0": lambda: NgramHash([9, 9], heads=0),
        "token_map is torch.float32": lambda: NgramHash([9, 9], token_map=torch.ones(3)),
        "tokens has id 50: token_map has ids 0..49": lambda: hashing(tokens * 0 + 50),
        "tokens has shape \\[2\\]": lambda: hashing(tokens[:, 0]),
        "history has shape \\[1, 9\\]": lambda: hashing(tokens, tokens[:1]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="tokens is torch\\.float32"):
        hashing(tokens.float())


# ---- training -------------------------------------------------------------------------------------------------------

VOCABULARY, LENGTH, BATCH, DIM = 6, 6, 8, 4


def hashing() -> NgramHash:
    return NgramHash([90, 50], orders=(2, 3), heads=2, pad_id=0)


def batch(step: int, rank: int, size: int) -> torch.Tensor:
    """This rank's part of the sequences of a step; with three ranks, one gets none."""
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
    if size == 3:
        return tokens[: BATCH // 2] if rank == 0 else tokens[BATCH // 2 :] if rank == 2 else tokens[:0]
    return tokens.view(size, BATCH // size, LENGTH)[rank]


def loss_of(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A task that the memory can learn: each trigram's rows should add up to a value of its own."""
    before = torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
    goal = torch.sin(tokens * 3.0 + before * 5.0)
    return (rows.float().sum(2) - goal).square().sum() / (BATCH * LENGTH)


def make_optimizer(kind: str, memory: ShardedNgramMemory) -> torch.optim.Optimizer:
    return SparseAdam(memory, lr=0.05, betas=(0.9, 0.99)) if kind == "adam" else RowwiseAdagrad(memory, lr=0.3)


def train(
    rank: int,
    size: int,
    kind: str,
    dtype: str,
    steps: tuple[int, int],
    combine: str = "concat",
    states: tuple[list[dict], list[dict]] | None = None,
    backend: str = "host",
) -> dict[str, Any]:
    """Train from step to step, in two micro-batches each; returns losses and this rank's checkpoint."""
    buffer = engram_buffer(backend)
    memory = ShardedNgramMemory(
        buffer, hashing(), DIM, dtype=DTYPES[dtype], combine=combine, output_dtype=torch.float32, init_std=0.1
    )
    memory.to(buffer.device).bfloat16()  # as a model around it may be cast: the table is not
    optimizer = make_optimizer(kind, memory)
    if states is not None:
        memory.load_state_dict(reshard_memory(states[0], rank, size))
        optimizer.load_state_dict(reshard_optimizer(states[1], rank, size))
    untouched = memory.weight.detach().clone()
    losses, seen = [], set()
    for step in range(*steps):
        tokens = batch(step, rank, size).to(buffer.device)
        seen |= set(memory.hashing(batch(step, 0, 1).to(buffer.device)).flatten().tolist())
        halves = [tokens[0::2], tokens[1::2]]
        hooks = [memory.prefetch(half) for half in halves]
        parts = [loss_of(hook(), half) for hook, half in zip(hooks, halves, strict=True)]
        torch.stack(parts).sum().backward()
        total = torch.stack(parts).sum().detach().cpu()
        dist.all_reduce(total)
        losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.tensor([r - memory.first_row for r in range(memory.num_rows) if r not in seen], dtype=torch.int64)
    rows = rows[(rows >= 0) & (rows < len(untouched))]
    rows = rows.to(buffer.device)
    assert torch.equal(memory.weight[rows], untouched[rows])
    result = {
        "losses": losses,
        "memory": {k: v.clone().cpu() if isinstance(v, torch.Tensor) else v for k, v in memory.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "served": buffer.engram_storage[0].clone().cpu(),
    }
    buffer.destroy()
    return result


def table_of(results: list[dict[str, Any]], key: str = "weight") -> torch.Tensor:
    return torch.cat([result["memory"][key] for result in results])[: hashing().num_rows].detach()


def dense_training(kind: str, steps: int) -> tuple[list[float], torch.Tensor]:
    """The same on a table in one piece, by torch's own embedding and, for Adam, optimizer."""
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(4096, DIM, generator=generator) * 0.1)[: hashing().num_rows].clone().requires_grad_()
    adam = torch.optim.SparseAdam([table], lr=0.05, betas=(0.9, 0.99))
    sums, losses = torch.zeros(len(table)), []
    for step in range(steps):
        tokens = batch(step, 0, 1)
        rows = torch.nn.functional.embedding(hashing()(tokens), table, sparse=True)
        loss = loss_of(rows.flatten(2), tokens)
        losses.append(float(loss.detach()))
        loss.backward()
        assert table.grad is not None
        if kind == "adam":
            adam.step()
        else:
            grad = table.grad.coalesce()
            with torch.no_grad():
                for row, value in zip(grad.indices()[0].tolist(), grad.values(), strict=True):
                    sums[row] += value.square().mean()
                    table[row] -= 0.3 * value / (sums[row].sqrt() + 1e-10)
        table.grad = None
    return losses, table.detach()


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
def test_training_is_the_same_on_any_number_of_ranks(pool: Callable[[int], Pool], kind: str) -> None:
    want, table = dense_training(kind, 60)
    assert want[-1] < want[0] / 10
    for ranks in (1, 2, 3, 4):
        results = pool(ranks).run(train, kind, "fp32", (0, 60))
        for result in results:
            torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(want), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(table_of(results), table, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (4, 1)])
def test_checkpoint_for_another_number_of_ranks(
    pool: Callable[[int], Pool], kind: str, before: int, after: int
) -> None:
    whole = pool(before).run(train, kind, "fp32", (0, 12))
    first = pool(before).run(train, kind, "fp32", (0, 7))
    assert table_of(first).ne(table_of(whole)).any()
    states = [[result[what] for result in reversed(first)] for what in ("memory", "optimizer")]
    second = pool(after).run(train, kind, "fp32", (7, 12), "concat", tuple(states))
    torch.testing.assert_close(table_of(second), table_of(whole), rtol=1e-5, atol=1e-6)
    if (before, after) == (3, 2):
        same = pool(before).run(train, kind, "fp32", (7, 12), "concat", tuple(states))
        assert torch.equal(table_of(same), table_of(whole))  # and bit by bit on as many
        rows = hashing().num_rows
        with pytest.raises(ValueError, match=f"row {-(-rows // 3)} of {rows} is in none of the 2 states"):
            reshard_memory([first[0]["memory"], first[2]["memory"]], 0, 1)
        with pytest.raises(ValueError, match="rank = 3"):
            reshard_memory(states[0], 3, 3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("combine", ["concat", "sum"])
def test_training_of_rounded_rows(pool: Callable[[int], Pool], dtype: str, combine: str) -> None:
    results = pool(2).run(train, "adam", dtype, (0, 60), combine)
    again = pool(2).run(train, "adam", dtype, (0, 60), combine)
    assert results[0]["losses"] == again[0]["losses"]  # deterministic
    assert torch.equal(table_of(results), table_of(again))
    assert results[0]["losses"][-1] < results[0]["losses"][0] / 8
    for result in results:
        weight, served = result["memory"]["weight"], result["served"]
        want = per_token_cast_to_fp8(weight)[0] if dtype == "fp8" else weight.to(DTYPES[dtype])
        assert torch.equal(bits(served), bits(want))


def wrong_checkpoints(rank: int, size: int) -> None:
    buffer = ElasticBuffer(dist.group.WORLD, num_cpu_timeout_secs=5)
    memory = ShardedNgramMemory(buffer, hashing(), DIM)
    optimizer = RowwiseAdagrad(memory)
    optimizer.step()
    state, moments = memory.state_dict(), optimizer.state_dict()
    state["_extra_state"] = {**state["_extra_state"], "first_row": 5}
    with pytest.raises(ValueError, match="begins with row 5, this rank with"):
        memory.load_state_dict(state)
    state["_extra_state"] = {**memory.get_extra_state(), "hashing": NgramHash([90, 50], heads=2, seed=9).describe()}
    with pytest.raises(ValueError, match="rows are hashed by"):
        memory.load_state_dict(state)
    moments["state"][0] = {**moments["state"][0], "first_row": 7}
    with pytest.raises(ValueError, match="state begins with row 7"):
        optimizer.load_state_dict(moments)
    buffer.destroy()


def test_checkpoint_of_other_rows_is_refused(pool: Callable[[int], Pool]) -> None:
    pool(2).run(wrong_checkpoints)


def gradients(rank: int, size: int, dtype: str, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    buffer = engram_buffer(kind)
    shard = torch.randn(9, 128, generator=torch.Generator().manual_seed(rank)).to(buffer.device)
    scaled = per_token_cast_to_fp8(shard) if dtype == "fp8" else (shard.to(DTYPES[dtype]), None)
    buffer.engram_write(*scaled)
    weight = shard.clone().requires_grad_()
    index = torch.randint(-1, 9 * size, (5 + rank, 3), generator=torch.Generator().manual_seed(50 + rank))
    for _ in range(2):  # gradients of two micro-batches add up
        rows = autograd.fetch(buffer, weight, index.to(buffer.device), gradient_scale=0.5)()
        (rows.float() * torch.arange(128, device=buffer.device)).square().mean(1).sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_sparse
    dense = per_token_cast_back(*scaled, torch.bfloat16) if scaled[1] is not None else scaled[0]
    result = index, dense.cpu(), weight.grad.to_dense().cpu()
    buffer.destroy()
    return result


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_gradient_against_a_dense_table(pool: Callable[[int], Pool], dtype: str) -> None:
    check_gradients(pool(3).run(gradients, dtype, "host"))


def check_gradients(results: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    leaves = torch.cat([dense for _, dense, _ in results]).requires_grad_()
    table, total = torch.cat([leaves, leaves.new_zeros(1, 128)]), torch.zeros(27, 128)
    for index, _, _ in results:
        rows = table.index_select(0, index.flatten().remainder(28))  # -1 is the row of zeros
        rows.retain_grad()
        (rows.float() * torch.arange(128)).square().mean(1).sum().backward(retain_graph=True)
        assert rows.grad is not None
        valid = index.flatten() >= 0
        total.index_add_(0, index.flatten()[valid], rows.grad.float()[valid])
    torch.testing.assert_close(torch.cat([grad for *_, grad in results]), total, rtol=1e-6, atol=1e-6)


def test_bench_of_more_rows_than_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "engram", "--rows", str(10**14)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"epv2 bench engram: --rows = {10**14}: 4 ranks need ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_bench(tmp_path: Path, dtype: str) -> None:
    words = f"--ranks 2 --rows 50 --hidden 20 --tokens 6 --entries 3 --iters 2 --dtype {dtype}".split()
    words += ["--memory", "cpu" if dtype == "fp8" else "gpu", "--json"]
    command = [sys.executable, "-m", "epv2_plugin.cli", "bench", "engram", *words, str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Mrows/s" in done.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(times) for name, times in document["samples_us"].items()} == {
        "fetch": 2,
        "reduce": 2,
        "gather": 2,
    }
    assert document["row_bytes"]["fetch"] == (40 if dtype == "bf16" else 24)
