"""Transfers to ranks of other nodes: NCCL's host put and signal, kept apart from all that must never hang.

A stream that waits for a network can't be released where the other side is gone. So nothing of anybody else waits for
the stream of the network. The watch's thread puts there what it has seen to be ready, and only that: puts whose source
has been staged, and waits for signals that a word from the same rank has announced. All else waits for words in own
memory, which the watch can write. After a failure it is the network's stream alone that may stay stuck.

NCCL does everything of a communicator in the order of the calls, and waits in the call where too many puts are under
way. So there is one stream, and few puts are given to it at a time. The calls come from another thread than torch's, so
the communicator is one of its own. It has one context, as NCCL 2.30 takes no other.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from epv2_plugin.elastic.backends.device import Put, Runtime, StreamOp, Window, node_of
from epv2_plugin.elastic.backends.watch import Wait, Watch

SEAL_BYTES = 8
_MOST_PUTS = 16  # under way
_SEALS = 8192  # on their way to the host: twice as many as there can be waits


class Courier:
    """The network of one rank (collective).

    Args:
        runtime: the device, of a group on several nodes. watch: whose thread does the work.
    """

    def __init__(self, runtime: Runtime, watch: Watch):
        self._runtime, self._watch = runtime, watch
        self._transport = runtime.transport()
        self._stream = self._transport.stream
        self._sent, self._heard = [0] * runtime.size, [0] * runtime.size  # puts to and signals of each rank
        self._given = 0  # puts
        table = runtime.mapped(8 * (_SEALS + 1))
        self._words, self._table = table.tensor.view(torch.int64).numpy(), table.pointer  # the last: puts that are done
        self._progress = self._table + 8 * _SEALS
        # What a wait for the network looks at: there is nothing to be seen but the time.
        self._nothing = torch.zeros(1, dtype=torch.int64, device=runtime.device)
        self._look = (self._nothing.data_ptr(), 8)
        self._free = deque(range(_SEALS))
        self._meetings = 0

    def window(self, num_bytes: int) -> Window:
        """Zeroed memory that peers reach, those of other nodes by `send` (collective)."""
        return self._transport.window(num_bytes)

    def send(
        self,
        staged: Wait,
        done: Wait,
        window: Window,
        puts: Callable[[], Sequence[Put] | None],
        seal: tuple[int, int] | None = None,
        behind: Sequence[StreamOp] = (),
    ) -> None:
        """Put something to one rank once `staged`, noted already, has passed.

        Args:
            done: passes when the sources may be written again.
            puts: what, the last with the seal at its end; asked again later where it gives None.
            seal: address in this rank's window and 32 bits that the target waits for: `SEAL_BYTES` are written there.
            behind: what to write when the sources may be written again.
        """
        done.network = True
        passed, peer = self._watch.note(done), done.peer

        left: deque[Put] = deque()

        def errand() -> bool:
            if not left:
                left.extend(puts() or ())
            found = [left.popleft() for _ in range(min(len(left), _MOST_PUTS - self._under_way()))]
            if not found:
                return False
            self._sent[peer] += len(found)
            self._given += len(found)
            with self._runtime.on_stream(self._stream):
                if seal is not None and not left:
                    self._runtime.stream_ops([("write64", seal[0], seal[1] | (self._sent[peer] & 0xFFFFFFFF) << 32)])
                self._transport.put(window, found)
                last = [] if left else [*behind, passed]
                self._runtime.stream_ops([("write64", self._progress, self._given), *last])
            done.judge, done.since = lambda _: (peer, ""), time.monotonic()
            done.look = self._look  # from now on it waits for the network
            return not left

        self._watch.then(staged, errand)

    def expect(self, seen: Wait, seal: int, word: int, landed: int) -> None:
        """Let the current stream wait for a seal of `seen.peer`; once all that it seals has landed, `word` is there.

        Args:
            seen: passes when the seal is here, which says nothing about what it seals. seal: address in this rank's
                window. word: its 32 bits. landed: another address, where a stream may wait for `word`.
        """
        while not self._free:  # the thread is behind
            self._watch.check()
            time.sleep(1e-3)
        place, peer = self._free.popleft(), seen.peer
        passed = self._watch.note(seen)
        self._runtime.stream_ops([("wait32_eq", seal, word)])
        self._runtime.copy(self._table + 8 * place, seal, SEAL_BYTES)
        self._runtime.stream_ops([passed])

        def errand() -> bool:
            count = (int(self._words[place]) >> 32) - self._heard[peer] & 0xFFFFFFFF
            self._free.append(place)
            with self._runtime.on_stream(self._stream):
                if 0 < count < 1 << 31:  # else signals of later puts were waited for
                    self._hear(peer, count)
                self._runtime.stream_ops([("write32", landed, word)])
            return True

        self._watch.then(seen, errand)

    def meet(self, phase: str) -> None:
        """Return when all that any rank has sent has landed (collective). Nothing may be left to be staged."""
        self._watch.drain()
        self._meetings += 1
        rank, node = self._runtime.rank, node_of(self._runtime)
        far = next(peer for peer in range(self._runtime.size) if peer not in node)
        name, expected = f"courier/{self._meetings}", "the puts of other nodes"
        sent = self._runtime.meeting.agree(
            name, lambda: json.dumps(self._sent), phase, lambda: self._watch.heed(far, phase, expected)
        )
        landed = Wait(far, phase, expected, "courier", self._look, lambda _: (far, ""), network=True)
        with self._runtime.on_stream(self._stream):
            for peer, text in enumerate(sent):
                if count := json.loads(text)[rank] - self._heard[peer]:
                    self._hear(peer, count)
            self._runtime.stream_ops([self._watch.note(landed)])
        self._watch.finish(landed)

    def _under_way(self) -> int:
        return self._given - int(self._words[_SEALS])

    def _hear(self, peer: int, count: int) -> None:
        self._heard[peer] += count
        self._transport.await_puts(peer, count)
