"""A/B under torchtitan: its trainer as it is, with its own all-to-all and FSDP2's collectives, and with the plugin's.

Both arms live in the same processes, begin with the same seed checkpoint, see the same data and take turns step by
step. In bf16 stock with tensor parallelism follows, alone: how far the losses of stock's two layouts, which round other
parts of the same sums, are apart is what the plugin's are judged by.

`python -m epv2_plugin.training.titan_ab RECIPE FOLDER` makes that checkpoint, on one process.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

import epv2_plugin.torchtitan as adapter  # first: without a GPU it makes torchtitan importable
from epv2_plugin import fsdp
from epv2_plugin.training import devices
from epv2_plugin.training.data import TokenStream
from epv2_plugin.training.instruments import PeakMemory, StageClock
from epv2_plugin.training.launcher import process_group_store
from epv2_plugin.training.machine import machine, versions
from epv2_plugin.training.report import OURS, begin_run, write_meta, write_report
from epv2_plugin.training.run_folder import METRICS
from epv2_plugin.training.titan_recipe import SEED_FOLDER, TitanRecipe, load_titan_recipe

# isort: split
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ConfigManager
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common import token_dispatcher

WARMUP_STEPS = 3
# Tensor-parallel ranks of the run whose rounding is the yardstick. Another number of ranks for experts would be none:
# stock sums a token's rows in the same order then.
NOISE_TENSOR = 2


class _Bytes(BaseTokenizer):
    """Tokens are bytes, which the recipe's data are already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return list(str(args[0]).encode())

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return bytes(args[0]).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return 256


