"""The plan as data: what is exchanged, on which machine, and the model's prediction for every EP size."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from epv2_plugin.config import ConfigError, PluginConfig, parse_config, read_yaml
from epv2_plugin.elastic import model, network, sizing

COMMAND = "epv2 plan"
SCHEMA = 1  # of the JSON file
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GPUS_PER_NODE = 8
DEFAULT_GPU = "NVIDIA H100"
# SMs of the GPUs in `model.NVLINK_GBYTES_PER_S`, as sold for data centres.
NUM_SMS = {
    "H20": 78,
    "H100": 132,
    "H200": 132,
    "H800": 132,
    "GH200": 132,
    "B200": 148,
    "B300": 148,
    "GB200": 152,
    "GB300": 152,
}
# Names of what is often asked about, and can't run the kernels.
_BEFORE_HOPPER = ("V100", "T4", "A10", "A30", "A40", "A100", "A800", "L4", "L20", "L40", "L40S")
_ROW_NUMBERS = 1 << 31  # kernels number the tokens of all ranks by an int32
# What `assume` may name, and its smallest value.
ASSUMABLE = {
    "sms": 4.0,
    "sm_read_gbytes_per_s": 1e-3,
    "sm_write_gbytes_per_s": 1e-3,
    "memory_gbytes_per_s": 1e-3,
    "scale_up_gbytes_per_s": 1e-3,
    "rdma_gbytes_per_s": 1e-3,
    "nic_messages_per_us": 1e-3,
    "overhead_us": 0.0,
    "network_us": 0.0,
    "capacity_factor": 1.0,
}


@dataclass(frozen=True)
class Workload:
    """What every rank exchanges in a MoE layer. `origin`: where each number comes from."""

    tokens: int
    hidden: int
    topk: int
    experts: int
    groups: int = 1
    topk_groups: int = 1
    dtype: Literal["bf16", "fp8"] = "bf16"
    layout: Literal["expanded", "compact"] = "expanded"
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Assumption:
    """A number of the machine that the prediction rests on, where it comes from, and how to give another."""

    name: str
    value: float
    unit: str
    source: str
    override: str


def load(path: str | os.PathLike[str], options: Mapping[str, Any]) -> tuple[PluginConfig, Workload]:
    """The plugin configuration and the workload that a plugin YAML, or a recipe, and options describe.

    Args:
        path: a plugin configuration, or a recipe (a YAML with `model`).
        options: fields of `Workload` as given on the command line; None = not given.

    Raises:
        ConfigError: the file is wrong, or numbers do not go together.
    """
    data = read_yaml(path)
    if "model" in data:
        from epv2_plugin.training.recipe import load_recipe

        recipe = load_recipe(path)
        moe, train, config = recipe.model.moe, recipe.train, recipe.plugin
        shards = recipe.degree("tensor") * recipe.degree("context")
        values: dict[str, Any] = {
            "tokens": max(1, train.micro_batch_size * recipe.model.seq_length // shards),
            "hidden": recipe.model.hidden_size,
            "topk": moe.top_k,
            "experts": moe.num_experts,
            "groups": moe.num_groups or 1,
            "topk_groups": moe.group_top_k or 1,
        }
        origin = dict.fromkeys(values, "recipe's model") | {"tokens": "recipe's micro-batch"}
    else:
        config = parse_config(data, str(path))
        values = {"tokens": 4096, "hidden": 7168, "topk": 8, "experts": 256, "groups": 1, "topk_groups": 1}
        origin = dict.fromkeys(values, "DeepSeek-V3's") | dict.fromkeys(("groups", "topk_groups"), "no limit")
    expert = config.expert
    values |= {"dtype": expert.dispatch_dtype, "layout": expert.layout}
    origin |= {"dtype": "expert.dispatch_dtype", "layout": "expert.layout"}
    if expert.max_tokens_per_rank != "auto":
        values["tokens"], origin["tokens"] = expert.max_tokens_per_rank, "expert.max_tokens_per_rank"
    if (options.get("groups") is None) != (options.get("topk_groups") is None):
        missing = "--topk-groups" if options.get("topk_groups") is None else "--groups"
        raise ConfigError(COMMAND, missing, None, "--groups and --topk-groups go together")
    for name, value in options.items():
        if value is not None:
            values[name], origin[name] = value, f"--{name.replace('_', '-')}"
    workload = Workload(**values, origin=origin)
    _check(workload)
    return config, workload


def _check(workload: Workload) -> None:
    experts, groups, chosen = workload.experts, workload.groups, workload.topk_groups
    given = {name for name, origin in workload.origin.items() if origin.startswith("--")}
    if experts % groups and "groups" not in given:
        allowed = f"must be a multiple of the {groups} groups ({workload.origin['groups']})"
        raise ConfigError(COMMAND, "--experts", experts, f"{allowed}; --groups and --topk-groups set others")
    if experts < workload.topk and "topk" not in given:
        allowed = f"must be {workload.topk} or more, the top-k ({workload.origin['topk']}); --topk sets another"
        raise ConfigError(COMMAND, "--experts", experts, allowed)
    if experts % groups:
        raise ConfigError(COMMAND, "--groups", groups, f"must divide the {experts} experts")
    if chosen > groups:
        raise ConfigError(COMMAND, "--topk-groups", chosen, f"at most the {groups} groups")
    reachable = experts // groups * chosen
    if workload.topk > min(reachable, sizing.MAX_TOPK):
        limit = f"the {reachable} experts that a token may use" if reachable <= sizing.MAX_TOPK else sizing.MAX_TOPK
        raise ConfigError(COMMAND, "--topk", workload.topk, f"at most {limit}")


def check_assumed(name: str, value: float) -> None:
    """Raise `ConfigError` unless `name` can be assumed to be `value`."""
    least = ASSUMABLE.get(name)
    if least is None:
        raise ConfigError(COMMAND, "--assume", name, f"must be one of {', '.join(ASSUMABLE)}")
    whole = name == "sms"
    if not least <= value < math.inf or (whole and value % 1):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(COMMAND, f"--assume {name}", value, f"must be {kind} from {least:g} on, not inf or nan")


def knows_network(config: PluginConfig, gpus_per_node: int, assume: Mapping[str, float]) -> bool:
    """Whether the rate across nodes is given or found here."""
    wanted = assume.get("rdma_gbytes_per_s", config.network.rdma_gbytes_per_s)
    try:
        network.rdma_rate(wanted, gpus_per_node=gpus_per_node)
    except ValueError:
        return False
    return True


def topologies(config: PluginConfig, ep_sizes: Sequence[int], gpus_per_node: int) -> list[model.Topology]:
    """Nodes for each EP size: one, not full, for less than a node has, else whole ones.

    Raises:
        ConfigError: an EP size that is neither.
    """
    found = []
    for ep in ep_sizes:
        if ep > gpus_per_node and ep % gpus_per_node:
            allowed = f"at most one node of {gpus_per_node} GPUs, or a multiple (--gpus-per-node)"
            if ep == config.parallel.expert:
                raise config.fail("parallel.expert", allowed)
            raise ConfigError(COMMAND, "--ep", ep, allowed)
        found.append(model.Topology(-(-ep // gpus_per_node), min(ep, gpus_per_node)))
    return found


def machine(
    config: PluginConfig,
    gpu: str | None,
    places: Sequence[model.Topology],
    gpus_per_node: int,
    assume: Mapping[str, float],
) -> tuple[model.Machine, float, list[Assumption]]:
    """The machine to predict for, the capacity factor of its buffers, and every number that was assumed.

    Args:
        gpu: name of the GPU; None = the one here, else an H100.
        places: what is planned for; a rate that none of them needs is not asked for.
        gpus_per_node: GPUs that share the NICs of a node.
        assume: numbers to use instead, by their names in `ASSUMABLE`.

    Raises:
        ConfigError: a rate is neither given nor known; the message names what to set.
    """
    facts: list[Assumption] = []

    def fact(name: str, unit: str, value: float, source: str, override: str = "") -> float:
        if name in assume:
            value, source = assume[name], "--assume"
        facts.append(Assumption(name, value, unit, source, override or f"--assume {name}=X"))
        return value

    gpu, sms, gpu_source = _gpu(gpu, "sms" in assume)
    num_sms = int(fact("sms", "", sms, gpu_source, "--gpu NAME, --assume sms=X"))
    try:
        rates = model.load_rates(gpu)
    except ValueError as error:
        raise ConfigError(COMMAND, "copy rates", gpu, str(error)) from None
    first, source = rates.points[0], rates.source
    read = fact(
        "sm_read_gbytes_per_s", "GB/s", first.read, f"{source}, {first.sms} SMs busy", "epv2 bench sm, --assume"
    )
    write = fact("sm_write_gbytes_per_s", "GB/s", first.write, f"{source}, {first.sms} SMs busy", facts[-1].override)
    memory = fact("memory_gbytes_per_s", "GB/s", rates.memory, f"{source}, all SMs copying", facts[-1].override)
    rates = rates.override(read, write, memory)

    link = nic = math.inf
    per_us, hops = model.NIC_MESSAGES_PER_US, model.NETWORK_US
    given = config.network
    if any(place.gpus_per_node > 1 for place in places):
        wanted = assume.get("scale_up_gbytes_per_s", given.scale_up_gbytes_per_s)
        key = "network.scale_up_gbytes_per_s"
        try:
            link = model.scale_up_rate(gpu, wanted)
        except ValueError as error:
            raise _unknown(config, key, error) from None
        source = f"NVLink of {gpu}, {model.LINK_EFFICIENCY:.0%} of nominal" if wanted == "auto" else f"{key}, as it is"
        link = fact("scale_up_gbytes_per_s", "GB/s", link, source, key)
    if any(place.nodes > 1 for place in places):
        wanted = assume.get("rdma_gbytes_per_s", given.rdma_gbytes_per_s)
        try:
            nic, source = network.rdma_rate(wanted, gpus_per_node=gpus_per_node)
        except ValueError as error:
            raise _unknown(config, network.KEY, error) from None
        nic = fact("rdma_gbytes_per_s", "GB/s", nic, source, network.KEY)
        per_us = fact("nic_messages_per_us", "M/s", per_us, "assumed, a quarter of a 400 Gbit/s NIC's")
        hops = fact("network_us", "us", hops, "assumed: two one-way hops, across nodes only")
    overhead = fact("overhead_us", "us", model.OVERHEAD_US, "prototype on an H200: launches, flags, metadata")
    factor = fact("capacity_factor", "", sizing.CAPACITY_FACTOR, "room for rows, over those of balanced routing")
    return (
        model.Machine(
            gpu,
            num_sms,
            rates,
            link,
            nic_gbytes_per_s=nic,
            nic_messages_per_us=per_us,
            overhead_us=overhead,
            network_us=hops,
        ),
        factor,
        facts,
    )


def _unknown(config: PluginConfig, key: str, error: ValueError) -> ConfigError:
    """`error` of a rate that is "auto" and not known, with the file's name and the option that does as well."""
    allowed = str(error).partition(": ")[2]
    return config.fail(key, f"{allowed} (or --assume {key.partition('.')[2]}=X)")


