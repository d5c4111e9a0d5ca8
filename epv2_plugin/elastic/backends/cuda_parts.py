"""Parts of tensors in the windows of all ranks, and the words about them: what sessions and shards share.

Streams write words only into their own rank's memory; a copy brings them to the peers, as data.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import Traffic
from epv2_plugin.elastic.backends.courier import SEAL_BYTES, Courier
from epv2_plugin.elastic.backends.cuda_p2p import same_turn
from epv2_plugin.elastic.backends.device import CopyOp, Runtime, StreamOp, Window, node_of
from epv2_plugin.elastic.backends.watch import Wait, Watch
from epv2_plugin.elastic.sizing import SessionLayout
from epv2_plugin.jit import kernels

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_EXPLANATION_SECONDS = 2.0

Spoil = Sequence[tuple[int, int]]  # memory (address, bytes) that must not look like a result once this rank gave up


def prepare_sums(runtime: Runtime) -> None:
    """Load the kernels of `Parts.sum` while no stream waits for anything."""
    for kernel in kernels.REDUCE_SCATTER.values():
        runtime.prepare(kernel)


class Parts:
    """One window of each rank. Everything goes to the current stream.

    Args:
        runtime: the device. watch: ends waits for what never comes. traffic: counts what crossed to other ranks.
        window, layout: the same on every rank. name: of the window, in texts that ranks leave for each other.
        courier: brings parts to other nodes; None = there is one node.

    Attributes:
        bases: where the windows of this node's ranks begin.
    """

    def __init__(
        self,
        runtime: Runtime,
        watch: Watch,
        traffic: Traffic,
        window: Window,
        layout: SessionLayout,
        name: str,
        courier: Courier | None = None,
    ):
        self._runtime, self._watch, self._traffic, self._courier = runtime, watch, traffic, courier
        self._window, self._layout, self._name = window, layout, name
        self._peers = [peer for peer in range(runtime.size) if peer != runtime.rank]
        self._node = node_of(runtime)
        self._near = [peer for peer in self._peers if peer in self._node]
        self._far = [peer for peer in self._peers if peer not in self._node]
        self.bases = {peer: window.peer_pointer(peer, 0) for peer in self._node}

    def begin(self, count: int) -> None:
        """Tell every rank that this one has begun `count`, a number that only grows.

        Between nodes everybody has begun the one before, and this stream has waited for that.
        """
        runtime = self._runtime
        own = self.bases[runtime.rank] + self._layout.begun_outbox
        inbox = self._layout.begun + 4 * runtime.rank
        told: list[CopyOp] = [("copy", self.bases[peer] + inbox, own, 4) for peer in self._near]
        runtime.stream_ops([("write32", own, count & 0xFFFFFFFF), *told])
        if self._courier is not None:
            outbox = self._layout.begun_outbox + 4 * (1 + count % 2)
            inbox = self._begun(runtime.rank, count, far=True)
            staged = Wait(runtime.rank, "", "", "begin")
            written: StreamOp = ("write32", self.bases[runtime.rank] + outbox, count & 0xFFFFFFFF)
            passed = self._watch.note(staged)
            runtime.stream_ops([written, passed])
            for peer in self._far:
                self._send(staged, peer, f"begin #{count}", [(inbox, outbox, 4)])

    def _begun(self, rank: int, count: int, *, far: bool) -> int:
        """Where a rank says that it has begun. From other nodes the words for two counts may come in any order."""
        row = 1 + count % 2 if far else 0
        return self._layout.begun + 4 * (row * self._runtime.size + rank)

    def _send(
        self,
        staged: Wait,
        peer: int,
        phase: str,
        pieces: Sequence[tuple[int, int, int]],
        seal: tuple[int, int] | None = None,
        behind: Sequence[StreamOp] = (),
    ) -> None:
        """Send pieces (byte there, byte here, number of bytes) to a rank of another node."""
        assert self._courier is not None
        puts = [(peer, *piece) for piece in pieces]
        done = Wait(peer, f"{self._name}, {phase}", f"parts to reach rank {peer}", ("put", peer))
        self._courier.send(staged, done, self._window, lambda: puts, seal, behind)

    def await_begun(self, count: int, phase: str, expected: str, lane: Any, spoil: Spoil) -> None:
        """Wait until every rank has begun `count`."""
        own = self.bases[self._runtime.rank]
        places = {peer: self._begun(peer, count, far=peer not in self._node) for peer in self._peers}
        count &= 0xFFFFFFFF
        operations: list[StreamOp] = [("wait32_geq", own + place, count) for place in places.values()]

        def judge(words: bytes) -> tuple[int, str] | None:
            for peer, place in places.items():
                (begun,) = struct.unpack_from("<I", words, place - self._layout.begun)
                if (begun - count) & 0xFFFFFFFF >= 1 << 31:
                    return peer, ""
            return None

        wait = Wait(
            self._peers[0] if self._peers else self._runtime.rank,
            phase,
            expected,
            lane,
            look=(own + self._layout.begun, (3 if self._far else 1) * 4 * self._runtime.size),
            judge=judge,
            release=[("write32", address, value) for _, address, value in operations],
            spoil=[(address, num_bytes) for address, num_bytes in spoil if num_bytes],
        )
        self._runtime.stream_ops([*operations, self._watch.note(wait)])

    def push(self, tensor: torch.Tensor, offset: int) -> None:
        """Copy `tensor`, this rank's part, to where it belongs in the node's windows: behind those of the ranks before.

        To those of other nodes `tell` brings it.
        """
        if not tensor.nbytes:
            return
        runtime = self._runtime
        place = offset + runtime.rank * tensor.nbytes
        own = self.bases[runtime.rank] + place
        source, num_bytes = tensor.data_ptr(), tensor.nbytes
        # Every rank begins with another, so that not all write to the same one; with itself it ends.
        peers = [(runtime.rank + step) % runtime.size for step in range(1, runtime.size)]
        copies: list[CopyOp] = [
            ("copy", self.bases[peer] + place, source, num_bytes) for peer in peers if peer in self._node
        ]
        if source != own:
            copies.append(("copy", own, source, num_bytes))
        runtime.stream_ops(copies)

    def tell(
        self,
        operation: int,
        word: int,
        done: Wait | None,
        pieces: Callable[[int], Sequence[tuple[int, int, int]]] = lambda _: (),
    ) -> None:
        """Say to every rank that this rank's part of an operation is ready. `done` passes once it is.

        Args:
            pieces: what to bring to a rank of another node: (byte there, byte here, number of bytes).
        """
        runtime = self._runtime
        outbox = self.bases[runtime.rank] + self._layout.outbox(operation)
        inbox = self._layout.arrived(operation, runtime.rank)
        told: list[CopyOp] = [("copy", self.bases[peer] + inbox, outbox, 4) for peer in self._near]
        passed = [] if done is None else [self._watch.note(done)]
        runtime.stream_ops([("write32", outbox, word), *passed, *told])
        if self._courier is not None:
            staged = Wait(runtime.rank, "", "", ("staged", runtime.current_stream()))
            runtime.stream_ops([self._watch.note(staged)])
            for peer in self._far:
                outgoing = self._layout.seal(operation, peer, outgoing=True)
                seal = (self._layout.seal(operation, runtime.rank, outgoing=False), outgoing, SEAL_BYTES)
                sent = [piece for piece in pieces(peer) if piece[2]]
                own = self.bases[runtime.rank]
                gone: StreamOp = ("write32", own + self._layout.sent(operation, peer), word)
                self._send(staged, peer, f"operation #{operation}", [*sent, seal], (own + outgoing, word), [gone])

    def await_sent(self, operation: int, word: int, phase: str, lane: Any) -> None:
        """Wait until this rank's part of an operation may be written again: it has gone to all other nodes."""
        if not self._far:
            return
        own = self.bases[self._runtime.rank]
        places = {peer: own + self._layout.sent(operation, peer) for peer in self._far}
        first = own + self._layout.sent(operation, 0)

        def judge(words: bytes) -> tuple[int, str] | None:
            gone = struct.unpack(f"<{self._runtime.size}I", words)
            return next(((peer, "") for peer in self._far if gone[peer] != word), None)

        wait = Wait(
            self._far[0],
            phase,
            "this rank's part to be sent",
            lane,
            look=(first, 4 * self._runtime.size),
            judge=judge,
            release=[("write32", place, word) for place in places.values()],
        )
        operations: list[StreamOp] = [("wait32_eq", place, word) for place in places.values()]
        self._runtime.stream_ops([*operations, self._watch.note(wait)])

    def expect(self, operation: int, word: int, phase: str, text: str, what: str, key: str) -> None:
        """Let what comes from other nodes for an operation be seen, so that `await_arrived` may end.

        Arguments as there. The current stream is one that does nothing else.
        """
        own = self.bases[self._runtime.rank]
        for peer in self._far:
            seal = own + self._layout.seal(operation, peer, outgoing=False)
            seen = Wait(
                peer,
                phase,
                f"{text} as on this rank",
                "expected",
                look=(seal, SEAL_BYTES),
                judge=self._judge_seal(peer, word, what, key),
                release=[("write32", seal, word)],
            )
            assert self._courier is not None
            self._courier.expect(seen, seal, word, own + self._layout.arrived(operation, peer))

    def _judge_seal(self, peer: int, word: int, what: str, key: str) -> Callable[[bytes], tuple[int, str] | None]:
        def judge(words: bytes) -> tuple[int, str] | None:
            (seen,) = struct.unpack_from("<I", words)
            if seen == word:
                return None
            return peer, self._refusal(peer, what, key) if same_turn(seen, word) else ""

        return judge

    def await_arrived(
        self, operation: int, word: int, phase: str, text: str, what: str, key: str, lane: Any, spoil: Spoil
    ) -> None:
        """Wait for every rank's part of an operation.

        Args:
            text: what is expected of every rank. what: the same with the name of the call, left as `key` for a rank
                that came with something else.
        """
        own, rank = self.bases[self._runtime.rank], self._runtime.rank
        operations: list[StreamOp] = [
            ("wait32_eq", own + self._layout.arrived(operation, peer), word) for peer in self._peers
        ]

        def judge(words: bytes) -> tuple[int, str] | None:
            arrived = struct.unpack(f"<{self._runtime.size}I", words)
            missing = [peer for peer in self._peers if arrived[peer] != word]
            for peer in missing:
                if same_turn(arrived[peer], word):
                    return peer, self._refusal(peer, what, key)
            return (missing[0], "") if missing else None

        wait = Wait(
            self._peers[0] if self._peers else rank,
            phase,
            f"{text} as on this rank",
            lane,
            look=(own + self._layout.arrived(operation, 0), 4 * self._runtime.size),
            judge=judge,
            release=[("write32", address, value) for _, address, value in operations],
            spoil=[(address, num_bytes) for address, num_bytes in spoil if num_bytes],
        )
        self._runtime.stream_ops([*operations, self._watch.note(wait)])

    def _refusal(self, peer: int, what: str, key: str) -> str:
        """What a rank that came with something else says that it is, to which this one says `what`."""
        self._runtime.meeting.post(f"{self._name}/{key} of rank {self._runtime.rank}", what)
        key = f"{self._name}/{key} of rank {peer}"
        deadline = time.monotonic() + _EXPLANATION_SECONDS
        while (text := self._runtime.meeting.peek(key)) is None:
            if time.monotonic() > deadline:
                return "other tensors or another operation"
            time.sleep(0.01)
        return text

    def sum(self, offset: int, out: torch.Tensor, scale: float, num_sms: int) -> None:
        """Put `scale` times the sum of this rank's part of the tensor at `offset` of every window into `out`."""
        if not out.numel():
            return
        kernel = kernels.REDUCE_SCATTER[_DTYPES[out.dtype]]
        ctas, shape = sizing.reduce_shape(self._runtime.size, out.nbytes, num_sms)
        arguments = kernels.args_type(kernel).pack(
            window=self._window.handle,
            offset=offset + self._runtime.rank * out.nbytes,
            out=out.data_ptr(),
            count=out.numel(),
            scale=scale,
            num_ranks=self._runtime.size,
            incoming=self._layout.incoming + offset - self._layout.tensors,
            first=self._node[0],
            near=len(self._node),
            own=self._runtime.rank - self._node[0],
            piece_bytes=shape.piece_bytes,
            num_groups=shape.groups,
            num_slots=shape.stages,
        )
        self._runtime.launch(kernel, arguments, ctas=ctas, threads=shape.threads, shared_bytes=shape.shared_bytes)

    def incoming(self, rank: int, offset: int, num_bytes: int) -> int:
        """Where in this rank's node a rank of another one brings what it adds to a sum of the tensor at `offset`."""
        return self._layout.incoming + offset - self._layout.tensors + rank * num_bytes

    def count(self, num_bytes: int) -> None:
        """Count bytes of a part, which cross to every other rank; as many come from each."""
        self._traffic.sent_bytes += len(self._peers) * num_bytes
        self._traffic.undeduplicated_bytes += len(self._peers) * num_bytes
        self._traffic.network_bytes += len(self._far) * num_bytes
        self._traffic.direct_network_bytes += len(self._far) * num_bytes
