"""The plan as text of at most 120 columns and as a picture, both from its data alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epv2_plugin.bench.report import WIDTH, table
from epv2_plugin.config import ConfigError

GIB = 1 << 30
NO_VALUE = "-"


def text(document: dict[str, Any]) -> str:
    """The whole report."""
    points, asked = document["points"], asked_point(document)
    lines = [*_wrap(f"Plan for {document['config']}: predicted by the analytic model, not measured."), ""]
    lines += _wrap("  " + _workload(document), indent="  ")
    lines += [*(_wrap("  " + _headline(asked), indent="  ") if asked else []), *_growth(points), ""]
    lines += _wrap(
        "Per EP size (* = as configured). MB and microseconds of a rank for one dispatch and one combine. QPs = queue "
        "pairs to each network peer x peers. other = time of the other mode. buffer = GiB per rank with room for "
        "capacity_factor x as many rows from other nodes as tokens have experts; linear = with a slot for each "
        "(rank, token), as in one node."
    )
    lines += [*_sizes(document), ""]
    if left_out := document["left_out"]:
        names = f"EP{left_out[0]} to EP{left_out[-1]}" if len(left_out) > 1 else f"EP{left_out[0]}"
        lines += _wrap(
            f"{names} are left out: they span nodes, and network.rdma_gbytes_per_s is not known here; set it to the "
            "GB/s that one GPU reaches in one direction (or --assume rdma_gbytes_per_s=X)."
        )
        lines.append("")
    if redundant := [point for point in points if point["expert_slots"] > document["workload"]["experts"]]:
        names = ", ".join(f"EP{point['ep']}" for point in redundant)
        lines += _wrap(
            f"{names}: the {document['workload']['experts']} experts get redundant copies, so that every "
            "rank has as many; counted as experts of their own."
        )
        lines.append("")
    if asked:
        lines += [*_wrap(f"EP{asked['ep']} in phases: " + _phase_legend(asked)), *_phases(asked), ""]
        lines += [*_wrap(_buffer(asked)), ""]
    lines += ["What this rests on, and how to give another number:"]
    lines += _assumptions(document)
    lines += [
        "",
        *_wrap(
            "Routing is uniform over the experts that a token may use; a rank with popular experts takes longer and "
            "needs more room. Kernels between nodes have run on nodes that one GPU plays, never over a NIC."
        ),
    ]
    return "\n".join(lines)


def asked_point(document: dict[str, Any]) -> dict[str, Any] | None:
    """The point that the configuration, or the only one that the command line, asks for."""
    return next((point for point in document["points"] if point["ep"] == document["asked_ep"]), None)


def _workload(document: dict[str, Any]) -> str:
    work = document["workload"]
    origin = work["origin"]
    limit = "any experts"
    if work["topk_groups"] < work["groups"]:
        limit = f"in {work['topk_groups']} of {work['groups']} groups"
    parts = [
        f"{work['tokens']} tokens a rank ({origin['tokens']})",
        f"hidden {work['hidden']} ({origin['hidden']})",
        f"top-{work['topk']} of {work['experts']} experts ({origin['experts']}), {limit} ({origin['groups']})",
        f"{work['dtype']} dispatch, bf16 combine",
        f"{work['layout']} layout",
        f"mode {document['mode']}",
        f"SMs {document['sm_budget']}",
        f"QPs {document['qps']}",
    ]
    return "; ".join(parts) + "."


def _headline(point: dict[str, Any]) -> str:
    best = point["modes"][0]
    dispatch, combine = best["dispatch"], best["combine"]
    waits = f"both wait for the {dispatch['bound']}"
    if dispatch["bound"] != combine["bound"]:
        waits = f"they wait for the {dispatch['bound']} and the {combine['bound']}"
    return (
        f"EP{point['ep']} ({_nodes(point)}): {best['mode']} mode with {best['num_sms']} SMs, dispatch "
        f"{dispatch['us'] / 1e3:.2f} ms and combine {combine['us'] / 1e3:.2f} ms ({waits}), "
        f"{best['buffer_bytes'] / GIB:.2f} GiB of buffer per rank."
    )


def _growth(points: Sequence[dict[str, Any]]) -> list[str]:
    first, last = points[0], points[-1]
    if first["ep"] == last["ep"]:
        return []
    small, large = (point["modes"][0]["buffer_bytes"] for point in (first, last))
    return _wrap(
        f"  From EP{first['ep']} to EP{last['ep']} the ranks grow {last['ep'] / first['ep']:.3g}-fold, the buffer "
        f"{large / small:.2f}-fold.",
        indent="  ",
    )


def _nodes(point: dict[str, Any]) -> str:
    return f"{point['nodes']} x {point['gpus_per_node']} GPUs" if point["nodes"] > 1 else "one node"


def _sizes(document: dict[str, Any]) -> list[str]:
    rows = []
    for point in document["points"]:
        best = point["modes"][0]
        mark = "*" if point["ep"] == document["asked_ep"] else ""
        other = NO_VALUE
        if len(point["modes"]) > 1:
            other = f"{100 * (point['modes'][1]['us'] / best['us'] - 1):+.0f} %"
        dispatch, combine = best["dispatch"], best["combine"]
        across = point["nodes"] > 1
        rows.append(
            [
                f"{point['ep']}{mark}",
                str(point["nodes"]),
                best["mode"],
                str(best["num_sms"]),
                f"{best['qps']}x{best['network_peers']}" if across else NO_VALUE,
                *((_mb(dispatch["nic_bytes"]), _mb(combine["nic_bytes"])) if across else (NO_VALUE, NO_VALUE)),
                _mb(dispatch["link_bytes"]),
                _mb(combine["link_bytes"]),
                f"{dispatch['us']:.0f} {dispatch['bound']}",
                f"{combine['us']:.0f} {combine['bound']}",
                other,
                _gib(best["buffer_bytes"]),
                _gib(point["linear_window_bytes"]),
            ]
        )
    header = ["EP", "nodes", "mode", "SMs", "QPs", "NIC MB\ndispatch", "\ncombine", "link MB\ndispatch", "\ncombine"]
    header += ["dispatch\nus, bound", "combine\nus, bound", "other", "buffer\nGiB", "linear\nGiB"]
    return table(header, rows)


def _phase_legend(point: dict[str, Any]) -> str:
    return (
        "MB that the SMs of a rank read and write, MB that come over the scale-up link and go to the NIC, and the "
        "microseconds that each part needs. "
        + (
            "Phases follow one another; the NIC works beside them, and the slower of both counts."
            if point["nodes"] > 1
            else "Phases follow one another."
        )
    )


def _phases(point: dict[str, Any]) -> list[str]:
    rows = []
    parts = ("sm", "link", "memory", "nic")
    for mode in point["modes"]:
        for name in ("dispatch", "combine"):
            operation = mode[name]
            for phase in operation["phases"]:
                cells = [f"{mode['mode']} {name}: {phase['name']}"]
                cells += [_mb(phase[f"{what}_bytes"]) for what in ("read", "write", "link", "nic")]
                cells += [NO_VALUE, *(f"{phase[f'{what}_us']:.0f}" for what in parts), NO_VALUE, phase["bound"]]
                rows.append(cells)
            cells = [f"{mode['mode']} {name}, {mode['num_sms']} SMs"]
            for what in ("read", "write", "link", "nic"):
                cells.append(_mb(sum(phase[f"{what}_bytes"] for phase in operation["phases"])))
            cells.append(_mb(operation["bytes_per_sm"]))
            cells += [f"{sum(phase[f'{what}_us'] for phase in operation['phases']):.0f}" for what in parts]
            rows.append([*cells, f"{operation['us']:.0f}", operation["bound"]])
    header = ["", "MB\nread", "\nwritten", "\nlink", "\nNIC", "\na SM"]
    return table([*header, "us\nSMs", "\nlink", "\nmemory", "\nNIC", "\ntotal", "waits for"], rows)


def _buffer(point: dict[str, Any]) -> str:
    best = point["modes"][0]
    parts = [f"{name} {_size(size)}" for name, size in best["sections"].items() if size]
    return (
        f"Buffer of EP{point['ep']}, {best['mode']}: " + ", ".join(parts) + f"; {_size(best['metadata_bytes'])} of it "
        f"metadata. Room for {best['network_rows']} rows from other nodes; more is an error that says so on every rank."
    )


def _assumptions(document: dict[str, Any]) -> list[str]:
    rows = []
    for fact in document["assumptions"]:
        number = f"{fact['value']:.4g} {fact['unit']}".rstrip()
        rows.append([f"  {fact['name']}", number, fact["source"], fact["override"]])
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, number, source, override in rows:
        room = WIDTH - widths[0] - widths[1] - widths[3] - 6
        first, *more = textwrap.wrap(source, room, break_on_hyphens=False)
        lines.append(f"{name:<{widths[0]}}  {number:>{widths[1]}}  {first:<{room}}  {override}".rstrip())
        lines += [" " * (widths[0] + widths[1] + 4) + line for line in more]
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.{2 if size < 1000 * GIB else 0}f}"


def _mb(size: float) -> str:
    if 0 < size < 1e4:
        return "<0.01"
    return f"{size / 1e6:.0f}" if size >= 1e7 or size == 0 else f"{size / 1e6:.2g}"


def _size(size: float) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.{2 if size < 10 * factor else 0}f} {unit}"
    return f"{size} B"


def _wrap(line: str, indent: str = "") -> list[str]:
    return textwrap.wrap(line, WIDTH, break_on_hyphens=False, subsequent_indent=indent)


# ---- picture --------------------------------------------------------------------------------------------------------

COLOURS = {"direct": "#d1495b", "hybrid": "#00798c"}
GREY = "#8a8f98"


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the PNG: time, SMs and buffer per rank against EP size.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        allowed = "needs matplotlib: pip install 'epv2_plugin[report]'"
        raise ConfigError("epv2 plan", "--png", str(path), allowed) from None
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    times, sms, buffers = figure.subplots(1, 3, width_ratios=[1.35, 1, 1])
    sizes = [point["ep"] for point in document["points"]]
    for axes in (times, sms, buffers):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45 if len(sizes) > 6 else 0)
        axes.minorticks_off()
        axes.tick_params(labelsize=9)
        axes.set_xlabel("EP size (ranks that share the experts)", fontsize=9)
        axes.grid(alpha=0.25)
        if document["asked_ep"] and len(sizes) > 1:
            axes.axvline(document["asked_ep"], color=GREY, lw=0.8, ls=":")
            place = (document["asked_ep"], 0.02)
            axes.annotate(
                "configured",
                place,
                xycoords=("data", "axes fraction"),
                fontsize=8,
                color=GREY,
                va="bottom",
                rotation=90,
            )
    _draw_times(document, times)
    _draw_sms(document, sms)
    _draw_buffers(document, buffers)
    work = document["workload"]
    limit = f" in {work['topk_groups']} of {work['groups']} groups" if work["topk_groups"] < work["groups"] else ""
    nic = document["machine"]["nic_gbytes_per_s"]
    network = f", NIC {nic:.3g} GB/s" if nic else ""
    link = document["machine"]["scale_up_gbytes_per_s"]
    network = (f", scale-up {link:.3g} GB/s" if link else "") + network
    figure.suptitle(
        f"{Path(document['config']).name}: {work['tokens']} tokens a rank, hidden {work['hidden']}, top-{work['topk']} "
        f"of {work['experts']}{limit}, {work['dtype']} dispatch\n{document['machine']['gpu']}"
        f"{network}; predicted, not measured",
        fontsize=11,
    )
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _curve(document: dict[str, Any], mode: str, key: str, operation: str | None = None) -> list[tuple[int, float]]:
    """(EP size, value) where the mode exists; in one node both modes are the same."""
    found = []
    for point in document["points"]:
        entries = [entry for entry in point["modes"] if entry["mode"] == mode or point["nodes"] == 1]
        found += [(point["ep"], entry[operation][key] if operation else entry[key]) for entry in entries]
    return found


def _modes(document: dict[str, Any]) -> list[str]:
    return [mode for mode in COLOURS if any(e["mode"] == mode for p in document["points"] for e in p["modes"])]


def _draw_times(document: dict[str, Any], axes: Any) -> None:
    for mode in _modes(document):
        for operation, style in (("dispatch", "o-"), ("combine", "s--")):
            points = [(ep, us / 1e3) for ep, us in _curve(document, mode, "us", operation)]
            label = f"{operation}, {mode}"
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[mode], ms=3.5, lw=1.6, label=label)
    axes.set_ylim(bottom=0)
    axes.set_title("Time (ms)", loc="left", fontsize=11, fontweight="bold")
    axes.legend(frameon=False, fontsize=9)


def _draw_sms(document: dict[str, Any], axes: Any) -> None:
    for place, mode in enumerate(_modes(document)):
        points = _curve(document, mode, "num_sms")
        # Broad below thin: equal curves stay visible.
        style: dict[str, Any] = {"lw": 5, "alpha": 0.4, "ms": 8} if place == 0 else {"lw": 1.6, "ms": 3.5}
        axes.plot(*zip(*points, strict=True), color=COLOURS[mode], marker="o", label=mode, **style)
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title("SMs held", loc="left", fontsize=11, fontweight="bold")
    axes.legend(frameon=False, fontsize=9)


def _draw_buffers(document: dict[str, Any], axes: Any) -> None:
    linear = [(point["ep"], point["linear_window_bytes"] / GIB) for point in document["points"]]
    axes.plot(*zip(*linear, strict=True), color=GREY, lw=1.2, ls="--", label="linear: a slot per (rank, token)")
    ends = [(linear[-1], GREY)]
    values = [size for _, size in linear]
    for mode in _modes(document):
        points = [(ep, size / GIB) for ep, size in _curve(document, mode, "buffer_bytes")]
        axes.plot(*zip(*points, strict=True), color=COLOURS[mode], marker="o", ms=3.5, lw=1.6, label=mode)
        ends.append((points[-1], COLOURS[mode]))
        values += [size for _, size in points]
    lowest = min(value for (_, value), _ in ends)
    for (ep, value), colour in ends:
        place = (0, -12 if value == lowest else 5)
        axes.annotate(
            f"{value:.3g}", (ep, value), xytext=place, textcoords="offset points", ha="right", fontsize=8, color=colour
        )
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 3, max(values) * 3)
    axes.set_title("Buffer per rank (GiB)", loc="left", fontsize=11, fontweight="bold")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
