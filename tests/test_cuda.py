"""The cuda backend on a real device: the host backend's cases, graphs, long runs, dead peers, the sanitizer.

Ranks share the GPUs there are, so one is enough; then NCCL_MULTI_RANK_GPU_ENABLE=1 must be set.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from epv2_plugin import CommunicationError, ElasticBuffer
from epv2_plugin.elastic.quant import per_token_cast_to_fp8
from tests import harness, test_cuda_emulated, test_elastic
from tests.harness import Pool
from tests.oracle import Case, expected, inputs

pytestmark = pytest.mark.gpu

BYTES = 64 << 20
SMS = 8
_buffers: dict[tuple[int, bool], ElasticBuffer] = {}


def cuda_buffer(rank: int, seconds: float = 30, **options: Any) -> ElasticBuffer:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return ElasticBuffer(
        dist.group.WORLD, num_cpu_timeout_secs=60, num_gpu_timeout_secs=seconds, backend="cuda", **options
    )


def round_trip(rank: int, size: int, case: Case) -> dict[str, Any]:
    """`test_elastic.round_trip` on the device, with a budget that the case draws."""
    key = (size, case.multiple_reduction)
    if key not in _buffers:
        _buffers[key] = cuda_buffer(rank, num_bytes=BYTES, allow_multiple_reduction=case.multiple_reduction)
    made = _buffers[key]
    made.get_theoretical_num_sms = lambda *_, **__: 1 + case.seed % SMS
    return test_elastic.round_trip(rank, size, case, made)


def compare(pool: Callable[[int], Pool], case: Case) -> None:
    case = case.for_cuda()
    test_elastic.check(case, pool(case.ranks).run(round_trip, case, timeout=120), leftovers_are_zero=False)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_shape(pool: Callable[[int], Pool], ranks: int) -> None:
    @settings(max_examples=40, phases=[Phase.explicit, Phase.generate])  # shrinking would outlast the machine's lease
    @given(st.composite(test_elastic.layouts)(ranks))
    def draw(case: Case) -> None:
        compare(pool, case)

    draw()


@pytest.mark.parametrize("name", test_elastic.EDGE_CASES)
def test_edge_case(pool: Callable[[int], Pool], name: str) -> None:
    compare(pool, test_elastic.EDGE_CASES[name])


@pytest.mark.parametrize("name", test_cuda_emulated.LARGE_CASES)
def test_large_case(pool: Callable[[int], Pool], name: str) -> None:
    compare(pool, test_cuda_emulated.LARGE_CASES[name])


def cast_on_the_way(rank: int, size: int, dtype: torch.dtype) -> None:
    made = cuda_buffer(rank, num_bytes=BYTES, num_max_tokens_per_rank=512)
    everyone = []
    for source in range(size):
        gen = torch.Generator().manual_seed(source)
        x = (torch.randn(512, 7168, generator=gen) * torch.rand(512, 1, generator=gen) * 100).to(dtype)
        x[3] = 0
        everyone.append(x)
    idx = torch.full((512, 1), (rank + 1) % size, device=made.device)
    (rows, scales), *_ = made.dispatch(everyone[rank].cuda(), idx, num_experts=size, use_fp8=True)
    want_rows, want_scales = per_token_cast_to_fp8(everyone[(rank - 1) % size])
    assert torch.equal(rows.cpu().view(torch.uint8), want_rows.view(torch.uint8))
    assert torch.equal(scales.cpu(), want_scales)
    on_device = per_token_cast_to_fp8(everyone[(rank - 1) % size].to(made.device))
    assert torch.equal(on_device[0].cpu().view(torch.uint8), want_rows.view(torch.uint8))
    assert torch.equal(on_device[1].cpu(), want_scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_on_the_way_has_the_host_casts_bits(pool: Callable[[int], Pool], dtype: torch.dtype) -> None:
    pool(4).run(cast_on_the_way, dtype, timeout=120)


class Exact:
    """Inputs drawn on the device whose sums are exact in bf16, and what dispatch and combine must make of them."""

    def __init__(self, size: int, tokens: int, hidden: int, experts: int, topk: int, seed: int):
        self.size, self.experts, self.local_experts = size, experts, experts // size
        self.x, self.idx = [], []
        for source in range(size):
            gen = torch.Generator(device="cuda").manual_seed(seed * size + source)
            values = torch.randint(-4, 5, (tokens, hidden), generator=gen, device="cuda")
            self.x.append(values.to(torch.bfloat16))
            idx = torch.rand(tokens, experts, generator=gen, device="cuda").argsort(1)[:, :topk]
            self.idx.append(idx.masked_fill(torch.rand(tokens, topk, generator=gen, device="cuda") < 0.1, -1))

    def received(self, rank: int) -> torch.Tensor:
        """Rows in expert order."""
        x = torch.cat(self.x)
        local = torch.cat(self.idx) - rank * self.local_experts
        flat = local.flatten()
        here = (flat >= 0) & (flat < self.local_experts)
        order = flat.masked_fill(~here, self.local_experts).argsort(stable=True)[: int(here.sum())]
        return x[order.div(local.shape[1], rounding_mode="floor")]

    def combined(self, rank: int) -> torch.Tensor:
        """The tokens of `rank`, times their experts: what comes back if experts change nothing."""
        return self.x[rank] * (self.idx[rank] >= 0).sum(1, keepdim=True)


def long_run(rank: int, size: int, iterations: int, **options: Any) -> None:
    """Random routings, one after the other, in every mode that keeps rows as they are."""
    made = cuda_buffer(rank, **{"num_bytes": BYTES, **options})
    for i in range(iterations):
        data = Exact(size, 1 + 97 * i % 211, 256, 8 * size, 1 + i % 8, i)
        rows, _, _, handle, event = made.dispatch(
            data.x[rank],
            data.idx[rank],
            num_experts=data.experts,
            num_max_tokens_per_rank=256,
            do_expand=True,
            num_sms=1 + i % SMS,
            async_with_compute_stream=bool(i % 2),
        )
        event.current_stream_wait()
        assert torch.equal(rows, data.received(rank)), i
        if i % 3 == 0:
            rows = made.get_combine_buffer(handle, 256).copy_(rows)
        combined, _, event = made.combine(rows, handle, async_with_compute_stream=bool(i % 2), num_sms=1 + i % SMS)
        event.current_stream_wait()
        assert torch.equal(combined, data.combined(rank)), i


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_thousand_routings(ranks: int) -> None:
    harness.run(ranks, long_run, 1000, timeout=400)


def replayed(rank: int, size: int, replays: int, **options: Any) -> None:
    """Dispatch and combine in a CUDA graph; new tokens and routings at every replay."""
    tokens, hidden, topk = 192, 512, 4
    made = cuda_buffer(rank, num_max_tokens_per_rank=tokens, hidden=hidden, num_topk=topk, **options)
    first = Exact(size, tokens, hidden, 8 * size, topk, 0)
    x, idx = first.x[rank].clone(), first.idx[rank].clone()

    def step() -> tuple[torch.Tensor, torch.Tensor, Any]:
        rows, _, _, handle, _ = made.dispatch(
            x, idx, num_experts=8 * size, do_cpu_sync=False, do_expand=True, do_handle_copy=False, num_sms=4
        )
        combined, _, _ = made.combine(rows, handle, num_sms=4)
        return rows, combined, handle

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, combined, handle = step()
    for i in range(1, replays + 1):
        data = Exact(size, tokens, hidden, 8 * size, topk, i)
        x.copy_(data.x[rank])
        idx.copy_(data.idx[rank])
        rows.fill_(float("nan"))
        graph.replay()
        want = data.received(rank)
        assert torch.equal(rows[: want.shape[0]], want), i
        assert torch.equal(combined, data.combined(rank)), i
    assert handle.psum_num_recv_tokens_per_expert[-1] == want.shape[0]
    step()  # and without the graph again
    torch.cuda.synchronize()


@pytest.mark.parametrize("ranks", [2, 4])
def test_graph_replays(ranks: int) -> None:
    harness.run(ranks, replayed, 100, timeout=200)


def profiled(rank: int, size: int, num_sms: int) -> list[tuple[str, int]]:
    """Every kernel of a dispatch and a combine, and how many blocks it has."""
    made = cuda_buffer(rank, num_bytes=BYTES)
    data = Exact(size, 256, 256, 8 * size, 4, 1)

    def step() -> None:
        rows, _, _, handle, _ = made.dispatch(
            data.x[rank], data.idx[rank], num_experts=8 * size, num_max_tokens_per_rank=256, do_expand=True,
            do_handle_copy=False, num_sms=num_sms
        )  # fmt: skip
        made.combine(rows, handle, num_sms=num_sms)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    path = f"/tmp/epv2-profile-{os.getpid()}.json"
    profile.export_chrome_trace(path)
    import json

    with open(path) as file:
        events = json.load(file)["traceEvents"]
    os.unlink(path)
    return [(e["name"], e["args"]["grid"][0]) for e in events if e.get("cat") == "kernel"]


@pytest.mark.parametrize("num_sms", [4, 8])
def test_no_kernel_exceeds_the_budget(num_sms: int) -> None:
    for launches in harness.run(2, profiled, num_sms, timeout=120):
        ours = [name for name, _ in launches if name.startswith("epv2_")]
        assert ours == [
            "epv2_dispatch_stage",
            "epv2_dispatch_route",
            "epv2_dispatch_pull",
            "epv2_combine_stage",
            "epv2_combine_pull",
        ]
        assert all(ctas <= num_sms for _, ctas in launches), launches


def missing(rank: int, size: int, how: str, **options: Any) -> str:
    """What the others say when rank 1 is killed, or does something else than to call."""
    made = cuda_buffer(rank, seconds=4, **{"num_bytes": BYTES, **options})
    data = Exact(size, 64, 256, 8 * size, 2, 1)
    routing: dict[str, Any] = {"num_experts": 8 * size, "num_max_tokens_per_rank": 64, "num_sms": 4}
    made.dispatch(data.x[rank], data.idx[rank], **routing)
    made.barrier(with_cpu_sync=True)
    if rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        time.sleep(15)  # with the memory that peers look at still there
        return "never called"
    begin = time.monotonic()
    try:
        made.dispatch(data.x[rank], data.idx[rank], **routing)
        made.barrier(with_cpu_sync=True)
    except CommunicationError as error:
        assert time.monotonic() - begin < 14
        return str(error)
    return "no error"


@pytest.mark.parametrize("how", ["never calls", "killed"])
def test_missing_peer(how: str) -> None:
    results = harness.outcomes(3, missing, how, timeout=90)
    for rank in (0, 2):
        assert results[rank].error == "", results[rank].error
        assert f"rank {rank}, waiting for rank" in results[rank].value


def small(rank: int, size: int) -> None:
    """What the sanitizer watches: every kernel once, on little data."""
    made = cuda_buffer(rank, seconds=100, num_bytes=4 << 20)
    for case in (
        Case((5, 3), hidden=32, topk=3, dtype="bf16", alignment=4, zero_padding=True),
        Case((4, 37), hidden=48, topk=2, dtype="fp32", expand=False),
        Case((4, 5), hidden=400, topk=2, scales="fp32", dtype="bf16", col_major=True),
    ):
        case = case.for_cuda()
        mine, want = inputs(case, rank).to(made.device), expected(case, rank)
        x = mine.x if mine.scales is None else (mine.x, mine.scales)
        rows, _, weights, handle, _ = made.dispatch(
            x, mine.topk_idx, mine.topk_weights, num_experts=case.experts, num_max_tokens_per_rank=case.max_tokens,
            do_expand=case.expand, do_zero_padding=case.zero_padding, expert_alignment=case.alignment,
            use_tma_aligned_col_major_sf=case.col_major, num_sms=2
        )  # fmt: skip
        assert handle.num_unaligned_recv_tokens_per_expert.tolist() == want["per_expert"]
        if mine.scales is None:
            made.combine(rows, handle, topk_weights=weights, num_sms=2)
            out = made.get_combine_buffer(handle, case.hidden, rows.dtype) if case.expand else rows
            made.combine(out.copy_(rows), handle, num_sms=2)
    made.barrier(with_cpu_sync=True)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer here")
    # The MPS daemon and the sanitizer do not go together; without it, the ranks take turns.
    env = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_MPS")}
    call = "from tests import harness, test_cuda; harness.run(2, test_cuda.small, timeout=400)"
    command = [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # NCCL asks the driver for what it may not have, and copes
    command += [sys.executable, "-c"]
    done = subprocess.run([*command, call], env=env, capture_output=True, text=True, timeout=450)
    found = "\n".join(line for line in done.stdout.splitlines() if "Host Frame" not in line)
    assert done.returncode == 0, found[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout
