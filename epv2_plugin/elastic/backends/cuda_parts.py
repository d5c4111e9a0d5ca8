"""Parts of tensors in the windows of all ranks, and the words about them: what sessions and shards share.

A stream writes words into its own rank's memory and into that of peers on the node (`device.tell`). Between nodes parts
come through the network (`sender.py`), with the same words, and are there once a second word, of 64 bits, has been
raised to the number of their turn.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import Traffic, describe_kind
from epv2_plugin.elastic.backends.cuda_p2p import reached, same_turn
from epv2_plugin.elastic.backends.device import CopyOp, OrderOp, Runtime, StreamOp, Window, node_of, tell
from epv2_plugin.elastic.backends.sender import Sender
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
        outbox: that this rank's part is ready. inboxes: the same at the node's other ranks.
        arrived: of every rank. places: of every other rank, by its number.
    """

    outbox: int
    inboxes: list[int]
    arrived: int
    places: dict[int, int]


@dataclass(frozen=True)
class _Sum:
    """What sums of one size and kind have in common: how they are launched, and with which arguments."""

    kernel: Kernel
    struct: type[args.Arguments]
    packed: bytes
    ctas: int
    shape: LaunchShape


def sum_bytes(dtype: torch.dtype) -> int:
    """Of a sum of such values that is not rounded yet."""
    return max(4, dtype.itemsize)


def prepare_sums(runtime: Runtime, by_nodes: bool = False) -> None:
    """Load the kernels of `Parts.sum`, or of `sum_node` and `sum_nodes`, while no stream waits for anything."""
    for sums in (kernels.NODE_SUM, kernels.NODES_SUM) if by_nodes else (kernels.REDUCE_SCATTER,):
        for kernel in sums.values():
            runtime.prepare(kernel)


