"""`epv2 bench ep | sm | pp | cp | fsdp | engram`: what dispatch and combine take, what one SM can copy, what transfers
between stages, context-parallel attention and FSDP2's collectives take, what fetching rows takes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from epv2_plugin.cli.values import check_file, positive, positives
from epv2_plugin.config import ConfigError
from epv2_plugin.training.launcher import run_ranks

RANKS = 4


# Of arguments that are not given: where GPUs are measured, and on CPUs, where these would take hours.
_SIZES = {"large": (64 << 20, 1 << 20), "tokens": (32768, 512), "parameters": (64 << 20, 1 << 20)}


def _usual(name: str) -> str:
    gpus, cpus = _SIZES[name]
    return f"(default: {gpus}; {cpus} on CPUs)"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `bench` command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure dispatch and combine, SMs' copy rates, pipeline, context parallelism, FSDP2, Engram",
        description="Measure.",
    )
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    ep = kinds.add_parser(
        "ep",
        help="dispatch and combine against the stock all-to-all, over SM budgets",
        description="Measure dispatch and combine, the stock all-to-all and deep_ep (where installed) in turn, on "
        "fresh random tokens in every repetition, each checked against plain torch. Starts its own ranks; under "
        "torchrun it runs as one of its.",
    )
    ep.add_argument("--ranks", type=positive, help=f"expert-parallel ranks (default: {RANKS}, or torchrun's)")
    ep.add_argument("--tokens", type=positive, default=4096, help="tokens of each rank (default: %(default)s)")
    ep.add_argument("--hidden", type=positive, default=7168, help="values of a token (default: %(default)s)")
    ep.add_argument("--topk", type=positive, default=8, help="experts of a token (default: %(default)s)")
    ep.add_argument("--experts", type=positive, default=256, help="experts of all ranks (default: %(default)s)")
    ep.add_argument(
        "--sms", type=positives, default=[4, 8, 16, 24], metavar="N,N,...", help="budgets (default: 4,8,16,24)"
    )
    ep.add_argument("--dtype", choices=["bf16", "fp8"], default="fp8", help="of dispatch (default: %(default)s)")
    ep.add_argument("--layout", choices=["expanded", "compact"], default="expanded", help="(default: %(default)s)")
    ep.add_argument(
        "--routing",
        choices=["uniform", "skewed"],
        default="uniform",
        help="skewed: one expert gets 20 %% of the tokens (default: %(default)s)",
    )
    ep.add_argument("--iters", type=positive, default=30, help="repetitions (default: %(default)s)")
    ep.add_argument("--zero-copy", action="store_true", help="also measure experts that write into the window")
    ep.add_argument(
        "--unsummed",
        action="store_true",
        help="also measure expert rows that travel as they are (allow_multiple_reduction=False)",
    )
    ep.add_argument(
        "--cast-before",
        action="store_true",
        help="also measure rows that are FP8 before the clock starts, which is how deep_ep takes them",
    )
    ep.add_argument("--backend", choices=["auto", "cuda", "host"], default="auto", help="(default: %(default)s)")
    ep.add_argument("--json", type=Path, metavar="FILE", help="write every sample, too")
    ep.set_defaults(main=main_ep)
    sm = kinds.add_parser(
        "sm",
        help="GB/s that each SM copies, by the number of SMs busy",
        description="Measure what SMs read, write and copy, and keep the table for the model that chooses SM budgets.",
    )
    sm.add_argument("--json", type=Path, metavar="FILE", help="write every sample, too")
    sm.set_defaults(main=main_sm)
    pp = kinds.add_parser(
        "pp",
        help="transfers between pipeline stages against a plain copy and NCCL, and GEMMs beside them",
        description="Measure pp_send with pp_recv and with pp_recv_inplace around a ring of ranks, the plain copy and "
        "torch's send and receive in turn; on GPUs also a bf16 GEMM alone and beside transfers.",
    )
    pp.add_argument("--ranks", type=positive, help="ranks of the ring (default: 2, or torchrun's)")
    pp.add_argument("--large", type=positive, help=f"bytes of a large tensor {_usual('large')}")
    pp.add_argument("--small", type=positive, default=64 << 10, help="bytes of a small tensor (default: %(default)s)")
    _add_common(pp)
    pp.set_defaults(main=main_pp)
    cp = kinds.add_parser(
        "cp",
        help="all-gathers and context-parallel attention against gathering first",
        description="Measure all-gathers of keys, ours and torch's, and causal attention forward and backward over "
        "gathered parts against attention after a whole gather.",
    )
    cp.add_argument("--ranks", type=positive, help=f"context-parallel ranks (default: {RANKS}, or torchrun's)")
    cp.add_argument("--tokens", type=positive, help=f"of all ranks together {_usual('tokens')}")
    cp.add_argument("--heads", type=positive, default=16, help="query heads (default: %(default)s)")
    cp.add_argument("--groups", type=positive, default=16, help="key/value heads (default: %(default)s)")
    cp.add_argument("--width", type=positive, default=128, help="features of a head (default: %(default)s)")
    _add_common(cp)
    cp.set_defaults(main=main_cp)
    fsdp = kinds.add_parser(
        "fsdp",
        help="a layer's parameter all-gather and gradient reduce-scatter against FSDP2's own, and GEMMs beside them",
        description="Measure FSDP2's collectives of one layer, ours and its own in turn, each checked against the "
        "other; on GPUs also a bf16 GEMM alone and beside them.",
    )
    fsdp.add_argument("--ranks", type=positive, help=f"ranks that share the layer (default: {RANKS}, or torchrun's)")
    fsdp.add_argument("--parameters", type=positive, help=f"of the layer {_usual('parameters')}")
    fsdp.add_argument("--sms", type=positive, default=8, help="of a reduce-scatter (default: %(default)s)")
    _add_common(fsdp)
    fsdp.set_defaults(main=main_fsdp)
    engram = kinds.add_parser(
        "engram",
        help="rows a second from a table spread over ranks, against a local gather",
        description="Measure Engram's fetch and the sum of row gradients, on fresh random rows in every repetition.",
    )
    engram.add_argument("--ranks", type=positive, help=f"ranks that share the table (default: {RANKS}, or torchrun's)")
    engram.add_argument("--rows", type=positive, default=524288, help="rows of each rank (default: %(default)s)")
    engram.add_argument("--hidden", type=positive, default=128, help="values of a row (default: %(default)s)")
    engram.add_argument("--tokens", type=positive, default=512, help="tokens of each rank (default: %(default)s)")
    engram.add_argument("--entries", type=positive, default=24, help="rows of a token (default: %(default)s)")
    engram.add_argument("--dtype", choices=["bf16", "fp32", "fp8"], default="bf16", help="(default: %(default)s)")
    engram.add_argument("--sms", type=positive, default=16, help="budget on a GPU (default: %(default)s)")
    engram.add_argument(
        "--memory", choices=["gpu", "cpu"], default="gpu", help="that GPUs have the table in (default: %(default)s)"
    )
    _add_common(engram)
    engram.set_defaults(main=main_engram)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iters", type=positive, default=30, help="repetitions (default: %(default)s)")
    parser.add_argument("--backend", choices=["auto", "cuda", "host"], default="auto", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample, too")


def main_pp(args: argparse.Namespace) -> int:
    """Run `epv2 bench pp`; 0 = done and what was sent arrived, 1 = other data.

    Raises:
        ConfigError: arguments that do not go together, or with this machine.
    """

    def measure(command: str, ranks: int, backend: str) -> int:
        from epv2_plugin.bench.pp import Setup, run

        return run(Setup(ranks, args.large, args.small, args.iters, backend), command, args.json)

    def check() -> None:
        if args.small > args.large:
            raise ConfigError("epv2 bench pp", "--small", args.small, f"must be at most --large, {args.large}")

    return _on_ranks("pp", args, ("large", "small"), 2, measure, check=check)


def main_cp(args: argparse.Namespace) -> int:
    """Run `epv2 bench cp`; 0 = done and both ways gave the same, 1 = they did not.

    Raises:
        ConfigError: arguments that do not go together, or with this machine.
    """
    if args.heads % args.groups:
        raise ConfigError("epv2 bench cp", "--groups", args.groups, f"must divide --heads, {args.heads}")

    def measure(command: str, ranks: int, backend: str) -> int:
        from epv2_plugin.bench.cp import Setup, run

        setup = Setup(ranks, args.tokens, args.heads, args.groups, args.width, args.iters, backend)
        return run(setup, command, args.json)

    return _on_ranks("cp", args, ("tokens", "heads", "groups", "width"), RANKS, measure, ("tokens", 2))


def main_fsdp(args: argparse.Namespace) -> int:
    """Run `epv2 bench fsdp`; 0 = done and ours gave the same as FSDP2's own, 1 = other results.

    Raises:
        ConfigError: arguments that do not go together, or with this machine.
    """

    def measure(command: str, ranks: int, backend: str) -> int:
        from epv2_plugin.bench.fsdp import Setup, run

        return run(Setup(ranks, args.parameters, args.sms, args.iters, backend), command, args.json)

    return _on_ranks("fsdp", args, ("parameters", "sms"), RANKS, measure, ("parameters", 1))


def _on_ranks(
    kind: str,
    args: argparse.Namespace,
    names: Sequence[str],
    usual: int,
    measure: Callable[[str, int, str], int],
    divided: tuple[str, int] | None = None,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Start the ranks that will `measure`, or do so as one of torchrun's.

    Args:
        divided: an argument that must be a multiple of so many times the ranks. check: of the arguments; raises.
    """
    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    ranks = args.ranks or world or usual
    if ranks < 2:
        raise ConfigError(f"epv2 bench {kind}", "--ranks", ranks, "must be 2 or more")
    if world not in (None, ranks):
        raise ConfigError(f"epv2 bench {kind}", "--ranks", ranks, f"the job was started with {world} ranks")
    backend, _ = _backend(args.backend, f"epv2 bench {kind}")
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, _SIZES[name][backend == "host"])
    check()
    if divided is not None and (value := getattr(args, divided[0])) % (multiple := divided[1] * ranks):
        raise ConfigError(f"epv2 bench {kind}", f"--{divided[0]}", value, f"must be a multiple of {multiple}")
    if args.json is not None:
        check_file("--json", args.json)
    words = ["bench", kind, "--ranks", str(ranks), "--backend", backend]
    for name in (*names, "iters"):
        words += [f"--{name}", str(getattr(args, name))]
    words += ["--json", str(args.json)] if args.json is not None else []
    if world is None:
        return run_ranks("epv2_plugin.cli", words, ranks, _environment(backend, ranks))
    return measure(shlex.join(["epv2", *words]), ranks, backend)


