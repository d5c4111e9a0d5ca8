"""One rank of the loopback's protocol tests, as NCCL would drive it: `rma_ranks.py CASE RANK SIZE FOLDER PLUGIN`.

A process of its own without torch: the plugin finds the stand-in for the driver (`tests/fakes/fake_gpu.cc`) by
LD_LIBRARY_PATH, and ranks find each other's handles in FOLDER. Its last line is JSON: what the case returned.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST, CUDA = 1, 2
NEVER_RESET = 2
INC, ADD = 1, 2
SUCCESS, SYSTEM_ERROR, INVALID_ARGUMENT, REMOTE_ERROR = 0, 2, 4, 6
MEMBERS = [
    "name",
    "init",
    "devices",
    "get_properties",
    "listen",
    "connect",
    "create_context",
    "register",
    "register_dmabuf",
    "deregister",
    "destroy_context",
    "close",
    "close_listener",
    "put",
    "put_signal",
    "get",
    "flush",
    "test",
    "progress",
    "query_error",
    "finalize",
]
LOGGER = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p
)
P, Z, U32, U64, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "init": (P, U64, LOGGER),
    "listen": (P, INT, P, P),
    "connect": (P, P, INT, INT, P, P),
    "create_context": (P, P, P),
    "register": (P, P, Z, INT, U64, P),
    "deregister": (P, P),
    "destroy_context": (P,),
    "close": (P,),
    "close_listener": (P,),
    "put": (P, INT, U64, P, Z, U64, P, U32, P),
    "put_signal": (P, INT, U64, P, Z, U64, P, U32, U64, P, U64, U32, ctypes.c_bool, P),
    "get": (P, INT, U64, P, Z, U64, P, U32, P),
    "flush": (P, INT, P, U32, P),
    "test": (P, P, P),
    "query_error": (P, P),
    "get_properties": (INT, P),
    "finalize": (P,),
}


class Failed(RuntimeError):
    """A call did not return ncclSuccess."""

    def __init__(self, code: int, said: list[str]):
        super().__init__(said[-1] if said else "nothing said")
        self.code = code


class Plugin:
    """The plugin's table of functions, and what it has told the log."""

    def __init__(self, path: str):
        table = (P * len(MEMBERS)).in_dll(ctypes.CDLL(path), "ncclRmaPlugin_v14")
        self._functions = {
            name: ctypes.CFUNCTYPE(INT, *SIGNATURES[name])(at)
            for name, at in zip(MEMBERS, table, strict=True)
            if name in SIGNATURES
        }
        self.said: list[str] = []
        self._logger = LOGGER(lambda level, flags, file, line, form, text: self._log(level, text))
        self.instance = P()
        self.call("init", ctypes.byref(self.instance), 7, self._logger)

    def _log(self, level: int, text: bytes) -> None:
        if level == 2:
            self.said.append(text.decode())

    def call(self, name: str, *args: Any) -> None:
        if code := self._functions[name](*args):
            raise Failed(code, self.said)


@functools.cache
def plugin(path: str) -> Plugin:
    return Plugin(path)


