"""Parts of tensors in the windows of all ranks, and the words about them: what sessions and shards share.

Streams write words only into their own rank's memory; a copy brings them to the peers, as data.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import Traffic, describe_kind
from epv2_plugin.elastic.backends.courier import SEAL_BYTES, Courier
from epv2_plugin.elastic.backends.cuda_p2p import same_turn
from epv2_plugin.elastic.backends.device import CopyOp, OrderOp, Runtime, StreamOp, Window, node_of
from epv2_plugin.elastic.backends.watch import Wait, Watch
from epv2_plugin.elastic.sizing import LaunchShape, SessionLayout
from epv2_plugin.jit import Kernel, args, kernels

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_EXPLANATION_SECONDS = 2.0

Spoil = Sequence[tuple[int, int]]  # memory (address, bytes) that must not look like a result once this rank gave up
Operation = StreamOp | CopyOp | OrderOp

# Shape and dtype of tensors as text: "[4, 8] bfloat16". It takes longer than to put a word on a stream.
text_of = functools.lru_cache(maxsize=4096)(describe_kind)


@dataclass(frozen=True)
class _Words:
    """Addresses of the words of an operation.

    Attributes:
        outbox: that this rank's part is ready. told: copies of that to the node's other ranks.
        arrived: of every rank. places: of every other rank.
    """

    outbox: int
    told: list[CopyOp]
    arrived: int
    places: list[int]


@dataclass(frozen=True)
class _Sum:
    """What sums of one size and dtype have in common: how they are launched, and with which arguments."""

    kernel: Kernel
    struct: type[args.Arguments]
    packed: bytes
    ctas: int
    shape: LaunchShape


def prepare_sums(runtime: Runtime) -> None:
    """Load the kernels of `Parts.sum` while no stream waits for anything."""
    for kernel in kernels.REDUCE_SCATTER.values():
        runtime.prepare(kernel)


class Parts:
    """One window of each rank. Most methods give operations, so that a stream gets many of them in one call.

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
        # Every rank begins with another, so that not all write to the same one; with itself it ends.
        turns = [(runtime.rank + step) % runtime.size for step in range(1, runtime.size)]
        self._others = [self.bases[peer] for peer in turns if peer in self._node]
        self._words: dict[int, _Words] = {}
        self._sums: dict[tuple[torch.dtype, int, int], _Sum] = {}

    def begin(self, count: int, stream: Any, ahead: Sequence[Operation] = (), behind: Sequence[Operation] = ()) -> None:
        """Tell every rank that this one has begun `count`, a number that only grows; with what else goes to the stream
        in the same call.

        Between nodes everybody has begun the one before, and this stream has waited for that.
        """
        runtime, value = self._runtime, count & 0xFFFFFFFF
        own = self.bases[runtime.rank] + self._layout.begun_outbox
        inbox = self._layout.begun + 4 * runtime.rank
        told: list[CopyOp] = [("copy", base + inbox, own, 4) for base in self._others]
        operations = [*ahead, ("write32", own, value), *told]
        if self._courier is None:
            runtime.stream_ops([*operations, *behind], stream)
            return
        outbox = self._layout.begun_outbox + 4 * (1 + count % 2)
        inbox = self._begun(runtime.rank, count, far=True)
        staged = Wait(runtime.rank, "", "", "begin")
        written: StreamOp = ("write32", self.bases[runtime.rank] + outbox, value)
        runtime.stream_ops([*operations, written, self._watch.note(staged), *behind], stream)
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

    def await_begun(
        self, count: int, phase: str, expected: str, lane: Any, spoil: Spoil
    ) -> tuple[list[StreamOp], Wait]:
        """The wait until every rank has begun `count`, to be noted."""
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
            spoil=[each for each in spoil if each[1]],
        )
        return operations, wait

    def push(self, tensor: torch.Tensor, offset: int) -> list[CopyOp]:
        """Copies of `tensor`, this rank's part, to where it belongs in the node's windows: behind those of the ranks
        before.

        To those of other nodes `send` brings it.
        """
        num_bytes = tensor.nbytes
        if not num_bytes:
            return []
        source, rank = tensor.data_ptr(), self._runtime.rank
        place = offset + rank * num_bytes
        copies: list[CopyOp] = [("copy", base + place, source, num_bytes) for base in self._others]
        if source != (own := self.bases[rank] + place):
            copies.append(("copy", own, source, num_bytes))
        return copies

    def _words_of(self, operation: int) -> _Words:
        if (words := self._words.get(operation)) is None:
            own, layout = self.bases[self._runtime.rank], self._layout
            outbox, inbox = own + layout.outbox(operation), layout.arrived(operation, self._runtime.rank)
            words = self._words[operation] = _Words(
                outbox=outbox,
                told=[("copy", base + inbox, outbox, 4) for base in self._others],
                arrived=own + layout.arrived(operation, 0),
                places=[own + layout.arrived(operation, peer) for peer in self._peers],
            )
        return words

    def tell(self, operation: int, word: int, passed: Sequence[StreamOp] = ()) -> list[Operation]:
        """What says to every rank of the node that this rank's part of an operation is ready, with what marks that."""
        words = self._words_of(operation)
        return [("write32", words.outbox, word), *passed, *words.told]

    def send(
        self,
        operation: int,
        word: int,
        stream: Any,
        lane: Any,
        pieces: Callable[[int], Sequence[tuple[int, int, int]]],
    ) -> None:
        """Say so to ranks of other nodes, behind what the stream has, and bring them their pieces.

        Args:
            pieces: what to bring to a rank: (byte there, byte here, number of bytes).
        """
        if self._courier is None:
            return
        staged = Wait(self._runtime.rank, "", "", ("staged", lane))
        self._runtime.stream_ops([self._watch.note(staged)], stream)
        own = self.bases[self._runtime.rank]
        for peer in self._far:
            outgoing = self._layout.seal(operation, peer, outgoing=True)
            seal = (self._layout.seal(operation, self._runtime.rank, outgoing=False), outgoing, SEAL_BYTES)
            sent = [piece for piece in pieces(peer) if piece[2]]
            gone: StreamOp = ("write32", own + self._layout.sent(operation, peer), word)
            self._send(staged, peer, f"operation #{operation}", [*sent, seal], (own + outgoing, word), [gone])

    def await_sent(self, operation: int, word: int, phase: str, lane: Any) -> tuple[list[StreamOp], Wait]:
        """The wait until this rank's part of an operation may be written again: it has gone to all other nodes."""
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
        return operations, wait

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
        self,
        operation: int,
        word: int,
        phase: str,
        text: str,
        what: str,
        key: str,
        lane: Any,
        spoil: Spoil,
    ) -> tuple[list[StreamOp], Wait]:
        """The wait for every rank's part of an operation, to be noted.

        Args:
            text: what is expected of every rank. what: the same with the name of the call, left as `key` for a rank
                that came with something else.
        """
        words = self._words_of(operation)

        def judge(seen: bytes) -> tuple[int, str] | None:
            arrived = struct.unpack(f"<{self._runtime.size}I", seen)
            missing = [peer for peer in self._peers if arrived[peer] != word]
            for peer in missing:
                if same_turn(arrived[peer], word):
                    return peer, self._refusal(peer, what, key)
            return (missing[0], "") if missing else None

        wait = Wait(
            self._peers[0] if self._peers else self._runtime.rank,
            phase,
            f"{text} as on this rank",
            lane,
            look=(words.arrived, 4 * self._runtime.size),
            judge=judge,
            release=[("write32", place, word) for place in words.places],
            spoil=[each for each in spoil if each[1]],
        )
        return [("wait32_eq", place, word) for place in words.places], wait

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

    def sum(self, offset: int, out: torch.Tensor, scale: float, num_sms: int, stream: Any) -> None:
        """Put `scale` times the sum of this rank's part of the tensor at `offset` of every window into `out`."""
        num_bytes = out.nbytes
        if not num_bytes:
            return
        kind = (out.dtype, num_bytes, num_sms)
        if (made := self._sums.get(kind)) is None:
            made = self._sums[kind] = self._sum_of(*kind)
        arguments = made.struct.fill(
            made.packed,
            offset=offset + self._runtime.rank * num_bytes,
            out=out.data_ptr(),
            scale=scale,
            incoming=self._layout.incoming + offset - self._layout.tensors,
        )
        threads, shared_bytes = made.shape.threads, made.shape.shared_bytes
        self._runtime.launch(
            made.kernel, arguments, ctas=made.ctas, threads=threads, shared_bytes=shared_bytes, stream=stream
        )

    def _sum_of(self, dtype: torch.dtype, num_bytes: int, num_sms: int) -> _Sum:
        kernel = kernels.REDUCE_SCATTER[_DTYPES[dtype]]
        ctas, shape = sizing.reduce_shape(self._runtime.size, num_bytes, num_sms)
        struct_type = kernels.args_type(kernel)
        packed = struct_type.pack(
            window=self._window.handle,
            count=num_bytes // dtype.itemsize,
            num_ranks=self._runtime.size,
            first=self._node[0],
            near=len(self._node),
            own=self._runtime.rank - self._node[0],
            piece_bytes=shape.piece_bytes,
            num_groups=shape.groups,
            num_slots=shape.stages,
        )
        return _Sum(kernel, struct_type, packed, ctas, shape)

    def incoming(self, rank: int, offset: int, num_bytes: int) -> int:
        """Where in this rank's node a rank of another one brings what it adds to a sum of the tensor at `offset`."""
        return self._layout.incoming + offset - self._layout.tensors + rank * num_bytes

    def count(self, num_bytes: int) -> None:
        """Count bytes of a part, which cross to every other rank; as many come from each."""
        self._traffic.sent_bytes += len(self._peers) * num_bytes
        self._traffic.undeduplicated_bytes += len(self._peers) * num_bytes
        self._traffic.network_bytes += len(self._far) * num_bytes
        self._traffic.direct_network_bytes += len(self._far) * num_bytes
