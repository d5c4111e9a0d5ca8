"""The compiled part and the runtime over it: on a machine without a GPU against stand-ins for NCCL and the driver.

The stand-ins (`tests/fakes`) write down every call, so that orders and cleanups can be read back. A process can load
only one NCCL, so each case is a process.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from epv2_plugin.elastic.backends import device
from epv2_plugin.elastic.backends.device import CudaRuntime, _CudaWindow
from epv2_plugin.jit import Kernel
from tests import harness

ROOT = Path(__file__).parent.parent
PRELUDE = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("epv2_plugin._C", {module!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)

def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}")
    else:
        print("no error")
"""


def _setup_script() -> Any:
    spec = importlib.util.spec_from_file_location("epv2_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_script = _setup_script()
HEADERS, MISSING = setup_script.find_headers()


class Fakes:
    """The stand-ins as libraries, and processes that find them instead of the real ones."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.nccl, self.cuda = folder / "lib" / "libnccl.so.2", folder / "cuda" / "libcuda.so.1"
        includes = [flag for header in HEADERS for flag in ("-isystem", str(header))]
        for library, source in ((self.nccl, "fake_nccl.cc"), (self.cuda, "fake_cuda.cc")):
            library.parent.mkdir()
            command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", *includes]
            subprocess.run([*command, str(ROOT / "tests" / "fakes" / source), "-o", str(library)], check=True)

    def run(self, script: str, nccl: bool = True, cuda: bool = True, **env: str) -> tuple[list[str], list[str]]:
        """Run `script` with `_C` at hand; returns (lines that it printed, calls that the stand-ins saw)."""
        module = importlib.util.find_spec("epv2_plugin._C")
        assert module is not None, "not built: python setup.py build_ext --inplace"
        paths = [str(library.parent) for library, there in ((self.nccl, nccl), (self.cuda, cuda)) if there]
        log = self._folder / "log"
        log.write_text("")
        result = subprocess.run(
            [sys.executable, "-c", PRELUDE.format(module=module.origin) + script],
            env={"LD_LIBRARY_PATH": ":".join(paths), "FAKE_LOG": str(log), **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines(), log.read_text().splitlines()


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Fakes:
    if not HEADERS:
        pytest.skip(f"epv2_plugin._C can't be built here: {MISSING}")
    return Fakes(tmp_path_factory.mktemp("fakes"))


def _no_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_imports_without_gpu_or_nccl(fakes: Fakes) -> None:
    lines, _ = fakes.run("print(_C.built_against(), issubclass(_C.Error, RuntimeError))", nccl=False, cuda=False)
    assert re.fullmatch(r"\{'cuda': '1\d\.\d', 'nccl': '2\.3\d\.\d+'\} True", lines[0])


@pytest.mark.skipif(not _no_driver(), reason="there is a CUDA driver here")
def test_no_driver(fakes: Fakes) -> None:
    script = "refused(_C.driver_version); refused(_C.Mapped, 64); refused(_C.Module.load, b'ELF')"
    lines, _ = fakes.run(script, cuda=False)
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("Error: no CUDA driver: libcuda.so.1: cannot open")


def test_no_nccl(fakes: Fakes) -> None:
    script = "refused(_C.load_nccl, ['/nowhere/libnccl.so.2']); refused(_C.unique_id); refused(_C.nccl_version)"
    lines, _ = fakes.run(script, nccl=False)
    assert "has not loaded libnccl.so.2, it is not at /nowhere/libnccl.so.2, and the loader finds none (lib" in lines[0]
    assert re.search(r"pip install 'nvidia-nccl-cu1\d>=2.30.5', then rebuild: pip install --no-build-isol", lines[0])
    assert "has not loaded libnccl.so.2, and the loader finds none" in lines[1]
    assert lines[1] == lines[2]


def test_nccl_of_the_process_comes_first(fakes: Fakes, tmp_path: Path) -> None:
    other = tmp_path / "libnccl.so.2"
    other.write_bytes(fakes.nccl.read_bytes())
    script = f"ctypes.CDLL({str(other)!r}); _C.load_nccl([{str(fakes.nccl)!r}]); print(*_C.nccl_version())"
    assert fakes.run(script, nccl=False)[0] == [f"{_built()} {other}"]
    script = f"_C.load_nccl(['/nowhere', {str(other)!r}]); _C.load_nccl([]); print(*_C.nccl_version())"
    assert fakes.run(script)[0] == [f"{_built()} {other}"]  # a path given comes before the loader's


def _built() -> str:
    from epv2_plugin import _C

    return _C.built_against()["nccl"]


def _code(version: str) -> int:
    major, minor, patch = map(int, version.split("."))
    return major * 10000 + minor * 100 + patch


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (2708, r"NCCL 2\.7\.8 \(.*lib/libnccl\.so\.2\) is too old: 2\.30 or newer is needed\. Install it: pip install"),
        (22907, r"NCCL 2\.29\.7 \(.*\) is too old.*Where torch brings another one, start with LD_PRELOAD=/path/to/lib"),
        (
            23001,
            r"NCCL 2\.30\.1 \(.*\) does not fit: .*headers of NCCL \S+, and before 2\.31 both must be the same ver",
        ),
        (
            23001,
            r"Rebuild against the loaded one: pip install --no-deps 'nvidia-nccl-cu1\d==2\.30\.1', then pip instal",
        ),
    ],
)
def test_nccl_that_does_not_fit(fakes: Fakes, code: int, message: str) -> None:
    lines, calls = fakes.run("refused(_C.nccl_version)", FAKE_NCCL_VERSION=str(code))
    assert re.search(message, lines[0]), lines
    assert not calls


def test_preload_names_a_library_that_is_there(fakes: Fakes, tmp_path: Path) -> None:
    newer = tmp_path / "libnccl.so.2"
    newer.write_bytes(b"")
    script = f"ctypes.CDLL({str(fakes.nccl)!r}); refused(_C.load_nccl, ['/nowhere', {str(newer)!r}])"
    lines, _ = fakes.run(script, FAKE_NCCL_VERSION="22907")
    assert lines[0].endswith(f"start with LD_PRELOAD={newer}")


def test_nccl_newer_than_its_headers(fakes: Fakes) -> None:
    """From 2.31 on NCCL translates for older headers."""
    lines, _ = fakes.run("print(_C.nccl_version()[0])", FAKE_NCCL_VERSION="23204")
    assert lines == ["2.32.4"]


@pytest.mark.parametrize("library", ["libm.so.6", "text"])
def test_not_an_nccl(fakes: Fakes, tmp_path: Path, library: str) -> None:
    path = tmp_path / "libnccl.so.2"
    if library == "text":
        path.write_text("not a library")
    else:
        path.write_bytes(Path(_path_of(library)).read_bytes())
    lines, _ = fakes.run(f"refused(_C.load_nccl, [{str(path)!r}])", nccl=False)
    expected = "does not load: .*invalid ELF|file too short" if library == "text" else "is not NCCL: no ncclGetVersion"
    assert re.search(expected, lines[0]), lines


def _path_of(library: str) -> str:
    maps = subprocess.run(["ldd", sys.executable], capture_output=True, text=True, check=True).stdout
    return re.search(rf"{re.escape(library)} => (\S+)", maps)[1]  # type: ignore[index]


def test_driver_too_old(fakes: Fakes) -> None:
    lines, _ = fakes.run("refused(_C.driver_version)", FAKE_CUDA_VERSION="12020")
    assert re.search(r"driver \(.*libcuda.so.1\) is too old: it supports CUDA 12\.2, and 12\.4 or newer", lines[0])
    lines, _ = fakes.run("refused(_C.driver_version)", FAKE_FAIL="cuInit")
    assert lines == ["Error: cuInit: CUDA_ERROR_OUT_OF_MEMORY (in words)"]
    assert fakes.run("print(_C.driver_version())", FAKE_CUDA_VERSION="12080")[0] == ["12.8"]


# ---- communicator ----------------------------------------------------------------------------------------------------

OWN = "own = lambda seconds=30.0: _C.Communicator.create(_C.unique_id(), 0, 2, True, seconds)\n"


def test_communicator_of_our_own(fakes: Fakes) -> None:
    script = """
comm = own()
print(comm.pointer != 0, comm.owned, len(_C.unique_id()))
print(comm.properties())
print(repr(comm.async_error()))
comm.close(); comm.close(); comm.abort(); comm.forget()
print(comm.pointer)
refused(comm.properties)
"""
    lines, calls = fakes.run(OWN + script, FAKE_RANKS="4", FAKE_LSA="2", FAKE_LATE="ncclCommInitRankConfig")
    properties = {"rank": 0, "n_ranks": 4, "n_lsa_teams": 2, "lsa_rank": 0, "lsa_size": 2, "gin_type": "proxy"}
    flags = {"device_api_support": True, "host_rma_support": True, "railed_gin_type": "none"}
    assert lines[0] == "True True 128"
    assert (properties | flags).items() <= eval(lines[1]).items()
    assert lines[2:] == ["''", "0", "Error: the communicator is closed"]
    assert calls == [
        "ncclGetUniqueId",
        "ncclCommInitRankConfig 0/2 id=7 blocking=0 policy=2",
        "ncclGetUniqueId",
        "ncclCommFinalize",
        "ncclCommDestroy",
    ]


def test_borrowed_communicator_is_never_ended(fakes: Fakes) -> None:
    script = """
refused(_C.Communicator.borrow, 0, 1.0)
for end in ("close", "abort", "forget"):
    comm = _C.Communicator.borrow(4096, 1.0)
    print(comm.owned, comm.pointer)
    comm.allocate(64).register()
    getattr(comm, end)()
"""
    lines, calls = fakes.run(script)
    assert "the process group has no NCCL communicator yet" in lines[0]
    assert 'device_id=torch.device("cuda", LOCAL_RANK)' in lines[0]
    assert lines[1:] == ["False 4096"] * 3
    ends = [[c for c in block.split() if "Dereg" in c or "Free" in c] for block in _blocks(calls, "ncclMemAlloc 64")]
    assert ends == [["ncclCommWindowDeregister", "ncclMemFree"]] * 2 + [["ncclMemFree"]]
    assert not any(("Destroy" in call and "Stream" not in call) or "Abort" in call for call in calls)


def _blocks(calls: list[str], first: str) -> list[str]:
    return " ".join(calls).split(first)[1:]


def test_creation_that_fails(fakes: Fakes) -> None:
    env = {"FAKE_FAIL": "ncclCommInitRankConfig", "FAKE_LAST_ERROR": "no route to peer"}
    lines, calls = fakes.run(OWN + "refused(own)", **env)
    version = _built()
    assert lines == [f"Error: ncclCommInitRankConfig: invalid usage (NCCL {version} says: no route to peer)"]
    assert calls[-1] == "ncclCommAbort"
    lines, calls = fakes.run(OWN + "refused(own)", FAKE_FAIL="background", FAKE_LATE="ncclCommInitRankConfig")
    assert lines == [
        f"Error: ncclCommInitRankConfig: invalid usage (NCCL {version} says: nothing more; NCCL_DEBUG=WARN may)"
    ]
    assert calls[-1] == "ncclCommAbort"


def test_creation_that_nobody_joins(fakes: Fakes) -> None:
    lines, calls = fakes.run(OWN + "refused(own, 0.05)", FAKE_NEVER="ncclCommInitRankConfig")
    assert lines[0].startswith("Error: ncclCommInitRankConfig: not every rank came within 0.05 s")
    assert calls.count("ncclCommAbort") == 1


def test_creation_checks_its_arguments(fakes: Fakes) -> None:
    script = """
create = lambda id, rank, size: refused(_C.Communicator.create, id, rank, size, False, 1.0)
create(b"short", 0, 1); create(bytes(128), 2, 2); create(bytes(128), -1, 2); create(bytes(128), 0, 0)
"""
    lines, calls = fakes.run(script)
    assert lines[0] == "ValueError: unique_id has 5 bytes: must be 128"
    assert lines[1:] == [
        f"ValueError: rank {rank}: must be 0 or more and below the number of ranks"
        for rank in ("2 of 2", "-1 of 2", "0 of 0")
    ]
    assert not calls
    lines, calls = fakes.run(OWN + "refused(own)", FAKE_NO_CONTEXT="1")
    assert lines[0].startswith("Error: no CUDA context on this thread: call torch.cuda.set_device")
    assert calls == ["ncclGetUniqueId"]


def test_close_goes_on_after_a_failure(fakes: Fakes) -> None:
    script = "comm = own(); a = comm.allocate(64); a.register(); comm.device_communicator(1); refused(comm.close)"
    lines, calls = fakes.run(OWN + script, FAKE_FAIL="ncclCommWindowDeregister")
    assert lines[0].startswith("Error: ncclCommWindowDeregister: invalid usage")
    order = ["ncclDevCommDestroy", "cuMemFree", "ncclCommWindowDeregister", "ncclMemFree"]
    assert calls[-6:] == [*order, "ncclCommFinalize", "ncclCommDestroy"]
    lines, calls = fakes.run(OWN + "comm = own(0.05); refused(comm.close)", FAKE_NEVER="ncclCommFinalize")
    assert lines[0].startswith("Error: ncclCommFinalize: not every rank came within 0.05 s")
    assert calls[-2:] == ["ncclCommFinalize", "ncclCommAbort"]


def test_background_error_and_junk_team(fakes: Fakes) -> None:
    script = """
import os
comm = own()
os.environ["FAKE_FAIL"] = "background,ncclTeamLsa"
print(comm.async_error()); refused(comm.properties)
"""
    lines, _ = fakes.run(OWN + script, FAKE_LAST_ERROR="peer 3 is gone")
    assert lines[0] == f"an earlier call: invalid usage (NCCL {_built()} says: peer 3 is gone)"
    assert lines[1].startswith("Error: ncclTeamLsa: ")


# ---- windows, device communicators, mapped memory --------------------------------------------------------------------


def test_window(fakes: Fakes) -> None:
    script = """
comm = own()
window = comm.allocate(4096)
refused(lambda: window.handle)
window.register(); window.register()
print(window.num_bytes, window.handle != 0, any(ctypes.string_at(window.pointer, 4096)))
print(hex(window.lsa_pointer(1, 16)), hex(window.lsa_pointer(0)))
refused(window.lsa_pointer, 2); refused(window.lsa_pointer, -1); refused(window.lsa_pointer, 0, 4096)
window.close(); window.close()
print(window.pointer)
refused(lambda: window.handle); refused(window.register); refused(comm.allocate, 0); refused(comm.allocate, -4)
comm.close()
"""
    lines, calls = fakes.run(OWN + script, FAKE_RANKS="2", FAKE_LATE="ncclCommWindowRegister")
    assert lines == [
        "Error: the window is not registered yet",
        "4096 True False",
        "0x20000000010 0x10000000000",
        "ValueError: peer 2: must be 0 or more and below the LSA size 2",
        "ValueError: peer -1: must be 0 or more and below the LSA size 2",
        "ValueError: offset 4096: must be below the window's 4096 bytes",
        "0",
        "Error: the window is closed",
        "Error: the window is closed",
        "ValueError: num_bytes = 0: must be positive",
        "ValueError: num_bytes = -4: must be positive",
    ]
    assert calls[2:] == [
        "ncclMemAlloc 4096",
        "cuStreamCreate 1",
        "cuMemsetD8Async 4096",
        "cuStreamSynchronize",
        "cuStreamDestroy",
        "ncclCommWindowRegister 4096 flags=1",
        "ncclCommWindowDeregister",
        "ncclMemFree",
        "ncclCommFinalize",
        "ncclCommDestroy",
    ]


def test_windows_close_newest_first_with_their_communicator(fakes: Fakes) -> None:
    script = """
comm = own()
a, b = comm.allocate(64), comm.allocate(128)
a.register(); b.register()
unregistered = comm.allocate(256)
device = comm.device_communicator(4)
comm.close()
print(a.pointer, b.pointer, unregistered.pointer)
a.close(); device.close(); refused(lambda: device.data)
"""
    lines, calls = fakes.run(OWN + script)
    assert lines == ["0 0 0", "Error: the device communicator is closed"]
    window = ["ncclCommWindowDeregister", "ncclMemFree"]
    ends = ["ncclCommFinalize", "ncclCommDestroy"]
    assert calls[-9:] == ["ncclDevCommDestroy", "cuMemFree", "ncclMemFree", *window, *window, *ends]


@pytest.mark.parametrize(
    ("env", "message", "freed"),
    [
        ({"FAKE_FAIL": "ncclMemAlloc"}, "ncclMemAlloc: invalid usage .*; a window of 64 bytes was asked for", 0),
        ({"FAKE_FAIL": "cuStreamCreate"}, "cuStreamCreate: CUDA_ERROR_OUT_OF_MEMORY", 1),
        ({"FAKE_FAIL": "cuMemsetD8Async"}, r"cuMemsetD8Async \(zeroing a window\): CUDA_ERROR_OUT_OF_MEMORY", 1),
        ({"FAKE_FAIL": "cuStreamSynchronize"}, r"cuStreamSynchronize \(zeroing a window\): CUDA_ERROR", 1),
        ({"FAKE_FAIL": "ncclCommWindowRegister"}, "ncclCommWindowRegister: invalid usage", 1),
        ({"FAKE_NO_WINDOWS": "1"}, "ncclCommWindowRegister: made no window, .*driver for CUDA 12.5", 1),
        ({"FAKE_NEVER": "ncclCommWindowRegister"}, "ncclCommWindowRegister: not every rank came within 0.05 s", 1),
    ],
)
def test_window_that_fails_gives_its_memory_back(fakes: Fakes, env: dict[str, str], message: str, freed: int) -> None:
    script = "comm = own(0.05)\ndef make():\n    comm.allocate(64).register()\nrefused(make); comm.close()"
    lines, calls = fakes.run(OWN + script, **env)
    assert re.match(f"Error: {message}", lines[0]), lines
    assert calls.count("ncclMemFree") == freed
    assert calls.count("cuStreamDestroy") == calls.count("cuStreamCreate 1") - (
        env.get("FAKE_FAIL") == "cuStreamCreate"
    )
    assert "ncclCommWindowDeregister" not in calls
    assert calls[-1] == "ncclMemFree" if "FAKE_NEVER" in env else "ncclCommDestroy"
    if "FAKE_NEVER" in env:  # freed only after nothing of the registration runs any more
        assert calls[-2:] == ["ncclCommAbort", "ncclMemFree"]


def test_device_communicator(fakes: Fakes) -> None:
    script = """
import struct
comm = own()
device = comm.device_communicator(2, 4, 8, 16, "rail")
print(struct.unpack_from("i", device.data, 8)[0], len(device.data) % 8, device.gin_contexts)
print(ctypes.string_at(device.pointer, len(device.data)) == device.data)
device.close(); device.close()
print(device.pointer)
comm.device_communicator(lsa_barriers=3).close()
refused(comm.device_communicator, -1); refused(comm.device_communicator, gin_contexts=1)
refused(comm.device_communicator, gin_connection="star")
comm.close()
"""
    lines, calls = fakes.run(OWN + script, FAKE_LATE="ncclDevCommCreate")
    assert lines == [
        "5 0 4",
        "True",
        "0",
        "ValueError: lsa_barriers = -1: must be 0 or more",
        'ValueError: gin_contexts, gin_signals and gin_counters need gin_connection "full" or "rail"',
        'ValueError: gin_connection = "star": must be "none", "full" or "rail"',
    ]
    calls = [call.split(" ", 1)[0] if call.startswith("cuMem") else call for call in calls if "cuStream" not in call]
    assert calls[2:12] == [
        "ncclDevCommCreate lsa=2 contexts=4 signals=8 counters=16 connection=2",
        "cuMemAlloc",
        "cuMemcpyHtoDAsync",
        "ncclDevCommDestroy",
        "cuMemFree",
        "ncclDevCommCreate lsa=3 contexts=0 signals=0 counters=0 connection=0",
        "cuMemAlloc",
        "cuMemcpyHtoDAsync",
        "ncclDevCommDestroy",
        "cuMemFree",
    ]
    lines, calls = fakes.run(
        OWN + "c = own(); refused(c.device_communicator); c.close()", FAKE_FAIL="ncclDevCommCreate"
    )
    assert lines[0].startswith("Error: ncclDevCommCreate: invalid usage")
    assert "ncclDevCommDestroy" not in calls


def test_mapped(fakes: Fakes) -> None:
    script = """
mapped = _C.Mapped(64)
print(mapped.num_bytes, mapped.pointer - mapped.host_pointer == 1 << 48, any(ctypes.string_at(mapped.host_pointer, 64)))
mapped.close(); mapped.close()
print(mapped.pointer, mapped.host_pointer)
forgotten = _C.Mapped(8); del forgotten
refused(_C.Mapped, 0)
"""
    lines, calls = fakes.run(script, nccl=False)
    assert lines == ["64 True False", "0 0", "ValueError: num_bytes = 0: must be positive"]
    assert calls == ["cuMemHostAlloc 64 flags=3", "cuMemFreeHost", "cuMemHostAlloc 8 flags=3", "cuMemFreeHost"]
    lines, calls = fakes.run("refused(_C.Mapped, 64)", FAKE_FAIL="cuMemHostGetDevicePointer")
    assert lines == ["Error: cuMemHostGetDevicePointer (64 bytes): CUDA_ERROR_OUT_OF_MEMORY (in words)"]
    assert calls[-1] == "cuMemFreeHost"
    lines, calls = fakes.run("refused(_C.Mapped, 64)", FAKE_FAIL="cuMemHostAlloc")
    assert lines[0].startswith("Error: cuMemHostAlloc (64 bytes): CUDA_ERROR_OUT_OF_MEMORY")
    lines, calls = fakes.run("refused(_C.Mapped, 64); refused(_C.Module.load, b'code')", FAKE_NO_CONTEXT="1")
    assert all(line.startswith("Error: no CUDA context") for line in lines)
    assert not calls


SHARED = "import os; file = os.memfd_create('x'); os.ftruncate(file, 4096); os.pwrite(file, b'A', 0)\n"


def test_shared_mapped(fakes: Fakes) -> None:
    script = """
one, two = _C.SharedMapped(file, 4096), _C.SharedMapped(file, 100)
os.close(file)
ctypes.memset(one.pointer - (1 << 48) + 7, 66, 1)
print(one.num_bytes, two.num_bytes, one.pointer != two.pointer, ctypes.string_at(two.pointer - (1 << 48), 8))
one.close(); one.close()
print(one.pointer)
del two
refused(_C.SharedMapped, file, 0); refused(_C.SharedMapped, file, 64)
"""
    lines, calls = fakes.run(SHARED + script, nccl=False)
    assert lines[:2] == [r"4096 100 True b'A\x00\x00\x00\x00\x00\x00B'", "0"]
    assert lines[2] == "ValueError: num_bytes = 0: must be positive"
    assert re.fullmatch(r"Error: mmap \(64 bytes of file \d+\): Bad file descriptor", lines[3])
    registered = [f"cuMemHostRegister {size} flags=3 first=65" for size in (4096, 100)]
    assert calls == [*registered, "cuMemHostUnregister", "cuMemHostUnregister"]


@pytest.mark.parametrize("call", ["cuMemHostRegister", "cuMemHostGetDevicePointer"])
def test_shared_mapped_that_the_driver_refuses(fakes: Fakes, call: str) -> None:
    script = """
refused(_C.SharedMapped, file, 4096)
print("memfd" in open("/proc/self/maps").read())
"""
    lines, calls = fakes.run(SHARED + script, FAKE_FAIL=call)
    assert lines == [f"Error: {call} (4096 bytes): CUDA_ERROR_OUT_OF_MEMORY (in words)", "False"]
    assert calls.count("cuMemHostUnregister") == (call == "cuMemHostGetDevicePointer")


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_streams(fakes: Fakes) -> None:
    script = """
stream = _C.Stream()
print(stream.pointer != 0)
stream.close(); stream.close()
print(stream.pointer)
forgotten = _C.Stream(high_priority=False); del forgotten
_C.set_context(_C.current_context())
"""
    lines, calls = fakes.run(script, nccl=False)
    assert lines == ["True", "0"]
    made = [f"cuStreamCreateWithPriority 1 {priority}" for priority in (-5, 0)]
    assert calls == [made[0], "cuStreamDestroy", made[1], "cuStreamDestroy", "cuCtxSetCurrent"]
    oom = "CUDA_ERROR_OUT_OF_MEMORY (in words)"
    lines, _ = fakes.run("refused(_C.Stream)", FAKE_FAIL="cuStreamCreateWithPriority")
    assert lines == [f"Error: cuStreamCreateWithPriority: {oom}"]
    lines, calls = fakes.run("refused(_C.Stream); refused(_C.current_context)", FAKE_NO_CONTEXT="1")
    assert all(line.startswith("Error: no CUDA context on this thread") for line in lines)
    assert not calls


def test_copies_and_words_on_a_stream(fakes: Fakes) -> None:
    script = """
source, target = ctypes.create_string_buffer(b"0123456789"), ctypes.create_string_buffer(16)
to, of = ctypes.addressof(target), ctypes.addressof(source)
_C.copy(to, of, 4, 77); _C.copy(to + 4, of, 2, 0); _C.fill(to + 6, 0x41, 2, 77)
print(target.value)
_C.stream_operations(77, [("write32", 8, 1), ("write64", 16, 1 << 40), ("wait32_eq", 4, 3), ("wait32_geq", 12, 5)])
_C.stream_operations(77, [("write32", 8, 1)] * 300); _C.stream_operations(77, [])
_C.stream_operations(77, [("write32", 8, 1), ("copy", to, of, 4), ("write32", 8, 2), ("write32", 8, 3)])
_C.stream_operations(77, [("after", 78), ("write32", 8, 4), ("before", 0)])
event = _C.Event(); _C.stream_operations(77, [("record", event.handle), ("after", 78), ("await", event.handle)])
"""
    lines, calls = fakes.run(script + "print(_C.built_against()['cuda'])", nccl=False)
    assert lines[0] == "b'012301AA'"
    batched = "cuMemcpyBatchAsync 1 of 4 order=1 flags=1 first=0 kinds=1 stream=77"  # it prefers a copy engine
    assert calls[0] == (batched if int(lines[1].split(".")[0]) >= 13 else "cuMemcpyAsync 4 stream=77")
    assert calls[1:8] == [
        "cuMemcpyAsync 2 stream=0",
        "cuMemsetD8Async 2",
        "cuStreamBatchMemOp 4 flags=0 stream=77",
        "operation 2 at 8 value 1 flags=0",
        f"operation 5 at 16 value {1 << 40} flags=0",
        "operation 1 at 4 value 3 flags=1",
        "operation 1 at 12 value 5 flags=0",
    ]
    later = [call.split()[1] for call in calls[8:] if call.startswith("cuStreamBatchMemOp")]
    assert later == ["255", "45", "1", "2", "1"]
    place = calls.index("cuStreamBatchMemOp 2 flags=0 stream=77")
    assert calls[place - 1] == calls[0]  # the copy, between the words
    assert calls[place + 3 :] == [
        "cuEventCreate 2",  # without times; of the next in turn
        "cuEventRecord stream=78",
        "cuStreamWaitEvent stream=77 flags=0",
        "cuStreamBatchMemOp 1 flags=0 stream=77",
        "operation 2 at 8 value 4 flags=0",
        "cuEventRecord stream=77",
        "cuStreamWaitEvent stream=0 flags=0",
        "cuEventRecord stream=77",
        "cuEventCreate 2",  # the first is in use
        "cuEventRecord stream=78",
        "cuStreamWaitEvent stream=77 flags=0",
        "cuStreamWaitEvent stream=77 flags=0",
    ]


def test_copies_and_words_that_are_refused(fakes: Fakes) -> None:
    script = """
refused(_C.copy, 4096, 8192, 16, 0); refused(_C.fill, 4096, 0, 16, 7)
refused(_C.stream_operations, 7, [("write32", 4096, 1), ("wait32_eq", 4100, 1)])
for name, address, value in (("read32", 8, 0), ("write32", 2, 0), ("write64", 12, 0), ("wait32_eq", 0, 0)):
    refused(_C.stream_operations, 7, [(name, address, value)])
refused(_C.stream_operations, 7, [("write32", 8, 1 << 32)])
refused(_C.stream_operations, 7, [("write32", 8, 1), ("fill", 8, 1, 4)])
refused(_C.stream_operations, 7, [("write32", 8, 1), ("behind", 8)])
"""
    lines, _ = fakes.run(script, FAKE_FAIL="cuMemcpyAsync,cuMemsetD8Async,cuStreamBatchMemOp")
    oom = "CUDA_ERROR_OUT_OF_MEMORY (in words)"
    assert lines == [
        f"Error: cuMemcpyAsync (16 bytes from 0x2000 to 0x1000): {oom}",
        f"Error: cuMemsetD8Async (16 bytes at 0x1000): {oom}",
        f"Error: cuStreamBatchMemOp (2 operations, the first write32 at 0x1000): {oom}",
        'ValueError: operation "read32": must be write32, write64, wait32_eq or wait32_geq',
        "ValueError: write32 at 0x2: must be a multiple of 4, not 0",
        "ValueError: write64 at 0xc: must be a multiple of 8, not 0",
        "ValueError: wait32_eq at 0x0: must be a multiple of 4, not 0",
        "ValueError: write32 of 4294967296: must have at most 32 bits",
        'ValueError: operation "fill" with three numbers: must be copy',
        'ValueError: operation "behind" with one number: must be after, before, record or await',
    ]


@pytest.mark.parametrize("call", ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent"])
def test_streams_that_the_driver_does_not_order(fakes: Fakes, call: str) -> None:
    script = 'refused(_C.stream_operations, 7, [("after", 8), ("write32", 8, 1)])\n'
    lines, calls = fakes.run(script + script, FAKE_FAIL=call)
    assert lines == [f"Error: {call}: CUDA_ERROR_OUT_OF_MEMORY (in words)"] * 2
    assert not any(each.startswith("cuStreamBatchMemOp") for each in calls)
    assert sum(each.startswith("cuEventCreate") for each in calls) == (2 if call == "cuEventCreate" else 1)


def test_whether_a_stream_has_come_to_an_event(fakes: Fakes) -> None:
    not_ready, captured = 600, 907
    for answer, said in ((None, "True"), (not_ready, "False"), (captured, "False")):
        options = {} if answer is None else {"FAKE_EVENT": str(answer)}
        lines, calls = fakes.run("print(_C.Event().passed())", nccl=False, **options)
        assert lines == [said]
        # Relaxed for the call alone, or a capture that another thread has begun would forbid it.
        relaxed, back = (f"cuThreadExchangeStreamCaptureMode {mode}" for mode in (2, 0))
        assert calls[-3:] == [relaxed, "cuEventQuery", back]
    lines, calls = fakes.run("refused(_C.Event().passed)", nccl=False, FAKE_FAIL="cuEventQuery")
    assert lines == ["Error: cuEventQuery: CUDA_ERROR_OUT_OF_MEMORY (in words)"]


# ---- launches --------------------------------------------------------------------------------------------------------

KERNEL = "import struct; args = struct.pack('III', 1, 2, 3); f = _C.Module.load(b'code').function('kernel_a')\n"


def test_launch(fakes: Fakes) -> None:
    script = """
print(f.name, f.registers, f.static_shared_bytes, f.local_bytes, f.max_threads)
print(f.max_dynamic_shared_bytes, f.args_bytes)
f.launch(8, 256, 1024, 77, args)
f.launch(grid=4, block=512, shared_bytes=0, stream=0, args=args, cluster=2, programmatic=True)
f.launch(1, 1, f.max_dynamic_shared_bytes, 0, args)
del f
"""
    lines, calls = fakes.run(KERNEL + script, nccl=False)
    assert lines == ["kernel_a 64 16 0 512", "232432 12"]
    assert calls == [
        "cuModuleLoadData code",
        "cuFuncSetAttribute 232432",
        "cuLaunchKernelEx grid=8 block=256 shared=1024 stream=77 args=1,2,3",
        "cuLaunchKernelEx grid=4 block=512 shared=0 stream=0 args=1,2,3",
        "cluster 2 1 1",
        "programmatic 1",
        "cuLaunchKernelEx grid=1 block=1 shared=232432 stream=0 args=1,2,3",
        "cuModuleUnload",
    ]


def test_launch_checks_sizes(fakes: Fakes) -> None:
    script = """
for shape in ((0, 32, 0), (1 << 31, 32, 0), (1, 0, 0), (1, 1024, 0), (1, 32, -1), (1, 32, 232433)):
    refused(f.launch, *shape, 0, args)
refused(f.launch, 1, 32, 0, 0, args[:8])
refused(f.launch, 3, 32, 0, 0, args, cluster=2); refused(f.launch, 16, 32, 0, 0, args, cluster=16)
"""
    lines, calls = fakes.run(KERNEL + script)
    assert lines == [
        "ValueError: kernel kernel_a: grid = 0: must be from 1 to 2147483647",
        "ValueError: kernel kernel_a: grid = 2147483648: must be from 1 to 2147483647",
        "ValueError: kernel kernel_a: block = 0: must be from 1 to 512",
        "ValueError: kernel kernel_a: block = 1024: must be from 1 to 512",
        "ValueError: kernel kernel_a: shared_bytes = -1: must be from 0 to 232432 on this device",
        "ValueError: kernel kernel_a: shared_bytes = 232433: must be from 0 to 232432 on this device",
        "ValueError: kernel kernel_a: size of args = 8: must be the 12 bytes of the kernel's struct",
        "ValueError: kernel kernel_a: cluster = 2: must be from 1 to 8 and divide grid = 3",
        "ValueError: kernel kernel_a: cluster = 16: must be from 1 to 8 and divide grid = 16",
    ]
    assert not any("Launch" in call for call in calls)


def test_code_and_launches_that_the_driver_refuses(fakes: Fakes) -> None:
    oom = "CUDA_ERROR_OUT_OF_MEMORY (in words)"
    lines, calls = fakes.run(
        "refused(_C.Module.load, b'code'); refused(_C.Module.load, b'')", FAKE_FAIL="cuModuleLoadData"
    )
    assert lines == [
        f"Error: cuModuleLoadData (device code of 4 bytes): {oom}",
        "ValueError: the cubin is empty",
    ]
    lines, calls = fakes.run("refused(_C.Module.load(b'code').function, 'other')")
    assert lines == ["Error: cuModuleGetFunction (kernel other): CUDA_ERROR_NOT_FOUND (in words)"]
    assert calls[-1] == "cuModuleUnload"
    for call in ("cuFuncGetAttribute", "cuFuncSetAttribute"):
        lines, calls = fakes.run("refused(_C.Module.load(b'code').function, 'kernel_a')", FAKE_FAIL=call)
        assert lines == [f"Error: {call} (kernel kernel_a): {oom}"]
        assert calls[-1] == "cuModuleUnload"
    lines, calls = fakes.run(KERNEL + "refused(f.launch, 8, 256, 64, 0, args)", FAKE_FAIL="cuLaunchKernelEx")
    what = "kernel kernel_a, 8 CTAs of 256 threads, 64 bytes of shared memory"
    assert lines == [f"Error: cuLaunchKernelEx ({what}): {oom}"]


# ---- CudaRuntime, between processes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _pretend_cuda(cuda: str, **cuda_functions: Any) -> Iterator[None]:
    """A torch with one sm_90 device, over the stand-in for the driver."""
    ctypes.CDLL(cuda)
    functions: dict[str, Callable] = {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretended",
        "get_device_properties": lambda *_: types.SimpleNamespace(multi_processor_count=132, uuid="GPU-0"),
        "synchronize": lambda *_: None,
        "Stream": lambda *_, **__: types.SimpleNamespace(),
        "current_stream": lambda *_: types.SimpleNamespace(cuda_stream=77),
    }
    raw_stream = mock.patch("torch._C._cuda_getCurrentRawStream", return_value=77, create=True)
    with mock.patch.multiple("torch.cuda", **(functions | cuda_functions)), raw_stream:
        yield


def runtime_case(rank: int, size: int, cuda: str, case: str) -> Any:
    """One case on one rank; the stand-in for NCCL is found through NCCL_HOME."""
    os.environ["FAKE_LOG"] += f".{rank}"
    os.environ["FAKE_RANK"], os.environ["FAKE_RANKS"] = str(rank), str(size)
    changes: dict[str, Any] = {}
    if case == "old device" and rank == 1:
        changes["get_device_capability"] = lambda *_: (8, 0)
    if case == "capture":
        changes["is_current_stream_capturing"] = lambda: True
    if case == "versions" and rank == 1:
        os.environ["FAKE_NCCL_VERSION"] = "23204"
    if case == "no memory" and rank == 1:
        os.environ["FAKE_FAIL"] = "ncclMemAlloc"
    if case == "init fails" and rank == 1:
        os.environ["FAKE_FAIL"] = "ncclCommInitRankConfig"
    if case in ("no network", "nodes", "unequal networks", "no contexts") or (case == "uneven nodes" and rank == 1):
        os.environ["FAKE_LSA"] = "1"
    if case == "no network":
        os.environ["FAKE_NO_GIN"] = "1"
    if case == "no contexts":
        os.environ["FAKE_CONTEXTS"] = "1"
    if case == "host memory, none" and rank == 1:
        os.environ["FAKE_FAIL"] = "cuMemHostRegister"
    if case == "no windows":
        os.environ["FAKE_NO_WINDOWS"] = "1"
    pointers = {0: 4096, 1: 4096 if case.startswith("torch") else 0}
    communicator = mock.patch.object(device, "_torch_communicator", side_effect=lambda *_: pointers[rank])
    window_type = mock.patch.object(device, "_CudaWindow", lambda raw, *_: raw)
    with _pretend_cuda(cuda, **changes), communicator, window_type:
        runtime = CudaRuntime(dist.group.WORLD, 1 if case == "late" else 20)
        result: Any = runtime.description
        if case == "late" and rank == 1:
            return "never comes"
        mapped = runtime.mapped(64)
        assert mapped.tensor.shape == (64,)
        assert not mapped.tensor.any()
        window = runtime.window(1024 + (case == "sizes") * rank)
        assert window.num_bytes == 1024
        if case == "launch":
            result = _launch_twice(runtime)
        if case == "nodes":
            result = _networks(runtime)
        if case.startswith("words"):
            result = _words_at_peers(runtime, case)
        if case.startswith("host memory"):
            result = _host_memory(runtime, case)
        if case == "unequal networks":
            runtime.network(3 + rank, 2, False)
        if case == "no contexts":
            runtime.network(3, 2, False)
        if case == "torch's, destroyed":
            pointers[rank] = 0
        runtime.close()
        runtime.close()
    return result


def _launch_twice(runtime: CudaRuntime) -> list[str]:
    class Args(ctypes.Structure):
        _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint32), ("c", ctypes.c_uint32))

    cubin = Path(os.environ["FAKE_LOG"] + ".cubin")
    cubin.write_bytes(b"code")
    built: list[tuple[str, str]] = []

    def build(kernel: Any, arch: str) -> Any:
        built.append((kernel.name, arch))
        return types.SimpleNamespace(path=cubin)

    kernel = Kernel(name="kernel_a", source="ep/a.cu", args="Args")
    with mock.patch("epv2_plugin.jit.compiler.build", build):
        for number in (1, 2):
            runtime.launch(kernel, bytes(Args(number, 0, 9)), ctas=4, threads=64, shared_bytes=256)
    assert built == [("kernel_a", "sm_90a")]
    return [line for line in Path(os.environ["FAKE_LOG"]).read_text().splitlines() if "Launch" in line]


def _host_memory(runtime: CudaRuntime, case: str) -> list[Any]:
    """What every rank of the node sees in the memory of each, through the addresses that it has for them."""
    rank, size, create = runtime.rank, runtime.size, os.memfd_create
    changes: dict[str, Any] = {"getpid": os.getpid}
    if rank == 1 and case == "host memory, other process":
        changes["getpid"] = lambda: 1 << 30
    if rank == 1 and case == "host memory, other file":
        changes["memfd_create"] = lambda name: create(f"not {name}")
    if rank == 1 and case == "host memory, no descriptors":
        changes["memfd_create"] = mock.Mock(side_effect=OSError(24, "Too many open files"))
    files = len(os.listdir("/proc/self/fd"))
    with mock.patch.multiple("os", **changes):
        window = runtime.host_window(8192 + 4096 * (case == "host memory, sizes") * rank)
    assert len(os.listdir("/proc/self/fd")) == files
    assert (window.handle, window.num_bytes) == (0, 8192)
    assert window.lsa_pointer(rank, 5) == window.pointer + 5
    seen = [ctypes.string_at(window.pointer - (1 << 48), 8192).strip(b"\0")]
    dist.barrier()
    ctypes.memset(window.pointer - (1 << 48) + 8191, 65 + rank, 1)
    dist.barrier()
    if case == "host memory, killed":
        if rank == 1:
            while runtime.meeting.peek("out of the barrier") is None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        runtime.meeting.post("out of the barrier", "")
        with pytest.raises(RuntimeError):
            dist.barrier()
        seen.append(ctypes.string_at(window.lsa_pointer(1, 8191) - (1 << 48), 1))
        mapped = Path("/proc/self/maps").read_text().count("memfd:epv2-")
        runtime.close(abandon=True)
        return [*seen, mapped, Path("/proc/self/maps").read_text().count("memfd:epv2-")]
    return seen + [ctypes.string_at(window.lsa_pointer(peer, 8191) - (1 << 48), 1) for peer in range(size)]


def _words_at_peers(runtime: CudaRuntime, case: str) -> list[Any]:
    """What the runtime finds, asked twice, and what it gave to the stream."""
    given: list[Any] = []
    on_stream = runtime.stream_ops

    def stream_ops(operations: Sequence[Any], stream: Any) -> None:
        given.extend(operations)
        if case == "words, refused" and runtime.rank == 1:
            os.environ["FAKE_FAIL"] = "cuStreamBatchMemOp"
            on_stream(operations, stream)
        if operations[0][0] == "copy" and not (case == "words, lost" and runtime.rank == 1):
            for _, seen, _, count in operations:
                whole = ctypes.c_uint64(given[0][2] | given[1][2])
                ctypes.memmove(seen - (1 << 48), ctypes.byref(whole), count)

    window = types.SimpleNamespace(peer_pointer=lambda peer, offset: 4096 * (1 + peer) + offset)
    stream = types.SimpleNamespace(cuda_stream=5)
    changes = {"stream_ops": stream_ops, "window": lambda _: window, "new_stream": lambda: stream}
    with mock.patch.multiple(runtime, **changes), mock.patch.object(device, "_REST_SECONDS", 0.2):
        found = [runtime.writes_to_peers(), runtime.writes_to_peers()]
    assert [tell[0] for tell in device.tell(runtime, 7, 8, [16])] == ["write32", "write32" if found[0] else "copy"]
    return [*found, runtime.description["words_at_peers"], [(name, at) for name, at, *_ in given if name != "copy"]]


def _networks(runtime: CudaRuntime) -> list[str]:
    """What is said of networks, and of addresses on another node."""
    said = [str(runtime.lsa_size), str(runtime.network(3, 2, False) != 0)]
    node = range(runtime.rank, runtime.rank + 1)
    raw = types.SimpleNamespace(handle=1, num_bytes=8, pointer=0, lsa_pointer=lambda *place: place)
    with mock.patch("torch.as_tensor", return_value=None):
        window = _CudaWindow(raw, node, runtime.rank, runtime.device)
        of_two = _CudaWindow(raw, range(2), 0, runtime.device)
    assert window.peer_pointer(runtime.rank, 5) == of_two.peer_pointer(0, 5) == 5  # as its own tensor has it
    assert of_two.peer_pointer(1, 5) == (1, 5)
    for call in (
        lambda: runtime.network(3, 2, True),
        lambda: runtime.network(0, 2, False),
        lambda: window.peer_pointer(1 - runtime.rank, 5),
    ):
        try:
            call()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def _ranks(fakes: Fakes, case: str, tmp_path: Path) -> tuple[list[harness.Outcome], list[list[str]]]:
    env = {"NCCL_HOME": str(fakes.nccl.parent.parent), "FAKE_LOG": str(tmp_path / "log")}
    results = harness.outcomes(2, runtime_case, str(fakes.cuda), case, env=env)
    logs = [tmp_path / f"log.{rank}" for rank in range(2)]
    return results, [log.read_text().splitlines() if log.exists() else [] for log in logs]


def test_runtime_with_own_communicator(fakes: Fakes, tmp_path: Path) -> None:
    """One rank has torch's communicator, the other none: all must take the same way."""
    results, logs = _ranks(fakes, "own", tmp_path)
    assert not any(r.error for r in results), results
    expected = {"communicator": "own", "nccl": _built(), "nccl_path": str(fakes.nccl), "sms": 132, "lsa_ranks": 2}
    assert all(expected.items() <= r.value.items() for r in results)
    for rank, log in enumerate(logs):
        assert [call for call in log if "cuStream" not in call] == [
            *(["ncclGetUniqueId"] if rank == 0 else []),
            f"ncclCommInitRankConfig {rank}/2 id=7 blocking=0 policy=2",
            "cuMemHostAlloc 64 flags=3",
            "ncclMemAlloc 1024",
            "cuMemsetD8Async 1024",
            "ncclCommWindowRegister 1024 flags=1",
            "ncclCommWindowDeregister",
            "ncclMemFree",
            "ncclCommFinalize",
            "ncclCommDestroy",
            "cuMemFreeHost",
        ]


@pytest.mark.parametrize("case", ["torch's", "torch's, destroyed"])
def test_runtime_with_torch_communicator(fakes: Fakes, tmp_path: Path, case: str) -> None:
    results, logs = _ranks(fakes, case, tmp_path)
    assert not any(r.error for r in results), results
    assert all(r.value["communicator"] == "torch's" for r in results)
    gone = case == "torch's, destroyed"  # destroy_process_group came before close
    for log in logs:
        assert [c for c in log if "nccl" in c] == [
            "ncclMemAlloc 1024",
            "ncclCommWindowRegister 1024 flags=1",
            *([] if gone else ["ncclCommWindowDeregister"]),
            "ncclMemFree",
        ]


def test_runtime_launches(fakes: Fakes, tmp_path: Path) -> None:
    results, _ = _ranks(fakes, "launch", tmp_path)
    assert not any(r.error for r in results), results
    lines = [f"cuLaunchKernelEx grid=4 block=64 shared=256 stream=77 args={number},0,9" for number in (1, 2)]
    assert [r.value for r in results] == [lines, lines]


def test_runtime_across_nodes(fakes: Fakes, tmp_path: Path) -> None:
    results, logs = _ranks(fakes, "nodes", tmp_path)
    assert not any(r.error for r in results), results
    for rank, result in enumerate(results):
        assert result.value[:2] == ["1", "True"]
        messages = [
            r"UnavailableError: NCCL has no RAIL connections .* \(ginType proxy, railedGinType none\)",
            r"ValueError: num_signals = 0: must be positive",
            rf"ValueError: rank {1 - rank} is on another node: this one has ranks {rank} to {rank}",
        ]
        for said, message in zip(result.value[2:], messages, strict=True):
            assert re.match(message, said), said
    for log in logs:
        created = [call for call in log if call.startswith("ncclDevComm")]
        assert created == ["ncclDevCommCreate lsa=0 contexts=2 signals=3 counters=0 connection=1", "ncclDevCommDestroy"]


@pytest.mark.parametrize("case", ["words", "words, refused", "words, lost"])
def test_words_at_peers_are_tried(fakes: Fakes, tmp_path: Path, case: str) -> None:
    """The driver takes them, or refuses them on one rank, or they never come: then that rank has them copied."""
    results, logs = _ranks(fakes, case, tmp_path)
    assert not any(r.error for r in results), results
    taken, copied = [True, True, "written"], [False, False, "copied"]
    words = [[("write64", at), ("write32", at)] for at in (4096 * 2, 4096 + 8)]
    assert [r.value for r in results] == [[*taken, words[0]], [*(taken if case == "words" else copied), words[1]]]
    assert ("cuStreamBatchMemOp 2 flags=0 stream=5" in logs[1]) == (case == "words, refused")


def test_host_memory_of_a_node(fakes: Fakes, tmp_path: Path) -> None:
    results, logs = _ranks(fakes, "host memory", tmp_path)
    assert not any(r.error for r in results), results
    assert [r.value for r in results] == [[b"", b"A", b"B"]] * 2
    for log in logs:
        assert log.count("cuMemHostRegister 8192 flags=3 first=0") == log.count("cuMemHostUnregister") == 2


def test_host_memory_of_a_rank_that_was_killed(fakes: Fakes, tmp_path: Path) -> None:
    """It stays until the last that maps it lets it go, so no kernel that reads it fails, and then nothing is left."""
    results, logs = _ranks(fakes, "host memory, killed", tmp_path)
    assert results[0].value == [b"", b"B", 2, 0], results
    assert results[1].exit_code == -signal.SIGKILL
    assert logs[0].count("cuMemHostUnregister") == 2
    assert not list(Path("/dev/shm").glob("epv2-*"))


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        (
            "sizes",
            (r"ValueError: host memory must have the same size on all ranks, got 8192, 12288 by rank",) * 2,
        ),
        (
            "none",
            (
                r"RuntimeError: rank 1 of the group can't take part: cuMemHostRegister \(8192 bytes\): CUDA_ERROR",
                r"Error: cuMemHostRegister \(8192 bytes\): CUDA_ERROR_OUT_OF",
            ),
        ),
        (
            "no descriptors",
            (
                r"RuntimeError: rank 1 of the group can't take part: no 8192 bytes that ranks could share: .* open ",
                r"RuntimeError: no 8192 bytes that ranks could share: \[Errno 24\] Too many open files",
            ),
        ),
        (
            "other process",
            (r"UnavailableError: rank 0 on .* can't open the host memory of rank 1 on .* No such file .*--pid=host",)
            * 2,
        ),
        (
            "other file",
            (r"UnavailableError: rank 0 .* memory of rank 1 on .* \(process \d+ .* has /memfd:not epv2-\w+ \(del",) * 2,
        ),
    ],
)
def test_host_memory_is_refused_on_every_rank(
    fakes: Fakes, tmp_path: Path, case: str, messages: tuple[str, ...]
) -> None:
    results, logs = _ranks(fakes, f"host memory, {case}", tmp_path)
    for result, message in zip(results, messages, strict=True):
        assert re.match(message, f"{result.error_type}: {result.error}"), result
    for rank, log in enumerate(logs):  # what was made before is given back
        made = sum(call.startswith("cuMemHostRegister") for call in log) - (case == "none" and rank == 1)
        assert log.count("cuMemHostUnregister") == made


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        (
            "old device",
            (
                r"RuntimeError: rank 1 of the group can't take part: pretended is sm_80",
                r"RuntimeError: pretended is sm_80: the cuda backend needs sm_90 \(Hopper\) or newer",
            ),
        ),
        (
            "capture",
            (r"RuntimeError: an ElasticBuffer can't be made while a CUDA graph is being captured: make the",) * 2,
        ),
        (
            "versions",
            (r"RuntimeError: the ranks of this group have loaded different versions of NCCL \(2\.30\.\d, 2\.32",) * 2,
        ),
        (
            "no network",
            (
                r"UnavailableError: of the 2 ranks of this group only 1 reach each other's memory \(LSA size 1, 2 "
                r"teams\), and NCCL has no network .* \(ginType none\).*InfiniBand.*NCCL_RMA_PLUGIN.*epv2 emulate",
            )
            * 2,
        ),
        (
            "uneven nodes",
            (r"UnavailableError: the nodes of a group must have consecutive ranks.* LSA teams: 0/2, 0/1\. Start",) * 2,
        ),
        (
            "no windows",
            (r"UnavailableError: NCCL can't make symmetric windows here \(.*deviceApiSupport = 0\).*12\.5",) * 2,
        ),
        ("sizes", (r"ValueError: a window must have the same size on all ranks, got 1024, 1025 bytes by rank",) * 2),
        (
            "no memory",
            (
                r"RuntimeError: rank 1 of the group can't take part: ncclMemAlloc: invalid usage",
                r"Error: ncclMemAlloc: invalid usage .*; a window of 1024 bytes was asked for",
            ),
        ),
        (
            "init fails",
            (
                r"RuntimeError: rank 1 of the group can't take part: ncclCommInitRankConfig: invalid usage",
                r"Error: ncclCommInitRankConfig: invalid usage",
            ),
        ),
        (
            "late",
            (
                r"CommunicationTimeout: rank 0, waiting for rank 1 in creation of the buffer: expected all of ranks "
                r"\[0, 1\] within 1 s, seen nothing of that rank",
                None,
            ),
        ),
    ],
)
def test_runtime_refuses_on_every_rank(
    fakes: Fakes, tmp_path: Path, case: str, messages: tuple[str | None, ...]
) -> None:
    results, logs = _ranks(fakes, case, tmp_path)
    for result, message in zip(results, messages, strict=True):
        text = f"{result.error_type}: {result.error}" if result.error else None
        assert (text is None) == (message is None), text
        assert message is None or re.match(message, str(text), re.DOTALL), text
    for log in logs:  # whatever was made before is given back
        allocated = [call for call in log if call.startswith("ncclMemAlloc")]
        assert log.count("ncclMemFree") == len(allocated) or case == "no memory"
        assert "ncclCommWindowRegister 1024 flags=1" not in log or case == "late"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "unequal networks",
            r"ValueError: a network must be the same on all ranks, got by rank: 3 signals .*; 4 signals",
        ),
        ("no contexts", r"UnavailableError: NCCL gave 1 contexts of the 2 asked for"),
    ],
)
def test_networks_are_refused_on_every_rank(fakes: Fakes, tmp_path: Path, case: str, message: str) -> None:
    for result in _ranks(fakes, case, tmp_path)[0]:
        assert re.match(message, f"{result.error_type}: {result.error}"), result


