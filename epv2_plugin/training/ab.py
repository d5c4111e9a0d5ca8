"""A/B: the same model, weights, data and routing, trained with each token dispatcher in turn, in one launch.

All arms live in the same processes and take turns step by step, in an order that rotates, so that whatever else the
machine does hits all of them. In bf16 a run with stock's other dispatcher follows, alone: how far the losses of
stock's two dispatchers, which round their sums in different orders, are apart is what the plugin's are judged by.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from epv2_plugin.config import ConfigError
from epv2_plugin.elastic import ElasticBuffer
from epv2_plugin.megatron import context_parallel, dispatcher, pipeline
from epv2_plugin.megatron.dispatcher import EpTokenDispatcher
from epv2_plugin.training import devices
from epv2_plugin.training.data import TokenStream
from epv2_plugin.training.instruments import PeakMemory
from epv2_plugin.training.launcher import INTERRUPTED
from epv2_plugin.training.machine import machine, versions
from epv2_plugin.training.recipe import Recipe, check_arms, parameter_count
from epv2_plugin.training.reference_attention import GatherThenAttendInFp32
from epv2_plugin.training.report import LOSS_TOLERANCE, OURS, begin_run, write_meta, write_report
from epv2_plugin.training.run_folder import METRICS
from epv2_plugin.training.stages import StockTraffic, clock_of, moe_layers, skew_routing
from epv2_plugin.training.trainer import Arm, Interrupts, leave, setup

STOCK = ("alltoall", "allgather")
WARMUP_STEPS = 3  # allocators and caches settle
# Bytes to other ranks: by experts' dispatch and combine, by these with a copy per (token, expert), and by the others.
SENT = ("sent_bytes", "undeduplicated_bytes", "pipeline_bytes", "context_bytes")


def run(recipe: Recipe, folder: Path, arms: list[str], *, skew: float | None, command: str) -> int:
    """Train the recipe with each of `arms` on this rank and write the report to `folder`.

    Args:
        skew: share of the tokens that is sent to one popular expert; None = the router's own choice.
        command: for the report.

    Returns:
        The exit code: 0, 130 if interrupted, 1 if a loss was not finite (the report then covers the steps made).
    """
    check_arms(recipe, arms)
    setup(recipe)
    training = _Run(recipe, folder)
    with Interrupts() as interrupts:
        measured = [_MeasuredArm(Arm(recipe, name), skew) for name in arms]
        meta = _meta(recipe, measured, skew, command, training.stream)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            begin_run(folder, meta)
        training.steps(measured, interrupts)
        meta["expert_parallel"] = dispatcher.groups()
        if losses_differ([arm.losses for arm in measured], recipe.train.precision):
            meta.setdefault("noise", _noise(meta["arms"]))
        other = meta.get("noise", {}).get("arm")
        if other is not None and other not in arms and not training.over:
            if dist.get_rank() == 0:
                print("\nstock with its other dispatcher, for the rounding noise of the losses:", flush=True)
            for arm in measured:
                arm.arm.release()
            try:
                yardstick = Arm(_without_overlap(recipe), other, GatherThenAttendInFp32)
            except ConfigError as error:  # every rank raises it
                meta["noise"]["missing"] = str(error)
            else:
                if yardstick.runs.get("context") == GatherThenAttendInFp32.label:
                    meta["noise"]["also"] = "and attention runs in fp32, rounded once"
                training.steps([_MeasuredArm(yardstick, skew)], interrupts)
    if dist.get_rank() == 0:
        training.close()
        meta["interrupted"] = training.interrupted
        write_meta(folder, meta)
        print(flush=True)
        report = write_report(folder)
        print(report.read_text().split("\n##")[0].strip())
        print(f"\nreport: {report}", flush=True)
        if training.failure:
            print(f"stopped early: {training.failure}", file=sys.stderr)
    dist.barrier()
    leave()
    return 1 if training.failure else INTERRUPTED if training.interrupted else 0


class _Run:
    """The steps of an A/B run, and `metrics.jsonl`, which rank 0 writes.

    Attributes:
        stream: the data.
        interrupted: whether a rank was asked to stop.
        failure: which arm's loss was not finite; empty = none.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.stream = TokenStream(recipe)
        self.interrupted, self.failure = False, ""
        self._steps, self._folder = recipe.train.steps, folder
        self._metrics: IO[str] | None = None

    @property
    def over(self) -> bool:
        """Whether no further step is to be made."""
        return self.interrupted or bool(self.failure)

    def steps(self, measured: list[_MeasuredArm], interrupts: Interrupts) -> None:
        """Train the arms, which take turns, until the recipe's last step, an interrupt or a loss that is not finite."""
        if dist.get_rank() == 0 and self._metrics is None:
            self._metrics = open(self._folder / METRICS, "w")  # noqa: SIM115 - closed by close()
        try:
            for step in range(self._steps):
                batch = self.stream.sequences(step)
                turn = step % len(measured)
                for arm in measured[turn:] + measured[:turn]:
                    record = arm.step(batch)
                    if self._metrics is not None:
                        self._metrics.write(json.dumps(record) + "\n")
                        self._metrics.flush()
                if self._metrics is not None:
                    _show(step, self._steps, measured)
                self.interrupted = interrupts.anywhere()
                if self.interrupted:
                    return
        except FloatingPointError as error:  # every rank raises it
            self.failure = f"{arm.arm.dispatcher}: {error}"

    def close(self) -> None:
        """Close the file."""
        if self._metrics is not None:
            self._metrics.close()


