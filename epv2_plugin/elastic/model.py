"""The analytic model of expert parallelism: bytes to move, the time that takes, SMs to do it, inside and across nodes.

Pure arithmetic: nothing is measured here. The copy rates come from `epv2 bench sm`, or are those of an H200. A phase
takes as long as its narrowest part: the SMs that copy (reads and writes add up, writes cost more), the link that
carries what other ranks hold, or the memory that everything lies in. The phases of an operation follow one another on
the same SMs; across nodes they work on chunks of tokens, and the NIC sends one chunk beside the work on the next, so
an operation takes as long as its phases together or as its NIC, whichever is slower.

Direct mode sends a token once to every rank of another node that holds experts of it; hybrid mode once to every such
node, along the rail (GPU i of a node talks to GPU i of the others), and the node's ranks pull it from there.

Legend: T tokens of a rank, H hidden, K top-k, E experts, P ranks = N nodes x G GPUs. Rates are GB/s = 1e9 bytes a
second, sizes are bytes, times are microseconds.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from epv2_plugin.elastic.sizing import RowLayout, scale_columns
from epv2_plugin.jit import cache_folder

MIN_SMS = 4
KNEE = 0.05  # two more SMs that save less than this share of the time are left to the GEMMs
# Launches, flags between ranks and metadata of one dispatch or combine: the prototype on an H200, four ranks under MPS.
OVERHEAD_US = 30.0
# On top of it across nodes, assumed: two one-way hops of an RDMA network (counts, last row) of about 5 us each.
NETWORK_US = 10.0
# Puts and signals that a NIC takes per microsecond when GPUs post them. Assumed: a quarter of what NICs of 400 Gbit/s
# are sold with (200). Rows of kilobytes never reach it; the counts for thousands of ranks come near.
NIC_MESSAGES_PER_US = 50.0
# Share of a link's nominal rate that such kernels reach. Published: 158 of 200 GB/s on H800, 740 of 900 on B200.
LINK_EFFICIENCY = 0.8
# The same for a NIC: DeepEP V1 and V2 reach 43 to 46 of 50 GB/s (their figures without what stays inside the node).
NIC_EFFICIENCY = 0.9
# NVLink, GB/s in each direction, of the models that have it on the board. PCIe cards and bridged pairs are no entry.
NVLINK_GBYTES_PER_S = {
    "H20": 450.0,
    "H100": 450.0,
    "H200": 450.0,
    "H800": 200.0,
    "GH200": 450.0,
    "B200": 900.0,
    "B300": 900.0,
    "GB200": 900.0,
    "GB300": 900.0,
}
# What their memory is sold with, GB/s; of GH200, the smaller one.
MEMORY_GBYTES_PER_S = {
    "H20": 4000.0,
    "H100": 3350.0,
    "H200": 4800.0,
    "H800": 3350.0,
    "GH200": 4000.0,
    "B200": 8000.0,
    "B300": 8000.0,
    "GB200": 8000.0,
    "GB300": 8000.0,
}
Mode = Literal["direct", "hybrid"]
_TABLE_VERSION = 1


# ---- copy rates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """What each of `sms` busy SMs moves by bulk copies, in GB/s.

    Attributes:
        read, write: one direction alone. copy: each direction of a copy. copy_twice: bytes written where each row that
            is read is written twice.
    """

    sms: int
    read: float
    write: float
    copy: float
    copy_twice: float


@dataclass(frozen=True)
class CopyRates:
    """Copy rates of a GPU, from few busy SMs to all of them.

    Args:
        source: where the numbers come from, for reports.
        points: by ascending number of SMs; the last has every SM of the GPU busy.

    Raises:
        ValueError: no points, not ascending, or a rate that is not a positive number.
    """

    source: str
    points: tuple[Rate, ...]

    def __post_init__(self) -> None:
        sms = [point.sms for point in self.points]
        if not sms or sms[0] < 1 or sms != sorted(set(sms)):
            raise ValueError(f"copy rates from {self.source}: numbers of SMs {sms} must be 1 or more and ascend")
        for point in self.points:
            for name, value in asdict(point).items():
                if not (0 < value < math.inf):
                    raise ValueError(
                        f"copy rates from {self.source}: {name} = {value} at {point.sms} SMs: not positive"
                    )

    def read(self, sms: int) -> float:
        """GB/s that `sms` SMs read together."""
        return self._together([point.read for point in self.points], sms)

    def write(self, sms: int) -> float:
        """GB/s that `sms` SMs write together."""
        return self._together([point.write for point in self.points], sms)

    @property
    def memory(self) -> float:
        """GB/s, read and written, that the memory gives when every SM copies."""
        return 2 * self.points[-1].copy * self.points[-1].sms

    def _together(self, per_sm: list[float], sms: int) -> float:
        # Interpolated between totals: per-SM rates would give fewer bytes for more SMs near a steep end.
        best, x0, y0 = 0.0, 0.0, 0.0
        for point, rate in zip(self.points, per_sm, strict=True):
            best = max(best, rate * point.sms)
            if sms <= point.sms:
                return y0 + (best - y0) * (sms - x0) / (point.sms - x0)
            x0, y0 = point.sms, best
        return best

    def override(self, read: float = 0, write: float = 0, memory: float = 0) -> CopyRates:
        """These rates, scaled: one of few SMs reads `read` and writes `write` GB/s, the memory gives `memory` GB/s;
        0 = as it is."""
        first, factor = self.points[0], memory / self.memory if memory else 1.0
        reads, writes = (read / first.read if read else 1.0), (write / first.write if write else 1.0)
        if reads == writes == factor == 1.0:
            return self
        *few, every = (replace(p, read=p.read * reads, write=p.write * writes) for p in self.points)
        return CopyRates(f"{self.source}, overridden", (*few, replace(every, copy=every.copy * factor)))


# One H200 (132 SMs), rows of 7 to 14 KB; the fallback for every GPU that `epv2 bench sm` has not seen.
H200_RATES = CopyRates(
    "built-in table of an H200",
    (Rate(8, 150, 62, 50, 56), Rate(33, 102, 59, 49, 53), Rate(132, 35, 33, 15, 19)),
)


def rates_path(gpu: str, folder: Path | None = None) -> Path:
    """The file that holds the rates of GPUs with this name, in `folder` or the cache."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") or "unknown"
    return (folder or cache_folder()) / "sm_rates" / f"{name}.json"


