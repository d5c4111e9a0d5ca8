"""Point-to-point between GPUs, without a kernel: copy engines, words on streams, and NCCL's puts between nodes.

A rank keeps a ring of slots in its window for each link (destination, channel). A send copies the tensor into the next
slot and then writes a record into the receiver's window: number, dtype and shape, and behind them the word `ready`, a
hash of these. The receiver's stream waits for exactly that word, copies the tensor out of the sender's slot, and tells
the sender how many it has taken. That is the credit: the send that wants the slot again waits for it, on its stream.

Streams write words only into their own rank's memory; a copy brings them to the peer, as data. Every link has a stream
for each direction. Where a ring lies the sender says once, through torch's store; receives that are posted before that
are put on their stream once it has, in order.

To a rank of another node the tensor goes from the sender's slot to one of a ring that the receiver keeps; where that is
he says when he first receives. Then comes the record, whose hash does not say that the tensor is there: the receiver's
stream waits for a second word, which comes behind the network's signals (`courier.py`). A credit is a word of the slot,
not of the link, as two of the link could come in the other order.
"""

from __future__ import annotations

import os
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import NUM_CHANNELS, Traffic, describe
from epv2_plugin.elastic.backends.courier import SEAL_BYTES, Courier
from epv2_plugin.elastic.backends.device import CopyOp, Put, Runtime, StreamOp, Window, node_of
from epv2_plugin.elastic.backends.watch import Wait, Watch
from epv2_plugin.elastic.errors import BufferSizeError, CommunicationError, UnavailableError
from epv2_plugin.elastic.sizing import RingLayout, align

_HEADER_WORDS = 4  # 64 bits each: number, what, and two of dimensions
_DIMENSION_BYTES = 16
_TOO_LONG = 1 << 16  # in `what`: the dimensions do not fit
_DTYPES = sorted(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))
_PEEK_SECONDS = 0.02  # between two questions to the store that all ranks ask
_USUAL_RINGS = 4  # two peers, activations and gradients to each
# Without the variable CUDA has 8 queues, and the streams of four waiting links hold all others (docs/performance.md).
_LEAST_CONNECTIONS, _ENOUGH_CONNECTIONS = 10, 32


def header(number: int, tensor: torch.Tensor) -> list[int]:
    """Words of 64 bits that say which tensor it is."""
    packed = bytearray()
    for size in tensor.shape:  # seven bits a byte, the last of a size without the eighth
        while size > 127:
            packed.append(size & 127 | 128)
            size >>= 7
        packed.append(size)
    what = _DTYPES.index(str(tensor.dtype)) | tensor.dim() << 8
    if len(packed) > _DIMENSION_BYTES:
        what, packed = what | _TOO_LONG, bytearray()
    return [number, what, *struct.unpack("<2Q", packed.ljust(_DIMENSION_BYTES, b"\0"))]


def header_text(words: bytes) -> str:
    """What `header` packed: "#2 [4, 8] bfloat16"."""
    number, what = struct.unpack_from("<2Q", words)
    dtype = _DTYPES[what & 255].removeprefix("torch.") if what & 255 < len(_DTYPES) else "unknown dtype"
    count = what >> 8 & 255
    if what & _TOO_LONG:
        return f"#{number} [{count} dimensions] {dtype}"
    sizes, shift, size = [], 0, 0
    for byte in words[16 : 16 + _DIMENSION_BYTES]:
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            sizes.append(size)
            shift = size = 0
    return f"#{number} {sizes[:count]} {dtype}"


def hash_word(text: str, turn: int) -> int:
    """A word of 32 bits for `text`, never 0 and never that of the turn before."""
    return zlib.crc32(text.encode()) >> 8 << 8 | turn % 255 + 1


def same_turn(word: int, other: int) -> bool:
    """Whether two of `hash_word` are of the same turn."""
    return word & 255 == other & 255


