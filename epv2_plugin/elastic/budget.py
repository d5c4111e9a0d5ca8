"""The SMs that a configuration gives an expert-parallel buffer."""

from __future__ import annotations

from epv2_plugin.config import PluginConfig
from epv2_plugin.elastic.buffer import ElasticBuffer


def expert_sms(config: PluginConfig, buffer: ElasticBuffer, num_experts: int, num_topk: int) -> int:
    """SMs that an operation may hold: as configured, else by the analytic model; none on the host.

    Raises:
        ConfigError: the model needs the bandwidth between GPUs, and that is neither configured nor known.
    """
    budget, rate, key = config.sm_budget.expert, config.network.scale_up_gbytes_per_s, "network.scale_up_gbytes_per_s"
    if budget != "auto" and buffer.describe()["backend"] != "host":
        return budget
    try:
        return buffer.get_theoretical_num_sms(num_experts, num_topk, nvlink_gbs=0 if rate == "auto" else rate)
    except ValueError as error:
        if key not in str(error):
            raise
        raise config.fail(key, str(error).removeprefix(f"{key} = {rate!r}: ")) from None
