"""Every kernel compiles for every architecture, without spills or local memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from epv2_plugin import jit
from epv2_plugin.jit import toolchain

ARCHS = ("sm_90a", "sm_100a")


def _missing() -> str:
    try:
        toolchain.find_nvcc()
        toolchain.find_nccl()
    except jit.ToolchainError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def builds() -> Iterator[dict[tuple[jit.Kernel, str], Future[jit.Built]]]:
    """All builds, as many at a time as there are cores: one after the other they take half of the tests' time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(kernel, arch): pool.submit(jit.build, kernel, arch) for kernel in jit.KERNELS for arch in ARCHS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(bool(_missing()), reason=_missing())
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", jit.KERNELS, ids=lambda kernel: kernel.label)
def test_no_spills(builds: dict[tuple[jit.Kernel, str], Future[jit.Built]], kernel: jit.Kernel, arch: str) -> None:
    resources = builds[kernel, arch].result().resources
    assert not resources.local_memory, resources
