"""What `epv2 bench` prints and writes: where numbers come from, and tables of at most 120 columns."""

from __future__ import annotations

import datetime
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from epv2_plugin.jit.toolchain import loaded_nccl_version
from epv2_plugin.training.machine import machine, versions

SCHEMA = 1  # of the JSON files
WIDTH = 120
NO_VALUE = "-"
Samples = Sequence[Sequence[float]]  # [repetition][rank]


def circumstances(command: str, device: torch.device) -> dict[str, Any]:
    """`command`, `date`, `machine` and `versions`, ready for JSON."""
    facts, found = machine(), versions("epv2_plugin", "torch", "deep_ep")
    found["torch"] = torch.__version__
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "sms": properties.multi_processor_count, "gpus": torch.cuda.device_count()}
        found["nccl"] = loaded_nccl_version()
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"command": command, "date": date, "machine": facts, "versions": found}


def head(document: dict[str, Any]) -> list[str]:
    """The lines that say which command, machine, date and versions made the numbers."""
    facts = document["machine"]
    gpu = f"{facts['gpus']} x {facts['gpu']} ({facts['sms']} SMs), " if "gpu" in facts else ""
    known = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if "not installed" not in value)
    line = f"{gpu}{facts['cpus']} cores of {facts['cpu']}; {document['date']}; {known}"
    return [*_wrap(document["command"]), *_wrap(line)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first to the left and the others to the right; a header may have two lines."""
    heads = [title.split("\n") for title in header]
    height = max(map(len, heads))
    lines = [[""] * (height - len(h)) + h for h in heads]
    cells = [*zip(*lines, strict=True), *rows]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    out = []
    for row in cells:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        out.append("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    return out


def slowest(samples: Samples) -> list[float]:
    """The time of the slowest rank in each repetition."""
    return [max(ranks) for ranks in samples]


def spread(values: Sequence[float]) -> str:
    """Median and half of the distance between the quartiles."""
    if len(values) < 2:
        return f"{values[0]:.0f}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):.0f} ±{(high - low) / 2:.0f}"


def ep_text(document: dict[str, Any]) -> str:
    """The report of `epv2 bench ep`, from what its JSON file holds."""
    setup = document["setup"]
    what = (
        f"{setup['ranks']} ranks x {setup['tokens']} tokens, hidden {setup['hidden']}, top-{setup['topk']} of "
        f"{setup['experts']} experts, {setup['routing']} routing, {setup['layout']} layout, {setup['dtype']} dispatch, "
        f"bf16 combine, {setup['backend']} backend"
    )
    lines = [*head(document), *_wrap(what), ""]
    lines += _wrap(
        f"Microseconds of the slowest rank, median of {setup['iterations']} repetitions ± half of the interquartile "
        "range; on a GPU behind work that is queued already, which hides the host up to its first launch. before, "
        "after = rows put in order before expert GEMMs can start, or after them. GB/s: bytes received (dispatch) or "
        "returned (combine), a row per token and rank, over the time without / with that."
    )
    lines += [*_times(document), ""]
    if any(result["launches"] for result in document["results"]):
        lines += _wrap(
            "Kernels of profiled repetitions, median of the slowest rank. SM-us = time x CTAs (at most the SMs that a "
            "rank has). limit = what the copy rates measured in this run allow for the bytes that must move, what "
            "bounds it, and its share of the time above."
        )
        lines += [*_kernels(document), ""]
    lines += [f"Medians of each rank, dispatch/combine in microseconds, sms = {_sms_meaning(document)}"]
    lines += [*_ranks(document), ""]
    sends = {result["path"]: result["sends"] for result in document["results"]}
    lines += _wrap(
        "; ".join(f"{path}: {what}" for path, what in sends.items()) + ". Every path was checked against torch."
    )
    for note in document["notes"]:
        lines += _wrap(note)
    return "\n".join(lines)


def _sms_meaning(document: dict[str, Any]) -> str:
    return "the budget" if document["setup"]["backend"] == "cuda" else "0 on a host"


def _received_bytes(document: dict[str, Any], fp8: bool, stage: str) -> list[float]:
    """Mean over ranks of the bytes received, in each repetition."""
    row = document["row_bytes"]["combine"]
    if stage == "dispatch" and fp8:
        row = document["row_bytes"]["dispatch"]
    return [row * statistics.fmean(ranks) for ranks in document["received_rows"]]


def _times(document: dict[str, Any]) -> list[str]:
    rows = []
    for result in document["results"]:
        samples = {stage: slowest(values) for stage, values in result["samples_us"].items()}
        before, after = samples["to_experts"], samples["from_experts"]
        sums = [sum(parts) for parts in zip(*samples.values(), strict=True)]
        cells = [result["path"], str(result["sms"]), spread(samples["dispatch"]), f"{statistics.median(before):.0f}"]
        cells += [f"{statistics.median(after):.0f}", spread(samples["combine"]), spread(sums)]
        for stage, extra in (("dispatch", before), ("combine", after)):
            sizes = _received_bytes(document, result["fp8"], stage)
            trios = list(zip(sizes, samples[stage], extra, strict=True))
            alone = statistics.median(size / time / 1e3 for size, time, _ in trios)
            whole = statistics.median(size / (time + more) / 1e3 for size, time, more in trios)
            cells.append(f"{_rate(alone)} / {_rate(whole)}")
        rows.append(cells)
    header = ["path", "sms", "dispatch", "before", "after", "combine", "sum", "GB/s\ndispatch", "GB/s\ncombine"]
    return table(header, rows)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def sm_us(launches: Sequence[dict[str, Any]], sms: int) -> float:
    """SM-microseconds of kernels where a rank has `sms` SMs."""
    return sum(launch["us"] * min(launch["ctas"], sms) for launch in launches)


def _kernels(document: dict[str, Any]) -> list[str]:
    device = document["machine"]["sms"] // document["ranks_per_gpu"]
    rows = []
    for result in document["results"]:
        if not result["launches"]:
            continue
        by_repetition = list(zip(*result["launches"], strict=True))
        cells, held = [result["path"], str(result["sms"])], []
        for operation in ("dispatch", "combine"):
            runs = [[rank[operation] for rank in ranks] for ranks in by_repetition]
            held.append([max(sm_us(launches, device) for launches in ranks) for ranks in runs])
            busy = [max(sum(launch["us"] for launch in launches) for launches in ranks) for ranks in runs]
            largest = max((launch["ctas"] for ranks in runs for launches in ranks for launch in launches), default=0)
            cells += [f"{statistics.median(busy):.0f}", str(largest), f"{statistics.median(held[-1]):.0f}"]
        cells.append(f"{statistics.median(map(sum, zip(*held, strict=True))):.0f}")
        for operation in ("dispatch", "combine"):
            limit = result["limit"] and result["limit"][operation]
            if not limit:
                cells.append(NO_VALUE)
                continue
            time = statistics.median(slowest(result["samples_us"][operation]))
            cells.append(f"{limit['us']:.0f} {limit['bound']} {limit['us'] / time:.0%}")
        rows.append(cells)
    header = ["path", "sms"]
    header += [f"{operation}\n{what}" for operation in ("dispatch", "combine") for what in ("us", "CTAs", "SM-us")]
    return table([*header, "sum\nSM-us", "dispatch\nlimit us", "combine\nlimit us"], rows)


def _ranks(document: dict[str, Any]) -> Iterator[str]:
    cells = []
    for result in document["results"]:
        by_rank = [
            [statistics.median(rank) for rank in zip(*result["samples_us"][stage], strict=True)]
            for stage in ("dispatch", "combine")
        ]
        times = [f"{dispatch:.0f}/{combine:.0f}" for dispatch, combine in zip(*by_rank, strict=True)]
        cells.append([result["path"], str(result["sms"]), *times])
    ranks = document["setup"]["ranks"]
    width = 2 + max(len(cell) for row in cells for cell in [*row[2:], f"rank {ranks}"])
    fit = max(1, (WIDTH - 2 - max(len(row[0]) for row in cells) - 5) // width)
    for first in range(0, ranks, fit):
        chosen = range(first, min(first + fit, ranks))
        yield from table(
            ["path", "sms", *(f"rank {r}" for r in chosen)],
            [[*row[:2], *(row[2 + r] for r in chosen)] for row in cells],
        )


def sm_text(document: dict[str, Any]) -> str:
    """The report of `epv2 bench sm`, from what its JSON file holds."""
    modes = {"read": "read only", "write": "write only", "copy": "copy 1 -> 1", "copy_twice": "read once,\nwrite twice"}
    rows = [
        [
            str(rate["sms"]),
            *(f"{rate[mode]:.1f}" for mode in modes),
            *(f"{rate[mode] * rate['sms']:.0f}" for mode in modes),
        ]
        for rate in document["rates"]
    ]
    lines = [*head(document), ""]
    lines += _wrap(
        f"GB/s, median of {document['repetitions']}: bulk copies of rows of {document['row_bytes']} bytes by "
        f"as many warps as are fastest, with {document['stages']} rows in flight each. Per SM, then together; a copy "
        "counts one direction, the last mode the bytes written."
    )
    header = ["SMs busy", *modes.values(), *modes.values()]
    return "\n".join(
        [*lines, *table(header, rows), "", *_wrap(f"Kept for the SM budget model in {document['stored']}")]
    )


def engram_text(document: dict[str, Any]) -> str:
    """The report of `epv2 bench engram`, from what its JSON file holds."""
    setup = document["setup"]
    what = (
        f"{setup['ranks']} ranks x {setup['rows']} rows of {setup['hidden']} {setup['dtype']}; each fetches "
        f"{setup['tokens']} x {setup['entries']} random rows; {setup['backend']} backend"
    )
    if setup["backend"] == "cuda":
        what += (
            f", table in {setup['memory'].upper()} memory, at most {setup['sms']} SMs for a kernel of ours, the local "
            "gather as many as torch takes"
        )
    entries = setup["tokens"] * setup["entries"]
    gather = statistics.median(slowest(document["samples_us"]["gather"]))
    rows = []
    for name, samples in document["samples_us"].items():
        times, row_bytes = slowest(samples), document["row_bytes"][name]
        median = statistics.median(times)
        share = f"{gather / median:.0%}" if row_bytes == document["row_bytes"]["gather"] else ""
        rate = _rate(entries * row_bytes / median / 1e3)
        rows.append([name, spread(times), rate, f"{entries / median:.3g}", share])
    lines = [*head(document), *_wrap(what), ""]
    lines += _wrap(
        f"Microseconds of the slowest rank, median of {setup['iterations']} repetitions ± half of the interquartile "
        "range; GB/s and million rows/s of each rank, duplicates counted. gather = index_select from a local table of "
        "as many rows as all ranks have, at most 1 GiB. Every fetch was checked against the table."
    )
    return "\n".join([*lines, *table(["", "time", "GB/s", "Mrows/s", "of the gather"], rows)])


def pp_text(document: dict[str, Any]) -> str:
    """The report of `epv2 bench pp`, from what its JSON file holds."""
    setup = document["setup"]
    lines = [*head(document), *_wrap(f"{setup['ranks']} ranks in a ring, {setup['backend']} backend"), ""]
    what = f"median of {setup['iterations']} repetitions ± half of the interquartile range"
    share = document.get("inplace")
    inplace = "" if share is None else f" with room for it, {share:.0%} of whose large tensors were copied only once"
    lines += _wrap(
        f"Every rank sends {setup['large']} bytes to the next and receives as many; microseconds of the slowest rank, "
        f"{what}; GB/s in one direction, and its share of a plain copy's. torch = NCCL's send and receive, on the "
        f"host gloo's; epv2 = pp_send and pp_recv, in place = pp_recv_inplace{inplace}."
    )
    lines += _shares(document["large_us"], setup["large"])
    lines += _wrap(f"The same, {document['in_a_row']} started before the first is waited for; microseconds of one.")
    lines += _shares(document["in_a_row_us"], setup["large"])
    queued = "" if share is None else " All are queued before the clock starts, so that it shows no time of the host."
    lines += _wrap(
        f"{document['long_row']} in a row, {document['in_a_row']} under way at a time; microseconds of one, and what "
        f"the slowest host needs for one while they go on.{queued}"
    )
    lines += _shares(document["queued_us"], setup["large"], document["host_us"])
    lines += _wrap(f"{setup['small']} bytes from a rank to the next and back: microseconds of one way, {what}.")
    small = document["small_us"].items()
    lines += [*table(["", "one way"], [[name, spread(slowest(samples))] for name, samples in small])]
    return "\n".join([*lines, *_gemms(document, what)])


def _shares(samples: dict[str, Samples], num_bytes: int, hosts: dict[str, Samples] | None = None) -> list[str]:
    """Times of transfers of `num_bytes`, beside that of a plain copy; and of hosts."""
    medians = {name: statistics.median(slowest(each)) for name, each in samples.items()}
    rows = [
        [
            name,
            spread(slowest(samples[name])),
            _rate(num_bytes / median / 1e3),
            f"{medians['plain copy'] / median:.0%}",
            *([] if hosts is None else [spread(slowest(hosts[name]))]),
        ]
        for name, median in medians.items()
    ]
    columns = ["", "time", "GB/s", "of the copy", *([] if hosts is None else ["host"])]
    return [*table(columns, rows), ""]


def _gemms(document: dict[str, Any], what: str) -> list[str]:
    """GEMMs beside transfers, where they were measured."""
    if "gemm_us" not in document:
        return []
    alone = statistics.median(slowest(document["gemm_us"]["alone"]))
    rows = []
    for name, samples in document["gemm_us"].items():
        times, moved = slowest(samples), [min(ranks) for ranks in document["gemm_moved"][name]]
        rate = statistics.median(num_bytes / us / 1e3 for num_bytes, us in zip(moved, times, strict=True))
        meanwhile = "" if name == "alone" else _rate(rate)
        rows.append([name, spread(times), f"{alone / statistics.median(times):.1%}", meanwhile])
    about = (
        f"bf16 GEMMs alone and beside transfers, microseconds of the slowest rank, {what}; GB/s of the transfers that "
        "ended meanwhile on the slowest. Paced: started as often as torch's came to an end there."
    )
    return ["", *_wrap(about), *table(["", "time", "of the lone speed", "GB/s meanwhile"], rows)]


def fsdp_text(document: dict[str, Any]) -> str:
    """The report of `epv2 bench fsdp`, from what its JSON file holds."""
    setup = document["setup"]
    what = f"median of {setup['iterations']} repetitions ± half of the interquartile range"
    lines = [
        *head(document),
        *_wrap(
            f"{setup['ranks']} ranks, a layer of {setup['parameters']} parameters: gathered in bf16, gradients reduced "
            f"in fp32 ({document['sms']} SMs of ours), {setup['backend']} backend"
        ),
        "",
        *_wrap(
            f"Microseconds of the slowest rank, {what}; GB/s that a rank receives or, of gradients, reads of others. "
            "torch = FSDP2's own, over NCCL, on the host gloo. Results of both were compared."
        ),
    ]
    rows = []
    for kind, title in (("gather", "all-gather"), ("reduce", "reduce-scatter")):
        for name, samples in document[f"{kind}_us"].items():
            times = slowest(samples)
            rate = document[f"{kind}_bytes"] / statistics.median(times) / 1e3
            rows.append([f"{title}, {name}", spread(times), _rate(rate)])
    lines += [*table(["", "time", "GB/s"], rows), *_gemms(document, what), ""]
    lines += _wrap(
        f"A training step of {document['layers']} such layers, {document['tokens']} tokens a rank, microseconds of the "
        f"slowest rank, {what}. Losses of both were compared."
    )
    ours = statistics.median(slowest(document["step_us"]["epv2"]))
    rows = [
        [name, spread(slowest(samples)), f"{statistics.median(slowest(samples)) / ours:.2f}"]
        for name, samples in document["step_us"].items()
    ]
    return "\n".join([*lines, *table(["", "time", "over epv2's"], rows)])


def cp_text(document: dict[str, Any]) -> str:
    """The report of `epv2 bench cp`, from what its JSON file holds."""
    setup = document["setup"]
    lines = [
        *head(document),
        *_wrap(
            f"{setup['ranks']} ranks, {setup['tokens']} tokens, {setup['heads']} query and {setup['groups']} key/value "
            f"heads of {setup['width']}, bf16, causal, {setup['backend']} backend"
        ),
        "",
    ]
    what = f"microseconds of the slowest rank, median of {setup['iterations']} ± half of the interquartile range"
    others = (setup["ranks"] - 1) * document["gather_bytes"]
    lines += _wrap(f"All-gather of {document['gather_bytes']} bytes of each rank: {what}; GB/s received.")
    rows = []
    for name, samples in document["gather_us"].items():
        times = slowest(samples)
        rows.append([name, spread(times), _rate(others / statistics.median(times) / 1e3)])
    lines += [*table(["", "time", "GB/s"], rows), ""]
    lines += _wrap(
        f"Attention forward and backward, a layer of {document['layers']} in a row: {what}; most memory of a rank "
        "beside inputs, for one layer, the session's window included. Outputs and gradients of both were compared."
    )
    ours = statistics.median(slowest(document["attention_us"]["epv2"]))
    rows = []
    for name, samples in document["attention_us"].items():
        peaks = [rank[name] for rank in document["peak_bytes"] or []]
        times = slowest(samples)
        ratio = f"{statistics.median(times) / ours:.2f}"
        rows.append([name, spread(times), ratio, f"{max(peaks) / 2**20:.0f}" if peaks else NO_VALUE])
    lines += table(["", "time", "over epv2's", "MiB"], rows)
    return "\n".join(lines)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)
