"""Point-to-point between GPUs: copy engines and words on streams; between nodes, puts of NCCL's GIN.

A rank has rings of slots in its window, one for each link (source, channel). A send copies the tensor into the next
slot at the receiver and then writes a record there: dtype and shape, and behind them the word `ready`, a hash of these
and of the tensor's number. The receiver's stream waits for exactly that word, copies the tensor out of the slot, and
tells the sender how many it has taken. That is the credit: the send that wants the slot again waits for it, on its
stream. A large tensor goes so in pieces, each with a word of its own, of which one is copied out while the next is
copied in. What has a place of its own at the receiver goes there instead, and may stay (`inplace.py`); records, words
and credits are the same.

What crosses a link comes first: a copy inside the sender before that would wait for the copy engine where that is busy
with what this rank receives, and the next rank for it, and so on around a ring of ranks.

Streams write words at the peer where the driver takes that, else into their own rank's memory, from where a copy brings
them, as data: it may have to wait for a copy engine. Every link has a stream for each direction; what the current
stream would wait for at once it does itself, as every call of the driver takes microseconds, and two streams take four
more. Receives of one link count what was taken one after the other, whatever their streams: that count is what one of
another stream waits for first, and it is the event of each. The sender takes a free ring with its first send and says
which, once, through torch's store; receives that are posted before that are put on their stream once it has, in order.

Inside a node there is no kernel (but copies inside a device on the legacy stream, small ones only, which the driver
does by SMs). To a rank of another node the tensor goes through a slot of the sender's, from where the network brings
it, and the record, into the slot there (`sender.py`). Then it raises a word of the link, for which the receiver's
stream waits first: before that any part of both may be missing. A credit is such a word, too.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import os
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import NUM_CHANNELS, Traffic, describe_kind
from epv2_plugin.elastic.backends.device import (
    CopyOp,
    Event,
    OrderOp,
    Put,
    Runtime,
    StreamOp,
    Window,
    node_of,
    tell,
)
from epv2_plugin.elastic.backends.inplace import InPlace, Slot
from epv2_plugin.elastic.backends.sender import Sender
from epv2_plugin.elastic.backends.watch import Wait, Watch, lane_of
from epv2_plugin.elastic.errors import BufferSizeError, CommunicationError, UnavailableError
from epv2_plugin.elastic.sizing import RingLayout, align

_HEADER_BYTES = 24  # words of 64 bits: what, and two of dimensions
_DIMENSION_BYTES = 16
_FAR_WORD_BYTES = 8  # behind the header in a record that the network brings: `ready`, and nothing
_RINGS = "rings"  # of a sender
_TOO_LONG = 1 << 16  # in `what`: the dimensions do not fit
_DTYPES = sorted(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))
_SMALL_BYTES = 1 << 20  # of a tensor whose copy by SMs takes less time than to hand it to another stream
_LAST_SPECIAL_STREAM = 2  # handles of the driver's own: 0 and 1 legacy, 2 each thread's
# Without the variable CUDA has 8 queues, and the streams of four waiting links hold all others (docs/performance.md).
_LEAST_CONNECTIONS, _ENOUGH_CONNECTIONS = 10, 32
logger = logging.getLogger("epv2_plugin")


class Kind:
    """What all tensors of one shape and dtype have in common.

    Attributes:
        text: "[4, 8] bfloat16". words: 64 bits each, what a record says of them.
        num_bytes, pieces: of a tensor, see `sizing.pieces_of`.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype):
        self.text = describe_kind(shape, dtype)
        packed = bytearray()
        for size in shape:  # seven bits a byte, the last of a size without the eighth
            while size > 127:
                packed.append(size & 127 | 128)
                size >>= 7
            packed.append(size)
        what = _DTYPES.index(str(dtype)) | len(shape) << 8
        if len(packed) > _DIMENSION_BYTES:
            what, packed = what | _TOO_LONG, bytearray()
        self.words = (what, *struct.unpack("<2Q", packed.ljust(_DIMENSION_BYTES, b"\0")))
        self._hash = zlib.crc32(self.text.encode())
        self.num_bytes = math.prod(shape) * dtype.itemsize
        self.pieces = sizing.pieces_of(self.num_bytes)

    def ready(self, number: int, turn: int) -> int:
        """The word that says in a record that tensor `number` is there, with `turn` as in `hash_word`."""
        return _of_turn(zlib.crc32(b"%d" % number, self._hash), turn)


kind_of = functools.lru_cache(maxsize=4096)(Kind)  # it takes longer than the rest of a send


