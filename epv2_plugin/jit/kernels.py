"""Which kernels there are: every variant that the plugin can launch is listed here, so that all can be built ahead."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import epv2_plugin
from epv2_plugin.jit import args


@dataclass(frozen=True)
class Kernel:
    """One kernel in one variant.

    Attributes:
        name: of the function, `EPV2_KERNEL(name, ...)`.
        source: file below `source_root()`, such as "ep/combine_pull.cu".
        args: struct that it takes, from the `args.h` beside the source.
        defines: macros that make the variant, (name, value) each. Sizes are no macros: they are fields of `args`.
    """

    name: str
    source: str
    args: str
    defines: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Name and variant, for messages."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.defines)])

    @property
    def args_header(self) -> str:
        """File below `source_root()` that owns the struct."""
        return str(Path(self.source).parent / "args.h")


def source_root() -> Path:
    """The folder `kernels` of the device code: in the installed package, else in the checkout around it.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(epv2_plugin.__file__).parent
    for csrc in (package / "csrc", package.parent / "csrc"):
        if csrc.is_dir():
            return csrc / "kernels"
    raise FileNotFoundError(f"no device code: neither {package / 'csrc'} nor {package.parent / 'csrc'} is a folder")


def args_type(kernel: Kernel) -> type[args.Arguments]:
    """The struct that `kernel` takes.

    Raises:
        HeaderError: see `args_of`.
    """
    return args_of(kernel)[kernel.args]


def args_of(kernel: Kernel) -> dict[str, type[args.Arguments]]:
    """All structs of the header that owns `kernel`'s.

    Raises:
        HeaderError: the header can't be read, or has no such struct.
    """
    header = source_root() / kernel.args_header
    try:
        structs = _structs(header)
    except OSError as error:
        raise args.HeaderError(f"{header}:1: can't be read: {error.strerror}") from None
    if kernel.args not in structs:
        raise args.HeaderError(f"{header}:1: has no struct {kernel.args}, only: {', '.join(structs)}")
    return structs


@functools.cache
def _structs(header: Path) -> dict[str, type[args.Arguments]]:
    return args.load(header)


_DTYPES = {"bf16": "1", "fp16": "2", "fp32": "3"}  # as the macros EPV2_CAST and EPV2_DTYPE number them


def _ep(name: str, struct: str, **defines: str) -> Kernel:
    return Kernel(f"epv2_{name}", f"ep/{name}.cu", struct, tuple(defines.items()))


# By the dtype that rows are cast from, "" = they are copied.
DISPATCH_STAGE = {
    dtype: _ep("dispatch_stage", "DispatchStageArgs", EPV2_CAST=code) for dtype, code in {"": "0", **_DTYPES}.items()
}
DISPATCH_ROUTE = _ep("dispatch_route", "DispatchRouteArgs")
DISPATCH_PULL = _ep("dispatch_pull", "DispatchPullArgs")
# By the dtype of rows.
COMBINE_STAGE = {dtype: _ep("combine_stage", "CombineArgs", EPV2_DTYPE=code) for dtype, code in _DTYPES.items()}
COMBINE_PULL = {dtype: _ep("combine_pull", "CombineArgs", EPV2_DTYPE=code) for dtype, code in _DTYPES.items()}
COMBINE_IDLE = _ep("combine_idle", "BareArgs")
BARRIER = _ep("barrier", "BareArgs")
# By the dtype that is summed.
REDUCE_SCATTER = {
    dtype: Kernel("epv2_reduce_scatter", "sessions/reduce_scatter.cu", "ReduceScatterArgs", (("EPV2_DTYPE", code),))
    for dtype, code in (_DTYPES | {"fp64": "4"}).items()
}
ENGRAM_WRITE = Kernel("epv2_engram_write", "engram/write.cu", "EngramWriteArgs")
ENGRAM_FETCH = Kernel("epv2_engram_fetch", "engram/fetch.cu", "EngramFetchArgs")
ENGRAM_GROUP = Kernel("epv2_engram_group", "engram/group.cu", "EngramGroupArgs")
# By the dtype that is summed.
ENGRAM_SUM = {
    dtype: Kernel("epv2_engram_sum", "engram/sum.cu", "EngramSumArgs", (("EPV2_DTYPE", code),))
    for dtype, code in _DTYPES.items()
}
SM_COPY = Kernel("epv2_sm_copy", "bench/sm_copy.cu", "SmCopyArgs")

KERNELS: tuple[Kernel, ...] = (
    *DISPATCH_STAGE.values(),
    DISPATCH_ROUTE,
    DISPATCH_PULL,
    *COMBINE_STAGE.values(),
    *COMBINE_PULL.values(),
    COMBINE_IDLE,
    BARRIER,
    *REDUCE_SCATTER.values(),
    ENGRAM_WRITE,
    ENGRAM_FETCH,
    ENGRAM_GROUP,
    *ENGRAM_SUM.values(),
    SM_COPY,
)
