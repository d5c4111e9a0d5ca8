"""What kernels are built with: nvcc, the host compiler that it calls, and NCCL's headers.

Each is looked for in a fixed order, and each result says where it was found. An error says what was looked at, what is
needed, and which command mends it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

MIN_NCCL = 23000
# From this release on a library serves code that was built with the headers of an older one; before, only with its own.
_STABLE_NCCL = 23100
_GXX_MEND = "apt-get install g++, or set NVCC_CCBIN to a C++ compiler that nvcc supports"
CHECKOUT = Path(__file__).parents[2]  # with a Makefile and cuda-wheels.txt, unless this is an installed package
_LOCAL = Path("/usr/local")  # where toolkits are installed
SYSTEM_INCLUDE = Path("/usr/include")
_SECONDS = 60  # for `nvcc --version` and the like
# The wheel of nvcc alone can't compile: what else it takes, and which wheel brings it.
_WHEEL_PARTS = {
    "nvvm/bin/cicc": "nvidia-nvvm",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    "include/cuda_runtime.h": "nvidia-cuda-runtime",
    "include/cccl/cuda/atomic": "nvidia-cuda-cccl",
}


class ToolchainError(RuntimeError):
    """Something that building needs is not here. The message is one line: `reason`: `mend`, what mends it."""

    def __init__(self, reason: str, mend: str):
        self.reason, self.mend = reason, mend
        super().__init__(f"{reason}: {mend}")

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.mend)


@dataclass(frozen=True)
class Tool:
    """A program: `path`, `version` such as "13.0.88", and `found`, where it was found, in words."""

    path: Path
    version: str
    found: str


@dataclass(frozen=True)
class NcclHeaders:
    """NCCL's headers: folder of nccl.h and nccl_device.h, NCCL_VERSION_CODE (23007 = 2.30.7), where found, in words."""

    include: Path
    code: int
    found: str

    @property
    def version(self) -> str:
        """Such as "2.30.7"."""
        return nccl_version(self.code)


@dataclass(frozen=True)
class NcclLibrary:
    """NCCL as this process has it loaded: the file, and its version code."""

    path: Path
    code: int

    @property
    def version(self) -> str:
        """Such as "2.30.7"."""
        return nccl_version(self.code)


def nccl_version(code: int) -> str:
    """23007 -> "2.30.7"."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def find_nvcc() -> Tool:
    """nvcc of `CUDA_HOME`, `CUDA_PATH`, the pip wheels, `PATH`, or /usr/local/cuda*, in this order.

    Raises:
        ToolchainError: there is none that runs.
    """
    missed: list[str] = []
    for path, found in _nvcc_places():
        if path is None or not path.is_file() or not os.access(path, os.X_OK):
            missed.append(f"{found} has none")
            continue
        lacking = _missing_parts(path.parent.parent) if found == "pip wheels" else []
        if lacking:
            missed.append(f"pip wheels lack {', '.join(lacking)}")
            continue
        if version := _version(path, "--version", r"V(\d+\.\d+\.\d+)"):
            return Tool(path, version, _but(found, missed))
        missed.append(f"{path} does not run")
    raise ToolchainError(f"no nvcc ({'; '.join(missed)})", _nvcc_mend())


def find_gxx() -> Tool:
    """The host compiler: `NVCC_CCBIN`, else g++ on `PATH`.

    Raises:
        ToolchainError: there is none that runs.
    """
    named = os.environ.get("NVCC_CCBIN")
    found = "NVCC_CCBIN" if named else "PATH"
    path = shutil.which(named or "g++")
    if path is None:
        what = f"NVCC_CCBIN={named} is not a program" if named else "no g++ on PATH"
        raise ToolchainError(what, _GXX_MEND)
    if version := _version(Path(path), "--version", r"(\d+\.\d+\.\d+)"):
        return Tool(Path(path), version, found)
    raise ToolchainError(f"{path} ({found}) does not run", _GXX_MEND)


def find_nccl() -> NcclHeaders:
    """NCCL's headers: beside the loaded library, in `NCCL_HOME`/include, in the pip wheel, or in /usr/include.

    Raises:
        ToolchainError: there are none, they are older than 2.30, or they are not those of the loaded library.
    """
    library = loaded_nccl()
    missed: list[str] = []
    for include, found in _nccl_places(library):
        code = _nccl_code(include)
        if code is None:
            missed.append(f"{found} has no nccl.h in {include}")
            continue
        headers = NcclHeaders(include, code, _but(found, missed))
        if code < MIN_NCCL or not (include / "nccl_device.h").is_file():
            raise ToolchainError(
                f"NCCL {headers.version} ({include}, {found}) has no device API for these kernels: "
                f"{nccl_version(MIN_NCCL)} or newer is needed",
                nccl_mend(),
            )
        if library and not _agree(library.code, code):
            raise ToolchainError(
                f"NCCL headers are {headers.version} ({include}, {found}), the loaded library is {library.version} "
                f"({library.path}), and they must be of one release",
                f"set NCCL_HOME to the folder of {library.version}, or {nccl_mend()}",
            )
        return headers
    raise ToolchainError(f"no NCCL headers ({'; '.join(missed)})", nccl_mend())


class _Address(ctypes.Structure):
    """`Dl_info` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def loaded_nccl() -> NcclLibrary | None:
    """The NCCL that this process has loaded (torch's CUDA builds load it), `None` = none.

    Of several (a preloaded one and torch's own) the one that the loader finds by name, as the runtime and torch do.
    """
    try:
        version = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOW | os.RTLD_NOLOAD).ncclGetVersion
    except (OSError, AttributeError):  # none, or not NCCL but something named like it
        return None
    where, code = _Address(), ctypes.c_int()
    if not ctypes.CDLL(None).dladdr(ctypes.cast(version, ctypes.c_void_p), ctypes.byref(where)) or not where.file:
        return None
    version(ctypes.byref(code))
    return NcclLibrary(Path(os.fsdecode(where.file)).resolve(), code.value)


