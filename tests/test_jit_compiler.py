"""jit/compiler.py and `epv2 compile`: the cache with a compiler that is a shell script, builds with the real nvcc."""

import ctypes
import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from epv2_plugin.cli import main
from epv2_plugin.jit import compiler, kernels, toolchain
from epv2_plugin.jit.compiler import CacheError, CompileError
from epv2_plugin.jit.kernels import Kernel
from epv2_plugin.jit.toolchain import ToolchainError

ARGS = "#pragma once\n#include <cstdint>\nstruct PeekArgs {\n  uint64_t window;\n  uint64_t out;\n  int32_t peer;\n};\n"
PEEK = Kernel("peek", "ep/peek.cu", "PeekArgs")
# As ptxas 13 says it. Two functions: one that was not inlined, and the kernel.
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'peek' for 'sm_90a'
ptxas info    : Function properties for helper
    {stack} bytes stack frame, {stores} bytes spill stores, 4 bytes spill loads
ptxas info    : Function properties for peek
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, {stack} bytes cumulative stack size, 1024 bytes smem
"""
CLEAN = PTXAS.format(stack=0, stores=0).replace("4 bytes spill loads", "0 bytes spill loads")
SPILLS = PTXAS.format(stack=16, stores=8)


class Machine:
    """A checkout's kernel sources, a cache, and an nvcc that writes a random "cubin" and counts its runs."""

    def __init__(self, root: Path):
        self.root, self.cache, self.log = root, root / "cache", root / "log"
        self.sources = root / "kernels"
        (self.sources / "ep").mkdir(parents=True)
        (self.sources / "ep/args.h").write_text(ARGS)
        (self.sources / "ep/peek.cu").write_text("// kernel\n")
        (root / "nccl/include").mkdir(parents=True)
        self.nccl(23007)
        (root / "nccl/include/nccl_device.h").touch()
        self.program(root / "g++", "echo 12.2.0")
        self.nvcc()

    def nccl(self, code: int) -> None:
        (self.root / "nccl/include/nccl.h").write_text(f"#define NCCL_VERSION_CODE {code}\n")

    def nvcc(self, says: str = CLEAN, run: str = "", version: str = "13.0.88") -> None:
        """`run`: shell lines before it writes the output."""
        # The version is asked of a path once in a process, so each version has a path of its own.
        home = self.root / f"cuda-{version}"
        os.environ["CUDA_HOME"] = str(home)
        self.program(
            home / "bin/nvcc",
            f'[ "$1" = --version ] && {{ echo "release, V{version}"; exit 0; }}',
            f'echo "$*" >> {self.log}',
            run,
            f"printf %s {shlex.quote(says)} >&2",
            'while [ "$1" != -o ]; do shift; done; { echo $$; head -c 5000 /dev/urandom; } > "$2"',
        )

    @staticmethod
    def program(path: Path, *lines: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)

    def runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def leftovers(self) -> list[Path]:
        return list(self.cache.glob("tmp-*"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    # Not tmp_path: another user, which a test becomes, must be able to read it.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for key in ("CUDA_PATH", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"):
            monkeypatch.delenv(key, raising=False)
        monkeypatch.setenv("CUDA_HOME", "")
        monkeypatch.setenv("NCCL_HOME", f"{folder}/nccl")
        monkeypatch.setenv("NVCC_CCBIN", f"{folder}/g++")
        monkeypatch.setenv("EPV2_CACHE", f"{folder}/cache")
        monkeypatch.setattr(toolchain, "loaded_nccl", lambda: None)
        made = Machine(Path(folder))
        monkeypatch.setattr(kernels, "source_root", lambda: made.sources)
        monkeypatch.setattr(kernels, "KERNELS", (PEEK,))
        yield made


def test_a_kernel_is_built_once(machine, caplog):
    caplog.set_level(logging.INFO, "epv2_plugin")
    first = compiler.build(PEEK, "sm_90a")
    assert re.fullmatch(
        r"epv2: building peek for sm_90a with nvcc 13.0.88 ...\nepv2: building peek for sm_90a took [\d.]+ s",
        "\n".join(record.getMessage() for record in caplog.records),
    )
    caplog.clear()
    second = compiler.build(PEEK, "sm_90a")
    assert (first.cached, second.cached, machine.runs(), caplog.records) == (False, True, 1, [])
    assert first.path == second.path == compiler.cached(PEEK, "sm_90a").path
    assert first.path.parent.parent == machine.cache
    assert first.resources == second.resources == compiler.Resources(48, 0, 0, 0, 1024)
    assert not first.resources.local_memory
    assert machine.leftovers() == []
    record = json.loads((first.path.parent / "kernel.json").read_text())
    assert record["kernel"] == "peek"
    words = record["command"].split()
    assert {"-O3", "--cubin", "-lineinfo", "-std=c++20", "-gencode=arch=compute_90a,code=sm_90a"} <= set(words)
    assert {f"-I{machine.sources}", f"-I{machine.root}/nccl/include", "-include"} <= set(words)
    assert words[-1] == str(machine.sources / "ep/peek.cu")


def test_all_that_a_cubin_comes_from_is_in_its_key(machine, monkeypatch):
    paths = {compiler.build(PEEK, "sm_90a").path}

    def is_new(built: compiler.Built) -> bool:
        assert compiler.build(PEEK, "sm_90a").cached  # a call that changes nothing
        fresh = not built.cached and built.path not in paths
        paths.add(built.path)
        return fresh

    assert is_new(compiler.build(PEEK, "sm_100a"))
    assert is_new(compiler.build(dataclasses.replace(PEEK, defines=(("EPV2_DTYPE", "bf16"),)), "sm_90a"))
    for change in (
        lambda: (machine.sources / "ep/peek.cu").write_text("// another\n"),
        lambda: (machine.sources / "common.h").write_text("// new\n"),
        lambda: (machine.sources / "common.h").rename(machine.sources / "device.h"),
        lambda: machine.nccl(23102),
        lambda: machine.nvcc(version="13.1.2"),
        lambda: monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G"),
    ):
        change()
        assert is_new(compiler.build(PEEK, "sm_90a"))
    assert machine.runs() == 9


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "kernel.cubin").write_bytes(b""),
        lambda place: (place / "kernel.cubin").write_bytes((place / "kernel.cubin").read_bytes()[:-1]),
        lambda place: (place / "kernel.cubin").unlink(),
        lambda place: (place / "kernel.json").unlink(),
        lambda place: (place / "kernel.json").write_text('{"sha'),
        lambda place: (place / "kernel.json").write_text("[]"),
        lambda place: [path.unlink() for path in place.iterdir()],
    ],
)
def test_a_broken_entry_is_built_again(machine, damage):
    place = compiler.build(PEEK, "sm_90a").path.parent
    damage(place)
    assert compiler.cached(PEEK, "sm_90a") is None
    assert not compiler.build(PEEK, "sm_90a").cached
    assert compiler.build(PEEK, "sm_90a").cached
    assert machine.leftovers() == []