def save_rates(gpu: str, points: Sequence[Rate], date: str, folder: Path | None = None) -> Path:
    """Keep measured rates of a GPU; processes that do so at once each leave a whole file."""
    path = rates_path(gpu, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"version": _TABLE_VERSION, "gpu": gpu, "date": date, "rates": [asdict(point) for point in points]}
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def load_rates(gpu: str, folder: Path | None = None) -> CopyRates:
    """The rates that `epv2 bench sm` measured on a GPU of this name, else the built-in ones of an H200, with the memory
    of that GPU where its name tells it.

    Raises:
        ValueError: the file is there, but is not what `save_rates` writes.
    """
    path = rates_path(gpu, folder)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return _unmeasured(gpu)
    try:
        table = json.loads(text)
        if table["version"] != _TABLE_VERSION:
            raise ValueError(f"version {table['version']}, not {_TABLE_VERSION}")
        points = tuple(Rate(**entry) for entry in table["rates"])
        return CopyRates(f"epv2 bench sm of {table['date']}", points)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a table of copy rates ({error}): delete it, or run epv2 bench sm") from None


def _unmeasured(gpu: str) -> CopyRates:
    nominal, ours = _of_gpu(MEMORY_GBYTES_PER_S, gpu), MEMORY_GBYTES_PER_S["H200"]
    if nominal in (None, ours):
        return H200_RATES
    rates = H200_RATES.override(memory=H200_RATES.memory * nominal / ours)
    text = f"{H200_RATES.source}, memory scaled from {ours / 1e3:g} to {nominal / 1e3:g} TB/s"
    return replace(rates, source=text)


# ---- machine --------------------------------------------------------------------------------------------------------


