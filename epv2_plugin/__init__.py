"""Communication of large Mixture-of-Experts training for Megatron-Core and PyTorch FSDP2."""

from epv2_plugin.config import ConfigError, PluginConfig, load_config
from epv2_plugin.elastic import (
    BufferSizeError,
    CommunicationError,
    CommunicationTimeout,
    ElasticBuffer,
    EPHandle,
    EventOverlap,
)
from epv2_plugin.plugin import disable, enable, status

__all__ = [
    "BufferSizeError",
    "CommunicationError",
    "CommunicationTimeout",
    "ConfigError",
    "EPHandle",
    "ElasticBuffer",
    "EventOverlap",
    "PluginConfig",
    "disable",
    "enable",
    "load_config",
    "status",
]
