"""`EmulatedRuntime`: the `Runtime` protocol on CPU tensors, kernels compiled by g++ and run by scheduler.cc.

Every rank is a process. A window is memory that all ranks of the group map, each at another address. A stream is a
thread that does what it is given in order; the stream that is current at the start is the calling thread itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import mmap
import os
import queue
import random
import re
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from epv2_plugin.elastic.backends.device import CopyOp, Meeting, OrderOp, StreamOp, node_of

TESTS = Path(__file__).resolve().parents[1]
SOURCES = TESTS.parent / "csrc" / "kernels"
CACHE = TESTS / ".emulator"
COMPILE = [
    "g++",
    "-std=c++20",
    "-g",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-fPIC",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
]
COMPILE += ["-DEPV2_EMULATE", "-I", str(TESTS)]
# Makes every load and store call scheduler.cc, and what a GPU would do otherwise than this CPU; no sanitizer is linked.
WATCHED = ["-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
WATCHED += ["-fsanitize=alignment,shift-exponent"]
MESSAGE_BYTES = 1 << 16
DELAYS = (*[0] * 20, *[5e-3] * 10, 0.1)  # seconds of a message that a kernel has left, and of its bytes


class KernelSpec(Protocol):
    """What a kernel of the registry says about itself; `source` is relative to csrc/kernels."""

    name: str
    source: str
    args: str
    defines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch, for tests that check the SM ceiling."""

    kernel: str
    ctas: int
    threads: int
    shared_bytes: int


