"""Messages between CPU processes over a private gloo group, for everything that the host backend does.

gloo moves a message once sender and receiver have both named its tag. Tags say what a message is; where ranks disagree,
they don't match, or a header shows the difference, and every rank gets an error that names it.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from epv2_plugin.elastic.errors import CommunicationError, CommunicationTimeout

# A gloo tag: 16 bits of sequence number, 11 of what the message is, 2 of its step. gloo ends the process when a message
# is larger than its receiver expects; with unequal tags it does not match, and the wait times out.
_SEQUENCE_BITS, _KIND_BITS, _STEP_BITS = 16, 11, 2
# Tags that no operation has.
_NEVER_SENT = (1 << 31) - 1
_REFUSAL = 1 << 29  # plus the number of the refusal
_TEXT_BYTES = 256

_transports_made: dict[str, int] = {}


def text_message(text: str) -> torch.Tensor:
    """uint8 `[256]`: `text`, with its checksum in the place of what is too long."""
    encoded = text.encode()
    if len(encoded) > _TEXT_BYTES:
        checksum = f"... {zlib.crc32(encoded):08x}".encode()
        encoded = encoded[: _TEXT_BYTES - len(checksum)] + checksum
    return torch.frombuffer(bytearray(encoded.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8)


def message_text(message: torch.Tensor) -> str:
    """The text of a `text_message`."""
    return bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 `[N]`, in the same memory."""
    return tensor.detach().view(-1).view(torch.uint8)


