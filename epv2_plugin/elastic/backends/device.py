"""What the cuda backend asks of a device: symmetric windows, mapped host memory, launches, streams and events.

`Runtime` is the interface; `CudaRuntime` is the real one, over `epv2_plugin._C` and torch.cuda. The tests have another
that runs the same kernels on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from epv2_plugin.elastic.errors import CommunicationTimeout
from epv2_plugin.jit import Kernel

if TYPE_CHECKING:
    from epv2_plugin import _C


class Window(Protocol):
    """Memory of this rank that every rank of the group can read and write. Gone after `close` of its runtime.

    Attributes:
        tensor: `[num_bytes]` uint8, this rank's memory. handle: what kernels get as `args.window`.
    """

    @property
    def tensor(self) -> torch.Tensor: ...
    @property
    def handle(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class Mapped(Protocol):
    """Host memory that kernels can write. Gone after `close` of its runtime.

    Attributes:
        tensor: `[num_bytes]` uint8 on the CPU. pointer: its address for kernels.
    """

    @property
    def tensor(self) -> torch.Tensor: ...
    @property
    def pointer(self) -> int: ...


class Runtime(Protocol):
    """The device of one rank of a group. "Collective" = every rank calls it, in the same order.

    Attributes:
        rank, size: in the group. device: of tensors. num_sms: SMs of the device.
        description: what `status()` shows: transport, NCCL version and so on.
    """

    rank: int
    size: int
    device: torch.device
    num_sms: int
    description: dict[str, Any]

    def window(self, num_bytes: int) -> Window:
        """Zeroed memory that peers reach (collective)."""

    def mapped(self, num_bytes: int) -> Mapped:
        """Zeroed host memory that kernels reach."""

    def launch(self, kernel: Kernel, args: ctypes.Structure, *, ctas: int, threads: int, shared_bytes: int) -> None:
        """Launch on the current stream: `ctas` blocks of `threads`, with `shared_bytes` of dynamic shared memory."""

    def comm_stream(self) -> Any:
        """The stream of `on_comm_stream`, for `Tensor.record_stream`; None where the device has no streams."""

    def on_comm_stream(self) -> AbstractContextManager[None]:
        """Make the stream set aside for communication the current one. It waits for nothing by itself."""

    def record(self) -> Any:
        """An event after everything so far on the current stream."""

    def wait(self, event: Any) -> None:
        """Make the current stream wait for `event`."""

    def close(self) -> None:
        """Wait for the device, then release windows, mapped memory and communicator (collective). Once is enough."""


_PHASE = "creation of the buffer"
_runtimes_made: dict[str, int] = {}
_functions: dict[tuple[Kernel, int], _C.Function] = {}


class _DeviceBytes:
    """Memory at `pointer` as torch takes it over; a tensor made of this keeps `owner` alive."""

    def __init__(self, pointer: int, num_bytes: int, owner: object):
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


class _CudaWindow:
    def __init__(self, raw: _C.Window, device: torch.device):
        self.handle, self.num_bytes = raw.handle, raw.num_bytes
        self.tensor = torch.as_tensor(_DeviceBytes(raw.pointer, raw.num_bytes, raw), device=device)


class _CudaMapped:
    def __init__(self, raw: _C.Mapped):
        self.pointer = raw.pointer
        memory = (ctypes.c_uint8 * raw.num_bytes).from_address(raw.host_pointer)
        memory.owner = raw  # type: ignore[attr-defined]  # the tensor keeps `memory` alive, and that the mapping
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)


class CudaRuntime:
    """`Runtime` on this process's CUDA device, among ranks that reach each other's memory (one NCCL LSA team).

    Takes torch's NCCL communicator of `group` where every rank has one, and makes one of its own otherwise: `group` may
    be gloo only. Collective.

    Args:
        group: its ranks; the device is `torch.cuda.current_device()`.
        timeout_seconds: after which a wait of the host for other ranks gives up.

    Raises:
        RuntimeError: no device, no compiled part, NCCL too old or unable to share memory, a CUDA graph being captured;
            on every rank if on one, with what mends it.
        CommunicationTimeout: not every rank came in time.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._timeout = group, timeout_seconds
        self._closed = False
        self._mapped: list[_C.Mapped] = []
        meeting = _Meeting(group, timeout_seconds)
        ready, failure = "", None
        try:
            library = _check_device()
            self.device = torch.device("cuda", torch.cuda.current_device())
            torch.zeros(1, device=self.device)  # makes the context where this is the first use of the device
            version, path = library.nccl_version()
            pointer = _torch_communicator(group, self.device)
            ready = f"NCCL {version} {'with' if pointer else 'without'} torch's communicator"
        except RuntimeError as error:
            failure = error
        reports = meeting.exchange("state", f"error: {failure}" if failure else ready)
        if failure is not None:
            raise failure
        _raise_reported(reports)
        if len(versions := {report.split()[1] for report in reports}) > 1:
            raise RuntimeError(
                f"the ranks of this group have loaded different versions of NCCL ({', '.join(sorted(versions))}): "
                "install the same nvidia-nccl package on all machines"
            )
        if all(" with " in report for report in reports):
            self._communicator = library.Communicator.borrow(pointer, timeout_seconds)
        else:
            self._communicator = self._own_communicator(library, meeting)
        try:
            properties = self._communicator.properties()
            self._check_reach(properties)
        except BaseException:
            self._communicator.abort()
            raise
        device = torch.cuda.get_device_properties(self.device)
        self.num_sms: int = device.multi_processor_count
        self.description: dict[str, Any] = {
            "transport": "NCCL LSA windows",
            "device": device.name,
            "sms": self.num_sms,
            "cuda_driver": library.driver_version(),
            "nccl": version,
            "nccl_path": path,
            "nccl_headers": library.built_against()["nccl"],
            "communicator": "own" if self._communicator.owned else "torch's",
            "lsa_ranks": properties["lsa_size"],
            "gin": properties["gin_type"],
        }
        self._library = library
        self._stream = torch.cuda.Stream(self.device, priority=-1)

    def _own_communicator(self, library: Any, meeting: _Meeting) -> _C.Communicator:
        unique_id = ""
        if self.rank == 0:
            try:
                unique_id = library.unique_id().hex()
            except library.Error as error:
                meeting.publish("id", f"error: {error}")
                raise
            meeting.publish("id", unique_id)
        else:
            unique_id = meeting.read("id", 0)
            _raise_reported([unique_id])
        return library.Communicator.create(bytes.fromhex(unique_id), self.rank, self.size, True, self._timeout)

    def _check_reach(self, properties: dict[str, Any]) -> None:
        if not properties["device_api_support"]:
            raise RuntimeError(
                "NCCL can't make symmetric windows here (ncclCommQueryProperties: deviceApiSupport = 0). It needs a "
                "driver for CUDA 12.5 or newer, memory by cuMem (unset NCCL_CUMEM_ENABLE=0) and GPUs of a node that "
                "reach each other; NCCL_DEBUG=INFO says which is missing"
            )
        if (reach := properties["lsa_size"]) != self.size:
            raise RuntimeError(
                f"the cuda backend needs all {self.size} ranks of a group to reach each other's memory, but NCCL finds "
                f"only {reach} that do (LSA size {reach}, {properties['n_lsa_teams']} teams). Ranks across nodes come "
                "with the hybrid mode, which this version does not have: put expert-parallel groups inside a node, or "
                'use backend "host"'
            )

    def window(self, num_bytes: int) -> _CudaWindow:
        _refuse_capture("a window of symmetric memory")
        return _CudaWindow(self._communicator.window(num_bytes), self.device)

    def mapped(self, num_bytes: int) -> _CudaMapped:
        _refuse_capture("mapped host memory")
        self._mapped.append(self._library.Mapped(num_bytes))
        return _CudaMapped(self._mapped[-1])

    def launch(self, kernel: Kernel, args: ctypes.Structure, *, ctas: int, threads: int, shared_bytes: int) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._function(kernel).launch(ctas, threads, shared_bytes, stream, bytes(args))

    def _function(self, kernel: Kernel) -> _C.Function:
        """`kernel` built and loaded, once per process and device."""
        key = (kernel, self.device.index)
        if key not in _functions:
            _refuse_capture(f"kernel {kernel.name}")
            compiler = importlib.import_module("epv2_plugin.jit.compiler")
            major, minor = torch.cuda.get_device_capability(self.device)
            with open(compiler.build(kernel, f"sm_{major}{minor}a").path, "rb") as file:
                _functions[key] = self._library.Module.load(file.read()).function(kernel.name)
        return _functions[key]

    def comm_stream(self) -> torch.cuda.Stream:
        return self._stream

    @contextlib.contextmanager
    def on_comm_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as steps:  # a step that fails must not keep the others from happening
            for mapped in self._mapped:
                steps.callback(mapped.close)
            steps.callback(self._release_communicator)
            steps.callback(torch.cuda.synchronize, self.device)

    def _release_communicator(self) -> None:
        ours = self._communicator.owned or self._communicator.pointer == _torch_communicator(self._group, self.device)
        if ours:
            self._communicator.close()
        else:  # destroy_process_group came first and took torch's communicator with it
            self._communicator.forget()