def main_ep(args: argparse.Namespace) -> int:
    """Run `epv2 bench ep`; 0 = done and every result was right, 1 = a wrong result.

    Raises:
        ConfigError: arguments that do not go together, or with this machine.
    """
    from epv2_plugin.bench.paths import Setup

    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    ranks = args.ranks or world or RANKS
    if world not in (None, ranks):
        raise _wrong("--ranks", ranks, f"the job was started with {world} ranks")
    backend, device_sms = _backend(args.backend)
    if args.experts % ranks:
        raise _wrong("--experts", args.experts, f"must be a multiple of the {ranks} ranks")
    if args.topk > args.experts:
        raise _wrong("--topk", args.topk, f"must be at most the {args.experts} experts")
    if args.routing == "skewed" and args.topk == args.experts:
        raise _wrong(
            "--routing", args.routing, "needs more experts than the top-k: now every token goes to all of them"
        )
    for option, wanted in (("--zero-copy", args.zero_copy), ("--unsummed", args.unsummed)):
        if wanted and args.layout != "expanded":
            raise _wrong(option, wanted, "needs the expanded layout")
    if args.cast_before and args.dtype != "fp8":
        raise _wrong("--cast-before", args.cast_before, "needs --dtype fp8")
    if device_sms and max(args.sms) > device_sms:
        raise _wrong("--sms", max(args.sms), f"must be at most the device's {device_sms} SMs")
    if args.json is not None:
        check_file("--json", args.json)
    setup = Setup(
        ranks=ranks,
        tokens=args.tokens,
        hidden=args.hidden,
        topk=args.topk,
        experts=args.experts,
        dtype=args.dtype,
        layout=args.layout,
        routing=args.routing,
        zero_copy=args.zero_copy,
        unsummed=args.unsummed,
        cast_before=args.cast_before,
        iterations=args.iters,
        backend=backend,
        sms=tuple(args.sms) if backend == "cuda" else (0,),
    )
    words = ["bench", "ep", "--ranks", str(ranks), "--backend", backend]
    words += ["--sms", ",".join(map(str, args.sms))] if backend == "cuda" else []
    for name in ("tokens", "hidden", "topk", "experts", "dtype", "layout", "routing", "iters"):
        words += [f"--{name}", str(getattr(args, name))]
    words += ["--zero-copy"] if args.zero_copy else []
    words += ["--unsummed"] if args.unsummed else []
    words += ["--cast-before"] if args.cast_before else []
    words += ["--json", str(args.json)] if args.json is not None else []
    if world is None:
        return run_ranks("epv2_plugin.cli", words, ranks, _environment(backend, ranks))
    from epv2_plugin.bench.ep import run

    return run(setup, shlex.join(["epv2", *words]), args.json)


