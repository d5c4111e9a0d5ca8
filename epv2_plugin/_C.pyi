"""The compiled part (`csrc/runtime`): NCCL and the CUDA driver, loaded at run time. Pointers and handles are integers.

Calls that wait release the interpreter lock. Everything here may be imported, and fail with a message, without a GPU.
"""

from collections.abc import Sequence
from typing import Any, final

class Error(RuntimeError):
    """A call of NCCL or of the CUDA driver failed, or there is none to call; the text says which and what mends it."""

def built_against() -> dict[str, str]:
    """Versions of the headers that this module was compiled with: {"nccl": "2.30.7", "cuda": "13.0"}."""

def load_nccl(paths: Sequence[str] = ()) -> None:
    """Take the `libnccl.so.2` that the process has loaded, else the first of `paths` that exists, else the system's.

    Nothing if one was taken before.

    Raises:
        Error: there is none, or it is too old or not of the version that this module was compiled with.
    """

def nccl_version() -> tuple[str, str]:
    """(version, path) of the NCCL in use.

    Raises:
        Error: as `load_nccl`.
    """

def driver_version() -> str:
    """Newest CUDA version that the driver supports, such as "13.0".

    Raises:
        Error: there is no CUDA driver.
    """

def unique_id() -> bytes:
    """What rank 0 makes and hands to every rank of a communicator to be created."""

@final
class Communicator:
    """An NCCL communicator: torch's, borrowed, or one of our own. Every wait gives up after `timeout_seconds`.

    Nothing is released by garbage collection, because NCCL wants its calls in step on all ranks: call `close`.
    """

    @staticmethod
    def borrow(pointer: int, timeout_seconds: float) -> Communicator:
        """Use somebody else's communicator, which stays theirs.

        Raises:
            Error: `pointer` is 0, because torch makes the communicator at the group's first collective.
        """

    @staticmethod
    def create(unique_id: bytes, rank: int, size: int, cta_policy_zero: bool, timeout_seconds: float) -> Communicator:
        """Make one, together with the other ranks; `cta_policy_zero` lets its collectives run on copy engines.

        Raises:
            Error: NCCL failed, or not every rank came in time. ValueError: rank, size or id is out of range.
        """

    @property
    def pointer(self) -> int:
        """`ncclComm_t`; 0 once closed."""

    @property
    def owned(self) -> bool:
        """Made here, so that `close` destroys it."""

    def properties(self) -> dict[str, Any]:
        """What NCCL says it can do.

        rank, n_ranks, cuda_device, nvml_device, n_lsa_teams, lsa_rank, lsa_size: int. device_api_support,
        multimem_support, host_rma_support: bool. gin_type, railed_gin_type: "none", "proxy", "gdaki" or "gpi".
        """

    def async_error(self) -> str:
        """An error that NCCL noticed in the background; "" when there is none."""

    def allocate(self, num_bytes: int) -> Window:
        """Memory for a window, zeroed; no rank reaches it before `Window.register`.

        Raises:
            Error: there is no such memory left. ValueError: `num_bytes` is not positive.
        """

    def device_communicator(
        self,
        lsa_barriers: int = 0,
        gin_contexts: int = 0,
        gin_signals: int = 0,
        gin_counters: int = 0,
        gin_connection: str = "none",
    ) -> DeviceCommunicator:
        """What kernels need for barriers and the network (collective); `gin_connection` is "none", "full" or "rail"."""

    def close(self) -> None:
        """Close what was made of it, newest first, then destroy it where it is ours. Nothing if closed."""

    def abort(self) -> None:
        """End it without waiting for peers, windows included; a borrowed one is only let go of."""

    def forget(self) -> None:
        """Its owner has destroyed it: free what is ours without another call on it."""

@final
class Window:
    """Symmetric memory: `num_bytes` at `pointer` on this rank, reachable from the others through `handle`."""

    def register(self, ordered: bool = False) -> None:
        """Make it reachable (collective, the same size on all ranks). A failure closes the window.

        Args:
            ordered: signals of GIN's may go to words of it, and then come behind the data of earlier puts.

        Raises:
            Error: NCCL failed, can't do windows here, or not every rank came in time.
        """

    @property
    def pointer(self) -> int:
        """Address on this device; 0 once closed."""

    @property
    def handle(self) -> int:
        """`ncclWindow_t`, for kernels.

        Raises:
            Error: not registered yet, or closed.
        """

    @property
    def num_bytes(self) -> int: ...
    def lsa_pointer(self, peer: int, offset: int = 0) -> int:
        """Address of byte `offset` of LSA rank `peer`'s memory, as this device sees it."""

    def close(self) -> None:
        """Deregister, then free. Nothing if closed. No kernel may use it any more, here or on a peer."""