def header_text(words: bytes, number: int) -> str:
    """What a record says of tensor `number`: "#2 [4, 8] bfloat16"."""
    (what,) = struct.unpack_from("<Q", words)
    dtype = _DTYPES[what & 255].removeprefix("torch.") if what & 255 < len(_DTYPES) else "unknown dtype"
    count = what >> 8 & 255
    if what & _TOO_LONG:
        return f"#{number} [{count} dimensions] {dtype}"
    sizes, shift, size = [], 0, 0
    for byte in words[8 : 8 + _DIMENSION_BYTES]:
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            sizes.append(size)
            shift = size = 0
    return f"#{number} {sizes[:count]} {dtype}"


def hash_word(text: str, turn: int) -> int:
    """A word of 32 bits for `text`, never 0 and never that of the turn before."""
    return _of_turn(zlib.crc32(text.encode()), turn)


def _of_turn(value: int, turn: int) -> int:
    return value >> 8 << 8 | turn % 255 + 1


def same_turn(word: int, other: int) -> bool:
    """Whether two of `hash_word` are of the same turn."""
    return word & 255 == other & 255


def reached(word: int, count: int) -> bool:
    """Whether a word of 32 bits that only grows, and begins again, is at `count` or behind it."""
    return (word - count) & 0xFFFFFFFF < 1 << 31


class _Link:
    """One way between this rank and a peer on a channel. What every transfer needs to know is looked up here once.

    Attributes:
        lane: as in `Wait`. near: whether the peer is on this node, and so in `bases`: the windows of its ranks.
        number: tensors so far.
    """

    def __init__(self, way: str, peer: int, channel: int, stream: Any, bases: dict[int, int], max_inflight: int):
        self.peer, self.channel, self.stream, self.near = peer, channel, stream, peer in bases
        self.lane = (way, peer, channel)
        self.number = 0
        self._call = f"pp_send to rank {peer}" if way == "out" else f"pp_recv from rank {peer}"
        end = f", channel {channel}" if channel else ""
        self._places = [f"slot {n} of {max_inflight}{end}" for n in range(max_inflight)]

    def phase(self, number: int) -> str:
        """What a transfer is called in errors."""
        return f"{self._call}, tensor #{number}, {self._places[number % len(self._places)]}"


class _Outgoing(_Link):
    """A link to a peer.

    Args:
        ring: where the peer keeps what comes. staging: in this rank's window, what goes to a peer that is not near.
        writes: streams can write at near peers.

    Attributes:
        slots, outboxes: addresses of the slots that tensors are copied to, and of where streams write the records about
            them: in this rank's window, unless they can write at the peer. inboxes: where these go at the peer:
            addresses where it is near, else bytes of its window.
        ways, records: of a peer that is not near: each slot, as (byte there, byte here), and what brings the record.
        landed: there, of how many tensors have come; a byte of its window.
        taken: address of how many the peer says it has taken.
        recent: what lies in its slots, oldest first.
    """

    def __init__(
        self,
        peer: int,
        channel: int,
        stream: Any,
        bases: dict[int, int],
        rank: int,
        layout: RingLayout,
        ring: int,
        staging: int,
        writes: bool,
    ):
        super().__init__("out", peer, channel, stream, bases, layout.max_inflight)
        own, numbers = bases[rank], range(layout.max_inflight)
        steps = [n * layout.slot_bytes for n in numbers]
        records = [layout.record(peer, channel, n, outgoing=True) for n in numbers]
        self.slots = [(bases[peer] + ring if self.near else own + staging) + step for step in steps]
        self.inboxes = [bases.get(peer, 0) + layout.record(rank, channel, n, outgoing=False) for n in numbers]
        self.outboxes = self.inboxes if self.near and writes else [own + record for record in records]
        self.ways = [(ring + step, staging + step) for step in steps]
        num_bytes = _HEADER_BYTES + _FAR_WORD_BYTES
        self.records: list[Put] = [(peer, to, own, num_bytes) for to, own in zip(self.inboxes, records, strict=True)]
        self.landed = layout.landed(rank, channel)
        self.taken = own + layout.taken(peer, channel, outgoing=False)
        self.recent: deque[Kind] = deque()


