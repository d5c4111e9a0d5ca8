"""Which kernels there are: every variant that the plugin can launch is listed here, so that all can be built ahead."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
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


@dataclass(frozen=True)
class ExpertKernels:
    """The kernels of expert parallelism that any group of ranks runs. `dispatch_stage`: by the dtype that rows are cast
    from, "" = they are copied; `combine_stage`, `combine_pull`: by the dtype of rows."""

    dispatch_stage: Mapping[str, Kernel]
    dispatch_route: Kernel
    dispatch_pull: Kernel
    combine_stage: Mapping[str, Kernel]
    combine_pull: Mapping[str, Kernel]
    combine_idle: Kernel
    barrier: Kernel

    def all(self) -> Iterator[Kernel]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            yield from [value] if isinstance(value, Kernel) else value.values()


def _summing(name: str, **defines: str) -> Mapping[str, Kernel]:
    return {dtype: _ep(name, "CombineArgs", EPV2_DTYPE=code, **defines) for dtype, code in _DTYPES.items()}


def _expert_kernels(**defines: str) -> ExpertKernels:
    return ExpertKernels(
        dispatch_stage={
            dtype: _ep("dispatch_stage", "DispatchStageArgs", EPV2_CAST=code, **defines)
            for dtype, code in {"": "0", **_DTYPES}.items()
        },
        dispatch_route=_ep("dispatch_route", "DispatchRouteArgs", **defines),
        dispatch_pull=_ep("dispatch_pull", "DispatchPullArgs", **defines),
        combine_stage=_summing("combine_stage", **defines),
        combine_pull=_summing("combine_pull", **defines),
        combine_idle=_ep("combine_idle", "BareArgs", **defines),
        barrier=_ep("barrier", "BareArgs", **defines),
    )


IN_NODE = _expert_kernels()
BETWEEN_NODES = _expert_kernels(EPV2_NODES="1")
DISPATCH_SEND = _ep("dispatch_send", "DispatchSendArgs", EPV2_NODES="1")
COMBINE_PUT = _ep("combine_put", "CombineArgs", EPV2_NODES="1")
COMBINE_RELAY = _summing("combine_relay", EPV2_NODES="1")


def _sum_of_ranks(dtype: str, sums: str | None = None) -> Kernel:
    defines = [("EPV2_DTYPE", dtype), *([("EPV2_SUM_DTYPE", sums)] if sums else [])]
    return Kernel("epv2_reduce_scatter", "sessions/reduce_scatter.cu", "ReduceScatterArgs", tuple(defines))


# By the dtype that is summed; between nodes the sum of a node's ranks, which is not rounded, and that of nodes.
REDUCE_SCATTER = {dtype: _sum_of_ranks(code) for dtype, code in (_DTYPES | {"fp64": "4"}).items()}
_NARROW = {dtype: code for dtype, code in _DTYPES.items() if dtype != "fp32"}
NODE_SUM = REDUCE_SCATTER | {dtype: _sum_of_ranks(code, _DTYPES["fp32"]) for dtype, code in _NARROW.items()}
NODES_SUM = REDUCE_SCATTER | {dtype: _sum_of_ranks(_DTYPES["fp32"], code) for dtype, code in _NARROW.items()}


def _engram(name: str, struct: str, **defines: str) -> Kernel:
    return Kernel(f"epv2_engram_{name}", f"engram/{name}.cu", struct, tuple(defines.items()))


@dataclass(frozen=True)
class EngramKernels:
    """The kernels of a table that is spread over any group of ranks. `sum`: by the dtype that is summed."""

    write: Kernel
    fetch: Kernel
    group: Kernel
    sum: Mapping[str, Kernel]

    def all(self) -> Iterator[Kernel]:
        yield from (self.write, self.fetch, self.group, *self.sum.values())


def _engram_kernels(**defines: str) -> EngramKernels:
    return EngramKernels(
        write=_engram("write", "EngramWriteArgs", **defines),
        fetch=_engram("fetch", "EngramFetchArgs", **defines),
        group=_engram("group", "EngramGroupArgs", **defines),
        sum={dtype: _engram("sum", "EngramSumArgs", EPV2_DTYPE=code, **defines) for dtype, code in _DTYPES.items()},
    )


ENGRAM_IN_NODE = _engram_kernels()
ENGRAM_BETWEEN_NODES = _engram_kernels(EPV2_NODES="1")
ENGRAM_PUT = _engram("put", "EngramPutArgs", EPV2_NODES="1")
SEND = Kernel("epv2_send", "transfers/send.cu", "SendArgs")
SM_COPY = Kernel("epv2_sm_copy", "bench/sm_copy.cu", "SmCopyArgs")

KERNELS: tuple[Kernel, ...] = (
    *IN_NODE.all(),
    *BETWEEN_NODES.all(),
    DISPATCH_SEND,
    COMBINE_PUT,
    *COMBINE_RELAY.values(),
    *REDUCE_SCATTER.values(),
    *(sums[dtype] for sums in (NODE_SUM, NODES_SUM) for dtype in _NARROW),
    *ENGRAM_IN_NODE.all(),
    *ENGRAM_BETWEEN_NODES.all(),
    ENGRAM_PUT,
    SEND,
    SM_COPY,
)
