"""`epv2 bench`: inputs, paths and their checks, reports, and the commands from end to end on the host backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epv2_plugin import cli
from epv2_plugin.bench import ep, paths, report, sm
from epv2_plugin.bench.paths import Received, Setup, WrongResult, make_batch
from epv2_plugin.bench.timing import Launch, Stopwatch, launches_of
from epv2_plugin.elastic import ElasticBuffer, model
from epv2_plugin.jit.kernels import SM_COPY, args_type
from tests.buffers import emulated_buffer
from tests.emulator.runtime import EmulatedRuntime

CPU = torch.device("cpu")
SMALL = Setup(
    ranks=2,
    tokens=40,
    hidden=160,
    topk=3,
    experts=12,
    dtype="bf16",
    layout="expanded",
    routing="uniform",
    zero_copy=False,
    unsummed=False,
    cast_before=False,
    iterations=2,
    backend="host",
    sms=(0,),
)


# ---- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7, 50, 4096])
def test_skewed_routing_sends_a_fifth_of_the_tokens_to_one_expert(tokens):
    setup = replace(SMALL, tokens=tokens, routing="skewed", hidden=16)
    idx_TK = make_batch(setup, 0, 0, CPU).topk_idx_TK
    assert int((idx_TK == 0).any(1).sum()) == round(0.2 * tokens)
    counts = torch.bincount(idx_TK.flatten(), minlength=setup.experts)[1:]
    if tokens == 4096:
        assert counts.min() > 0.9 * counts.float().mean()  # the rest is spread evenly


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_batches_are_fresh_and_repeatable(routing):
    setup = replace(SMALL, routing=routing)
    batch, same = make_batch(setup, 1, 3, CPU), make_batch(setup, 1, 3, CPU)
    assert torch.equal(batch.x_TH, same.x_TH)
    assert torch.equal(batch.topk_idx_TK, same.topk_idx_TK)
    for other in (make_batch(setup, 0, 3, CPU), make_batch(setup, 1, 4, CPU)):
        assert not torch.equal(batch.x_TH, other.x_TH)
        assert not torch.equal(batch.topk_idx_TK, other.topk_idx_TK)
    ordered = batch.topk_idx_TK.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert (batch.topk_idx_TK.min(), batch.topk_idx_TK.max()) >= (0, 0)
    assert batch.topk_idx_TK.max() < setup.experts


def test_counted_rows_are_those_that_the_model_expects():
    setup = replace(SMALL, tokens=20000, hidden=1, ranks=4, topk=4, experts=16)
    held = [paths.pairs_by_rows(setup, make_batch(setup, r, 0, CPU).topk_idx_TK) for r in range(setup.ranks)]
    rows, expected = ep.measured_rows(torch.stack(held), 1), model.expected_rows(setup.shape)
    for name in ("held", "held_remote", "owned", "owned_remote"):
        assert getattr(rows, name) == pytest.approx(getattr(expected, name), rel=0.05, abs=40)
    assert rows.tokens == setup.tokens
    assert sum(j * n for j, n in enumerate(rows.owned, 1)) == setup.tokens * setup.topk


# ---- paths ----------------------------------------------------------------------------------------------------------


def both_paths(rank: int, size: int, setup: Setup) -> list[tuple[Any, ...]]:
    """What the plugin and the stock path return for the same batch, each checked against the reference."""
    assert dist.group.WORLD is not None
    if setup.backend == "cuda":
        buffer = emulated_buffer(
            **ep.buffer_options(setup, whole_rows=setup.zero_copy or setup.unsummed),
            allow_multiple_reduction=not setup.unsummed,
        )
    else:
        buffer = ElasticBuffer(dist.group.WORLD, backend="host")
    found = []
    batches = [make_batch(setup, r, 0, CPU) for r in range(size)]
    ours = paths.ElasticPath("epv2", buffer, setup, zero_copy=setup.zero_copy, cast_before=setup.cast_before)
    for path in (ours, paths.StockPath(dist.group.WORLD, setup)):
        path.dispatch(batches[rank], max(setup.sms))
        received = path.to_experts()
        paths.check_received(path, received, batches, setup, rank)
        path.from_experts(path.place(paths.expert_output(received, rank * setup.local_experts)))
        combined = path.combine(max(setup.sms))
        paths.check_combined(path, combined, batches[rank], rank)
        rows = received.data.float() if received.scales is None else None
        found.append((rows, received.weights, received.counts, combined.float()))
    buffer.destroy()
    return found


@pytest.mark.parametrize("layout", ["expanded", "compact"])
@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_stock_path_gives_the_same_numbers(pool, layout, routing, dtype):
    setup = replace(SMALL, ranks=3, layout=layout, routing=routing, dtype=dtype)
    for ours, stock in pool(3).run(both_paths, setup):
        assert ours[2] == stock[2]
        assert torch.equal(ours[1], stock[1])
        if dtype == "bf16":
            assert torch.equal(ours[0], stock[0])
            assert torch.allclose(ours[3], stock[3], rtol=2**-6, atol=0.05)


@pytest.mark.parametrize(
    ("layout", "dtype", "combine"),
    [
        ("expanded", "fp8", ""),
        ("expanded", "fp8", "zero_copy"),
        ("expanded", "fp8", "cast_before"),
        ("expanded", "bf16", "unsummed"),
        ("compact", "bf16", ""),
    ],
)
def test_the_kernels_give_the_same_numbers(pool, layout, dtype, combine):
    """The cuda backend on the emulator, with rows that a buffer sized by its tokens alone would have no room for."""
    setup = replace(SMALL, layout=layout, dtype=dtype, backend="cuda", sms=(2,), tokens=24, experts=4)
    setup = replace(setup, **{combine: True} if combine else {})
    for ours, stock in pool(2).run(both_paths, setup):
        assert ours[2] == stock[2]
        assert torch.equal(ours[1], stock[1])


def test_every_token_on_one_expert_each(pool):
    setup = replace(SMALL, tokens=1, topk=1, experts=2)
    assert len(pool(2).run(both_paths, setup)) == 2


class Fake:
    """As much of a path as the checks need."""

    name, ordered, fp8 = "fake", True, False


def right_answer(setup: Setup) -> tuple[list[paths.Batch], Received]:
    one = replace(setup, ranks=1)
    batch = make_batch(one, 0, 0, CPU)
    order = batch.topk_idx_TK.flatten().argsort(stable=True)
    counts = torch.bincount(batch.topk_idx_TK.flatten(), minlength=one.experts).tolist()
    rows = batch.x_TH[order // one.topk]
    return [batch], Received(rows, None, batch.topk_weights_TK.flatten()[order], counts)


@pytest.mark.parametrize("what", ["rows", "weights", "rows per local expert"])
def test_a_wrong_dispatch_is_found(what):
    setup = replace(SMALL, ranks=1)
    batches, received = right_answer(setup)
    paths.check_received(Fake(), received, batches, setup, 0)  # type: ignore[arg-type]
    if what == "rows":
        received.data[5, 7] += 1
    elif what == "weights":
        received.weights[3] = float("nan")
    else:
        received.counts[0] += 1
    with pytest.raises(WrongResult, match=f"^fake: .*{what}"):
        paths.check_received(Fake(), received, batches, setup, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), 100.0])
def test_a_wrong_combine_is_found(value):
    setup = replace(SMALL, ranks=1)
    (batch,), received = right_answer(setup)
    y = paths.expert_output(received, 0)
    order = batch.topk_idx_TK.flatten().argsort(stable=True)
    combined = torch.zeros(setup.tokens, setup.hidden).index_add_(0, order // setup.topk, y.float()).to(torch.bfloat16)
    paths.check_combined(Fake(), combined, batch, 0)  # type: ignore[arg-type]
    combined[2, 9] = value
    with pytest.raises(WrongResult, match=r"^fake: combine on rank 0 is wrong in 1 of 6400 values, first \[2, 9\]"):
        paths.check_combined(Fake(), combined, batch, 0)  # type: ignore[arg-type]


def broken_bench(rank: int, size: int, setup: Setup) -> str:
    """The error of a run whose stock path loses its result."""
    paths.StockPath.combine = lambda self, sms: torch.zeros(setup.tokens, setup.hidden)  # type: ignore[method-assign]
    try:
        ep._Bench(setup, CPU).document("")
    except WrongResult as error:
        return str(error)
    return ""


def test_a_wrong_path_ends_the_run(pool):
    workers = pool(2)
    for message in workers.run(broken_bench, SMALL):
        assert message.startswith("all-to-all: combine on rank ")
    workers.close()  # their StockPath is the broken one


def exceed_budget(rank: int, size: int, setup: Setup) -> list[str]:
    """What a profile with 9 CTAs says of each path under a budget of 8."""
    bench, messages = ep._Bench(setup, CPU), []
    batch = make_batch(setup, rank, 0, CPU)

    def profile(align: Any, work: Any, device: torch.device) -> list[Launch]:
        work()
        return [Launch("small", 8, 1.0), Launch("large", 9, 1.0)]

    ep.profile, real = profile, ep.profile
    try:
        for path in bench.paths:
            try:
                bench._launches(path, 8, batch)
                messages.append("")
            except WrongResult as error:
                messages.append(str(error))
    finally:
        ep.profile = real
    return messages


def test_a_kernel_beyond_the_budget_ends_the_run(pool):
    for ours, stock in pool(2).run(exceed_budget, SMALL):
        assert ours == "epv2: dispatch launched large with 9 CTAs, the budget is 8"
        assert stock == ""  # promises no ceiling


# ---- launches and times ---------------------------------------------------------------------------------------------


def test_launches_come_from_the_trace():
    def kernel(name: str, ts: float, dur: float, grid: list[int]) -> dict[str, Any]:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {"grid": grid}}

    events = [
        {"ph": "M", "name": "process_name"},
        kernel("epv2_pull", 30, 580.5, [8, 1, 1]),
        kernel("ncclDevKernel_AllReduce_Sum_f32", 1, 900, [1, 1, 1]),
        {"ph": "X", "cat": "gpu_memset", "name": "Memset", "ts": 20, "dur": 1, "args": {}},
        kernel("epv2_stage", 10, 139.0, [4, 2, 1]),
    ]
    assert launches_of({"traceEvents": events}) == [Launch("epv2_stage", 8, 139.0), Launch("epv2_pull", 8, 580.5)]
    launches = [{"name": "a", "ctas": 8, "us": 100.0}, {"name": "b", "ctas": 1000, "us": 10.0}]
    assert report.sm_us(launches, 132) == 8 * 100 + 132 * 10


def test_stopwatch_measures_between_marks():
    watch = Stopwatch(CPU)
    for _ in range(3):
        watch.mark()
    assert len(laps := watch.laps()) == 2
    assert all(0 <= lap < 1e6 for lap in laps)
    assert watch.laps() == []


# ---- reports --------------------------------------------------------------------------------------------------------


def gpu_document() -> dict[str, Any]:
    """As `epv2 bench ep` on eight ranks of a GPU would write."""
    ranks = 8
    launch = {"name": "epv2_dispatch_pull", "ctas": 8, "us": 700.0}
    epilogue = {"name": "epilogue", "ctas": 132, "us": 100.0}
    results = []
    for path, sms in [("epv2", 4), ("epv2", 8), ("epv2 zero-copy", 8), ("all-to-all", 0), ("deep_ep", 24)]:
        us = {"dispatch": 750.0, "to_experts": 0.0, "from_experts": 250.0, "combine": 750.0}
        results.append(
            {
                "path": path,
                "sends": "fp8 rows, cast included",
                "fp8": path != "all-to-all",
                "sms": sms,
                "checked": True,
                "samples_us": {k: [[v + r + 2 * i for r in range(ranks)] for i in range(3)] for k, v in us.items()},
                "launches": [[{"dispatch": [launch], "combine": [launch, launch, epilogue]}] * 2] * ranks,
                "limit": {"dispatch": {"us": 580.0, "bound": "SMs"}, "combine": {"us": 936.0, "bound": "memory"}},
            }
        )
    return {
        "schema": 1,
        "kind": "bench ep",
        "command": "epv2 bench ep " + "--option value " * 12,
        "date": "2026-11-25T18:00:00+00:00",
        "machine": {"cpu": "A CPU", "cpus": 16, "system": "Linux", "gpu": "NVIDIA H200", "sms": 132, "gpus": 1},
        "versions": {"torch": "2.13.0", "nccl": "2.30.7", "deep_ep": "not installed as a package"},
        "setup": {**vars(replace(SMALL, ranks=ranks, backend="cuda", iterations=3)), "sms": [4, 8]},
        "row_bytes": {"dispatch": 7392, "combine": 14336},
        "received_rows": [[14803] * ranks] * 3,
        "expected_distinct_ranks": 5.3,
        "ranks_per_gpu": 8,
        "notes": ["8 ranks share one GPU: the link between them is its memory."],
        "results": results,
    }


def test_report_of_a_gpu_fits_and_adds_up():
    text = report.ep_text(gpu_document())
    assert max(map(len, text.splitlines())) <= 120
    assert "1 x NVIDIA H200 (132 SMs), 16 cores of A CPU; 2026-11-25T18:00:00+00:00; torch 2.13.0, nccl 2.30.7" in text
    lines = [line.split() for line in text.splitlines()]
    times = next(line for line in lines if line[:2] == ["epv2", "8"])
    # Slowest rank: 757, 759, 761 us of dispatch; 14803 rows of 7392 bytes in 759 us are 144 GB/s.
    assert times[2:4] == ["759", "±1"]
    assert times[4:6] == ["9", "259"]
    assert times[10:13] == ["144", "/", "142"]
    # A rank has 16 of the 132 SMs.
    kernels = [line for line in lines if line[:2] == ["epv2", "8"]][1]
    assert kernels[2:9] == ["700", "8", "5600", "1500", "132", "12800", "18400"]
    assert kernels[9:] == ["580", "SMs", "76%", "936", "memory", "123%"]
    assert [line[2:] for line in lines if line[:2] == ["all-to-all", "0"]][-1][0] == "752/752"


def test_report_breaks_many_ranks_into_blocks():
    document = gpu_document()
    document["setup"]["ranks"] = ranks = 32
    for result in document["results"]:
        result["launches"] = None
        result["samples_us"] = {k: [[float(r) for r in range(ranks)]] * 3 for k in result["samples_us"]}
    text = report.ep_text(document)
    assert max(map(len, text.splitlines())) <= 120
    assert all(f"rank {r}" in text for r in range(ranks))


def test_table_aligns():
    assert report.table(["a", "one\ntwo"], [["long name", "1"], ["b", "12345"]]) == [
        "             one",
        "a            two",
        "long name      1",
        "b          12345",
    ]


def test_spread_of_one_value():
    assert report.spread([12.3]) == "12"
    assert report.spread([10, 20, 30, 40, 50]) == "30 ±10"


# ---- SM copy rates --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/s", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [1, 5, 64, 131])
@pytest.mark.parametrize("mode", sm.MODES)
def test_sm_copy_moves_every_row_once(group, mode, rows, seed):
    reads, writes = sm.MODES[mode]
    row_bytes, stages, warps = 48, 2 + seed, 3
    source = torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8)
    target = torch.full((rows * max(writes, 1) + 1, row_bytes), 7, dtype=torch.uint8)
    args = args_type(SM_COPY).pack(
        source=source.data_ptr(),
        target=target.data_ptr(),
        rows=rows,
        row_bytes=row_bytes,
        reads=reads,
        writes=writes,
        stages=stages,
    )
    EmulatedRuntime(group, seed).launch(
        SM_COPY, args, ctas=2, threads=32 * warps, shared_bytes=warps * stages * (row_bytes + 8)
    )
    assert (target[-1] == 7).all()  # nothing behind the end
    if mode == "read":
        assert (target == 7).all()
    elif mode == "write":
        assert (target[:-1] == 0xCD).all()  # what the emulator's shared memory holds
    else:
        copied = target[:-1].view(rows, writes, row_bytes)
        assert all(torch.equal(copied[:, w], source) for w in range(writes))


def test_rates_are_measured_for_every_mode(group):
    measured = sm.measure(EmulatedRuntime(group), [1, 3], row_bytes=64, bytes_per_sm=64 * 30)
    points = tuple(model.Rate(**rate) for rate in measured["rates"])
    table = model.CopyRates("the emulator", points)
    assert [point.sms for point in table.points] == [1, 3]
    for sms in ("1", "3"):
        assert {mode: len(times) for mode, times in measured["samples_us"][sms].items()} == dict.fromkeys(sm.MODES, 6)
        assert set(measured["warps"][sms].values()) <= set(sm.WARPS)
    document = {
        **report.circumstances("epv2 bench sm", CPU),
        "repetitions": 6,
        "row_bytes": 64,
        "stages": 3,
        "stored": "/cache/file.json",
        **measured,
    }
    text = report.sm_text(document)
    assert max(map(len, text.splitlines())) <= 120
    assert sm.rates_line(points).startswith("1 SMs ")


def test_default_sms_end_with_the_whole_device():
    assert sm.default_sms(132) == [4, 8, 16, 24, 32, 48, 64, 96, 132]
    assert sm.default_sms(16) == [4, 8, 16]


# ---- commands -------------------------------------------------------------------------------------------------------


def check_schema(document: dict[str, Any], setup: Setup) -> None:
    """The JSON of `epv2 bench ep` on the host backend."""
    types: dict[str, Any] = {
        "schema": int,
        "kind": str,
        "command": str,
        "date": str,
        "machine": dict,
        "versions": dict,
        "setup": dict,
        "row_bytes": dict,
        "received_rows": list,
        "expected_distinct_ranks": (float, type(None)),
        "ranks_per_gpu": int,
        "notes": list,
        "results": list,
    }
    assert document.keys() == types.keys()
    assert all(isinstance(document[key], kind) for key, kind in types.items())
    assert (document["schema"], document["kind"]) == (1, "bench ep")
    assert document["setup"] == {**vars(setup), "sms": [0]}
    assert document["row_bytes"].keys() == {"dispatch", "combine"}
    shape = (setup.iterations, setup.ranks)
    assert torch.tensor(document["received_rows"]).shape == shape
    ours = ["epv2", *["epv2 zero-copy"] * setup.zero_copy, *["epv2 cast before"] * setup.cast_before]
    ours += ["epv2 unsummed"] * setup.unsummed
    assert [result["path"] for result in document["results"]] == [*ours, "all-to-all"]
    for result in document["results"]:
        assert result.keys() == {"path", "sends", "fp8", "sms", "checked", "samples_us", "launches", "limit"}
        assert (result["sms"], result["checked"], result["launches"], result["limit"]) == (0, True, None, None)
        assert list(result["samples_us"]) == ["dispatch", "to_experts", "from_experts", "combine"]
        for samples in result["samples_us"].values():
            assert torch.tensor(samples).shape == shape
            assert torch.tensor(samples).min() >= 0


def bench_ep(setup: Setup, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["--ranks", setup.ranks, "--tokens", setup.tokens, "--hidden", setup.hidden, "--topk", setup.topk]
    words += ["--experts", setup.experts, "--dtype", setup.dtype, "--layout", setup.layout]
    words += ["--routing", setup.routing, "--iters", setup.iterations, "--backend", "host", *more]
    words += ["--zero-copy"] * setup.zero_copy + ["--unsummed"] * setup.unsummed
    words += ["--cast-before"] * setup.cast_before
    command = [sys.executable, "-m", "epv2_plugin.cli", "bench", "ep", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "setup",
    [
        replace(SMALL, dtype="fp8", zero_copy=True, unsummed=True, cast_before=True),
        replace(SMALL, layout="compact", routing="skewed"),
    ],
    ids=["fp8", "compact"],
)
def test_bench_ep_on_the_host(tmp_path, setup):
    done = bench_ep(setup, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    check_schema(document, setup)
    assert done.stdout == report.ep_text(document) + "\n"
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert done.stdout.startswith("epv2 bench ep --ranks 2 --backend host --tokens 40")
    # Every (token, rank) pair of the batches, whoever received it.
    for number, received in enumerate(document["received_rows"], start=1):
        routed = [paths.pairs_by_rows(setup, make_batch(setup, r, number, CPU).topk_idx_TK) for r in range(2)]
        assert received == sum(pairs[:, 1:].sum(1) for pairs in routed).tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experts", "10"], "--experts = 10: must be a multiple of the 4 ranks"),
        (["--topk", "9", "--experts", "8"], "--topk = 9: must be at most the 8 experts"),
        (["--topk", "8", "--experts", "8", "--routing", "skewed"], "--routing = 'skewed': needs more experts than "),
        (["--zero-copy", "--layout", "compact"], "--zero-copy = True: needs the expanded layout"),
        (["--unsummed", "--layout", "compact"], "--unsummed = True: needs the expanded layout"),
        (["--cast-before", "--dtype", "bf16"], "--cast-before = True: needs --dtype fp8"),
        (["--json", "/nowhere/out.json"], "--json = '/nowhere/out.json': there is no folder /nowhere"),
        (["--json", "/tmp"], "--json = '/tmp': is a folder"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, words, message):
    assert cli.main(["bench", "ep", "--backend", "host", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(("epv2: ", "epv2 bench ep: "))
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "argument --tokens: 0: must be 1 or more"),
        (["--sms", "4,0"], "argument --sms: 0: must be 1 or more"),
        (["--sms", "4,x"], "argument --sms: 'x' is not a whole number"),
        (["--tokens", "many"], "argument --tokens: 'many' is not a whole number"),
        (["--dtype", "fp4"], "argument --dtype: invalid choice: 'fp4'"),
    ],
)
def test_values_that_can_not_be(capsys, words, message):
    with pytest.raises(SystemExit) as failure:
        cli.main(["bench", "ep", *words])
    assert failure.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_one_line(capsys):
    assert cli.main(["bench", "sm"]) == 2
    assert cli.main(["bench", "ep", "--backend", "cuda"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "epv2 bench sm: device = None: no CUDA device here: nothing to measure"
    assert second.startswith("epv2 bench ep: --backend = 'cuda': ")


def test_ranks_must_be_those_of_torchrun(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["bench", "ep", "--ranks", "2", "--backend", "host"]) == 2
    assert capsys.readouterr().err == "epv2 bench ep: --ranks = 2: the job was started with 3 ranks\n"


def test_bench_ep_as_ranks_of_somebody_else(tmp_path):
    """As torchrun starts them."""
    words = ["--tokens", "8", "--hidden", "32", "--topk", "2", "--experts", "4", "--iters", "1", "--backend", "host"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "epv2_plugin.cli", "bench", "ep", *words, "--json", str(tmp_path / "out.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["setup"]["ranks"] == 2


# ---- pp, cp and fsdp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "tables", "names"),
    [
        (
            ["pp", "--large", "5000", "--small", "100"],
            ("large_us", "in_a_row_us", "small_us"),
            ("epv2", "plain copy", "torch"),
        ),
        (
            ["cp", "--ranks", "2", "--tokens", "64", "--heads", "4", "--groups", "2", "--width", "8"],
            ("gather_us", "attention_us"),
            ("epv2", "torch", "gather, then attend"),
        ),
        (
            ["fsdp", "--ranks", "2", "--parameters", "5000"],
            ("gather_us", "reduce_us", "step_us"),
            (
                "A training step of 4 such layers",
                "all-gather, epv2",
                "all-gather, torch",
                "reduce-scatter, epv2",
                "reduce-scatter, torch",
            ),
        ),
    ],
)
def test_bench_of_transfers_from_end_to_end(
    tmp_path: Path, words: list[str], tables: tuple[str, ...], names: tuple[str, ...]
) -> None:
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "epv2_plugin.cli", "bench", *words, "--iters", "2", "--backend", "host"]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(path.read_text())
    assert document["kind"] == f"bench {words[0]}"
    for table in tables:
        for samples in document[table].values():
            assert len(samples) == 2
            assert all(len(ranks) == 2 and min(ranks) > 0 for ranks in samples)
    text = {"pp": report.pp_text, "cp": report.cp_text, "fsdp": report.fsdp_text}[words[0]](document)
    assert text in done.stdout
    assert all(name in text for name in names)
    assert max(map(len, text.splitlines())) <= report.WIDTH


def test_report_of_gemms_beside_transfers() -> None:
    samples = {"epv2": [[10.0, 12.0]], "plain copy": [[9.0, 9.0]], "torch": [[20.0, 18.0]]}
    document = {
        **report.circumstances("epv2 bench pp", CPU),
        "setup": {"ranks": 2, "large": 12000, "small": 64, "iterations": 1, "backend": "cuda"},
        "large_us": samples,
        "in_a_row": 8,
        "in_a_row_us": {**samples, "epv2": [[9.0, 7.0]]},
        "long_row": 32,
        "queued_us": {**samples, "epv2": [[9.5, 7.0]]},
        "host_us": {**samples, "epv2": [[3.0, 2.0]]},
        "small_us": samples,
        "gemm_us": {"alone": [[100.0, 95.0]], "beside epv2": [[102.0, 104.0]], "beside torch": [[125.0, 120.0]]},
        "gemm_moved": {"alone": [[0, 0]], "beside epv2": [[5200000, 9000000]], "beside torch": [[0, 2500000]]},
    }
    lines = report.pp_text(document).splitlines()
    assert any(line.split() == ["epv2", "12", "1", "75%"] for line in lines)
    assert any(line.split() == ["epv2", "9", "1.33", "100%"] for line in lines)
    assert any(line.split()[:1] == ["epv2"] and line.split()[-2:] == ["95%", "3"] for line in lines)
    assert any(line.split() == ["beside", "epv2", "104", "96.2%", "50"] for line in lines)
    assert any(line.split() == ["beside", "torch", "125", "80.0%", "0"] for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pp", "--ranks", "1"], "--ranks = 1: must be 2 or more"),
        (["pp", "--small", "65", "--large", "64"], "--small = 65: must be at most --large, 64"),
        (["cp", "--heads", "6", "--groups", "4"], "--groups = 4: must divide --heads, 6"),
        (["fsdp", "--ranks", "4", "--parameters", "6"], "--parameters = 6: must be a multiple of 4"),
    ],
)
def test_bench_of_transfers_refuses(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["bench", *words]) != 0
    assert message in capsys.readouterr().err