class _Meeting:
    """Short texts between the ranks of a group through torch's store: works before any of them can communicate."""

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float):
        self.ranks = dist.get_process_group_ranks(group)
        self.rank, self._timeout = dist.get_rank(group), timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds
        key = ",".join(map(str, self.ranks))
        # Every rank of a group makes the same runtimes in the same order: their number tells them apart.
        number = _runtimes_made[key] = _runtimes_made.get(key, 0) + 1
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"epv2/device/{key}/{number}", store)

    def publish(self, name: str, text: str) -> None:
        self._store.set(f"{name}/{self.rank}", text)

    def read(self, name: str, peer: int) -> str:
        key = f"{name}/{peer}"
        try:
            self._store.wait([key], timedelta(seconds=max(self._deadline - time.monotonic(), 0.001)))
        except RuntimeError as error:
            raise CommunicationTimeout(
                self.rank, peer, _PHASE, f"all of ranks {self.ranks} within {self._timeout:g} s", "nothing of that rank"
            ) from error
        return self._store.get(key).decode()

    def exchange(self, name: str, text: str) -> list[str]:
        """Every rank's text, by rank."""
        self.publish(name, text)
        return [self.read(name, peer) for peer in range(len(self.ranks))]


def _raise_reported(reports: list[str]) -> None:
    for rank, report in enumerate(reports):
        if report.startswith("error: "):
            raise RuntimeError(f"rank {rank} of the group can't take part: {report.removeprefix('error: ')}")


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
            "Install them (pip install 'nvidia-nccl-cu13>=2.30.4' nvidia-cuda-runtime nvidia-cuda-crt pybind11, or set "
            "NCCL_HOME and CUDA_HOME), then rebuild in the checkout: pip install --no-build-isolation --no-deps -e ."
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