def scale_up_rate(gpu: str, configured: float | Literal["auto"] = "auto") -> float:
    """GB/s in one direction between ranks of a scale-up domain: what is configured, else what the GPU's name tells.

    Raises:
        ValueError: neither; the message names the key to set.
    """
    key = "network.scale_up_gbytes_per_s"
    if configured != "auto":
        if not configured > 0:
            raise ValueError(f"{key} = {configured}: must be above 0")
        return float(configured)
    known = _of_gpu(NVLINK_GBYTES_PER_S, gpu)
    if known is None:
        raise ValueError(
            f"{key} = 'auto': the bandwidth between GPUs of type {gpu!r} is not known here; "
            f"set {key} to the GB/s that one GPU reaches in one direction"
        )
    return LINK_EFFICIENCY * known


def _of_gpu(table: dict[str, float], gpu: str) -> float | None:
    """The entry for a GPU by its name, None if there is none; PCIe cards are others than the boards of their name."""
    words = set(re.findall(r"[A-Za-z0-9]+", gpu.upper()))
    known = [rate for name, rate in table.items() if name in words]
    return None if not known or words & {"PCIE", "NVL"} else known[0]


@dataclass(frozen=True)
class Machine:
    """What one rank runs on.

    Attributes:
        num_sms: SMs of the GPU.
        scale_up_gbytes_per_s: of the link to the other ranks, one direction; `math.inf` = they share one memory.
        sharing: ranks that share this GPU, its SMs and its memory.
        nic_gbytes_per_s: to other nodes, one direction; `math.inf` = nothing leaves the node.
        nic_messages_per_us: puts and signals that the NIC takes.
        overhead_us: of an operation, see `OVERHEAD_US`. network_us: on top of it across nodes.

    Raises:
        ValueError: a number is not positive.
    """

    gpu: str
    num_sms: int
    rates: CopyRates
    scale_up_gbytes_per_s: float
    sharing: int = 1
    nic_gbytes_per_s: float = math.inf
    nic_messages_per_us: float = NIC_MESSAGES_PER_US
    overhead_us: float = OVERHEAD_US
    network_us: float = NETWORK_US

    def __post_init__(self) -> None:
        for name in ("num_sms", "scale_up_gbytes_per_s", "sharing", "nic_gbytes_per_s", "nic_messages_per_us"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        for name in ("overhead_us", "network_us"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be 0 or more")

    @property
    def most_sms(self) -> int:
        """Largest even number of SMs that each rank of this GPU can hold at once, and 4 at least."""
        return max(MIN_SMS, self.num_sms // self.sharing // 2 * 2)


# ---- rows that must move --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One MoE exchange; every rank has `tokens` tokens.

    Attributes:
        fp8: dispatch sends e4m3 with a scale per 128 values (and casts on the way); combine sends `itemsize` bytes a
            value always.
        expanded: layout of the received rows: one per token and expert, or one per token and rank.
        groups, topk_groups: a token's experts lie in `topk_groups` of `groups` groups of equal size (group-limited
            routing).

    Raises:
        ValueError: a number is not positive, or the groups do not divide the experts.
    """

    tokens: int
    hidden: int
    topk: int
    experts: int
    ranks: int
    fp8: bool = False
    itemsize: int = 2
    expanded: bool = True
    groups: int = 1
    topk_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "topk", "experts", "ranks", "itemsize", "groups", "topk_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be 1 or more")
        if self.experts % self.groups:
            raise ValueError(f"groups = {self.groups}: must divide the {self.experts} experts")
        if self.topk_groups > self.groups:
            raise ValueError(f"topk_groups = {self.topk_groups}: there are {self.groups} groups")

    @property
    def dispatch_row(self) -> int:
        """Bytes of a row on its way to an expert."""
        scales = 4 * scale_columns(self.hidden, packed=False) if self.fp8 else 0
        return RowLayout(self.hidden * (1 if self.fp8 else self.itemsize), scales).stride

    @property
    def row(self) -> int:
        """Bytes of a row before dispatch and in combine."""
        return RowLayout(self.hidden * self.itemsize).stride


def rows_on_rank(shape: Shape) -> list[float]:
    """Probability that a rank holds 0, 1, ... K of a token's experts, under uniform routing without repetition.

    Exact; the mean over ranks where they differ. A top-k above what can be chosen counts as all of that. Experts are
    spread as evenly as they can be.
    """
    size = shape.experts // shape.groups
    available = shape.topk_groups * size
    topk = min(shape.topk, available)
    total = math.comb(available, topk)
    # A rank is known by how many of its experts lie in which group; ranks alike are counted, not repeated.
    kinds: Counter[tuple[int, ...]] = Counter()
    for rank in range(shape.ranks):
        first, end = (shape.experts * r // shape.ranks for r in (rank, rank + 1))
        groups = range(first // size, -(-end // size))
        overlaps = [min(end, (group + 1) * size) - max(first, group * size) for group in groups]
        kinds[tuple(sorted(overlaps))] += 1
    result = [0.0] * (shape.topk + 1)
    for pattern, ranks in kinds.items():
        for local, chance in _available_on_rank(pattern, shape.groups, shape.topk_groups).items():
            for j in range(max(0, topk - (available - local)), min(topk, local) + 1):
                ways = math.comb(local, j) * math.comb(available - local, topk - j)
                result[j] += ranks / shape.ranks * chance * (ways / total)
    return result


def _available_on_rank(overlaps: tuple[int, ...], groups: int, chosen: int) -> dict[int, float]:
    """Chance of each number of a rank's experts to lie in the chosen groups; `overlaps`: its experts in each group."""
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})  # (groups chosen, experts in them) -> number of choices
    for overlap, alike in Counter(overlaps).items():
        more: Counter[tuple[int, int]] = Counter()
        for (used, experts), count in ways.items():
            for n in range(min(alike, chosen - used) + 1):
                more[used + n, experts + n * overlap] += count * math.comb(alike, n)
        ways = more
    result: dict[int, float] = {}
    for (used, experts), count in ways.items():
        count *= math.comb(groups - len(overlaps), chosen - used)
        result[experts] = result.get(experts, 0.0) + count / math.comb(groups, chosen)
    return result