class _Incoming(_Link):
    """A link from a peer.

    Attributes:
        ring: where it begins in this rank's window, None until that is known.
        records: addresses of what the peer says of each slot. words: of those that say there that a piece is here.
        landed: of a peer that is not near, address of how many tensors are here.
        taken, inbox: addresses of what this rank has taken, and of where a near peer looks for that. returned: the same
            at one that is not near, as a byte of its window.
        deferred: receives that wait until the peer has said which ring it took.
        last: wait of the last one that is on a stream. stream_of_last: None = `stream`, else the handle of another.
    """

    def __init__(
        self,
        peer: int,
        channel: int,
        stream: Any,
        bases: dict[int, int],
        rank: int,
        layout: RingLayout,
    ):
        super().__init__("in", peer, channel, stream, bases, layout.max_inflight)
        self.ring: int | None = None
        numbers = range(layout.max_inflight)
        self.records = [bases[rank] + layout.record(peer, channel, n, outgoing=False) for n in numbers]
        pieces = range(sizing.MOST_PIECES)
        self.words = [[record + _HEADER_BYTES + 4 * piece for piece in pieces] for record in self.records]
        self.landed = bases[rank] + layout.landed(peer, channel)
        self.taken = bases[rank] + layout.taken(peer, channel, outgoing=True)
        self.returned = layout.taken(rank, channel, outgoing=False)
        self.inbox = bases.get(peer, 0) + self.returned
        self.deferred: deque[_Receive] = deque()
        self.last: Wait | None = None
        self.stream_of_last: int | None = None


class _Sent:
    """The event of a send: the peer has taken it."""

    def __init__(self, owner: CudaPointToPoint, link: _Outgoing, number: int, kind: Kind):
        self._owner, self._link, self._number, self._kind = owner, link, number, kind

    def current_stream_wait(self) -> None:
        """Make the current stream wait. Raises CommunicationError where this rank knows that it will not come."""
        self._owner.await_taken(self._link, self._number, self._kind)


class _Receive:
    """A receive and its event: the tensor holds data.

    Attributes:
        stays: whether the tensor lies where it comes to, rather than being copied out of there.
        slot: of `InPlace`, None = of the ring; known once it is on a stream.
        before: event behind which it may write, None = where the current stream is.
        wait: once it is on a stream. stream: that one, None = the link's, else the handle of another.
    """

    def __init__(
        self,
        owner: CudaPointToPoint,
        tensor: torch.Tensor,
        link: _Incoming,
        number: int,
        stays: bool = False,
    ):
        self._owner, self.link, self.number, self.stays = owner, link, number, stays
        self.slot: Slot | None = None
        self.tensor, self.dense = tensor, tensor
        if not tensor.is_contiguous():
            self.dense = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self.kind = kind_of(tensor.shape, tensor.dtype)
        self.before: Event | None = None
        self.wait: Wait | None = None
        self.stream: int | None = None

    def current_stream_wait(self) -> None:
        """Make the current stream wait. Raises CommunicationError where this rank knows that it will not come."""
        self._owner.complete(self)
        if self.dense is not self.tensor:
            with torch.no_grad():
                self.tensor.copy_(self.dense)
            self.dense = self.tensor