def _gpu(name: str | None, sms_given: bool) -> tuple[str, int, str]:
    """Name and SMs of the GPU to predict for, and where they come from."""
    if name is None:
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            if properties.major < 9:
                raise _too_old(properties.name)
            return properties.name, properties.multi_processor_count, f"{properties.name}, the GPU here"
        return DEFAULT_GPU, NUM_SMS["H100"], f"{DEFAULT_GPU}, as there is no GPU here"
    words = name.upper().replace("-", " ").replace("_", " ").split()
    if not set(words).isdisjoint(_BEFORE_HOPPER):
        raise _too_old(name)
    known = [sms for gpu, sms in NUM_SMS.items() if gpu in words]
    if not known and not sms_given:
        allowed = f"SMs unknown; one of {', '.join(NUM_SMS)}, or --assume sms=X"
        raise ConfigError(COMMAND, "--gpu", name, allowed)
    return name, known[0] if known else 0, f"{name} (--gpu)"


def _too_old(gpu: str) -> ConfigError:
    return ConfigError(COMMAND, "--gpu", gpu, f"the kernels need Hopper or newer: one of {', '.join(NUM_SMS)}")


def expert_slots(experts: int, ranks: int, groups: int) -> int:
    """Experts with redundant copies: the same number on every rank, and in every group (copies stay in the group)."""
    return sizing.align(experts, math.lcm(ranks, groups))