def distinct_ranks(shape: Shape) -> float:
    """Expected number of ranks that hold experts of one token."""
    return shape.ranks * (1 - rows_on_rank(shape)[0])


@dataclass(frozen=True)
class Topology:
    """Ranks in nodes; ranks of a node are consecutive, and reach each other's memory by load and store.

    Raises:
        ValueError: a number is not positive.
    """

    nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be 1 or more")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def network_peers(self, mode: Mode) -> int:
        """Ranks that a rank sends to over the network: all of the other nodes, or one of each along the rail."""
        return (self.nodes - 1) * (self.gpus_per_node if mode == "direct" else 1)


def distinct_nodes(shape: Shape, nodes: int) -> float:
    """Expected number of nodes that hold experts of one token; exact, as a node holds its ranks' experts."""
    return distinct_ranks(replace(shape, ranks=nodes))


@dataclass(frozen=True)
class Rows:
    """Rows that one rank handles. Index j - 1 of a tuple counts (token, rank) pairs with j rows, j = 1..K.

    Attributes:
        tokens: this rank's tokens.
        held: pairs of any rank's tokens and this rank, the expert side. held_remote: those of other ranks' tokens.
        owned: pairs of this rank's tokens and any rank, the token side. owned_remote: those with other ranks.
    """

    tokens: float
    held: tuple[float, ...]
    held_remote: tuple[float, ...]
    owned: tuple[float, ...]
    owned_remote: tuple[float, ...]


def expected_rows(shape: Shape) -> Rows:
    """What a rank handles on average under uniform routing."""
    pairs = tuple(shape.tokens * shape.ranks * chance for chance in rows_on_rank(shape)[1:])
    remote = tuple(count * (shape.ranks - 1) / shape.ranks for count in pairs)
    return Rows(shape.tokens, pairs, remote, pairs, remote)


def _pairs(counts: Sequence[float], above: int = 0) -> float:
    """Pairs with more than `above` rows."""
    return math.fsum(counts[above:])


def _rows(counts: Sequence[float], above: int = 0, up_to: int | None = None) -> float:
    """Rows of the pairs with more than `above` and at most `up_to` rows."""
    return math.fsum(j * count for j, count in enumerate(counts, 1) if j > above and (up_to is None or j <= up_to))