def main_sm(args: argparse.Namespace) -> int:
    """Run `epv2 bench sm`.

    Raises:
        ConfigError: there is no GPU, or a file can't be written.
    """
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        raise ConfigError("epv2 bench sm", "device", None, "no CUDA device here: nothing to measure")
    if args.json is not None:
        check_file("--json", args.json)
    from epv2_plugin.bench import report, sm
    from epv2_plugin.elastic import model
    from epv2_plugin.elastic.backends.device import CudaRuntime

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    timeout = timedelta(seconds=300)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    assert dist.group.WORLD is not None
    runtime = CudaRuntime(dist.group.WORLD, timeout.total_seconds())
    try:
        measured = sm.measure(runtime, sm.default_sms(runtime.num_sms))
    finally:
        runtime.close()
        dist.destroy_process_group()
    document: dict[str, Any] = {
        "schema": report.SCHEMA,
        "kind": "bench sm",
        **report.circumstances("epv2 bench sm", device),
        "row_bytes": sm.ROW_BYTES,
        "stages": sm.STAGES,
        "repetitions": sm.REPETITIONS - 1,
        **measured,
    }
    points = [model.Rate(**rate) for rate in measured["rates"]]
    document["stored"] = str(model.save_rates(gpu, points, document["date"]))
    print(report.sm_text(document))
    if args.json is not None:
        args.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return 0


