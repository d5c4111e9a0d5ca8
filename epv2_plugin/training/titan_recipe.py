"""A recipe for torchtitan: a YAML with `torchtitan`, `model`, `data`, `train` and `plugin`, which `epv2 ab` runs."""

from __future__ import annotations

import importlib.util
import os

from pydantic import Field, PrivateAttr

from epv2_plugin.config import ConfigError, Document, PluginConfig, Section, parse, parse_config, read_yaml
from epv2_plugin.training.recipe import Data

ARMS = ("alltoall", "epv2")
SEED_FOLDER = ".epv2-torchtitan"  # in the folder of the report: the seed checkpoint; removed when the next run begins
# Flags that a recipe decides elsewhere, and where.
DECIDED_BY = {
    "training.steps": "train.steps",
    "training.seq_len": "model.seq_length",
    "training.local_batch_size": "train.global_batch_size",
    "training.global_batch_size": "train.global_batch_size",
    "parallelism.expert_parallel_degree": "plugin.parallel.expert",
    "parallelism.data_parallel_shard_degree": "train.processes",
    "debug.seed": "train.seed",
    "dump_folder": "--folder",
    "override.imports": "the arms",
}


class Titan(Section):
    """What torchtitan is started with: its `--module` and `--config`, and further flags by name."""

    module: str = "deepseek_v3"
    config: str = "deepseek_v3_debugmodel"
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)


class TitanModel(Section):
    """Sizes of the data; torchtitan's configuration decides the rest of the model."""

    seq_length: int = Field(ge=2)
    vocab_size: int = Field(ge=256)


class TitanTrain(Section):
    """The run. Parameters are sharded over all processes."""

    processes: int = Field(ge=1)
    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    seed: int = 1234


class TitanRecipe(Document):
    """A whole recipe for torchtitan."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    torchtitan: Titan
    model: TitanModel
    data: Data = Data()
    train: TitanTrain
    plugin: PluginConfig = PluginConfig()
    _source: str = PrivateAttr("<recipe>")

    @property
    def expert(self) -> int:
        """Ranks that share the experts of a layer."""
        degree = self.plugin.parallel.expert
        return 1 if degree == "auto" else degree

    @property
    def precision(self) -> str:
        """Of gathered parameters and what is computed with them: "fp32", or torchtitan's "bf16"."""
        return "fp32" if self.torchtitan.arguments.get("training.mixed_precision_param") == "float32" else "bf16"


def is_titan(path: str | os.PathLike[str]) -> bool:
    """Whether the recipe is one for torchtitan. Raises ConfigError where it can't be read."""
    return "torchtitan" in read_yaml(path)


def load_titan_recipe(path: str | os.PathLike[str], steps: int | None = None) -> TitanRecipe:
    """Read and check a recipe for torchtitan.

    Args:
        steps: instead of the recipe's.

    Raises:
        ConfigError: it can't be read, a key is unknown, or a value does not fit the others.
    """
    source, data = str(path), read_yaml(path)
    config = parse_config(data.pop("plugin", None), source, key="plugin")
    recipe = parse(TitanRecipe, {**data, "plugin": config}, source)
    if steps is not None:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
    recipe._source = source
    processes = recipe.train.processes
    if processes % recipe.expert:
        raise recipe.fail("plugin.parallel.expert", f"must divide train.processes ({processes})")
    if recipe.expert < 2:
        raise recipe.fail("plugin.parallel.expert", "must be 2 or more: without expert parallelism nothing travels")
    if recipe.train.global_batch_size % processes:
        raise recipe.fail("train.global_batch_size", f"must be a multiple of train.processes ({processes})")
    for name in recipe.torchtitan.arguments:
        if name in DECIDED_BY:
            raise ConfigError(
                source,
                f"torchtitan.arguments.{name}",
                recipe.torchtitan.arguments[name],
                f"{DECIDED_BY[name]} decides this",
            )
    return recipe


def check_titan_arms(recipe: TitanRecipe, arms: list[str], skew: float | None) -> None:
    """Refuse what an A/B of torchtitan can't compare.

    Raises:
        ConfigError: other arms than `ARMS`, a skewed routing, or torchtitan is not installed.
    """
    if sorted(arms) != sorted(ARMS):
        raise ConfigError(recipe.source, "--arms", ",".join(arms), f"must be {' and '.join(ARMS)} for torchtitan")
    if skew is not None:
        raise ConfigError(recipe.source, "--skew", skew, "only for recipes of Megatron-Core")
    if importlib.util.find_spec("torchtitan") is None:
        raise ConfigError(
            recipe.source, "torchtitan", "", "is not installed: pip install 'epv2_plugin[torchtitan]' (Python 3.11)"
        )
