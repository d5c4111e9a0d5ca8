"""Engram: n-gram memory whose table is spread over the ranks of a group, its optimizers and checkpoints.

What a model does with the rows (projections, gates, convolution) is the model's business.
"""

from epv2_plugin.engram.hashing import NgramHash
from epv2_plugin.engram.memory import ShardedNgramMemory
from epv2_plugin.engram.optimizer import RowwiseAdagrad, SparseAdam
from epv2_plugin.engram.state import reshard_memory, reshard_optimizer

__all__ = [
    "NgramHash",
    "RowwiseAdagrad",
    "ShardedNgramMemory",
    "SparseAdam",
    "reshard_memory",
    "reshard_optimizer",
]