def _build_and_check(barrier, results) -> None:
    barrier.wait()
    built = compiler.build(PEEK, "sm_90a")
    results.put((str(built.path), built.path.read_bytes()))


@pytest.mark.parametrize("broken", [False, True])
def test_processes_that_build_at_once_get_one_and_the_same(machine, broken):
    machine.nvcc(run="sleep 0.3")
    if broken:
        compiler.build(PEEK, "sm_90a").path.write_bytes(b"")
    context = multiprocessing.get_context("fork")  # the fixture's patches must hold in the children
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_build_and_check, args=(barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    seen = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    # Each run of the compiler wrote other bytes: more than one result would be a mixture of builds.
    assert len({path for path, _ in seen}) == 1
    assert compiler.build(PEEK, "sm_90a").cached
    assert machine.runs() > 1
    assert machine.leftovers() == []
    if not broken:
        assert len(seen) == 1


def test_a_whole_entry_that_replaced_a_broken_one_stays(machine, monkeypatch):
    """Two find the same broken entry; the first has replaced it when the second comes to take it away."""
    path = compiler.build(PEEK, "sm_90a").path
    path.write_bytes(b"")
    flock = compiler.fcntl.flock
    first = []

    def after_the_first(file, how):
        monkeypatch.setattr(compiler.fcntl, "flock", flock)
        first.append((compiler.build(PEEK, "sm_90a").path.stat().st_ino, path.read_bytes()))
        flock(file, how)

    monkeypatch.setattr(compiler.fcntl, "flock", after_the_first)
    second = compiler.build(PEEK, "sm_90a")
    assert [(second.path.stat().st_ino, second.path.read_bytes())] == first
    assert machine.leftovers() == []


def as_nobody(function: Callable[[], str]) -> str:
    """What `function` returns in a process without root's right to write anywhere."""

    def child(results) -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        results.put(function())

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=child, args=(results,))
    process.start()
    result = results.get(timeout=60)
    process.join(60)
    return result