@dataclass
class Window:
    """`tensor` (uint8 [num_bytes]) is this rank's part; kernels reach everybody's through `handle`, if not 0."""

    tensor: torch.Tensor
    handle: int
    num_bytes: int
    mappings: list[torch.Tensor]  # every rank's part, in this process
    node: range  # the ranks that may be reached by address

    def peer_pointer(self, rank: int, offset: int) -> int:
        """Where byte `offset` of a rank's part lies in this process.

        Raises:
            ValueError: the rank is on another node.
        """
        if rank not in self.node:
            raise ValueError(f"rank {rank} is on another node: this one has ranks {self.node[0]} to {self.node[-1]}")
        return self.mappings[rank].data_ptr() + offset

    def part(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Some of `tensor`, with a storage of its own."""
        return self.lend(offset, num_bytes)[0]

    def lend(self, offset: int, num_bytes: int) -> tuple[torch.Tensor, weakref.ref[Any]]:
        """Likewise, and what refers to nothing any more once nobody has that storage."""
        memory = self.tensor.numpy()[offset : offset + num_bytes]
        return torch.from_numpy(memory), weakref.ref(memory)

    def exchange(self, rank: int, offset: int, expected: int, value: int) -> int:
        """A word of 64 bits of a rank's part becomes `value` if it is `expected`; returns what it was."""
        return int(_scheduler().epv2_emulator_exchange(self.peer_pointer(rank, offset), expected, value))


@dataclass
class Mapped:
    """Host memory (uint8) that kernels can write, at address `pointer`."""

    tensor: torch.Tensor
    pointer: int


class Event(threading.Event):
    """Set when a stream comes to it."""

    @property
    def handle(self) -> int:
        """What operations call it."""
        return id(self)

    def passed(self) -> bool:
        """Whether a stream has come to it."""
        return self.is_set()


class Stream:
    """A thread that does one thing after the other. After an error it does nothing more, and `error` says why."""

    def __init__(self, pauses: random.Random):
        self.error: BaseException | None = None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pauses = pauses
        self._thread = threading.Thread(target=self._run, name="emulated stream", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        """Do it after what was put before."""
        self._work.put(work)

    def close(self) -> None:
        """End the thread after what was put."""
        self._work.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._pauses.random() < 0.2:  # no stream is in step with another
                time.sleep(self._pauses.random() * 2e-3)
            try:
                if self.error is None:
                    work()
            except BaseException as error:
                self.error = error


class LateNetwork:
    """Carries on what kernels have left to the network: in pieces, in any order, late. A signal comes behind all that
    was given before it on its way: to the same peer in the same context.
    """

    def __init__(self, pauses: random.Random):
        self._pauses = pauses
        self._messages: list[_Message] = []  # in the order in which they were given
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="emulated network", daemon=True)
        self._thread.start()

    def take(self, message: _Message) -> None:
        """One more."""
        with self._changed:
            message.held_until = time.monotonic() + self._pauses.choice(DELAYS)
            self._messages.append(message)
            self._changed.notify_all()

    def close(self, abandon: bool) -> None:
        """End once all is delivered; `abandon`: what is not is lost."""
        with self._changed:
            self._closing = True
            if abandon:
                self._messages.clear()
            self._changed.notify_all()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._messages and not self._closing:
                    self._changed.wait()
                if not self._messages:
                    return
                message = self._pauses.choice(self._messages)
                if message.is_signal:  # what is before it instead, if there is anything
                    message = next(each for each in self._messages if each.way == message.way)
            if time.monotonic() > message.held_until and message.advance(self._pauses):
                with self._changed:
                    if message in self._messages:
                        self._messages.remove(message)
            time.sleep(self._pauses.random() * 4e-4)


class _Message:
    """A put, a value or a signal under way; see `CarryOn` in scheduler.cc."""

    def __init__(
        self, kind: int, way: tuple[int, int], target: int, source: int, num_bytes: int, read: int, value: int
    ):
        self.is_signal, self.way, self.held_until = kind == 3, way, 0.0
        self._target, self._source, self._num_bytes, self._value = target, source, num_bytes, value
        self._is_put = kind == 0
        self._content = ctypes.string_at(source, num_bytes) if read else None
        self._step = max(8, num_bytes // 3 // 8 * 8)
        self._pieces = [*range(0, num_bytes, self._step)]  # where those begin that have not landed

    def advance(self, pauses: random.Random) -> bool:
        """One step; whether it was the last."""
        if not self._is_put:
            word = ctypes.c_uint64.from_address(self._target)
            word.value = word.value + self._value if self.is_signal else self._value
            return True
        if self._content is None:  # its source is read when the network likes, which may be late
            self._content = ctypes.string_at(self._source, self._num_bytes)
            self.held_until = time.monotonic() + pauses.choice(DELAYS)
            return False
        begin = self._pieces.pop(pauses.randrange(len(self._pieces)))
        piece = self._content[begin : begin + self._step]
        ctypes.memmove(self._target + begin, piece, len(piece))
        return not self._pieces


class EmulatedRuntime:
    """Runs kernels on fibers, to completion, in the calling thread or that of a stream, one at a time.

    Args:
        group: the ranks; a gloo group.
        seed: of the scheduling; each rank and launch draws its own from it.
        num_sms: SMs of the pretended device; a launch with more CTAs is refused.
        sources: folder that kernels' `source` is relative to.
        limit_seconds: wall time after which a launch, or a wait of a stream, is an error.
        lsa_size: ranks of a node, which are consecutive; all of the group unless given.
        launches: every launch so far, in order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        seed: int = 0,
        num_sms: int = 8,
        sources: Path = SOURCES,
        limit_seconds: float = 120,
        lsa_size: int | None = None,
    ):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.lsa_size = lsa_size or self.size
        if self.size % self.lsa_size:
            raise ValueError(f"lsa_size = {lsa_size}: must divide the {self.size} ranks of the group")
        self.device = torch.device("cpu")
        self.num_sms = num_sms
        self.description: dict[str, Any] = {"transport": "emulated", "device": "emulated H200", "ranks_on_device": 1}
        self.machines = [f"emulated node {rank // self.lsa_size}" for rank in range(self.size)]
        self.launches: list[Launch] = []
        self._group, self._sources, self._limit_seconds = group, sources, limit_seconds
        self._random = random.Random(f"{seed}/{self.rank}")
        self._windows: list[Window] = []
        self._signals: dict[int, list[torch.Tensor]] = {}  # by handle of the network
        self._late: LateNetwork | None = None
        self._mapped: list[Mapped] = []
        self._streams: list[Stream] = []
        self._events: weakref.WeakValueDictionary[int, Event] = weakref.WeakValueDictionary()
        self._of_thread = threading.local()
        self._closing = False
        self.meeting = Meeting(group, limit_seconds)

    def window(self, num_bytes: int, ordered: bool = False) -> Window:
        """Collective. Zeroed memory of `num_bytes` on every rank; `ordered`: words of it may be raised by the network.

        Raises:
            ValueError: ranks ask for different sizes, or for less than a byte.
        """
        parts = self._share(num_bytes, "window sizes", num_bytes)
        window = Window(parts[self.rank], _next_handle(), num_bytes, parts, node_of(self))
        place = (self.size, self.rank, self.lsa_size)
        _scheduler().epv2_emulator_window(window.handle, _addresses(parts), num_bytes, *place, int(ordered))
        self._windows.append(window)
        return window

    def host_window(self, num_bytes: int) -> Window:
        """Collective. Zeroed memory that kernels reach by address only.

        Raises:
            ValueError: as `window`.
        """
        parts = self._share(num_bytes, "sizes of host memory", num_bytes)
        return Window(parts[self.rank], 0, num_bytes, parts, node_of(self))

    def network(self, num_signals: int, num_contexts: int, rail: bool) -> int:
        """Collective. What kernels need as `Network::communicator`, with `num_signals` zeroed signals in each context.

        Raises:
            ValueError: ranks ask for different things, or for less than one.
        """
        num_bytes = 8 * max(num_signals, 0) * max(num_contexts, 0)
        parts = self._share(num_bytes, "networks (signals, contexts, rail)", (num_signals, num_contexts, rail))
        handle = _next_handle()
        self._signals[handle] = parts
        shape = (num_contexts, num_signals, int(rail))
        _scheduler().epv2_emulator_network(handle, _addresses(parts), *shape, self.size, self.rank, self.lsa_size)
        return handle

    def _share(self, num_bytes: int, what: str, wish: object) -> list[torch.Tensor]:
        """Zeroed memory of every rank (uint8), by rank, if all have the same wish."""
        # A memfd has no name, so nothing can be left behind; peers open it through /proc.
        file = os.memfd_create("epv2-window")
        os.ftruncate(file, max(num_bytes, 1))
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, (num_bytes, wish, f"/proc/{os.getpid()}/fd/{file}"), group=self._group)
        wishes = [wish for _, wish, _ in everybody]
        if min(size for size, _, _ in everybody) < 1 or any(each != wish for each in wishes):
            os.close(file)
            raise ValueError(f"{what} of the ranks are {wishes}; must be equal and positive")
        # Processes from one fork server would map at the same addresses, and a wrong pointer would work by chance.
        padding = mmap.mmap(-1, mmap.PAGESIZE * (1 + int.from_bytes(os.urandom(2), "little")))
        parts = []
        for *_, path in everybody:
            with open(path, "r+b") as peer:
                parts.append(torch.frombuffer(mmap.mmap(peer.fileno(), num_bytes), dtype=torch.uint8))
        dist.barrier(group=self._group)
        os.close(file)
        padding.close()
        return parts

    def mapped(self, num_bytes: int) -> Mapped:
        """Zeroed host memory of `num_bytes` that kernels can write."""
        tensor = torch.zeros(num_bytes, dtype=torch.uint8)
        self._mapped.append(Mapped(tensor, tensor.data_ptr()))
        return self._mapped[-1]

    def prepare(self, kernel: KernelSpec) -> None:
        """Compile and load `kernel`."""
        _kernel_library(kernel.name, self._sources / kernel.source, tuple(kernel.defines), self._sources)

    def launch(
        self,
        kernel: KernelSpec,
        args: bytes,
        *,
        ctas: int,
        threads: int,
        shared_bytes: int,
        stream: Stream | None = None,
    ) -> None:
        """Run `kernel` to its end on a stream, None = the current one.

        Raises:
            RuntimeError: the kernel does not compile, ran into an error or a deadlock, or wants more than `num_sms`.
        """
        if not 1 <= ctas <= self.num_sms:
            raise RuntimeError(f"{kernel.name}: {ctas} CTAs on a device of {self.num_sms} SMs")
        library = _kernel_library(kernel.name, self._sources / kernel.source, tuple(kernel.defines), self._sources)
        expected = library[f"{kernel.name}_args_bytes"]()
        if len(args) != expected:
            raise RuntimeError(f"{kernel.name}: args of {len(args)} bytes, the kernel's have {expected}")
        self.launches.append(Launch(kernel.name, ctas, threads, shared_bytes))
        seed = ctypes.c_uint64(self._random.getrandbits(64))

        def run() -> None:
            memory = (ctypes.c_uint64 * (-(-len(args) // 8))).from_buffer_copy(args.ljust(len(args) + -len(args) % 8))
            message = ctypes.create_string_buffer(MESSAGE_BYTES)
            with _one_kernel:
                _scheduler().epv2_emulator_limit_seconds(ctypes.c_double(self._limit_seconds))
                shape = (ctas, threads, shared_bytes, seed)
                _launching[:] = [self]
                failed = library[f"{kernel.name}_launch"](memory, *shape, message, MESSAGE_BYTES)
            if failed:
                raise RuntimeError(f"rank {self.rank}: {_with_lines(message.value.decode(errors='replace'))}")

        self._put(run, stream or self.current_stream())

    def carry_on(self, message: _Message) -> None:
        """Deliver what a kernel has left to the network."""
        if self._late is None:
            self._late = LateNetwork(random.Random(self._random.getrandbits(64)))
        self._late.take(message)

    def reseed(self, seed: int) -> None:
        """Schedule what follows as `seed` says."""
        self._random.seed(f"{seed}/{self.rank}")

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy memory on the current stream."""
        self.do(lambda: ctypes.memmove(target, source, num_bytes))

    def fill(self, target: int, byte: int, num_bytes: int) -> None:
        """Set bytes on the current stream."""
        self.do(lambda: ctypes.memset(target, byte, num_bytes))

    def stream_ops(self, operations: Sequence[StreamOp | CopyOp | OrderOp], stream: Stream | None = None) -> None:
        """Write words, wait for words and streams, and copy on a stream, None = the current one.

        Raises:
            RuntimeError: a word is not where this rank may write or wait, or (on its stream) no value came within
                `limit_seconds`.
        """
        own = [window.tensor for window in self._windows] + [mapped.tensor for mapped in self._mapped]
        written = own
        if self.writes_to_peers():
            written = own + [window.mappings[peer] for window in self._windows for peer in window.node]
        for name, address, *_ in operations:
            if name.startswith(("write", "wait")) and not any(
                0 <= address - memory.data_ptr() < memory.numel()
                for memory in (written if name.startswith("write") else own)
            ):
                raise RuntimeError(f"{name} at {address:#x}: neither in a window of this rank nor in mapped memory")
        stream = stream or self.current_stream()
        for ordered, group in itertools.groupby(operations, lambda each: len(each) == 2):
            if not ordered:
                self._put(functools.partial(self._run, [*group]), stream)
                continue
            for name, handle, *_ in group:
                if name in ("after", "before"):
                    other = self._streams[handle - 1] if handle else None
                    earlier, later = (other, stream) if name == "after" else (stream, other)
                    event = Event()
                    self._put(event.set, earlier)
                    self._put(functools.partial(self._wait_event, event), later)
                elif name == "record":
                    self._put(self._events[handle].set, stream)
                else:
                    self._put(functools.partial(self._wait_event, self._events[handle]), stream)

    def writes_to_peers(self) -> bool:
        """Whether words of peers can be written: this device is as many drivers, of which the odd ranks' refuse it."""
        return self.rank % 2 == 0

    def _run(self, operations: Sequence[Any]) -> None:
        for name, address, value, *rest in operations:
            if name == "copy":
                ctypes.memmove(address, value, *rest)
            elif name.startswith("write"):
                word = ctypes.c_uint64 if name == "write64" else ctypes.c_uint32
                word.from_address(address).value = value
            else:
                self._wait_word(name, address, value)

    def _wait_word(self, name: str, address: int, value: int) -> None:
        word = ctypes.c_uint32.from_address(address)
        equal = name == "wait32_eq"
        self.await_emulated(
            lambda: word.value == value if equal else (word.value - value) & 0xFFFFFFFF < 1 << 31,
            f"rank {self.rank}: {name} {value:#x} at {address:#x}",
        )

    def await_emulated(self, passed: Callable[[], bool], what: str) -> None:
        """Hold the thread of a stream. Raises RuntimeError if it does not pass in time."""
        deadline = time.monotonic() + self._limit_seconds
        while not passed():
            if self._closing or time.monotonic() > deadline:
                raise RuntimeError(f"{what} within {self._limit_seconds} s")
            time.sleep(2e-4)

    def comm_stream(self) -> Any:
        """None: operations that ask for it run in the calling thread."""

    def new_stream(self) -> Stream:
        """A stream that runs beside the calling thread."""
        self._streams.append(Stream(random.Random(self._random.getrandbits(64))))
        return self._streams[-1]

    @contextlib.contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        """Make it the current stream of this thread; None changes nothing."""
        before = self.current_stream()
        self._of_thread.stream = stream or before
        try:
            yield
        finally:
            self._of_thread.stream = before

    def adopt_thread(self) -> None:
        """Every thread can do this."""

    def current_stream(self) -> Stream | None:
        """None: the calling thread itself."""
        return getattr(self._of_thread, "stream", None)

    def current_handle(self) -> int:
        """0: the calling thread itself."""
        stream = self.current_stream()
        return 0 if stream is None else self._streams.index(stream) + 1

    def do(self, work: Callable[[], None]) -> None:
        self._put(work, self.current_stream())

    def _put(self, work: Callable[[], None], stream: Stream | None) -> None:
        if stream is None:
            self._raise()
            work()
        else:
            stream.put(work)

    def _raise(self) -> None:
        for stream in self._streams:
            if stream.error is not None:
                raise stream.error

    def is_capturing(self) -> bool:
        """Never: there are no graphs."""
        return False

    def event(self) -> Event:
        """One to be recorded by `stream_ops`."""
        event = Event()
        self._events[event.handle] = event
        return event

    def record(self, stream: Stream | None = None) -> Event:
        """An event that is set when a stream, None = the current one, comes to it."""
        event = self.event()
        self.stream_ops([("record", event.handle)], stream)
        return event

    def wait(self, event: Event, stream: Stream | None = None) -> None:
        """Let a stream, None = the current one, wait for an event."""
        self.stream_ops([("await", event.handle)], stream)

    def _wait_event(self, event: Event) -> None:
        deadline = time.monotonic() + self._limit_seconds
        while not event.wait(0.1):
            if self._closing or time.monotonic() > deadline:
                self._raise()
                raise RuntimeError(f"rank {self.rank}: an event did not come within {self._limit_seconds} s")

    def close(self, abandon: bool = False) -> None:
        """End the streams and forget windows and networks; kernels that use their handles fail from now on."""
        self._closing = abandon
        for stream in self._streams:
            stream.close()
        if self._late is not None:
            self._late.close(abandon)
        for handle in [*(window.handle for window in self._windows), *self._signals]:
            _scheduler().epv2_emulator_forget(handle)
        self._windows, self._signals, self._streams = [], {}, []


_one_kernel = threading.Lock()  # the scheduler has one set of fibers
_launching: list[EmulatedRuntime] = []  # whose kernel runs
_CARRY_ON = ctypes.CFUNCTYPE(
    None,
    *(ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t),
    *(ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64),
)


@_CARRY_ON
def _carry_on(kind: int, way: int, peer: int, target: int, source: int, num_bytes: int, read: int, value: int) -> None:
    _launching[0].carry_on(_Message(kind, (way, peer), target, source, num_bytes, read, value))


_handles = iter(range(0x7001, 1 << 30))


def _next_handle() -> int:
    return next(_handles)


def _addresses(parts: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(parts))(*[part.data_ptr() for part in parts])


def _includes(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cc"))


def _compile(name: str, source: Path, options: list[str], dependencies: list[Path]) -> Path:
    """The shared object of `source`, from the cache if neither it, its dependencies nor the options have changed."""
    command = [*COMPILE, *options, "-c", "-x", "c++", str(source)]
    key = hashlib.sha256("\0".join(command).encode())
    for path in [source, *dependencies]:
        key.update(str(path).encode() + b"\0" + path.read_bytes())
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    target = CACHE / f"{name}-{key.hexdigest()[:16]}.so"
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ranks that want the same kernel wait for the first one's
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            _run([*command, "-o", f"{partial}.o"])
            _run(["g++", "-shared", "-o", str(partial), f"{partial}.o"])
            os.remove(f"{partial}.o")
            partial.replace(target)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _with_lines(message: str) -> str:
    """`message` with every [library+offset] as file:line of the kernel."""

    @functools.cache
    def line(library: str, offset: str) -> str:
        frames = _run(["addr2line", "-i", "-e", library, offset]).split("\n")
        ours = [frame for frame in frames if frame and not frame.startswith(str(TESTS / "emulator" / "device.h"))]
        return os.path.relpath(ours[0].split(" (discr")[0], TESTS.parent) if ours else "?"

    return re.sub(r"\[(\S+)\+(0x[0-9a-f]+)\]", lambda found: line(*found.groups()), message)


@functools.cache
def _scheduler() -> ctypes.CDLL:
    here = Path(__file__).parent
    library = ctypes.CDLL(
        str(_compile("scheduler", here / "scheduler.cc", ["-O3"], _includes(here))), mode=ctypes.RTLD_GLOBAL
    )
    number, address = ctypes.c_uint64, ctypes.c_void_p
    library.epv2_emulator_window.argtypes = [number, address, number, *[ctypes.c_int] * 4]
    library.epv2_emulator_network.argtypes = [number, address, *[ctypes.c_int] * 6]
    library.epv2_emulator_forget.argtypes = [number]
    library.epv2_emulator_exchange.argtypes, library.epv2_emulator_exchange.restype = [number] * 3, number
    library.epv2_emulator_carry_on.argtypes = [_CARRY_ON]
    library.epv2_emulator_carry_on(_carry_on)
    for function in ("window", "network", "forget", "limit_seconds", "carry_on"):
        getattr(library, f"epv2_emulator_{function}").restype = None
    return library


@functools.cache
def _kernel_library(name: str, source: Path, defines: tuple[tuple[str, str], ...], sources: Path) -> ctypes.CDLL:
    _scheduler()  # its symbols are global: kernels find them when they are loaded
    options = [*WATCHED, "-I", str(sources), "-I", str(SOURCES), *[f"-D{key}={value}" for key, value in defines]]
    library = ctypes.CDLL(str(_compile(name, source, options, _includes(Path(__file__).parent, sources, SOURCES))))
    library[f"{name}_args_bytes"].restype = ctypes.c_uint64
    return library
