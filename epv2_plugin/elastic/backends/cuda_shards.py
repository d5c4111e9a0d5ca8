"""All-gathers and reduce-scatters that go on for a whole training, as FSDP's do.

A window has slots, each for one gathered (or unreduced) tensor, which are used in turn: the n-th tensor lies in slot n
modulo their number, at the same place on every rank. The caller gets such a tensor before it is gathered (`gathered`,
`unreduced`) and fills in his part, so that nothing is copied twice; one from elsewhere is copied to or from a slot.

An all-gather copies this rank's part into everybody's window and then a word that says so. Before that it waits until
every rank has opened the slot, which a rank does when it hands the slot out, behind all that it still does with what
lay there before. A reduce-scatter waits for everybody's word, and one kernel sums over the node's windows in rank
order; then this rank tells that it has read, for which whoever is given that slot again waits, on the stream that will
fill it.

Nothing here holds the host up, and nothing ends between two tensors: no rank waits for more than the slot it needs.

Between nodes the network brings parts (`sender.py`): a gathered one once to each node, to the rank that has this one's
place there, which copies it to the others of its node; from a place behind the slots, where it stays until every rank
has opened the slot again, for the caller may fill his part of it before that. What is to be summed a node sums first,
for a rank of another that with its place in the node; that goes there, to a place behind the slots, in fp32, and the
rank sums what nodes have, in their order. A node of one rank has nothing to sum, and sends its part as it is.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import Traffic
from epv2_plugin.elastic.backends.cuda_p2p import check_connections, hash_word
from epv2_plugin.elastic.backends.cuda_parts import Operation, Parts, prepare_sums, sum_bytes, text_of
from epv2_plugin.elastic.backends.device import Runtime
from epv2_plugin.elastic.backends.sender import Sender
from epv2_plugin.elastic.backends.watch import LATER_SECONDS, Wait, Watch, lane_of
from epv2_plugin.elastic.errors import BufferSizeError, CommunicationError
from epv2_plugin.elastic.sizing import SessionLayout, align

_GATHERED, _GRADIENTS = "gathered parameters", "gradients"


@dataclass(frozen=True)
class Slots:
    """`count` slots for tensors of at most `num_bytes`, the parts of all ranks together; none of either = no window."""

    num_bytes: int
    count: int


class _Slot:
    """One slot: the turn it is in, the tensor that was handed out for it, and the last operation in it."""

    def __init__(self) -> None:
        self.turn = -1
        self.lent: weakref.ref[Any] | None = None
        self.unused = False  # handed out, and no operation has come with it yet
        self.last: _Operation | None = None


class _Operation:
    """An operation in a slot.

    Attributes:
        turn: of the slot. after: the event behind it, once that is known.

    Args:
        complete: puts what is left to do on the current stream, and returns `after`.
        held: what must live until then, and no longer: it may lie in another group's slot.
    """

    def __init__(self, turn: int, after: Any = None, complete: Callable[[], Any] | None = None, held: Any = None):
        self.turn, self.after, self._complete, self._held = turn, after, complete, held

    def finish(self, runtime: Runtime) -> None:
        """Make the current stream wait for it."""
        if self._complete is None:
            runtime.wait(self.after)
        else:
            self.after, self._complete, self._held = self._complete(), None, None


class _Ring:
    """The slots of a window."""

    def __init__(
        self,
        runtime: Runtime,
        watch: Watch,
        traffic: Traffic,
        slots: Slots,
        what: str,
        sender: Sender | None,
        by_nodes: bool,
    ):
        self._runtime, self._limit, self._what = runtime, slots, what
        slot_bytes = align(slots.num_bytes, sizing.RING_ALIGNMENT)
        part_bytes, self.by_nodes = -(-slots.num_bytes // runtime.size), by_nodes
        # Of a gathered tensor only this rank's part leaves from there; of sums, which take twice the room, a part to
        # each node, and as many come.
        sums_bytes = 2 * part_bytes * (runtime.size // runtime.lsa_size)
        staged = {_GATHERED: 1, _GRADIENTS: 2 if self.by_nodes else 0}[what]
        self._staged_bytes = align(part_bytes if what == _GATHERED else sums_bytes, sizing.RING_ALIGNMENT)
        self._layout = SessionLayout(
            num_ranks=runtime.size,
            max_operations=slots.count,
            max_session_bytes=slots.count * slot_bytes,
            far=sender is not None,
            incoming_bytes=slots.count * staged * self._staged_bytes if staged else None,
        )
        self._slot_bytes, self._turn = slot_bytes, 0
        self.reduced = -1  # the last turn that was reduced
        num_bytes = align(self._layout.end, sizing.BUFFER_ALIGNMENT)
        self._window = runtime.window(num_bytes, ordered=sender is not None)
        self.num_bytes = self._window.num_bytes
        self.parts = Parts(
            runtime,
            watch,
            traffic,
            self._window,
            self._layout,
            what,
            sender,
            what,
            in_order=True,
            by_nodes=self.by_nodes,
        )
        self._slots = [_Slot() for _ in range(slots.count)]

    def number(self, turn: int) -> int:
        """Of the slot of a turn."""
        return turn % len(self._slots)

    def offset(self, turn: int) -> int:
        """Where its tensor begins in every window."""
        return self._layout.tensors + self.number(turn) * self._slot_bytes

    def staged(self, turn: int) -> int:
        """Where this rank's part of a gathered tensor leaves for other nodes from; or its node's sums."""
        return self._layout.incoming + self.number(turn) * self._staged_bytes

    def brought(self, turn: int) -> int:
        """Where sums of other nodes come to."""
        return self.staged(turn) + len(self._slots) * self._staged_bytes

    def own(self, turn: int) -> int:
        """The same in this rank's window, as an address."""
        return self.parts.bases[self._runtime.rank] + self.offset(turn)

    def slot(self, turn: int) -> _Slot:
        return self._slots[self.number(turn)]

    def word(self, turn: int, text: str) -> int:
        """What every rank must come with."""
        return hash_word(f"{self._what} {turn} {text}", turn // len(self._slots))

    def take(self, num_bytes: int) -> int:
        """The next turn.

        Raises:
            BufferSizeError: the tensor does not fit, or its slot is still held.
        """
        count, limit = len(self._slots), self._limit.num_bytes
        if num_bytes > limit:
            raise BufferSizeError(
                f"{self._what} of {num_bytes} bytes do not fit a slot of {limit} bytes: {count} slots need "
                f"{count * num_bytes} bytes"
            )
        slot = self.slot(self._turn)
        if slot.lent is not None and slot.lent() is not None:
            raise BufferSizeError(
                f"{self._what}: all {count} slots are in use, the oldest since {count} tensors: {count + 1} slots need "
                f"{(count + 1) * limit} bytes"
            )
        slot.turn, slot.lent, slot.unused = self._turn, None, False
        self._turn += 1
        return slot.turn

    def lend(self, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor in the slot of a turn."""
        slot, num_bytes = self.slot(turn), math.prod(shape) * dtype.itemsize
        flat, slot.lent = self._window.lend(self.offset(turn), num_bytes)
        slot.unused = True
        return flat.view(dtype).view(shape)

    def turn_of(self, tensor: torch.Tensor) -> int | None:
        """The turn that a tensor was handed out for; None if it lies elsewhere.

        Raises:
            ValueError: it lies in the window, but was not handed out, or has been used.
        """
        place = tensor.data_ptr() - self.parts.bases[self._runtime.rank]
        if not self._layout.tensors <= place < self._layout.tensors + len(self._slots) * self._slot_bytes:
            return None
        number, inside = divmod(place - self._layout.tensors, self._slot_bytes)
        slot = self._slots[number]
        if inside or not slot.unused:
            raise ValueError(f"{self._what}: a tensor in the window that was not allocated for this call")
        slot.unused = False
        return slot.turn


class CudaShards:
    """Collectives of one group for as long as it trains (legend: P ranks, N values of a shard). Collective.

    Args:
        runtime: the device; `close` closes it. timeout_seconds: after which a wait gives up.
        gathers, sums: room for gathered tensors, and for those that are to be summed.
        num_sms: CTAs of a reduce-scatter, 0 = few; an all-gather has none, but for a warp that tells the network.

    Attributes:
        traffic: bytes to other ranks so far. num_sms: as it runs. window_bytes: of this rank's windows.

    Raises:
        ValueError: more SMs than the device has. CommunicationError: other ranks have other arguments, or did not come.
        UnavailableError: transfers can't work here.
    """

    def __init__(self, runtime: Runtime, timeout_seconds: float, gathers: Slots, sums: Slots, num_sms: int):
        if num_sms > runtime.num_sms:
            raise ValueError(f"num_sms = {num_sms}: must be at most the device's {runtime.num_sms}")
        self.num_sms = min(num_sms or sizing.REDUCE_SCATTER_SMS, runtime.num_sms)
        self.traffic = Traffic()
        self._runtime, self._closed = runtime, False
        by_nodes = 1 < runtime.lsa_size < runtime.size
        values = f"{gathers.count} x {gathers.num_bytes} and {sums.count} x {sums.num_bytes} bytes"

        def step() -> str:
            check_connections()
            prepare_sums(runtime, by_nodes)
            return values

        phase = "windows of shards"
        for peer, seen in enumerate(runtime.meeting.agree("shards/values", step, phase)):
            if seen != values:
                raise CommunicationError(runtime.rank, peer, phase, f"slots of {values} as on this rank", seen)
        self._watch = Watch(runtime, timeout_seconds)
        try:
            self._sender = Sender(runtime, self._watch) if runtime.lsa_size < runtime.size else None
            self._open_stream, self._gather_stream, self._sum_stream = (runtime.new_stream() for _ in range(3))
            with runtime.on_stream(self._gather_stream):
                self._gather = runtime.current_handle()
            self._pass_stream = runtime.new_stream() if by_nodes else None
            self._rings = {
                what: _Ring(runtime, self._watch, self.traffic, slots, what, self._sender, by_nodes)
                for what, slots in ((_GATHERED, gathers), (_GRADIENTS, sums))
                if slots.count
            }
        except BaseException:
            self._watch.close()
            raise
        self.window_bytes = sum(ring.num_bytes for ring in self._rings.values())

    def describe(self) -> dict[str, Any]:
        """Transport, device and versions."""
        return dict(self._runtime.description)

    def close(self, abandon: bool = False) -> None:
        """Release everything; what was handed out is gone. Once is enough.

        Between nodes all ranks come, unless `abandon`: some may not.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._end_transfers(abandon)
        finally:
            self._runtime.close(abandon=abandon or self._watch.failure is not None)

    def _end_transfers(self, abandon: bool) -> None:
        try:
            if self._sender is not None and self._watch.failure is None and not abandon:
                # Memory must not go while other nodes still put something there, if only words that nobody waits for.
                self._watch.drain()
                self._sender.meet("the end of FSDP2's collectives")
        except BaseException as error:
            self._watch.give_up(error)
            raise
        finally:
            self._watch.close()

    # ---- memory -----------------------------------------------------------------------------------------------------

    def gathered(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor that `all_gather` will fill; the current stream may fill this rank's part.

        It is handed out again after as many others as there are slots. By then nobody may hold it, and what was put on
        streams for it must come before the current stream, as if it were freed.

        Raises:
            BufferSizeError: it does not fit, or somebody still holds what has that memory.
        """
        ring = self._begin(_GATHERED)
        if not math.prod(shape):
            return torch.empty(tuple(shape), dtype=dtype, device=self._runtime.device)
        return ring.lend(self._open(ring, math.prod(shape) * dtype.itemsize), tuple(shape), dtype)

    def unreduced(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a tensor that `reduce_scatter` will read; the current stream may fill it. Rest as `gathered`."""
        ring = self._begin(_GRADIENTS)
        if not math.prod(shape):
            return torch.empty(tuple(shape), dtype=dtype, device=self._runtime.device)
        turn = ring.take(math.prod(shape) * dtype.itemsize)
        read, waits = self._await_read(ring, turn)
        if waits:
            self._runtime.stream_ops([*read, *self._watch.note_all(waits)])
        return ring.lend(turn, tuple(shape), dtype)

    def _begin(self, what: str) -> _Ring:
        self._watch.check()
        if self._runtime.is_capturing():
            raise RuntimeError(f"{what} can't be captured into a CUDA graph: tensors have numbers, which would repeat")
        if what not in self._rings:
            raise RuntimeError(f"this group has no window for {what}")
        return self._rings[what]

    def _open(self, ring: _Ring, num_bytes: int) -> int:
        """Take the next turn and let every rank write into its slot, behind the current stream."""
        turn, runtime = ring.take(num_bytes), self._runtime
        if (last := ring.slot(turn).last) is not None:
            last.finish(runtime)
        ring.parts.begin(turn + 1, self._open_stream, [("after", runtime.current_handle())])
        return turn

    def _await_read(self, ring: _Ring, turn: int) -> tuple[list[Operation], list[Wait]]:
        """The wait until every rank has read what lay in the slot of a turn before, to be noted."""
        if (last := ring.slot(turn).last) is None:
            return [], []
        phase, expected = f"reduce-scatter #{turn}, slot", f"the end of reduce-scatter #{last.turn}"
        # Of one lane with what waits on the stream of sums, though on another stream: of reduce-scatter n the slot
        # comes before the parts, and no parts wait for a later slot.
        read, wait = ring.parts.await_begun(last.turn + 1, phase, expected, "sums", ())
        return [("await", last.after.handle), *read], [wait]

    # ---- operations -------------------------------------------------------------------------------------------------

    def all_gather(self, out_PN: torch.Tensor, shard_N: torch.Tensor) -> Callable[[], None]:
        """Start gathering every rank's shard into `out_PN`; returns what makes the current stream wait for it.

        Args:
            out_PN: of `gathered`; any other is copied to when it is waited for. shard_N: a row of it, or any other.

        Raises:
            BufferSizeError: as `gathered`. CommunicationError: this rank has given up; known only some time after.
        """
        ring, runtime = self._begin(_GATHERED), self._runtime
        if not out_PN.numel():
            return lambda: None
        turn = ring.turn_of(out_PN)
        target = None
        if turn is None:
            turn, target = self._open(ring, out_PN.nbytes), out_PN
        num_bytes = out_PN.nbytes  # whoever holds the operation must not hold what lies in the slot
        text, own, name = text_of(shard_N.shape, shard_N.dtype), ring.own(turn), f"all-gather #{turn}"
        word, spoil, number = ring.word(turn, text), [(own, num_bytes)], ring.number(turn)
        place, pushed = own + runtime.rank * shard_N.nbytes, runtime.event()
        held = None if shard_N.data_ptr() == place else shard_N
        opened, opening = ring.parts.await_begun(turn + 1, f"{name}, slot", "an open slot", "gathers", spoil)
        offset, rank, part_bytes = ring.offset(turn), runtime.rank, shard_N.nbytes
        copies = ring.parts.push(shard_N, offset)
        staged = ring.staged(turn)
        if self._sender is not None:
            copies.append(("copy", ring.parts.bases[rank] + staged, shard_N.data_ptr(), part_bytes))
        done = Wait(runtime.rank, "", "", "gathers")
        passed, gone = self._watch.note_all([opening, done])
        operations: list[Operation] = [("after", runtime.current_handle()), *opened, passed, *copies]
        operations += [*ring.parts.tell(number, word, [gone]), ("record", pushed.handle)]
        # One call: each takes longer than what it puts on the stream.
        runtime.stream_ops(operations, self._gather_stream)
        ring.parts.count(part_bytes)
        ahead = [pushed]  # of what waits for it
        part = (offset + rank * part_bytes, staged, part_bytes)
        ring.parts.send(number, turn + 1, self._gather_stream, lambda _: [part], passed_on=ring.by_nodes)
        if self._pass_stream is not None:
            passing = runtime.event()
            # The slots of this node's ranks are open where the stream of gathers is.
            others, coming = ring.parts.pass_on(number, turn + 1, offset, part_bytes, name, text, "passed on")
            noted = self._watch.note(coming)
            operations = [("after", self._gather), *others, noted, ("record", passing.handle)]
            runtime.stream_ops(operations, self._pass_stream)
            ahead.append(passing)  # the caller may write to all of it then

        def complete() -> Any:
            lane, after = lane_of(runtime.current_handle()), runtime.event()
            what, key = f"all-gather of {text}", f"gather {turn}"
            arrived, arrival = ring.parts.await_arrived(number, turn + 1, word, name, text, what, key, lane, spoil)
            waited: list[Operation] = [("await", event.handle) for event in ahead]
            waited += [*arrived, self._watch.note(arrival)]
            if target is not None:
                waited.append(("copy", target.data_ptr(), own, num_bytes))
            runtime.stream_ops([*waited, ("record", after.handle)])
            return after

        return self._started(ring, _Operation(turn, complete=complete, held=held))

    def reduce_scatter(self, out_N: torch.Tensor, parts_PN: torch.Tensor, scale: float) -> Callable[[], None]:
        """Start summing row p of every rank's parts for rank p, times `scale`; returns as `all_gather`.

        Sums run in fp32 in rank order and are rounded once; between nodes each node's, and then those in their order.

        Args:
            out_N: anywhere. parts_PN: of `unreduced`, in the order in which they were handed out; any other is copied
                first.

        Raises:
            As `all_gather`. ValueError: another that was handed out later has been reduced.
        """
        ring, runtime = self._begin(_GRADIENTS), self._runtime
        if not parts_PN.numel():
            return lambda: None
        turn = ring.turn_of(parts_PN)
        copied = turn is None
        if turn is None:
            turn = ring.take(parts_PN.nbytes)
        if turn < ring.reduced:  # peers take what was read for all before
            raise ValueError(f"reduce-scatter #{turn} behind #{ring.reduced}: must be in the order of `unreduced`")
        ring.reduced = turn
        text = f"{text_of(parts_PN.shape, parts_PN.dtype)} times {scale:g}"
        own, name, number, num_bytes = ring.own(turn), f"reduce-scatter #{turn}", ring.number(turn), parts_PN.nbytes
        word, stream, done = ring.word(turn, text), self._sum_stream, runtime.event()
        read, waits = self._await_read(ring, turn) if copied else ([], [])
        before = len(waits)
        what, key, parts, offset = f"reduce-scatter of {text}", f"sum {turn}", ring.parts, ring.offset(turn)
        expected = (number, turn + 1, word, name, text, what, key, "sums")
        arrived, arrival = parts.await_arrived(*expected, [(own, num_bytes)], "node" if ring.by_nodes else "all")
        waits.append(arrival)
        if ring.by_nodes:
            sums_bytes = out_N.numel() * sum_bytes(out_N.dtype)
            sums = [(own - offset + ring.brought(turn), parts.num_nodes * sums_bytes)]
            landed, landing = parts.await_arrived(*expected, sums, "nodes")
            waits.append(landing)
            vouched = parts.vouch(number, word)
        *passed, last = self._watch.note_all(waits)
        operations: list[Operation] = [("after", runtime.current_handle()), *read, *passed[:before]]
        if copied:
            operations.append(("copy", own, parts_PN.data_ptr(), num_bytes))
        operations += parts.tell(number, word)
        if ring.by_nodes:
            landing.since += LATER_SECONDS  # a rank that the node lacks is to be named by the node
            runtime.stream_ops([*operations, *arrived, passed[-1], vouched], stream)
            self._sum_for_nodes(ring, turn, out_N, sums_bytes, stream)
            operations, arrived = [], landed
        elif self._sender is not None:
            runtime.stream_ops(operations, stream)
            place, part_bytes = parts.incoming(runtime.rank, offset, out_N.nbytes), out_N.nbytes
            parts.send(number, turn + 1, stream, lambda peer: [(place, offset + peer * part_bytes, part_bytes)])
            operations = []
        runtime.stream_ops([*operations, *arrived, last], stream)
        if ring.by_nodes:
            parts.sum_nodes(ring.brought(turn), out_N, scale, self.num_sms, stream)
            parts.count(out_N.nbytes, sums_bytes)
        else:
            parts.sum(offset, out_N, scale, self.num_sms, stream)
            parts.count(out_N.nbytes)
        summed = Wait(runtime.rank, "", "", "sums", keep=(out_N, *((parts_PN,) if copied else ())))
        parts.begin(turn + 1, stream, [self._watch.note(summed), ("record", done.handle)])
        return self._started(ring, _Operation(turn, done))

    def _sum_for_nodes(self, ring: _Ring, turn: int, part_N: torch.Tensor, sums_bytes: int, stream: Any) -> None:
        """Sum what this node has for the ranks with this one's place in theirs, itself included, and send it."""
        parts = ring.parts
        staged, place = ring.staged(turn), ring.brought(turn) + parts.node * sums_bytes
        for node, peer in {**parts.to_nodes, parts.node: self._runtime.rank}.items():
            to = place if node == parts.node else staged + node * sums_bytes
            parts.sum_node(ring.offset(turn) + peer * part_N.nbytes, part_N, to, self.num_sms, stream)
        places = {peer: staged + node * sums_bytes for node, peer in parts.to_nodes.items()}
        pieces = {peer: [(place, source, sums_bytes)] for peer, source in places.items()}
        parts.send(ring.number(turn), turn + 1, stream, pieces.__getitem__, vouched=True)

    def _started(self, ring: _Ring, operation: _Operation) -> Callable[[], None]:
        ring.slot(operation.turn).last = operation

        def wait() -> None:
            self._watch.check()
            operation.finish(self._runtime)
            self._watch.check()

        return wait
