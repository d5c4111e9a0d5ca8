"""What the cuda backend asks of a device: symmetric windows, mapped host memory, launches, streams and events.

`Runtime` is the interface; `CudaRuntime` is the real one, over `epv2_plugin._C` and torch.cuda. The tests have another
that runs the same kernels on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib
import logging
import os
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from epv2_plugin.elastic.backends.base import machine_name
from epv2_plugin.elastic.errors import CommunicationTimeout, UnavailableError
from epv2_plugin.jit import Kernel, compiler

if TYPE_CHECKING:
    from epv2_plugin import _C

logger = logging.getLogger("epv2_plugin")


class Window(Protocol):
    """Memory of this rank that every rank of its node can read and write, and others through a network. Gone after
    `close` of its runtime.

    Attributes:
        tensor: `[num_bytes]` uint8, this rank's memory, on the device. handle: what kernels get as `args.window`; 0
            where the memory is the host's, which no network reaches.
    """

    @property
    def tensor(self) -> torch.Tensor: ...
    @property
    def handle(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def peer_pointer(self, rank: int, offset: int) -> int:
        """Address of byte `offset` of a rank's memory, for `Runtime.copy` and `fill`; of its own it is `tensor`'s.

        Raises:
            ValueError: that rank is on another node.
        """

    def part(self, offset: int, num_bytes: int) -> torch.Tensor:
        """`tensor[offset : offset + num_bytes]` with a storage of its own, by which one can tell when nobody has it."""

    def lend(self, offset: int, num_bytes: int) -> tuple[torch.Tensor, weakref.ref[Any]]:
        """Likewise, and what refers to nothing any more once nobody has that storage."""

    def exchange(self, rank: int, offset: int, expected: int, value: int) -> int:
        """Let the word of 64 bits at byte `offset` of a rank's host memory become `value` if it is `expected`; returns
        what it was. By the host, at once; of `Runtime.host_window` only."""


class Mapped(Protocol):
    """Host memory that kernels and `Runtime.stream_ops` can write. Gone after `close` of its runtime.

    Attributes:
        tensor: `[num_bytes]` uint8 on the CPU. pointer: its address for kernels.
    """

    @property
    def tensor(self) -> torch.Tensor: ...
    @property
    def pointer(self) -> int: ...


class Event(Protocol):
    """What a stream had been given when it was recorded there; once only."""

    @property
    def handle(self) -> int: ...
    def passed(self) -> bool:
        """Whether the stream has come that far; once recorded."""


class Runtime(Protocol):
    """The device of one rank of a group. "Collective" = every rank calls it, in the same order.

    Attributes:
        rank, size: in the group. lsa_size: ranks of a node, which reach each other's memory by address; every node has
            as many, and they are consecutive. device: of tensors. num_sms: SMs of the device. machines: names, by rank.
        description: what `status()` shows. `device`: its model's name. `ranks_on_device`: ranks of the group that share
            it. `transport`, NCCL version and so on.
        meeting: where the ranks tell each other short texts.
    """

    rank: int
    size: int
    lsa_size: int
    device: torch.device
    num_sms: int
    machines: list[str]
    description: dict[str, Any]
    meeting: Meeting

    def window(self, num_bytes: int, ordered: bool = False) -> Window:
        """Zeroed memory that peers reach (collective). `ordered`: kernels may raise words of it at ranks of other
        nodes, behind what they have put there; the network must keep that order, which takes some of its speed."""

    def host_window(self, num_bytes: int) -> Window:
        """Zeroed page-locked memory of the host that kernels of all ranks of the node reach (collective).

        Raises:
            UnavailableError: ranks of a node can't reach each other's memory. ValueError: they ask for different sizes.
            RuntimeError: a rank has not so much.
        """

    def network(self, num_signals: int, num_contexts: int, rail: bool) -> int:
        """A way for kernels to windows of other nodes (collective): what they need as `Network::communicator`.

        Kept until `close`. Each of `num_contexts` contexts has `num_signals` signals, zero at first. `rail`: only
        between ranks that have the same index in their nodes, which needs fewer connections.

        Raises:
            UnavailableError: NCCL has no such connections, or not so many contexts. ValueError: ranks ask for different
                things, or for less than one.
        """

    def mapped(self, num_bytes: int) -> Mapped:
        """Zeroed host memory that kernels reach."""

    def prepare(self, kernel: Kernel) -> None:
        """Build and load a kernel now. A driver may wait for the device when it loads one, and streams there may be
        waiting for what this rank does next."""

    def launch(
        self, kernel: Kernel, args: bytes, *, ctas: int, threads: int, shared_bytes: int, stream: Any = None
    ) -> None:
        """Launch on a stream, None = the current one: `ctas` blocks of `threads`, with `shared_bytes` of dynamic shared
        memory."""

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy between addresses in the order of the current stream: own tensors and windows, a peer's window, mapped
        memory. By a copy engine, or whatever the driver has for it, but not by a kernel of ours."""

    def fill(self, target: int, byte: int, num_bytes: int) -> None:
        """Set every byte, likewise."""

    def stream_ops(self, operations: Sequence[StreamOp | CopyOp | OrderOp], stream: Any = None) -> None:
        """Write words, wait for words and other streams, and copy, in the order of a stream, None = the current one.
        Words are of this rank's own memory or of mapped memory; those of a peer on this node can be written where
        `writes_to_peers` says so."""

    def writes_to_peers(self) -> bool:
        """Whether `stream_ops` can write words of peers on this node, all of them (collective). Else a copy brings
        words there, which takes a copy engine: it may be at work on something large.

        No driver says what it takes, so it is tried, once. Ranks may get different answers, and need not agree."""

    def comm_stream(self) -> Any:
        """The stream set aside for communication; None where launches are made one after the other."""

    def new_stream(self) -> Any:
        """Another stream, of high priority, that waits for nothing by itself; until `close`."""

    def on_stream(self, stream: Any) -> AbstractContextManager[None]:
        """Make it the current stream of this thread; None changes nothing."""

    def adopt_thread(self) -> None:
        """Let this thread, which the caller has just started, use the device."""

    def current_stream(self) -> Any:
        """The stream that is used where none is named; equal for the same stream."""

    def current_handle(self) -> int:
        """What names the current stream in an `OrderOp`."""

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""

    def event(self) -> Event:
        """One to be recorded by an `OrderOp`."""

    def record(self, stream: Any = None) -> Event:
        """An event after everything so far on a stream, None = the current one."""

    def wait(self, event: Event, stream: Any = None) -> None:
        """Make a stream wait for `event`, None = the current one."""

    def close(self, abandon: bool = False) -> None:
        """Wait for the device, then release windows, mapped memory and communicator (collective). Once is enough.

        `abandon`: without the other ranks, some of which may be gone.
        """


