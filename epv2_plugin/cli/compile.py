"""`epv2 compile [CONFIG]`: build every kernel ahead of time, on any machine with nvcc, into the cache that jobs use."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from epv2_plugin.cli.values import positive
from epv2_plugin.config import load_config
from epv2_plugin.environment import cpus_allowed
from epv2_plugin.jit import compiler, kernels, toolchain
from epv2_plugin.jit.args import HeaderError
from epv2_plugin.jit.kernels import Kernel

DEFAULT_ARCHS = "sm_90a,sm_100a"
# What is wrong with one kernel, and what is wrong with this machine.
_KERNEL_ERRORS = (compiler.CompileError, HeaderError)
_MACHINE_ERRORS = (toolchain.ToolchainError, compiler.CacheError, FileNotFoundError)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `compile` command."""
    parser = subparsers.add_parser(
        "compile",
        help="build the GPU kernels ahead of time",
        description="Build every kernel of the plugin into the cache (EPV2_CACHE, by default ~/.cache/epv2), without a "
        "GPU. Exit code 1 = a kernel does not compile, spills registers or uses local memory.",
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="plugin YAML, to be checked before anything is built"
    )
    parser.add_argument(
        "--arch",
        type=_archs,
        default=DEFAULT_ARCHS,
        metavar="A,B,...",
        help="devices to build for: sm_90a is Hopper, sm_100a is B200 (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=cpus_allowed(),
        metavar="N",
        help="compilers at a time (default: the CPUs, here %(default)s)",
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Build all; 0 = done, 1 = a kernel is not as it must be, 2 = this machine can't build, 130 = interrupted.

    Raises:
        ConfigError: the configuration is wrong, or needs no kernels.
    """
    config = load_config(args.config)
    if config.backend == "host":
        raise config.fail("backend", "the host backend runs no kernels; 'auto' and 'cuda' do")
    work = [(kernel, arch) for arch in args.arch for kernel in kernels.KERNELS]
    width = max((len(kernel.label) for kernel, _ in work), default=0)
    begun = time.monotonic()
    bad: list[str] = []
    built = failed = 0
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for (kernel, arch), result in zip(work, pool.map(_build, work), strict=True):
            what = f"{kernel.label:<{width}}  {arch:<8}"
            if isinstance(result, Exception):
                failed += 1
                bad.append(f"{kernel.label} for {arch} does not compile")
                print(f"{what}  does not compile\n{result}", flush=True)
                continue
            built += not result.cached
            resources = result.resources
            if resources.local_memory:
                bad.append(f"{kernel.label} for {arch}: {_memory(resources)}")
            how = "cached" if result.cached else f"built in {result.seconds:.1f} s"
            print(f"{what}  {resources.registers:>3} registers  {_memory(resources)}  {how}", flush=True)
    except _MACHINE_ERRORS as error:
        print(f"epv2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        pool.shutdown(cancel_futures=True)
    print(
        f"{len(kernels.KERNELS)} kernels for {', '.join(args.arch)}: {built} built, {len(work) - built - failed} cached"
        f", {failed} failed in {time.monotonic() - begun:.1f} s, in {compiler.cache_folder()}"
    )
    for line in bad:
        print(f"epv2: {line}", file=sys.stderr)
    return 1 if bad else 0


def _build(work: tuple[Kernel, str]) -> compiler.Built | Exception:
    try:
        return compiler.build(*work)
    except _KERNEL_ERRORS as error:
        return error


def _memory(resources: compiler.Resources) -> str:
    if not resources.local_memory:
        return "no spills"
    return (
        f"spills {resources.spill_store_bytes} bytes, reads back {resources.spill_load_bytes}, "
        f"stack of {resources.stack_bytes} bytes"
    )


def _archs(text: str) -> list[str]:
    try:
        return [compiler.check_arch(arch) for arch in dict.fromkeys(text.split(","))]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