class _Recipe(BaseDataLoader):
    """The recipe's data: each data-parallel rank's part of the global batch of every step."""

    stream: TokenStream  # the same for all arms

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **kwargs: Any):
        self._rank, self._ranks, self._step = dp_rank, dp_world_size, 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            mine = self.stream.sequences(self._step).chunk(self._ranks)[self._rank]
            self._step += 1
            positions = torch.arange(mine.shape[1] - 1).expand(mine.shape[0], -1)
            yield {"input": mine[:, :-1].contiguous(), "positions": positions}, mine[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict.get("step", 0)


def _trainer(recipe: TitanRecipe, folder: Path, overrides: list[str], *arguments: str) -> Any:
    """torchtitan's trainer, as its command line would make it."""
    train, titan = recipe.train, recipe.torchtitan
    words = ["--module", titan.module, "--config", titan.config, "--dump_folder", str(folder / SEED_FOLDER)]
    words += ["--training.steps", str(train.steps), "--training.seq_len", str(recipe.model.seq_length)]
    words += ["--training.disable_cuda_graphs", "--checkpoint.enable", "--debug.seed", str(train.seed)]
    for name, value in titan.arguments.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    words += [*arguments, *(["--override.imports", *overrides] if overrides else [])]
    config = ConfigManager().parse_args(words)
    config.tokenizer, config.dataloader = _Bytes.Config(), _Recipe.Config()
    return config.build()


class _Arm:
    """A trainer, and what was seen of its last step.

    Attributes:
        name: "epv2"; anything else is stock.

    Args:
        tensor: ranks that share a matrix.
    """

    def __init__(self, recipe: TitanRecipe, folder: Path, name: str, tensor: int = 1):
        self.name = name
        plugin = json.dumps({"config": recipe.plugin.model_dump(exclude_defaults=True)})
        ours = [f"{adapter.__name__}.{each}={plugin}" for each in ("token_dispatcher", "collectives")]
        ours.append(f"{adapter.__name__}.activation_checkpoint")
        local = recipe.train.global_batch_size * tensor // recipe.train.processes
        self._trainer = _trainer(
            recipe,
            folder,
            ours if name == OURS else [],
            *("--checkpoint.load_only", "--training.local_batch_size", str(local)),
            *("--parallelism.expert_parallel_degree", str(recipe.expert)),
            *("--parallelism.tensor_parallel_degree", str(tensor)),
        )
        self._resends = not isinstance(self._trainer.config.activation_checkpoint, SelectiveAC.Config | None)
        self._trainer.metrics_processor.log = self._note
        self._clock, self._memory = _clock_of(self._trainer.model_parts), PeakMemory()
        self._trainer.checkpointer.load(step=-1)
        self._batches = self._trainer.batch_generator(self._trainer.dataloader)
        self._seen: dict[str, float] = {}
        self._tokens = recipe.train.global_batch_size * recipe.model.seq_length
        self.record: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        """One step; returns its record, the same on every rank.

        Raises:
            FloatingPointError: the loss is not finite; raised on every rank.
        """
        before = _sent()
        self._clock.reset()
        self._memory.reset()
        devices.synchronize()
        dist.barrier()
        begin = devices.mark()
        self._trainer.step += 1
        with _counting_stock(self._resends) as stock:
            self._trainer.train_step(self._batches)
        end = devices.mark()
        stages = self._clock.seconds()  # waits for the device
        seconds = devices.seconds_between(begin, end)
        sent, plain = (now - then for now, then in zip(_sent(), before, strict=True))
        values = [sent + stock.sent_bytes, plain + stock.sent_bytes, *stages.values()]
        here = devices.current()
        sums = torch.tensor(values, dtype=torch.float64, device=here)
        largest = torch.tensor([seconds, self._memory.read() / 2**20], dtype=torch.float64, device=here)
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self.record = {
            "arm": self.name,
            "step": self._trainer.step - 1,
            **self._seen,
            "tokens": self._tokens,
            "step_ms": round(float(largest[0]) * 1e3, 3),
            "sent_bytes": int(sums[0]),
            "undeduplicated_bytes": int(sums[1]),
            "peak_mib": round(float(largest[1]), 1),
        }
        for stage, total in zip(stages, sums[2:].tolist(), strict=True):
            self.record[f"{stage}_ms"] = round(total / dist.get_world_size() * 1e3, 3)
        if not math.isfinite(self._seen["loss"]):
            raise FloatingPointError(f"{self.name}: step {self._trainer.step - 1}: loss {self._seen['loss']}")
        return self.record

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(p.numel() for part in self._trainer.model_parts for p in part.parameters())

    def close(self) -> None:
        """End the trainer."""
        for part in self._trainer.model_parts:
            fsdp.remove(part)
        self._trainer.close()

    def _note(self, step: int, loss: float, largest: float, norm: float, **rest: Any) -> None:
        self._seen = {"loss": loss, "grad_norm": norm}


def _clock_of(model_parts: list[Any]) -> StageClock:
    """A clock over dispatch, experts and combine of every MoE layer, and over FSDP2's collectives."""
    clock = StageClock()
    for module in (module for part in model_parts for module in part.modules()):
        if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
            dispatcher.dispatch = clock.bracketed(dispatcher.dispatch, "before dispatch", "after dispatch")
            dispatcher.combine = clock.bracketed(dispatcher.combine, "before combine", "after combine")
    for part in model_parts:
        fsdp.watch(part, clock.timed)
    return clock


def _sent() -> tuple[int, int]:
    """Bytes that this rank's buffers sent so far, and with a copy per token and expert."""
    groups = adapter.groups()
    return sum(group["sent_bytes"] for group in groups), sum(group["undeduplicated_bytes"] for group in groups)


class _counting_stock:
    """Count what torchtitan's all-to-all dispatcher sends inside the block.

    Its backward sends the rows the other way: over all ranks, as many bytes again.

    Args:
        resends: whether a forward pass that is repeated for the backward sends again; selective checkpointing has
            kept the results.

    Attributes:
        sent_bytes: to other ranks, both directions.
    """

    def __init__(self, resends: bool):
        self._resends, self.sent_bytes = resends, 0

    def __enter__(self) -> _counting_stock:
        self._function: Callable = token_dispatcher.all_to_all_single
        token_dispatcher.all_to_all_single = self._count
        return self

    def _count(self, tensor: torch.Tensor, received: Any, sent: Any, group: Any) -> torch.Tensor:
        repeated = torch._C._current_graph_task_id() != -1  # inside a backward pass
        directions = int(self._resends) if repeated else 1 + tensor.requires_grad
        own = tensor.shape[0] // group.size() if sent is None else sent[group.get_local_rank()]
        self.sent_bytes += directions * (tensor.shape[0] - own) * tensor[:1].numel() * tensor.itemsize
        return self._function(tensor, received, sent, group)

    def __exit__(self, *error: object) -> None:
        token_dispatcher.all_to_all_single = self._function


def _join(recipe: TitanRecipe) -> int:
    """Take a device, join the process group, which torchtitan then leaves as it is, and open the data; returns the
    rank."""
    where = devices.place(devices.usable_gpus(recipe))
    if note := devices.take(where):
        print(note, file=sys.stderr)
    if where.device.index is not None:
        os.environ["LOCAL_RANK"] = str(where.device.index)  # torchtitan's device
    timeout = timedelta(seconds=recipe.plugin.timeouts.host_seconds)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        devices.process_group_backend(),
        store=process_group_store(timeout),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the group
    _Recipe.stream = TokenStream(recipe)
    return rank


def make_seed(recipe: TitanRecipe, folder: Path) -> None:
    """Write torchtitan's seed checkpoint to `folder`: weights that depend on no layout. On one process."""
    _join(recipe)
    trainer = _trainer(recipe, folder, [], "--checkpoint.create_seed_checkpoint")
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()
    dist.destroy_process_group()


def run(recipe: TitanRecipe, folder: Path, arms: list[str], *, command: str) -> int:
    """Train with each of `arms` on this rank and write the report to `folder`, which holds the seed checkpoint.

    Returns:
        The exit code: 0, or 1 if a loss was not finite (the report then covers the steps made).
    """
    rank = _join(recipe)
    measured = [_Arm(recipe, folder, name) for name in arms]
    meta, failure = _meta(recipe, measured, command), ""
    if rank == 0:
        begin_run(folder, meta)
    metrics: IO[str] | None = open(folder / METRICS, "w") if rank == 0 else None  # noqa: SIM115
    try:
        _steps(recipe, measured, metrics)
        meta["expert_parallel"] = adapter.groups()
        for arm in measured:
            arm.close()
        measured = []
        if "noise" in meta:
            try:
                measured = [_Arm(recipe, folder, meta["noise"]["arm"], NOISE_TENSOR)]
            except (ValueError, NotImplementedError) as error:  # every rank raises it: a layout that the model has not
                meta["noise"]["missing"] = str(error)
            else:
                _steps(recipe, measured, metrics)
    except FloatingPointError as error:  # every rank raises it
        failure = str(error)
    for arm in measured:
        arm.close()
    adapter.release()
    if metrics is not None:
        metrics.close()
        write_meta(folder, meta)
        report = write_report(folder)
        print("\n" + report.read_text().split("\n##")[0].strip() + f"\n\nreport: {report}", flush=True)
        if failure:
            print(f"stopped early: {failure}", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()
    return 1 if failure else 0


def _steps(recipe: TitanRecipe, measured: list[_Arm], metrics: IO[str] | None) -> None:
    """Train the arms, which take turns."""
    for step in range(recipe.train.steps):
        turn = step % len(measured)
        for arm in measured[turn:] + measured[:turn]:
            record = arm.step()
            if metrics is not None:
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
        if metrics is not None:
            parts = [f"{m.name} {m.record['loss']:.4f} {m.record['step_ms']:.0f} ms" for m in measured]
            print(f"step {step + 1}/{recipe.train.steps}  " + "  |  ".join(parts), flush=True)


def _meta(recipe: TitanRecipe, measured: list[_Arm], command: str) -> dict[str, Any]:
    stock = {"expert": "torchtitan's all-to-all", "fsdp": "FSDP2's own"}
    where = devices.place(devices.usable_gpus(recipe))
    meta: dict[str, Any] = {
        "name": recipe.name,
        "recipe": recipe.source,
        "command": command,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "arms": [arm.name for arm in measured],
        "runs": {arm.name: {"expert": "epv2", "fsdp": "epv2"} if arm.name == OURS else stock for arm in measured},
        "warmup_steps": min(WARMUP_STEPS, recipe.train.steps - 1),
        "processes": recipe.train.processes,
        "layout": f"EP{recipe.expert} x shard {recipe.train.processes // recipe.expert}",
        "skew": None,
        "versions": versions("epv2_plugin", "torch", "torchtitan", "numpy"),
        "machine": {**machine(), **devices.facts(where)},
        "data": {"path": recipe.data.path, "tokens": _Recipe.stream.num_tokens, "digest": _Recipe.stream.digest},
        "precision": recipe.precision,
        "parameters": measured[0].parameters,
        "dispatch_dtype": recipe.plugin.expert.dispatch_dtype,
        "sm_budget": recipe.plugin.sm_budget.expert,
    }
    if recipe.precision == "bf16":
        base = next(arm for arm in meta["arms"] if arm != OURS)
        why = f"stock with matrices over {NOISE_TENSOR} ranks computes the same function, but rounds parts of its sums"
        meta["noise"] = {"arm": f"{base}, TP {NOISE_TENSOR}", "base": base, "why": why}
    return meta


if __name__ == "__main__":
    make_seed(load_titan_recipe(sys.argv[1]), Path(sys.argv[2]))
