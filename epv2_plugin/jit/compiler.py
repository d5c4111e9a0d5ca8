"""Builds kernels into a cache that many processes and machines may share.

An entry of the cache is a folder `NAME-ARCH-KEY-nvccVERSION` with `kernel.cubin` and `kernel.json` (its resources and
how it was built). It is made under another name and renamed: whoever is first wins, the others use his, nobody ever
sees a part of it, and a whole one is never taken away. The nvcc version stands outside of the key: a machine without
nvcc can use what another one built.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from epv2_plugin.jit import args, kernels, toolchain
from epv2_plugin.jit.kernels import Kernel

logger = logging.getLogger("epv2_plugin")

FLAGS = ("-std=c++20", "-O3", "--cubin", "-lineinfo", "-Xptxas", "-v")
MIN_ARCH = 90
_SECONDS = 900  # a build takes a few; a compiler that sits on a dead file system must not hang the job
_LINES = 40  # of the compiler's output that an error repeats
_LAYOUT_CHECK = "epv2_layout_check.h"
_LOCK = "lock"  # in the cache's folder; held while a broken entry is taken away


class CompileError(RuntimeError):
    """A kernel does not compile; the message has the kernel, the command and what the compiler said."""


class CacheError(RuntimeError):
    """The cache can't be written; the message is one line that names the folder and what mends it."""