def document(
    source: str,
    config: PluginConfig,
    workload: Workload,
    places: Sequence[model.Topology],
    rank: model.Machine,
    capacity_factor: float,
    assumptions: Sequence[Assumption],
    left_out: Sequence[int] = (),
) -> dict[str, Any]:
    """Everything that the report says, ready for JSON.

    Args:
        left_out: EP sizes that are not planned because the rate across nodes is not known.

    Raises:
        ConfigError: the SM budget exceeds the GPU, or there are more tokens than row numbers.
    """
    largest = max(place.ranks for place in places)
    if workload.tokens * largest >= _ROW_NUMBERS:
        most = (_ROW_NUMBERS - 1) // largest
        allowed = f"at most {most} at EP{largest}: rows of all ranks are numbered in 31 bits"
        raise ConfigError(COMMAND, "--tokens", workload.tokens, allowed)
    budget = None if config.sm_budget.expert == "auto" else config.sm_budget.expert
    if budget is not None and budget > rank.num_sms:
        raise config.fail("sm_budget.expert", f"at most the {rank.num_sms} SMs of {rank.gpu}")
    planner = _Planner(config, workload, rank, capacity_factor, budget)
    sizes = [place.ranks for place in places]
    asked = config.parallel.expert if config.parallel.expert in sizes else sizes[0] if len(sizes) == 1 else None
    return {
        "schema": SCHEMA,
        "kind": "plan",
        "config": source,
        "mode": config.expert.mode,
        "sm_budget": config.sm_budget.expert,
        "qps": config.network.qps,
        "workload": asdict(workload),
        "machine": model.as_dict(rank),
        "assumptions": [asdict(fact) for fact in assumptions],
        "asked_ep": asked,
        "left_out": list(left_out),
        "points": [planner.point(place) for place in places],
    }