class Memory:
    """Registered memory: device memory that others can map, device memory that they can't (NCCL's signals), or host."""

    def __init__(self, rank: Rank, size: int, kind: str):
        self.size, self.kind = size, kind
        if kind == "host":
            self._owner = ctypes.create_string_buffer(size)
            self.address = ctypes.addressof(self._owner)
        else:
            self.address = rank.gpu.fake_alloc(size, kind == "window")
        self.bytes = (ctypes.c_uint8 * size).from_address(self.address)
        self.words = (U64 * (size // 8)).from_address(self.address)
        self.handle = P()
        flags = NEVER_RESET if kind == "signals" else 0
        where = HOST if kind == "host" else CUDA
        rank.plugin.call("register", rank.comm, self.address, size, where, flags, ctypes.byref(self.handle))

    def fill(self, value: int, begin: int, size: int) -> None:
        ctypes.memset(self.address + begin, value, size)

    def read(self, begin: int, size: int) -> bytes:
        return ctypes.string_at(self.address + begin, size)


class Rank:
    """This process as a rank of a communicator with two contexts."""

    numbers = itertools.count()

    def __init__(self, rank: int, size: int, folder: Path, path: str, contexts: int = 2, stride: int = 1):
        self.rank, self.size, self.folder = rank, size, folder
        self.gpu = ctypes.CDLL("libcuda.so.1")
        self.gpu.fake_alloc.restype = P
        self.gpu.fake_alloc.argtypes = (Z, INT)
        self.gpu.fake_free.argtypes = (P,)
        self.plugin = plugin(path)
        self.memories: list[Memory] = []
        handle, listener, self.comm, self.context = ctypes.create_string_buffer(128), P(), P(), P()
        self.plugin.call("listen", self.plugin.instance, 0, handle, ctypes.byref(listener))
        handles = self._gather(handle.raw)
        pointers = (P * size)(*(ctypes.cast(each, P) for each in handles))
        try:
            # NCCL's host side passes another plugin's context.
            self.plugin.call("connect", P(8), pointers, size, rank, listener, ctypes.byref(self.comm))
        finally:
            self.plugin.call("close_listener", listener)
        config = (INT * 3)(contexts, 0, stride)
        self.plugin.call("create_context", self.comm, config, ctypes.byref(self.context))

    def _gather(self, mine: bytes) -> list[Any]:
        number = next(self.numbers)
        temporary = self.folder / f"part{self.rank}"
        temporary.write_bytes(mine)
        temporary.rename(self.folder / f"handle{number}.{self.rank}")
        return [
            ctypes.create_string_buffer(wait_for_file(self.folder / f"handle{number}.{peer}").read_bytes(), 128)
            for peer in range(self.size)
        ]

    def meet(self, name: str) -> None:
        """Wait until every rank is here."""
        (self.folder / f"{name}.{self.rank}").touch()
        for peer in range(self.size):
            wait_for_file(self.folder / f"{name}.{peer}")

    def memory(self, size: int, kind: str = "window") -> Memory:
        self.memories.append(Memory(self, size, kind))
        return self.memories[-1]

    def put(self, peer: int, target: Memory, to: int, source: Memory, at: int, size: int, context: int = 0) -> P:
        request = P()
        args = (at, source.handle, size, to, target.handle, peer)
        self.plugin.call("put", self.context, context, *args, ctypes.byref(request))
        return request

    def put_signal(
        self,
        peer: int,
        signals: Memory,
        word: int,
        *,
        target: Memory | None = None,
        to: int = 0,
        source: Memory | None = None,
        at: int = 0,
        size: int = 0,
        add: int | None = None,
        strong: bool = True,
        context: int = 0,
    ) -> P:
        request = P()
        put = (at, source and source.handle, size, to, target and target.handle, peer)
        signal = (word * 8, signals.handle, add or 99, INC if add is None else ADD, strong)
        self.plugin.call("put_signal", self.context, context, *put, *signal, ctypes.byref(request))
        return request

    def get(self, peer: int, remote: Memory, at: int, local: Memory, to: int, size: int, context: int = 0) -> P:
        request = P()
        args = (at, remote.handle, size, to, local.handle, peer)
        self.plugin.call("get", self.context, context, *args, ctypes.byref(request))
        return request

    def done(self, request: P) -> bool:
        done = INT()
        self.plugin.call("test", self.comm, request, ctypes.byref(done))
        return bool(done.value)

    def finish(self, *requests: P, seconds: float = 20) -> None:
        until(lambda: all(self.done(request) for request in requests), seconds)

    def failed(self) -> bool:
        failed = ctypes.c_bool()
        self.plugin.call("query_error", self.context, ctypes.byref(failed))
        return failed.value

    def deregister(self, memory: Memory) -> None:
        self.plugin.call("deregister", self.comm, memory.handle)

    def close(self) -> int:
        """As NCCL ends a communicator; what of the stand-in's driver is not given back."""
        self.plugin.call("destroy_context", self.context)
        for memory in self.memories:
            self.deregister(memory)
        self.plugin.call("close", self.comm)
        for memory in self.memories:
            if memory.kind != "host":
                self.gpu.fake_free(memory.address)
        self.plugin.call("finalize", self.plugin.instance)
        return self.gpu.fake_live()


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("nothing came")
        time.sleep(0)


def wait_for_file(path: Path) -> Path:
    until(path.exists, 30)
    return path


def descriptors() -> list[str]:
    return sorted(os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name))


def _is_open(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def refused(call: Callable[[], Any]) -> tuple[int, str]:
    try:
        call()
    except Failed as error:
        return error.code, str(error)
    return SUCCESS, "no error"


# ---- cases -----------------------------------------------------------------------------------------------------------


def moves(make: Callable[..., Rank]) -> Any:
    """Puts, gets, values and signals of every kind between all ranks, twice, and nothing is left."""
    before = descriptors()
    left = []
    for _ in range(2):
        rank = make()
        me, size = rank.rank, rank.size
        block = 4096
        window, source = rank.memory(block * size + 64), rank.memory(block)
        signals, values = rank.memory(64, "signals"), rank.memory(64, "host")
        source.fill(me + 1, 0, block)
        values.words[3] = 0x0102030405060708 + me
        rank.meet(f"filled{left}")
        requests = [
            rank.put_signal(peer, signals, 0, target=window, to=block * me, source=source, size=block)
            for peer in range(size)
        ]
        until(lambda signals=signals, size=size: signals.words[0] == size)
        for peer in range(size):
            assert window.read(block * peer, block) == bytes([peer + 1]) * block
        # Added values, a signal without bytes, a value from host memory, at an odd place.
        requests += [rank.put_signal(peer, signals, 1, add=1000 + me, context=1) for peer in range(size)]
        requests += [
            rank.put_signal(peer, signals, 2, target=window, to=block * size + 1, source=values, at=24, size=7)
            for peer in [(me + 1) % size]
        ]
        until(lambda signals=signals, size=size: signals.words[1] == 1000 * size + size * (size - 1) // 2)
        until(lambda signals=signals: signals.words[2] == 1)
        assert window.read(block * size + 1, 7) == (0x0102030405060708 + (me - 1) % size).to_bytes(8, "little")[:7]
        rank.finish(*requests)
        # Everybody's first block, by get.
        copy = rank.memory(block * size)
        gets = [
            rank.get(peer, window, block * peer, copy, block * peer, block, context=peer % 2) for peer in range(size)
        ]
        rank.finish(*gets)
        flushed = P(1)
        rank.plugin.call("flush", rank.context, 0, signals.handle, me, ctypes.byref(flushed))
        assert flushed.value is None
        assert copy.read(0, block * size) == b"".join(bytes([peer + 1]) * block for peer in range(size))
        # Signals in a window, which a kernel may reset in between, and in host memory.
        for memory in (window, values):
            word = block * size // 8 + 2 if memory is window else 5
            for turn in range(3):
                rank.meet(f"reset{left}{word}{turn}")
                rank.finish(*(rank.put_signal((me + 1) % size, memory, word, add=add) for add in (5 + turn, 100)))
                until(lambda memory=memory, word=word, turn=turn: memory.words[word] == 105 + turn)
                memory.words[word] = 0
        rank.meet(f"read{left}")
        left.append(rank.close())
    assert not rank.plugin.said, rank.plugin.said
    return {"left": left, "new descriptors": [each for each in descriptors() if each not in before]}


def many(make: Callable[..., Rank]) -> Any:
    """More operations at once than a ring has places, to every rank; and registrations of many ranks at once."""
    rank = make()
    count = 2500
    window, signals = rank.memory(8 * rank.size * 2), rank.memory(64, "signals")
    values = rank.memory(8 * count, "host")
    requests = []
    for turn in range(count):
        values.words[turn] = turn + 1
        for peer in range(rank.size):
            if turn % 100 == 0:
                requests.append(rank.put_signal(peer, signals, 0))
            requests.append(rank.put(peer, window, 8 * rank.rank, values, 8 * turn, 8))
            requests.append(rank.put_signal(peer, signals, 1, add=2))
    rank.finish(*requests, seconds=60)
    until(lambda: signals.words[1] == 2 * count * rank.size, 60)
    assert signals.words[0] == count // 100 * rank.size
    rank.meet("counted")
    return rank.close()


def order(make: Callable[..., Rank]) -> Any:
    """What GIN promises about order, for the seeds in SEEDS ("-" = none); and how often what it doesn't was seen.

    Rank 0 sends to rank 1: per turn two puts and a weak signal, two more and a strong signal, all on one context, and a
    put with a signal on another context. Rank 1 looks at the bytes at each signal.
    """
    seen = dict.fromkeys(("complete before it arrived", "weak before earlier bytes", "contexts", "torn"), 0)
    for number, seed in enumerate(os.environ["SEEDS"].split(",")):
        os.environ["EPV2_RMA_CHAOS"] = "" if seed == "-" else seed
        rank = make()
        size, turns = 2048, 6
        window, source, signals = rank.memory(size * 8), rank.memory(size * 8), rank.memory(64, "signals")
        for turn in range(1, turns + 1):
            rank.meet(f"turn{number}.{turn}")
            if rank.rank == 0:
                source.fill(turn, 0, size * 8)
                first = rank.put(1, window, 0, source, 0, size)
                requests = [
                    first,
                    rank.put(1, window, size, source, size, size),
                    rank.put_signal(
                        1, signals, 0, target=window, to=2 * size, source=source, at=0, size=size, strong=False
                    ),
                    rank.put(1, window, 3 * size, source, 0, size),
                    rank.put_signal(1, signals, 1, target=window, to=4 * size, source=source, at=0, size=size),
                    rank.put_signal(1, signals, 2, target=window, to=5 * size, source=source, size=size, context=1),
                ]
                rank.finish(*requests)
                source.fill(255, 0, size * 8)  # the source of a complete put may be written
                (rank.folder / f"complete{number}.{turn}").touch()
            elif rank.rank == 1:
                expected = bytes([turn]) * size
                wanted, overtaken = {0, 1, 2}, False
                told = rank.folder / f"complete{number}.{turn}"
                is_told = False

                def block(which: int, expected: bytes = expected, window: Memory = window, size: int = size) -> bool:
                    return window.read(which * size, size) == expected

                while wanted:
                    raised = {word for word in wanted if signals.words[word] >= turn}
                    if 0 in raised:
                        assert block(2), f"seed {seed}: a weak signal before its bytes"
                        seen["weak before earlier bytes"] += not (block(0) and block(1))
                    if 1 in raised:
                        late = [which for which in range(5) if not block(which)]
                        assert not late, f"seed {seed}: a strong signal before the bytes of blocks {late}"
                    if 2 in raised:
                        assert block(5), f"seed {seed}: a signal before its bytes"
                        overtaken |= 1 in wanted - raised
                    for which in range(6):
                        seen["torn"] += len(set(window.read(which * size, size))) > 1
                    if not is_told and told.exists():
                        is_told = True
                        seen["complete before it arrived"] += not all(map(block, range(6)))
                    wanted -= raised
                seen["contexts"] += overtaken
                assert all(map(block, range(6)))
                assert list(signals.words[:3]) == [turn] * 3
        rank.meet(f"end{number}")
        assert not rank.failed()
        assert rank.close() == 0
    return seen


def errors(make: Callable[..., Rank]) -> Any:
    """What is refused, and what is said."""
    said: dict[str, Any] = {}
    rank = make()
    window, signals, host = rank.memory(256), rank.memory(64, "signals"), rank.memory(64, "host")
    if rank.rank == 0:
        nowhere = Memory.__new__(Memory)
        nowhere.handle = P(0)
        said["no memory"] = refused(lambda: rank.put(1, nowhere, 0, window, 0, 8))
        said["rank"] = refused(lambda: rank.put(2, window, 0, window, 0, 8))
        said["context"] = refused(lambda: rank.put(1, window, 0, window, 0, 8, context=2))
        said["host"] = refused(lambda: rank.put(1, window, 0, host, 0, 17))
        said["host end"] = refused(lambda: rank.put(1, window, 0, host, 60, 8))
        said["request"] = refused(lambda: rank.done(P(1)))
        empty = (0, P(0), 0, 0, P(0), 1)  # no bytes, to rank 1
        said["operation"] = refused(
            lambda: rank.plugin.call(
                "put_signal", rank.context, 0, *empty, 0, signals.handle, 1, 3, True, ctypes.byref(P())
            )
        )
    rank.meet("told")
    rank.close()

    def remote(call: Callable[[Rank, Memory, Memory], P], name: str) -> None:
        """An error of the rank that carries it out, which comes back; with a communicator for each."""
        rank = make()
        window, signals = rank.memory(256), rank.memory(64, "signals")
        if rank.rank == 0:
            said[name] = refused(lambda: rank.finish(call(rank, window, signals)))
            # What came before counts, what comes after does not.
            said[name] += (refused(lambda: rank.finish(rank.put(1, window, 0, window, 0, 8)))[0],)
        rank.meet(f"tried {name}")
        rank.close()

    remote(lambda r, w, s: r.put(1, w, 250, w, 0, 8), "end of target")
    remote(lambda r, w, s: r.put(1, w, 0, w, 2**40, 8), "end of source")
    remote(lambda r, w, s: r.put(1, w, 0, s, 0, 8), "not shared")
    remote(lambda r, w, s: r.get(1, w, 252, w, 0, 8), "end of get")
    remote(lambda r, w, s: r.put_signal(1, s, 8), "end of signals")
    gone = P(99)

    def deregistered(rank: Rank, window: Memory, signals: Memory) -> P:
        stranger = Memory.__new__(Memory)
        stranger.handle = gone
        return rank.put(1, stranger, 0, window, 0, 8)

    remote(deregistered, "not registered")
    rail = make(contexts=1, stride=2)
    window = rail.memory(64)
    if rail.rank == 0:
        said["rail"] = refused(lambda: rail.put(1, window, 0, window, 0, 8))
    rail.meet("rail")
    rail.close()
    return said


def driver(make: Callable[..., Rank]) -> Any:
    """A call of the driver that fails on rank 1: while connecting, while registering, at work."""
    said = {}
    for name in ("cuMemHostRegister", "cuStreamCreateWithPriority"):
        if int(sys.argv[2]) == 1:
            ctypes.CDLL("libcuda.so.1").fake_fail(name.encode())
        said[name] = refused(make)
        ctypes.CDLL("libcuda.so.1").fake_fail(b"")
    rank = make()
    for name in ("cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"):
        other = make()
        if rank.rank == 1:
            rank.gpu.fake_fail(name.encode())
        said[name] = refused(lambda other=other: Memory(other, 4096, "window"))
        rank.gpu.fake_fail(b"")
        other.close()
    window = rank.memory(64)
    rank.meet("registered")
    if rank.rank == 1:
        rank.gpu.fake_fail(b"cuMemcpyBatchAsync")
    rank.meet("broken")
    if rank.rank == 0:
        said["at work"] = refused(lambda: rank.finish(rank.put(1, window, 0, window, 0, 8)))
    rank.meet("tried")
    said["failed"] = rank.failed()
    rank.close()
    return said


def death(make: Callable[..., Rank]) -> Any:
    """Rank 1 is killed; the others are told, by what they wait for and by what they do next."""
    rank = make()
    window, signals = rank.memory(64), rank.memory(64, "signals")
    rank.finish(rank.put_signal(1, signals, 0, target=window, to=0, source=window, size=8))
    rank.meet("before")
    if rank.rank == 1:
        os.kill(os.getpid(), 9)
    begin = time.monotonic()
    until(rank.failed)
    noticed = time.monotonic() - begin
    put = refused(lambda: rank.finish(rank.put(1, window, 0, window, 0, 8)))
    # What other ranks do for each other goes on.
    peer = 2 if rank.rank == 0 else 0
    rank.finish(rank.put_signal(peer, signals, 1, target=window, to=8, source=window, size=8))
    until(lambda: signals.words[1] == 1)
    (rank.folder / f"apart.{rank.rank}").touch()
    wait_for_file(rank.folder / f"apart.{peer}")
    registered = refused(lambda: Memory(rank, 64, "window"))
    return {"seconds": noticed, "put": put, "register": registered, "said": rank.plugin.said}


def leave(make: Callable[..., Rank]) -> Any:
    """Rank 1 closes, or ends without (HOW): nobody takes it for dead, and puts to it are errors."""
    rank = make()
    window = rank.memory(64)
    rank.finish(rank.put(1, window, 0, window, 0, 8))
    rank.meet("before")
    if rank.rank == 1:
        if os.environ["HOW"] == "closes":
            rank.close()
        (rank.folder / "leaving").write_text(str(os.getpid()))
        (rank.folder / "leaving").rename(rank.folder / "left")
        return None
    process = Path("/proc") / wait_for_file(rank.folder / "left").read_text() / "stat"
    until(lambda: not process.exists() or process.read_text().rsplit(")", 1)[1].split()[0] == "Z")
    time.sleep(0.5)
    put = refused(lambda: rank.finish(rank.put(1, window, 0, window, 0, 8)))
    return {"failed": rank.failed(), "put": put}


def stress(make: Callable[..., Rank]) -> Any:
    """Random puts and gets between all ranks with chaos: at the end everybody has what it must have."""
    os.environ["EPV2_RMA_CHAOS"] = os.environ["SEEDS"]
    rank = make()
    me, size, block, rounds = rank.rank, rank.size, 1000, 30
    draw = random.Random(f"{os.environ['SEEDS']}.{me}")
    window, source = rank.memory(block * rounds * size), rank.memory(block)
    signals = rank.memory(64, "signals")
    for turn in range(rounds):
        source.fill(0, 0, block)
        source.fill((me * 31 + turn) % 256, 0, block)
        requests = []
        for peer in draw.sample(range(size), size):
            length = draw.randrange(1, block)
            at = (turn * size + me) * block
            context = draw.randrange(2)
            requests.append(rank.put(peer, window, at, source, 0, length, context))
            requests.append(
                rank.put_signal(
                    peer, signals, 0, target=window, to=at + length, source=source, at=length, size=block - length,
                    context=context,
                )
            )  # fmt: skip
        rank.finish(*requests)
    until(lambda: signals.words[0] == rounds * size)
    for turn in range(rounds):
        for peer in range(size):
            assert window.read((turn * size + peer) * block, block) == bytes([(peer * 31 + turn) % 256]) * block
    rank.meet("checked")
    return rank.close()


def main() -> None:
    case, rank, size, folder, path = sys.argv[1:]

    def make(**options: int) -> Rank:
        return Rank(int(rank), int(size), Path(folder), path, **options)

    print(json.dumps(globals()[case](make)))


if __name__ == "__main__":
    main()