@dataclass(frozen=True)
class Phase:
    """Bytes that one rank reads and writes, mostly by SMs, and what comes from elsewhere meanwhile.

    Attributes:
        link_bytes: those of the read ones that come over the scale-up link.
        nic_bytes, nic_messages: sent over the network (as many arrive, on average).
        copy_engine: it is no kernel, and takes no SM.
    """

    name: str
    read_bytes: float
    write_bytes: float
    link_bytes: float = 0.0
    nic_bytes: float = 0.0
    nic_messages: float = 0.0
    copy_engine: bool = False


def dispatch_phases(shape: Shape, rows: Rows | None = None, *, cast_before: bool = False) -> list[Phase]:
    """Phases of a dispatch: every rank stages its tokens in its window, then pulls the rows of its experts.

    Args:
        rows: of the rank asked about; default: the expectation under uniform routing.
        cast_before: tokens come as the rows that travel, not in bf16.
    """
    rows = rows or expected_rows(shape)
    token = shape.dispatch_row if cast_before else shape.row
    pulled = _pairs(rows.held) * shape.dispatch_row
    written = _rows(rows.held) * shape.dispatch_row if shape.expanded else pulled
    return [
        Phase("stage", rows.tokens * token, rows.tokens * shape.dispatch_row),
        Phase("pull", pulled, written, _pairs(rows.held_remote) * shape.dispatch_row),
    ]


def combine_phases(
    shape: Shape, rows: Rows | None = None, *, zero_copy: bool = False, direct_rows: int = 0, copy_engine: bool = False
) -> list[Phase]:
    """Phases of a combine: the expert's rank puts one row per token in its window, the token's owner pulls and sums.

    Args:
        rows: as for `dispatch_phases`.
        zero_copy: the experts wrote into the window.
        direct_rows: with `zero_copy` and the expanded layout: the owner pulls a token's rows from a rank that holds at
            most this many itself, and that rank sums only where it holds more. K = no sums at all.
        copy_engine: the expert rows of ordinary tensors are copied into the window without an SM, and travel unsummed.
    """
    rows, row = rows or expected_rows(shape), shape.row
    if copy_engine:
        num_bytes = (_rows(rows.held) if shape.expanded else _pairs(rows.held)) * row
        copy = Phase("copy to window", num_bytes, num_bytes, copy_engine=True)
        return [copy, *combine_phases(shape, rows, zero_copy=True, direct_rows=shape.topk)]
    if not shape.expanded:
        held, owned, remote = (_pairs(counts) * row for counts in (rows.held, rows.owned, rows.owned_remote))
        pull = Phase("pull", owned, rows.tokens * row, remote)
        return [pull] if zero_copy else [Phase("copy to window", held, held), pull]
    direct = min(direct_rows, shape.topk) if zero_copy else 0

    def pulled(counts: Sequence[float]) -> float:
        return (_rows(counts, up_to=direct) + _pairs(counts, above=direct)) * row

    phases = [Phase("pull", pulled(rows.owned), rows.tokens * row, pulled(rows.owned_remote))]
    if direct < shape.topk:
        local = Phase("local sum", _rows(rows.held, above=direct) * row, _pairs(rows.held, above=direct) * row)
        phases.insert(0, local)
    return phases


