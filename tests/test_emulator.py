"""The emulator itself: it computes what CUDA defines, and it finds the mistakes that a GPU would punish."""

from __future__ import annotations

import ctypes
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.emulator.runtime import EmulatedRuntime

SOURCES = Path(__file__).parent / "emulator" / "kernels"
SEEDS = 12
FULL = 0xFFFFFFFF


@dataclass(frozen=True)
class Kernel:
    name: str
    source: str
    args: str = "TestArgs"
    defines: tuple[tuple[str, str], ...] = ()


class Args(ctypes.Structure):
    """`TestArgs` of emulator/kernels/args.h."""

    _fields_ = (
        ("in_", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("window", ctypes.c_uint64),
        ("mode", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("ranks", ctypes.c_int32),
    )


def runtime(group: dist.ProcessGroup, seed: int = 0, limit_seconds: float = 60) -> EmulatedRuntime:
    return EmulatedRuntime(group, seed, sources=SOURCES, limit_seconds=limit_seconds)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/s", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def as_int32(values: torch.Tensor) -> torch.Tensor:
    """The low 32 bits, as the kernels' words come back."""
    return (values & FULL).to(torch.uint32).view(torch.int32)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_collectives_compute_what_cuda_defines(group, seed):
    ctas, threads = 2, 128
    counters = torch.zeros(9, dtype=torch.int32)
    counters[3] = -(1 << 31)
    out = torch.zeros(14, ctas, threads, dtype=torch.int32)
    runtime(group, seed).launch(
        Kernel("collectives", "collectives.cu"),
        bytes(Args(in_=counters.data_ptr(), out=out.data_ptr())),
        ctas=ctas,
        threads=threads,
        shared_bytes=4 * threads,
    )
    thread = torch.arange(threads)
    lane, warp = thread % 32, thread // 32
    value = thread * 7 + torch.arange(ctas)[:, None]
    start = warp * 32

    def votes(predicate: torch.Tensor) -> torch.Tensor:
        return (predicate.view(-1, 32).long() << torch.arange(32)).sum(1).repeat_interleave(32)

    everybody = torch.ones(ctas, 1, dtype=torch.int64)
    half = threads // 2
    expected = [
        value[:, start + lane * 5 % 32],
        value[:, start + lane // 8 * 8 + 3],
        value[:, start + (lane ^ 9)],
        value[:, torch.where(lane < 3, thread, thread - 3)],
        value[:, torch.where(lane % 16 > 12, thread, thread + 3)],
        votes(lane % 3 == 0) * everybody,
        everybody.expand(ctas, threads),
        (warp == 0).long() * everybody,
        sum(votes(lane % 5 == r) * (lane % 5 == r) for r in range(5)) * everybody,
        value[:, start + (lane ^ 1)],
        value[:, torch.where(lane == 31, thread, thread + 1)],
        value.flip(1),
        (value + 1).view(ctas, 2, half).flip(2).reshape(ctas, threads),
    ]
    for number, (got, want) in enumerate(zip(out, expected, strict=False)):
        assert torch.equal(got, as_int32(want)), number
    total = ctas * threads
    assert torch.all(out[13, :, :32].max(1).values <= total)
    assert torch.all(out[13, :, :32] >= threads)
    low = counters.tolist()
    assert low[:4] == [2 * total, 7 * (threads - 1) + 1, -1, -1]
    assert counters[4:6].view(torch.int64).item() == total << 31
    assert low[6] == low[7] + 1
    assert low[8] == total


def test_conversions_round_as_torch_does(group):
    bits = torch.arange(0, 1 << 32, 65519, dtype=torch.int64)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    eighths = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    between = (eighths[None, :] + eighths[:, None]) / 2  # holds every tie
    steps = torch.tensor([0.0, 1.0, -1.0, 1e-8, 448.0, 449.0, 463.9, 464.0, 480.0, 1e9, float("inf"), float("nan")])
    x = torch.cat(
        [as_int32(bits).view(torch.float32), halves, (halves[1:] + halves[:-1]) / 2, between.flatten(), steps]
    )
    out = torch.zeros(len(x), 7, dtype=torch.int32)
    runtime(group).launch(
        Kernel("convert", "convert.cu"),
        bytes(Args(in_=x.data_ptr(), out=out.data_ptr(), count=len(x))),
        ctas=2,
        threads=64,
        shared_bytes=0,
    )

    def same(got: torch.Tensor, want: torch.Tensor) -> None:
        got, want = got.float(), want.float()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(nan=0).view(torch.int32), want.nan_to_num(nan=0).view(torch.int32))

    bf16, half = out[:, 0].contiguous().view(torch.bfloat16), out[:, 1].contiguous().view(torch.float16)
    same(bf16.view(-1, 2)[:, 0], x.bfloat16())
    same(bf16.view(-1, 2)[:, 1], (-x).bfloat16())
    same(half.view(-1, 2)[:, 0], (-x).half())
    same(half.view(-1, 2)[:, 1], x.half())
    fp8 = out[:, 2].contiguous().view(torch.float8_e4m3fn).view(-1, 4)
    clamped = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    same(fp8[:, 0], clamped)
    same(fp8[:, 1], (-x).clamp(-448, 448).to(torch.float8_e4m3fn))
    assert torch.all(fp8[:, 2].float() == 1)
    same(fp8[:, 3], clamped)
    floats = out[:, 3:].contiguous().view(torch.float32)
    for column, want in enumerate([x.bfloat16(), (-x).bfloat16(), (-x).half(), x.half()]):
        same(floats[:, column], want)


def ring(group: dist.ProcessGroup, mutant: str, seed: int) -> bool:
    """Whether the ring's result is right."""
    defines = (("MUTANT", mutant),)
    x = torch.randint(0, 1 << 30, (40, 256), dtype=torch.int32)
    y = torch.zeros_like(x)
    runtime(group, seed).launch(
        Kernel("ring", "ring.cu", defines=defines),
        bytes(Args(in_=x.data_ptr(), out=y.data_ptr(), count=len(x))),
        ctas=3,
        threads=128,
        shared_bytes=128 + 3 * 1024,
    )
    return torch.equal(y, x + 1)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_right_ring_is_right_in_any_order(group, seed):
    assert ring(group, "0", seed)


MUTANTS = {
    "REFILL_BEFORE_USE": "race: bulk_load writes .* thread \\d+ wrote|race: a (load|store) .* a bulk_load",
    "NO_WAIT_READ": "in use by a bulk_store|race: bulk_load writes .* a bulk_store of thread 0 read",
    "NO_SYNCTHREADS": "race: bulk_store reads .* thread \\d+ wrote at tests/emulator/kernels/ring.cu:",
    "WRONG_ARRIVALS": r"deadlock:\n  CTAs 0 to 2: threads 0 to 127: mbarrier at 0, parity 0 \(phase 0, 1 of 2 arrivals",
    "WRONG_PARITY": "race: ",
    "NO_WAIT_AT_END": "bulk stores not waited for",
    "TOO_FEW_BYTES": "-512 bytes missing",
    "NO_PROXY_FENCE": "bulk_store: .* was written by thread .* and no fence_proxy_async",
    "NO_INIT_FENCE": "without mbarrier_init_fence",
    "NO_INIT_SYNC": "mbarrier at offset 0 was (never )?initialised",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_ring_is_an_error(group, mutant):
    for seed in range(SEEDS):
        with pytest.raises(RuntimeError, match=MUTANTS[mutant]):
            ring(group, mutant, seed)


def order(group: dist.ProcessGroup, mode: int, seed: int) -> None:
    flags, out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 128, dtype=torch.int32)
    device = runtime(group, seed)
    window = device.window(512)
    window.tensor[0] = 1
    args = Args(in_=flags.data_ptr(), out=out.data_ptr(), window=window.handle, mode=mode)
    device.launch(Kernel("order", "order.cu"), bytes(args), ctas=2, threads=128, shared_bytes=1024)
    device.close()


@pytest.mark.parametrize("mode", range(0, 20, 2))
def test_ordered_accesses_are_no_race(group, mode):
    for seed in range(SEEDS):
        order(group, mode, seed)


RACES = {
    1: "race: a (load|store) .* which thread",
    3: "race: a store writes .* which thread \\d+ wrote",
    5: "race: (a load reads|an atomic writes)",
    7: "race: a store writes .* which thread (9|1[0-2])\\d read",
    9: "race: a load reads shared memory offset 128, which thread 64 wrote",
    11: "race: a (load|store) .* shared memory offset [23]\\d\\d, which thread [3-9]\\d ",
    13: "race: a (store writes|load reads) shared memory offset 128",
    15: "race: a store writes shared memory offset 384, which a bulk_store of thread 0 read",
    17: "bulk_load: reads a window after thread 40 acquired a flag there at .*order.cu:9\\d, without fence_proxy_async",
    19: "race: a (store|load) (writes|reads) global memory 0x[0-9a-f]+, which thread [017]",
}


@pytest.mark.parametrize("mode", RACES)
def test_a_race_is_an_error_in_any_order(group, mode):
    for seed in range(SEEDS):
        with pytest.raises(RuntimeError, match=RACES[mode]):
            order(group, mode, seed)


MISTAKES = {
    0: r"barrier_sync\(1, \d+\): others wait there for \d+ threads",
    1: r"deadlock(.|\n)*barrier 1 \(32 of 96 threads there\)|only \d+ lanes of warp \d take part",
    2: "wait in __syncwarp|lanes 0x00000020 of the warp have returned",
    3: "of the warp wait in __(ballot_sync|syncwarp)",
    4: "__syncwarp: mask 0x0000ffff",
    5: "mbarrier at 0 has all 1 arrivals of phase 0 already",
    6: "mbarrier at offset 8 was never initialised",
    7: "bulk_load: shared offset 136 is not 16-byte aligned",
    8: "bulk_load: global address 0x[0-9a-f]+ is not 16-byte aligned",
    9: "bulk_store: 24 bytes; must be a positive multiple of 16",
    10: "bulk_store: 16 bytes at offset 1048704 are not within the 4000 bytes",
    11: "nobody has waited for the last bulk_load on mbarrier 0",
    12: "in use by a bulk_load of thread|race: bulk_load writes .* a bulk_load on the mbarrier at 0 wrote",
    13: "thread 3 at .*misuse.cu:\\d+: segmentation fault: bad access at 0x40",
    14: "peer 1; the LSA team has 1",
    15: "offset 1099511627776 in a window of 4096 bytes",
    16: "12345 is no window",
    17: r"still running after 0.5 s:(.|\n)*spins with pause\(\)",
    18: "thread 0 at .* returned with bulk stores not waited for",
    19: "thread 0 at .* returned with bulk stores not waited for",
    20: r"barrier_sync\(2, 160\): threads must be",
    21: r"threads 0 to 99: barrier 0 \(100 of 128 threads there\) at .*; threads 100 to 127: barrier 3",
    22: "a store of 1 bytes at offset 4000 of 4000 bytes of shared memory",
    23: "mbarrier at offset 0 was never initialised, or was overwritten",
    24: "lanes of warp . take part",
    25: "mbarrier at 0 expects 1048576 bytes, more than 1048575",
    26: "segmentation fault: bad access at the end of its stack of 61440 bytes",
    27: "mbarrier_wait: parity 2",
    28: "atomic on 0x[0-9a-f]+, which is not 4-byte aligned",
    29: r"barrier_sync\(16, 32\): ids are 0 to 15",
    30: "misuse.cu:.* is used as an address of something that is aligned to 16 bytes",
    31: "misuse.cu:.* is used as an address of something that is aligned to 16 bytes",
    32: "shift by 32 bits",
}


@pytest.mark.parametrize("mode", MISTAKES)
def test_a_mistake_is_an_error(group, mode):
    device = runtime(group, mode, limit_seconds=0.5)
    window = device.window(4096)
    out = torch.zeros(1024, dtype=torch.uint8)
    args = Args(out=(out.data_ptr() + 15) // 16 * 16, window=window.handle, mode=mode, count=4000, ranks=1)
    with pytest.raises(RuntimeError, match=MISTAKES[mode]):
        device.launch(Kernel("misuse", "misuse.cu"), bytes(args), ctas=2, threads=128, shared_bytes=4000)
    # The process, and the next launch, are not hurt.
    args.mode = -1
    device.launch(Kernel("misuse", "misuse.cu"), bytes(args), ctas=2, threads=128, shared_bytes=4000)


def test_a_refused_launch_says_why(group):
    device = runtime(group)
    kernel, args = Kernel("misuse", "misuse.cu"), Args(mode=-1)
    for ctas, threads, shared_bytes, message in [
        (9, 32, 256, "9 CTAs on a device of 8 SMs"),
        (0, 32, 256, "0 CTAs"),
        (1, 33, 256, "33 threads; must be a multiple of 32, at most 128"),
        (1, 160, 256, "160 threads"),
        (1, 128, 232449, "232449 bytes of shared memory"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            device.launch(kernel, bytes(args), ctas=ctas, threads=threads, shared_bytes=shared_bytes)
    with pytest.raises(RuntimeError, match=r"args of 8 bytes, the kernel's have 40"):
        device.launch(kernel, bytes(8), ctas=1, threads=32, shared_bytes=256)
    device.launch(kernel, bytes(args), ctas=8, threads=128, shared_bytes=232448)
    assert [(each.kernel, each.ctas) for each in device.launches][-1] == ("misuse", 8)


def exchange(rank: int, size: int, mode: int, seed: int, turns: int = 4) -> list[int]:
    device = runtime(dist.group.WORLD, seed)
    window = device.window((1 + size) * 4096)
    assert not window.tensor.any()
    dist.barrier()
    out = torch.zeros(turns, dtype=torch.int32)
    args = Args(out=out.data_ptr(), window=window.handle, mode=mode, count=turns, rank=rank, ranks=size)
    device.launch(Kernel("flags", "flags.cu"), bytes(args), ctas=1, threads=64, shared_bytes=4096)
    dist.barrier()  # peers' kernels, which write here, have ended, too
    assert mode or window.tensor[4096 * (1 + rank)] == turns * (rank + 1)
    device.close()
    return out.tolist()


def sums(size: int) -> list[int]:
    return [sum(turn * (rank + 1) * 1024 + 1023 * 512 for rank in range(size)) for turn in range(1, 5)]


@pytest.mark.parametrize("size", [2, 3])
def test_flags_order_data_between_processes(pool, size):
    for seed in range(4):
        assert pool(size).run(exchange, 0, seed) == [sums(size)] * size


def test_a_flag_before_the_store_is_done_shows(pool):
    wrong = 0
    for seed in range(SEEDS):
        wrong += any(sums_of_rank != sums(2) for sums_of_rank in pool(2).run(exchange, 1, seed))
    assert wrong > SEEDS // 4


def window_of_unequal_size(rank: int, size: int) -> str:
    try:
        runtime(dist.group.WORLD).window(64 * rank)
    except ValueError as error:
        return str(error)
    return ""


def test_windows_must_be_equal(pool):
    assert (
        pool(2).run(window_of_unequal_size) == ["window sizes of the ranks are [0, 64]; must be equal and positive"] * 2
    )


class NetworkArgs(ctypes.Structure):
    """`NetworkArgs` of emulator/kernels/args.h."""

    _fields_ = (
        ("window", ctypes.c_uint64),
        ("communicator", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("mode", "count", "rank", "ranks", "lsa_size", "rail")),
    )


ROW, TURNS = 4096, 3
NETWORK = Kernel("network", "network.cu", "NetworkArgs")
GETS = Kernel("gets", "gets.cu", "NetworkArgs")


def send_over_network(
    rank: int, size: int, rail: bool, modes: list[int], seed: int, kernel: Kernel = NETWORK
) -> list[object]:
    """The sums of each turn, or the error, of each mode in 2 nodes."""
    device = EmulatedRuntime(dist.group.WORLD, seed, sources=SOURCES, limit_seconds=60, lsa_size=size // 2)
    results: list[object] = []
    for mode in modes:
        window, out = device.window((2 + size) * ROW), torch.zeros(TURNS, dtype=torch.int32)
        args = NetworkArgs(window.handle, device.network(2, 2, rail), out.data_ptr(), mode, TURNS, rank, size)
        args.lsa_size, args.rail = device.lsa_size, rail
        try:
            device.launch(kernel, bytes(args), ctas=1, threads=64, shared_bytes=2 * ROW)
            results.append(out.tolist())
        except RuntimeError as error:
            results.append(str(error))
        dist.barrier()
    with pytest.raises(ValueError, match=f"rank {(rank + size // 2) % size} is on another node: this one has ranks"):
        window.peer_pointer((rank + size // 2) % size, 0)
    assert window.peer_pointer(rank, 8) == window.tensor.data_ptr() + 8
    device.close()
    return results


def network_sums(rank: int, size: int, rail: bool) -> list[int]:
    peers = [peer for peer in range(size) if peer // (size // 2) != rank // (size // 2)]
    peers = [peer for peer in peers if not rail or peer % (size // 2) == rank % (size // 2)]
    words = ROW // 4
    return [
        sum(words * turn * (peer + 1) + words * (words - 1) // 2 + 1000 * turn + peer for peer in peers)
        for turn in range(1, TURNS + 1)
    ]


@pytest.mark.parametrize(("size", "rail"), [(2, False), (4, False), (4, True)])
def test_signals_order_puts_between_nodes(pool, size, rail):
    for seed in range(SEEDS):
        results = pool(size).run(send_over_network, rail, [0], seed)
        assert results == [[network_sums(rank, size, rail)] for rank in range(size)]


@pytest.mark.parametrize("mode", [1, 2])
def test_without_a_signal_of_their_context_puts_come_late(pool, mode):
    wrong = 0
    for seed in range(SEEDS):
        results = pool(4).run(send_over_network, False, [mode], seed)
        wrong += any(result != [network_sums(rank, 4, False)] for rank, result in enumerate(results))
    assert wrong > SEEDS // 4


UNORDERED = {
    3: r"the CTA's last thread returned, and a network_put of thread 0 at tests/\S+/network.cu:\d+ is not flushed",
    4: r"race: a store writes global memory 0x\w+, which a network_put of thread 0 read at tests/\S+/network.cu:\d+;",
    5: r"race: (network_put reads global .* which thread \d+ wrote|a store .* a network_put of thread 0 read)",
    6: "a network_put of thread 0 at .* is not flushed",
    7: "bulk_load: reads a window after thread 0 acquired a flag there at .*network.cu:\\d+, without fence_proxy_async",
    8: "network_put: its source is being written by a bulk_store of CTA 0 thread 0 in flight",
}


@pytest.mark.parametrize("mode", UNORDERED)
def test_an_unordered_put_is_an_error(pool, mode):
    for seed in range(SEEDS // 2):
        for (error,) in pool(2).run(send_over_network, False, [mode], seed):
            assert re.search(UNORDERED[mode], str(error)), error


WRONG_CALLS = {
    20: r"network_put: peer \d is on this node \(ranks [02] to [13]\), where the network does not lead",
    21: r"network_signal: peer \d is not on the rail of rank \d: its LSA rank is [01], not [01]",
    22: "network_put_value: peer 4; the group has 4 ranks",
    23: "network_signal_value: context 2; the network has 2",
    24: "network_signal: signal 2; the network has 2",
    25: "network_put: 64 bytes at offset 24520 in a window of 24576 bytes",
    26: "network_put: 64 bytes at offset 24520 in a window of 24576 bytes",
    27: "network_put_value: offset 12 is not a multiple of 8",
    28: "network_flush: rail = 0, but the network was made with RAIL connections",
    29: "network_flush: 12345 is no communicator of a network",
    30: "peer_pointer: peer 2; the LSA team has 2",
    31: "network_put: 0 bytes; must be at least 1",
    32: "network_signal_word: offset 12 is not a multiple of 8",
    33: r"network_signal_word: peer \d is on this node",
    34: "network_leave: 12345 is no communicator of a network",
    35: "network_signal_word: the window is not one that the network keeps in order",
}


def test_wrong_calls_of_the_network_are_errors(pool):
    for errors in pool(4).run(send_over_network, True, list(WRONG_CALLS), 0):
        for error, (mode, expected) in zip(errors, WRONG_CALLS.items(), strict=True):
            assert re.search(expected, str(error)), (mode, error)


def got_sums(rank: int, size: int) -> list[int]:
    peers = [peer for peer in range(size) if peer // (size // 2) != rank // (size // 2)]
    words = ROW // 4
    return [sum(words * turn * (peer + 1) + words * (words - 1) // 2 for peer in peers) for turn in range(1, TURNS + 1)]


@pytest.mark.parametrize("size", [2, 4])
def test_a_flush_ends_gets(pool, size):
    for seed in range(SEEDS // 2):
        results = pool(size).run(send_over_network, False, [0], seed, GETS)
        assert results == [[got_sums(rank, size)] for rank in range(size)]


def test_a_signal_does_not_wait_for_gets(pool):
    """Who lets its peer write again before the flush gets what that writes."""
    wrong = 0
    for seed in range(SEEDS):
        results = pool(2).run(send_over_network, False, [1], seed, GETS)
        wrong += any(result != [got_sums(rank, 2)] for rank, result in enumerate(results))
    assert wrong > SEEDS // 4


WRONG_GETS = {
    2: r"race: a load reads global memory 0x\w+, which a network_get of thread \d+ wrote at tests/\S+/gets.cu:\d+;",
    3: r"the CTA's last thread returned, and a network_get of thread \d+ at tests/\S+/gets.cu:\d+ is not flushed",
    4: r"race: (network_get writes .* which thread 1 read|a load reads .* which a network_get of thread 0 wrote)",
    20: r"network_get: peer \d is on this node",
    21: "network_get: 64 bytes at offset 24520 in a window of 24576 bytes",
    22: "network_get: 64 bytes at offset 24520 in a window of 24576 bytes",
    23: "network_get: 0 bytes; must be at least 1",
}


def test_a_wrong_get_is_an_error(pool):
    modes = list(WRONG_GETS)
    for seed in range(2):
        for errors in pool(4).run(send_over_network, False, modes, seed, GETS):
            for error, (mode, expected) in zip(errors, WRONG_GETS.items(), strict=True):
                assert re.search(expected, str(error)), (mode, error)


def network_of_unequal_shape(rank: int, size: int, *shape: int) -> str:
    device = EmulatedRuntime(dist.group.WORLD, sources=SOURCES, lsa_size=1)
    try:
        device.network(shape[rank], 1, True)
    except ValueError as error:
        return str(error)
    return ""


def test_networks_must_be_equal(pool):
    for shape in [(1, 2), (0, 0)]:
        wishes = [(signals, 1, True) for signals in shape]
        expected = f"networks (signals, contexts, rail) of the ranks are {wishes}; must be equal and positive"
        assert pool(2).run(network_of_unequal_shape, *shape) == [expected] * 2


def test_nodes_must_be_of_equal_size(group):
    with pytest.raises(ValueError, match="lsa_size = 2: must divide the 1 ranks of the group"):
        EmulatedRuntime(group, lsa_size=2)


def test_seeds_repeat_a_launch_and_time_is_short(group):
    out = torch.zeros(2 * 768, dtype=torch.int32)
    kernel = Kernel("many", "many.cu")
    args = Args(out=out.data_ptr(), count=300)
    device = runtime(group)
    device.launch(kernel, bytes(args), ctas=2, threads=768, shared_bytes=0)  # compiles
    start = time.monotonic()
    device.launch(kernel, bytes(args), ctas=2, threads=768, shared_bytes=0)
    assert time.monotonic() - start < 10  # 0.1 s; a busy machine is slower
