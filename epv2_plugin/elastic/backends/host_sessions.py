"""All-gather and reduce-scatter on the host: a message to and from every peer, sums in fp32 in rank order.

Every operation begins with a header that names its tensors, so that ranks that came with others see it. Several
operations may be under way; each has its own tags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from epv2_plugin.elastic.backends.base import SessionState, Traffic, describe
from epv2_plugin.elastic.backends.host_transport import Transport, byte_view, message_text, text_message
from epv2_plugin.elastic.event import HostEvent
from epv2_plugin.elastic.sizing import session_bytes

_HEADER, _DATA = range(2)

Wait = Callable[[], None]


class HostSessions(SessionState):
    """See `base.Sessions`."""

    def __init__(self, transport: Transport, traffic: Traffic):
        super().__init__()
        self._transport, self._traffic = transport, traffic

    def configure(self, max_session_bytes: int, max_operations: int, num_sms: int) -> None:
        """Collective; raises CommunicationError where another rank came with other values."""
        del num_sms  # there are none
        self._check_active(False, "agrs_set_config")
        values = (max_session_bytes, max_operations)
        text = "(max_session_bytes, max_all_gathers_per_session) = {}"
        wait = self._exchange("agrs_set_config", text.format(values), {}, {})
        wait()
        self._max_bytes, self._max_operations = values

    def begin(self) -> None:
        self._open()

    def own_slots(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
        self._check_active(True, "agrs_get_inplace_tensor")
        slots = []
        for shape in shapes:
            whole = torch.empty(self._transport.size, *shape, dtype=dtype, device="cpu")
            slot = whole[self._transport.rank]
            self._slots[slot.data_ptr()] = whole
            slots.append(slot)
        return slots

    def all_gather(
        self, tensors: Sequence[torch.Tensor], keep: bool, out: Sequence[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], Wait]:
        del keep  # a session's tensors are theirs alone
        rank, peers = self._transport.rank, self._transport.peers
        self._admit("all_gather", sum(session_bytes(self._transport.size, t.shape, t.itemsize) for t in tensors))
        gathered = []
        for index, tensor in enumerate(tensors):
            whole = self._slots.pop(tensor.data_ptr(), None) if tensor.numel() else None
            if out is not None:
                whole = out[index]
            elif whole is None or whole.dtype != tensor.dtype or whole.shape[1:] != tensor.shape:
                whole = tensor.new_empty(self._transport.size, *tensor.shape)
            if whole[rank].data_ptr() != tensor.data_ptr():
                whole[rank] = tensor
            gathered.append(whole)
        wait = self._exchange(
            "all_gather",
            ", ".join(map(describe, tensors)),
            {peer: [byte_view(whole[rank]) for whole in gathered] for peer in peers},
            {peer: [byte_view(whole[peer]) for whole in gathered] for peer in peers},
        )
        return gathered, self._start(wait)

    def reduce_scatter(
        self, tensors: Sequence[torch.Tensor], out: Sequence[torch.Tensor] | None = None, scale: float = 1.0
    ) -> tuple[list[torch.Tensor], Wait]:
        rank, peers = self._transport.rank, self._transport.peers
        self._admit("reduce_scatter", sum(session_bytes(t.shape[0], t.shape[1:], t.itemsize) for t in tensors))
        arrived = [torch.empty_like(tensor) for tensor in tensors]
        reduced = [tensor.new_empty(tensor.shape[1:]) for tensor in tensors] if out is None else list(out)
        wait = self._exchange(
            "reduce_scatter",
            ", ".join(map(describe, tensors)),
            {peer: [byte_view(tensor[peer]) for tensor in tensors] for peer in peers},
            {peer: [byte_view(tensor[peer]) for tensor in arrived] for peer in peers},
        )

        def finish() -> None:
            wait()
            for tensor, others, result in zip(tensors, arrived, reduced, strict=True):
                others[rank] = tensor[rank]
                total = others[0].to(torch.float64 if others.dtype == torch.float64 else torch.float32, copy=True)
                for part in others[1:]:
                    total += part
                result.copy_(total if scale == 1 else total.mul_(scale))

        return reduced, self._start(finish)

    def _start(self, finish: Wait) -> Wait:
        self._waits.append(HostEvent(finish).current_stream_wait)
        return self._waits[-1]

    def _exchange(
        self, name: str, text: str, sent: dict[int, list[torch.Tensor]], received: dict[int, list[torch.Tensor]]
    ) -> Wait:
        """Start sending `sent[p]` to and receiving `received[p]` from each peer p; returns the wait for all of it.

        Every rank must come with the same `text`, which says what the messages are.
        """
        operation = self._transport.begin(name)
        ours = text_message(text)
        headers = {peer: torch.empty_like(ours) for peer in operation.peers}
        waits = [operation.receive(_HEADER, headers, "header", ())]
        operation.send(_HEADER, dict.fromkeys(operation.peers, ours), "header", ())
        count = len(next(iter(sent.values()), []))
        num_bytes = len(operation.peers) * ours.numel()
        for index in range(count):
            # Tensors without bytes make no message; the text says that there are none.
            parts = {peer: own[index] for peer, own in received.items() if own[index].numel()}
            waits.append(operation.receive(_DATA, parts, f"tensor {index}", (text, index)))
            parts = {peer: own[index] for peer, own in sent.items() if own[index].numel()}
            operation.send(_DATA, parts, f"tensor {index}", (text, index))
            num_bytes += sum(part.numel() for part in parts.values())
        self._traffic.sent_bytes += num_bytes
        self._traffic.undeduplicated_bytes += num_bytes

        def finish() -> None:
            waits[0]()
            for peer, header in headers.items():
                if not torch.equal(header, ours):
                    raise operation.mismatch(peer, "header", f"{text} as on this rank", message_text(header))
            for wait in waits[1:]:
                wait()
            operation.wait_sent()

        return finish