# (rank, byte in its part of the window, byte in this rank's, number of bytes)
Put = tuple[int, int, int, int]
# ("write32" | "write64" | "wait32_eq" | "wait32_geq", address, value); geq is cyclic: word - value is not negative.
StreamOp = tuple[str, int, int]
CopyOp = tuple[str, int, int, int]  # ("copy", target, source, number of bytes), as `Runtime.copy`
# ("after", stream): go on after all that it has been given so far. ("before", stream): it goes on after all until here.
# ("record", event), ("await", event). Streams and events by their handles.
OrderOp = tuple[str, int]

_PHASE = "creation of the buffer"
_REST_SECONDS = 5.0
_TRIED = 0x5EED
_left: list[CudaRuntime] = []  # what can't be closed, as a stream still uses it
_runtimes_made: dict[str, int] = {}
_functions: dict[tuple[Kernel, int], _C.Function] = {}


class _DeviceBytes:
    """Memory at `pointer` as torch takes it over; the storage of a tensor made of this keeps it, and `owner`, alive."""

    def __init__(self, pointer: int, num_bytes: int, owner: object):
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


class _HostMemory:
    """Host memory of all ranks of a node, as `_C.Window` gives that of their GPUs."""

    handle = 0

    def __init__(self, library: Any, parts: list[_C.SharedMapped], own: int):
        self._library, self._parts = library, parts
        self.pointer, self.num_bytes = parts[own].pointer, parts[own].num_bytes

    def lsa_pointer(self, peer: int, offset: int = 0) -> int:
        return self._parts[peer].pointer + offset

    def exchange(self, peer: int, offset: int, expected: int, value: int) -> int:
        return self._library.compare_exchange(self._parts[peer].host_pointer + offset, expected, value)


