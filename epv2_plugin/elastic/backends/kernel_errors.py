"""What the error record of a kernel says of a wait that ended badly; `ErrorCode` in csrc/kernels/ep/protocol.cuh."""

from __future__ import annotations

from epv2_plugin.elastic.errors import CommunicationError, CommunicationTimeout

OTHER_ARGUMENTS = 3  # a peer came with another call
_TIMEOUT, _PEER_FAILED = 1, 2


def of_wait(
    code: int, rank: int, peer: int, phase: str, expected: int, seen: int, seconds: float, extra: int
) -> CommunicationError | None:
    """The error for a peer that did not come, or gave up; None for other codes.

    Args:
        expected, seen: numbers of operations. seconds: that a wait may take; twice that with `extra` = 1,
            for somebody who waits himself.
    """
    if code == _TIMEOUT:
        wanted, got = f"operation {expected} within {(1 + extra) * seconds:g} s", f"operation {seen}"
        return CommunicationTimeout(rank, peer, phase, wanted, got)
    if code == _PEER_FAILED:
        return CommunicationError(rank, peer, phase, f"operation {expected}", "that it gave up")
    return None