def test_a_read_only_cache_serves_what_it_has(machine):
    path = compiler.build(PEEK, "sm_90a").path
    machine.cache.chmod(0o555)
    machine.log.chmod(0o666)

    def try_both() -> str:
        assert compiler.build(PEEK, "sm_90a").cached
        try:
            compiler.build(PEEK, "sm_100a")
        except CacheError as error:
            return str(error)
        return "built"

    message = as_nobody(try_both)
    machine.cache.chmod(0o755)
    assert message == (
        f"the kernel cache {machine.cache} can't be written: Permission denied: set EPV2_CACHE to a folder that can be "
        "written, or fill this one with `epv2 compile` where it can"
    )
    assert machine.runs() == 1  # no build whose result can't be kept
    assert path.exists()


def test_other_users_can_read_an_entry(machine):
    path = compiler.build(PEEK, "sm_90a").path
    assert as_nobody(lambda: str(len(path.read_bytes()))) != "0"


@pytest.mark.parametrize("place", ["/proc/epv2", "/dev/null"])
def test_a_cache_that_can_not_be(machine, monkeypatch, place):
    monkeypatch.setenv("EPV2_CACHE", place)
    with pytest.raises(CacheError, match=f"the kernel cache {place} can't be written: .*EPV2_CACHE"):
        compiler.build(PEEK, "sm_90a")
    assert machine.runs() == 0