class _CudaWindow:
    def __init__(self, raw: _C.Window | _HostMemory, node: range, rank: int, device: torch.device):
        self.handle, self.num_bytes = raw.handle, raw.num_bytes
        self._raw, self._node, self._rank, self._device = raw, node, rank, device
        self.tensor = self.part(0, raw.num_bytes)

    def part(self, offset: int, num_bytes: int) -> torch.Tensor:
        return self.lend(offset, num_bytes)[0]

    def lend(self, offset: int, num_bytes: int) -> tuple[torch.Tensor, weakref.ref[Any]]:
        memory = _DeviceBytes(self._raw.pointer + offset, num_bytes, self._raw)
        return torch.as_tensor(memory, device=self._device), weakref.ref(memory)

    def peer_pointer(self, rank: int, offset: int) -> int:
        if rank not in self._node:
            raise ValueError(f"rank {rank} is on another node: this one has ranks {self._node[0]} to {self._node[-1]}")
        if rank == self._rank:  # NCCL maps it a second time, elsewhere; who compares addresses has those of tensors
            return self._raw.pointer + offset
        return self._raw.lsa_pointer(rank - self._node[0], offset)

    def exchange(self, rank: int, offset: int, expected: int, value: int) -> int:
        assert isinstance(self._raw, _HostMemory)
        return self._raw.exchange(rank - self._node[0], offset, expected, value)


class _CudaMapped:
    def __init__(self, raw: _C.Mapped):
        self.pointer = raw.pointer
        memory = (ctypes.c_uint8 * raw.num_bytes).from_address(raw.host_pointer)
        memory.owner = raw  # type: ignore[attr-defined]  # the tensor keeps `memory` alive, and that the mapping
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)


