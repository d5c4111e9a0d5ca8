"""What a configuration means for an expert-parallel buffer: how it is made, and its SMs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic.buffer import ElasticBuffer
from epv2_plugin.elastic.model import Shape
from epv2_plugin.elastic.modes import allow_hybrid


def expert_sms(config: PluginConfig, buffer: ElasticBuffer, num_experts: int, num_topk: int) -> int:
    """SMs that an operation may hold: as configured, else by the analytic model; none on the host.

    Raises:
        ConfigError: the model needs a bandwidth that is neither configured nor known.
    """
    budget, network = config.sm_budget.expert, config.network
    if budget != "auto" and buffer.describe()["backend"] != "host":
        return budget
    rates: dict[str, float] = {}
    if network.scale_up_gbytes_per_s != "auto":
        rates["nvlink_gbs"] = network.scale_up_gbytes_per_s
    if network.rdma_gbytes_per_s != "auto":
        rates["rdma_gbs"] = network.rdma_gbytes_per_s
    with _naming_rates(config):
        return buffer.get_theoretical_num_sms(num_experts, num_topk, **rates)  # type: ignore[arg-type]


def buffer_options(
    config: PluginConfig, group: dist.ProcessGroup, *, max_tokens: int, hidden: int, num_topk: int, num_experts: int
) -> dict[str, Any]:
    """Arguments of `ElasticBuffer` beside `group`; `max_tokens` 0 = no limit.

    Raises:
        ConfigError: `expert.mode` is `auto`, and the model needs a bandwidth that is neither configured nor known.
    """
    options, network, fp8 = config.expert, config.network, config.expert.dispatch_dtype == "fp8"
    shape = Shape(max(1, max_tokens), hidden, num_topk, num_experts, dist.get_world_size(group), fp8=fp8)
    with _naming_rates(config):
        hybrid = allow_hybrid(
            options.mode,
            group,
            shape,
            nvlink_gbs=network.scale_up_gbytes_per_s,
            rdma_gbs=network.rdma_gbytes_per_s,
        )
    return {
        "num_max_tokens_per_rank": max_tokens,
        "hidden": hidden,
        "num_topk": num_topk,
        "use_fp8_dispatch": fp8,
        "allow_hybrid_mode": hybrid,
        "num_allocated_qps": 0 if network.qps == "auto" else network.qps,
        "num_cpu_timeout_secs": config.timeouts.host_seconds,
        "num_gpu_timeout_secs": config.timeouts.gpu_seconds,
        "backend": config.backend,
    }


@contextmanager
def _naming_rates(config: PluginConfig) -> Iterator[None]:
    """A rate that is neither given nor known is a mistake of the configuration."""
    try:
        yield
    except ValueError as error:
        for key in ("scale_up_gbytes_per_s", "rdma_gbytes_per_s"):
            name, value = f"network.{key}", getattr(config.network, key)
            if name in str(error):
                raise config.fail(name, str(error).removeprefix(f"{name} = {value!r}: ")) from None
        raise