@dataclass(frozen=True)
class Resources:
    """What ptxas says that a kernel takes: registers per thread, bytes of stack frame and spills per thread, bytes of
    static shared memory per CTA."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int

    @property
    def local_memory(self) -> bool:
        """Whether threads of it touch local memory, which is as slow as global memory."""
        return bool(self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes)


@dataclass(frozen=True)
class Built:
    """A kernel in the cache: the cubin's `path`, its `resources`, the `seconds` that its build took, and whether it was
    `cached` (not built by this call)."""

    path: Path
    resources: Resources
    seconds: float
    cached: bool


def cache_folder() -> Path:
    """`EPV2_CACHE`, else the user's cache folder (`XDG_CACHE_HOME` or ~/.cache) / epv2."""
    if named := os.environ.get("EPV2_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epv2"


def device_arch(major: int, minor: int) -> str:
    """The arch that kernels for a device of this compute capability are built for: (9, 0) -> "sm_90a"."""
    return f"sm_{major}{minor}a"


def check_arch(arch: str) -> str:
    """`arch` if kernels can be built for it.

    Raises:
        ValueError: it is not of the form sm_90a, or too old.
    """
    match = re.fullmatch(r"sm_(\d{2,3})[af]?", arch)
    if match is None:
        raise ValueError(f"arch = {arch!r}: must be like 'sm_90a'")
    if int(match[1]) < MIN_ARCH:
        raise ValueError(f"arch = {arch!r}: the kernels need sm_{MIN_ARCH} (Hopper) or newer")
    return arch


def build(kernel: Kernel, arch: str) -> Built:
    """The cubin of `kernel` for `arch` ("sm_90a"), from the cache or compiled into it.

    Many processes may call this at once, on one machine or on several that share the cache.

    Raises:
        ValueError: no such arch. ToolchainError: nvcc, g++ or NCCL's headers are not here.
        HeaderError: the argument header can't be read. CompileError: the source does not compile.
        CacheError: the cache can't be written.
    """
    check_arch(arch)
    nccl = toolchain.find_nccl()
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.ToolchainError:
        if built := cached(kernel, arch):
            return built
        raise
    folder = cache_folder()
    place = folder / f"{_entry(kernel, arch, nccl)}{nvcc.version}"
    if built := _read(place):
        return built
    gxx = toolchain.find_gxx()
    logger.info("epv2: building %s for %s with nvcc %s ...", kernel.label, arch, nvcc.version)
    begun = time.monotonic()
    # Made before the compiler runs: a cache that can't be written should not cost a build.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
    except OSError as error:
        raise _cache_error(folder, error) from None
    try:
        cubin, resources, command = _compile(kernel, arch, nvcc, gxx, nccl)
        seconds = time.monotonic() - begun
        record = {
            "kernel": kernel.label,
            "arch": arch,
            "sha256": hashlib.sha256(cubin).hexdigest(),
            "seconds": round(seconds, 2),
            "resources": dataclasses.asdict(resources),
            "command": command,
        }
        try:
            _write(temporary / "kernel.cubin", cubin)
            _write(temporary / "kernel.json", json.dumps(record, indent=1).encode())
            temporary.chmod(0o755)  # mkdtemp makes it for its owner alone
            _publish(temporary, place)
        except OSError as error:
            raise _cache_error(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("epv2: building %s for %s took %.1f s", kernel.label, arch, seconds)
    written = _read(place)
    if written is None:
        raise CacheError(f"{place} can't be read back after it was written: set EPV2_CACHE to another folder")
    return dataclasses.replace(written, seconds=seconds, cached=False)


def cached(kernel: Kernel, arch: str) -> Built | None:
    """The cubin of `kernel` that is in the cache already, whichever nvcc built it; `None` = there is none.

    Raises:
        ToolchainError: NCCL's headers are not here.
    """
    prefix = _entry(kernel, arch, toolchain.find_nccl())
    found = (_read(place) for place in sorted(cache_folder().glob(f"{prefix}*"), reverse=True))
    return next((built for built in found if built), None)


def _entry(kernel: Kernel, arch: str, nccl: toolchain.NcclHeaders) -> str:
    """Name of an entry up to the nvcc version, with the hash of all else that a cubin comes from. Every source file
    counts, included by this kernel or not."""
    root = kernels.source_root()
    given = [os.environ.get(key) for key in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    digest = hashlib.sha256(repr((kernel, arch, FLAGS, given, nccl.code)).encode())
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        digest.update(f"\0{path.relative_to(root)}\0{len(data)}\0".encode() + data)
    return f"{kernel.name}-{arch}-{digest.hexdigest()[:20]}-nvcc"


def _read(place: Path) -> Built | None:
    """An entry of the cache, `None` = not there, or not as it was written."""
    path = place / "kernel.cubin"
    try:
        record = json.loads((place / "kernel.json").read_bytes())
        if hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
            return None
        return Built(path, Resources(**record["resources"]), record["seconds"], cached=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, place: Path) -> None:
    """Rename an entry to its place; an entry that is there stays if it is whole."""
    for _ in range(3):
        try:
            os.rename(temporary, place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Looked at and taken away under a lock: the broken entry may by now be another process's whole one, which that
        # process is about to load.
        with (place.parent / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _read(place):
                return
            broken = Path(tempfile.mkdtemp(prefix="tmp-", dir=place.parent))
            try:
                os.rename(place, broken)  # onto an empty folder, which rename allows
            except FileNotFoundError:
                pass  # removed by hand
            finally:
                shutil.rmtree(broken, ignore_errors=True)
    raise OSError(errno.EAGAIN, "others keep writing broken entries", str(place))


def _cache_error(folder: Path, error: OSError) -> CacheError:
    return CacheError(
        f"the kernel cache {folder} can't be written: {error.strerror}: set EPV2_CACHE to a folder that can be "
        f"written, or fill this one with `epv2 compile` where it can"
    )


def _compile(
    kernel: Kernel, arch: str, nvcc: toolchain.Tool, gxx: toolchain.Tool, nccl: toolchain.NcclHeaders
) -> tuple[bytes, Resources, str]:
    """Run nvcc; returns the cubin, its resources and the command."""
    root = kernels.source_root()
    structs = kernels.args_of(kernel)
    with tempfile.TemporaryDirectory(prefix="epv2-") as folder:
        check, output = Path(folder) / _LAYOUT_CHECK, Path(folder) / "kernel.cubin"
        check.write_text(f'#include "{kernel.args_header}"\n{args.layout_asserts(structs)}')
        command = [str(nvcc.path), "-ccbin", str(gxx.path), *FLAGS]
        command += [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}", f"-I{root}"]
        # Searched anyway, and named it could come before the compiler's own headers.
        command += [] if nccl.include == toolchain.SYSTEM_INCLUDE else [f"-I{nccl.include}"]
        command += [f"-D{name}={value}" for name, value in kernel.defines]
        command += ["-include", str(check), "-o", str(output), str(root / kernel.source)]
        text = shlex.join(command)
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise CompileError(f"{kernel.label} for {arch}: nvcc gave no result in {_SECONDS} s\n  {text}") from None
        said = (run.stderr + run.stdout).strip()
        if run.returncode != 0:
            raise CompileError(f"{kernel.label} for {arch} does not compile\n  {text}\n{_trim(said)}")
        entries = re.findall(r"Compiling entry function '(\w+)'", said)
        if entries != [kernel.name]:
            raise CompileError(
                f"{kernel.label}: {kernel.source} must define the kernel {kernel.name} and no other, "
                f"it defines: {', '.join(entries) or 'none'}"
            )
        return output.read_bytes(), _resources(said), text


def _trim(text: str) -> str:
    lines = text.splitlines()
    more = len(lines) - _LINES
    return "\n".join(lines[:_LINES] + ([f"... {more} more lines"] if more > 0 else []))


def _resources(said: str) -> Resources:
    """Read ptxas' report. Functions that were not inlined have lines of their own: the worst counts."""

    def worst(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, said)), default=0)

    return Resources(
        registers=worst(r"Used (\d+) registers"),
        stack_bytes=max(worst(r"(\d+) bytes stack frame"), worst(r"(\d+) bytes cumulative stack size")),
        spill_store_bytes=worst(r"(\d+) bytes spill stores"),
        spill_load_bytes=worst(r"(\d+) bytes spill loads"),
        shared_bytes=worst(r"(\d+) bytes smem"),
    )