@final
class DeviceCommunicator:
    """`ncclDevComm`: kernels take it by value, or read it from device memory."""

    @property
    def data(self) -> bytes:
        """The struct's bytes."""

    @property
    def pointer(self) -> int:
        """Address of a copy in device memory; 0 once closed."""

    @property
    def gin_contexts(self) -> int:
        """How many there are, which may differ from the wish."""

    def close(self) -> None:
        """Destroy it. Nothing if closed."""

@final
class Mapped:
    """Page-locked host memory that kernels reach: `host_pointer` for the CPU, `pointer` for the device; zeroed."""

    def __init__(self, num_bytes: int) -> None: ...
    @property
    def host_pointer(self) -> int: ...
    @property
    def pointer(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def close(self) -> None:
        """Free it. Nothing if closed."""

@final
class SharedMapped:
    """Memory of a file that this process maps, page-locks and lets kernels reach; other processes may do the same.

    Args:
        file: descriptor, which may be closed afterwards. num_bytes: of it, from its start.

    Raises:
        Error: the file can't be mapped, or the driver can't page-lock so much.
    """

    def __init__(self, file: int, num_bytes: int) -> None: ...
    @property
    def pointer(self) -> int:
        """Address for the device; 0 once closed."""

    @property
    def host_pointer(self) -> int:
        """Address for the host; 0 once closed."""

    @property
    def num_bytes(self) -> int: ...
    def close(self) -> None:
        """Unlock and unmap it. Nothing if closed."""

@final
class Stream:
    """A stream that no other waits for by itself; not one of torch's, of which two users may get the same."""

    def __init__(self, high_priority: bool = True) -> None: ...
    @property
    def pointer(self) -> int:
        """`CUstream`; 0 once closed."""

    def close(self) -> None:
        """Give it back when its work is done. Nothing if closed."""

class Event:
    """Something to record on a stream, for others to wait for. Made quickly: out of those that were dropped."""

    def __init__(self) -> None: ...
    @property
    def handle(self) -> int:
        """`CUevent`."""

    def passed(self) -> bool:
        """Whether the stream that it was recorded on has come to it. Raises Error: that stream's work has failed."""

def copy(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Copy memory in stream order, on a copy engine where the driver lets it."""

def fill(target: int, byte: int, num_bytes: int, stream: int) -> None:
    """Set every byte, in stream order."""

def stream_operations(
    stream: int, operations: Sequence[tuple[str, int, int] | tuple[str, int, int, int] | tuple[str, int]]
) -> None:
    """Write words, wait for words and other streams, and copy, in this order and in stream order, without a kernel.

    Args:
        operations: (name, address, value): "write32", "write64", "wait32_eq" or "wait32_geq", which is cyclic: the wait
            ends when word - value is not negative as a signed number. Addresses are of this device's own memory or of
            `Mapped`: not every driver takes a peer's. Or ("copy", target, source, bytes), as `copy`.
            Or ("after", stream): wait for all that another stream has been given so far; or ("before", stream): let it
            wait for what was put on this one before. Or ("record", handle of an event) or ("await", handle).

    Raises:
        ValueError: an unknown name, an address that is not aligned, a value too large. Error: the driver refused.
    """

def compare_exchange(address: int, expected: int, desired: int) -> int:
    """Let a word of 64 bits of host memory, which processes may share, become `desired` if it is `expected`; returns
    what it was."""

def current_context() -> int:
    """The context of this thread.

    Raises:
        Error: it has none.
    """

def set_context(context: int) -> None:
    """Make it the context of this thread."""

@final
class Module:
    """Device code loaded into the current context; unloaded when it and its functions are gone."""

    @staticmethod
    def load(cubin: bytes) -> Module:
        """Raises: Error: the driver refuses the code, for instance because it is for another architecture."""

    def function(self, name: str) -> Function:
        """Raises: Error: the code has no kernel `name`."""

@final
class Function:
    """One kernel, with its limits."""

    @property
    def name(self) -> str: ...
    @property
    def registers(self) -> int: ...
    @property
    def static_shared_bytes(self) -> int: ...
    @property
    def local_bytes(self) -> int: ...
    @property
    def max_threads(self) -> int: ...
    @property
    def max_dynamic_shared_bytes(self) -> int:
        """Most that a launch may ask for on this device."""

    @property
    def args_bytes(self) -> int:
        """Size of the one struct that the kernel takes."""

    def launch(
        self,
        grid: int,
        block: int,
        shared_bytes: int,
        stream: int,
        args: bytes,
        cluster: int = 1,
        programmatic: bool = False,
    ) -> None:
        """Launch on `stream`: `grid` CTAs of `block` threads, `args` as the kernel's one parameter.

        Args:
            cluster: CTAs that form a cluster; divides `grid`.
            programmatic: may start before the kernel ahead of it on the stream ends (it must wait by itself).

        Raises:
            ValueError: a size is out of range for the kernel or the device, or `args` is not of the kernel's size.
            Error: the driver refused the launch.
        """
