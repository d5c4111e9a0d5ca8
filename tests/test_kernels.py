"""Every kernel compiles for every architecture, without spills or local memory."""

from __future__ import annotations

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


@pytest.mark.skipif(bool(_missing()), reason=_missing())
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", jit.KERNELS, ids=lambda kernel: kernel.label)
def test_no_spills(kernel: jit.Kernel, arch: str) -> None:
    resources = jit.build(kernel, arch).resources
    assert not resources.local_memory, resources
