"""Checkpoints of one arm by torch's distributed checkpoint, named so that another layout can read them.

A tensor is stored under its global layer and expert number. Without the distributed optimizer a checkpoint therefore
loads under any expert, pipeline and data-parallel degree; the distributed optimizer's state belongs to ranks.

    FOLDER/latest         name of the newest complete checkpoint
    FOLDER/step_00000040/ one checkpoint: torch's files and state.json
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import checkpoint as dcp

from epv2_plugin.training.model import global_buffers, global_parameters
from epv2_plugin.training.recipe import Recipe
from epv2_plugin.training.run_folder import LATEST

if TYPE_CHECKING:
    from epv2_plugin.training.trainer import Arm

logger = logging.getLogger("epv2_plugin")

STATE = "state.json"


_STATE_KEYS = {"step", "layout", "model", "train", "data", "group_step"}


class CheckpointError(RuntimeError):
    """There is no checkpoint to load, or it is damaged."""


def save(arm: Arm, folder: Path) -> Path:
    """Write the arm's state to a new folder in `folder`, name it in `latest`, and return it. Every rank must call it.

    Until everything is on disk the folder has a name that nobody reads.
    """
    for chunk in arm.chunks:
        if arm.recipe.train.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    target = folder / f"step_{arm.steps_done:08d}"
    part, old = folder / f".{target.name}.part", folder / f".{target.name}.old"
    if dist.get_rank() == 0:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    writer = dcp.FileSystemWriter(part, single_file_per_rank=True, sync_files=True)
    dcp.save({**_model_tensors(arm), **_optimizer_tensors(arm), **_random_states()}, storage_writer=writer)
    dist.barrier()
    if dist.get_rank() == 0:
        state = {
            "step": arm.steps_done,
            "layout": _layout(arm.recipe),
            "model": arm.recipe.model.model_dump(),
            "train": arm.recipe.train.model_dump(),
            "data": arm.recipe.data.model_dump(),
            "group_step": _group_step(arm),
        }
        _write(part / STATE, json.dumps(state, indent=1))
        if target.exists():
            target.rename(old)
        part.rename(target)
        _write(folder / LATEST, target.name)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return target


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, None if there has been none.

    Raises:
        CheckpointError: `latest` names a checkpoint that is not there.
    """
    try:
        name = (folder / LATEST).read_text().strip()
    except FileNotFoundError:
        return None
    if not (folder / name / STATE).is_file():
        raise CheckpointError(f"{folder / LATEST} names {name!r}, which is not a complete checkpoint in {folder}")
    return folder / name


def load(arm: Arm, folder: Path) -> Path:
    """Bring the arm to the state of the newest checkpoint in `folder` and return that. Every rank must call it.

    Raises:
        CheckpointError: none there, or unreadable.
        ConfigError: it was written by a model or a layout that this recipe's can't take over.
    """
    source = latest(folder)
    if source is None:
        raise CheckpointError(f"no checkpoint in {folder}")
    try:
        state = json.loads((source / STATE).read_text())
        if missing := _STATE_KEYS - set(state):
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source / STATE} is damaged: {error}") from None
    _check(arm.recipe, state, source)
    reader = dcp.FileSystemReader(source)
    try:
        stored = reader.read_metadata().state_dict_metadata
        _allocate_optimizer_state(arm, stored)
        tensors = {**_model_tensors(arm), **_optimizer_tensors(arm)}
        random_states = _random_states() if state["layout"] == _layout(arm.recipe) else {}
        dcp.load({**tensors, **random_states}, storage_reader=reader)
    except (Exception, dcp.api.CheckpointException) as error:  # bytes that make no pickle can raise anything
        raise CheckpointError(f"{source} can't be loaded: {_reason(error)}") from error
    if random_states:
        _set_random_states(random_states)
    if state["group_step"] is not None:
        for inner in inner_optimizers(arm):
            for group in inner.param_groups:
                group["step"] = state["group_step"]
    arm.steps_done = state["step"]
    return source


