"""YAML -> `PluginConfig`: parallel degrees, SM budgets, and one section for each communication primitive.

Every key has a default, so an empty file is a valid configuration. Mistakes raise `ConfigError`, one line that names
the file, the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

# The bound belongs to the number alone: on the whole union it would be asked of "auto", too.
Count = Annotated[int, Field(ge=1)] | Literal["auto"]
Rate = Annotated[float, Field(gt=0)] | Literal["auto"]


class _NotGiven:
    """The value, in messages, of a key that is not there."""

    def __repr__(self) -> str:
        return "(not given)"


class ConfigError(ValueError):
    """A configuration that can't be used; the message is one line: file: key = value: what is allowed."""

    def __init__(self, source: str, key: str = "", value: object = None, allowed: str = ""):
        self.source, self.key, self.value, self.allowed = source, key, value, allowed
        # Megatron raises errors anew as type(error)(text), to say which module it was building.
        super().__init__(f"{source}: {key} = {value!r}: {allowed}" if key else source)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.key, self.value, self.allowed)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


class Section(BaseModel):
    """Base of every section: unknown keys and loose types ("4" for 4, 1 for true) are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, data: Any) -> Any:
        """YAML reads a section whose keys are all commented out as null."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        sections = {k for k in data if k in fields and _is_section(fields[k].annotation)}
        return {k: {} if v is None and k in sections else v for k, v in data.items()}


class Parallel(Section):
    """Parallel degrees. `auto` takes what the framework was started with; a number must agree with it."""

    expert: Count = "auto"
    pipeline: Count = "auto"
    context: Count = "auto"
    tensor: Count = "auto"
    virtual_pipeline: Count = "auto"


class SmBudget(Section):
    """CTAs (thread blocks, one per SM) that each primitive may hold; `auto` asks the analytic model.

    `context` is for the sum of key and value gradients and `fsdp` for that of parameters' gradients, 0 = 8;
    gathers and the pipeline take none.
    """

    expert: Count = "auto"
    pipeline: int = Field(default=0, ge=0)
    context: int = Field(default=0, ge=0)
    fsdp: int = Field(default=0, ge=0)


class Expert(Section):
    """Token dispatch and combine."""

    mode: Literal["auto", "direct", "hybrid"] = "auto"
    layout: Literal["expanded", "compact"] = "expanded"
    dispatch_dtype: Literal["bf16", "fp8"] = "bf16"
    max_tokens_per_rank: Count = "auto"
    host_sync: bool = True


class Pipeline(Section):
    """Activations between pipeline stages. `transport`: `auto` = the plugin's, but Megatron's own where queues,
    lengths that vary or graphs do not allow it, and between nodes of GPUs, where it has not run over a network yet;
    `copy_engine` = the plugin's or an error. `max_tensor_bytes: auto`: no limit on the host, on a GPU what the largest
    tensor so far has. `max_inplace`: received tensors that may lie, on a GPU, where they have arrived, each in
    `max_tensor_bytes` that are set aside; others are copied out of a ring. Not with what relies on torch's
    `record_stream` for activations, such as their offloading."""

    transport: Literal["auto", "copy_engine", "stock"] = "auto"
    max_inflight: int = Field(default=4, ge=1)
    max_tensor_bytes: Count = "auto"
    max_inplace: int = Field(default=0, ge=0)


class Context(Section):
    """Keys and values between context-parallel ranks. `auto` = the plugin's for local specs, whose attention has none;
    `all_gather` = for Transformer Engine's `cp_comm_type` "all_gather", too."""

    kv_exchange: Literal["auto", "all_gather", "stock"] = "auto"


class Fsdp(Section):
    """Parameter all-gather and gradient reduce-scatter of FSDP2.

    `window_bytes` bounds the gathered parameters that are under way at once, and as many again of unreduced gradients;
    `auto` takes twice the model's largest layer, so that one can be fetched ahead, and more where more are prefetched
    by name. On a GPU both are allocated when it is applied, in slots of the largest layer; between nodes as much again
    for what is to be summed, and a rank's part of what is gathered.
    """

    collectives: Literal["auto", "stock"] = "auto"
    window_bytes: Count = "auto"


