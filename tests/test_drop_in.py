"""What code written for DeepEP and stock libraries takes for granted, on the host backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import epv2_plugin
from epv2_plugin import ElasticBuffer, EventOverlap
from tests.harness import Pool

TOKENS, HIDDEN, TOP_K = 9, 16, 2


def _buffer() -> ElasticBuffer:
    return ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_cpu_timeout_secs=20, backend="host"
    )


def _dispatched(buffer: ElasticBuffer, **options: Any) -> tuple[Any, ...]:
    x = torch.arange(TOKENS * HIDDEN, dtype=torch.float32, device="cpu").view(TOKENS, HIDDEN)
    topk_idx = torch.arange(TOKENS * TOP_K, device="cpu").view(TOKENS, TOP_K) % (2 * buffer.num_ranks)
    return x, *buffer.dispatch(x, topk_idx=topk_idx, num_experts=2 * buffer.num_ranks, **options)


def _check_round_trip(buffer: ElasticBuffer) -> None:
    x, rows, *_, handle, _ = _dispatched(buffer)
    combined, *_ = buffer.combine(rows, handle=handle)
    copies = torch.tensor([len({e // 2 for e in row}) for row in handle.topk_idx.tolist()], device="cpu")
    assert torch.equal(combined, x * copies[:, None])


def dropped(rank: int, size: int) -> None:
    """Events that nobody waits for: what comes later is not held up, and nothing piles up once it is waited for."""
    buffer = _buffer()
    _, rows, *_, handle, event = _dispatched(buffer, async_with_compute_stream=True)
    event.current_stream_wait()
    buffer.combine(rows, handle=handle, async_with_compute_stream=True)
    _dispatched(buffer, async_with_compute_stream=True)
    for _ in range(3):
        _check_round_trip(buffer)
    buffer.pp_set_config(1 << 10, 4)
    peer, tensor = 1 - rank, torch.full((4,), 3.0)
    buffer.pp_send(tensor, peer, async_with_compute_stream=True)
    buffer.pp_recv(torch.empty(4), peer, async_with_compute_stream=True)
    buffer.pp_send(tensor + 1, peer)
    buffer.pp_recv(tensor, peer)
    assert tensor.tolist() == [4.0] * 4
    buffer.destroy()


def test_events_may_be_dropped(pool: Callable[[int], Pool]) -> None:
    pool(2).run(dropped)


def kept(rank: int, size: int) -> None:
    """Messages are held while they are under way, and no longer."""
    buffer = _buffer()
    transport = buffer._backend.transport  # type: ignore[union-attr]
    rooms = len(transport._under_way)
    buffer.pp_set_config(1 << 10, 2)
    buffer.agrs_set_config(1 << 16, 4)
    buffer.engram_write(torch.ones(4, 8))
    for _ in range(5):
        _check_round_trip(buffer)
        buffer.barrier()
        buffer.engram_fetch(torch.arange(4))()
        buffer.pp_send(torch.ones(4), (rank + 1) % size)
        buffer.pp_recv(torch.empty(4), (rank - 1) % size)
        with buffer.agrs_new_session():
            _, wait = buffer.all_gather(torch.ones(4))
            wait()
    buffer.pp_flush()
    assert len(transport._under_way) <= rooms + 2 * size  # an Engram owner may still be answering
    buffer.destroy()


def test_messages_are_held_no_longer_than_they_travel(pool: Callable[[int], Pool]) -> None:
    pool(2).run(kept)


def elsewhere(rank: int, size: int) -> None:
    """`torch.set_default_device` is the caller's business."""
    with torch.device("meta"):
        buffer = _buffer()
        _check_round_trip(buffer)
        buffer.pp_set_config(1 << 10, 2)
        buffer.agrs_set_config(1 << 10, 2)
        received = torch.empty(3, device="cpu")
        buffer.pp_send(torch.ones(3, device="cpu"), 1 - rank)
        buffer.pp_recv(received, 1 - rank)
        with buffer.agrs_new_session():
            gathered, wait = buffer.all_gather(torch.full((2,), float(rank), device="cpu"))
            wait()
            assert gathered.tolist() == [[0.0, 0.0], [1.0, 1.0]]
        buffer.engram_write(torch.full((4, 8), float(rank), device="cpu"))
        rows, _ = buffer.engram_fetch(torch.tensor([0, 7], device="cpu"))()
        assert rows[:, 0].tolist() == [0.0, 1.0]
        buffer.engram_reduce(torch.tensor([0, 7], device="cpu"), torch.ones(2, 8, device="cpu"))()
        buffer.destroy()
    assert received.tolist() == [1.0] * 3