def _reason(error: BaseException) -> str:
    """One line; torch's own exception, which all ranks raise, holds a traceback of each rank that failed."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(error).__name__} {error}".split())[:300]


def _layout(recipe: Recipe) -> dict[str, Any]:
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    return {
        **{f"plugin.parallel.{name}": getattr(recipe.plugin.parallel, name) for name in names},
        "train.processes": recipe.train.processes,
        "train.precision": recipe.train.precision,
        "train.distributed_optimizer": recipe.train.distributed_optimizer,
    }


def _check(recipe: Recipe, state: dict[str, Any], source: Path) -> None:
    if state["model"] != recipe.model.model_dump():
        changed = [key for key, value in recipe.model.model_dump().items() if state["model"].get(key) != value]
        raise recipe.fail(f"model.{changed[0]}", f"the checkpoint {source} has {state['model'].get(changed[0])!r}")
    fixed = {"plugin.parallel.tensor", "train.precision", "train.distributed_optimizer"}
    for key, value in _layout(recipe).items():
        if state["layout"][key] != value and (key in fixed or recipe.train.distributed_optimizer):
            raise recipe.fail(key, f"the checkpoint {source} can only be loaded with {state['layout'][key]!r}")
    for section in ("train", "data"):
        for name, value in getattr(recipe, section).model_dump().items():
            before = state[section].get(name)
            if before != value and f"{section}.{name}" not in _layout(recipe) and dist.get_rank() == 0:
                logger.warning(
                    "%s.%s = %r from here on; the checkpoint %s had %r", section, name, value, source, before
                )


def _write(path: Path, text: str) -> None:
    """Replace a file in one step, after its content is on disk."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _suffix(recipe: Recipe) -> str:
    return f"@tensor{parallel_state.get_tensor_model_parallel_rank()}" if recipe.degree("tensor") > 1 else ""


def _model_tensors(arm: Arm) -> dict[str, torch.Tensor]:
    suffix = _suffix(arm.recipe)
    named = [*global_parameters(arm.chunks), *global_buffers(arm.chunks)]
    return {f"model.{name}{suffix}": tensor.detach() for name, tensor in named}


def inner_optimizers(arm: Arm) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's: one for dense and one for expert parameters."""
    chained = getattr(arm.optimizer, "chained_optimizers", [arm.optimizer])
    return [optimizer.optimizer for optimizer in chained if optimizer.optimizer is not None]


def _group_step(arm: Arm) -> Any:
    """The step count that Transformer Engine's optimizer keeps in its groups; torch's keeps one with each parameter."""
    return next(
        (group["step"] for inner in inner_optimizers(arm) for group in inner.param_groups if "step" in group), None
    )


def _optimizer_parameters(arm: Arm) -> dict[str, tuple[torch.optim.Optimizer, torch.Tensor, bool]]:
    """Key -> (optimizer, the parameter that it updates, whether that is a copy of the model's)."""
    names, suffix = {}, _suffix(arm.recipe)
    for name, parameter in global_parameters(arm.chunks):
        names[id(parameter)] = name
        names[id(getattr(parameter, "main_param", parameter))] = name
    models = {id(parameter) for _, parameter in global_parameters(arm.chunks)}
    found = {}
    for number, inner in enumerate(inner_optimizers(arm)):
        position = 0
        for group in inner.param_groups:
            for parameter in group["params"]:
                if arm.recipe.train.distributed_optimizer:
                    key = f"optimizer.rank{dist.get_rank()}.{number}.{position}"
                else:
                    key = f"optimizer.{names[id(parameter)]}{suffix}"
                found[key] = (inner, parameter, id(parameter) not in models)
                position += 1
    return found


def _optimizer_tensors(arm: Arm) -> dict[str, torch.Tensor]:
    tensors = {}
    for key, (inner, parameter, is_copy) in _optimizer_parameters(arm).items():
        for field, value in inner.state[parameter].items():
            tensors[f"{key}/{field}"] = value
        if is_copy:
            tensors[f"{key}/main"] = parameter.detach()
    return tensors


def _allocate_optimizer_state(arm: Arm, stored: dict[str, Any]) -> None:
    """Make room for the state that the checkpoint holds: an optimizer that has made no step has none yet."""
    fields: dict[str, dict[str, Any]] = {}
    for name, metadata in stored.items():
        key, slash, field = name.rpartition("/")
        if slash and field != "main":
            fields.setdefault(key, {})[field] = metadata
    for key, (inner, parameter, _) in _optimizer_parameters(arm).items():
        for field, metadata in fields.get(key, {}).items():
            device = parameter.device if metadata.size == parameter.size() else "cpu"
            inner.state[parameter][field] = torch.zeros(metadata.size, dtype=metadata.properties.dtype, device=device)


def _random_states() -> dict[str, torch.Tensor]:
    prefix = f"random.rank{dist.get_rank()}"
    states = {f"{prefix}.cpu": torch.get_rng_state(), f"{prefix}.device": torch.cuda.get_rng_state()}
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[f"{prefix}.tracker.{name}"] = state
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    prefix = f"random.rank{dist.get_rank()}"
    torch.cuda.set_rng_state(states[f"{prefix}.device"])
    torch.set_rng_state(states[f"{prefix}.cpu"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({name: states[f"{prefix}.tracker.{name}"] for name in tracker.get_states()})