def _without_overlap(recipe: Recipe) -> Recipe:
    """The same model without what stock's `allgather` lacks."""
    lacks = ("moe_shared_expert_overlap", "moe_pad_expert_input_to_capacity")
    kept = {name: value for name, value in recipe.megatron.items() if name not in lacks}
    return recipe.model_copy(update={"megatron": kept})


class _MeasuredArm:
    """An arm with its instruments. `losses`: of its steps so far."""

    def __init__(self, arm: Arm, skew: float | None):
        self.arm = arm
        self.losses: list[float] = []
        self.record: dict[str, Any] = {}
        self._clock, self._memory, self._traffic = clock_of(arm.chunks), PeakMemory(), StockTraffic(arm.chunks)
        dispatchers = [layer.token_dispatcher for layer in moe_layers(arm.chunks)]
        self._ours = [dispatcher for dispatcher in dispatchers if isinstance(dispatcher, EpTokenDispatcher)]
        if skew is not None:
            skew_routing(arm.chunks, skew)

    def step(self, batch: torch.Tensor) -> dict[str, Any]:
        """One step; returns its record, the same on every rank."""
        self._clock.reset()
        self._memory.reset()
        before = self._sent()
        devices.synchronize()
        dist.barrier()
        begin = devices.mark()
        with self._traffic.counting():
            result = self.arm.step(batch)
        end = devices.mark()
        self.losses.append(result.loss)
        stages = self._clock.seconds()  # waits for the device
        seconds = devices.seconds_between(begin, end)
        sent = [now - then for now, then in zip(self._sent(), before, strict=True)]
        here = devices.current()
        sums = torch.tensor([*sent, *stages.values()], dtype=torch.float64, device=here)
        largest = torch.tensor([seconds, self._memory.read()], dtype=torch.float64, device=here)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        ranks = dist.get_world_size()
        self.record = {
            "arm": self.arm.dispatcher,
            "step": self.arm.steps_done - 1,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "step_ms": round(float(largest[0]) * 1e3, 3),
            **{name: int(total) for name, total in zip(SENT, sums.tolist(), strict=False)},
            "peak_mib": round(float(largest[1]) / 2**20, 1),
        }
        for stage, total in zip(stages, sums[len(SENT) :].tolist(), strict=True):
            self.record[f"{stage}_ms"] = round(total / ranks * 1e3, 3)
        return self.record

    def _sent(self) -> tuple[int, int, int, int]:
        """`SENT` so far. Stock dispatchers send a copy for each (token, expert)."""
        stock = self._traffic
        sent = plain = stock.sent_bytes
        if self._ours:
            # Layers share buffers; before the first micro-batch there may be none.
            buffers: set[ElasticBuffer] = {layer.buffer for layer in self._ours if layer.buffer is not None}
            traffic = [buffer.traffic for buffer in buffers]
            sent, plain = sum(t.sent_bytes for t in traffic), sum(t.undeduplicated_bytes for t in traffic)
        between_stages, in_context = stock.pipeline_bytes, stock.context_bytes
        if self.arm.dispatcher == OURS:  # no other arm uses the plugin's groups
            between_stages += sum(group["sent_bytes"] for group in pipeline.groups())
            in_context += sum(group["sent_bytes"] for group in context_parallel.groups())
        return sent, plain, between_stages, in_context