class Network(Section):
    """Link rates in GB/s and queue pairs; `auto` detects them, and an undetected rate is an error, never zero."""

    rdma_gbytes_per_s: Rate = "auto"
    scale_up_gbytes_per_s: Rate = "auto"
    qps: Count = "auto"


class Timeouts(Section):
    """Seconds until a wait gives up and every rank raises."""

    gpu_seconds: int = Field(default=100, ge=1)
    host_seconds: int = Field(default=300, ge=1)


class Document(Section):
    """A whole file, whose errors name it."""

    _source: str = PrivateAttr("<defaults>")

    @property
    def source(self) -> str:
        """Where it came from, for messages."""
        return self._source

    def fail(self, key: str, allowed: str) -> ConfigError:
        """The error for `key` (dotted), with the value that is there."""
        value: Any = self
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        return ConfigError(self.source, key, value, allowed)


class PluginConfig(Document):
    """The whole plugin configuration."""

    parallel: Parallel = Parallel()
    backend: Literal["auto", "cuda", "host"] = "auto"
    sm_budget: SmBudget = SmBudget()
    expert: Expert = Expert()
    pipeline: Pipeline = Pipeline()
    context: Context = Context()
    fsdp: Fsdp = Fsdp()
    network: Network = Network()
    timeouts: Timeouts = Timeouts()

    def check_degrees(self, framework: str, **degrees: int) -> None:
        """Check that what is configured of `parallel` is what `framework` was started with.

        Raises:
            ConfigError: a degree differs.
        """
        for name, degree in degrees.items():
            if getattr(self.parallel, name) not in ("auto", degree):
                raise self.fail(f"parallel.{name}", f"{framework} was started with {degree}")

    def check(
        self,
        *,
        num_experts: int | None = None,
        world_size: int | None = None,
        expert_tensor: int = 1,
        device_sms: int | None = None,
    ) -> None:
        """Check what can only be judged with the model and the machine at hand.

        Args:
            num_experts: experts of the model, `None` = unknown.
            world_size: ranks of the job, `None` = unknown.
            expert_tensor: tensor-parallel degree inside an expert.
            device_sms: SMs of the device, `None` = no CUDA device.

        Raises:
            ConfigError: a degree does not divide what it must, or a budget exceeds the device.
        """
        expert = self.parallel.expert
        if expert != "auto":
            if num_experts is not None and num_experts % expert:
                raise self.fail("parallel.expert", f"must divide the {num_experts} experts of the model")
            if world_size is not None:
                pipeline = 1 if self.parallel.pipeline == "auto" else self.parallel.pipeline
                if world_size % (expert * expert_tensor * pipeline):
                    raise self.fail(
                        "parallel.expert",
                        f"times pipeline {pipeline} times expert tensor parallelism {expert_tensor} must divide the "
                        f"world size of {world_size} ranks",
                    )
        if world_size is not None:
            product = 1
            for name in ("tensor", "context", "pipeline"):
                degree = getattr(self.parallel, name)
                product *= 1 if degree == "auto" else degree
                if world_size % product:
                    raise self.fail(
                        f"parallel.{name}",
                        f"tensor x context x pipeline ({product}) must divide the world size of {world_size} ranks",
                    )
        if device_sms is not None:
            for name in ("expert", "pipeline", "context", "fsdp"):
                budget = getattr(self.sm_budget, name)
                if budget != "auto" and budget > device_sms:
                    raise self.fail(f"sm_budget.{name}", f"at most the device's {device_sms} SMs")


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], data: object, source: str, *, key: str = "") -> Model:
    """Validate `data` as `model`; on failure raise one `ConfigError` for the first mistake.

    `key` is the dotted place of `data` inside `source`, for sections of a larger file.
    """
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(source, key or "(top level)", data, "must be a mapping of keys to values")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A wrong type makes one error for each member of a union; the first of a location names it well enough.
        first = _misspelt(details) or details[0]
        location = [str(part) for part in first["loc"]]
        value = first.get("input")
        if first["type"] == "missing":
            value, allowed = _NotGiven(), "must be given"  # pydantic's input is the whole section
        elif first["type"] == "extra_forbidden":
            allowed = _unknown_key(model, location)
        else:
            location = _strip_union_members(model, location)
            same = [d for d in details if _strip_union_members(model, [str(p) for p in d["loc"]]) == location]
            allowed = " or ".join(dict.fromkeys(_explain(d) for d in same))
        dotted = ".".join(([key] if key else []) + location)
        raise ConfigError(source, dotted, value, allowed) from None


