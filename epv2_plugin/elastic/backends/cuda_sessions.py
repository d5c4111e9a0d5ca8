"""All-gather sessions between GPUs: copy engines, words on streams, one small kernel, and one that sends between nodes.

Gathered tensors lie in the window, at the same offsets on every rank, one behind the other from the start of a session.
An all-gather copies this rank's part into everybody's window and then a word that says so; whoever wants the tensors
waits for these words on his stream. A reduce-scatter copies its tensors into this rank's window, waits for everybody's
word, and one kernel sums what belongs to this rank from all windows, in rank order.

A session overwrites the one before. So a rank tells everybody when it begins one, in the order of its current stream,
behind all that it has still read and copied in the last; and nobody copies before all have begun. Between nodes a rank
says once more that it has seen all others begin: what they sent here for the last session, also one that they gave up,
has landed, and can't come on top of what they send next.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import SessionState, Traffic
from epv2_plugin.elastic.backends.cuda_p2p import check_connections, hash_word
from epv2_plugin.elastic.backends.cuda_parts import Operation, Parts, prepare_sums, text_of
from epv2_plugin.elastic.backends.device import CopyOp, Runtime, Window
from epv2_plugin.elastic.backends.sender import Sender
from epv2_plugin.elastic.backends.watch import Wait, Watch, lane_of
from epv2_plugin.elastic.errors import CommunicationError
from epv2_plugin.elastic.sizing import SessionLayout, align, session_bytes


class CudaSessions(SessionState):
    """See `base.Sessions`.

    Args:
        runtime: the device. watch: ends waits for what never comes. traffic: counts what crossed to other ranks.
        sender: makes the way to other nodes, or gives it (collective); asked where there are any.

    Attributes:
        refused: collective calls that never got here; all ranks must have refused as many.
    """

    def __init__(self, runtime: Runtime, watch: Watch, traffic: Traffic, refused: int, sender: Callable[[], Sender]):
        super().__init__()
        self._sender = sender
        self.refused = refused
        self._runtime, self._watch, self._traffic = runtime, watch, traffic
        self._window: Window | None = None
        self._configured = self._session = 0
        self._begun_on: set[Any] = set()  # streams that have waited for everybody to begin this session
        self._streams: dict[str, Any] = {}
        self._scatter = 0  # the handle of that stream
        self._typed: dict[torch.dtype, torch.Tensor] = {}  # this rank's window

    # ---- base.Sessions ----------------------------------------------------------------------------------------------

    def configure(self, max_session_bytes: int, max_operations: int, num_sms: int) -> None:
        sender = self._sender() if self._runtime.lsa_size < self._runtime.size else None
        self._check_active(False, "agrs_set_config")
        self._watch.check()
        self._configured += 1
        rank, name = self._runtime.rank, f"agrs_set_config #{self._configured}"
        if not self._streams:
            self._streams = {key: self._runtime.new_stream() for key in ("gather", "scatter")}
            with self._runtime.on_stream(self._streams["scatter"]):
                self._scatter = self._runtime.current_handle()
        # What was put on them uses the window that is given up.
        waits = []
        for key, stream in self._streams.items():
            waits.append(Wait(rank, name, "the end of the last session", key))
            self._runtime.stream_ops([self._watch.note(waits[-1])], stream)
        for wait in waits:
            self._watch.finish(wait)
        self._watch.drain()  # the caller's streams, too, may still wait for words that are about to be others
        values = (max_session_bytes, max_operations)

        def step() -> str:
            check_connections()
            prepare_sums(self._runtime)
            return str(values)

        phase = f"{name}, values"
        for peer, seen in enumerate(self._runtime.meeting.agree(f"{name}/values", step, phase)):
            if seen != str(values):
                names = "(max_session_bytes, max_all_gathers_per_session) = "
                raise CommunicationError(rank, peer, phase, f"{names}{values} as on this rank", f"{names}{seen}")
        self._layout = SessionLayout(
            num_ranks=self._runtime.size,
            max_operations=max_operations,
            max_session_bytes=max_session_bytes,
            far=sender is not None,
        )
        if sender is not None:
            sender.meet(f"{name}, end of what was sent before")
        if self._window is None or self._window.num_bytes < self._layout.end:
            num_bytes = align(self._layout.end, sizing.BUFFER_ALIGNMENT)
            self._window = self._runtime.window(num_bytes, ordered=sender is not None)
            self._typed.clear()
        else:
            with self._runtime.on_stream(self._streams["gather"]):
                self._runtime.fill(self._window.peer_pointer(rank, 0), 0, self._layout.tensors)
                zeroed = Wait(rank, name, "zeroed words", "gather")
                self._runtime.stream_ops([self._watch.note(zeroed)])
            self._watch.finish(zeroed)
            self._runtime.meeting.agree(f"{name}/zeroed", lambda: "", f"{name}, end")
        self._parts = Parts(self._runtime, self._watch, self._traffic, self._window, self._layout, name, sender)
        self._bases = self._parts.bases
        self._max_bytes, self._max_operations, self._session = max_session_bytes, max_operations, 0
        self._num_sms = min(num_sms or sizing.REDUCE_SCATTER_SMS, self._runtime.num_sms)

    def begin(self) -> None:
        self._watch.check()
        self._open()
        runtime = self._runtime
        if runtime.is_capturing():
            self.active = False
            raise RuntimeError(
                "a session can't be captured into a CUDA graph: sessions have numbers, which would repeat"
            )
        self._session += 1
        self._begun_on.clear()
        gather = self._streams["gather"]
        ahead: list[Operation] = [("after", runtime.current_handle()), ("after", self._scatter)]
        self._parts.begin(self._session, gather, ahead, [("before", self._scatter)])
        self._parts.ready(self._session, gather)

    def own_slots(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        self._check_active(True, "agrs_get_inplace_tensor")
        self._watch.check()
        # Who has begun this session has got, and read, all that lay there in the last one.
        begun, waits = self._await_begin(("slots", self._runtime.current_handle()), "agrs_get_inplace_tensor", ())
        if waits:
            self._runtime.stream_ops([*begun, *self._watch.note_all(waits)])
        slots = []
        for shape in shapes:
            num_bytes = session_bytes(self._runtime.size, shape, dtype.itemsize)
            offset = self._layout.tensors + self._take_bytes("agrs_get_inplace_tensor", num_bytes)
            whole = self._view(offset, tuple(shape), dtype)
            slots.append(whole[self._runtime.rank])
            if slots[-1].numel():
                self._slots[slots[-1].data_ptr()] = (whole, offset)
        return slots

    def all_gather(
        self, tensors: Sequence[torch.Tensor], keep: bool, out: Sequence[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        self._watch.check()
        runtime = self._runtime
        kinds = _kinds(runtime.size, *[(tensor.shape, tensor.dtype) for tensor in tensors])
        places = [self._place(tensor) if self._slots else None for tensor in tensors]
        room = [0 if place else num_bytes for num_bytes, place in zip(kinds.room, places, strict=True)]
        number, free = self._admit("all_gather", sum(room))
        starts = accumulate(room[:-1], initial=self._layout.tensors + free)
        gathered, offsets = [], []
        for tensor, place, start in zip(tensors, places, starts, strict=True):
            whole, offset = place or (self._view(start, tensor.shape, tensor.dtype), start)
            gathered.append(whole)
            offsets.append(offset)
        text, word = self._identity("all_gather", kinds, number, offsets)
        base, rank, session = self._bases[runtime.rank], runtime.rank, self._session
        spoil = [(base + offset, runtime.size * n) for offset, n in zip(offsets, kinds.num_bytes, strict=True)]
        stream, pushed = self._streams["gather"], runtime.event()
        begun, waits = self._await_begin("gather", f"all_gather #{number}", spoil)
        copies = [copy for tensor, at in zip(tensors, offsets, strict=True) for copy in self._parts.push(tensor, at)]
        own: list[tuple[int, int, int]] = []  # of this rank's parts: where they go, where from, bytes
        if len(self._bases) < runtime.size:
            own = [
                (offset + rank * n, self._parts.incoming(rank, offset, n), n)
                for offset, n in zip(offsets, kinds.num_bytes, strict=True)
            ]
            copies += [
                ("copy", base + at, tensor.data_ptr(), n) for tensor, (_, at, n) in zip(tensors, own, strict=True) if n
            ]
        done = Wait(runtime.rank, "", "", "gather", keep=(*tensors,))
        *passed, gone = self._watch.note_all([*waits, done])
        operations: list[Operation] = [("after", runtime.current_handle()), *begun, *passed, *copies]
        operations += [*self._parts.tell(number, word, [gone]), ("record", pushed.handle)]
        # One call: each takes longer than what it puts on the stream.
        runtime.stream_ops(operations, stream)
        self._parts.send(number, session, stream, lambda _: own)
        self._parts.count(sum(kinds.num_bytes))
        copied = keep or out is not None
        kept = gathered
        if copied:
            kept = [torch.empty_like(whole) for whole in gathered] if out is None else list(out)

        waited: Any = None  # the event behind the first wait

        def wait() -> None:
            nonlocal waited
            self._watch.check()
            if waited is not None:  # the words may be another session's by now
                runtime.wait(waited)
                return
            lane = lane_of(runtime.current_handle())
            names = self._names("all_gather", number, text)
            arrived, arrival = self._parts.await_arrived(number, session, word, *names, lane, spoil)
            operations: list[Operation] = [("await", pushed.handle), *arrived, self._watch.note(arrival)]
            event = runtime.event()
            if not copied:
                runtime.stream_ops([*operations, ("record", event.handle)])
                self._watch.check()
            else:
                runtime.stream_ops(operations)
                self._watch.check()
                with torch.no_grad():
                    for target, whole in zip(kept, gathered, strict=True):
                        target.copy_(whole)
                runtime.stream_ops([("record", event.handle)])
            waited = event

        self._waits.append(wait)
        return kept, wait

    def reduce_scatter(
        self, tensors: Sequence[torch.Tensor], out: Sequence[torch.Tensor] | None = None, scale: float = 1.0
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        self._watch.check()
        runtime, rank = self._runtime, self._runtime.rank
        kinds = _kinds(1, *[(tensor.shape, tensor.dtype) for tensor in tensors])
        number, free = self._admit("reduce_scatter", sum(kinds.room))
        offsets = [*accumulate(kinds.room[:-1], initial=self._layout.tensors + free)]
        text, word = self._identity("reduce_scatter", kinds, number, offsets)
        # A part of ours that is no number makes a sum that is none.
        reduced = [tensor.new_empty(tensor.shape[1:]) for tensor in tensors] if out is None else list(out)
        parts = [(offset, out.nbytes) for offset, out in zip(offsets, reduced, strict=True)]
        spoil = [(self._bases[rank] + offset + rank * n, n) for offset, n in parts]

        def pieces(peer: int) -> list[tuple[int, int, int]]:
            return [(self._parts.incoming(rank, offset, n), offset + peer * n, n) for offset, n in parts]

        stream, done = self._streams["scatter"], runtime.event()
        begun, waits = self._await_begin("scatter", f"reduce_scatter #{number}", spoil)
        copies: list[CopyOp] = [
            ("copy", self._bases[rank] + offset, tensor.data_ptr(), num_bytes)
            for tensor, offset, num_bytes in zip(tensors, offsets, kinds.num_bytes, strict=True)
            if num_bytes
        ]
        names = self._names("reduce_scatter", number, text)
        operations: list[Operation] = [("after", runtime.current_handle()), *begun, *self._watch.note_all(waits)]
        operations += [*copies, *self._parts.tell(number, word)]
        if len(self._bases) < runtime.size:
            runtime.stream_ops(operations, stream)
            operations = []
            self._parts.send(number, self._session, stream, pieces)
        arrived, arrival = self._parts.await_arrived(number, self._session, word, *names, "scatter", spoil)
        runtime.stream_ops([*operations, *arrived, self._watch.note(arrival)], stream)
        for offset, target in zip(offsets, reduced, strict=True):
            self._parts.sum(offset, target, scale, self._num_sms, stream)
        summed = Wait(rank, "", "", "scatter", keep=(*tensors, *reduced))
        runtime.stream_ops([self._watch.note(summed), ("record", done.handle)], stream)
        self._parts.count(sum(out.nbytes for out in reduced))

        def wait() -> None:
            self._watch.check()
            runtime.wait(done)
            self._watch.check()

        self._waits.append(wait)
        return reduced, wait

    # ---- pieces of an operation -------------------------------------------------------------------------------------

    def _view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The gathered tensor `[ranks, *shape]` that begins there in the window."""
        size, num_values = self._runtime.size, math.prod(shape)
        if self._window is None or not num_values:
            return torch.empty((size, *shape), dtype=dtype, device=self._runtime.device)
        if (whole := self._typed.get(dtype)) is None:
            whole = self._typed[dtype] = self._window.tensor.view(dtype)
        # One view instead of three.
        place = whole.storage_offset() + offset // dtype.itemsize
        return whole.as_strided((size, *shape), _strides((size, *shape)), place)

    def _place(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """Where a tensor of `own_slots` belongs."""
        place = self._slots.pop(tensor.data_ptr(), None) if tensor.numel() else None
        if place is None or place[0].dtype != tensor.dtype or place[0].shape[1:] != tensor.shape:
            return None
        return place

    def _identity(self, call: str, kinds: _Kinds, number: int, offsets: Sequence[int]) -> tuple[str, int]:
        """What every rank must come with, as text and as a word."""
        text = kinds.text
        if self.refused:
            text += f" after {self.refused} refused calls"
        return text, hash_word(f"{self._session} {number} {self.refused} {call} {text} {list(offsets)}", self._session)

    def _await_begin(
        self, lane: Any, call: str, spoil: Sequence[tuple[int, int]]
    ) -> tuple[Sequence[Operation], Sequence[Wait]]:
        """The wait until every rank has begun this session, to be noted; once for each stream, nothing after that."""
        if lane in self._begun_on:
            return (), ()
        self._begun_on.add(lane)
        session = self._session
        phase = f"{call} of session #{session}, begin"
        begun, wait = self._parts.await_begun(session, phase, f"the begin of session #{session}", lane, spoil)
        return begun, [wait]

    def _names(self, call: str, number: int, text: str) -> tuple[str, str, str, str]:
        """How an operation is called in messages: phase, text, what and key of `Parts.await_arrived`."""
        key = f"session {self._session} {number}"
        return f"{call} #{number} of session #{self._session}", text, f"{call} of {text}", key


@dataclass(frozen=True)
class _Kinds:
    """What is known of tensors of the same shapes and dtypes, and asked for in each operation.

    Attributes:
        text: "[4, 8] bfloat16, ...". num_bytes: of each. room: in a session, for each.
    """

    text: str
    num_bytes: list[int]
    room: list[int]


@functools.lru_cache(maxsize=4096)
def _kinds(num_ranks: int, *kinds: tuple[torch.Size, torch.dtype]) -> _Kinds:
    """Of tensors that take `num_ranks` times their size in a session."""
    return _Kinds(
        text=", ".join([text_of(*kind) for kind in kinds]),
        num_bytes=[math.prod(shape) * dtype.itemsize for shape, dtype in kinds],
        room=[session_bytes(num_ranks, shape, dtype.itemsize) for shape, dtype in kinds],
    )


@functools.lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a dense tensor."""
    return (*accumulate(reversed(shape[1:]), mul, initial=1),)[::-1]