class CudaPointToPoint:
    """See `base.PointToPoint`.

    Args:
        runtime: the device. watch: ends waits for what never comes. traffic: counts what was sent.
        num_bytes: that the buffer was made with: room for more rings than `max_senders`; None = no more.
        sender: makes the way to other nodes, or gives it (collective); asked where there are any.
    """

    def __init__(
        self,
        runtime: Runtime,
        watch: Watch,
        traffic: Traffic,
        num_bytes: int | None,
        sender: Callable[[], Sender],
    ):
        self.runtime = runtime
        self._sender = sender
        self._near = node_of(runtime)
        self._watch, self._traffic, self._num_bytes = watch, traffic, num_bytes or 0
        self._window: Window | None = None
        self._streams: dict[tuple[str, int, int], Any] = {}
        self._attempts = self._configured = 0  # calls of `configure`, and the last that succeeded
        self._max_inflight = 0
        self._outgoing: dict[tuple[int, int], _Outgoing] = {}
        self._incoming: dict[tuple[int, int], _Incoming] = {}
        self._lock = threading.RLock()  # of deferred receives, which another thread puts on their streams, too
        self._deferring = False  # whether there are any
        self._inplace: InPlace | None = None
        self._words: Window | None = None  # of `InPlace`
        self._shares = True  # whether processes can share host memory, as far as is known

    # ---- base.PointToPoint ------------------------------------------------------------------------------------------

    def configure(self, max_tensor_bytes: int, max_inflight: int, max_inplace: int, max_senders: int) -> None:
        far = len(self._near) < self.runtime.size
        sender = self._sender() if far else None
        self.flush()
        for link in self._incoming.values():
            if link.deferred:
                phase = link.phase(link.deferred[0].number)
                raise RuntimeError(f"pp_set_config before the event of {phase} was waited for")
            if link.last is not None:
                self._watch.finish(link.last)
        if self._inplace is not None:
            self._await_slots(self._inplace)
        self._watch.drain()  # the caller's streams, too, may still wait for words that are about to be others
        self._attempts += 1
        rank, size, name = self.runtime.rank, self.runtime.size, f"pp_set_config #{self._attempts}"
        slot_bytes = sizing.ring_slot_bytes(max_tensor_bytes)
        room = (self._num_bytes - max_inplace * slot_bytes) // (max_inflight * slot_bytes)
        num_rings = min(max(max_senders, room), (size - 1) * NUM_CHANNELS)
        values = f"(max_tensor_bytes, max_inflight) = {(max_tensor_bytes, max_inflight)}"
        mine = values, f"max_inplace = {max_inplace}", f"room for {num_rings} rings"

        def step() -> str:
            check_connections()
            return "\n".join(mine)

        phase = f"{name}, values"
        for peer, text in enumerate(self.runtime.meeting.agree(f"{name}/values", step, phase)):
            for own, seen in zip(mine, text.split("\n"), strict=True):
                if seen != own:
                    raise CommunicationError(rank, peer, phase, f"{own} as on this rank", seen)
        words = self._shared_words(max_inplace) if max_inplace else None
        layout = RingLayout(
            num_ranks=size,
            num_channels=NUM_CHANNELS,
            max_inflight=max_inflight,
            max_tensor_bytes=max_tensor_bytes,
            num_rings=num_rings,
            max_inplace=0 if words is None else max_inplace,
            far=far,
        )
        if sender is not None:
            sender.meet(f"{name}, end of what was sent before")
        window = self._window
        if window is None or window.num_bytes < layout.end:
            window = self.runtime.window(align(layout.end, sizing.BUFFER_ALIGNMENT), ordered=far)
        else:
            with self.runtime.on_stream(self._stream("config", rank, 0)):
                self.runtime.fill(window.peer_pointer(rank, 0), 0, layout.arrivals)
                zeroed = Wait(rank, name, "zeroed words", "config")
                self.runtime.stream_ops([self._watch.note(zeroed)])
            self._watch.finish(zeroed)
            self.runtime.meeting.agree(f"{name}/zeroed", lambda: "", f"{name}, end")
        if sender is not None:
            sender.enroll(_RINGS, window)
        self.runtime.writes_to_peers()  # now, as it is collective
        if words is not None:
            InPlace.reset(self.runtime, words)
            self.runtime.meeting.agree(f"{name}/slots", lambda: "", f"{name}, end")
        # Only now: where the call was refused, links go on as they were, and new ones beside them.
        self._configured = self._attempts
        self._num_rings, self._max_inflight, self._layout, self._window = num_rings, max_inflight, layout, window
        self._max_inplace = max_inplace
        self._bases = {peer: window.peer_pointer(peer, 0) for peer in self._near}
        self._inplace = None
        if words is not None:
            place = layout.inplace, layout.slot_bytes, max_inplace
            self._inplace = InPlace(self.runtime, words, window, *place)
        self._outgoing, self._incoming = {}, {}

    def send(self, tensor: torch.Tensor, peer: int, channel: int, copy: bool) -> _Sent:
        self._begin("pp_send")
        link = self._outgoing.get((peer, channel)) or self._outgoing_link(peer, channel)
        runtime, number = self.runtime, link.number
        index = number % self._max_inflight
        # A view of its own: the caller may give his tensor other memory (Megatron does) before the copy has run.
        dense = tensor.detach().contiguous()
        kind, current = kind_of(dense.shape, dense.dtype), runtime.current_handle()
        ready = kind.ready(number, number // self._max_inflight)
        here = copy and self._suits(current, link, kind)
        wait = Wait(peer, link.phase(number), "", lane_of(current) if here else link.lane, keep=(dense,))
        operations: list[StreamOp | CopyOp | OrderOp] = [] if here else [("after", current)]
        oldest = None  # what its slot was used for before
        if number >= self._max_inflight:
            oldest = link.recent.popleft()
            wait.expected = f"rank {peer} to take {oldest.text} of {link.phase(number - self._max_inflight)}"
            operations.append(self._taken_wait(wait, link, number - self._max_inflight))
        link.recent.append(kind)
        slot, outbox, inbox, address = link.slots[index], link.outboxes[index], link.inboxes[index], dense.data_ptr()
        if kind is not oldest:  # else they are there
            operations += [("write64", outbox + 8 * i, word) for i, word in enumerate(kind.words)]
        passed = self._watch.note(wait)
        inplace = self._inplace_of(link, kind.num_bytes)
        if inplace is not None and (place := inplace.send(peer, channel, number)) is not None:
            slot = self._bases[peer] + place
        pieces = kind.pieces if link.near else [(0, kind.num_bytes)]
        begin, end = 0, _HEADER_BYTES + 4  # of the record: what the peer is told behind a piece
        for offset, num_bytes in pieces:
            if num_bytes:
                operations.append(("copy", slot + offset, address + offset, num_bytes))
            last = offset + num_bytes == kind.num_bytes
            if copy and last and not here:
                operations.append(("before", current))
            operations.append(("write32", outbox + end - 4, ready))
            if last:
                operations.append(passed)
            if link.near:
                if outbox != inbox:
                    operations.append(("copy", inbox + begin, outbox + begin, end - begin))
                begin, end = end, end + 4
        # One call: under MPS each call of the driver takes longer than the copy of a small tensor.
        runtime.stream_ops(operations, None if here else link.stream)
        if not link.near:
            data = [(peer, *link.ways[index], kind.num_bytes)] if kind.num_bytes else []
            self._sender().send(_RINGS, [*data, link.records[index]], [(peer, link.landed, 1)], link.stream)
        link.number += 1
        self._traffic.sent_bytes += kind.num_bytes
        self._traffic.undeduplicated_bytes += kind.num_bytes
        if copy:
            self._watch.check()
        return _Sent(self, link, number, kind)

    def receive(self, tensor: torch.Tensor, peer: int, channel: int, wait: bool) -> _Receive:
        self._begin("pp_recv")
        link = self._incoming.get((peer, channel)) or self._incoming_link(peer, channel)
        if (inplace := self._inplace_of(link, tensor.nbytes)) is not None:
            inplace.prefer(peer, channel, stays=False)
        return self._receive(tensor, link, wait)

    def _receive(self, tensor: torch.Tensor, link: _Incoming, wait: bool) -> _Receive:
        receive = _Receive(self, tensor, link, link.number)
        with self._lock:
            link.number += 1
            deferred = link.ring is None or bool(link.deferred)
            if deferred:
                receive.before = self.runtime.record()
                link.deferred.append(receive)
                self._deferring = True
            else:
                current = self.runtime.current_handle()
                stream = current if wait and self._suits(current, link, receive.kind) else None
                self._put(link, receive, self._slot_of(link, receive), stream)
        if deferred and not self._put_deferred():
            self._watch.repeat(self._put_deferred)
        if wait:
            receive.current_stream_wait()
        return receive

    def receive_inplace(
        self, shape: Sequence[int], dtype: torch.dtype, peer: int, channel: int
    ) -> tuple[torch.Tensor, _Receive]:
        self._begin("pp_recv_inplace")
        link = self._incoming.get((peer, channel)) or self._incoming_link(peer, channel)
        num_bytes = math.prod(shape) * dtype.itemsize
        if (inplace := self._inplace_of(link, num_bytes)) is not None:
            inplace.prefer(peer, channel, stays=True)
            with self._lock:
                # Else this one would come before those that are deferred; and a stream that waits from the very first
                # tensor on holds up kernels that a program loads at its begin, maybe those that the sender needs.
                if link.ring is not None and not link.deferred:
                    slot = inplace.receive(peer, channel, link.number, stays=True)
                    if slot is not None:
                        tensor = inplace.tensor(slot, shape, dtype)
                    else:
                        tensor = torch.empty(tuple(shape), dtype=dtype, device=self.runtime.device)
                    receive = _Receive(self, tensor, link, link.number, stays=slot is not None)
                    link.number += 1
                    self._put(link, receive, slot)
                    self._traffic.inplace_bytes += num_bytes * receive.stays
                    return tensor, receive
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self.runtime.device)
        return tensor, self._receive(tensor, link, wait=False)

    @property
    def held(self) -> int:
        """Tensors of `receive_inplace` that somebody has."""
        return 0 if self._inplace is None else self._inplace.held

    def flush(self) -> None:
        self._watch.check()
        self._put_deferred()
        waits = []
        for link in self._outgoing.values():
            if not link.recent:
                continue
            number, kind = link.number - 1, link.recent[-1]
            wait = Wait(link.peer, link.phase(number), f"rank {link.peer} to take {kind.text}", link.lane)
            taken = self._taken_wait(wait, link, number)
            self.runtime.stream_ops([taken, self._watch.note(wait)], link.stream)
            waits.append(wait)
        for wait in waits:
            self._watch.finish(wait)
        if self._inplace is not None:
            with self._lock:
                self._inplace.collect()

    def drop_deferred(self) -> None:
        """Forget receives that wait for the sender's first word: nobody waits for them any more."""
        with self._lock:
            for link in self._incoming.values():
                link.deferred.clear()
            self._deferring = False

    # ---- events -----------------------------------------------------------------------------------------------------

    def await_taken(self, link: _Outgoing, number: int, kind: Kind) -> None:
        """Make the current stream wait until a peer has taken a tensor."""
        self._watch.check()
        self._refuse_capture("the event of a pp_send")
        self._put_deferred()
        lane = lane_of(self.runtime.current_handle())
        wait = Wait(link.peer, link.phase(number), f"rank {link.peer} to take {kind.text}", lane)
        taken = self._taken_wait(wait, link, number)
        self.runtime.stream_ops([taken, self._watch.note(wait)])
        self._watch.check()

    def complete(self, receive: _Receive) -> None:
        """Make the current stream wait until a tensor is there."""
        self._watch.check()
        link = receive.link
        if receive.wait is None:
            key = self._key(link.peer, self.runtime.rank, link.channel)
            expected = f"#{receive.number} {receive.kind.text}"
            offset = self._watch.await_post(key, link.peer, link.phase(receive.number), expected)
            with self._lock:
                link.ring = int(offset)
                self._put_deferred()
        self._watch.check()
        assert receive.wait is not None
        current = self.runtime.current_handle()
        if receive.stream != current and not self._watch.passed(receive.wait):
            self._refuse_capture("the event of a pp_recv")
            # Noted, for `configure` to know of it: what it waits for is noted already, and released where need be.
            wait = Wait(link.peer, link.phase(receive.number), f"its event: {receive.kind.text}", lane_of(current))
            taken = ("wait32_geq", link.taken, receive.number + 1 & 0xFFFFFFFF)
            self.runtime.stream_ops([taken, self._watch.note(wait)])
        if receive.stays and receive.slot is not None:
            receive.slot.use(self.runtime.current_stream())
        self._watch.check()

    # ---- links ------------------------------------------------------------------------------------------------------

    def _begin(self, call: str) -> None:
        self._watch.check()
        self._refuse_capture(call)
        if self._deferring:
            self._put_deferred()

    def _refuse_capture(self, what: str) -> None:
        if self.runtime.is_capturing():
            raise RuntimeError(f"{what} can't be captured into a CUDA graph: tensors have numbers, which would repeat")

    def _await_slots(self, inplace: InPlace) -> None:
        """Wait until nobody has a tensor that lies in place, and streams of the caller have read them.

        Raises:
            RuntimeError: somebody has one, or the streams don't come to an end.
        """
        if inplace.held:
            gc.collect()
        if held := inplace.held:
            raise RuntimeError(f"pp_set_config while {held} tensors of pp_recv_inplace are held: drop them first")
        deadline = time.monotonic() + self._watch.timeout_seconds
        while not inplace.all_free:
            self._watch.heed(-1, "pp_set_config", "streams to have read tensors of pp_recv_inplace")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"pp_set_config: streams that read tensors of pp_recv_inplace have not done so within "
                    f"{self._watch.timeout_seconds:g} s"
                )
            time.sleep(1e-3)

    def _shared_words(self, count: int) -> Window | None:
        """Of `InPlace` for so many slots; None if processes can't share host memory (collective)."""
        if self._words is not None and not InPlace.suffices(self.runtime, self._words, count):
            self._words = None
        if self._words is None and len(self._near) > 1 and self._shares:
            try:
                self._words = InPlace.words(self.runtime, count)
            except UnavailableError as error:
                self._shares = False
                if self.runtime.rank == 0:
                    logger.warning("epv2: tensors of pp_recv_inplace are copied once more, out of a ring: %s", error)
        return self._words

    def _stream(self, *key: Any) -> Any:
        if key not in self._streams:
            self._streams[key] = self.runtime.new_stream()
        return self._streams[key]

    def _key(self, source: int, target: int, channel: int) -> str:
        return f"pp_set_config #{self._configured}/ring {source} {target} {channel}"

    def _outgoing_link(self, peer: int, channel: int) -> _Outgoing:
        """A new link, with the next free ring of the peer, who is told."""
        layout, rank, where = self._layout, self.runtime.rank, f"dst_rank {peer}, channel {channel}"
        self._check_rings(len(self._outgoing), where, rank, "to")
        ring, staging = self._free_ring(peer, where), layout.staging + len(self._outgoing) * layout.ring_bytes
        stream = self._stream("out", peer, channel)
        link = self._outgoing[peer, channel] = _Outgoing(
            peer, channel, stream, self._bases, rank, layout, ring, staging, self.runtime.writes_to_peers()
        )
        self.runtime.meeting.post(self._key(rank, peer, channel), str(ring))
        return link

    def _incoming_link(self, peer: int, channel: int) -> _Incoming:
        with self._lock:
            stream = self._stream("in", peer, channel)
            link = _Incoming(peer, channel, stream, self._bases, self.runtime.rank, self._layout)
            self._incoming[peer, channel] = link
        return link

    def _free_ring(self, owner: int, where: str) -> int:
        """Take the next ring for what comes to `owner`; where it begins in that rank's window.

        Raises:
            BufferSizeError: all are in use.
        """
        used = self.runtime.meeting.count(f"pp_set_config #{self._configured}/rings of {owner}")
        self._check_rings(used, where, owner, "from")
        return self._layout.arrivals + used * self._layout.ring_bytes

    def _check_rings(self, used: int, where: str, owner: int, way: str) -> None:
        if used >= (limit := self._num_rings):
            inplace = self._max_inplace * self._layout.slot_bytes
            num_bytes = align((limit + 1) * self._layout.ring_bytes + inplace, sizing.BUFFER_ALIGNMENT)
            raise BufferSizeError(
                f"rank {self.runtime.rank}, {where}: the buffer of rank {owner} has room for rings {way} {limit} "
                f"(rank, channel) pairs, and they are in use; {limit + 1} need max_senders = {limit + 1} of "
                f"pp_set_config, or num_bytes = {num_bytes}"
            )

    def _put_deferred(self) -> bool:
        """Put receives on their streams whose rings are known by now; whether none is left."""
        if not self._deferring:
            return True
        with self._lock:
            for (peer, channel), link in self._incoming.items():
                if link.deferred and link.ring is None:
                    offset = self.runtime.meeting.peek(self._key(peer, self.runtime.rank, channel))
                    if offset is not None:
                        link.ring = int(offset)
                while link.deferred and link.ring is not None:
                    receive = link.deferred.popleft()
                    self._put(link, receive, self._slot_of(link, receive))
            self._deferring = any(link.deferred for link in self._incoming.values())
            return not self._deferring

    def _suits(self, stream: int, link: _Link, kind: Kind) -> bool:
        """Whether the current stream, of that handle, can do a transfer itself. The legacy one would copy by SMs. Where
        copies bring words to peers, two of different streams could come in the wrong order."""
        if not link.near or not self.runtime.writes_to_peers():
            return False
        return stream > _LAST_SPECIAL_STREAM or (stream == 0 and kind.num_bytes <= _SMALL_BYTES)

    def _inplace_of(self, link: _Link, num_bytes: int) -> InPlace | None:
        """What has places for tensors of a link, if one of that size may have one."""
        inplace = self._inplace
        return inplace if inplace is not None and link.near and inplace.suits(num_bytes) else None

    def _slot_of(self, link: _Incoming, receive: _Receive) -> Slot | None:
        """Where a tensor comes to that is to be copied out of there; None = the ring."""
        if (inplace := self._inplace_of(link, receive.kind.num_bytes)) is None:
            return None
        return inplace.receive(link.peer, link.channel, receive.number, stays=False)

    def _put(self, link: _Incoming, receive: _Receive, place: Slot | None, stream: int | None = None) -> None:
        """Put a receive of what comes to `place` on the current stream, of which `stream` is the handle; None = on the
        link's."""
        runtime, dense, number, kind = self.runtime, receive.dense, receive.number, receive.kind
        peer, index, address = link.peer, number % self._max_inflight, dense.data_ptr()
        stays = receive.stays
        if place is not None:
            assert self._inplace is not None
            slot = self._inplace.address(place)
        else:
            assert link.ring is not None
            slot = self._bases[runtime.rank] + link.ring + index * self._layout.slot_bytes
        record = link.records[index]
        ready = kind.ready(number, number // self._max_inflight)
        pieces = kind.pieces if link.near else [(0, kind.num_bytes)]
        words, count = link.words[index][: len(pieces)], number + 1 & 0xFFFFFFFF

        def judge(seen: bytes) -> tuple[int, str] | None:
            first, *others = struct.unpack_from(f"<{len(pieces)}I", seen, _HEADER_BYTES)
            (also,) = struct.unpack_from("<I", seen, len(seen) - 4)
            if link.near and not reached(also, number):  # an earlier one, on another stream, is what is waited for
                return None
            if first != ready:
                return (peer, header_text(seen, number) if same_turn(first, ready) else "")
            if not link.near:  # of the network a record says nothing but what comes: it may be here alone
                return None if reached(also, count) else (peer, "")
            return None if all(other == ready for other in others) else (peer, "")

        # What is copied then must not look like a result, nor what was copied before.
        spoil = [(slot, kind.num_bytes)] if kind.num_bytes else []
        if len(pieces) > 1:
            spoil.append((address, kind.num_bytes))
        wait = Wait(
            peer,
            link.phase(number),
            f"#{number} {kind.text}",
            link.lane if stream is None else lane_of(stream),
            look=(record, _HEADER_BYTES + 4 * len(pieces)),
            judge=judge,
            release=[("write32", word, ready) for word in words],
            spoil=spoil,
            also=(link.taken if link.near else link.landed, 4),
            keep=() if stays else (dense,),  # a slot is not free before the tensor has come
        )
        operations: list[StreamOp | CopyOp | OrderOp] = []
        if receive.before is not None:
            operations.append(("await", receive.before.handle))
        elif not stays and stream is None:  # else nobody uses that memory
            operations.append(("after", runtime.current_handle()))
        if stream != link.stream_of_last and link.last is not None and not self._watch.passed(link.last):
            operations.append(("wait32_geq", link.taken, number & 0xFFFFFFFF))
        if not link.near:
            operations.append(("wait32_geq", link.landed, count))
            wait.release = [("write32", link.landed, count), *wait.release]
        for piece, (offset, num_bytes) in enumerate(pieces):
            operations.append(("wait32_eq", words[piece], ready))
            if num_bytes and not stays:
                operations.append(("copy", address + offset, slot + offset, num_bytes))
        passed = self._watch.note(wait)
        # A smaller tensor leaves the others as they are, and some turn has the same words again.
        zeroed: list[StreamOp] = [("write32", word, 0) for word in words[1:]]
        if not link.near:
            operations += [("write32", link.taken, count), passed]
        elif runtime.writes_to_peers():  # the next one's stream goes on once this has counted: the peer comes before
            operations += [*zeroed, ("write32", link.inbox, count), ("write32", link.taken, count), passed]
        else:  # all are on the link's stream; the copy may have to wait for a copy engine
            operations += tell(runtime, count, link.taken, [link.inbox], [passed, *zeroed])
        runtime.stream_ops(operations, link.stream if stream is None else None)
        if not link.near:
            self._sender().send(_RINGS, [], [(peer, link.returned, 1)], link.stream)
            self._traffic.network_bytes += kind.num_bytes
            self._traffic.direct_network_bytes += kind.num_bytes
        if place is not None:
            place.arrival = functools.partial(self._watch.passed, wait)
        receive.slot = place
        link.last, link.stream_of_last = wait, stream
        receive.stream, receive.wait = stream, wait  # only now: another thread may wait for it at once

    def _taken_wait(self, wait: Wait, link: _Outgoing, number: int) -> StreamOp:
        """The wait until a peer has taken a tensor, with what `wait` must know to end it."""
        address, peer, count = link.taken, link.peer, number + 1 & 0xFFFFFFFF

        def judge(words: bytes) -> tuple[int, str] | None:
            (seen,) = struct.unpack("<I", words)
            return None if reached(seen, count) else (peer, "")

        wait.look, wait.judge, wait.release = (address, 4), judge, [("write32", address, count)]
        return ("wait32_geq", address, count)


def check_connections(environment: Mapping[str, str] = os.environ) -> None:
    """Raise where too few queues lead to the device: a wait of one stream would hold others that share its queue."""
    given = environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    if not given.isdigit() or int(given) < _LEAST_CONNECTIONS:
        raise UnavailableError(
            f"CUDA_DEVICE_MAX_CONNECTIONS={given or '(unset)'}: transfers wait for each other on streams of their own, "
            f"which would share queues and never end; set it to {_ENOUGH_CONNECTIONS} ({_LEAST_CONNECTIONS} at least) "
            "before the process uses the device; ranks that share a device can have 96 together"
        )
