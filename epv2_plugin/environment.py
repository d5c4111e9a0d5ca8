"""What there is on this machine that communication depends on, as plain data: for `epv2 doctor` and issue reports.

Nothing here imports a framework, starts a CUDA context in this process, or waits for more than a few seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import epv2_plugin
from epv2_plugin.elastic.backends.cuda_p2p import check_connections
from epv2_plugin.elastic.backends.device import BUILD_EXTENSION
from epv2_plugin.elastic.errors import UnavailableError
from epv2_plugin.jit import compiler, kernels, toolchain

PACKAGES = ("megatron-core", "torchtitan", "transformer-engine", "numpy", "pydantic")
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "CUDA_", "NVCC_", "EPV2_", "MASTER_", "PYTORCH_", "GLOO_")
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_CACHE_HOME")
_SECONDS = 10  # a driver or daemon that hangs must not take the report with it
_BUILD = f"{BUILD_EXTENSION} in a checkout of the plugin"
PLUGIN_VARIABLE = "NCCL_RMA_PLUGIN"

# Asks the driver itself: torch without CUDA can't, and a driver that hangs is better met in a process of its own.
# 16 = SMs, 75 and 76 = compute capability, from cuda.h.
_GPU_PROBE = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *args):
    code = getattr(cuda, name)(*args)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        raise SystemExit(f"{name}: {(text.value or b'').decode() or code}")
def number(name, *args, kind=ctypes.c_int):
    value = kind()
    call(name, ctypes.byref(value), *args)
    return value.value
call("cuInit", 0)
gpus = []
for index in range(number("cuDeviceGetCount")):
    device = number("cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, 256, device)
    sms, major, minor = (number("cuDeviceGetAttribute", what, device) for what in (16, 75, 76))
    size = number("cuDeviceTotalMem_v2", device, kind=ctypes.c_size_t)
    gpus.append(dict(name=name.value.decode(), sms=sms, capability=[major, minor], memory_bytes=size))
print(json.dumps(dict(gpus=gpus, cuda=number("cuDriverGetVersion"))))
"""


def gather() -> dict[str, Any]:
    """All facts by section, ready for JSON: `versions`, `machine`, `gpus`, `toolchain`, `nccl_library`, `extension`,
    `rma_loopback`, `cache`, `mps`, `network`, `topology`, `environment`, and `verdict` (see `verdict`)."""
    gpus = find_gpus()
    facts: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "gpus": gpus,
        "toolchain": _toolchain(),
        "nccl_library": _nccl_library(),
        "extension": _extension(),
        "rma_loopback": find_loopback(),
        "cache": _cache(gpus["devices"]),
        "mps": find_mps(),
        "network": _network(),
        "topology": _run("nvidia-smi", "topo", "-m"),
        "environment": {
            key: value for key, value in sorted(os.environ.items()) if key.startswith(_PREFIXES) or key in _VARIABLES
        },
    }
    return facts | {"verdict": verdict(facts)}