class _Outgoing:
    """A link to a peer."""

    def __init__(self, stream: Any, offset: int):
        self.stream, self.offset = stream, offset  # of its ring in the window
        self.arrivals: int | None = None  # where the ring of a receiver on another node is
        self.next_peek = 0.0  # time to ask for that again
        self.number = 0  # tensors so far
        self.recent: deque[str] = deque()  # what lies in its slots, oldest first


class _Incoming:
    """A link from a peer. `deferred` receives wait until the peer has said where its ring is."""

    def __init__(self, stream: Any, ring: int | None):
        self.stream, self.ring = stream, ring  # address of the ring; here where the peer is on another node
        self.number = 0
        self.deferred: deque[_Receive] = deque()
        self.last: Wait | None = None


class _Sent:
    """The event of a send: the peer has taken it."""

    def __init__(self, owner: CudaPointToPoint, link: tuple[int, int], number: int, what: str):
        self._owner, self._link, self._number, self._what = owner, link, number, what

    def current_stream_wait(self) -> None:
        """Make the current stream wait. Raises CommunicationError where this rank knows that it will not come."""
        self._owner.await_taken(*self._link, self._number, self._what)


class _Receive:
    """A receive and its event: the tensor holds data."""

    def __init__(self, owner: CudaPointToPoint, tensor: torch.Tensor, peer: int, channel: int, number: int):
        self._owner, self.peer, self.channel, self.number = owner, peer, channel, number
        self.tensor, self.dense = tensor, tensor
        if not tensor.is_contiguous():
            self.dense = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self.before = owner.runtime.record()
        self.after: Any = None

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
        num_bytes: that the buffer was made with: room for more rings than the usual four; None = these.
        courier: makes the way to other nodes, or gives it (collective); asked where there are any.
    """

    def __init__(
        self,
        runtime: Runtime,
        watch: Watch,
        traffic: Traffic,
        num_bytes: int | None,
        courier: Callable[[], Courier],
    ):
        self.runtime = runtime
        self._courier = courier
        self._near = node_of(runtime)
        self._watch, self._traffic, self._num_bytes = watch, traffic, num_bytes or 0
        self._window: Window | None = None
        self._streams: dict[tuple[str, int, int], Any] = {}
        self._configured = 0
        self._max_inflight = 0
        self._outgoing: dict[tuple[int, int], _Outgoing] = {}
        self._incoming: dict[tuple[int, int], _Incoming] = {}
        self._lock = threading.RLock()  # of deferred receives, which the watch's thread puts on their streams, too

    # ---- base.PointToPoint ------------------------------------------------------------------------------------------

    def configure(self, max_tensor_bytes: int, max_inflight: int) -> None:
        far = len(self._near) < self.runtime.size
        courier = self._courier() if far else None
        self.flush()
        for (peer, channel), link in self._incoming.items():
            if link.deferred:
                phase = self._phase("pp_recv", link.deferred[0].number, peer, channel)
                raise RuntimeError(f"pp_set_config before the event of {phase} was waited for")
            if link.last is not None:
                self._watch.finish(link.last)
        self._watch.drain()  # the caller's streams, too, may still wait for words that are about to be others
        self._configured += 1
        rank, name = self.runtime.rank, f"pp_set_config #{self._configured}"
        values = (max_tensor_bytes, max_inflight)

        def step() -> str:
            check_connections()
            return str(values)

        phase = f"{name}, values"
        for peer, seen in enumerate(self.runtime.meeting.agree(f"{name}/values", step, phase)):
            if seen != str(values):
                names = "(max_tensor_bytes, max_inflight) = "
                raise CommunicationError(rank, peer, phase, f"{names}{values} as on this rank", f"{names}{seen}")
        ring_bytes = max_inflight * sizing.ring_slot_bytes(max_tensor_bytes)
        self._num_rings = min(max(_USUAL_RINGS, self._num_bytes // ring_bytes), (self.runtime.size - 1) * NUM_CHANNELS)
        self._max_inflight = max_inflight
        self._layout = RingLayout(
            num_ranks=self.runtime.size,
            num_channels=NUM_CHANNELS,
            max_inflight=max_inflight,
            max_tensor_bytes=max_tensor_bytes,
            num_rings=self._num_rings,
            far=far,
        )
        if courier is not None:
            courier.meet(f"{name}, end of what was sent before")
        if self._window is None or self._window.num_bytes < self._layout.end:
            home = self.runtime if courier is None else courier
            self._window = home.window(align(self._layout.end, sizing.BUFFER_ALIGNMENT))
        else:
            with self.runtime.on_stream(self._stream("config", rank, 0)):
                self.runtime.fill(self._window.peer_pointer(rank, 0), 0, self._layout.slots)
                zeroed = Wait(rank, name, "zeroed words", "config")
                self.runtime.stream_ops([self._watch.note(zeroed)])
            self._watch.finish(zeroed)
            self.runtime.meeting.agree(f"{name}/zeroed", lambda: "", f"{name}, end")
        self._bases = {peer: self._window.peer_pointer(peer, 0) for peer in self._near}
        self._outgoing, self._incoming = {}, {}

    def send(self, tensor: torch.Tensor, peer: int, channel: int, copy: bool) -> _Sent:
        self._begin("pp_send")
        link = self._outgoing_link(peer, channel)
        runtime, layout, number = self.runtime, self._layout, link.number
        # A view of its own: the caller may give his tensor other memory (Megatron does) before the copy has run.
        dense = tensor.detach().contiguous()
        what = describe(dense)
        slot = self._bases[runtime.rank] + link.offset + number % self._max_inflight * layout.slot_bytes
        record = layout.record(peer, channel, number, outgoing=True)
        outbox = self._bases[runtime.rank] + record
        inbox = layout.record(runtime.rank, channel, number, outgoing=False)
        before = runtime.record()
        wait = Wait(peer, self._phase("pp_send", number, peer, channel), "", ("out", peer, channel), keep=(dense,))
        credit: list[StreamOp] = []
        if number >= self._max_inflight:
            oldest = self._phase("pp_send", number - self._max_inflight, peer, channel)
            wait.expected = f"rank {peer} to take {link.recent.popleft()} of {oldest}"
            credit = [self._taken_wait(wait, peer, channel, number - self._max_inflight)]
        link.recent.append(what)
        ready = hash_word(f"#{number} {what}", number // self._max_inflight)
        runtime.wait(before, link.stream)
        operations: list[StreamOp | CopyOp] = [*credit]
        if dense.nbytes:
            operations.append(("copy", slot, dense.data_ptr(), dense.nbytes))
        operations += [("write64", outbox + 8 * i, word) for i, word in enumerate(header(number, dense))]
        passed = self._watch.note(wait)
        if peer in self._near:
            operations += [("write32", outbox + 8 * _HEADER_WORDS, ready), passed]
            operations.append(("copy", self._bases[peer] + inbox, outbox, 8 * _HEADER_WORDS + 4))
        else:
            operations.append(passed)
        # One call: under MPS each call of the driver takes longer than the copy of a small tensor.
        runtime.stream_ops(operations, link.stream)
        copied = runtime.record(link.stream) if copy else None
        if peer not in self._near:
            self._send_far(wait, peer, channel, number, what, dense.nbytes, ready)
        link.number += 1
        self._traffic.sent_bytes += dense.nbytes
        self._traffic.undeduplicated_bytes += dense.nbytes
        if copy:
            runtime.wait(copied)
            self._watch.check()
        return _Sent(self, (peer, channel), number, what)

    def receive(self, tensor: torch.Tensor, peer: int, channel: int) -> _Receive:
        self._begin("pp_recv")
        with self._lock:
            if (peer, channel) not in self._incoming:
                ring = None if peer in self._near else self._ring_for(peer, channel)
                self._incoming[peer, channel] = _Incoming(self._stream("in", peer, channel), ring)
            link = self._incoming[peer, channel]
        receive = _Receive(self, tensor, peer, channel, link.number)
        with self._lock:
            link.number += 1
            link.deferred.append(receive)
        if not self._put_deferred():
            self._watch.repeat(self._put_deferred)
        return receive

    def flush(self) -> None:
        self._watch.check()
        self._put_deferred()
        waits = []
        for (peer, channel), link in self._outgoing.items():
            recent = list(enumerate(link.recent, link.number - len(link.recent)))
            for number, what in recent[-1:] if peer in self._near else recent:
                phase = self._phase("pp_send", number, peer, channel)
                wait = Wait(peer, phase, f"rank {peer} to take {what}", ("out", peer, channel))
                with self.runtime.on_stream(link.stream):
                    taken = self._taken_wait(wait, peer, channel, number)
                    self.runtime.stream_ops([taken, self._watch.note(wait)])
                waits.append(wait)
        for wait in waits:
            self._watch.finish(wait)

    # ---- events -----------------------------------------------------------------------------------------------------

    def await_taken(self, peer: int, channel: int, number: int, what: str) -> None:
        """Make the current stream wait until `peer` has taken a tensor."""
        self._watch.check()
        self._put_deferred()
        phase = self._phase("pp_send", number, peer, channel)
        wait = Wait(peer, phase, f"rank {peer} to take {what}", ("current", self.runtime.current_stream()))
        taken = self._taken_wait(wait, peer, channel, number)
        self.runtime.stream_ops([taken, self._watch.note(wait)])
        self._watch.check()

    def complete(self, receive: _Receive) -> None:
        """Make the current stream wait until a tensor is there."""
        self._watch.check()
        if receive.after is None:
            link, peer, channel = self._incoming[receive.peer, receive.channel], receive.peer, receive.channel
            phase = self._phase("pp_recv", receive.number, peer, channel)
            expected = f"#{receive.number} {describe(receive.dense)}"
            offset = self._watch.await_post(self._key(peer, self.runtime.rank, channel), peer, phase, expected)
            with self._lock:
                link.ring = self._bases[peer] + int(offset)
                self._put_deferred()
        self.runtime.wait(receive.after)
        self._watch.check()

    # ---- links ------------------------------------------------------------------------------------------------------

    def _begin(self, call: str) -> None:
        self._watch.check()
        if self.runtime.is_capturing():
            raise RuntimeError(f"{call} can't be captured into a CUDA graph: tensors have numbers, which would repeat")
        self._put_deferred()

    @property
    def _registered(self) -> Window:
        assert self._window is not None
        return self._window

    def _stream(self, *key: Any) -> Any:
        if key not in self._streams:
            self._streams[key] = self.runtime.new_stream()
        return self._streams[key]

    def _key(self, source: int, target: int, channel: int) -> str:
        return f"pp_set_config #{self._configured}/ring {source} {target} {channel}"

    def _outgoing_link(self, peer: int, channel: int) -> _Outgoing:
        """The link, with a ring; the first send takes the next free one and tells the receiver."""
        if (peer, channel) not in self._outgoing:
            used, layout = len(self._outgoing), self._layout
            self._check_rings(f"dst_rank {peer}, channel {channel}", "to", [*self._outgoing])
            offset = layout.slots + used * layout.ring_bytes
            self._outgoing[peer, channel] = _Outgoing(self._stream("out", peer, channel), offset)
            if peer in self._near:
                self.runtime.meeting.post(self._key(self.runtime.rank, peer, channel), str(offset))
        return self._outgoing[peer, channel]

    def _ring_for(self, peer: int, channel: int) -> int:
        """Address of the next free ring for tensors from another node, after the sender was told."""
        links = [link for link in self._incoming if link[0] not in self._near]
        self._check_rings(f"src_rank {peer}, channel {channel}", "from", links)
        offset = self._layout.arrivals + len(links) * self._layout.ring_bytes
        self.runtime.meeting.post(self._key(peer, self.runtime.rank, channel), str(offset))
        return self._bases[self.runtime.rank] + offset

    def _check_rings(self, where: str, way: str, links: Sequence[tuple[int, int]]) -> None:
        if (used := len(links)) >= self._num_rings:
            names = ", ".join(f"rank {p} channel {c}" for p, c in links)
            num_bytes = align((used + 1) * self._layout.ring_bytes, sizing.BUFFER_ALIGNMENT)
            raise BufferSizeError(
                f"rank {self.runtime.rank}, {where}: the buffer has room for rings {way} {used} (rank, channel) pairs, "
                f"and they are in use ({names}); {used + 1} need num_bytes = {num_bytes}"
            )

    def _send_far(
        self, staged: Wait, peer: int, channel: int, number: int, what: str, num_bytes: int, ready: int
    ) -> None:
        """Put a tensor, and the record behind it, into another node once they are staged and it is known where."""
        rank, layout, link = self.runtime.rank, self._layout, self._outgoing[peer, channel]
        inside = number % self._max_inflight * layout.slot_bytes
        outbox = layout.record(peer, channel, number, outgoing=True)
        inbox = layout.record(rank, channel, number, outgoing=False)
        key = self._key(rank, peer, channel)

        def puts() -> list[Put] | None:
            if link.arrivals is None:
                if time.monotonic() < link.next_peek:
                    return None
                link.next_peek = time.monotonic() + _PEEK_SECONDS
                if (offset := self.runtime.meeting.peek(key)) is None:
                    return None
                link.arrivals = int(offset)
            data = [(peer, link.arrivals + inside, link.offset + inside, num_bytes)] if num_bytes else []
            return [*data, (peer, inbox, outbox, 8 * _HEADER_WORDS + SEAL_BYTES)]

        phase = self._phase("pp_send", number, peer, channel)
        done = Wait(peer, phase, f"{what} to reach rank {peer}", ("put", peer, channel))
        seal = (self._bases[rank] + outbox + 8 * _HEADER_WORDS, ready)
        self._courier().send(staged, done, self._registered, puts, seal)

    def _put_deferred(self) -> bool:
        """Put receives on their streams whose rings are known by now; whether none is left."""
        with self._lock:
            for (peer, channel), link in self._incoming.items():
                if link.deferred and link.ring is None:
                    offset = self.runtime.meeting.peek(self._key(peer, self.runtime.rank, channel))
                    if offset is not None:
                        link.ring = self._bases[peer] + int(offset)
                while link.deferred and link.ring is not None:
                    self._put(link, link.ring, link.deferred.popleft())
            return not any(link.deferred for link in self._incoming.values())

    def _put(self, link: _Incoming, ring: int, receive: _Receive) -> None:
        runtime, layout, dense = self.runtime, self._layout, receive.dense
        peer, channel, number = receive.peer, receive.channel, receive.number
        slot = ring + number % self._max_inflight * layout.slot_bytes
        own = self._bases[runtime.rank]
        record = own + layout.record(peer, channel, number, outgoing=False)
        expected = f"#{number} {describe(dense)}"
        ready = hash_word(expected, number // self._max_inflight)

        def judge(words: bytes) -> tuple[int, str] | None:
            (seen,) = struct.unpack_from("<I", words, 8 * _HEADER_WORDS)
            if seen == ready:
                return None
            return (peer, header_text(words) if same_turn(seen, ready) else "")

        def is_here(words: bytes) -> tuple[int, str] | None:
            return None if struct.unpack("<I", words) == (ready,) else (peer, "")

        phase, lane = self._phase("pp_recv", number, peer, channel), ("in", peer, channel)
        word = record + 8 * _HEADER_WORDS
        wait = Wait(
            peer,
            phase,
            expected,
            lane,
            look=(record, 8 * _HEADER_WORDS + 4),
            judge=judge,
            release=[("write32", word, ready)],
            # What is copied then must not look like a result.
            spoil=[(slot, dense.nbytes)] if dense.nbytes else [],
            keep=(dense,),
        )
        runtime.wait(receive.before, link.stream)
        data: list[CopyOp] = [("copy", dense.data_ptr(), slot, dense.nbytes)] if dense.nbytes else []
        if peer in self._near:
            outbox = own + layout.taken(peer, channel, outgoing=True)
            passed = self._watch.note(wait)
            taken: list[StreamOp] = [("write32", outbox, number + 1 & 0xFFFFFFFF), passed]
            runtime.stream_ops([("wait32_eq", word, ready), *data, *taken], link.stream)
            receive.after = runtime.record(link.stream)
            inbox = self._bases[peer] + layout.taken(runtime.rank, channel, outgoing=False)
            runtime.stream_ops([("copy", inbox, outbox, 4)], link.stream)
        else:
            landed = own + layout.landed(peer, channel, number)
            seen = wait  # which may have passed as soon as it is noted
            wait = replace(seen, look=(landed, 4), judge=is_here, release=[("write32", landed, ready)])
            with runtime.on_stream(link.stream):
                self._courier().expect(seen, word, ready, landed)
            passed = self._watch.note(wait)
            outbox = layout.returned(peer, channel, number, outgoing=True)
            taken = [("write32", own + outbox, self._turn(number)), passed]
            runtime.stream_ops([("wait32_eq", landed, ready), *data, *taken], link.stream)
            receive.after = runtime.record(link.stream)
            inbox = layout.returned(runtime.rank, channel, number, outgoing=False)
            done = Wait(peer, phase, f"rank {peer} to know that {describe(dense)} was taken", ("put", *lane))
            self._courier().send(wait, done, self._registered, lambda: [(peer, inbox, outbox, 4)])
            self._traffic.network_bytes += dense.nbytes
            self._traffic.direct_network_bytes += dense.nbytes
        link.last = wait

    def _taken_wait(self, wait: Wait, peer: int, channel: int, number: int) -> StreamOp:
        """The wait until `peer` has taken a tensor, with what `wait` must know to end it."""
        own = self._bases[self.runtime.rank]
        if peer in self._near:
            address, count = own + self._layout.taken(peer, channel, outgoing=False), number + 1 & 0xFFFFFFFF
        else:
            address = own + self._layout.returned(peer, channel, number, outgoing=False)
            count = self._turn(number)

        def judge(words: bytes) -> tuple[int, str] | None:
            (seen,) = struct.unpack("<I", words)
            return None if (seen - count) & 0xFFFFFFFF < 1 << 31 else (peer, "")

        wait.look, wait.judge, wait.release = (address, 4), judge, [("write32", address, count)]
        return ("wait32_geq", address, count)

    def _turn(self, number: int) -> int:
        """How often its slot has been used with this tensor."""
        return number // self._max_inflight + 1 & 0xFFFFFFFF

    def _phase(self, call: str, number: int, peer: int, channel: int) -> str:
        way = f"to rank {peer}" if call == "pp_send" else f"from rank {peer}"
        where = f"slot {number % self._max_inflight} of {self._max_inflight}"
        return f"{call} {way}, tensor #{number}, {where}" + (f", channel {channel}" if channel else "")


def check_connections() -> None:
    """Raise where too few queues lead to the device: a wait of one stream would hold others that share its queue."""
    given = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    if not given.isdigit() or int(given) < _LEAST_CONNECTIONS:
        raise UnavailableError(
            f"CUDA_DEVICE_MAX_CONNECTIONS={given or '(unset)'}: transfers wait for each other on streams of their own, "
            f"which would share queues and never end; set it to {_ENOUGH_CONNECTIONS} ({_LEAST_CONNECTIONS} at least) "
            "before the process uses the device; ranks that share a device can have 96 together"
        )
