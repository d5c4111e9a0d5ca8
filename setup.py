"""Builds `epv2_plugin._C` and the loopback for NCCL where a compiler and the headers of NCCL and CUDA are found; a
pure-Python package where not.

Where headers are looked for, first hit wins: NCCL_HOME and CUDA_HOME (folders with an `include`), the nvidia-* wheels
of this Python, build/cuda of this checkout (`make cuda-headers` fills it), /usr/local/cuda, /usr. Nothing is linked:
NCCL and the driver are found at run time.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_NCCL = (2, 30)
# Headers that tell a complete folder from a part of one: CUDA's come in several wheels.
NCCL_HEADERS = ("nccl.h", "nccl_device.h", "nccl_device/core.h")
CUDA_HEADERS = ("cuda.h", "cuda_runtime.h", "cuda_fp16.h", "crt/host_config.h")


def include_folders(variable: str, wheels: tuple[str, ...]) -> list[Path]:
    """Folders of headers that exist, best first; `wheels` are patterns below a site-packages."""
    homes = [os.environ.get(variable, "")]
    # Under pip's build isolation sys.path lacks the environment's packages, but sysconfig still knows where they are.
    packages = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path, str(ROOT / "build" / "cuda")]
    for folder in dict.fromkeys(filter(None, packages)):
        homes += [home for wheel in wheels for home in sorted(glob.glob(f"{folder}/nvidia/{wheel}"), reverse=True)]
    homes += ["/usr/local/cuda", "/usr"]
    return [include for home in dict.fromkeys(filter(None, homes)) if (include := Path(home, "include")).is_dir()]


def nccl_version(include: Path) -> tuple[int, int]:
    """(major, minor) that the headers say; (0, 0) if they say nothing."""
    text = (include / "nccl.h").read_text(errors="replace")
    numbers = [re.search(rf"#define NCCL_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    return (int(numbers[0][1]), int(numbers[1][1])) if numbers[0] and numbers[1] else (0, 0)


def find_headers() -> tuple[list[Path], str]:
    """(include folders, "") or ([], what is missing)."""
    complete = [f for f in include_folders("NCCL_HOME", ("nccl",)) if all((f / h).is_file() for h in NCCL_HEADERS)]
    new_enough = [f for f in complete if nccl_version(f) >= OLDEST_NCCL]
    if not new_enough:
        old = "".join(", only {}.{} in {}".format(*nccl_version(f), f) for f in complete)
        return [], "no headers of NCCL {}.{} or newer".format(*OLDEST_NCCL) + old
    for folder in include_folders("CUDA_HOME", ("cu[0-9]*", "cuda_runtime")):
        # Libraries of C++ headers, a part of CUDA's own, are a folder deeper since 13.0.
        deeper = [folder / "cccl"] if (folder / "cccl").is_dir() else []
        if all((folder / header).is_file() for header in CUDA_HEADERS) and any(
            (each / "nv" / "target").is_file() for each in [folder, *deeper]
        ):
            return [new_enough[0], folder, *deeper], ""
    return [], f"no headers of CUDA (all of {', '.join([*CUDA_HEADERS, 'nv/target'])} in one folder)"


def extensions() -> list[Extension]:
    folders, missing = find_headers()
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if not missing and shutil.which(os.environ.get("CXX", compiler).split()[0]) is None:
        missing = f"no C++ compiler ({os.environ.get('CXX', compiler)})"
    if missing:
        print(f"epv2_plugin: pure Python, host backend only: {missing}", flush=True)
        return []
    print(f"epv2_plugin: with the cuda backend, headers in {', '.join(map(str, folders))}", flush=True)
    try:
        import pybind11
    except ModuleNotFoundError:
        sys.exit("epv2_plugin: pybind11 is needed to build the cuda backend: pip install pybind11")
    # /usr/include named once more would hide the C library's headers from the C++ library's.
    vendor = [flag for folder in folders if str(folder) != "/usr/include" for flag in ("-isystem", str(folder))]
    warnings = ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]  # NCCL's initialisers name the first fields only
    compile_args = ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", *warnings, *vendor]
    depends = [*sorted(glob.glob("csrc/*/*.h")), str(folders[0] / "nccl.h"), str(folders[1] / "cuda.h")]
    return [
        Extension(
            "epv2_plugin._C",
            sources=sorted(glob.glob("csrc/runtime/*.cc")),
            depends=depends,
            include_dirs=[pybind11.get_include()],
            extra_compile_args=compile_args,
            libraries=["dl"],
            language="c++",
        ),
        # No module of Python's: NCCL loads it where NCCL_RMA_PLUGIN names it. It stays, as its threads run its code.
        Extension(
            "epv2_plugin._rma_loopback",
            sources=[*sorted(glob.glob("csrc/rma_loopback/*.cc")), "csrc/runtime/library.cc"],
            depends=depends,
            extra_compile_args=compile_args,
            extra_link_args=["-Wl,-z,nodelete", "-pthread"],
            libraries=["dl"],
            language="c++",
        ),
    ]


class BuildWithKernels(build_py):
    """Puts the device code, which lies beside the package in a checkout, into it: it is compiled where it runs."""

    def _kernels(self) -> dict[str, str]:
        """Source by target; none in editable installs, which read the checkout."""
        if self.editable_mode:
            return {}
        files = [path for path in Path("csrc", "kernels").rglob("*") if path.is_file()]
        return {os.path.join(self.build_lib, "epv2_plugin", path): str(path) for path in files}

    def run(self) -> None:
        super().run()
        for target, source in self._kernels().items():
            self.mkpath(os.path.dirname(target))
            self.copy_file(source, target, preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._kernels()]

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), **self._kernels()}


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(ext_modules=extensions(), cmdclass={"build_py": BuildWithKernels})