def cluster_phases(shape: Shape, topology: Topology, mode: Mode) -> tuple[list[Phase], list[Phase]]:
    """Phases of a dispatch and of a combine across nodes under uniform routing; mean over ranks.

    The sums of a combine are sent by the NIC, so experts' rows are always summed (or copied) into the window. In one
    node both modes are what `dispatch_phases` and `combine_phases` say.

    Raises:
        ValueError: `shape.ranks` is not that of the topology, or there is no such mode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode = {mode!r}: must be one of {', '.join(get_args(Mode))}")
    if shape.ranks != topology.ranks:
        raise ValueError(f"ranks = {shape.ranks}: {topology.nodes} x {topology.gpus_per_node} ranks are meant")
    nodes, gpus = topology.nodes, topology.gpus_per_node
    if nodes == 1:
        return dispatch_phases(shape), combine_phases(shape)
    rows = expected_rows(shape)
    pairs = _pairs(rows.owned)  # (token, rank)
    near, far = pairs / nodes, pairs * (nodes - 1) / nodes  # in the token's own node, in others
    neighbours = (gpus - 1) / gpus  # share of a node's rows that lie on another rank of the node
    sent = far if mode == "direct" else rows.tokens * distinct_nodes(shape, nodes) * (nodes - 1) / nodes
    peers = topology.network_peers(mode)

    # Rows of other nodes: in direct mode they arrive in the memory of the rank that wants them, in hybrid mode in that
    # of the sender's rail.
    over_link = (near if mode == "direct" else pairs) * neighbours
    # A count goes to every peer, and the row at which to write comes back.
    counts = Phase("counts", 0, 0, nic_bytes=8.0 * peers, nic_messages=2.0 * peers)
    stage, pull = dispatch_phases(shape, rows)
    pull = replace(
        pull,
        link_bytes=over_link * shape.dispatch_row,
        nic_bytes=sent * shape.dispatch_row,
        nic_messages=sent + peers,  # a signal follows the rows of each peer
    )

    row = shape.row
    local = combine_phases(shape, rows)[0]
    if mode == "direct":
        local = replace(local, nic_bytes=sent * row, nic_messages=sent + peers)
        last = Phase("pull", pairs * row, rows.tokens * row, over_link * row)
        return [stage, counts, pull], [local, last]
    node_sum = Phase("node sum", far * row, sent * row, far * neighbours * row, sent * row, sent + peers)
    last = Phase("pull", (near + sent) * row, rows.tokens * row, near * neighbours * row)
    return [stage, counts, pull], [local, node_sum, last]


# ---- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseTime:
    """Predicted microseconds of a phase, and those that each part of the machine needs for it.

    Attributes:
        nic_us: of the NIC, which works beside the phases and does not count in `us`.
    """

    phase: Phase
    sm_us: float
    link_us: float
    memory_us: float
    nic_us: float = 0.0

    @property
    def us(self) -> float:
        return max(self.sm_us, self.link_us, self.memory_us)

    @property
    def bound(self) -> str:
        """What the phase waits for: "SMs", "link" or "memory"."""
        parts = {"SMs": self.sm_us, "link": self.link_us, "memory": self.memory_us}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Operation:
    """Predicted time of a dispatch or a combine, from its first launch to its last byte."""

    phases: tuple[PhaseTime, ...]
    overhead_us: float

    @property
    def nic_us(self) -> float:
        """What the NIC alone needs."""
        return math.fsum(phase.nic_us for phase in self.phases)

    @property
    def us(self) -> float:
        return self.overhead_us + max(math.fsum(phase.us for phase in self.phases), self.nic_us)

    @property
    def bound(self) -> str:
        """What it waits for most: "NIC", or what its longest phase waits for."""
        if self.nic_us >= math.fsum(phase.us for phase in self.phases):
            return "NIC"
        return max(self.phases, key=lambda phase: phase.us).bound

    def total(self, name: str) -> float:
        """Sum over the phases of an attribute of `Phase`."""
        return math.fsum(getattr(phase.phase, name) for phase in self.phases)


def predict(phase: Phase, machine: Machine, num_sms: int) -> PhaseTime:
    """How long `phase` takes on `num_sms` SMs of each rank."""
    rates = machine.rates
    # GB/s x us = 1e3 bytes.
    sm_us = (phase.read_bytes / rates.read(num_sms) + phase.write_bytes / rates.write(num_sms)) / 1e3
    if phase.copy_engine:
        sm_us = 0.0
    # What the NIC sends is read from the memory, and as much is written to it.
    in_memory = phase.read_bytes + phase.write_bytes + 2 * phase.nic_bytes
    memory_us = machine.sharing * in_memory / rates.memory / 1e3
    nic_us = max(phase.nic_bytes / machine.nic_gbytes_per_s / 1e3, phase.nic_messages / machine.nic_messages_per_us)
    return PhaseTime(phase, sm_us, phase.link_bytes / machine.scale_up_gbytes_per_s / 1e3, memory_us, nic_us)


def operation(phases: Sequence[Phase], machine: Machine, num_sms: int) -> Operation:
    """The prediction for a dispatch or a combine of these phases."""
    crosses = any(phase.nic_messages for phase in phases)
    overhead_us = machine.overhead_us + (machine.network_us if crosses else 0.0)
    return Operation(tuple(predict(phase, machine, num_sms) for phase in phases), overhead_us)


def operation_us(phases: Sequence[Phase], machine: Machine, num_sms: int) -> float:
    """How long a dispatch or a combine of these phases takes, from its first launch to its last byte."""
    return operation(phases, machine, num_sms).us


def best_direct_rows(shape: Shape, machine: Machine, num_sms: int) -> int:
    """The `direct_rows` of `combine_phases` that makes a zero-copy combine fastest; the smallest of equals."""
    rows = expected_rows(shape)
    times = [
        operation_us(combine_phases(shape, rows, zero_copy=True, direct_rows=direct), machine, num_sms)
        for direct in range(shape.topk + 1)
    ]
    return times.index(min(times))


def num_sms(shape: Shape, machine: Machine, *, zero_copy: bool = False) -> int:
    """SMs that a dispatch and a combine inside a node should hold, see `fewest_sms`."""
    rows = expected_rows(shape)
    combine = combine_phases(shape, rows, zero_copy=zero_copy, direct_rows=shape.topk)
    return fewest_sms([dispatch_phases(shape, rows), combine], machine)


def fewest_sms(operations: Sequence[Sequence[Phase]], machine: Machine) -> int:
    """SMs for operations of these phases: an even number, 4 at least, never more than each rank can have.

    The smallest number with which what crosses a link waits for the link, the NIC or the memory, and not for SMs; less
    if two more SMs would save less than 5 % of the time before that.
    """

    def total_us(sms: int) -> float:
        return math.fsum(operation_us(phases, machine, sms) for phases in operations)

    for sms in range(MIN_SMS, machine.most_sms, 2):
        if not _wait_for_sms([operation(phases, machine, sms) for phases in operations]):
            return sms
        if total_us(sms + 2) > (1 - KNEE) * total_us(sms):
            return sms
    return machine.most_sms


def _wait_for_sms(operations: Sequence[Operation]) -> bool:
    """Whether what crosses a link, or everything where nothing does, waits for SMs."""
    slow = [operation for operation in operations if operation.bound != "NIC"]
    linked = [phase for operation in slow for phase in operation.phases if phase.phase.link_bytes]
    return bool(slow) and (not linked or any(phase.bound == "SMs" for phase in linked))


@dataclass(frozen=True)
class Choice:
    """A mode, its SMs, and what a dispatch and a combine take with them."""

    mode: Mode
    num_sms: int
    dispatch: Operation
    combine: Operation

    @property
    def us(self) -> float:
        return self.dispatch.us + self.combine.us


def choices(shape: Shape, topology: Topology, machine: Machine, num_sms: int | None = None) -> list[Choice]:
    """Both modes, the faster one first (direct of equals); inside one node there is direct alone.

    Args:
        num_sms: the budget; None = `fewest_sms`, for each mode.

    Raises:
        ValueError: see `cluster_phases`.
    """
    found = []
    for mode in get_args(Mode)[: 2 if topology.nodes > 1 else 1]:
        dispatch, combine = cluster_phases(shape, topology, mode)
        sms = num_sms or fewest_sms([dispatch, combine], machine)
        found.append(Choice(mode, sms, operation(dispatch, machine, sms), operation(combine, machine, sms)))
    return sorted(found, key=lambda choice: choice.us)


def num_qps(num_sms: int, num_scaleout_ranks: int = 1, num_allocated: int = 0) -> int:
    """Queue pairs for `num_sms` SMs: none inside a scale-up domain, else one each, so that none waits for another.

    Args:
        num_scaleout_ranks: 1 = every rank is reached by load and store.
        num_allocated: most that there are; 0 = no limit.
    """
    if num_scaleout_ranks == 1:
        return 0
    return min(num_sms, num_allocated) if num_allocated else num_sms


def as_dict(machine: Machine) -> dict[str, Any]:
    """`machine` for a JSON report; a link that is the memory itself, and a NIC without traffic, is null."""
    facts = asdict(machine)
    links = ("scale_up_gbytes_per_s", "nic_gbytes_per_s")
    return facts | {name: facts[name] if math.isfinite(facts[name]) else None for name in links}