def test_capture_is_refused_later_too() -> None:
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with capturing, pytest.raises(RuntimeError, match="kernel x can't be made while a CUDA graph is being captured"):
        device._refuse_capture("kernel x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no CUDA device: torch \S+ finds none on this machine"):
        device._check_device()


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "epv2_plugin._C", None)
    with pytest.raises(RuntimeError, match=r"without its compiled part.*nvidia-cuda-cccl.*pip install --no-build"):
        device.load_compiled()


# ---- the same on a device --------------------------------------------------------------------------------------------

FILL = """
struct Args { unsigned long long out; unsigned value; unsigned count; };
extern "C" __global__ void kernel_fill(const __grid_constant__ Args args) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.count) reinterpret_cast<unsigned*>(args.out)[i] = args.value;
}
"""


class FillArgs(ctypes.Structure):
    """`Args` of FILL."""

    _fields_ = (("out", ctypes.c_uint64), ("value", ctypes.c_uint32), ("count", ctypes.c_uint32))


def on_device(rank: int, size: int, cubin: str, torch_communicator: bool) -> str:
    """Windows, copies without a kernel, mapped memory, launches, streams and graph capture between real ranks."""
    torch.cuda.set_device(rank % torch.cuda.device_count())
    group = dist.new_group(backend="nccl") if torch_communicator else dist.group.WORLD
    if torch_communicator:
        dist.all_reduce(torch.ones(1, device="cuda"), group=group)
    runtime = CudaRuntime(group, 60)
    window, mapped = runtime.window(1 << 20), runtime.mapped(64)
    assert window.tensor.is_cuda
    assert window.tensor.shape == (1 << 20,)
    assert not window.tensor.any()
    dist.barrier()
    source = torch.full((4096,), rank + 1, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    copied = ctypes.CDLL("libcuda.so.1").cuMemcpy(
        *map(ctypes.c_uint64, (window.peer_pointer((rank + 1) % size, 512), source.data_ptr(), source.numel()))
    )
    assert copied == 0
    torch.cuda.synchronize()
    dist.barrier()
    assert bool((window.tensor[512:4608] == (rank - 1) % size + 1).all())
    assert not window.tensor[:512].any()
    assert not window.tensor[4608:].any()
    kernel = Kernel(name="kernel_fill", source="ep/fill.cu", args="Args")
    with mock.patch("epv2_plugin.jit.compiler.build", return_value=types.SimpleNamespace(path=Path(cubin))):
        with runtime.on_stream(runtime.comm_stream()):
            assert torch.cuda.current_stream() == runtime.comm_stream()
            runtime.launch(kernel, bytes(FillArgs(mapped.pointer, 7, 16)), ctas=1, threads=32, shared_bytes=0)
            done = runtime.record()
        runtime.wait(done)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            args = FillArgs(window.tensor.data_ptr(), 0x01020304, 64)
            runtime.launch(kernel, bytes(args), ctas=2, threads=32, shared_bytes=1024)
            with pytest.raises(RuntimeError, match="can't be made while a CUDA graph is being captured"):
                runtime.window(64)
    graph.replay()
    torch.cuda.synchronize()
    assert mapped.tensor.view(torch.int32).tolist() == [7] * 16
    assert window.tensor[:256].view(torch.int32).tolist() == [0x01020304] * 64
    runtime.close()
    runtime.close()
    return runtime.description["communicator"]


@pytest.mark.gpu
@pytest.mark.parametrize("torch_communicator", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_on_device(tmp_path: Path, size: int, torch_communicator: bool) -> None:
    from epv2_plugin.jit import compiler, toolchain

    (tmp_path / "fill.cu").write_text(FILL)
    arch = compiler.device_arch(*torch.cuda.get_device_capability())
    command = [str(toolchain.find_nvcc().path), "-cubin", f"-arch={arch}", "fill.cu", "-o", "fill.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True)
    env = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    results = harness.run(size, on_device, str(tmp_path / "fill.cubin"), torch_communicator, env=env)
    assert results == ["torch's" if torch_communicator else "own"] * size


@pytest.mark.gpu
def test_rank_that_never_comes() -> None:
    results = harness.outcomes(2, one_rank_only, env={"NCCL_MULTI_RANK_GPU_ENABLE": "1"})
    assert results[0].error_type == "CommunicationTimeout", results
    assert not results[1].error


def one_rank_only(rank: int, size: int) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())
    if rank == 0:
        CudaRuntime(dist.group.WORLD, 3)


# ---- setup.py --------------------------------------------------------------------------------------------------------


def _headers(folder: Path, names: tuple[str, ...], version: tuple[int, int] | None = None) -> Path:
    for name in names:
        file = folder / "include" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#define NCCL_MAJOR {}\n#define NCCL_MINOR {}\n".format(*version) if version else "")
    return folder


def test_headers_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete and new enough comes before first; a folder with a part of CUDA's headers is passed by."""
    site = tmp_path / "site"
    old = _headers(tmp_path / "old", setup_script.NCCL_HEADERS, (2, 29))
    new = _headers(site / "nvidia" / "nccl", setup_script.NCCL_HEADERS, (2, 30))
    part = _headers(tmp_path / "part", ("cuda.h",))
    whole = _headers(site / "nvidia" / "cu13", (*setup_script.CUDA_HEADERS, "cccl/nv/target"))
    monkeypatch.setenv("NCCL_HOME", str(old))
    monkeypatch.setenv("CUDA_HOME", str(part))
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    monkeypatch.setattr(setup_script.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    found, missing = setup_script.find_headers()
    assert missing == ""
    assert found == [new / "include", whole / "include", whole / "include" / "cccl"]
    monkeypatch.setenv("CUDA_HOME", str(_headers(tmp_path / "cuda12", (*setup_script.CUDA_HEADERS, "nv/target"))))
    assert setup_script.find_headers()[0][1:] == [tmp_path / "cuda12" / "include"]


def test_headers_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _headers(tmp_path, setup_script.NCCL_HEADERS, (2, 29))
    monkeypatch.setattr(setup_script, "include_folders", lambda variable, _: [old / "include"])
    assert setup_script.find_headers() == (
        [],
        f"no headers of NCCL 2.30 or newer, only 2.29 in {old / 'include'}",
    )
    assert setup_script.extensions() == []
    monkeypatch.setattr(setup_script, "nccl_version", lambda _: (2, 30))
    assert setup_script.find_headers()[1].startswith("no headers of CUDA (all of cuda.h, cuda_runtime.h")