def _show(step: int, steps: int, measured: list[_MeasuredArm]) -> None:
    parts = [f"{m.arm.dispatcher} {m.record['loss']:.4f} {m.record['step_ms']:.0f} ms" for m in measured]
    line = f"step {step + 1}/{steps}  " + "  |  ".join(parts)
    if os.isatty(1):
        print(f"\r{line}\x1b[K", end="", flush=True)
    elif (step + 1) % max(1, steps // 10) == 0:
        print(line, flush=True)


def _meta(
    recipe: Recipe, measured: list[_MeasuredArm], skew: float | None, command: str, stream: TokenStream
) -> dict[str, Any]:
    degrees = {"EP": "expert", "TP": "tensor", "PP": "pipeline", "VPP": "virtual_pipeline", "CP": "context"}
    layout = " ".join(f"{short}{recipe.degree(name)}" for short, name in degrees.items())  # type: ignore[arg-type]
    where = devices.place(devices.usable_gpus(recipe))
    meta: dict[str, Any] = {
        "name": recipe.name,
        "recipe": recipe.source,
        "command": command,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "arms": [m.arm.dispatcher for m in measured],
        "runs": {m.arm.dispatcher: m.arm.runs for m in measured},
        "warmup_steps": min(WARMUP_STEPS, recipe.train.steps - 1),
        "processes": recipe.train.processes,
        "layout": f"{layout} DP{recipe.data_parallel}",
        "skew": skew,
        "versions": versions("epv2_plugin", "torch", "megatron-core", "numpy"),
        "machine": {**machine(), **devices.facts(where)},
        "data": {"path": recipe.data.path, "tokens": stream.num_tokens, "digest": stream.digest},
        "precision": recipe.train.precision,
        "parameters": parameter_count(recipe).total,
        "dispatch_dtype": recipe.plugin.expert.dispatch_dtype,
        "sm_budget": recipe.plugin.sm_budget.expert,
    }
    if recipe.train.precision == "bf16":
        meta["noise"] = _noise(meta["arms"])
    return meta


def _noise(arms: list[str]) -> dict[str, Any]:
    """What measures the rounding noise of the losses: stock's other dispatcher beside the one that is an arm."""
    base = next(arm for arm in arms if arm in STOCK)
    return {"arm": next(arm for arm in STOCK if arm != base), "base": base}


def losses_differ(losses: Sequence[Sequence[float]], precision: str) -> bool:
    """Whether those of the first arm and another are further apart at some step than the report takes for granted.

    On some CPUs fp32 is enough for that: a GEMM there rounds a row by its place, which a dispatcher chooses, and Adam's
    first steps are as large for a gradient of nothing but rounding.
    """
    base, *others = losses
    most = LOSS_TOLERANCE.get(precision, LOSS_TOLERANCE["fp32"])
    return any(abs(a - b) > most * abs(b) for other in others for a, b in zip(other, base, strict=False))
