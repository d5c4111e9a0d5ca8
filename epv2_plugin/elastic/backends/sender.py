"""Transfers to ranks of other nodes, in the order of a stream: puts and words over NCCL's GIN.

One warp gives them to the network where the stream comes to them, and ends: no SM touches the data, and the host is not
needed again. What a stream waits for is a word of its own rank's window, as inside a node, which this rank can write
where a peer is gone.

NCCL's host calls for this (ncclPutSignal, ncclWaitSignal) can't do it. They go in one order, whatever the peers, so
somebody must make them when their time has come, in another thread; and they record events, which the driver holds up
while any thread copies between the device and pageable memory on the legacy stream. `x.cpu()` of what a transfer is to
bring would wait for ever (measured, docs/performance.md).
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Sequence
from typing import Any

from epv2_plugin.elastic.backends.device import Put, Runtime, StreamOp, Window, node_of
from epv2_plugin.elastic.backends.watch import Wait, Watch
from epv2_plugin.jit import kernels

_AT_ONCE = 32  # puts, and words, of a launch
_THREADS = 32
_PUT, _WORD = struct.Struct("<3Qi4x"), struct.Struct("<2Qi4x")

# (rank, byte in its part of the window, by how much): 64 bits, at a multiple of 8, that only one other rank raises
Word = tuple[int, int, int]


class Sender:
    """What this rank sends to other nodes. Collective.

    Args:
        runtime: of a group on several nodes. watch: ends waits for what never comes.

    Raises:
        UnavailableError: NCCL has no connections between all ranks.
    """

    def __init__(self, runtime: Runtime, watch: Watch):
        self._runtime, self._watch = runtime, watch

        def prepare() -> str:
            runtime.prepare(kernels.SEND)
            return ""

        runtime.meeting.agree("sender", prepare)
        # One context: what is put to a rank, on whatever stream, comes before the words that are raised there later.
        # (Nobody uses its signal: a network has one at least.)
        self._network = runtime.network(num_signals=1, num_contexts=1, rail=False)
        self._args = kernels.args_type(kernels.SEND)
        self._stream = runtime.new_stream()
        self._windows: dict[str, Window] = {}
        self._raised: dict[str, dict[tuple[int, int], int]] = {}  # by window: words, as (rank, byte), and to what
        self._lock = threading.Lock()  # receives that come first are put on their streams by another thread
        self._meetings = 0

    def enroll(self, name: str, window: Window) -> None:
        """Send to `window`, which is `ordered`, from now on, instead of the last of that name; its words are zero.
        Between two of the same name, `meet`."""
        with self._lock:
            self._windows[name], self._raised[name] = window, {}

    def send(self, name: str, puts: Sequence[Put], words: Sequence[Word], stream: Any) -> None:
        """Copy from this rank's part of a window to those of ranks of other nodes, then add to words there.

        A peer that sees its word raised has all that this rank has put there before. That the sources may be written
        again, only peers can tell.
        """
        with self._lock:
            window, raised = self._windows[name], self._raised[name]
            for peer, at, value in words:
                raised[peer, at] = raised.get((peer, at), 0) + value
        # Words behind all puts: the first of them go with the last of these.
        launches = [(puts[i : i + _AT_ONCE], words[:0]) for i in range(0, max(1, len(puts)), _AT_ONCE)]
        launches[-1] = (launches[-1][0], words[:_AT_ONCE])
        launches += [(puts[:0], words[i : i + _AT_ONCE]) for i in range(_AT_ONCE, len(words), _AT_ONCE)]
        for some, told in launches:
            args = self._args.pack(
                network=self._network,
                window=window.handle,
                puts=b"".join([_PUT.pack(*put[1:], put[0]) for put in some]).ljust(_AT_ONCE * _PUT.size, b"\0"),
                signals=b"".join([_WORD.pack(*word[1:], word[0]) for word in told]).ljust(_AT_ONCE * _WORD.size, b"\0"),
                num_puts=len(some),
                num_signals=len(told),
            )
            self._runtime.launch(kernels.SEND, args, ctas=1, threads=_THREADS, shared_bytes=0, stream=stream)

    def meet(self, phase: str) -> None:
        """Return when all that any rank has given to its streams to send has landed (collective)."""
        runtime, rank = self._runtime, self._runtime.rank
        self._meetings += 1
        with self._lock:
            told = {name: [[*word, to] for word, to in words.items()] for name, words in self._raised.items()}
        far = next(peer for peer in range(runtime.size) if peer not in node_of(runtime))
        expected = "what other nodes have sent"
        everybody = runtime.meeting.agree(
            f"sent/{self._meetings}", lambda: json.dumps(told), phase, lambda: self._watch.heed(far, phase, expected)
        )
        waits = []
        for peer, text in enumerate(everybody):
            here = [
                ("wait32_geq", self._windows[name].peer_pointer(rank, at), to & 0xFFFFFFFF)
                for name, words in json.loads(text).items()
                for target, at, to in words
                if target == rank
            ]
            if here:
                waits.append(self._await(peer, here, phase))
        for wait in waits:
            self._watch.finish(wait)

    def _await(self, peer: int, words: list[StreamOp], phase: str) -> Wait:
        """Let this object's own stream wait for a peer's words."""
        release = [("write32", address, value) for _, address, value in words]
        # There is nothing that could be seen but that it has not come: nothing else is on this stream.
        wait = Wait(peer, phase, f"what rank {peer} has sent", "meet", (words[0][1], 4), lambda _: (peer, ""), release)
        self._runtime.stream_ops([*words, self._watch.note(wait)], self._stream)
        return wait