def _misspelt(details: list[Any]) -> Any:
    """The error of the unknown key that is meant to be the key whose absence is the first error."""
    *section, name = details[0]["loc"]
    if details[0]["type"] != "missing":
        return None
    unknown = {d["loc"][-1]: d for d in details if d["type"] == "extra_forbidden" and list(d["loc"][:-1]) == section}
    close = difflib.get_close_matches(name, unknown, n=1, cutoff=0.5)
    return unknown[close[0]] if close else None


def _owner(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """The section class that holds the last part of `location`."""
    for part in location[:-1]:
        field = model.model_fields.get(part)
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [c for c in candidates if _is_section(c)]
        if not inner:
            break
        model = inner[0]
    return model


def _strip_union_members(model: type[BaseModel], location: list[str]) -> list[str]:
    """Drop what pydantic appends to a location for members of a union ("int", "literal['auto']")."""
    kept: list[str] = []
    current: type[BaseModel] | None = model
    for part in location:
        if current is None or part not in current.model_fields:
            break
        kept.append(part)
        annotation = current.model_fields[part].annotation
        inner = [c for c in (annotation, *get_args(annotation)) if _is_section(c)]
        current = inner[0] if inner else None
    return kept or location


def _unknown_key(model: type[BaseModel], location: list[str]) -> str:
    valid = [name for name, field in _owner(model, location).model_fields.items()]
    close = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
    hint = f"unknown key, did you mean {close[0]!r}? " if close else "unknown key; "
    return f"{hint}allowed: {', '.join(valid)}"


def _explain(detail: Any) -> str:
    message = str(detail["msg"])
    if detail["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "must be a mapping of keys to values"
    return message.replace("Input should be", "must be", 1) if message.startswith("Input should be") else message


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(str(path), "(file)", str(path), f"can't be read: {reason}") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "(file)"
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise ConfigError(str(path), where, "", f"not valid YAML: {problem}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(str(path), "(top level)", data, "must be a mapping of keys to values")
    return data


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; here that is an error. Reads 1e-3 as a number, too."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # such as a list
                raise yaml.constructor.ConstructorError(None, None, "keys must be words", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_UniqueKeyLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_config(data: object, source: str, *, key: str = "") -> PluginConfig:
    """A `PluginConfig` from parsed YAML; `source` and `key` say where it stood.

    Raises:
        ConfigError: see `parse`.
    """
    config = parse(PluginConfig, data, source, key=key)
    config._source = f"{source}: {key}" if key else source
    return config


def load_config(config: str | os.PathLike[str] | dict[str, Any] | PluginConfig | None) -> PluginConfig:
    """A `PluginConfig` from a YAML file, a mapping, another `PluginConfig`, or nothing (the defaults).

    Raises:
        ConfigError: see `parse` and `read_yaml`.
    """
    if isinstance(config, PluginConfig):
        return config
    if config is None:
        return PluginConfig()
    if isinstance(config, dict):
        return parse_config(config, "<dict>")
    if not isinstance(config, str | os.PathLike):
        raise ConfigError("<argument>", "config", config, "must be a path, a mapping, a PluginConfig or None")
    return parse_config(read_yaml(config), str(config))
