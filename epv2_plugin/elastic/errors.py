"""Errors of the communication library."""

from __future__ import annotations


class CommunicationError(RuntimeError):
    """A message from a peer did not arrive, or was not the one expected.

    Attributes:
        rank: the rank that noticed. peer: the rank waited for. phase: the operation and step, as text.
        expected, seen: what should have come and what came, as text.
    """

    def __init__(self, rank: int | str, peer: int = -1, phase: str = "", expected: str = "", seen: str = ""):
        self._given = (rank, peer, phase, expected, seen)
        self.peer, self.phase, self.expected, self.seen = peer, phase, expected, seen
        if isinstance(rank, str):  # Megatron raises errors anew as type(error)(text), to say what it was building
            self.rank = -1
            super().__init__(rank)
        else:
            self.rank = rank
            super().__init__(f"rank {rank}, waiting for rank {peer} in {phase}: expected {expected}, seen {seen}")

    def __reduce__(self) -> tuple:
        return type(self), self._given


class CommunicationTimeout(CommunicationError, TimeoutError):
    """A peer did not answer within the timeout."""


class UnavailableError(RuntimeError):
    """These ranks, or this process, can't do it this way; another transport may. Raised on every rank or on none."""


class BufferSizeError(ValueError):
    """The data does not fit in the buffer as it was made; the message has the needed size."""
