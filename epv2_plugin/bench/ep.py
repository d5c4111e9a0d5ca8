"""`epv2 bench ep` on a rank: every path measured in turn on fresh batches, checked, and compared with the model.

A time is one of the slowest rank. Ranks start each half of a repetition together; between the halves the experts'
output is made, which no time includes. On a GPU a time begins behind work that is queued already, as in training: what
the host does before its first launch is hidden there, what it does once it has waited for the GPU is not.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import json
import math
import os
import socket
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path as File
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.bench import report, sm
from epv2_plugin.bench.paths import (
    Batch,
    ElasticPath,
    Path,
    Setup,
    StockPath,
    WrongResult,
    check_combined,
    check_received,
    expert_output,
    make_batch,
    pairs_by_rows,
)
from epv2_plugin.bench.timing import Stopwatch, profile
from epv2_plugin.elastic import ElasticBuffer, model, sizing
from epv2_plugin.training.launcher import process_group_store

TIMEOUT = timedelta(seconds=600)
PROFILED = 5  # repetitions whose kernels are looked at
ZERO_COPY, UNSUMMED = "epv2 zero-copy", "epv2 unsummed"  # the other ways of the plugin to combine
CAST_BEFORE = "epv2 cast before"
LEAD_CYCLES = 2_000_000  # about 1 ms, longer than the host takes before the first launch of any path
STAGES = ("dispatch", "to_experts", "from_experts", "combine")


def run(setup: Setup, command: str, json_file: File | None) -> int:
    """Measure as one rank; rank 0 prints the report and writes the JSON. Returns the exit code, 1 = a wrong result."""
    device = join(setup.backend)
    try:
        document = _Bench(setup, device).document(command)
    except WrongResult as error:
        print(f"epv2 bench ep: WRONG RESULT: {error}", file=sys.stderr)
        return 1  # without leaving in order: the others are waiting for this rank
    if dist.get_rank() == 0:
        print(report.ep_text(document), flush=True)
        if json_file is not None:
            json_file.write_text(json.dumps(document) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def join(backend: str) -> torch.device:
    """Join the process group and choose this rank's device."""
    cuda = backend == "cuda"
    local, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    kinds, store = "cpu:gloo,cuda:nccl" if cuda else "gloo", process_group_store(TIMEOUT)
    if store is None:
        dist.init_process_group(kinds, timeout=TIMEOUT)
    else:
        rank = int(os.environ["RANK"])
        dist.init_process_group(kinds, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return device


class _Bench:
    """The paths that can run here, and their measurement."""

    def __init__(self, setup: Setup, device: torch.device):
        self.setup, self.device = setup, device
        self.rank = dist.get_rank()
        self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._group = dist.group.WORLD
        assert self._group is not None
        self._flag = torch.zeros(1, device=device)
        self._watch = Stopwatch(device)
        self._sizes: dict[str, list[int]] = collections.defaultdict(list)
        self.notes: list[str] = []
        self._sharing = 1  # ranks on this rank's GPU
        if device.type == "cuda":
            place = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
            self._sharing = self._gather(place).count(place)
        self.paths = self._make_paths()

    def _make_paths(self) -> list[Path]:
        setup = self.setup
        assert self._group is not None
        options = buffer_options(setup, whole_rows=setup.zero_copy)
        buffer = ElasticBuffer(self._group, **options, backend=setup.backend)  # type: ignore[arg-type]
        paths: list[Path] = [ElasticPath("epv2", buffer, setup)]
        if setup.zero_copy:
            paths.append(ElasticPath(ZERO_COPY, buffer, setup, zero_copy=True))
        if setup.cast_before:
            paths.append(ElasticPath(CAST_BEFORE, buffer, setup, cast_before=True))
        if setup.unsummed:
            options = buffer_options(setup, whole_rows=True) | {"allow_multiple_reduction": False}
            another = ElasticBuffer(self._group, **options, backend=setup.backend)  # type: ignore[arg-type]
            paths.append(ElasticPath(UNSUMMED, another, setup))
        paths.append(StockPath(self._group, setup))
        if importlib.util.find_spec("deep_ep") is None:
            self.notes.append("deep_ep can't be imported here: not measured.")
        elif setup.backend != "cuda":
            self.notes.append("deep_ep runs on CUDA devices only: not measured.")
        elif not hasattr(deep_ep := importlib.import_module("deep_ep"), "ElasticBuffer"):
            self.notes.append("the deep_ep that is installed has no ElasticBuffer (that is version 2): not measured.")
        else:
            options = buffer_options(setup, whole_rows=False)
            dist.all_reduce(self._flag)  # it takes the communicator that torch makes here, and dies where there is none
            theirs = deep_ep.ElasticBuffer(self._group, **options, explicitly_destroy=True)
            paths.append(ElasticPath("deep_ep", theirs, setup, ours=False))
        return paths

    # ---- one repetition ---------------------------------------------------------------------------------------------

    def _align(self) -> None:
        """Let every rank, and on a GPU every stream, go on at the same time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier(self._control)
        if self.device.type == "cuda":
            dist.all_reduce(self._flag)

    def _start(self) -> None:
        """Begin the clock of every rank at the same time, on a GPU behind work that keeps one SM busy."""
        self._align()
        if self.device.type == "cuda":
            torch.cuda._sleep(LEAD_CYCLES)
        self._watch.mark()

    def _poison(self, path: Path) -> None:
        """Fill memory of the sizes that `path` returned last, which the allocator hands out again, with NaN."""
        stale = [torch.full((size,), 255, dtype=torch.uint8, device=self.device) for size in self._sizes[path.name]]
        del stale

    def _reserve(self) -> None:
        """Take from the driver what all paths' outputs need, so that none of them waits for that between two marks."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            every = sum(sum(sizes) for sizes in self._sizes.values())
            torch.empty(2 * every, dtype=torch.uint8, device=self.device)

    def _once(self, path: Path, sms: int, batch: Batch, check: list[Batch] | None = None) -> list[float]:
        """The times of `STAGES` in microseconds."""
        self._poison(path)
        self._start()
        path.dispatch(batch, sms)
        self._watch.mark()
        received = path.to_experts()
        self._watch.mark()
        times = self._watch.laps()
        if check is not None:
            check_received(path, received, check, self.setup, self.rank)
        outputs = (received.data, received.scales, received.weights, batch.x_TH)
        self._sizes[path.name] = [out.nbytes for out in outputs if out is not None]
        y = path.place(expert_output(received, self.rank * self.setup.local_experts))
        del received, outputs
        self._poison(path)
        self._start()
        path.from_experts(y)
        self._watch.mark()
        combined = path.combine(sms)
        self._watch.mark()
        times += self._watch.laps()
        if check is not None:
            check_combined(path, combined, batch, self.rank)
        return times

    def _launches(self, path: Path, sms: int, batch: Batch) -> dict[str, list[dict[str, Any]]]:
        """The kernels of a dispatch and of a combine, without what goes between them.

        Raises:
            WrongResult: one of them is larger than the budget that the path promises to keep.
        """
        dispatched = profile(self._align, lambda: path.dispatch(batch, sms), self.device)
        received = path.to_experts()
        path.from_experts(path.place(expert_output(received, self.rank * self.setup.local_experts)))
        found = {"dispatch": dispatched, "combine": profile(self._align, lambda: path.combine(sms), self.device)}
        for operation, launches in found.items():
            for launch in launches:
                if path.ceiling and launch.ctas > sms:
                    raise WrongResult(
                        f"{path.name}: {operation} launched {launch.name} with {launch.ctas} CTAs, the budget is {sms}"
                    )
        return {operation: [asdict(launch) for launch in launches] for operation, launches in found.items()}

    # ---- all of it --------------------------------------------------------------------------------------------------

    def document(self, command: str) -> dict[str, Any]:
        """Every number of the run, the same on every rank.

        Raises:
            WrongResult: an output differs from the reference, or a budget was exceeded.
        """
        setup, ranks = self.setup, range(self.setup.ranks)
        kinds = [(path, sms) for path in self.paths for sms in path.budgets]
        batches = [make_batch(setup, rank, 0, self.device) for rank in ranks]
        mine, profiled = batches[self.rank], PROFILED if self.device.type == "cuda" else 0
        launches = []
        for path, sms in kinds:
            self._once(path, sms, mine)  # makes what is made once, and outputs for the next call to find poisoned
            self._once(path, sms, mine, check=batches)
            launches.append([self._launches(path, sms, mine) for _ in range(profiled)])
        self._reserve()
        held = [pairs_by_rows(setup, batch.topk_idx_TK) for batch in batches]
        limits = self._limits(torch.stack(held))
        del batches, mine

        samples: list[list[list[float]]] = [[] for _ in kinds]
        routed = []
        for iteration in range(setup.iterations):
            batch = make_batch(setup, self.rank, iteration + 1, self.device)
            if setup.dtype == "fp8":
                batch.fp8  # noqa: B018 - made before any clock starts
            routed.append(pairs_by_rows(setup, batch.topk_idx_TK)[:, 1:].sum(1).tolist())
            turn = iteration % len(kinds)
            for place in [*range(turn, len(kinds)), *range(turn)]:
                path, sms = kinds[place]
                samples[place].append(self._once(path, sms, batch))

        every = self._gather((samples, routed, launches))
        sent = torch.tensor([routed for _, routed, _ in every])  # [source, iteration, destination]
        results = []
        for place, (path, sms) in enumerate(kinds):
            times = [rank_samples[place] for rank_samples, _, _ in every]
            results.append(
                {
                    "path": path.name,
                    "sends": path.sends,
                    "fp8": path.fp8,
                    "sms": sms,
                    "checked": True,
                    "samples_us": {
                        stage: [[times[rank][i][column] for rank in ranks] for i in range(setup.iterations)]
                        for column, stage in enumerate(STAGES)
                    },
                    "launches": [found[place] for _, _, found in every] if profiled else None,
                    "limit": limits.get((path.name, sms)),
                }
            )
        return {
            "schema": report.SCHEMA,
            "kind": "bench ep",
            **report.circumstances(command, self.device),
            "setup": {**asdict(setup), "sms": list(setup.sms)},
            "row_bytes": {"dispatch": setup.shape.dispatch_row, "combine": setup.shape.row},
            "received_rows": sent.sum(0).tolist(),
            "expected_distinct_ranks": model.distinct_ranks(setup.shape) if setup.routing == "uniform" else None,
            "ranks_per_gpu": self._sharing,
            "notes": self.notes,
            "results": results,
        }

    def _gather(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self.setup.ranks
        dist.all_gather_object(every, value, group=self._control)
        return every

    def _limits(self, pairs: torch.Tensor) -> dict[tuple[str, int], dict[str, Any]]:
        """What the copy rates, measured now, allow for the rows of the first batch; nothing on a host.

        Args:
            pairs: int64 `[P, P, K + 1]`: source rank, rank of experts, rows.
        """
        if self.device.type != "cuda":
            return {}
        from epv2_plugin.elastic.backends.device import CudaRuntime

        properties = torch.cuda.get_device_properties(self.device)
        everything = properties.multi_processor_count
        runtime = CudaRuntime(self._control, TIMEOUT.total_seconds())
        try:
            # One rank at a time would measure the GPU; all at once, ranks that share one would measure each other.
            measured = sm.measure(runtime, sorted({*self.setup.sms, everything})) if self.rank == 0 else None
            rates = self._gather(measured)[0]["rates"]
        finally:
            runtime.close()
        gpu = properties.name
        if self._sharing == self.setup.ranks:
            link = math.inf
            self.notes.append(f"{self._sharing} ranks share one GPU: the link between them is its memory.")
        else:
            try:
                link = model.scale_up_rate(gpu)
            except ValueError as error:
                link = math.inf
                self.notes.append(f"the limit leaves the link out: {error}")
        table = model.CopyRates("this run", tuple(model.Rate(**rate) for rate in rates))
        machine = model.Machine(gpu, everything, table, link, self._sharing)
        self.notes.append("copy rates: " + sm.rates_line(table.points))
        limits = {}
        for path in self.paths:
            for sms in path.budgets if isinstance(path, ElasticPath) else ():
                limits[path.name, sms] = self._limit(pairs, machine, sms, path.name)
        return limits

    def _limit(self, pairs: torch.Tensor, machine: model.Machine, sms: int, path: str) -> dict[str, Any]:
        """Microseconds of the rank that needs most, for dispatch and combine, and what bounds their longest phase."""
        shape = self.setup.shape
        options: dict[str, Any] = {}
        if path == ZERO_COPY:
            options = {"zero_copy": True, "direct_rows": shape.topk}
        elif path == UNSUMMED:
            options = {"copy_engine": True}
        limit: dict[str, Any] = {}
        for rank in range(self.setup.ranks):
            rows = measured_rows(pairs, rank)
            operations = {
                "dispatch": model.dispatch_phases(shape, rows, cast_before=path == CAST_BEFORE),
                "combine": model.combine_phases(shape, rows, **options),
            }
            for name, phases in operations.items():
                times = [model.predict(phase, machine, sms) for phase in phases]
                total = math.fsum(time.us for time in times)
                if name not in limit or total > limit[name]["us"]:
                    limit[name] = {"us": total, "bound": max(times, key=lambda time: time.us).bound}
        return limit


def buffer_options(setup: Setup, *, whole_rows: bool) -> dict[str, Any]:
    """Arguments of an `ElasticBuffer` for `setup`; `whole_rows`: its window takes every expert row, not sums only."""
    return {
        "num_bytes": _whole_rows_bytes(setup) if whole_rows else None,
        "num_max_tokens_per_rank": setup.tokens,
        "hidden": setup.hidden,
        "num_topk": setup.topk,
        "use_fp8_dispatch": setup.dtype == "fp8",
    }


def _whole_rows_bytes(setup: Setup) -> int:
    """Bytes of a buffer whose window has room for all expert rows, not for one per token and rank.

    Twice the rows that a rank has on average, and every token of all ranks once more for a popular expert.
    """
    ranks, tokens, topk = setup.ranks, setup.tokens, setup.topk
    rows = min(ranks * tokens * min(topk, setup.local_experts), 2 * tokens * topk + ranks * tokens)
    nodes = sizing.Nodes(ranks, ranks)
    window = sizing.WindowLayout(nodes, tokens, setup.hidden, topk, setup.dtype == "fp8")
    layout = sizing.CombineLayout(
        0, nodes=nodes, max_tokens=tokens, num_topk=topk, row_bytes=setup.shape.row, num_rows=rows
    )
    # A buffer made by bytes keeps one of ranks + 1 equal parts for what is dispatched.
    return (ranks + 1) * sizing.align(max(window.split, -(-layout.end // ranks)), sizing.BUFFER_ALIGNMENT)


def measured_rows(pairs: torch.Tensor, rank: int) -> model.Rows:
    """The model's counts for `rank` from `pairs` `[P, P, K + 1]` (source rank, rank of experts, rows of a token)."""
    held, owned = pairs[:, rank, 1:], pairs[rank, :, 1:]
    parts = [held.sum(0), held.sum(0) - held[rank], owned.sum(0), owned.sum(0) - owned[rank]]
    tokens = int(pairs[rank, 0].sum())
    return model.Rows(tokens, *(tuple(float(count) for count in part) for part in parts))