def verdict(facts: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """What keeps each backend from running here, and where `cuda` can, its `transfers` (between stages, of keys and
    values, of FSDP2): `reason` and `mend` each, an empty list = nothing.

    Args:
        facts: of `gather`.
    """
    host = [] if facts["machine"]["gloo"] else [("torch has no gloo", "install a torch build with torch.distributed")]
    cuda: list[tuple[str, str]] = []
    gpus, cache = facts["gpus"], facts["cache"]
    if gpus["error"]:
        cuda.append((f"no usable GPU ({gpus['error']})", "run on a machine with an NVIDIA GPU and driver"))
    old = [gpu for gpu in gpus["devices"] if gpu["capability"] < [*divmod(compiler.MIN_ARCH, 10)]]
    cuda += [(f"GPU {gpu['index']}, {gpu['name']}, is too old", "Hopper (sm_90) or newer is needed") for gpu in old]
    torch_cuda, driver_cuda = facts["versions"]["torch_cuda"], gpus["driver_cuda"]
    if torch_cuda and driver_cuda and _major(driver_cuda) < _major(torch_cuda):
        mend = f"a newer driver, or a torch build for CUDA {_major(driver_cuda)}"
        cuda.append((f"the driver runs CUDA up to {driver_cuda}, torch is built for {torch_cuda}", mend))
    if torch_cuda is None:
        wanted = "https://download.pytorch.org/whl/cu130"
        cuda.append(
            (f"torch {facts['versions']['torch']} is built without CUDA", f"pip install torch --index-url {wanted}")
        )
    tools = facts["toolchain"]
    needed = [facts["extension"], tools["nccl_headers"]]
    if not cache["complete"]:
        needed += [tools["nvcc"], tools["gxx"]]
    cuda += [(entry["error"], entry["mend"]) for entry in needed if "error" in entry]
    if not cache["complete"] and not cache["writable"]:
        cuda.append(
            (f"the kernel cache {cache['folder']} can't be written", "set EPV2_CACHE to a folder that can be written")
        )
    found = {"host": host, "cuda": cuda}
    if not cuda:
        try:
            check_connections(facts["environment"])
            found["transfers"] = []
        except UnavailableError as error:
            reason, _, mend = str(error).partition("; ")
            found["transfers"] = [(reason, mend)]
    return {name: [{"reason": reason, "mend": mend} for reason, mend in problems] for name, problems in found.items()}


def cpus_allowed() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _major(release: str) -> int:
    return int(release.split(".")[0])


def _versions() -> dict[str, str | None]:
    return {
        "epv2_plugin": _version("epv2_plugin"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that the plugin is imported from, with "+changes" if files differ from it."""
    root = Path(epv2_plugin.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    commit = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changes = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changes else "")


def memory_bytes() -> int:
    """Main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _machine() -> dict[str, Any]:
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    return {
        "os": system,
        "kernel": f"{platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "cpus_allowed": cpus_allowed(),
        "memory_bytes": memory_bytes(),
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        # GPUDirect RDMA and the mapping that NCCL's GIN can use.
        "modules": [name for name in ("nvidia_peermem", "gdrdrv") if Path("/sys/module", name).is_dir()],
    }


def find_gpus() -> dict[str, Any]:
    """`devices`, `driver`, `driver_cuda` (newest CUDA that it runs), `error` (why there are none)."""
    found: dict[str, Any] = {"devices": [], "driver": _driver(), "driver_cuda": None, "error": None}
    try:
        run = subprocess.run(
            [sys.executable, "-IS", "-c", _GPU_PROBE], capture_output=True, text=True, timeout=3 * _SECONDS
        )
    except subprocess.TimeoutExpired:
        return found | {"error": f"the driver gave no answer in {3 * _SECONDS} s"}
    if run.returncode != 0:
        said = run.stderr.strip().splitlines()
        reason = "no NVIDIA driver" if "libcuda.so.1" in run.stderr else said[-1] if said else "the probe died"
        return found | {"error": reason}
    answer = json.loads(run.stdout)
    found["driver_cuda"] = f"{answer['cuda'] // 1000}.{answer['cuda'] % 1000 // 10}"
    found["devices"] = [{"index": index, **gpu} for index, gpu in enumerate(answer["gpus"])]
    if not found["devices"]:
        found["error"] = "the driver shows no device"
    return found


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", text)
    return match[1] if match else None


def _toolchain() -> dict[str, dict[str, str]]:
    """`nvcc`, `gxx`, `nccl_headers`: `path`, `version`, `found`, or `error` and `mend`."""

    def ask(find: Callable[[], Any]) -> dict[str, str]:
        try:
            tool = find()
        except toolchain.ToolchainError as error:
            return {"error": error.reason, "mend": error.mend}
        path = tool.include if isinstance(tool, toolchain.NcclHeaders) else tool.path
        return {"path": str(path), "version": tool.version, "found": tool.found}

    return {
        "nvcc": ask(toolchain.find_nvcc),
        "gxx": ask(toolchain.find_gxx),
        "nccl_headers": ask(toolchain.find_nccl),
    }


def _nccl_library() -> dict[str, str]:
    """`path` and `version` of the NCCL that torch has loaded; nothing where it has none."""
    library = toolchain.loaded_nccl()
    return {} if library is None else {"path": str(library.path), "version": library.version}


def _extension() -> dict[str, str]:
    """`epv2_plugin._C`: `path`, or `error` and `mend`."""
    try:
        module = importlib.import_module("epv2_plugin._C")
    except ModuleNotFoundError:
        return {"error": "epv2_plugin._C is not built", "mend": _BUILD}
    except Exception as error:  # whatever its native code raises is what the report is for
        return {"error": f"epv2_plugin._C can't be imported ({' '.join(str(error).split())})", "mend": _BUILD}
    return {"path": str(module.__file__)}


def find_loopback() -> dict[str, str]:
    """NCCL's loopback (`csrc/rma_loopback`): `path`, or `error` and `mend`; `set`: what NCCL_RMA_PLUGIN names."""
    spec = importlib.util.find_spec("epv2_plugin._rma_loopback")
    found = {"error": "not built", "mend": _BUILD}
    if spec is not None and spec.origin is not None:
        found = {"path": spec.origin}
    named = os.environ.get(PLUGIN_VARIABLE)
    return found | ({"set": named} if named else {})


def _cache(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """`folder`, `writable` (or can be made), `cubins`, `bytes`, `complete` (holds every kernel for these GPUs)."""
    folder = compiler.cache_folder()
    sizes = [path.stat().st_size for path in folder.glob("*/kernel.cubin")]
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        archs = {compiler.device_arch(*gpu["capability"]) for gpu in gpus}
        complete = bool(archs) and all(compiler.cached(kernel, arch) for kernel in kernels.KERNELS for arch in archs)
    except (toolchain.ToolchainError, FileNotFoundError):
        complete = False
    return {
        "folder": str(folder),
        "writable": _can_be_written(nearest),
        "cubins": len(sizes),
        "bytes": sum(sizes),
        "complete": complete,
    }


def _can_be_written(folder: Path) -> bool:
    """Tried, because permissions alone don't tell: /proc refuses root, too, and so does a read-only mount."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False


def find_mps() -> str:
    """Whether this process would be a client of CUDA's multi-process service."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    try:
        pid = int((folder / "nvidia-cuda-mps-control.pid").read_text())
    except (OSError, ValueError):
        return f"no daemon in {folder}"
    return f"daemon {pid} in {folder}" if Path(f"/proc/{pid}").exists() else f"dead daemon {pid} in {folder}"


def _network() -> dict[str, list[dict[str, Any]]]:
    """`infiniband` ports (`name`, `port`, `rate`, `state`, `link`) and `ethernet` devices (`name`, `mbit_per_s`)."""

    def read(path: Path) -> str | None:
        try:
            return path.read_text().strip() or None
        except OSError:  # the speed of a device that is down, or has none
            return None

    ports = [
        {
            "name": port.parent.parent.name,
            "port": port.name,
            "rate": read(port / "rate"),
            "state": read(port / "state"),
            "link": read(port / "link_layer"),
        }
        for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    ]
    devices = []
    for device in sorted(Path("/sys/class/net").glob("*")):
        if device.name == "lo" or read(device / "operstate") == "down":
            continue
        speed = read(device / "speed")
        devices.append({"name": device.name, "mbit_per_s": int(speed) if speed and int(speed) > 0 else None})
    return {"infiniband": ports, "ethernet": devices}


def _run(*command: str) -> str | None:
    """What a program prints; `None` = it is not here, fails or hangs."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.rstrip() if run.returncode == 0 else None
