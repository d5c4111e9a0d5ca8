"""PyTorch FSDP2 over the plugin: parameter all-gathers and gradient reduce-scatters of any `fully_shard`-ed model."""

from epv2_plugin.fsdp.install import apply, groups, remove, watch

__all__ = ["apply", "groups", "remove", "watch"]