def test_another_default_device(pool: Callable[[int], Pool]) -> None:
    pool(2).run(elsewhere)


def flags(rank: int, size: int) -> None:
    """Flags as command lines give them, DeepEP's names of arguments, and what its callers ask of buffers and events."""
    buffer = _buffer()
    for flag, exact in ((0, False), (False, False), (1, True), (None, True)):
        rows = _dispatched(buffer, do_cpu_sync=flag)[1]
        assert (rows.shape[0] < size * TOKENS) == exact
    assert buffer.deterministic is False
    assert buffer.prefer_overlap_with_compute is True
    hint = ElasticBuffer.get_pp_buffer_size_hint(num_max_tensor_bytes=1 << 10, num_max_inflight_tensors=2)
    assert hint == ElasticBuffer.get_pp_buffer_size_hint(1 << 10, 2)
    assert ElasticBuffer.get_agrs_buffer_size_hint(dist.group.WORLD, num_max_session_bytes=5) == 2 << 20
    buffer.pp_set_config(num_max_tensor_bytes=1 << 10, num_max_inflight_tensors=2)
    received = torch.empty(3)
    buffer.pp_send(torch.ones(3), dst_rank_idx=1 - rank)
    buffer.pp_recv(received, src_rank_idx=1 - rank)
    assert received.tolist() == [1.0] * 3
    with pytest.raises(TypeError, match=r"pp_send\(\) got dst_rank and dst_rank_idx, which are the same argument"):
        buffer.pp_send(received, dst_rank=1 - rank, dst_rank_idx=1 - rank)
    buffer.agrs_set_config(num_max_session_bytes=1 << 10, num_max_all_gathers_per_session=1)
    waited: list[int] = []
    for event in (ElasticBuffer.capture(), buffer.capture(), EventOverlap(extra_tensors=(received,))):
        event.register_hook_after_wait(lambda: waited.append(1))
        with pytest.raises(RuntimeError, match="has a hook already"):
            event.register_hook_after_wait(lambda: None)
        event.current_stream_wait()
        event.current_stream_wait()
    assert len(waited) == 3
    buffer.dispatch(torch.ones(1, HIDDEN), topk_idx=torch.zeros(1, 1, dtype=torch.int64), num_experts=2)
    for view in (torch.ones(3, dtype=torch.complex64).conj(), torch.ones(3, dtype=torch.complex64).conj().imag):
        for transfer in (buffer.pp_send, buffer.pp_recv):
            with pytest.raises(ValueError, match=r"t is a conjugated or negated view: must be resolved"):
                transfer(view, 1 - rank)
    buffer.pp_send(torch.ones(3), 1 - rank)  # they did not count
    buffer.pp_recv(received.zero_(), 1 - rank)
    assert received.tolist() == [1.0] * 3
    buffer.destroy()


def test_flags_and_names(pool: Callable[[int], Pool]) -> None:
    pool(2).run(flags)


def overwritten(rank: int, size: int) -> None:
    """Megatron's request of a send says when the tensor may be written to, as stock's does."""
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from epv2_plugin.megatron.pipeline import PipelineCommunicator

    epv2_plugin.enable({"timeouts": {"host_seconds": 30}})
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=size)
    config = ModelParallelConfig(pipeline_model_parallel_size=size, pipeline_dtype=torch.float32, batch_p2p_comm=False)
    ways: dict[str, Any] = dict.fromkeys(("tensor_send_next", "tensor_send_prev", "tensor_shape"))
    for kind in (P2PCommunicator, PipelineCommunicator):
        communicator = kind(parallel_state.get_pipeline_model_parallel_group(), config)
        shape = (1 << 18, 1, 1)
        if rank == 0:
            ways["tensor_send_next"] = torch.full(shape, 7.0)
        else:
            ways["tensor_shape"] = shape
            time.sleep(0.3)
        options = {"recv_prev": rank == 1, "recv_next": False, "wait_on_reqs": False}
        received, _, requests = communicator._communicate(**ways, **options)
        for request in requests.values():
            request.wait()
        if rank == 0:
            ways["tensor_send_next"].fill_(-1.0)
        else:
            assert (received.min().item(), received.max().item()) == (7.0, 7.0), kind
        dist.barrier()
    parallel_state.destroy_model_parallel()
    epv2_plugin.disable()


def test_a_sent_tensor_may_be_overwritten_after_its_request(pool: Callable[[int], Pool]) -> None:
    pool(2).run(overwritten)
