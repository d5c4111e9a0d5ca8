"""What streams wait for, and what happens where it does not come.

A wait on a stream has no end and no message. So each is noted here with what it is for, and the stream sets a word of
mapped host memory when it has passed. A thread, awake only while something is under way, looks at these words, which
takes no call of the driver. Where a wait is old it looks further: has another rank given up, has something else come,
is the time over? Then this rank gives up, too: it notes why, tells the others through torch's store, spoils the data
that would look like a result, and writes what the streams wait for into its own memory, so that nothing hangs.

The driver holds up copies, fills and events of all threads while one copies between the device and pageable memory on
the legacy stream, torch's default, and so for ever where that stream waits for what never comes: `x.cpu()` of a tensor
to be received. Words it still writes. So this thread gives it nothing else; what needs more is the scout's, and where
he does not answer this one goes on without (measured, docs/performance.md).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from epv2_plugin.elastic.backends.device import Runtime, StreamOp
from epv2_plugin.elastic.errors import CommunicationError, CommunicationTimeout

_WORDS = 4096  # waits under way
_TICK = 0.02  # seconds between two looks at the words
_PATIENCE = 0.5  # seconds before a wait is looked into, and between two such looks
_NOTICE_SECONDS = 2.0  # in which the others see a notice, before streams go on here as if all were well
# By how much later than others a wait begins that may be in vain because of what another rank waits for: that one is
# to give up first, as it knows who is missing.
LATER_SECONDS = 2 * _PATIENCE
_SCOUT_SECONDS = 0.5  # in which a device that is not held up answers
_MORE_SECONDS = 1.0  # before a wait is given up of which a device that does not answer says nothing
_SPOILED_WORDS = 512  # of each piece of memory that are spoiled where the device can't be asked to fill it
_LOOK_BYTES = 64  # that a wait looks at, at most, for each rank
_FAILED = "failed"  # key of what the first rank to give up has to say


@dataclass(eq=False, slots=True)
class Wait:
    """One wait of a stream, or work whose end somebody wants to know.

    Attributes:
        peer, phase, expected: as in `CommunicationError`.
        lane: names the stream; waits of one lane pass in the order in which they were noted.
        look: own control words (address, bytes) that tell how the wait stands. None: nothing of a peer is waited for.
            also: more of them, behind those.
        judge: of these words: None if they end the wait, else (peer that is missing, what came of it or "").
        release: writes that end it. spoil: memory (address, bytes) to fill with 0xFF before.
        keep: what must live until it has passed.
        done: it has passed. spoiled: see `spoil`.
    """

    peer: int
    phase: str
    expected: str
    lane: Any
    look: tuple[int, int] | None = None
    judge: Callable[[bytes], tuple[int, str] | None] = lambda _: None
    release: Sequence[StreamOp] = ()
    spoil: Sequence[tuple[int, int]] = ()
    also: tuple[int, int] | None = None
    keep: tuple[Any, ...] = ()
    done: bool = False
    spoiled: bool = False
    word: int = -1
    since: float = field(default_factory=time.monotonic)


def lane_of(stream: int) -> tuple[str, int]:
    """As in `Wait`, of a stream of the caller's with that handle."""
    return ("current", stream)


