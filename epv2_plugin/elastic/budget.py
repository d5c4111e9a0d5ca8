"""What a configuration means for an expert-parallel buffer: its SMs, and whether rows may take two hops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def hybrid_allowed(config: PluginConfig, group: dist.ProcessGroup, shape: Shape) -> bool:
    """What `expert.mode` means for `group`, see `modes.allow_hybrid`.

    Raises:
        ConfigError: the model is asked, and needs a bandwidth that is neither configured nor known.
    """
    rates = config.network
    with _naming_rates(config):
        return allow_hybrid(
            config.expert.mode,
            group,
            shape,
            nvlink_gbs=rates.scale_up_gbytes_per_s,
            rdma_gbs=rates.rdma_gbytes_per_s,
        )


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