def test_a_full_cache(machine, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=f"{machine.cache} can't be written: No space left on device") as caught:
        compiler.build(PEEK, "sm_90a")
    assert "\n" not in str(caught.value)
    assert list(machine.cache.iterdir()) == []


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("EPV2_CACHE", "~/kernels")
    assert compiler.cache_folder() == Path.home() / "kernels"
    monkeypatch.setenv("EPV2_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert compiler.cache_folder() == Path("/x/epv2")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.cache_folder() == Path.home() / ".cache/epv2"


def test_a_machine_without_nvcc_uses_what_another_built(machine, monkeypatch):
    path = compiler.build(PEEK, "sm_90a").path
    monkeypatch.setattr(toolchain, "_nvcc_places", lambda: [(None, "PATH")])
    built = compiler.build(PEEK, "sm_90a")
    assert (built.cached, built.path) == (True, path)
    with pytest.raises(ToolchainError, match=r"no nvcc \(PATH has none\): pip install"):
        compiler.build(PEEK, "sm_100a")


def test_compile_errors_have_the_command_and_what_was_said(machine):
    lines = "\n".join(f"peek.cu({line}): error: no {line}" for line in range(100))
    machine.nvcc(says=lines, run=f"printf %s {shlex.quote(lines)} >&2; exit 2")
    with pytest.raises(CompileError) as caught:
        compiler.build(dataclasses.replace(PEEK, defines=(("EPV2_FP8", "1"),)), "sm_90a")
    first, command, *said = str(caught.value).splitlines()
    assert first == "peek EPV2_FP8=1 for sm_90a does not compile"
    assert command.startswith(f"  {machine.root}/cuda-13.0.88/bin/nvcc -ccbin {machine.root}/g++ ")
    assert " -DEPV2_FP8=1 " in command
    assert said[0] == "peek.cu(0): error: no 0"
    assert said[-1] == "... 60 more lines"
    assert len(said) == 41
    assert machine.leftovers() == []


def test_a_source_that_defines_another_kernel(machine):
    machine.nvcc(says=CLEAN.replace("'peek'", "'poke'"))
    with pytest.raises(CompileError, match=r"ep/peek.cu must define the kernel peek and no other, it defines: poke"):
        compiler.build(PEEK, "sm_90a")


def test_a_compiler_that_hangs(machine, monkeypatch):
    machine.nvcc(run="exec sleep 60")
    monkeypatch.setattr(compiler, "_SECONDS", 0.2)
    with pytest.raises(CompileError, match=r"nvcc gave no result in 0.2 s"):
        compiler.build(PEEK, "sm_90a")
    assert machine.leftovers() == []


def test_spills_are_read(machine):
    machine.nvcc(says=SPILLS)
    assert compiler.build(PEEK, "sm_90a").resources == compiler.Resources(48, 16, 8, 4, 1024)


@pytest.mark.parametrize("field", ["stack_bytes", "spill_store_bytes", "spill_load_bytes"])
def test_what_counts_as_local_memory(field):
    assert dataclasses.replace(compiler.Resources(8, 0, 0, 0, 99), **{field: 4}).local_memory


@pytest.mark.parametrize(
    ("arch", "what"),
    [("90a", "must be like 'sm_90a'"), ("sm_90A", "must be like"), ("", "must be like"), ("sm_80", "need sm_90")],
)
def test_archs_that_are_refused(machine, arch, what):
    with pytest.raises(ValueError, match=what):
        compiler.build(PEEK, arch)


def test_the_arch_of_a_device():
    assert [compiler.device_arch(*capability) for capability in ((9, 0), (10, 0), (10, 3))] == [
        "sm_90a",
        "sm_100a",
        "sm_103a",
    ]


# ---- the registry ----------------------------------------------------------------------------------------------


def test_the_registry_agrees_with_the_sources():
    labels = [kernel.label for kernel in kernels.KERNELS]
    assert len(set(labels)) == len(labels)
    for kernel in kernels.KERNELS:
        assert issubclass(kernels.args_type(kernel), ctypes.Structure)
        text = (kernels.source_root() / kernel.source).read_text()
        assert re.findall(r"^EPV2_KERNEL\((\w+), (\w+),", text, re.MULTILINE) == [(kernel.name, kernel.args)]


# ---- epv2 compile ----------------------------------------------------------------------------------------------


def test_compile_prints_a_line_for_each_kernel(machine, capsys):
    assert main(["compile", "--arch", "sm_90a,sm_100a", "--jobs", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"peek  sm_90a     48 registers  no spills  built in [\d.]+ s", out[0])
    assert re.fullmatch(r"peek  sm_100a    48 registers  no spills  built in [\d.]+ s", out[1])
    total = r"1 kernels for sm_90a, sm_100a: 2 built, 0 cached, 0 failed in [\d.]+ s, in "
    assert re.fullmatch(total + re.escape(str(machine.cache)), out[2])
    assert main(["compile", "--arch", "sm_90a"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("no spills  cached")
    assert "0 built, 1 cached" in out[1]


def test_compile_fails_on_spills_and_names_the_kernel(machine, capsys):
    machine.nvcc(says=SPILLS)
    for _ in range(2):  # built, then cached
        assert main(["compile", "--arch", "sm_90a"]) == 1
        spills = "spills 8 bytes, reads back 4, stack of 16 bytes"
        out, err = capsys.readouterr()
        assert f"48 registers  {spills}" in out
        assert err == f"epv2: peek for sm_90a: {spills}\n"


def test_compile_goes_on_after_an_error(machine, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", (dataclasses.replace(PEEK, name="poke"), PEEK))
    assert main(["compile", "--arch", "sm_90a"]) == 1
    out, err = capsys.readouterr()
    assert "poke: ep/peek.cu must define the kernel poke" in out
    assert "1 built, 0 cached, 1 failed" in out
    assert err == "epv2: poke for sm_90a does not compile\n"


def test_compile_where_nothing_can_be_built(machine, capsys, monkeypatch):
    monkeypatch.setenv("NVCC_CCBIN", "nope")
    assert main(["compile"]) == 2
    assert capsys.readouterr().err.startswith("epv2: NVCC_CCBIN=nope is not a program: apt-get install g++")
    monkeypatch.setenv("NVCC_CCBIN", str(machine.root / "g++"))
    monkeypatch.setenv("EPV2_CACHE", "/proc/epv2")
    assert main(["compile"]) == 2
    assert "epv2: the kernel cache /proc/epv2 can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "90a"], "argument --arch: arch = '90a': must be like 'sm_90a'"),
        (["--arch", "sm_90a,sm_75"], "arch = 'sm_75': the kernels need sm_90 (Hopper) or newer"),
        (["--jobs", "0"], "argument --jobs: 0: must be 1 or more"),
    ],
)
def test_compile_refuses_wrong_words(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(["compile", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_compile_checks_the_configuration(machine, tmp_path, capsys):
    path = tmp_path / "plugin.yaml"
    for text, message in (
        ("paralel: {}", "paralel = {}: unknown key, did you mean 'parallel'"),
        ("backend: host", "backend = 'host': the host backend runs no kernels; 'auto' and 'cuda' do"),
    ):
        path.write_text(text)
        assert main(["compile", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"epv2: {path}: {message}")
    path.write_text("backend: cuda")
    assert main(["compile", str(path), "--arch", "sm_90a"]) == 0


def test_compile_help(capsys):
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("CONFIG", "--arch A,B,...", "sm_90a,sm_100a", "--jobs N", "EPV2_CACHE", "Exit code 1"):
        assert part in text


# ---- the real compiler -----------------------------------------------------------------------------------------

# 150 products that are all live at once do not fit in the 64 registers that 1024 threads leave to each.
SPILLING = """#include "ep/args.h"
extern "C" __global__ void __launch_bounds__(1024, 1) spill(const __grid_constant__ PeekArgs args) {
  volatile float* memory = reinterpret_cast<volatile float*>(args.out);
  float values[300];
#pragma unroll
  for (int i = 0; i < 300; ++i) values[i] = memory[i];
#pragma unroll
  for (int i = 0; i < 300; ++i) memory[i] = values[299 - i] * values[i];
}
"""
PEEKING = """#include <nccl_device.h>
#include "ep/args.h"
extern "C" __global__ void __launch_bounds__(1024, 1) peek(const __grid_constant__ PeekArgs args) {
  ncclWindow_t window = reinterpret_cast<ncclWindow_t>(args.window);
  const uint4* theirs = static_cast<const uint4*>(ncclGetLsaPointer(window, 0, args.peer));
  reinterpret_cast<uint4*>(args.out)[threadIdx.x] = theirs[threadIdx.x];
}
"""


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of sources; builds run the nvcc of this machine."""
    try:
        toolchain.find_nvcc()
        toolchain.find_gxx()
    except ToolchainError as error:
        pytest.skip(str(error))
    (tmp_path / "kernels/ep").mkdir(parents=True)
    (tmp_path / "kernels/ep/args.h").write_text(ARGS)
    monkeypatch.setattr(kernels, "source_root", lambda: tmp_path / "kernels")
    monkeypatch.setenv("EPV2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "kernels"


@pytest.fixture
def without_nccl(real: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same for sources that include nothing of NCCL, whose headers then need not be here."""
    monkeypatch.setattr(toolchain, "find_nccl", lambda: toolchain.NcclHeaders(real, 23007, "test"))
    return real


def test_nvcc_builds_a_kernel_that_reads_a_peer(real):
    try:
        toolchain.find_nccl()
    except ToolchainError as error:
        pytest.skip(str(error))
    (real / "ep/peek.cu").write_text(PEEKING)
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(lambda arch: compiler.build(PEEK, arch), ["sm_90a", "sm_100a"]))
    for each in built:
        assert each.path.read_bytes()[:4] == b"\x7fELF"
        assert not each.resources.local_memory
        assert 4 <= each.resources.registers <= 64
    assert built[0].path.read_bytes() != built[1].path.read_bytes()


def test_nvcc_says_that_a_kernel_spills(without_nccl, monkeypatch, capsys):
    (without_nccl / "ep/spill.cu").write_text(SPILLING)
    monkeypatch.setattr(kernels, "KERNELS", (Kernel("spill", "ep/spill.cu", "PeekArgs"),))
    assert main(["compile", "--arch", "sm_90a"]) == 1
    out, err = capsys.readouterr()
    assert "64 registers" in out
    assert re.search(r"^epv2: spill for sm_90a: spills [1-9]\d* bytes, reads back [1-9]\d*, stack of", err)


def test_nvcc_errors_name_file_and_line(without_nccl):
    (without_nccl / "ep/peek.cu").write_text(
        '#include "ep/args.h"\nextern "C" __global__ void peek(PeekArgs a) {\n  oops;\n}\n'
    )
    with pytest.raises(CompileError, match=r'peek\.cu\(3\): error: identifier "oops" is undefined'):
        compiler.build(PEEK, "sm_90a")


def test_a_layout_that_python_reads_differently_does_not_compile(without_nccl, monkeypatch):
    (without_nccl / "ep/peek.cu").write_text('#include "ep/args.h"\nextern "C" __global__ void peek(PeekArgs a) {}\n')
    structs = kernels.args_of(PEEK)
    other = type(
        "PeekArgs", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_uint64) for name in ("window", "peer", "out")]}
    )
    monkeypatch.setattr(kernels, "args_of", lambda _: structs | {"PeekArgs": other})
    with pytest.raises(CompileError, match="PeekArgs: C\\+\\+ and Python differ"):
        compiler.build(PEEK, "sm_90a")