class Watch:
    """The waits of one buffer on one rank.

    Args:
        runtime: the device. timeout_seconds: after which a wait gives up.

    Attributes:
        failure: why this rank gave up, None before that. Every later operation raises it.
    """

    def __init__(self, runtime: Runtime, timeout_seconds: float):
        self.failure: BaseException | None = None
        self.timeout_seconds = timeout_seconds
        self._runtime, self._meeting = runtime, runtime.meeting
        table = runtime.mapped(4 * _WORDS)
        self._table = table.pointer
        # Of the views of memory the one that gives a word soonest.
        self._words = memoryview(table.tensor.numpy().data).cast("i")
        self._free = deque(range(_WORDS))
        self._vouchers, self._vouched = runtime.mapped(4 * _WORDS), 0
        self._scratch = runtime.mapped(8 + _LOOK_BYTES * runtime.size)
        self._stream = runtime.new_stream()
        self._waits: dict[Any, deque[Wait]] = {}  # of each lane that has any, oldest first
        self._chores: list[Callable[[], bool]] = []
        self._changed = threading.Condition()
        self._closing = self._idle = False
        self._next_look = self._release_from = 0.0
        self._looks = 0
        self._answered = True  # the device, when it was last asked
        self._scout = _Scout(runtime)
        self._thread = threading.Thread(target=self._run, name="epv2 watch", daemon=True)
        self._thread.start()

    # ---- for operations ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise why this rank gave up, if it did."""
        if self.failure is not None:
            raise self.failure

    def note(self, wait: Wait) -> StreamOp:
        """Note a wait that is about to be put on a stream; returns the write that must follow it there."""
        return self.note_all([wait])[0]

    def note_all(self, waits: Sequence[Wait]) -> list[StreamOp]:
        """Note several, all of them or (where this raises) none, in the order in which they will pass."""
        while True:
            with self._changed:
                self.check()
                if len(self._free) < len(waits):
                    self._collect()
                if len(self._free) >= len(waits):
                    now = time.monotonic()
                    for wait in waits:
                        wait.word, wait.since = self._free.popleft(), now
                        lane = self._waits.setdefault(wait.lane, deque())
                        self._pass(lane)  # what it keeps is free then, which else the thread sees to
                        lane.append(wait)
                    if self._idle:  # else it looks soon by itself, and to wake it takes longer than a transfer
                        self._changed.notify_all()
                    return [("write32", self._table + 4 * wait.word, 1) for wait in waits]
            time.sleep(1e-3)

    def vouch(self, word: int) -> int:
        """The address of `word`, for a stream that is to copy it behind a wait that is noted next; zero from the moment
        on in which this rank gives up. So a peer can tell what a stream passes on that waited for something from what
        it passes on because it was released."""
        place = self._vouched % _WORDS  # there are not so many waits under way
        self._vouched += 1
        self._vouchers.tensor.view(torch.int32)[place] = word - (word >> 31 << 32)
        return self._vouchers.pointer + 4 * place

    def passed(self, wait: Wait) -> bool:
        """Whether a wait has passed, without a lock: its word is another's only after it is `done`."""
        return wait.done or self._words[wait.word] != 0

    def finish(self, wait: Wait) -> None:
        """Let the host wait, too. Raises CommunicationError where it does not pass."""
        while True:
            self.check()
            if wait.done:
                return
            with self._changed:
                self._collect()
            if not wait.done:
                time.sleep(2e-4)

    def drain(self) -> None:
        """Let the host wait for everything noted. Raises CommunicationError where it does not pass."""
        with self._changed:
            waits = list(itertools.chain.from_iterable(self._waits.values()))
        for wait in waits:
            self.finish(wait)

    def heed(self, peer: int, phase: str, expected: str) -> None:
        """Raise CommunicationError where another rank has given up; the arguments say what this one waits for."""
        if (notice := self._notice()) is not None:
            self._give_up(self._told(notice, peer, phase, expected), tell=False)
        self.check()

    def repeat(self, chore: Callable[[], bool]) -> None:
        """Let a thread call `chore` now and then until it returns True."""
        with self._changed:
            if chore not in self._chores:
                self._chores.append(chore)
                self._changed.notify_all()

    def await_post(self, key: str, peer: int, phase: str, expected: str) -> str:
        """What `peer` posts as `key`; the host waits. Raises CommunicationError where it does not come."""
        begin = next_look = time.monotonic()
        pause = 1e-3
        while (text := self._meeting.peek(key)) is None:
            self.check()
            now = time.monotonic()
            if now > next_look:
                next_look = now + _PATIENCE
                self.heed(peer, phase, expected)
                if now - begin > self.timeout_seconds:
                    self.give_up(CommunicationTimeout(self._runtime.rank, peer, phase, expected, self._nothing))
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return text

    def give_up(self, error: BaseException) -> None:
        """This rank can't go on: tell the others, end every wait."""
        self._give_up(error, tell=True)

    def close(self, seconds: float | None = None) -> None:
        """End the thread once every wait has passed, for which there are `seconds`, None = the watch's own timeout.

        Raises:
            CommunicationError: one did not pass; then all that are left have been ended as after any failure.
        """
        seconds = self.timeout_seconds if seconds is None else seconds
        failed_before = self.failure is not None
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            self._collect()
            first = min(self._heads, key=lambda wait: wait.since, default=None)
        if first is not None:
            phase, expected = first.phase or "the end of the buffer", first.expected or "the end of its streams' work"
            seen = f"nothing within {seconds:g} s"
            self.give_up(CommunicationTimeout(self._runtime.rank, first.peer, phase, expected, seen))
        self._thread.join(30.0)
        self._scout.close()
        # Whoever still asks must not read memory that is gone.
        self._words = memoryview(bytearray(self._words)).cast("i")
        if self.failure is not None and not failed_before:
            raise self.failure

    @property
    def _nothing(self) -> str:
        return f"nothing within {self.timeout_seconds:g} s"

    # ---- the thread -------------------------------------------------------------------------------------------------

    @property
    def _heads(self) -> list[Wait]:
        """What lanes wait for; the lock is held."""
        return [waits[0] for waits in self._waits.values()]

    def _collect(self) -> None:
        """Take passed waits off the list; the lock is held."""
        for lane, waits in [*self._waits.items()]:
            self._pass(waits)
            if not waits:
                del self._waits[lane]

    def _pass(self, waits: deque[Wait]) -> None:
        """Likewise those of one lane."""
        words = self._words
        while waits and words[waits[0].word]:
            wait = waits.popleft()
            words[wait.word] = 0
            self._free.append(wait.word)
            wait.done, wait.keep = True, ()

    def _run(self) -> None:
        self._runtime.adopt_thread()
        while True:
            with self._changed:
                self._collect()
                while not (self._waits or self._chores or self._closing):
                    self._idle = True
                    self._changed.wait()
                self._idle = False
                if self._closing and not self._waits:
                    return
                self._changed.wait(_TICK)
                self._collect()
                heads = self._heads
            try:
                if self.failure is not None:
                    self._chores.clear()
                    if time.monotonic() > self._release_from:
                        self._release(heads)
                    continue
                if self._chores:
                    self._scout.send(self._do_chores, 0)
                if time.monotonic() > self._next_look:
                    self._look_into(heads)
                    self._next_look = time.monotonic() + _PATIENCE
            except Exception as error:  # of the driver: whoever asks next must know
                self._give_up(error, tell=True)

    def _do_chores(self) -> None:
        with self._changed:  # before the calls: what comes up during them asks for another
            chores, self._chores = self._chores, []
        try:
            for chore in chores:
                if not chore():
                    self.repeat(chore)
        except Exception as error:  # of the driver: whoever asks next must know
            self._give_up(error, tell=True)

    def _look_into(self, heads: list[Wait]) -> None:
        now = time.monotonic()
        waiting = [wait for wait in heads if wait.look is not None and now - wait.since > _PATIENCE]
        waiting.sort(key=lambda wait: wait.since)
        if waiting and (notice := self._notice()) is not None:
            first, peer = self._lacking(waiting, notice)
            self._give_up(self._told(notice, peer, first.phase, first.expected), tell=False)
            return
        for wait in waiting:
            found = self._judge(wait)
            if found is None:
                continue
            where = (self._runtime.rank, found[0], wait.phase, wait.expected)
            if found[1]:
                self.give_up(CommunicationError(*where, found[1]))
                return
            limit = self.timeout_seconds + (0 if self._answered else _MORE_SECONDS)
            if time.monotonic() - wait.since > limit:
                self.give_up(CommunicationTimeout(*where, self._nothing))
                return

    def _lacking(self, waiting: Sequence[Wait], notice: dict[str, Any]) -> tuple[Wait, int]:
        """What of `waiting` to report where another rank has given up, and the rank that is missing there: the one that
        both lack, if there is one, rather than the one that is merely held up by it."""
        refused = notice["peer"] == self._runtime.rank
        found: dict[int, Wait] = {}
        for wait in waiting:
            if (judged := self._judge(wait)) is not None:
                found.setdefault(judged[0], wait)
                if judged[0] == notice["peer"]:
                    break
        for peer in (notice["rank"],) if refused else (notice["peer"], notice["rank"]):
            if peer in found:
                return found[peer], peer
        return next(((wait, peer) for peer, wait in found.items()), (waiting[0], waiting[0].peer))

    def _judge(self, wait: Wait) -> tuple[int, str] | None:
        if wait.look is None:
            return None
        places = [wait.look] if wait.also is None else [wait.look, wait.also]
        seen = self._read(places)
        self._answered = seen is not None
        if seen is None:
            return wait.judge(bytes(sum(count for _, count in places))) or (wait.peer, "")
        return wait.judge(seen)

    def _read(self, places: Sequence[tuple[int, int]]) -> bytes | None:
        """Own memory as it is now, past whatever other streams wait for; None if the device does not answer."""
        self._looks += 1
        num_bytes = sum(count for _, count in places)
        number, words = self._looks, self._scratch.tensor[:4].view(torch.int32)

        def copy() -> None:
            with self._runtime.on_stream(self._stream):
                into = self._scratch.pointer + 8
                for address, count in places:
                    self._runtime.copy(into, address, count)
                    into += count
                self._runtime.stream_ops([("write32", self._scratch.pointer, number)])

        deadline = time.monotonic() + _SCOUT_SECONDS
        if not self._scout.send(copy, _SCOUT_SECONDS):
            return None
        while int(words[0]) != number:
            if time.monotonic() > deadline:
                return None
            time.sleep(1e-4)
        return self._scratch.tensor[8 : 8 + num_bytes].numpy().tobytes()

    def _release(self, heads: list[Wait]) -> None:
        for wait in sorted(heads, key=lambda wait: -wait.since):  # two may want a word to differ: the older one's stays
            # Not at once: what its stream still copied before the wait would come after the fill.
            if wait.release and wait.spoiled:
                self._runtime.stream_ops(wait.release, self._stream)
        spoil = [part for wait in heads if not wait.spoiled for part in wait.spoil]
        late = False

        def fill() -> None:
            with self._runtime.on_stream(self._stream):
                for address, num_bytes in spoil:
                    if late:  # it may be somebody else's memory by now
                        return
                    self._runtime.fill(address, 0xFF, num_bytes)

        if spoil and not self._scout.send(fill, _SCOUT_SECONDS):
            late = True
            ones = [
                ("write32", address + at, 0xFFFFFFFF)
                for address, num_bytes in spoil
                for at in range(-address % 4, num_bytes - 3, max(4, num_bytes // _SPOILED_WORDS // 4 * 4))
            ]
            self._runtime.stream_ops(ones, self._stream)
        for wait in heads:
            wait.spoiled = True

    # ---- giving up --------------------------------------------------------------------------------------------------

    def _give_up(self, error: BaseException, tell: bool) -> None:
        with self._changed:
            if self.failure is not None:
                return
            self.failure = error
            self._vouchers.tensor.zero_()
            self._release_from = time.monotonic() + (_NOTICE_SECONDS if tell else 0)
            self._changed.notify_all()
        if tell:
            notice = {"rank": self._runtime.rank, "peer": getattr(error, "peer", -1), "text": str(error)}
            if isinstance(error, CommunicationError) and not isinstance(error, CommunicationTimeout):
                notice["refusal"] = f"rank {self._runtime.rank} expected {error.expected} and saw {error.seen}"
            with contextlib.suppress(RuntimeError):  # the store is gone with the rank that held it
                if self._meeting.peek(_FAILED) is None:
                    self._meeting.post(_FAILED, json.dumps(notice))

    def _notice(self) -> dict[str, Any] | None:
        """What another rank said when it gave up."""
        try:
            text = self._meeting.peek(_FAILED)
        except RuntimeError:  # as above; then the timeouts tell
            return None
        notice = None if text is None else json.loads(text)
        return None if notice is None or notice["rank"] == self._runtime.rank else notice

    def _told(self, notice: dict[str, Any], peer: int, phase: str, expected: str) -> CommunicationError:
        rank = self._runtime.rank
        if notice["rank"] == peer and notice["peer"] == rank and "refusal" in notice:
            seen = f"a refusal: {notice['refusal']}"
        else:
            seen = f"that rank {notice['rank']} gave up: {notice['text']}"
        return CommunicationError(rank, peer, phase, expected, seen)


class _Scout:
    """A thread for calls of the driver that may not return."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._rests = threading.Event()
        self._rests.set()
        self._held = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="epv2 scout", daemon=True)
        self._thread.start()

    def send(self, work: Callable[[], None], seconds: float) -> bool:
        """Let it do `work`, unless it is still at work; whether it was done within `seconds`. Raises what that did."""
        if self._held and not self._rests.is_set():  # it was waited for once
            return False
        if not self._rests.wait(seconds):
            self._held = seconds > 0
            return False
        self._rests.clear()
        self._work.put(work)
        done = self._rests.wait(seconds)
        self._held = not done and seconds > 0
        if done and (error := self._error) is not None:
            self._error = None
            raise error
        return done

    def close(self) -> None:
        """End it, once it has nothing to do."""
        self._work.put(None)
        self._thread.join(_SCOUT_SECONDS)

    def _run(self) -> None:
        self._runtime.adopt_thread()
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception as error:
                self._error = error
            self._rests.set()