@dataclass(frozen=True)
class _Planner:
    config: PluginConfig
    workload: Workload
    rank: model.Machine
    capacity_factor: float
    budget: int | None

    def point(self, place: model.Topology) -> dict[str, Any]:
        """The prediction for one EP size; `modes`: the one that would run first."""
        work = self.workload
        slots = expert_slots(work.experts, place.ranks, work.groups)
        shape = model.Shape(
            work.tokens,
            work.hidden,
            work.topk,
            slots,
            place.ranks,
            fp8=work.dtype == "fp8",
            expanded=work.layout == "expanded",
            groups=work.groups,
            topk_groups=work.topk_groups,
        )
        found = model.choices(shape, place, self.rank, self.budget)
        wanted = self.config.expert.mode
        found.sort(key=lambda choice: wanted not in ("auto", choice.mode))  # stable: what is asked for comes first
        # One node has room for every token of every rank.
        linear = sizing.Nodes(place.ranks, place.ranks)
        return {
            "ep": place.ranks,
            "nodes": place.nodes,
            "gpus_per_node": place.gpus_per_node,
            "expert_slots": slots,
            "ranks_per_token": model.distinct_ranks(shape),
            "nodes_per_token": model.distinct_nodes(shape, place.nodes),
            "linear_window_bytes": _window(linear, shape).num_bytes,
            "modes": [self._mode(choice, shape, place) for choice in found],
        }

    def _mode(self, choice: model.Choice, shape: model.Shape, place: model.Topology) -> dict[str, Any]:
        qps = model.num_qps(choice.num_sms, place.nodes)
        if qps and self.config.network.qps != "auto":
            qps = self.config.network.qps
        nodes = sizing.Nodes(place.ranks, place.gpus_per_node, choice.mode == "hybrid", self.capacity_factor)
        window = _window(nodes, shape)
        return {
            "mode": choice.mode,
            "num_sms": choice.num_sms,
            "qps": qps,
            "network_peers": place.network_peers(choice.mode),
            "us": choice.us,
            "dispatch": _operation(choice.dispatch, choice.num_sms),
            "combine": _operation(choice.combine, choice.num_sms),
            "buffer_bytes": window.num_bytes,
            "metadata_bytes": window.sections()["metadata"],
            "network_rows": nodes.arrivals(shape.tokens, shape.topk),
            "sections": window.sections(),
        }


def _window(nodes: sizing.Nodes, shape: model.Shape) -> sizing.WindowLayout:
    return sizing.WindowLayout(nodes, shape.tokens, shape.hidden, shape.topk, shape.fp8)


def _operation(operation: model.Operation, num_sms: int) -> dict[str, Any]:
    moved = operation.total("read_bytes") + operation.total("write_bytes")
    return {
        "us": operation.us,
        "bound": operation.bound,
        "overhead_us": operation.overhead_us,
        "nic_us": operation.nic_us,
        "nic_bytes": operation.total("nic_bytes"),
        "link_bytes": operation.total("link_bytes"),
        "bytes_per_sm": moved / num_sms,
        "phases": [
            asdict(phase.phase)
            | {name: getattr(phase, name) for name in ("us", "sm_us", "link_us", "memory_us", "nic_us")}
            | {"bound": "NIC" if phase.nic_us > phase.us else phase.bound}
            for phase in operation.phases
        ],
    }
