"""jit/toolchain.py: the order in which compilers and headers are found, and errors that say what mends them."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from epv2_plugin.jit import toolchain
from epv2_plugin.jit.toolchain import NcclLibrary, ToolchainError


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without compilers, CUDA or NCCL; returns an empty folder."""
    for key in ("CUDA_HOME", "CUDA_PATH", "NCCL_HOME", "NVCC_CCBIN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolchain, "_LOCAL", tmp_path / "local")
    monkeypatch.setattr(toolchain, "SYSTEM_INCLUDE", tmp_path / "system")
    monkeypatch.setattr(toolchain, "CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(toolchain, "loaded_nccl", lambda: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(toolchain.torch.version, "cuda", None)
    return tmp_path


def program(path: Path, says: str, code: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    path.chmod(0o755)
    return path


def nvcc(folder: Path, version: str = "13.0.88") -> Path:
    return program(folder / "bin/nvcc", f"Cuda compilation tools, release 13.0, V{version}")


def wheels(site: Path, *leave_out: str) -> Path:
    root = site / "nvidia/cu13"
    nvcc(root, "13.1.1")
    for part, wheel in toolchain._WHEEL_PARTS.items():
        if wheel not in leave_out:
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            (root / part).touch()
    return root / "bin/nvcc"


def headers(include: Path, code: int = 23007, device: bool = True) -> Path:
    include.mkdir(parents=True)
    (include / "nccl.h").write_text(f"#define NCCL_MAJOR 2\n#define NCCL_VERSION_CODE {code}\n")
    if device:
        (include / "nccl_device.h").touch()
    return include


def test_in_a_checkout_make_mends_it(bare):
    (bare / "checkout").mkdir()
    (bare / "checkout/cuda-wheels.txt").touch()
    made = f"or `make cuda-headers` in {bare}/checkout, and set "
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_nccl()
    assert caught.value.mend.endswith(f"{made}NCCL_HOME={bare}/checkout/build/cuda/nvidia/nccl")
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_nvcc()
    assert caught.value.mend.endswith(f"{made}CUDA_HOME={bare}/checkout/build/cuda/nvidia/cu13")


def test_the_checkout_is_this_one():
    assert (toolchain.CHECKOUT / "cuda-wheels.txt").is_file()


def test_nvcc_is_looked_for_in_this_order(bare, monkeypatch):
    places = {
        str(bare / "local/cuda-12.9"): nvcc(bare / "local/cuda-12.9", "12.9.1"),
        str(bare / "local/cuda-13.2"): nvcc(bare / "local/cuda-13.2", "13.2.1"),
        str(bare / "local/cuda"): nvcc(bare / "local/cuda"),
        "PATH": program(bare / "path/nvcc", "release 13.0, V13.0.1"),
        "pip wheels": wheels(bare / "site"),
        f"CUDA_PATH={bare}/b": nvcc(bare / "b"),
        f"CUDA_HOME={bare}/a": nvcc(bare / "a"),
    }
    monkeypatch.setenv("CUDA_HOME", str(bare / "a"))
    monkeypatch.setenv("CUDA_PATH", str(bare / "b"))
    for found, path in reversed(places.items()):
        if found.endswith("12.9"):
            assert toolchain.find_nvcc().version == "12.9.1"
        tool = toolchain.find_nvcc()
        named = [f"{key} has none" for key in places if key.startswith("CUDA_") and not places[key].exists()]
        assert (tool.found, tool.path) == ("; ".join([found, *named[::-1]]), path)
        path.unlink()
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_nvcc()
    for found in places:
        assert f"{found} has none" in caught.value.reason


def test_no_nvcc_says_what_mends_it(bare, monkeypatch):
    with pytest.raises(ToolchainError, match=r"no nvcc \(pip wheels has none; PATH has none; ") as caught:
        toolchain.find_nvcc()
    assert caught.value.mend.startswith("pip install 'nvidia-cuda-nvcc==13.*' 'nvidia-nvvm==13.*'")
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    monkeypatch.setattr(toolchain.torch.version, "cuda", "12.8")
    with pytest.raises(ToolchainError, match=r"install the CUDA toolkit 12.8 and set CUDA_HOME to it"):
        toolchain.find_nvcc()


def test_an_nvcc_that_can_not_run_is_passed_over(bare, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(bare / "a"))
    program(bare / "a/bin/nvcc", "release 13.0, V13.0.1", code=1)
    (bare / "path").mkdir()
    (bare / "path/nvcc").mkdir()
    with pytest.raises(ToolchainError, match=f"{bare}/a/bin/nvcc does not run; "):
        toolchain.find_nvcc()
    nvcc(bare / "local/cuda")
    assert toolchain.find_nvcc().found == f"{bare}/local/cuda; {bare}/a/bin/nvcc does not run"


def test_wheels_that_lack_a_part_name_it(bare):
    wheels(bare / "site", "nvidia-cuda-crt", "nvidia-cuda-cccl")
    with pytest.raises(ToolchainError, match="pip wheels lack nvidia-cuda-crt, nvidia-cuda-cccl; "):
        toolchain.find_nvcc()


def test_the_newest_wheel_folder_is_first(bare):
    for name in ("cu12", "cu13", "nccl"):
        (bare / "site/nvidia" / name).mkdir(parents=True)
    assert [folder.name for folder in toolchain.wheel_folders("cu[0-9]*")] == ["cu13", "cu12"]


def test_the_host_compiler(bare, monkeypatch):
    with pytest.raises(ToolchainError, match=r"no g\+\+ on PATH: apt-get install g\+\+"):
        toolchain.find_gxx()
    path = program(bare / "path/g++", "12.2.0")
    assert toolchain.find_gxx() == toolchain.Tool(path, "12.2.0", "PATH")
    monkeypatch.setenv("NVCC_CCBIN", str(program(bare / "mine/g++-13", "13.1.0")))
    assert (toolchain.find_gxx().version, toolchain.find_gxx().found) == ("13.1.0", "NVCC_CCBIN")
    monkeypatch.setenv("NVCC_CCBIN", "nope")
    with pytest.raises(ToolchainError, match="NVCC_CCBIN=nope is not a program"):
        toolchain.find_gxx()
    monkeypatch.setenv("NVCC_CCBIN", str(program(bare / "mine/broken", "", code=1)))
    with pytest.raises(ToolchainError, match=r"broken \(NVCC_CCBIN\) does not run"):
        toolchain.find_gxx()


def test_nccl_headers_are_looked_for_in_this_order(bare, monkeypatch):
    library = NcclLibrary(bare / "usr/lib/x86_64-linux-gnu/libnccl.so.2", 23007)
    monkeypatch.setattr(toolchain, "loaded_nccl", lambda: library)
    monkeypatch.setenv("NCCL_HOME", str(bare / "home"))
    places = {
        "system": headers(bare / "system"),
        "pip wheel": headers(bare / "site/nvidia/nccl/include"),
        f"NCCL_HOME={bare}/home": headers(bare / "home/include"),
        "beside the loaded library": headers(bare / "usr/include"),
    }
    for found, include in reversed(places.items()):
        nccl = toolchain.find_nccl()
        home = f"; NCCL_HOME={bare}/home has no nccl.h in {bare}/home/include"
        passed_home = found in ("system", "pip wheel")
        assert (nccl.found, nccl.include, nccl.version) == (found + home * passed_home, include, "2.30.7")
        shutil.rmtree(include)
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_nccl()
    assert caught.value.mend == "pip install 'nvidia-nccl-cu13>=2.30.5'"
    for found, include in places.items():
        assert f"{found} has no nccl.h in {include}" in caught.value.reason


def test_nccl_that_is_too_old(bare, monkeypatch):
    monkeypatch.setenv("NCCL_HOME", str(bare))
    monkeypatch.setattr(toolchain.torch.version, "cuda", "12.8")
    include = headers(bare / "include", 22907)
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_nccl()
    assert str(caught.value) == (
        f"NCCL 2.29.7 ({include}, NCCL_HOME={bare}) has no device API for these kernels: 2.30.0 or newer is needed: "
        "pip install 'nvidia-nccl-cu12>=2.30.5'"
    )


def test_nccl_without_the_device_header(bare, monkeypatch):
    monkeypatch.setenv("NCCL_HOME", str(bare))
    headers(bare / "include", device=False)
    with pytest.raises(ToolchainError, match=r"NCCL 2.30.7 .* has no device API"):
        toolchain.find_nccl()


@pytest.mark.parametrize(
    ("library", "code", "agree"),
    [(23007, 23007, True), (23004, 23007, False), (23102, 23007, False), (23203, 23100, True), (23100, 23203, False)],
)
def test_headers_must_be_those_of_the_loaded_library(bare, monkeypatch, library, code, agree):
    monkeypatch.setattr(toolchain, "loaded_nccl", lambda: NcclLibrary(bare / "lib/libnccl.so.2", library))
    monkeypatch.setenv("NCCL_HOME", str(bare / "home"))
    headers(bare / "home/include", code)
    if agree:
        assert toolchain.find_nccl().code == code
        return
    with pytest.raises(ToolchainError, match="they must be of one release: set NCCL_HOME to the folder of") as caught:
        toolchain.find_nccl()
    for version in (toolchain.nccl_version(library), toolchain.nccl_version(code)):
        assert version in caught.value.reason


def test_the_loaded_library_is_seen(tmp_path):
    """Of two, such as a preloaded one and torch's own, the one that came first, as for the linker."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    libraries = []
    for name, version in (("first", 23007), ("second", 22809)):
        source = tmp_path / f"{name}.cc"
        source.write_text(f'extern "C" int ncclGetVersion(int* version) {{ *version = {version}; return 0; }}\n')
        library = tmp_path / name / "lib" / "libnccl.so.2"
        library.parent.mkdir(parents=True)
        command = ["g++", "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-o", library, source]
        subprocess.run(command, check=True, timeout=60)
        headers(tmp_path / name / "include", version)
        libraries.append(library)
    script = "import ctypes, sys; [ctypes.CDLL(path) for path in sys.argv[1:]]; "
    script += "from epv2_plugin.jit import toolchain as t; print(t.loaded_nccl().version, t.find_nccl().found)"
    run = subprocess.run(
        [sys.executable, "-c", script, *libraries],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.strip() == "2.30.7 beside the loaded library", run.stderr
