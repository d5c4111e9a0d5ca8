"""What a backend offers beside dispatch and combine. `ElasticBuffer` checks arguments first and calls these.

On a GPU an event or a wait orders the current stream; on the host it blocks the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from epv2_plugin.elastic.event import Event

NUM_CHANNELS = 4  # independent orders of tensors between two ranks


class PointToPoint(Protocol):
    """Tensors from one rank to another, in order within each (sender, receiver, channel)."""

    def configure(self, max_tensor_bytes: int, max_inflight: int) -> None:
        """Collective: what was sent before is taken, then rings of `max_inflight` slots are ready."""

    def send(self, tensor: torch.Tensor, peer: int, channel: int, copy: bool) -> Event:
        """Start sending; blocks while `max_inflight` tensors for `peer` and `channel` have not been taken.

        `copy` = the caller may overwrite the tensor at once; otherwise its memory is held until the peer has it.
        """

    def receive(self, tensor: torch.Tensor, peer: int, channel: int) -> Event:
        """Start receiving into `tensor`, which holds data after the event."""

    def flush(self) -> None:
        """Wait until everything sent has been taken."""


class Sessions(Protocol):
    """All-gathers and reduce-scatters inside sessions, which bound the memory that they take."""

    active: bool

    def configure(self, max_session_bytes: int, max_operations: int) -> None:
        """Collective: limits of every session from now on."""

    def begin(self) -> None:
        """Start a session."""

    def end(self) -> None:
        """Complete everything that the session started."""

    def abandon(self) -> None:
        """End the session after an error, without waiting for what it started."""

    def own_slots(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        """This rank's part of gathered tensors that are yet to be gathered."""

    def all_gather(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Start gathering; returns tensors `[ranks, *shape]` and the wait after which they hold data."""

    def reduce_scatter(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Start summing `[ranks, *shape]` over ranks; returns this rank's sums and the wait for them."""
