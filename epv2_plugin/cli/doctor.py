"""`epv2 doctor`: what an issue report needs, and whether each backend can run here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epv2_plugin import environment
from epv2_plugin.config import ConfigError

GIB = 1 << 30


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="report versions, devices, compilers and network, and what keeps a backend from running",
        description="Print what an issue report needs: versions, GPUs, compilers, NCCL, kernel cache, network, and "
        "for each backend whether it can run here, and if not, why and what mends it.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same facts as JSON, too")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        ConfigError: the JSON file can't be written.
    """
    facts = environment.gather()
    print(report(facts))
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError("epv2", "--json", str(args.json), f"can't be written: {error.strerror}") from None
    return 0


def report(facts: dict[str, Any]) -> str:
    """`environment.gather()` as text, in a block that GitHub shows as it is."""
    lines = ["```"]
    for title, rows in _sections(facts):
        lines += [title, *(f"  {label:<20} {value}" if label else f"  {value}" for label, value in rows)]
    lines.append("verdict")
    for name, problems in facts["verdict"].items():
        what = "pipeline, context and FSDP2 of the cuda backend" if name == "transfers" else f"{name} backend"
        lines += [f"  {what}: not here: {p['reason']}: {p['mend']}" for p in problems] or [f"  {what}: ok"]
    return "\n".join([*lines, "```"])


def _sections(facts: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    versions = dict(facts["versions"])
    versions["torch"] += f" (CUDA {versions.pop('torch_cuda') or 'none'})"
    if commit := versions.pop("commit"):
        versions["epv2_plugin"] = f"{versions['epv2_plugin'] or 'not installed'}, commit {commit}"
    yield "versions", [(name, value or "not installed") for name, value in versions.items()]

    machine = facts["machine"]
    cpus = f"{machine['cpus']}" + (
        f", {machine['cpus_allowed']} allowed" if machine["cpus_allowed"] != machine["cpus"] else ""
    )
    shared = machine["shared_memory_bytes"]
    yield (
        "machine",
        [
            ("os", f"{machine['os']}, {machine['kernel']}"),
            ("cpus", cpus),
            ("memory", _gib(machine["memory_bytes"]) + (f", /dev/shm {_gib(shared)}" if shared is not None else "")),
            ("modules", ", ".join(machine["modules"]) or "neither nvidia_peermem nor gdrdrv"),
        ],
    )

    gpus = facts["gpus"]
    rows = [
        (
            f"gpu {gpu['index']}",
            f"{gpu['name']}, {gpu['sms']} SMs, {_gib(gpu['memory_bytes'])}, "
            f"compute capability {'.'.join(map(str, gpu['capability']))}",
        )
        for gpu in gpus["devices"]
    ] or [("gpus", f"none ({gpus['error']})")]
    driver = f"{gpus['driver'] or 'unknown'}, runs CUDA up to {gpus['driver_cuda']}" if gpus["driver_cuda"] else None
    yield "devices", [*rows, ("driver", driver or gpus["driver"] or "none"), ("mps", facts["mps"])]

    tools = {"nvcc": "nvcc", "gxx": "g++", "nccl_headers": "nccl headers"}
    rows = [(label, _tool(facts["toolchain"][name])) for name, label in tools.items()]
    library, cache = facts["nccl_library"], facts["cache"]
    rows.append(("nccl library", f"{library['version']}, {library['path']}" if library else "none loaded"))
    extension = facts["extension"]
    rows.append(("epv2_plugin._C", extension.get("path") or f"{extension['error']}: {extension['mend']}"))
    loopback = facts["rma_loopback"]
    named = loopback.get("set")
    use = f"{environment.PLUGIN_VARIABLE}={named}" if named else f"unused, as {environment.PLUGIN_VARIABLE} is not set"
    built = loopback.get("path") or f"{loopback['error']}: {loopback['mend']}"
    rows.append(("rma loopback", f"{built} ({use})"))
    state = "writable" if cache["writable"] else "can't be written"
    rows.append(
        ("kernel cache", f"{cache['folder']}, {state}, {cache['cubins']} cubins, {cache['bytes'] / 2**20:.1f} MiB")
    )
    yield "build", rows

    network = facts["network"]
    rows = [
        (
            f"{port['name']} port {port['port']}",
            ", ".join(port[key] or f"no {key}" for key in ("rate", "state", "link")),
        )
        for port in network["infiniband"]
    ] or [("infiniband", "none")]
    for device in network["ethernet"]:
        speed = device["mbit_per_s"]
        rows.append((device["name"], f"{speed / 1000:g} Gb/s" if speed else "unknown rate"))
    yield "network", rows

    if facts["topology"]:
        yield "nvidia-smi topo -m", [("", line) for line in facts["topology"].splitlines()]
    yield (
        "environment",
        [("", f"{key}={value}") for key, value in facts["environment"].items()] or [("", "nothing set")],
    )


def _tool(entry: dict[str, str]) -> str:
    return (
        f"{entry['error']}: {entry['mend']}"
        if "error" in entry
        else f"{entry['version']}, {entry['path']} ({entry['found']})"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