class Transport:
    """Messages between the ranks of a group over a private gloo group, each wait with a deadline.

    A rank that refuses a call tells its peers at once, into room that each of them keeps ready. They look there when
    something else that they wait for fails.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.timeout_seconds = timeout_seconds
        self._sequence = 0
        self._failure: CommunicationError | None = None
        self._gloo: Any = None  # torch's stubs leave out send and recv of a ProcessGroupGloo
        # Of this rank: number, name, and the messages that each peer gets; and how many all ranks have settled.
        self._refusals: deque[tuple[int, str, dict[int, tuple[torch.Tensor, dist.Work]]]] = deque()
        self._num_settled = 0
        self._peer_refusals: dict[int, tuple[torch.Tensor, dist.Work]] = {}  # each peer's next one
        # Under way: gloo holds up all that comes on a connection behind a message that nobody has any more. Until it
        # was waited for: there is no other way to see that it has ended.
        self._under_way: dict[dist.Work, torch.Tensor] = {}
        if self.size > 1:
            self._gloo = self._connect(dist.get_process_group_ranks(group))
            self._make_room_for_refusals()

    def _connect(self, ranks: list[int]) -> dist.ProcessGroupGloo:
        """A connection of our own between all ranks: nobody else's messages share its tags, and its timeout is ours."""
        key = ",".join(map(str, ranks))
        # Every rank of a group makes the same transports in the same order: their number tells them apart.
        number = _transports_made[key] = _transports_made.get(key, 0) + 1
        store = dist.PrefixStore(f"epv2/{key}/{number}", dist.distributed_c10d._get_default_store())
        try:
            return dist.ProcessGroupGloo(store, self.rank, self.size, timedelta(seconds=self.timeout_seconds))
        except RuntimeError as error:
            raise CommunicationTimeout(
                self.rank,
                -1,
                "creation of the buffer",
                f"all of ranks {ranks} within {self.timeout_seconds:g} s",
                str(error).splitlines()[0],
            ) from error

    def check(self) -> None:
        """Raise what made the group give up, if it has."""
        if self._failure is not None:
            raise self._failure

    def begin(self, name: str) -> Operation:
        """Start an operation; every rank starts the same operations in the same order.

        Raises:
            CommunicationError: the group was given up, or this rank refused a call that its peers did not refuse.
        """
        self.check()
        self._settle_refusals()
        self._sequence += 1
        return Operation(self, name, self._sequence)

    @property
    def peers(self) -> list[int]:
        """The other ranks."""
        return [peer for peer in range(self.size) if peer != self.rank]

    def refuse(self, call: str, error: BaseException) -> None:
        """Count a collective call that `error` ended on this rank, and tell the peers.

        It takes a number as any other: what this rank calls next must not meet what its peers called this time.
        """
        self._sequence += 1
        name = f"{call} #{self._sequence}"
        text = f"#{self._sequence} {call}: on rank {self.rank}: {type(error).__name__}: {error}"
        try:
            sent = {peer: self.post_refusal(text, peer, name) for peer in self.peers}
        except RuntimeError:
            return  # the group was given up or closed: the next call says so
        self._refusals.append((self._sequence, name, sent))

    def post_refusal(self, text: str, peer: int, phase: str) -> tuple[torch.Tensor, dist.Work]:
        """Start telling `peer` why it waits in vain; the tensor must be kept until the work is done."""
        message = text_message(text)
        return message, self.post_send(message, peer, _REFUSAL + self._num_settled + len(self._refusals), phase)

    def _make_room_for_refusals(self) -> None:
        for peer in self.peers:
            room = torch.empty_like(text_message(""))
            tag = _REFUSAL + self._num_settled
            self._peer_refusals[peer] = room, self.post_receive(room, peer, tag, "a refusal")

    def _settle_refusals(self) -> None:
        """See to it that every peer refused what this rank refused: otherwise it is in an operation that can't end."""
        while self._refusals:
            number, name, sent = self._refusals[0]
            seconds = self.timeout_seconds  # a peer may be late; one that is waiting was told why it waits in vain
            deadline = time.monotonic() + seconds
            for peer, (room, work) in self._peer_refusals.items():
                try:
                    work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                    self._under_way.pop(work, None)
                    seen = message_text(room)
                except RuntimeError:
                    seen = f"no refusal within {seconds:g} s, or a closed connection"
                if not seen.startswith(f"#{number} "):
                    expected = f"rank {peer} to refuse it as this rank did"
                    raise self.abandon(CommunicationError(self.rank, peer, name, expected, seen))
            for peer, (_, work) in sent.items():  # it makes room for this one when it has settled the one before
                self.wait(work, peer, name, f"rank {peer} to settle its refusals", deadline - time.monotonic())
            self._refusals.popleft()
            self._num_settled += 1
            self._make_room_for_refusals()

    def _refusal_of_any(self, first: int) -> tuple[int, str] | None:
        """(peer, what it said) of a peer that refused something; `first` is asked before the others."""
        for peer, (room, work) in sorted(self._peer_refusals.items(), key=lambda item: item[0] != first):
            try:
                work.wait(timedelta(milliseconds=50))
            except RuntimeError:
                continue
            return peer, message_text(room)
        return None

    def _open(self) -> Any:
        gloo = self._gloo
        if gloo is None:  # given up by a thread of the backend, or closed, since the operation began
            raise self._failure or RuntimeError("the connections of this buffer are closed")
        return gloo

    def post_send(self, payload: torch.Tensor, peer: int, tag: int, phase: str) -> dist.Work:
        """Start sending `payload` (contiguous uint8, not empty); it must stay as it is until the work is done."""
        gloo = self._open()
        try:
            work = gloo.send([payload], peer, tag)
        except RuntimeError as error:
            raise self._fail(peer, phase, f"rank {peer} to take {payload.numel()} bytes", error) from error
        self._under_way[work] = payload
        return work

    def post_receive(self, payload: torch.Tensor, peer: int, tag: int, phase: str) -> dist.Work:
        """Start receiving at most `payload` (contiguous uint8, not empty)."""
        gloo = self._open()
        try:
            work = gloo.recv([payload], peer, tag)
        except RuntimeError as error:
            raise self._fail(peer, phase, f"{payload.numel()} bytes", error) from error
        self._under_way[work] = payload
        return work

    def wait(
        self, work: dist.Work, peer: int, phase: str, expected: str, seconds: float, limit: float | None = None
    ) -> None:
        """Wait for a message for `seconds`, what is left of `limit`; None = the timeout."""
        if self._failure is not None:
            raise self._failure
        try:
            work.wait(timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError as error:
            raise self._fail(peer, phase, expected, error, limit) from error
        self._under_way.pop(work, None)

    def _fail(
        self, peer: int, phase: str, expected: str, error: RuntimeError, limit: float | None = None
    ) -> CommunicationError:
        reason, kind = str(error), CommunicationError
        refusal = self._refusal_of_any(peer)  # knows better than gloo
        if refusal is not None:
            peer, text = refusal
            seen = f"a refusal: {text}"
        elif "Timed out" in reason or "timed out" in reason:
            kind = CommunicationTimeout
            seen = f"nothing within {self.timeout_seconds if limit is None else limit:g} s"
        else:
            seen = "a closed connection (the process ended or gave up)"
        return self.abandon(kind(self.rank, peer, phase, expected, seen))

    @property
    def failed(self) -> bool:
        """Whether the group was given up."""
        return self._failure is not None

    def abandon(self, failure: CommunicationError) -> CommunicationError:
        """Give the group up after an error: its peers see closed connections and raise instead of waiting.

        Returns the first such error, the cause of those that follow from it.
        """
        self._failure = self._failure or failure
        gloo = self._gloo
        if gloo is not None:
            # Dropping the group is not enough: gloo keeps connections that an unfinished message refers to. It closes
            # all of them when a wait times out, which one for a peer that is gone does not: it fails at once.
            for distance in range(1, self.size):
                peer = (self.rank + distance) % self.size
                try:
                    gloo.recv([torch.empty(1, dtype=torch.uint8, device="cpu")], peer, _NEVER_SENT).wait(
                        timedelta(milliseconds=1)
                    )
                except RuntimeError as error:
                    if "imed out" in str(error):
                        break
        self.close()
        return self._failure

    def close(self) -> None:
        """Drop the connections."""
        self._gloo = None
        self._peer_refusals.clear()
        self._under_way.clear()


class Operation:
    """One collective operation: numbered steps, each at most one message to and from every peer.

    `kind` of a message is whatever decides its size: both sides must name the same.
    """

    def __init__(self, transport: Transport, call: str, number: int):
        self._transport, self._call, self._name = transport, call, f"{call} #{number}"
        self.sequence = number % (1 << _SEQUENCE_BITS)
        self.rank, self.peers = transport.rank, transport.peers
        self._sends: list[tuple[int, str, dist.Work, torch.Tensor]] = []

    def _tag(self, step: int, kind: tuple) -> int:
        bits = zlib.crc32(repr((self._call, kind)).encode()) % (1 << _KIND_BITS)
        return (self.sequence << _KIND_BITS | bits) << _STEP_BITS | step

    def send(self, step: int, payloads: Mapping[int, torch.Tensor], phase: str, kind: tuple) -> None:
        """Start sending `payloads[p]` (contiguous uint8, not empty) to each peer p that has one."""
        tag, phase = self._tag(step, kind), f"{self._name}, {phase}"
        for peer, payload in payloads.items():
            self._sends.append((peer, phase, self._transport.post_send(payload, peer, tag, phase), payload))

    def wait_sent(self) -> None:
        """Wait until every peer has taken what was sent: after this the process may end without hurting anybody."""
        for peer, phase, work, payload in self._sends:
            expected = f"rank {peer} to take {payload.numel()} bytes"
            self._transport.wait(work, peer, phase, expected, self._transport.timeout_seconds)
        self._sends.clear()

    def receive(self, step: int, payloads: Mapping[int, torch.Tensor], phase: str, kind: tuple) -> Callable[[], None]:
        """Start receiving at most `payloads[p]` from each peer p that has one; returns the wait for all of them."""
        transport, tag, phase = self._transport, self._tag(step, kind), f"{self._name}, {phase}"
        pending = [
            (peer, payload.numel(), transport.post_receive(payload, peer, tag, phase))
            for peer, payload in payloads.items()
        ]

        def wait() -> None:
            deadline = time.monotonic() + transport.timeout_seconds
            for peer, num_bytes, work in pending:
                transport.wait(work, peer, phase, f"{num_bytes} bytes", deadline - time.monotonic())

        return wait

    def mismatch(self, peer: int, phase: str, expected: str, seen: str) -> CommunicationError:
        """The error for a peer that came with something else; the group is given up."""
        failure = CommunicationError(self.rank, peer, f"{self._name}, {phase}", expected, seen)
        return self._transport.abandon(failure)
