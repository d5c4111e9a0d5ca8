"""Parts of tensors in the windows of all ranks, and the words about them: what sessions and shards share.

Streams write words only into their own rank's memory; a copy brings them to the peers, as data.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import Any

import torch

from epv2_plugin.elastic import sizing
from epv2_plugin.elastic.backends.base import Traffic
from epv2_plugin.elastic.backends.cuda_p2p import same_turn
from epv2_plugin.elastic.backends.device import Runtime, StreamOp, Window
from epv2_plugin.elastic.backends.watch import Wait, Watch
from epv2_plugin.elastic.sizing import SessionLayout
from epv2_plugin.jit import kernels

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_THREADS, _VECTORS_OF_A_THREAD, _VECTOR_BYTES = 512, 4, 16
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

    Attributes:
        bases: where each rank's window begins.
    """

    def __init__(
        self, runtime: Runtime, watch: Watch, traffic: Traffic, window: Window, layout: SessionLayout, name: str
    ):
        self._runtime, self._watch, self._traffic = runtime, watch, traffic
        self._handle, self._layout, self._name = window.handle, layout, name
        self._peers = [peer for peer in range(runtime.size) if peer != runtime.rank]
        self.bases = [window.peer_pointer(peer, 0) for peer in range(runtime.size)]

    def begin(self, count: int) -> None:
        """Tell every rank that this one has begun `count`, a number that only grows."""
        runtime = self._runtime
        own = self.bases[runtime.rank] + self._layout.begun_outbox
        runtime.stream_ops([("write32", own, count & 0xFFFFFFFF)])
        for peer in self._peers:
            runtime.copy(self.bases[peer] + self._layout.begun + 4 * runtime.rank, own, 4)

    def await_begun(self, count: int, phase: str, expected: str, lane: Any, spoil: Spoil) -> None:
        """Wait until every rank has begun `count`."""
        own = self.bases[self._runtime.rank] + self._layout.begun
        count &= 0xFFFFFFFF
        operations: list[StreamOp] = [("wait32_geq", own + 4 * peer, count) for peer in self._peers]

        def judge(words: bytes) -> tuple[int, str] | None:
            begun = struct.unpack(f"<{self._runtime.size}I", words)
            return next(((peer, "") for peer in self._peers if (begun[peer] - count) & 0xFFFFFFFF >= 1 << 31), None)

        wait = Wait(
            self._peers[0] if self._peers else self._runtime.rank,
            phase,
            expected,
            lane,
            look=(own, 4 * self._runtime.size),
            judge=judge,
            release=[("write32", address, value) for _, address, value in operations],
            spoil=[(address, num_bytes) for address, num_bytes in spoil if num_bytes],
        )
        self._runtime.stream_ops([*operations, self._watch.note(wait)])

    def push(self, tensor: torch.Tensor, offset: int) -> None:
        """Copy `tensor`, this rank's part, to where it belongs in every window: behind those of the ranks before."""
        if not tensor.nbytes:
            return
        runtime = self._runtime
        place = offset + runtime.rank * tensor.nbytes
        own = self.bases[runtime.rank] + place
        if tensor.data_ptr() != own:
            runtime.copy(own, tensor.data_ptr(), tensor.nbytes)
        # Every rank begins with another, so that not all write to the same one.
        for step in range(1, runtime.size):
            runtime.copy(self.bases[(runtime.rank + step) % runtime.size] + place, tensor.data_ptr(), tensor.nbytes)

    def tell(self, operation: int, word: int, done: Wait | None) -> None:
        """Say to every rank that this rank's part of an operation is ready. `done` passes once it is."""
        runtime = self._runtime
        outbox = self.bases[runtime.rank] + self._layout.outbox(operation)
        runtime.stream_ops([("write32", outbox, word), *([] if done is None else [self._watch.note(done)])])
        for peer in self._peers:
            runtime.copy(self.bases[peer] + self._layout.arrived(operation, runtime.rank), outbox, 4)

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
        key = f"{self._name}/{key} of rank"

        def judge(words: bytes) -> tuple[int, str] | None:
            arrived = struct.unpack(f"<{self._runtime.size}I", words)
            missing = [peer for peer in self._peers if arrived[peer] != word]
            for peer in missing:
                if same_turn(arrived[peer], word):
                    self._runtime.meeting.post(f"{key} {rank}", what)
                    return peer, self._explanation(f"{key} {peer}")
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

    def _explanation(self, key: str) -> str:
        """What a rank that came with something else says that it is; it sees the difference, too."""
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
        arguments = kernels.args_type(kernel).pack(
            window=self._handle,
            offset=offset + self._runtime.rank * out.nbytes,
            out=out.data_ptr(),
            count=out.numel(),
            scale=scale,
            num_ranks=self._runtime.size,
        )
        per_cta = _THREADS * _VECTORS_OF_A_THREAD * _VECTOR_BYTES
        self._runtime.launch(
            kernel,
            arguments,
            ctas=min(num_sms, -(-out.nbytes // per_cta)),
            threads=_THREADS,
            shared_bytes=sizing.LEAST_SHARED_BYTES,
        )

    def count(self, num_bytes: int) -> None:
        """Count bytes that cross to other ranks."""
        self._traffic.sent_bytes += num_bytes
        self._traffic.undeduplicated_bytes += num_bytes