def main_engram(args: argparse.Namespace) -> int:
    """Run `epv2 bench engram`; 0 = done and every row was right, 1 = a wrong row.

    Raises:
        ConfigError: arguments that do not go together, or with this machine.
    """
    from epv2_plugin.environment import memory_bytes

    command = "epv2 bench engram"
    backend, device_sms = _backend(args.backend, command)
    if device_sms and args.sms > device_sms:
        raise ConfigError(command, "--sms", args.sms, f"must be at most the device's {device_sms} SMs")
    if backend == "host" and "RANK" not in os.environ:
        from epv2_plugin.bench.engram import table_bytes

        ranks = args.ranks or RANKS
        needed = ranks * table_bytes(args.rows, args.hidden)
        if needed > memory_bytes():
            allowed = (
                f"{ranks} ranks need {needed / 2**30:,.0f} GiB for them, this machine has {memory_bytes() / 2**30:,.0f}"
            )
            raise ConfigError(command, "--rows", args.rows, allowed)

    def measure(command: str, ranks: int, backend: str) -> int:
        from epv2_plugin.bench.engram import Setup, run

        sizes = (args.rows, args.hidden, args.tokens, args.entries)
        setup = Setup(ranks, *sizes, args.dtype, args.iters, backend, args.sms, args.memory)
        return run(setup, command, args.json)

    return _on_ranks("engram", args, ("rows", "hidden", "tokens", "entries", "dtype", "sms", "memory"), RANKS, measure)


def _wrong(option: str, value: object, allowed: str) -> ConfigError:
    return ConfigError("epv2 bench ep", option, value, allowed)


def _backend(name: str, command: str = "epv2 bench ep") -> tuple[str, int | None]:
    """The backend that `name` stands for here, and the SMs of the device."""
    import torch

    from epv2_plugin.elastic.buffer import resolve_backend

    try:
        backend: str = resolve_backend(name)
    except RuntimeError as error:
        raise ConfigError(command, "--backend", name, str(error)) from None
    if backend == "host":
        return backend, None
    return backend, torch.cuda.get_device_properties(0).multi_processor_count


def _environment(backend: str, ranks: int) -> dict[str, str]:
    """Variables of the ranks; what is set already wins."""
    if backend == "host":
        return {}
    import torch

    from epv2_plugin.training import devices

    return devices.place(torch.cuda.device_count(), {"LOCAL_WORLD_SIZE": str(ranks)}).environment