class Parts:
    """One window of each rank. Most methods give operations, so that a stream gets many of them in one call.

    Args:
        runtime: the device. watch: ends waits for what never comes. traffic: counts what crossed to other ranks.
        window, layout: the same on every rank. name: of the window, in texts that ranks leave for each other.
        sender: brings parts to other nodes; None = there is one node. way: what it knows the window by; of those of one
            name the last is in use.
        in_order: a rank that begins again has got all that lay before in the memory that it opens with that, so that
            nothing has to be `ready`.
        by_nodes: what a rank sends to other nodes goes to one rank of each, that with its place there, which does
            `pass_on`; or it is the sum of its node.

    Attributes:
        bases: where the windows of this node's ranks begin. num_nodes: of which this is number `node`; `to_nodes`:
            those ranks of others, by node, that this one sends to `by_nodes`.
    """

    def __init__(
        self,
        runtime: Runtime,
        watch: Watch,
        traffic: Traffic,
        window: Window,
        layout: SessionLayout,
        name: str,
        sender: Sender | None = None,
        way: str = "sessions",
        in_order: bool = False,
        by_nodes: bool = False,
    ):
        self._runtime, self._watch, self._traffic, self._sender = runtime, watch, traffic, sender
        self._way, self._in_order = way, in_order
        if sender is not None:
            sender.enroll(way, window)
        self._window, self._layout, self._name = window, layout, name
        self._peers = [peer for peer in range(runtime.size) if peer != runtime.rank]
        self._node = node_of(runtime)
        self._near = [peer for peer in self._peers if peer in self._node]
        self._far = [peer for peer in self._peers if peer not in self._node]
        # Of other nodes, who sends to this rank and gets from it: all, or those with its place in their node.
        apart = len(self._node) if by_nodes else 1
        self._direct = [peer for peer in self._far if (peer - runtime.rank) % apart == 0]
        self.num_nodes, self.node = runtime.size // len(self._node), runtime.rank // len(self._node)
        self.to_nodes = {peer // len(self._node): peer for peer in self._direct}
        self.bases = {peer: window.peer_pointer(peer, 0) for peer in self._node}
        # Every rank begins with another, so that not all write to the same one; with itself it ends.
        turns = [(runtime.rank + step) % runtime.size for step in range(1, runtime.size)]
        self._others = [self.bases[peer] for peer in turns if peer in self._node]
        self._words: dict[int, _Words] = {}
        self._begun = self._ready = 0  # what other nodes were told
        self._sent: dict[int, int] = {}  # by operation: its last turn, which other nodes were told
        self._sums: dict[Any, _Sum] = {}
        runtime.writes_to_peers()  # now, as it is collective

    def begin(self, count: int, stream: Any, ahead: Sequence[Operation] = (), behind: Sequence[Operation] = ()) -> None:
        """Tell every rank that this one has begun `count`, a number that only grows; with what else goes to the stream
        in the same call."""
        runtime = self._runtime
        own = self.bases[runtime.rank] + self._layout.begun_outbox
        inbox = self._layout.begun + 4 * runtime.rank
        told = tell(runtime, count & 0xFFFFFFFF, own, [base + inbox for base in self._others])
        runtime.stream_ops([*ahead, *told, *behind], stream)
        if self._sender is not None:
            word = self._layout.begun_far(runtime.rank)
            self._sender.send(self._way, (), [(peer, word, count - self._begun) for peer in self._far], stream)
            self._begun = count

    def ready(self, count: int, stream: Any) -> None:
        """Tell ranks of other nodes that all of them have begun `count`, as this rank sees it: what they sent here
        before has landed, also what nobody waited for, and can't come on top of what they send next.

        Nothing in one node, where copies keep their order.
        """
        if self._sender is None:
            return
        runtime, layout = self._runtime, self._layout
        own, value = self.bases[runtime.rank], count & 0xFFFFFFFF
        places = {peer: layout.begun_far(peer) for peer in self._far}
        begun: list[StreamOp] = [("wait32_geq", own + place, value) for place in places.values()]
        phase, expected = f"{self._name}, begin #{count}", "other nodes to begin, too"
        look = (own + layout.begun, layout.begun_bytes)
        wait = Wait(
            self._far[0], phase, expected, "ready", look, self._judge(places, layout.begun, value), _released(begun)
        )
        passed = self._watch.note(wait)
        wait.since += self._watch.timeout_seconds  # an operation that waits for the same says more
        runtime.stream_ops([*begun, passed], stream)
        word = layout.ready(runtime.rank)
        self._sender.send(self._way, (), [(peer, word, count - self._ready) for peer in self._far], stream)
        self._ready = count

    def await_begun(
        self, count: int, phase: str, expected: str, lane: Any, spoil: Spoil
    ) -> tuple[list[StreamOp], Wait]:
        """The wait until every rank has begun `count`, those of other nodes `ready` unless all is in order, to be
        noted."""
        own, layout = self.bases[self._runtime.rank], self._layout
        near = {peer: layout.begun + 4 * peer for peer in self._near}
        far = {peer: layout.begun_far(peer) for peer in self._far}
        ready = far if self._in_order else {peer: layout.ready(peer) for peer in self._far}
        count &= 0xFFFFFFFF
        operations: list[StreamOp] = [("wait32_geq", own + place, count) for place in [*near.values(), *ready.values()]]
        # Who has not begun comes before who is not ready: that one may be waiting for him.
        first = self._judge({**near, **far}, layout.begun, count)
        second = self._judge(ready, layout.begun, count)
        wait = Wait(
            self._peers[0] if self._peers else self._runtime.rank,
            phase,
            expected,
            lane,
            look=(own + layout.begun, layout.begun_bytes),
            judge=lambda words: first(words) or second(words),
            release=_released(operations),
            spoil=[each for each in spoil if each[1]],
        )
        return operations, wait

    @staticmethod
    def _judge(places: dict[int, int], base: int, count: int) -> Callable[[bytes], tuple[int, str] | None]:
        """What tells by the words from `base` on which rank's, at `places`, is not at `count` yet."""

        def judge(words: bytes) -> tuple[int, str] | None:
            behind = _behind(words, places, base, count)
            return (behind[0], "") if behind else None

        return judge

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
                inboxes=[base + inbox for base in self._others],
                arrived=own + layout.arrived(operation, 0),
                places={peer: own + layout.arrived(operation, peer) for peer in self._peers},
            )
        return words

    def tell(self, operation: int, word: int, passed: Sequence[StreamOp] = ()) -> list[Operation]:
        """What says to every rank of the node that this rank's part of an operation is ready, with what marks that."""
        words = self._words_of(operation)
        return tell(self._runtime, word, words.outbox, words.inboxes, passed)

    def vouch(self, operation: int, word: int) -> CopyOp:
        """What brings, behind a wait that is noted next, the word that other nodes get with what this one has summed: a
        rank that has given up says nothing of a sum."""
        place = self.bases[self._runtime.rank] + self._layout.passing(operation, self._runtime.rank)
        return ("copy", place, self._watch.vouch(word), 4)

    def send(
        self,
        operation: int,
        turn: int,
        stream: Any,
        pieces: Callable[[int], Sequence[tuple[int, int, int]]],
        passed_on: bool = False,
        vouched: bool = False,
    ) -> None:
        """Bring ranks of other nodes their pieces, and say that they have them, behind `tell` on the stream.

        Args:
            turn: a number that only grows; an operation that is left out in one turn does not matter in the next.
            pieces: what to bring to a rank: (byte there, byte here, number of bytes). Nobody writes to it before all
                ranks have begun again, with a session or this slot, behind all that they want of what was there.
            passed_on: they do `pass_on` with them. vouched: they are told so by the word of `vouch`.
        """
        if self._sender is None:
            return
        raised = turn - self._sent.get(operation, 0)
        self._sent[operation] = turn
        rank, layout = self._runtime.rank, self._layout
        source = layout.passing(operation, rank) if vouched else layout.outbox(operation)
        told = [(layout.arrived(operation, rank), source, 4)]
        if passed_on:
            told.append((layout.passing(operation, rank), layout.outbox(operation), 4))
        puts = [(peer, *piece) for peer in self._direct for piece in [*pieces(peer), *told] if piece[2]]
        words = [(peer, layout.landed(operation, rank), raised) for peer in self._direct]
        self._sender.send(self._way, puts, words, stream)

    def pass_on(
        self, operation: int, turn: int, offset: int, num_bytes: int, phase: str, text: str, lane: Any
    ) -> tuple[list[Operation], Wait]:
        """What copies the parts of other nodes that come to this rank, of `num_bytes` each, to the others of this one,
        in the tensor at `offset`, and then what says so; to be noted behind that.

        What they are told lies where nobody writes it but the network, so that a rank that gives up says nothing of a
        part that has not come.
        """
        layout, own = self._layout, self.bases[self._runtime.rank]
        count, row = turn & 0xFFFFFFFF, layout.arrived(operation, 0)
        landed = {peer: layout.landed(operation, peer) for peer in self._direct}
        waits: list[StreamOp] = []
        operations: list[Operation] = []
        for peer, place in landed.items():
            part, told = offset + peer * num_bytes, layout.passing(operation, peer)
            waits.append(("wait32_geq", own + place, count))
            operations.append(waits[-1])
            operations += [("copy", base + part, own + part, num_bytes) for base in self._others]
            operations += [("copy", base + layout.arrived(operation, peer), own + told, 4) for base in self._others]

        look, judge = (own + row, layout.row_bytes), self._judge(landed, row, count)
        spoil = [(own + offset + peer * num_bytes, num_bytes) for peer in self._direct]
        wait = Wait(self._direct[0], phase, f"{text} to pass on", lane, look, judge, _released(waits), spoil)
        return operations, wait

    def await_arrived(
        self,
        operation: int,
        turn: int,
        word: int,
        phase: str,
        text: str,
        what: str,
        key: str,
        lane: Any,
        spoil: Spoil,
        of: Literal["all", "node", "nodes"] = "all",
    ) -> tuple[list[StreamOp], Wait]:
        """The wait for every rank's part of an operation, to be noted.

        Args:
            turn: as in `send`. of: those of all ranks; of this node; or what those that send here from other nodes have
                of theirs.
            text: what is expected of every rank. what: the same with the name of the call, left as `key` for a rank
                that came with something else.
        """
        words, size, layout = self._words_of(operation), self._runtime.size, self._layout
        own, count = self.bases[self._runtime.rank], turn & 0xFFFFFFFF
        peers = {"all": self._peers, "node": self._near, "nodes": self._direct}[of]
        landed = {peer: layout.landed(operation, peer) for peer in self._direct} if of != "node" else {}
        operations: list[StreamOp] = [("wait32_geq", own + place, count) for place in landed.values()]
        operations += [("wait32_eq", words.places[peer], word) for peer in peers]

        def judge(seen: bytes) -> tuple[int, str] | None:
            arrived = struct.unpack_from(f"<{size}I", seen)
            missing = [peer for peer in peers if arrived[peer] != word]
            for peer in missing:
                if same_turn(arrived[peer], word):
                    return peer, self._refusal(peer, what, key)
            missing += _behind(seen, landed, layout.arrived(operation, 0), count)
            # Those whose parts come directly first: a part that is passed on may be missing because of them.
            missing.sort(key=lambda peer: peer in self._far and peer not in self._direct)
            return (missing[0], "") if missing else None

        wait = Wait(
            peers[0] if peers else self._runtime.rank,
            phase,
            f"{text} as on this rank",
            lane,
            look=(words.arrived, self._layout.row_bytes),
            judge=judge,
            release=_released(operations),
            spoil=[each for each in spoil if each[1]],
        )
        return operations, wait

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
        place, brought = offset + self._runtime.rank * out.nbytes, self.incoming(0, offset, out.nbytes)
        near, kernel = len(self._node), kernels.REDUCE_SCATTER[_DTYPES[out.dtype]]
        kind = (kernel, out.itemsize, out.numel(), self._runtime.size, self._node[0], near)
        self._add(kind, (place, brought, out.data_ptr()), scale, num_sms, stream)

    def sum_node(self, place: int, part: torch.Tensor, to: int, num_sms: int, stream: Any) -> None:
        """Sum what is at `place` of this node's windows, values as those of `part`, and put that at `to` of this one,
        in fp32 (fp64 of fp64)."""
        near = len(self._node)
        kind = (kernels.NODE_SUM[_DTYPES[part.dtype]], part.itemsize, part.numel(), near, 0, near)
        self._add(kind, (place, 0, self.bases[self._runtime.rank] + to), 1.0, num_sms, stream)

    def sum_nodes(self, place: int, out: torch.Tensor, scale: float, num_sms: int, stream: Any) -> None:
        """Put `scale` times the sum of what `sum_node` has made on each node into `out`; in this rank's window they lie
        from `place` on, one behind the other."""
        kind = (kernels.NODES_SUM[_DTYPES[out.dtype]], sum_bytes(out.dtype), out.numel(), self.num_nodes, 0, 0)
        self._add(kind, (0, place, out.data_ptr()), scale, num_sms, stream)

    def _add(
        self,
        kind: tuple[Kernel, int, int, int, int, int],
        places: tuple[int, int, int],
        scale: float,
        num_sms: int,
        stream: Any,
    ) -> None:
        """Launch a sum.

        Args:
            kind: the kernel, bytes of a value, how many, of how many parts, and which of these lie in the node's
                windows: the first, and their number. places: of those, of the others in this window, and the sums'
                address.
        """
        if not kind[2]:
            return
        if (made := self._sums.get((kind, num_sms))) is None:
            made = self._sums[kind, num_sms] = self._sum_of(*kind, num_sms)
        offset, incoming, out = places
        arguments = made.struct.fill(made.packed, offset=offset, incoming=incoming, out=out, scale=scale)
        threads, shared_bytes = made.shape.threads, made.shape.shared_bytes
        self._runtime.launch(
            made.kernel, arguments, ctas=made.ctas, threads=threads, shared_bytes=shared_bytes, stream=stream
        )

    def _sum_of(
        self, kernel: Kernel, value_bytes: int, count: int, num_parts: int, first: int, near: int, num_sms: int
    ) -> _Sum:
        ctas, shape = sizing.reduce_shape(num_parts, count * value_bytes, num_sms)
        struct_type = kernels.args_type(kernel)
        packed = struct_type.pack(
            window=self._window.handle,
            count=count,
            num_ranks=num_parts,
            first=first,
            near=near,
            own=self._runtime.rank - self._node[0],
            piece_bytes=shape.piece_bytes,
            num_groups=shape.groups,
            num_slots=shape.stages,
        )
        return _Sum(kernel, struct_type, packed, ctas, shape)

    def incoming(self, rank: int, offset: int, num_bytes: int) -> int:
        """Where, for the tensor at `offset`, a rank of another node brings what it adds to a sum, and this rank keeps
        what it sends of a gathered one: the caller gets that, too, and may write to it."""
        return self._layout.incoming + offset - self._layout.tensors + rank * num_bytes

    def count(self, num_bytes: int, sent: int | None = None) -> None:
        """Count bytes of a part, which cross to every other rank; as many come from each. `sent`: what goes to a rank
        of another node, where that is not the part."""
        self._traffic.sent_bytes += len(self._peers) * num_bytes
        self._traffic.undeduplicated_bytes += len(self._peers) * num_bytes
        self._traffic.network_bytes += len(self._direct) * (num_bytes if sent is None else sent)
        self._traffic.direct_network_bytes += len(self._far) * num_bytes


def _behind(words: bytes, places: dict[int, int], base: int, count: int) -> list[int]:
    """The ranks whose words, at `places` of what begins at `base`, are not at `count` yet."""
    return [
        peer for peer, place in places.items() if not reached(struct.unpack_from("<I", words, place - base)[0], count)
    ]


def _released(waits: Sequence[StreamOp]) -> list[StreamOp]:
    """What ends them."""
    return [("write32", address, value) for _, address, value in waits]