def loaded_nccl_version() -> str:
    """Such as "2.30.7"; "none" where none is loaded. torch tells of the one that it was built with instead."""
    loaded = loaded_nccl()
    return "none" if loaded is None else loaded.version


def nccl_mend() -> str:
    """The command that brings an NCCL that will do."""
    return f"pip install 'nvidia-nccl-cu{_cuda().split('.')[0]}>=2.30.5'" + _or_make("NCCL_HOME", "nccl")


def wheel_folders(name: str) -> list[Path]:
    """Folders that match the pattern `name` below the `nvidia` package of pip wheels, highest first."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else spec.submodule_search_locations or []
    return sorted((folder for place in places for folder in Path(place).glob(name)), key=_number, reverse=True)


def _nvcc_places() -> list[tuple[Path | None, str]]:
    """Where nvcc may be, in order, with words for it; `None` = nothing to look at there."""
    named = [(Path(os.environ[key]) / "bin/nvcc", f"{key}={os.environ[key]}") for key in _set("CUDA_HOME", "CUDA_PATH")]
    wheels: list[tuple[Path | None, str]] = [(f / "bin/nvcc", "pip wheels") for f in wheel_folders("cu[0-9]*")]
    on_path = shutil.which("nvcc")
    local = [_LOCAL / "cuda", *sorted(_LOCAL.glob("cuda-*"), key=_number, reverse=True)]
    return [
        *named,
        *(wheels or [(None, "pip wheels")]),
        (Path(on_path) if on_path else None, "PATH"),
        *((folder / "bin/nvcc", str(folder)) for folder in local),
    ]


def _nccl_places(library: NcclLibrary | None) -> list[tuple[Path, str]]:
    places = []
    if library:
        # /usr/lib/x86_64-linux-gnu/libnccl.so.2 goes with /usr/include, nccl/lib/libnccl.so.2 with nccl/include.
        root = next((p.parent for p in library.path.parents if p.name in ("lib", "lib64")), library.path.parent)
        places.append((root / "include", "beside the loaded library"))
    places += [(Path(os.environ[key]) / "include", f"{key}={os.environ[key]}") for key in _set("NCCL_HOME")]
    places += [(folder / "include", "pip wheel") for folder in wheel_folders("nccl")]
    return [*places, (SYSTEM_INCLUDE, "system")]


def _but(found: str, missed: list[str]) -> str:
    """`found`, with what the user named but does not hold what it should, and what is there but can't be used."""
    odd = [what for what in missed if what.startswith(("CUDA_", "NCCL_")) or " has n" not in what]
    return "; ".join([found, *odd])


def _set(*keys: str) -> list[str]:
    return [key for key in keys if os.environ.get(key)]


def _missing_parts(root: Path) -> list[str]:
    return [wheel for part, wheel in _WHEEL_PARTS.items() if not (root / part).exists()]


def _cuda() -> str:
    """CUDA release of torch, or the newest major one that the wheels are made for where torch has none."""
    return torch.version.cuda or "13"


def _nvcc_mend() -> str:
    cuda = _cuda()
    if int(cuda.split(".")[0]) < 13:
        # The wheels for CUDA 12 have ptxas but not nvcc.
        return f"install the CUDA toolkit {cuda} and set CUDA_HOME to it"
    wheels = " ".join(f"'{name}=={cuda}.*'" for name in ("nvidia-cuda-nvcc", *_WHEEL_PARTS.values()))
    return f"pip install {wheels}, or set CUDA_HOME to a CUDA toolkit" + _or_make("CUDA_HOME", "cu13")


def _or_make(variable: str, folder: str) -> str:
    if not (CHECKOUT / "cuda-wheels.txt").is_file():
        return ""
    return f", or `make cuda-headers` in {CHECKOUT}, and set {variable}={CHECKOUT}/build/cuda/nvidia/{folder}"


def _number(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _agree(library: int, headers: int) -> bool:
    return library == headers or (headers >= _STABLE_NCCL and library >= headers)


def _nccl_code(include: Path) -> int | None:
    try:
        text = (include / "nccl.h").read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"^#define\s+NCCL_VERSION_CODE\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None


@functools.cache
def _version(path: Path, flag: str, pattern: str) -> str | None:
    """What the program says its version is; `None` = it does not run."""
    try:
        run = subprocess.run([path, flag], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(pattern, run.stdout)
    return match[1] if match and run.returncode == 0 else None