class CudaRuntime:
    """`Runtime` on this process's CUDA device, among ranks that reach each other's memory (an NCCL LSA team, here: a
    node) or, between nodes, NCCL's GIN.

    Takes torch's NCCL communicator of `group` where every rank has one, and makes one of its own otherwise: `group` may
    be gloo only. Collective.

    Args:
        group: its ranks; the device is `torch.cuda.current_device()`.
        timeout_seconds: after which a wait of the host for other ranks gives up.

    Raises:
        RuntimeError: no device, no compiled part, NCCL too old, a CUDA graph being captured; on every rank if on one,
            with what mends it. UnavailableError: NCCL can't share memory in the nodes, has no GIN between them, or the
            nodes are not of consecutive ranks, equally many.
        CommunicationTimeout: not every rank came in time.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._timeout = group, timeout_seconds
        self.meeting = Meeting(group, timeout_seconds)
        self._closed = False
        self._windows = self._networks = self._host_windows = 0
        self._mapped: list[_C.Mapped | _C.SharedMapped] = []
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._own_streams: list[_C.Stream] = []
        self._writes_to_peers: bool | None = None
        self._communicator: _C.Communicator | None = None
        states = self.meeting.agree("state", self._start)
        if len(versions := {state.split()[0] for state in states}) > 1:
            raise RuntimeError(
                f"the ranks of this group have loaded different versions of NCCL ({', '.join(sorted(versions))}): "
                "install the same nvidia-nccl package on all machines"
            )
        try:
            if all(state.endswith(" torch") for state in states):
                pointer = _torch_communicator(group, self.device)
                self._communicator = self._library.Communicator.borrow(pointer, timeout_seconds)
            places = [place.split(" ", 2) for place in self.meeting.agree("communicator", self._join)]
            self._check_nodes([node for node, _, _ in places])
        except BaseException:
            if self._communicator is not None:
                self._communicator.abort()
            raise
        devices = [device for _, device, _ in places]
        self.description["ranks_on_device"] = devices.count(devices[self.rank])
        self.machines = [machine for _, _, machine in places]
        self._stream = torch.cuda.Stream(self.device, priority=-1)

    def _start(self) -> str:
        """Make the device and NCCL ready; what the other ranks must know: NCCL's version, who has a communicator."""
        self._library = _check_device()
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.synchronize(self.device)  # makes the context where this is the first use of the device
        self._context = self._library.current_context()
        self.num_sms: int = torch.cuda.get_device_properties(self.device).multi_processor_count
        version, _ = self._library.nccl_version()
        return f"{version} {'torch' if _torch_communicator(self._group, self.device) else 'none'}"

    def _join(self) -> str:
        """Make a communicator where torch has none, see what it reaches; "INDEX/SIZE" of the node, device, machine."""
        if self._communicator is None:
            found = self.meeting.agree("id", lambda: self._library.unique_id().hex() if self.rank == 0 else "")
            self._communicator = self._library.Communicator.create(
                bytes.fromhex(found[0]), self.rank, self.size, True, self._timeout
            )
        properties = self._communicator.properties()
        self._check_reach(properties)
        self.lsa_size: int = properties["lsa_size"]
        self._gin = {"FULL": properties["gin_type"], "RAIL": properties["railed_gin_type"]}
        version, path = self._library.nccl_version()
        self.description: dict[str, Any] = {
            "transport": "NCCL LSA windows" + (", GIN between nodes" if self.lsa_size < self.size else ""),
            "device": torch.cuda.get_device_name(self.device),
            "sms": self.num_sms,
            "cuda_driver": self._library.driver_version(),
            "nccl": version,
            "nccl_path": path,
            "nccl_headers": self._library.built_against()["nccl"],
            "communicator": "own" if self._communicator.owned else "torch's",
            "lsa_ranks": self.lsa_size,
            "gin": properties["gin_type"],
            "railed_gin": properties["railed_gin_type"],
        }
        device = torch.cuda.get_device_properties(self.device).uuid
        return f"{properties['lsa_rank']}/{self.lsa_size} {device} {machine_name()}"

    def _check_reach(self, properties: dict[str, Any]) -> None:
        if not properties["device_api_support"]:
            raise UnavailableError(
                "NCCL can't make symmetric windows here (ncclCommQueryProperties: deviceApiSupport = 0). It needs a "
                "driver for CUDA 12.5 or newer, memory by cuMem (unset NCCL_CUMEM_ENABLE=0) and GPUs of a node that "
                "reach each other; NCCL_DEBUG=INFO says which is missing"
            )
        reach, gin = properties["lsa_size"], {properties["gin_type"], properties["railed_gin_type"]}
        if reach != self.size and gin == {"none"}:
            raise UnavailableError(
                f"of the {self.size} ranks of this group only {reach} reach each other's memory (LSA size {reach}, "
                f"{properties['n_lsa_teams']} teams), and NCCL has no network between them that kernels can use "
                "(ginType none). That takes InfiniBand or RoCE with GPUDirect RDMA (NCCL_DEBUG=INFO says what is "
                "missing) or a plugin (NCCL_RMA_PLUGIN; `epv2 emulate` brings one that plays nodes on one machine). Or "
                'put the group inside a node, or use backend "host"'
            )

    def _check_nodes(self, found: Sequence[str]) -> None:
        """Of every rank "INDEX/SIZE" in its LSA team. Raises on all ranks, or on none."""
        sizes = {int(text.split("/")[1]) for text in found}
        size = min(sizes)
        if len(sizes) > 1 or self.size % size or found != [f"{r % size}/{size}" for r in range(self.size)]:
            raise UnavailableError(
                "the nodes of a group must have consecutive ranks, equally many on each, but NCCL finds the ranks of "
                f"this group to be number/of in their LSA teams: {', '.join(found)}. Start as many ranks on each node, "
                'node by node, or use backend "host"'
            )

    def window(self, num_bytes: int, ordered: bool = False) -> _CudaWindow:
        _refuse_capture("a window of symmetric memory")
        made: list[_C.Window] = []

        def allocate() -> str:
            assert self._communicator is not None
            made.append(self._communicator.allocate(num_bytes))
            return str(num_bytes)

        # NCCL's registration waits for all ranks, without an end where the communicator is torch's. So make sure first
        # that all of them come, have the memory, and ask for the same.
        self._windows += 1
        try:
            sizes = self.meeting.agree(f"window {self._windows}", allocate)
            if len(set(sizes)) > 1:
                raise ValueError(f"a window must have the same size on all ranks, got {', '.join(sizes)} bytes by rank")
            made[0].register(ordered)
        except BaseException:
            for raw in made:
                raw.close()
            raise
        return _CudaWindow(made[0], node_of(self), self.rank, self.device)

    def writes_to_peers(self) -> bool:
        if self._writes_to_peers is None:
            window = self.window(8 * self.size)
            self._writes_to_peers = self._try_words(window)
            self.description["words_at_peers"] = "written" if self._writes_to_peers else "copied"
        return self._writes_to_peers

    def _try_words(self, window: _CudaWindow) -> bool:
        """Write words at every peer of the node, in a window that nobody else uses, and see if they come."""
        peers = [peer for peer in node_of(self) if peer != self.rank]
        seen, stream = self.mapped(8 * self.size), self.new_stream()
        places = {peer: window.peer_pointer(peer, 8 * self.rank) for peer in peers}
        written: list[StreamOp] = [("write64", place, _TRIED << 32) for place in places.values()]
        written += [("write32", place, _TRIED) for place in places.values()]
        try:
            self.stream_ops(written, stream)
        except self._library.Error as error:
            logger.info("epv2: rank %d can't write words at peers, so copies bring them: %s", self.rank, error)
            return False
        self.stream_ops([("copy", seen.pointer + 8 * peer, place, 8) for peer, place in places.items()], stream)
        found, deadline = seen.tensor.view(torch.int64), time.monotonic() + _REST_SECONDS
        while any(int(found[peer]) != (_TRIED << 32 | _TRIED) for peer in peers):
            if time.monotonic() > deadline:
                logger.warning("epv2: words that rank %d writes at peers don't come, so copies bring them", self.rank)
                return False
            time.sleep(1e-4)
        return True

    def host_window(self, num_bytes: int) -> _CudaWindow:
        _refuse_capture("host memory that ranks share")
        self._host_windows += 1
        phase = f"host window {self._host_windows}"
        parts: dict[int, _C.SharedMapped] = {}
        # Nobody else's has this name, so a peer sees that it has opened another file: processes of another machine or
        # container have the same numbers. Without a folder nothing is left behind.
        name = f"epv2-{secrets.token_hex(8)}"
        files = contextlib.ExitStack()

        def share() -> str:
            try:
                file = os.memfd_create(name)
                files.callback(os.close, file)
                os.ftruncate(file, num_bytes)
            except OSError as error:
                raise RuntimeError(f"no {num_bytes} bytes that ranks could share: {error}") from error
            # Page-locked here first: the pages come from the memory that is near to their owner.
            parts[self.rank] = self._library.SharedMapped(file, num_bytes)
            return f"{num_bytes} {os.getpid()} {file} {name}"

        def reach(peer: int, process: str, number: str, wanted: str) -> None:
            try:
                # Opened before it is looked at, or another file may have come in between.
                opened = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
                try:
                    if (found := os.readlink(f"/proc/self/fd/{opened}")) != f"/memfd:{wanted} (deleted)":
                        raise FileNotFoundError(f"process {process} of this machine has {found} there")
                    parts[peer] = self._library.SharedMapped(opened, num_bytes)
                finally:
                    os.close(opened)
            except OSError as error:
                raise UnavailableError(
                    f"rank {self.rank} on {self.machines[self.rank]} can't open the host memory of rank {peer} on "
                    f"{self.machines[peer]} ({error}): ranks of a node must be processes of one user on one machine "
                    "and, where they run in containers, share process ids (docker run --pid=host)"
                ) from error

        def reach_all() -> str:
            """What kept this rank from it. Told, not raised: peers may still have to open this rank's file."""
            try:
                for peer in node_of(self):
                    if peer != self.rank:
                        reach(peer, *told[peer].split(" ")[1:])
            except (UnavailableError, self._library.Error) as error:
                return str(error)
            return ""

        try:
            told = self.meeting.agree(phase, share)
            sizes = [text.split(" ")[0] for text in told]
            if len(set(sizes)) > 1:
                raise ValueError(f"host memory must have the same size on all ranks, got {', '.join(sizes)} by rank")
            for failure in self.meeting.agree(f"{phase}, of peers", reach_all):
                if failure:
                    raise UnavailableError(failure)
        except BaseException:
            for part in parts.values():
                part.close()
            raise
        finally:
            files.close()
        self._mapped += parts.values()
        node = node_of(self)
        raw = _HostMemory(self._library, [parts[peer] for peer in node], self.rank - node[0])
        return _CudaWindow(raw, node, self.rank, self.device)

    def network(self, num_signals: int, num_contexts: int, rail: bool) -> int:
        _refuse_capture("a network")
        connections = "RAIL" if rail else "FULL"

        def check() -> str:
            for name, count in (("num_signals", num_signals), ("num_contexts", num_contexts)):
                if count < 1:
                    raise ValueError(f"{name} = {count}: must be positive")
            if self._gin[connections] == "none":
                raise UnavailableError(
                    f"NCCL has no {connections} connections for kernels between these ranks (ginType "
                    f"{self._gin['FULL']}, railedGinType {self._gin['RAIL']}); NCCL_DEBUG=INFO says why"
                )
            return f"{num_signals} signals in {num_contexts} contexts with {connections} connections"

        # As for windows: NCCL waits for all ranks, without an end where the communicator is torch's.
        self._networks += 1
        wishes = self.meeting.agree(f"network {self._networks}", check)
        if len(set(wishes)) > 1:
            raise ValueError(f"a network must be the same on all ranks, got by rank: {'; '.join(wishes)}")
        assert self._communicator is not None
        made = self._communicator.device_communicator(
            gin_contexts=num_contexts, gin_signals=num_signals, gin_connection=connections.lower()
        )
        if made.gin_contexts < num_contexts:
            raise UnavailableError(f"NCCL gave {made.gin_contexts} contexts of the {num_contexts} asked for")
        return made.pointer

    def mapped(self, num_bytes: int) -> _CudaMapped:
        _refuse_capture("mapped host memory")
        raw = self._library.Mapped(num_bytes)
        self._mapped.append(raw)
        return _CudaMapped(raw)

    def prepare(self, kernel: Kernel) -> None:
        self._function(kernel)

    def launch(
        self,
        kernel: Kernel,
        args: bytes,
        *,
        ctas: int,
        threads: int,
        shared_bytes: int,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        handle = self.current_handle() if stream is None else stream.cuda_stream
        self._function(kernel).launch(ctas, threads, shared_bytes, handle, args)

    def _function(self, kernel: Kernel) -> _C.Function:
        """`kernel` built and loaded, once per process and device."""
        key = (kernel, self.device.index)
        if key not in _functions:
            _refuse_capture(f"kernel {kernel.name}")
            arch = compiler.device_arch(*torch.cuda.get_device_capability(self.device))
            code = compiler.build(kernel, arch).path.read_bytes()
            _functions[key] = self._library.Module.load(code).function(kernel.name)
        return _functions[key]

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        self._library.copy(target, source, num_bytes, self.current_stream().cuda_stream)

    def fill(self, target: int, byte: int, num_bytes: int) -> None:
        self._library.fill(target, byte, num_bytes, self.current_stream().cuda_stream)

    def stream_ops(
        self, operations: Sequence[StreamOp | CopyOp | OrderOp], stream: torch.cuda.Stream | None = None
    ) -> None:
        self._library.stream_operations(self.current_handle() if stream is None else stream.cuda_stream, operations)

    def comm_stream(self) -> torch.cuda.Stream:
        return self._stream

    def new_stream(self) -> torch.cuda.Stream:
        _refuse_capture("a stream")
        self._own_streams.append(self._library.Stream())
        return torch.cuda.ExternalStream(self._own_streams[-1].pointer, self.device)

    @contextlib.contextmanager
    def on_stream(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        with torch.cuda.stream(stream):
            yield

    def adopt_thread(self) -> None:
        self._library.set_context(self._context)

    def current_handle(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def current_stream(self) -> torch.cuda.Stream:
        # Asked for at every launch; torch.cuda.current_stream makes an object each time, which takes longer than that.
        raw = self.current_handle()
        if raw not in self._streams:
            self._streams[raw] = torch.cuda.current_stream(self.device)
        return self._streams[raw]

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def event(self) -> _C.Event:
        return self._library.Event()

    def record(self, stream: torch.cuda.Stream | None = None) -> _C.Event:
        event = self.event()
        self.stream_ops([("record", event.handle)], stream)
        return event

    def wait(self, event: Event, stream: torch.cuda.Stream | None = None) -> None:
        self.stream_ops([("await", event.handle)], stream)

    def close(self, abandon: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        assert self._communicator is not None
        if abandon:
            if not self._rests():
                logger.warning(
                    "epv2: rank %d leaves its buffers to the end of the process: what it sends to another node does "
                    "not end, and whoever waits for the device, or for NCCL, would wait for it",
                    self.rank,
                )
                _left.append(self)
                return
            self._communicator.abort()
        with contextlib.ExitStack() as steps:  # a step that fails must not keep the others from happening
            for mapped in self._mapped:
                steps.callback(mapped.close)
            steps.callback(self._release_communicator)
            for stream in self._own_streams:
                steps.callback(stream.close)
            steps.callback(torch.cuda.synchronize, self.device)

    def _rests(self) -> bool:
        """Whether this object's own streams come to an end soon. A kernel that sends waits where the network takes no
        more, which it may never do again once a peer is gone."""
        streams = [torch.cuda.ExternalStream(stream.pointer, self.device) for stream in self._own_streams]
        deadline = time.monotonic() + _REST_SECONDS
        while not all(stream.query() for stream in streams):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _release_communicator(self) -> None:
        assert self._communicator is not None
        ours = self._communicator.owned or self._communicator.pointer == _torch_communicator(self._group, self.device)
        if ours:
            self._communicator.close()
        else:  # destroy_process_group came first and took torch's communicator with it
            self._communicator.forget()


class Meeting:
    """Short texts between the ranks of a group through torch's store: works before any of them can communicate.

    Every rank makes one for each runtime, in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float):
        self._ranks, self._rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        self._timeout = timeout_seconds
        key = ",".join(map(str, self._ranks))
        # Every rank of a group makes the same runtimes in the same order: their number tells them apart.
        number = _runtimes_made[key] = _runtimes_made.get(key, 0) + 1
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"epv2/device/{key}/{number}", store)

    def post(self, key: str, text: str) -> None:
        """Leave a text for the others."""
        self._store.set(key, text)

    def peek(self, key: str) -> str | None:
        """What was posted as `key`; None if nothing was."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def count(self, key: str) -> int:
        """How often any rank has called this with `key` before."""
        return self._store.add(key, 1) - 1

    def agree(
        self, name: str, step: Callable[[], str], phase: str = _PHASE, meanwhile: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Do `step` on every rank and return what it gave, by rank. Where it raises on one rank, every rank raises.

        `meanwhile` is called now and then, and may raise.

        Raises:
            RuntimeError: it raised on another rank; the message names that and has its message. UnavailableError: that
                did.
            CommunicationTimeout: a rank did not get here.
        """
        try:
            mine = step()
        except BaseException as error:
            kind = "unavailable" if isinstance(error, UnavailableError) else "error"
            self._store.set(f"{name}/{self._rank}", f"{kind}: {error}")
            raise
        self._store.set(f"{name}/{self._rank}", f"done: {mine}")
        deadline, results = time.monotonic() + self._timeout, []
        for peer in range(len(self._ranks)):
            state, text = self._read(f"{name}/{peer}", peer, deadline, phase, meanwhile).split(": ", 1)
            if state != "done":
                raised = UnavailableError if state == "unavailable" else RuntimeError
                raise raised(f"rank {peer} of the group can't take part: {text}")
            results.append(text)
        return results

    def _read(self, key: str, peer: int, deadline: float, phase: str, meanwhile: Callable[[], None]) -> str:
        # Not the store's own wait: that holds its connection, which the watch of transfers needs meanwhile.
        pause = 1e-3
        while (text := self.peek(key)) is None:
            if time.monotonic() > deadline:
                expected = f"all of ranks {self._ranks} within {self._timeout:g} s"
                raise CommunicationTimeout(self._rank, peer, phase, expected, "nothing of that rank")
            meanwhile()
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return text


def _check_device() -> Any:
    """The compiled part with NCCL loaded, where this process can use a device."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"no CUDA device: torch {torch.__version__} finds none on this machine")
    _refuse_capture("an ElasticBuffer")
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise RuntimeError(
            f"{torch.cuda.get_device_name()} is sm_{major}{minor}: the cuda backend needs sm_90 (Hopper) or newer"
        )
    library = load_compiled()
    library.load_nccl(_nccl_candidates())
    return library


def tell(
    runtime: Runtime, word: int, own: int, places: Sequence[int], passed: Sequence[StreamOp] = ()
) -> list[StreamOp | CopyOp | OrderOp]:
    """What writes a word of this rank at `own`, then says that something has `passed`, then brings the word to `places`
    at peers of this node."""
    written: list[StreamOp | CopyOp | OrderOp] = [("write32", own, word), *passed]
    if runtime.writes_to_peers():
        return [*written, *[("write32", place, word) for place in places]]
    return [*written, *[("copy", place, own, 4) for place in places]]


def node_of(runtime: Runtime) -> range:
    """The ranks of this rank's node, itself included."""
    first = runtime.rank // runtime.lsa_size * runtime.lsa_size
    return range(first, first + runtime.lsa_size)


def require_one_node(runtime: Runtime, what: str) -> None:
    """Raise UnavailableError where the group's ranks don't all reach each other's memory; the same on every rank."""
    if runtime.lsa_size < runtime.size:
        raise UnavailableError(
            f"{what} of the cuda backend need ranks that reach each other's memory, but the {runtime.size} ranks of "
            f"this group are on {runtime.size // runtime.lsa_size} nodes of {runtime.lsa_size}: put the group inside a "
            'node, or use backend "host"'
        )


# Without its dependencies: torch's would bring the NCCL that torch pins back.
BUILD_EXTENSION = "pip install setuptools pybind11 && pip install --no-build-isolation --no-deps -e ."


def load_compiled() -> ModuleType:
    """`epv2_plugin._C`.

    Raises:
        RuntimeError: it was not built when the package was installed, or does not load.
    """
    try:
        return importlib.import_module("epv2_plugin._C")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "epv2_plugin was installed without its compiled part, because the headers of NCCL or CUDA were not found. "
            "Install them (pip install 'nvidia-nccl-cu13>=2.30.5' nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl,"
            f" or set NCCL_HOME and CUDA_HOME), then rebuild in the checkout: {BUILD_EXTENSION}"
        ) from error
    except ImportError as error:
        raise RuntimeError(f"epv2_plugin's compiled part does not load: {error}") from error


def _nccl_candidates() -> list[str]:
    """Where an NCCL may lie that the process has not loaded, best first."""
    home = os.environ.get("NCCL_HOME")
    paths = [os.path.join(home, "lib", "libnccl.so.2")] if home else []
    for folder in sys.path:
        paths += sorted(glob.glob(os.path.join(folder, "nvidia", "nccl", "lib", "libnccl.so.2")))
    return paths


def _torch_communicator(group: dist.ProcessGroup, device: torch.device) -> int:
    """torch's `ncclComm_t` of `group`; 0 where there is none (gloo, or no collective yet, or already destroyed)."""
    try:
        pointer = getattr(group._get_backend(device), "_comm_ptr", None)
        return int(pointer()) if pointer is not None else 0
    except RuntimeError:
        return 0


def _refuse_capture(what: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} can't be made while a CUDA graph is being captured: make the buffer, and run the operation once, "
            "before torch.cuda.graph(...) begins"
        )
