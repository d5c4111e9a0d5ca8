"""Training of a recipe: process groups, one `Arm` per token dispatcher, and the loop of `epv2 train`."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from epv2_plugin import plugin
from epv2_plugin.megatron import cpu_bridge, dispatcher, local_attention
from epv2_plugin.megatron.context_parallel import zigzag_split
from epv2_plugin.megatron.local_attention import uses_transformer_engine
from epv2_plugin.megatron.pipeline import schedule_groups
from epv2_plugin.training import checkpoint, devices
from epv2_plugin.training.data import TokenStream
from epv2_plugin.training.launcher import INTERRUPTED, process_group_store
from epv2_plugin.training.model import build_model, seed_weights, transformer_config
from epv2_plugin.training.recipe import Recipe, parameter_count
from epv2_plugin.training.reference_attention import GatherThenAttend
from epv2_plugin.training.run_folder import CHECKPOINTS, METRICS

logger = logging.getLogger("epv2_plugin")


def setup(recipe: Recipe) -> None:
    """Join the process group (from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, unless joined already) and make
    Megatron's groups, seeds and micro-batch count for the recipe. A second call replaces what the first one made.

    Raises:
        ConfigError: the recipe is for another number of ranks or another kind of machine.
        RuntimeError: the process was not started as a rank.
    """
    where = devices.place(devices.usable_gpus(recipe))
    notice = devices.take(where)  # first: what follows asks the driver, which reads its variables only once
    if not cpu_bridge.install():
        local_attention.install()
    timeouts = recipe.plugin.timeouts
    timeout = timedelta(seconds=timeouts.gpu_seconds if where.gpus else timeouts.host_seconds)
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise RuntimeError("RANK is not set: start ranks by `epv2 train`, `epv2 ab` or torchrun")
        backend, store = devices.process_group_backend(), process_group_store(timeout)
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    if notice and dist.get_rank() == 0:
        logger.info("%s", notice)
    if recipe.train.processes != dist.get_world_size():
        raise recipe.fail("train.processes", f"the job was started with {dist.get_world_size()} ranks")
    _forget_groups()
    virtual = recipe.degree("virtual_pipeline")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=recipe.degree("tensor"),
        pipeline_model_parallel_size=recipe.degree("pipeline"),
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=recipe.degree("context"),
        expert_model_parallel_size=recipe.degree("expert"),
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        create_gloo_process_groups=False,
    )
    torch.manual_seed(recipe.train.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.train.seed)
    num_microbatches_calculator.init_num_microbatches_calculator(
        rank=dist.get_rank(),
        rampup_batch_size=None,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        data_parallel_size=recipe.data_parallel,
    )


def _forget_groups() -> None:
    dispatcher.release()
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()


def leave() -> None:
    """End a rank's part in everything that `setup` made."""
    _forget_groups()
    local_attention.uninstall()
    dist.destroy_process_group()


