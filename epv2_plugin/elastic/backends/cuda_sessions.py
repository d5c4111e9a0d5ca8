"""All-gather sessions between GPUs that reach each other's memory: copy engines, words on streams, one small kernel.

Gathered tensors lie in the window, at the same offsets on every rank, one behind the other from the start of a session.
An all-gather copies this rank's part into everybody's window and then a word that says so; whoever wants the tensors
waits for these words on his stream. A reduce-scatter copies its tensors into this rank's window, waits for everybody's
word, and one kernel sums what belongs to this rank from all windows, in rank order.

A session overwrites the one before. So a rank tells everybody when it begins one, in the order of its current stream,
behind all that it has still read and copied in the last; and nobody copies before all have begun.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import SessionState, Traffic, describe
from epv2_plugin.elastic.backends.courier import Courier
from epv2_plugin.elastic.backends.cuda_p2p import check_connections, hash_word
from epv2_plugin.elastic.backends.cuda_parts import Parts, prepare_sums
from epv2_plugin.elastic.backends.device import Runtime, Window
from epv2_plugin.elastic.backends.watch import Wait, Watch
from epv2_plugin.elastic.errors import CommunicationError
from epv2_plugin.elastic.sizing import SessionLayout, align, session_bytes


class CudaSessions(SessionState):
    """See `base.Sessions`.

    Args:
        runtime: the device. watch: ends waits for what never comes. traffic: counts what crossed to other ranks.
        courier: makes the way to other nodes, or gives it (collective); asked where there are any.

    Attributes:
        refused: collective calls that never got here; all ranks must have refused as many.
    """

    def __init__(self, runtime: Runtime, watch: Watch, traffic: Traffic, refused: int, courier: Callable[[], Courier]):
        super().__init__()
        self._courier = courier
        self.refused = refused
        self._runtime, self._watch, self._traffic = runtime, watch, traffic
        self._window: Window | None = None
        self._configured = self._session = 0
        self._begun_on: set[Any] = set()  # streams that have waited for everybody to begin this session
        self._streams: dict[str, Any] = {}

    # ---- base.Sessions ----------------------------------------------------------------------------------------------

    def configure(self, max_session_bytes: int, max_operations: int, num_sms: int) -> None:
        courier = self._courier() if self._runtime.lsa_size < self._runtime.size else None
        self._check_active(False, "agrs_set_config")
        self._watch.check()
        self._configured += 1
        rank, name = self._runtime.rank, f"agrs_set_config #{self._configured}"
        if not self._streams:
            keys = ["gather", "scatter", *(["expected"] if courier is not None else [])]
            self._streams = {key: self._runtime.new_stream() for key in keys}
        # What was put on them uses the window that is given up.
        waits = []
        for key, stream in self._streams.items():
            with self._runtime.on_stream(stream):
                waits.append(Wait(rank, name, "the end of the last session", key))
                self._runtime.stream_ops([self._watch.note(waits[-1])])
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
            far=courier is not None,
        )
        if courier is not None:
            courier.meet(f"{name}, end of what was sent before")
        if self._window is None or self._window.num_bytes < self._layout.end:
            home = self._runtime if courier is None else courier
            self._window = home.window(align(self._layout.end, sizing.BUFFER_ALIGNMENT))
        else:
            with self._runtime.on_stream(self._streams["gather"]):
                self._runtime.fill(self._window.peer_pointer(rank, 0), 0, self._layout.tensors)
                zeroed = Wait(rank, name, "zeroed words", "gather")
                self._runtime.stream_ops([self._watch.note(zeroed)])
            self._watch.finish(zeroed)
            self._runtime.meeting.agree(f"{name}/zeroed", lambda: "", f"{name}, end")
        self._parts = Parts(self._runtime, self._watch, self._traffic, self._window, self._layout, name, courier)
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
        gather, scatter = self._streams["gather"], self._streams["scatter"]
        before = [runtime.record()]
        with runtime.on_stream(scatter):
            before.append(runtime.record())
        with runtime.on_stream(gather):
            for event in before:
                runtime.wait(event)
            if self._session > 1 and len(self._bases) < runtime.size:
                phase = f"session #{self._session}, begin"
                last = f"the begin of session #{self._session - 1}"
                self._parts.await_begun(self._session - 1, phase, last, "gather", ())
            self._parts.begin(self._session)
            begun = runtime.record()
        with runtime.on_stream(scatter):
            runtime.wait(begun)

    def own_slots(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        self._check_active(True, "agrs_get_inplace_tensor")
        self._watch.check()
        # Who has begun this session has got, and read, all that lay there in the last one.
        self._await_begin(("slots", self._runtime.current_stream()), "agrs_get_inplace_tensor", ())
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
        places = [self._place(tensor) for tensor in tensors]
        sizes = [
            0 if place else session_bytes(runtime.size, tensor.shape, tensor.itemsize)
            for tensor, place in zip(tensors, places, strict=True)
        ]
        number, free = self._admit("all_gather", sum(sizes))
        starts = accumulate(sizes[:-1], initial=self._layout.tensors + free)
        gathered, offsets = [], []
        for tensor, place, start in zip(tensors, places, starts, strict=True):
            whole, offset = place or (self._view(start, tuple(tensor.shape), tensor.dtype), start)
            gathered.append(whole)
            offsets.append(offset)
        text, word = self._identity("all_gather", tensors, number, offsets)
        spoil = [(self._bases[runtime.rank] + offset, t.nbytes) for offset, t in zip(offsets, gathered, strict=True)]
        own = [(offset + runtime.rank * t.nbytes, t.nbytes) for offset, t in zip(offsets, tensors, strict=True)]
        before = runtime.record()
        with runtime.on_stream(self._streams["gather"]):
            runtime.wait(before)
            self._await_begin("gather", f"all_gather #{number}", spoil)
            for tensor, offset in zip(tensors, offsets, strict=True):
                self._parts.push(tensor, offset)
            done = Wait(runtime.rank, "", "", "gather", keep=(*tensors,))
            self._parts.tell(number, word, done, lambda _: [(place, place, num_bytes) for place, num_bytes in own])
            pushed = runtime.record()
        self._parts.count(sum(tensor.nbytes for tensor in tensors))
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
            runtime.wait(pushed)
            lane = ("current", runtime.current_stream())
            # Not before: a session may be given up with gathers that nobody waits for, and they may not come.
            self._expect("all_gather", number, text, word)
            self._await_parts("all_gather", number, text, word, spoil, lane)
            self._parts.await_sent(number, word, f"all_gather #{number} of session #{self._session}", lane)
            self._watch.check()
            if copied:
                with torch.no_grad():
                    for target, whole in zip(kept, gathered, strict=True):
                        target.copy_(whole)
            waited = runtime.record()

        self._waits.append(wait)
        return kept, wait

    def reduce_scatter(
        self, tensors: Sequence[torch.Tensor], out: Sequence[torch.Tensor] | None = None, scale: float = 1.0
    ) -> tuple[list[torch.Tensor], Callable[[], None]]:
        self._watch.check()
        runtime, rank = self._runtime, self._runtime.rank
        sizes = [session_bytes(tensor.shape[0], tensor.shape[1:], tensor.itemsize) for tensor in tensors]
        number, free = self._admit("reduce_scatter", sum(sizes))
        offsets = [*accumulate(sizes[:-1], initial=self._layout.tensors + free)]
        text, word = self._identity("reduce_scatter", tensors, number, offsets)
        # A part of ours that is no number makes a sum that is none.
        spoil = [(self._bases[rank] + offset, t.nbytes) for offset, t in zip(offsets, tensors, strict=True)]
        reduced = [tensor.new_empty(tensor.shape[1:]) for tensor in tensors] if out is None else list(out)
        parts = [(offset, out.nbytes) for offset, out in zip(offsets, reduced, strict=True)]

        def pieces(peer: int) -> list[tuple[int, int, int]]:
            return [(self._parts.incoming(rank, offset, n), offset + peer * n, n) for offset, n in parts]

        before = runtime.record()
        with runtime.on_stream(self._streams["scatter"]):
            runtime.wait(before)
            self._await_begin("scatter", f"reduce_scatter #{number}", spoil)
            for tensor, offset in zip(tensors, offsets, strict=True):
                if tensor.nbytes:
                    runtime.copy(self._bases[rank] + offset, tensor.data_ptr(), tensor.nbytes)
            self._parts.tell(number, word, None, pieces)
            self._await_parts("reduce_scatter", number, text, word, spoil, "scatter")
            for offset, target in zip(offsets, reduced, strict=True):
                self._parts.sum(offset, target, scale, self._num_sms)
            summed = Wait(rank, "", "", "scatter", keep=(*tensors, *reduced))
            runtime.stream_ops([self._watch.note(summed)])
            done = runtime.record()
        self._expect("reduce_scatter", number, text, word)
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
        shape = (self._runtime.size, *shape)
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._window is None or not num_bytes:
            return torch.empty(shape, dtype=dtype, device=self._runtime.device)
        return self._window.tensor[offset : offset + num_bytes].view(dtype).view(shape)

    def _place(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """Where a tensor of `own_slots` belongs."""
        place = self._slots.pop(tensor.data_ptr(), None) if tensor.numel() else None
        if place is None or place[0].dtype != tensor.dtype or place[0].shape[1:] != tensor.shape:
            return None
        return place

    def _identity(
        self, call: str, tensors: Sequence[torch.Tensor], number: int, offsets: Sequence[int]
    ) -> tuple[str, int]:
        """What every rank must come with, as text and as a word."""
        text = ", ".join(map(describe, tensors)) + (f" after {self.refused} refused calls" if self.refused else "")
        return text, hash_word(f"{self._session} {number} {self.refused} {call} {text} {list(offsets)}", self._session)

    def _await_begin(self, lane: Any, call: str, spoil: Sequence[tuple[int, int]]) -> None:
        """Make the current stream wait until every rank has begun this session, once for each stream."""
        if lane in self._begun_on:
            return
        self._begun_on.add(lane)
        session = self._session
        phase = f"{call} of session #{session}, begin"
        self._parts.await_begun(session, phase, f"the begin of session #{session}", lane, spoil)

    def _expect(self, call: str, number: int, text: str, word: int) -> None:
        """Let what comes from other nodes for an operation be seen.

        After the wait for everybody's begin: that one, the older, names who is missing.
        """
        if "expected" not in self._streams:
            return
        with self._runtime.on_stream(self._streams["expected"]):
            self._parts.expect(number, word, *self._names(call, number, text))

    def _names(self, call: str, number: int, text: str) -> tuple[str, str, str, str]:
        """How an operation is called in messages: phase, text, what and key of `Parts.await_arrived`."""
        key = f"session {self._session} {number}"
        return f"{call} #{number} of session #{self._session}", text, f"{call} of {text}", key

    def _await_parts(
        self, call: str, number: int, text: str, word: int, spoil: Sequence[tuple[int, int]], lane: Any
    ) -> None:
        """Make the current stream wait for every rank's part of an operation."""
        self._parts.await_arrived(number, word, *self._names(call, number, text), lane, spoil)
