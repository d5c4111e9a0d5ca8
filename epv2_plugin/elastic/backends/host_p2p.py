"""Point-to-point on the host: tensors between any two ranks over the buffer's gloo connections.

gloo moves a message once sender and receiver have both named its tag; until then it waits with the sender. That is what
a credit says in a ring in GPU memory, too: a send that is complete has been taken by its receiver. A sender therefore
keeps at most `max_inflight` incomplete sends for each (peer, channel), in numbered slots, and waits for the oldest.

Each tensor is two messages: a header that says number, shape and dtype as text, and the bytes. The tag of the bytes
depends on the header, so that a tensor of another size never meets a receive that it does not fit. The receiver reads
the header, sees the difference, tells the sender why (`Transport.post_refusal`) and gives the connections up.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from epv2_plugin.elastic.backends.base import Traffic, describe
from epv2_plugin.elastic.backends.host_transport import Transport, byte_view, message_text, text_message
from epv2_plugin.elastic.errors import CommunicationError
from epv2_plugin.elastic.event import HostEvent

# A tag: a bit that no collective operation's tag has, then kind of message, channel, tensor number, hash of the header.
_POINT_TO_POINT = 1 << 30
_HASH_BITS, _NUMBER_BITS, _CHANNEL_BITS = 18, 8, 2
_HEADER, _BYTES = range(2)
_REFUSAL_SECONDS = 1.0  # the peer has made room for it; this only bounds what a dead peer costs


def _tag(kind: int, channel: int = 0, number: int = 0, header: torch.Tensor | None = None) -> int:
    bits = 0 if header is None else zlib.crc32(header.numpy().tobytes()) % (1 << _HASH_BITS)
    number %= 1 << _NUMBER_BITS
    return _POINT_TO_POINT | ((kind << _CHANNEL_BITS | channel) << _NUMBER_BITS | number) << _HASH_BITS | bits


@dataclass
class _Sent:
    """A tensor on its way. `messages` are what gloo reads from until `works` are done."""

    number: int
    phase: str
    expected: str
    works: list[dist.Work]
    messages: list[torch.Tensor]


@dataclass
class _Link:
    """One direction to or from a peer on one channel."""

    number: int = 0  # tensors so far
    inflight: deque[_Sent] = field(default_factory=deque)


class HostPointToPoint:
    """See `base.PointToPoint`. Uses the connections of `transport`, and gives them up after an error."""

    def __init__(self, transport: Transport, traffic: Traffic):
        self._transport, self._traffic = transport, traffic
        self._max_inflight = 0
        self._outgoing: dict[tuple[int, int], _Link] = {}
        self._incoming: dict[tuple[int, int], _Link] = {}

    def configure(self, max_tensor_bytes: int, max_inflight: int, max_inplace: int, max_senders: int) -> None:
        """Collective; raises CommunicationError where another rank came with other values."""
        self.flush()
        values = (max_tensor_bytes, max_inflight, max_inplace)
        operation = self._transport.begin("pp_set_config")
        ours = torch.tensor(values, dtype=torch.int64, device="cpu").view(torch.uint8)
        theirs = {peer: torch.empty_like(ours) for peer in operation.peers}
        wait = operation.receive(0, theirs, "values", ())
        operation.send(0, dict.fromkeys(operation.peers, ours), "values", ())
        wait()
        operation.wait_sent()
        for peer, answer in theirs.items():
            seen = tuple(answer.view(torch.int64).tolist())
            if seen != values:
                texts = [f"(max_tensor_bytes, max_inflight) = {each[:2]}" for each in (values, seen)]
                if seen[:2] == values[:2]:
                    texts = [f"max_inplace = {each[2]}" for each in (values, seen)]
                raise operation.mismatch(peer, "values", f"{texts[0]} as on this rank", texts[1])
        self._max_inflight = max_inflight

    def send(self, tensor: torch.Tensor, peer: int, channel: int, copy: bool) -> HostEvent:
        self._transport.check()
        link = self._outgoing.setdefault((peer, channel), _Link())
        while len(link.inflight) >= self._max_inflight:
            self._finish_oldest(link, peer, self._phase("pp_send", link.number, peer, channel))
        number = link.number
        phase = self._phase("pp_send", number, peer, channel)
        header = text_message(f"#{number} {describe(tensor)}")
        # A view of its own: the caller may give his tensor other memory (Megatron does) while gloo reads this.
        content = byte_view(tensor.contiguous())
        if copy and content.data_ptr() == tensor.data_ptr():
            content = content.clone()
        messages, tags = [header], [_tag(_HEADER, channel, number)]
        if content.numel():
            messages.append(content)
            tags.append(_tag(_BYTES, channel, number, header))
        works = [self._transport.post_send(m, peer, tag, phase) for m, tag in zip(messages, tags, strict=True)]
        sent = _Sent(number, phase, f"rank {peer} to take {describe(tensor)}", works, messages)
        link.inflight.append(sent)
        link.number += 1
        num_bytes = sum(m.numel() for m in messages)
        self._traffic.sent_bytes += num_bytes
        self._traffic.undeduplicated_bytes += num_bytes

        def finish() -> None:
            while link.inflight and link.inflight[0].number <= number:
                self._finish_oldest(link, peer, phase)

        return HostEvent(finish)

    def receive(self, tensor: torch.Tensor, peer: int, channel: int, wait: bool) -> HostEvent:
        self._transport.check()
        link = self._incoming.setdefault((peer, channel), _Link())
        tensor = tensor.detach()  # its data is written, of whatever autograd knows nothing
        number, link.number = link.number, link.number + 1
        phase = self._phase("pp_recv", number, peer, channel)
        expected = f"#{number} {describe(tensor)}"
        wanted = text_message(expected)
        header = torch.empty_like(wanted)
        direct = tensor.is_contiguous()
        content = byte_view(tensor if direct else torch.empty_like(tensor, memory_format=torch.contiguous_format))
        works = [self._transport.post_receive(header, peer, _tag(_HEADER, channel, number), phase)]
        if content.numel():
            works.append(self._transport.post_receive(content, peer, _tag(_BYTES, channel, number, wanted), phase))

        def finish() -> None:
            deadline = time.monotonic() + self._transport.timeout_seconds
            for index, work in enumerate(works):
                self._wait(work, peer, phase, expected, deadline - time.monotonic())
                if index == 0 and not torch.equal(header, wanted):
                    raise self._refuse(peer, phase, expected, message_text(header))
            if not direct:
                tensor.copy_(content.view(tensor.dtype).view(tensor.shape))

        event = HostEvent(finish)
        if wait:
            event.current_stream_wait()
        return event

    def receive_inplace(
        self, shape: Sequence[int], dtype: torch.dtype, peer: int, channel: int
    ) -> tuple[torch.Tensor, HostEvent]:
        tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
        return tensor, self.receive(tensor, peer, channel, wait=False)

    def flush(self, seconds: float | None = None) -> None:
        """As `base.PointToPoint`; each tensor has `seconds`, None = the timeout."""
        self._transport.check()
        for (peer, channel), link in self._outgoing.items():
            while link.inflight:
                phase = self._phase("pp_send", link.inflight[0].number, peer, channel)
                self._finish_oldest(link, peer, phase, seconds)

    def _phase(self, call: str, number: int, peer: int, channel: int) -> str:
        way = f"to rank {peer}" if call == "pp_send" else f"from rank {peer}"
        where = f"slot {number % self._max_inflight} of {self._max_inflight}"
        return f"{call} {way}, tensor #{number}, {where}" + (f", channel {channel}" if channel else "")

    def _finish_oldest(self, link: _Link, peer: int, phase: str, seconds: float | None = None) -> None:
        """Wait until the peer has taken the oldest tensor of a link; `phase` is what waits for it."""
        oldest = link.inflight[0]
        expected = oldest.expected if phase == oldest.phase else f"{oldest.expected} of {oldest.phase}"
        deadline = time.monotonic() + (self._transport.timeout_seconds if seconds is None else seconds)
        for work in oldest.works:
            self._wait(work, peer, phase, expected, deadline - time.monotonic(), seconds)
        link.inflight.popleft()

    def _wait(
        self, work: dist.Work, peer: int, phase: str, expected: str, seconds: float, limit: float | None = None
    ) -> None:
        self._transport.check()
        self._transport.wait(work, peer, phase, expected, seconds, limit)

    def _refuse(self, peer: int, phase: str, expected: str, seen: str) -> CommunicationError:
        """Tell the peer that its tensor is not what was expected, and give up."""
        transport = self._transport
        failure = CommunicationError(transport.rank, peer, phase, expected, seen)
        try:
            text = f"rank {transport.rank} expected {expected} and saw {seen}"
            sent = transport.post_refusal(text, peer, phase)
            sent[1].wait(timedelta(seconds=_REFUSAL_SECONDS))
        except RuntimeError:
            pass  # the peer is gone: it needs no reason
        transport.abandon(failure)
        return failure