@dataclass(frozen=True)
class StepResult:
    """One training step, the same on every rank.

    Attributes:
        loss: mean cross-entropy (nats) of the next token over the global batch, before the update.
        grad_norm: norm of all gradients before clipping.
        lr: learning rate of this step.
        tokens: tokens in the global batch.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int


class Arm:
    """A model with its optimizer and schedule, for one of `recipe.DISPATCHERS`. `setup` must have been called.

    Attributes:
        recipe: what it was made from.
        dispatcher: the token dispatcher. With "epv2", pipeline and context parallelism run as `recipe.plugin` says;
            with the others, Megatron's own pipeline communication and, for context parallelism, `attention`.
        chunks: this rank's virtual pipeline stages, as Megatron's `DistributedDataParallel`.
        optimizer: Megatron's optimizer.
        steps_done: steps since the initial weights; also the position in the data and in the schedule.

    Raises:
        ConfigError: see `transformer_config`.
    """

    def __init__(self, recipe: Recipe, dispatcher: str, attention: type[GatherThenAttend] = GatherThenAttend):
        if dispatcher == "epv2":
            plugin.enable(recipe.plugin)
        self.recipe, self.dispatcher, self.steps_done = recipe, dispatcher, 0
        train = recipe.train
        config = transformer_config(recipe, dispatcher)
        stock = dispatcher != "epv2"
        gathers_first = recipe.degree("context") > 1 and not uses_transformer_engine() and stock
        self.chunks = build_model(recipe, config, attention if gathers_first else None)
        self._gathers = attention.label if gathers_first else ""
        # Where the plugin is enabled for another arm, schedules take its communicator unless told otherwise.
        self._pipeline: dict[str, Any] = {}
        if stock and recipe.degree("pipeline") > 1:
            groups = schedule_groups()
            self._pipeline = {"p2p_communicator": P2PCommunicator(groups.pp, config), "pg_collection": groups}
        seed_weights(self.chunks, train.seed)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=train.lr,
                min_lr=train.min_lr,
                weight_decay=train.weight_decay,
                adam_beta1=train.adam_beta1,
                adam_beta2=train.adam_beta2,
                clip_grad=train.clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=train.distributed_optimizer,
                overlap_param_gather=train.overlap_param_gather,
            ),
            self.chunks,
            use_gloo_process_groups=False,
        )
        self._schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=train.lr,
            min_lr=train.min_lr,
            lr_warmup_steps=train.warmup_steps,
            lr_decay_steps=train.steps,
            lr_decay_style="cosine",
            start_wd=train.weight_decay,
            end_wd=train.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if train.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._device = devices.current()
        for chunk in self.chunks:
            chunk.train()

    @property
    def runs(self) -> dict[str, str]:
        """What runs `expert`, `pipeline` and `context` communication, in words, where there is any; whether stages are
        left to Megatron is known after the first step."""
        runs, stock = {"expert": self.dispatcher}, self.dispatcher != "epv2"
        if self.recipe.degree("pipeline") > 1:
            ours = not stock and plugin.status()["pipeline"] == "epv2"
            runs["pipeline"] = "epv2" if ours else "stock P2P"
        if self.recipe.degree("context") > 1:
            runs["context"] = self._gathers or ("stock" if stock else plugin.status()["context"])
        return runs

    def step(self, batch: torch.Tensor) -> StepResult:
        """Train on one global batch.

        Args:
            batch: int64 `[global_batch_size, seq_length + 1]`, the same on every rank; each data-parallel rank takes
                its contiguous part.

        Raises:
            FloatingPointError: loss or gradient norm is not finite; raised on every rank.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        train, model = self.recipe.train, self.recipe.model
        mine = batch.chunk(self.recipe.data_parallel)[parallel_state.get_data_parallel_rank()]
        micro_batches = mine.split(train.micro_batch_size)
        outputs = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[iter(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=model.seq_length,
            micro_batch_size=train.micro_batch_size,
            forward_only=False,
            **self._pipeline,
        )
        self._schedule.num_steps = self.steps_done
        self._schedule.step(increment=1)
        updated, grad_norm, _ = self.optimizer.step()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        # One sum over all ranks: the last stage's tensor rank 0 of each data- and context-parallel rank puts its
        # losses in.
        counts = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        total = sum(float(output["loss"]) for output in outputs) if counts else 0.0
        tokens = train.global_batch_size * model.seq_length
        loss = torch.tensor([total], dtype=torch.float64, device=self._device)
        dist.all_reduce(loss)
        result = StepResult(loss=float(loss) / tokens, grad_norm=float(grad_norm), lr=lr, tokens=tokens)
        if not updated or not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise FloatingPointError(
                f"step {self.steps_done}: loss {result.loss}, gradient norm {result.grad_norm}: must be finite"
            )
        self.steps_done += 1
        return result

    def _forward(self, micro_batches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Any]:
        sequences_BS = next(micro_batches).to(self._device)
        positions_BS = torch.arange(sequences_BS.size(1) - 1, device=self._device).expand(sequences_BS.size(0), -1)
        rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        tokens_BS, labels_BS, positions_BS = (
            zigzag_split(t, 1, rank, size).contiguous()
            for t in (sequences_BS[:, :-1], sequences_BS[:, 1:], positions_BS)
        )
        return chunk(tokens_BS, positions_BS, None, labels=labels_BS), _loss

    def release(self) -> None:
        """Give the memory of weights, gradients and optimizer states back; the arm can't be used afterwards.

        Forgetting the arm would not do: Megatron's hooks on gradient accumulation keep it alive for ever.
        """
        held: list[Any] = []
        for chunk in self.chunks:
            held += [tensor for p in chunk.parameters() for tensor in (p, getattr(p, "main_grad", None))]
        for inner in checkpoint.inner_optimizers(self):
            held += [p for group in inner.param_groups for p in group["params"]]
            held += [value for state in inner.state.values() for value in state.values()]
        for tensor in held:
            if isinstance(tensor, torch.Tensor):
                tensor.untyped_storage().resize_(0)
        if devices.on_gpu():
            torch.cuda.empty_cache()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a checkpoint into `folder`; see `checkpoint.save`. Every rank must call it."""
        return checkpoint.save(self, Path(folder))

    def load(self, folder: str | os.PathLike[str]) -> Path:
        """Continue from the newest checkpoint in `folder`; see `checkpoint.load`. Every rank must call it."""
        return checkpoint.load(self, Path(folder))


def _loss(losses_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses_BS = losses_BS.float()
    # Megatron multiplies by the context-parallel size, and averages gradients over those ranks, too.
    mean = losses_BS.mean() / parallel_state.get_context_parallel_world_size()
    return mean, {"loss": losses_BS.detach().sum(dtype=torch.float64)}


def train(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    steps: int | None = None,
    dispatcher: str = "epv2",
    megatron_throughput: bool = False,
) -> int:
    """Train the recipe on this rank, writing `metrics.jsonl` and `checkpoints/` to `folder`, which is there and which
    rank 0 holds (`run_folder.taken`).

    SIGINT or SIGTERM on any rank ends it after the running step, with a checkpoint.

    Args:
        resume: continue from the newest checkpoint in `folder`; without one, begin and say so.
        steps: stop after this step of the recipe's schedule instead of its last.
        megatron_throughput: print a line per step in the manner of Megatron-LM's training log.

    Returns:
        The exit code: 0, or 130 if interrupted.
    """
    folder = Path(folder)
    checkpoints = folder / CHECKPOINTS
    stream = TokenStream(recipe)
    arm = Arm(recipe, dispatcher)
    if resume and checkpoint.latest(checkpoints) is not None:
        source = arm.load(checkpoints)
        logger.info("continuing from %s", source)
    elif resume:
        logger.info("no checkpoint in %s: beginning with step 0", checkpoints)
    is_first = dist.get_rank() == 0
    last = recipe.train.steps if steps is None else steps
    report = _Report(recipe, folder, arm.steps_done, last, megatron_throughput) if is_first else None
    dist.barrier()
    saved = arm.steps_done
    with Interrupts() as interrupts:
        while arm.steps_done < last:
            begin = devices.mark()
            result = arm.step(stream.sequences(arm.steps_done))
            end = devices.mark()
            devices.synchronize()
            seconds = devices.seconds_between(begin, end)
            if report is not None:
                report.step(arm.steps_done, result, seconds)
            interrupted = interrupts.anywhere()
            every = recipe.train.checkpoint_every
            if interrupted or arm.steps_done >= last or (every and arm.steps_done % every == 0):
                arm.save(checkpoints)
                saved = arm.steps_done
            if interrupted:
                break
        interrupted = interrupts.anywhere() and arm.steps_done < last
    if report is not None:
        report.close(checkpoint.latest(checkpoints), saved, interrupted)
    return INTERRUPTED if interrupted else 0


class Interrupts:
    """SIGINT and SIGTERM become a wish that all ranks learn of at the end of a step."""

    def __enter__(self) -> Interrupts:
        self._asked = False
        self._device = devices.current()
        self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        self._asked = True

    def anywhere(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call it."""
        asked = torch.tensor([int(self._asked)], device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Report:
    """`metrics.jsonl` and the progress that rank 0 prints."""

    def __init__(self, recipe: Recipe, folder: Path, first: int, last: int, megatron_throughput: bool):
        self._recipe, self._folder, self._last = recipe, folder, last
        self._megatron_throughput = megatron_throughput
        self._redraw = sys.stdout.isatty() and not megatron_throughput
        path = folder / METRICS
        kept = []
        if first and path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) < first]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a")  # noqa: SIM115 - closed by close()

    def step(self, done: int, result: StepResult, seconds: float) -> None:
        rate = result.tokens / seconds
        line = {
            "step": done - 1,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "step_ms": round(seconds * 1e3, 3),
            "tokens_per_s": round(rate, 1),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._megatron_throughput:
            flops = flops_per_token(self._recipe) * rate / dist.get_world_size()
            print(
                f" iteration {done:8d}/{self._last:8d} | consumed samples: "
                f"{done * self._recipe.train.global_batch_size:12d} | "
                f"elapsed time per iteration (ms): {seconds * 1e3:.1f} | "
                f"throughput per GPU (TFLOP/s/GPU): {flops / 1e12:.4f} | learning rate: {result.lr:.6E} | "
                f"global batch size: {self._recipe.train.global_batch_size:5d} | lm loss: {result.loss:.6E} | "
                f"grad norm: {result.grad_norm:.3f} |",
                flush=True,
            )
            return
        every = max(1, self._last // 20)
        if not self._redraw and done % every and done != self._last:
            return
        filled = 24 * done // self._last
        text = (
            f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{self._last}  loss {result.loss:.4f}  "
            f"{seconds * 1e3:.0f} ms/step  {rate:,.0f} tokens/s"
        )
        print(f"\r{text}\x1b[K" if self._redraw else text, end="" if self._redraw else "\n", flush=True)

    def close(self, newest: Path | None, saved: int, interrupted: bool) -> None:
        self._file.close()
        if self._redraw:
            print()
        if interrupted:
            print(f"interrupted after step {saved}: checkpoint {newest}; continue with --resume", flush=True)
        else:
            print(f"done: {saved} steps, metrics in {self._folder / METRICS}, checkpoint {newest}", flush=True)


def _step_of(line: str) -> float:
    """The step of a line of metrics; a line that a kill cut short counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def flops_per_token(recipe: Recipe) -> float:
    """Floating-point operations that forward and backward of one token need: 6 per weight that it meets (multiply and
    add, once forward and twice backward), and causal attention at half the sequence length. Recomputation not counted.
    """
    model, mla, moe, count = recipe.model, recipe.model.mla, recipe.model.moe, parameter_count(recipe)
    ahead = count.mtp + model.mtp_layers * model.hidden_size * model.vocab_size
    if model.first_dense_layers < model.num_layers:
        ahead -= model.mtp_layers * 3 * model.hidden_size * moe.ffn_hidden_size * (moe.num_experts - moe.top_k)
    head = mla.qk_head_dim + mla.qk_pos_emb_head_dim + mla.v_head_dim
    scores = (model.num_layers + model.mtp_layers) * model.num_attention_heads * head * model.seq_length / 2
    return 6 * (count.active + ahead + scores)
