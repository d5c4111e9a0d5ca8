"""Tensors that stay where the sender's copy engine has put them, so that a receive copies nothing.

A rank's window has slots for them. Whichever comes first to a tensor, its receive or its send, takes a free one and
says so in a word of host memory that the processes of a node share; the other finds it there. Both decide by one
atomic exchange, so they agree, tensor by tensor, and neither waits for the other. What finds no slot goes through a
ring. So do small tensors, of which nothing is said here: ranks that disagree on a size fail anyway.

A slot is free, and says so in that memory, once nobody has its tensor and the streams that waited for it have come that
far: a send waits here for nothing that it would not wait for in a ring.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from epv2_plugin.elastic.backends.base import NUM_CHANNELS
from epv2_plugin.elastic.backends.device import Runtime, Window, node_of

LEAST_BYTES = 1 << 20  # of a tensor; to copy a smaller one again takes less time than all this does
# Words for the tensors of a (rank, channel), used in turn: as many may one of the two come to before the other does.
WORDS = 64
# A word counts the tensors that its sender and its receiver have come to, and has the slot, plus one, of the next one
# for whoever is behind.
_COUNT_BITS, _SLOT_BITS = 20, 24
_COUNT, _SLOT = (1 << _COUNT_BITS) - 1, (1 << _SLOT_BITS) - 1
_SENT, _RECEIVED = _SLOT_BITS + _COUNT_BITS, _SLOT_BITS  # where the counts are
_WORD_BITS = 64
_LOOKS = 8  # at the slots, while as many tensors come as there are slots


_Answer = TypeVar("_Answer")
_everywhere: weakref.WeakSet[InPlace] = weakref.WeakSet()  # of this process


def record_use(tensor: torch.Tensor, stream: Any) -> None:
    """What `tensor.record_stream(stream)` is for memory of torch's, where `tensor` lies in a slot: that is not free
    before the stream has done what it had been given when nobody had the tensor any more."""
    for owner in _everywhere:
        owner.record_use(tensor.data_ptr(), stream)


class Slot:
    """Memory for a tensor.

    Attributes:
        storage: of the tensor that stays there, if there is one: refers to nothing once nobody has it. arrival: whether
            the tensor has come; None: its receive is not on a stream yet.
        streams: that use it. left: each says whether a stream has done what it was given while somebody had it.
    """

    def __init__(self, number: int):
        self.number = number
        self.storage: weakref.ref[Any] | None = None
        self.arrival: Callable[[], bool] | None = None
        self.streams: list[Any] = []
        self.left: list[Callable[[], bool]] = []

    def use(self, stream: Any) -> None:
        """Note that a stream uses the tensor."""
        if stream not in self.streams:
            self.streams.append(stream)

    @property
    def held(self) -> bool:
        """Whether somebody has the tensor."""
        return self.storage is not None and self.storage() is not None


class _Link(Generic[_Answer]):
    """How far this rank has come with a peer on a channel.

    Attributes:
        number, answer: of the last large tensor. turn: the word of the next one. stays: what `prefer` has said.
    """

    def __init__(self) -> None:
        self.number, self.turn, self.stays = -1, 0, False
        self.answer: _Answer | None = None

    def come(self, number: int, answer: _Answer | None) -> None:
        self.number, self.answer, self.turn = number, answer, (self.turn + 1) % WORDS


class InPlace:
    """The slots of a node's ranks.

    Args:
        runtime: the device. words: host memory of the node, see `words`. memory: the window. begin, slot_bytes, count:
            slots in it, on every rank.
    """

    def __init__(self, runtime: Runtime, words: Window, memory: Window, begin: int, slot_bytes: int, count: int):
        self._runtime, self._words, self._memory = runtime, words, memory
        self._first, self._begin, self._slot_bytes = node_of(runtime).start, begin, slot_bytes
        self._free = range(_of_links(runtime), words.num_bytes, 8)  # of each word, a bit for each slot
        self._used: dict[int, Slot] = {}  # of this rank, by number
        self._out: dict[tuple[int, int], _Link[int]] = {}  # by rank and channel
        self._in: dict[tuple[int, int], _Link[Slot]] = {}
        self._pause = count // _LOOKS  # receives without a look at all of them, which costs as much as the rest of one
        self._since = 0
        for number in range(count):
            self._give(number)
        _everywhere.add(self)

    @staticmethod
    def words(runtime: Runtime, count: int) -> Window:
        """Memory for what ranks say to each other (collective). Raises UnavailableError as `Runtime.host_window`."""
        return runtime.host_window(_of_links(runtime) + 8 * -(-count // _WORD_BITS))

    @staticmethod
    def suffices(runtime: Runtime, words: Window, count: int) -> bool:
        """Whether it is enough for so many slots."""
        return (words.num_bytes - _of_links(runtime)) * (_WORD_BITS // 8) >= count

    @staticmethod
    def reset(runtime: Runtime, words: Window) -> None:
        """Forget what was said to this rank, by others that say nothing more."""
        for offset in range(0, words.num_bytes, 8):
            seen = words.exchange(runtime.rank, offset, 0, 0)
            words.exchange(runtime.rank, offset, seen, 0)

    @property
    def held(self) -> int:
        """How many tensors are there that somebody has."""
        return sum(slot.held for slot in [*self._used.values()])

    @property
    def all_free(self) -> bool:
        """Whether no stream has anything left to do with a slot either."""
        self.collect()
        return not self._used

    @staticmethod
    def suits(num_bytes: int) -> bool:
        """Whether a tensor is a large one."""
        return num_bytes >= LEAST_BYTES

    def send(self, peer: int, channel: int, number: int) -> int | None:
        """Come to tensor `number` to `peer`, a large one, again if that failed afterwards: where in that rank's window
        it goes, None = into the ring."""
        link = self._out.setdefault((peer, channel), _Link())
        if link.number != number:
            place = self._place(self._runtime.rank, channel)
            # The first one a peer copies itself: it may not know of the ring, and thus come to it late.
            wanted = number > 0 and self._words.exchange(peer, place + 8 * WORDS, 0, 0) != 0
            link.come(number, self._meet(peer, place + 8 * link.turn, _SENT, _RECEIVED, wanted))
        return None if link.answer is None else self._begin + link.answer * self._slot_bytes

    def receive(self, peer: int, channel: int, number: int, stays: bool) -> Slot | None:
        """Come to tensor `number` from `peer`, likewise: the slot that it is in, None = the ring. `stays`: whether it
        may stay there. The caller sets `Slot.arrival`."""
        link = self._in.setdefault((peer, channel), _Link())
        if link.number != number:
            self._since += 1
            if self._since > self._pause:
                self.collect()
            place = self._place(peer, channel)
            taken = self._meet(self._runtime.rank, place + 8 * link.turn, _RECEIVED, _SENT, stays)
            link.come(number, None if taken is None else Slot(taken))
            if link.answer is not None:
                self._used[link.answer.number] = link.answer
        return link.answer

    def prefer(self, peer: int, channel: int, stays: bool) -> None:
        """Say whether receives from `peer` let tensors stay: only then does it take slots before they come."""
        link = self._in.setdefault((peer, channel), _Link())
        if link.stays != stays:
            place = self._place(peer, channel) + 8 * WORDS
            self._words.exchange(self._runtime.rank, place, int(link.stays), int(stays))
            link.stays = stays

    def tensor(self, slot: Slot, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The one that stays there."""
        num_bytes = math.prod(shape) * dtype.itemsize
        flat, slot.storage = self._memory.lend(self._begin + slot.number * self._slot_bytes, num_bytes)
        # Not a view: Megatron frees nothing that is one.
        tensor = torch.empty(0, dtype=dtype, device=flat.device)
        tensor.set_(flat.untyped_storage(), 0, tuple(shape))  # type: ignore[call-overload]
        return tensor

    def address(self, slot: Slot) -> int:
        """Where it is on this rank."""
        return self._memory.peer_pointer(self._runtime.rank, self._begin + slot.number * self._slot_bytes)

    def record_use(self, address: int, stream: Any) -> None:
        """See `record_use`."""
        number = (address - self._memory.peer_pointer(self._runtime.rank, self._begin)) // self._slot_bytes
        if number in self._used:
            self._used[number].use(stream)

    def collect(self) -> None:
        """See which tensors nobody has any more, and which slots are free."""
        self._since = 0
        behind: dict[Any, Callable[[], bool]] = {}  # what streams have been given so far
        for slot in [*self._used.values()]:
            if slot.held or slot.arrival is None:
                continue
            if slot.storage is not None:
                slot.storage = None
                for stream in slot.streams:
                    if stream not in behind:
                        behind[stream] = self._runtime.record(stream).passed
                slot.left = [behind[stream] for stream in slot.streams]
            if slot.arrival() and all(done() for done in slot.left):
                del self._used[slot.number]
                self._give(slot.number)

    def _meet(self, owner: int, place: int, mine: int, theirs: int, wanted: bool) -> int | None:
        """Come to the next tensor of a word at `owner`, as the one whose count is at `mine`: the slot that both take.
        `wanted`: whether to take one for the other who has not come."""
        taken = None
        seen = self._words.exchange(owner, place, 0, 0)
        while True:
            own, slot = seen >> mine & _COUNT, seen & _SLOT
            ahead = (seen >> theirs) - own & _COUNT  # by so many the other one
            if ahead == 0:
                if wanted and taken is None:
                    taken, wanted = self._take(owner), False
                    if taken is None and owner == self._runtime.rank and self._since:
                        self.collect()
                        taken = self._take(owner)
                slot = 0 if taken is None else taken + 1
            elif ahead <= _COUNT >> 1:
                slot = 0
            # Else what is there is for a tensor that the other has yet to come to, before this one.
            counts = (own + 1 & _COUNT) << mine | (seen >> theirs & _COUNT) << theirs
            found = self._words.exchange(owner, place, seen, counts | slot)
            if found == seen:
                break
            seen = found
        if ahead == 0:
            return taken
        if taken is not None:
            self._give(taken, owner)
        agreed = seen & _SLOT
        return agreed - 1 if agreed and ahead <= _COUNT >> 1 else None

    def _take(self, owner: int) -> int | None:
        """A slot of that rank that is free, which it is no more."""
        for first, offset in enumerate(self._free):
            seen = self._words.exchange(owner, offset, 0, 0)
            while seen:
                lowest = seen & -seen
                found = self._words.exchange(owner, offset, seen, seen ^ lowest)
                if found == seen:
                    return first * _WORD_BITS + lowest.bit_length() - 1
                seen = found
        return None

    def _give(self, slot: int, owner: int | None = None) -> None:
        """Let a slot of a rank, or this one, be free."""
        rank = self._runtime.rank if owner is None else owner
        offset, bit = self._free[slot // _WORD_BITS], 1 << slot % _WORD_BITS
        seen = self._words.exchange(rank, offset, 0, 0)
        while (found := self._words.exchange(rank, offset, seen, seen | bit)) != seen:
            seen = found

    def _place(self, source: int, channel: int) -> int:
        """The byte, at the receiver, where words about tensors from `source` begin; behind them is `prefer`'s."""
        return 8 * ((source - self._first) * NUM_CHANNELS + channel) * (WORDS + 1)


def _of_links(runtime: Runtime) -> int:
    """Bytes of the words about tensors, on each rank."""
    return 8 * (WORDS + 1) * NUM_CHANNELS * runtime.lsa_size
