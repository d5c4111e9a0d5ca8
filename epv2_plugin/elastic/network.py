"""What a rank's NIC carries: from the kernel's list of RDMA ports, else from the configuration, never a guess.

Kept apart from `model`, which asks no machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from epv2_plugin.elastic.model import NIC_EFFICIENCY

KEY = "network.rdma_gbytes_per_s"
SYSFS = Path("/sys")


@dataclass(frozen=True)
class Port:
    """An active RDMA port: its device, nominal Gbit/s in one direction, and whether it is a bond or EFA."""

    device: str
    gbit_per_s: float
    kind: Literal["", "bond", "EFA"] = ""


def rdma_ports(sysfs: Path = SYSFS) -> list[Port]:
    """The active RDMA ports with a known rate. Software devices, and virtual functions beside their physical one, are
    left out."""
    ports: list[Port] = []
    folders = sorted((sysfs / "class/infiniband").glob("*/ports/*"))
    functions = {device.resolve() for device in (sysfs / "class/infiniband").glob("*/device")}
    for folder in folders:
        device = folder.parent.parent
        parent = device / "device" / "physfn"
        software = not (device / "device").exists() or (device / "parent").exists()  # siw, rxe
        if software or (parent.exists() and parent.resolve() in functions):
            continue
        if "ACTIVE" not in (_read(folder / "state") or ""):
            continue
        rate = re.match(r"([\d.]+) *Gb/sec", _read(folder / "rate") or "")
        gbits = float(rate[1]) if rate else 0.0
        bond = _bond(folder, device, sysfs / "class/net")
        # A port of a bond may tell the rate of one member.
        gbits = max(gbits, _bond_gbits(bond) if bond else 0.0)
        if gbits > 0:
            driver = (device / "device" / "driver").resolve().name
            kind: Literal["", "bond", "EFA"] = "bond" if bond else "EFA" if driver == "efa" else ""
            ports.append(Port(device.name, gbits, kind))
    return ports


def rdma_rate(
    configured: float | Literal["auto"] = "auto", *, gpus_per_node: int, sysfs: Path = SYSFS
) -> tuple[float, str]:
    """GB/s in one direction that one GPU reaches over the network, and where that number comes from.

    What is configured, else the ports of this machine (only the fastest ones, so that a slow one for storage does not
    count) divided over `gpus_per_node`, times the share that such kernels reach.

    Raises:
        ValueError: neither; the message names the key to set.
    """
    if configured != "auto":
        if not configured > 0:
            raise ValueError(f"{KEY} = {configured}: must be above 0")
        return float(configured), f"{KEY}, as it is"
    ports = rdma_ports(sysfs)
    if not ports:
        raise ValueError(
            f"{KEY} = 'auto': no active RDMA port with a rate in {sysfs / 'class/infiniband'}; "
            f"set {KEY} to the GB/s that one GPU reaches in one direction"
        )
    fastest = max(port.gbit_per_s for port in ports)
    used = [port for port in ports if port.gbit_per_s == fastest]
    kind = " ".join(sorted({f" ({port.kind})" for port in used if port.kind}))
    source = (
        f"{len(used)} x {fastest:g} Gbit/s ports here{kind} over {gpus_per_node} GPUs, {NIC_EFFICIENCY:.0%} of nominal"
    )
    return NIC_EFFICIENCY * len(used) * fastest / 8 / gpus_per_node, source


def _bond(port: Path, device: Path, net: Path) -> Path | None:
    """The network device that bonds those of an RDMA port."""
    names = [name for name in (_read(entry) for entry in sorted((port / "gid_attrs/ndevs").glob("*"))) if name]
    names += sorted(entry.name for entry in (device / "device/net").glob("*"))
    for name in names:
        for candidate in (net / name, net / name / "master"):
            if (candidate / "bonding").is_dir():
                return candidate
    return None


def _bond_gbits(bond: Path) -> float:
    """What the bond carries; 0 = unknown. The kernel adds up the members that are in use."""
    speed = _read(bond / "speed") or ""
    return int(speed) / 1e3 if speed.isdigit() else 0.0


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):  # such as the speed of a device that is down
        return None
