"""`epv2 doctor`: this machine's report, reports of other machines from their facts, and its JSON."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from epv2_plugin import environment
from epv2_plugin.cli import doctor, main
from epv2_plugin.jit import compiler, kernels, toolchain
from epv2_plugin.jit.kernels import Kernel

# A node where everything is there.
NODE: dict[str, Any] = {
    "versions": {
        "epv2_plugin": "0.1.0",
        "commit": "0123456789ab+changes",
        "python": "3.12.1",
        "torch": "2.14.0+cu130",
        "torch_cuda": "13.0",
        "megatron-core": "0.19.2",
        "torchtitan": None,
    },
    "machine": {
        "os": "Ubuntu 24.04",
        "kernel": "6.8.0 x86_64",
        "cpus": 192,
        "cpus_allowed": 16,
        "memory_bytes": 2048 << 30,
        "shared_memory_bytes": 64 << 20,
        "gloo": True,
        "modules": ["nvidia_peermem"],
    },
    "gpus": {
        "devices": [
            {"index": 0, "name": "NVIDIA H200", "sms": 132, "capability": [9, 0], "memory_bytes": 140 << 30},
            {"index": 1, "name": "NVIDIA H200", "sms": 132, "capability": [9, 0], "memory_bytes": 140 << 30},
        ],
        "driver": "580.95.05",
        "driver_cuda": "13.0",
        "error": None,
    },
    "toolchain": {
        "nvcc": {"path": "/cuda/bin/nvcc", "version": "13.0.88", "found": "CUDA_HOME=/cuda"},
        "gxx": {"path": "/usr/bin/g++", "version": "13.2.0", "found": "PATH"},
        "nccl_headers": {"path": "/nccl/include", "version": "2.30.7", "found": "beside the loaded library"},
    },
    "nccl_library": {"path": "/nccl/lib/libnccl.so.2", "version": "2.30.7"},
    "extension": {"path": "/epv2_plugin/_C.so"},
    "rma_loopback": {"path": "/epv2_plugin/_rma_loopback.so"},
    "cache": {"folder": "/cache", "writable": True, "cubins": 12, "bytes": 3 << 20, "complete": False},
    "mps": "no daemon in /tmp/nvidia-mps",
    "network": {
        "infiniband": [
            {"name": "mlx5_0", "port": "1", "rate": "400 Gb/sec (4X NDR)", "state": "4: ACTIVE", "link": "InfiniBand"},
            {"name": "mlx5_1", "port": "1", "rate": None, "state": None, "link": "Ethernet"},
        ],
        "ethernet": [{"name": "eth0", "mbit_per_s": 100000}, {"name": "eth1", "mbit_per_s": None}],
    },
    "topology": "\tGPU0\tGPU1\nGPU0\t X \tNV18",
    "environment": {"NCCL_DEBUG": "INFO"},
}


def problems(changes: dict[str, Any]) -> list[str]:
    """Verdict lines for `cuda` on a node whose facts differ by `changes` ("section.key" -> value)."""
    facts = copy.deepcopy(NODE)
    for key, value in changes.items():
        *path, last = key.split(".")
        place = facts
        for part in path:
            place = place[part]
        place[last] = value
    found = environment.verdict(facts)
    assert found["host"] == []
    assert ("transfers" in found) == (not found["cuda"])
    return [f"{problem['reason']}: {problem['mend']}" for problem in found["cuda"]]


def test_this_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EPV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert main(["doctor", "--json", str(tmp_path / "facts.json")]) == 0
    text = capsys.readouterr().out
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert text.rstrip() == doctor.report(facts)
    assert text.startswith("```\nversions\n")
    assert text.endswith("```\n")
    assert f"  torch                {facts['versions']['torch']} (CUDA " in text
    assert "  NCCL_DEBUG=WARN" in text
    assert "hunter2" not in text + json.dumps(facts)
    assert "  host backend: ok\n" in text
    assert f"{tmp_path}/cache, writable, 0 cubins, 0.0 MiB" in text
    assert facts["machine"]["cpus"] >= facts["machine"]["cpus_allowed"] >= 1
    assert not (tmp_path / "cache").exists()


def test_without_a_gpu_the_verdict_says_so(monkeypatch):
    monkeypatch.setattr(environment, "_GPU_PROBE", "raise OSError('libcuda.so.1: cannot open shared object file')")
    facts = environment.gather()
    assert facts["gpus"]["error"] == "no NVIDIA driver"
    text = doctor.report(facts)
    assert "gpus                 none (no NVIDIA driver)\n" in text
    needed = "run on a machine with an NVIDIA GPU and driver"
    assert f"cuda backend: not here: no usable GPU (no NVIDIA driver): {needed}\n" in text


def test_a_driver_that_fails_or_hangs_does_not_take_the_report_with_it(monkeypatch):
    monkeypatch.setattr(environment, "_GPU_PROBE", "raise SystemExit('cuInit: CUDA_ERROR_NO_DEVICE')")
    assert environment.find_gpus()["error"] == "cuInit: CUDA_ERROR_NO_DEVICE"
    monkeypatch.setattr(environment, "_GPU_PROBE", "import os; os.abort()")
    assert environment.find_gpus()["error"] == "the probe died"
    monkeypatch.setattr(environment, "_GPU_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(environment, "_SECONDS", 0.1)
    assert "gave no answer" in environment.find_gpus()["error"]


FAKE_CUDA = """
#include <cstring>
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int index) { *device = 7 + index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, device == 7 ? "Fake GPU" : "?", size); return 0; }
int cuDeviceGetAttribute(int* value, int what, int) { *value = what == 16 ? 132 : what == 75 ? 10 : 3; return 0; }
int cuDeviceTotalMem_v2(size_t* size, int) { *size = size_t(96) << 30; return 0; }
int cuDriverGetVersion(int* version) { *version = 13020; return 0; }
int cuGetErrorName(int, const char** text) { *text = "?"; return 0; }
}
"""


def test_gpus_are_asked_of_the_driver(tmp_path, monkeypatch):
    (tmp_path / "cuda.cc").write_text(FAKE_CUDA)
    command = ["g++", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.cc"]
    try:
        subprocess.run(command, check=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no g++")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    gpus = environment.find_gpus()
    device = {"index": 0, "name": "Fake GPU", "sms": 132, "capability": [10, 3], "memory_bytes": 96 << 30}
    assert (gpus["devices"], gpus["driver_cuda"], gpus["error"]) == ([device], "13.2", None)


def test_the_report_of_a_node():
    facts = NODE | {"verdict": environment.verdict(NODE)}
    text = doctor.report(facts)
    for line in (
        "  epv2_plugin          0.1.0, commit 0123456789ab+changes",
        "  torch                2.14.0+cu130 (CUDA 13.0)",
        "  torchtitan           not installed",
        "  cpus                 192, 16 allowed",
        "  memory               2048.0 GiB, /dev/shm 0.1 GiB",
        "  modules              nvidia_peermem",
        "  gpu 1                NVIDIA H200, 132 SMs, 140.0 GiB, compute capability 9.0",
        "  driver               580.95.05, runs CUDA up to 13.0",
        "  nvcc                 13.0.88, /cuda/bin/nvcc (CUDA_HOME=/cuda)",
        "  nccl headers         2.30.7, /nccl/include (beside the loaded library)",
        "  nccl library         2.30.7, /nccl/lib/libnccl.so.2",
        "  epv2_plugin._C       /epv2_plugin/_C.so",
        "  rma loopback         /epv2_plugin/_rma_loopback.so (unused, as NCCL_RMA_PLUGIN is not set)",
        "  kernel cache         /cache, writable, 12 cubins, 3.0 MiB",
        "  mlx5_0 port 1        400 Gb/sec (4X NDR), 4: ACTIVE, InfiniBand",
        "  mlx5_1 port 1        no rate, no state, Ethernet",
        "  eth0                 100 Gb/s",
        "  eth1                 unknown rate",
        "  GPU0\t X \tNV18",
        "  NCCL_DEBUG=INFO",
        "  host backend: ok",
        "  cuda backend: ok",
        "  pipeline, context and FSDP2 of the cuda backend: not here: CUDA_DEVICE_MAX_CONNECTIONS=(unset): transfers "
        "wait for each other on streams of their own, which would share queues and never end: set it to 32 (10 at "
        "least) before the process uses the device; ranks that share a device can have 96 together",
    ):
        assert line in text.splitlines()
    assert problems({}) == []


def test_reasons_against_cuda_come_with_what_mends_them():
    absent = {"error": "no nvcc", "mend": "pip install nvcc"}
    full = {"cache.writable": False}
    assert problems({"toolchain.nvcc": absent}) == ["no nvcc: pip install nvcc"]
    assert problems(full) == [
        "the kernel cache /cache can't be written: set EPV2_CACHE to a folder that can be written"
    ]
    # Built ahead of time, nothing is left to be compiled or written.
    assert problems({"toolchain.nvcc": absent, "toolchain.gxx": absent, "cache.complete": True} | full) == []
    assert problems({"toolchain.nccl_headers": absent, "cache.complete": True}) == ["no nvcc: pip install nvcc"]
    assert problems({"extension": {"error": "not built", "mend": "build it"}}) == ["not built: build it"]
    assert problems({"versions.torch_cuda": None, "versions.torch": "2.13.0+cpu"}) == [
        "torch 2.13.0+cpu is built without CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu130"
    ]
    assert problems({"gpus.driver_cuda": "12.8"}) == [
        "the driver runs CUDA up to 12.8, torch is built for 13.0: a newer driver, or a torch build for CUDA 12"
    ]
    old = NODE["gpus"]["devices"][0] | {"name": "NVIDIA A100", "capability": [8, 0]}
    assert problems({"gpus.devices": [old]}) == ["GPU 0, NVIDIA A100, is too old: Hopper (sm_90) or newer is needed"]


def test_a_cache_is_complete_when_it_holds_every_kernel_for_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("EPV2_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "KERNELS", (Kernel("peek", "ep/peek.cu", "PeekArgs"),))
    held = {"sm_90a"}
    monkeypatch.setattr(compiler, "cached", lambda kernel, arch: arch in held or None)
    (hopper,) = NODE["gpus"]["devices"][:1]
    blackwell = hopper | {"capability": [10, 0]}
    assert environment._cache([hopper])["complete"]
    assert not environment._cache([hopper, blackwell])["complete"]
    assert not environment._cache([])["complete"]

    def lacks(kernel: Kernel, arch: str) -> None:
        raise toolchain.ToolchainError("no NCCL headers", "pip install nccl")

    monkeypatch.setattr(compiler, "cached", lacks)
    assert not environment._cache([hopper])["complete"]
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry/kernel.cubin").write_bytes(bytes(100))
    assert (environment._cache([])["cubins"], environment._cache([])["bytes"]) == (1, 100)
    for folder in ("/dev/null/cache", "/proc/x"):  # root may write to every folder, but not make something in this one
        monkeypatch.setenv("EPV2_CACHE", folder)
        assert not environment._cache([])["writable"]


def test_the_extension(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "epv2_plugin._C", None)  # what Python puts there for a module that is not there
    assert environment._extension()["error"] == "epv2_plugin._C is not built"

    def broken(name: str) -> None:
        raise ImportError("undefined symbol:\n ncclDevCommCreate")

    monkeypatch.setattr(environment.importlib, "import_module", broken)
    entry = environment._extension()
    assert entry["error"] == "epv2_plugin._C can't be imported (undefined symbol: ncclDevCommCreate)"
    assert "pip install" in entry["mend"]


def test_the_loopback(monkeypatch):
    monkeypatch.setenv("NCCL_RMA_PLUGIN", "/elsewhere.so")
    facts = NODE | {"rma_loopback": {"error": "not built", "mend": "build it", "set": "/elsewhere.so"}}
    facts["verdict"] = environment.verdict(NODE)
    assert "  rma loopback         not built: build it (NCCL_RMA_PLUGIN=/elsewhere.so)" in doctor.report(facts)
    assert environment.find_loopback()["set"] == "/elsewhere.so"
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("NCCL_RMA_PLUGIN")
    assert environment.find_loopback() == {
        "error": "not built",
        "mend": f"{environment.BUILD_EXTENSION} in a checkout of the plugin",
    }


def test_mps(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert environment.find_mps() == f"no daemon in {tmp_path}"
    pid_file = tmp_path / "nvidia-cuda-mps-control.pid"
    pid_file.write_text("1\n")
    assert environment.find_mps() == f"daemon 1 in {tmp_path}"
    pid_file.write_text("4194305\n")  # above the largest pid
    assert environment.find_mps() == f"dead daemon 4194305 in {tmp_path}"


def test_commit_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.epv2_plugin, "__file__", str(tmp_path / "epv2_plugin/__init__.py"))
    assert environment._commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one", "--allow-empty"]):
        subprocess.run([*git, *words], check=True, timeout=60)
    first = environment._commit()
    assert first is not None
    assert len(first) == 12
    (tmp_path / "file").touch()
    subprocess.run([*git, "add", "file"], check=True, timeout=60)
    assert environment._commit() == f"{first}+changes"


def test_a_json_file_that_can_not_be_written(capsys):
    path = Path("/dev/null/facts.json")
    assert main(["doctor", "--json", str(path)]) == 2
    assert capsys.readouterr().err == f"epv2: --json = '{path}': can't be written: Not a directory\n"


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--json FILE", "issue report", "what mends it"):
        assert part in text
