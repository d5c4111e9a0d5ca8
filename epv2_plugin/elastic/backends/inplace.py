"""Tensors that stay where the sender's copy engine has put them, so that a receive copies nothing.

A receive offers a free slot of its rank's window, in a word of host memory that the processes of a node share. A send
that finds the offer copies there; one that comes earlier says so in the word and takes the ring, as ever. Both decide
by one atomic exchange, so they agree, tensor by tensor, and neither waits for the other.

What is offered no stream has anything left to do with: a send waits here for nothing that it would not wait for in a
ring. A slot is free again once nobody has the tensor and the streams that waited for it have come that far.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from epv2_plugin.elastic.backends.base import NUM_CHANNELS
from epv2_plugin.elastic.backends.device import Runtime, Window, node_of

LEAST_BYTES = 1 << 20  # of a tensor; to copy a smaller one again takes less time than all this does
_AHEAD = 16  # tensors of a (rank, channel) that a receiver may have offered room for before the sender comes to them
# A word: which turn of its place, counted from 1, in the upper half; below, an offer and its slot, or nothing.
_TURN_SHIFT, _OFFERED = 32, 1 << 31


_everywhere: weakref.WeakSet[InPlace] = weakref.WeakSet()  # of this process


def record_use(tensor: torch.Tensor, stream: Any) -> None:
    """What `tensor.record_stream(stream)` is for memory of torch's, where `tensor` lies in a slot: that is not free
    before the stream has done what it had been given when nobody had the tensor any more."""
    for owner in _everywhere:
        owner.record_use(tensor.data_ptr(), stream)


class Slot:
    """Memory for a tensor.

    Attributes:
        storage: of the tensor that is there. arrival: whether it has come. streams: that use it.
        left: each says whether something is done that was still to be done when nobody had it any more.
    """

    def __init__(self, number: int):
        self.number = number
        self.storage: StorageWeakRef | None = None
        self.arrival: Callable[[], bool] | None = None
        self.streams: list[Any] = []
        self.left: list[Callable[[], bool]] = []

    @property
    def free(self) -> bool:
        return self.storage is None and all(done() for done in self.left)

    def use(self, stream: Any) -> None:
        """Note that a stream uses the tensor."""
        if stream not in self.streams:
            self.streams.append(stream)


class InPlace:
    """What a rank offers, and what others offer it.

    Args:
        runtime: the device. words: host memory of the node. memory: the window. begin, slot_bytes, count: slots in it,
            on every rank.
    """

    def __init__(self, runtime: Runtime, words: Window, memory: Window, begin: int, slot_bytes: int, count: int):
        self._runtime, self._words, self._memory = runtime, words, memory
        self._first, self._begin, self._slot_bytes = node_of(runtime).start, begin, slot_bytes
        self._slots = [Slot(number) for number in range(count)]
        _everywhere.add(self)

    @staticmethod
    def words(runtime: Runtime) -> Window:
        """Memory for what ranks say to each other (collective). Raises UnavailableError as `Runtime.host_window`."""
        return runtime.host_window(8 * _AHEAD * NUM_CHANNELS * runtime.lsa_size)

    @staticmethod
    def reset(runtime: Runtime, words: Window) -> None:
        """Forget what was said to this rank, by others that say nothing more."""
        for offset in range(0, words.num_bytes, 8):
            seen = words.exchange(runtime.rank, offset, 0, 0)
            words.exchange(runtime.rank, offset, seen, 0)

    @property
    def held(self) -> int:
        """How many tensors are there that somebody has."""
        return sum(slot.storage is not None and not slot.storage.expired() for slot in self._slots)

    @property
    def all_free(self) -> bool:
        """Whether no stream has anything left to do with a slot either."""
        self._collect()
        return all(slot.free for slot in self._slots)

    def _collect(self) -> None:
        """See which tensors nobody has any more."""
        for slot in self._slots:
            if slot.storage is not None and slot.storage.expired():
                slot.storage = None
                slot.left = [self._runtime.record(stream).passed for stream in slot.streams]
                if slot.arrival is not None:  # nobody may have waited for it
                    slot.left.append(slot.arrival)

    def offer(
        self, peer: int, channel: int, number: int, shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, Slot] | None:
        """A new tensor for what comes as `number` from `peer`; None if no slot is free, the sender came first, or he
        has not come to the tensor `_AHEAD` before. The caller sets `Slot.arrival`."""
        if (num_bytes := math.prod(shape) * dtype.itemsize) < LEAST_BYTES:
            return None
        self._collect()
        slot = next((slot for slot in self._slots if slot.free), None)
        if slot is None:
            return None
        flat = self._memory.part(self._begin + slot.number * self._slot_bytes, num_bytes)
        # Not a view: Megatron frees nothing that is one.
        tensor = torch.empty(0, dtype=dtype, device=flat.device)
        tensor.set_(flat.untyped_storage(), 0, tuple(shape))  # type: ignore[call-overload]
        if not self._say(peer, channel, number, slot.number):
            return None
        slot.storage, slot.arrival, slot.streams = StorageWeakRef(flat.untyped_storage()), None, []
        return tensor, slot

    def _say(self, peer: int, channel: int, number: int, slot: int) -> bool:
        rank, place, turn = self._runtime.rank, self._place(peer, channel, number), number // _AHEAD + 1
        seen = self._words.exchange(rank, place, 0, 0)
        # Only if the sender has come to the last tensor of this place, and not to this one.
        while seen >> _TURN_SHIFT == turn - 1 and not seen & _OFFERED:
            found = self._words.exchange(rank, place, seen, turn << _TURN_SHIFT | _OFFERED | slot)
            if found == seen:
                return True
            seen = found
        return False

    def accept(self, peer: int, channel: int, number: int) -> int | None:
        """Where in the window of `peer` tensor `number` goes; None: into the ring. Once for each."""
        place, turn = self._place(self._runtime.rank, channel, number), number // _AHEAD + 1
        seen = self._words.exchange(peer, place, 0, 0)
        while (found := self._words.exchange(peer, place, seen, turn << _TURN_SHIFT)) != seen:
            seen = found
        if seen >> _TURN_SHIFT != turn or not seen & _OFFERED:
            return None
        return self._begin + (seen & _OFFERED - 1) * self._slot_bytes

    def record_use(self, address: int, stream: Any) -> None:
        """See `record_use`."""
        number = (address - self._memory.peer_pointer(self._runtime.rank, self._begin)) // self._slot_bytes
        if 0 <= number < len(self._slots):
            self._slots[number].use(stream)

    def _place(self, source: int, channel: int, number: int) -> int:
        """The byte, at the receiver, of the word about a tensor from `source`."""
        return 8 * (((source - self._first) * NUM_CHANNELS + channel) * _AHEAD + number % _AHEAD)
