"""The report of an A/B run: `report.md` with a verdict first, and `report.png`, from `meta.json` and `metrics.jsonl`.

The first arm is the baseline. Arms took turns step by step in one launch, so step times are compared pairwise: both
members of a pair met the same state of the machine.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from epv2_plugin.config import ConfigError
from epv2_plugin.training.run_folder import META, METRICS

logger = logging.getLogger("epv2_plugin")

OURS = "epv2"
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, at every step
CHANCE = 3.0  # two runs that differ by rounding alone may be this many times further apart than two others
_NOISE = (
    "stock's two dispatchers compute the same function, but alltoall sums all of a token's expert rows at once, and "
    "allgather those of each rank first"
)
_LEAST_NOISE = 1e-7  # what a loss in fp32 is rounded by
_SHARED_STEPS = 4  # at the beginning
MIN_PAIRS = 5  # fewer steps say nothing about a difference in time
RESAMPLES = 4000
MIB = 1 << 20
PHASES = ("dispatch", "expert", "combine")
# What runs beside the rest, on streams of its own; and how it is called.
BESIDE = {"all_gather": "parameter all-gathers", "reduce_scatter": "gradient reduce-scatters"}
NO_VALUE = "-"


@dataclass(frozen=True)
class Paired:
    """Median over steps of time(arm) / time(baseline), with a 95 % bootstrap interval of that median."""

    steps: int
    ratio: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.steps >= MIN_PAIRS and not self.low <= 1 <= self.high


@dataclass(frozen=True)
class LossDifference:
    """The largest relative difference of an arm's loss from the baseline's, and where."""

    steps: int
    largest: float
    at_step: int | None
    not_finite: tuple[int, ...]


class Run:
    """What an A/B run left: `meta`, the arms' names, and a record for each arm and step."""

    def __init__(self, folder: Path):
        try:
            self.meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
            lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            missing = Path(str(error.filename)).name
            raise ConfigError(str(folder), missing, "", "not found; is this the folder of an A/B run?") from None
        except json.JSONDecodeError as error:
            raise ConfigError(str(folder), "meta.json", "", f"not valid JSON: {error}") from None
        self.arms: list[str] = [str(arm) for arm in self.meta.get("arms", [])]
        if not self.arms:
            raise ConfigError(str(folder), "meta.json: arms", self.meta.get("arms"), "must name at least one arm")
        # Stock's other dispatcher, which rounds its sums in another order than the stock arm `base`: a yardstick for
        # losses, and not an arm unless it was asked for as one.
        noise = self.meta.get("noise") or {}
        self.noise: str | None = noise.get("arm")
        self.noise_base: str = noise.get("base", self.arms[0])
        names = [*self.arms, *([self.noise] if self.noise else [])]
        self.records: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in names}
        self.unreadable = 0
        for line in lines:
            try:
                record = json.loads(line)
                self.records[record["arm"]][int(record["step"])] = record
            except (ValueError, KeyError, TypeError):  # the line that an interrupted run left half-written
                self.unreadable += bool(line.strip())
        self.baseline = self.arms[0]
        self.warmup = int(self.meta.get("warmup_steps", 0))

    def steps(self, arm: str) -> list[int]:
        """The steps that the arm completed."""
        return sorted(self.records[arm])

    def timed(self, arm: str) -> list[int]:
        """The steps of the arm after the warm-up."""
        return [step for step in self.steps(arm) if step >= self.warmup]

    def values(self, arm: str, key: str | Callable[[dict[str, Any]], float], *, warm: bool = True) -> np.ndarray:
        """One finite number for each (timed) step of the arm, float64 `[steps]`."""
        get = _getter(key)
        steps = self.timed(arm) if warm else self.steps(arm)
        values = np.array([get(self.records[arm][step]) for step in steps], dtype=np.float64)
        return values[np.isfinite(values)]

    def loss(self, arm: str, step: int) -> float:
        """The loss, NaN where there is none."""
        return _number(self.records[arm].get(step, {}).get("loss"))


def begin_run(folder: Path, meta: dict[str, Any]) -> None:
    """Before an A/B's first record: write `meta.json`, and leave no report of an earlier run beside it."""
    for name in ("report.md", "report.png"):
        (folder / name).unlink(missing_ok=True)
    write_meta(folder, meta)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write `meta.json`."""
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n")


def write_report(folder: str | Path) -> Path:
    """Write `report.md` and, where matplotlib is installed, `report.png` into the folder of an A/B run.

    The output depends on `meta.json` and `metrics.jsonl` alone. Arms without a record, runs that were interrupted and
    losses that are not finite are reported as such.

    Returns:
        The path of `report.md`.

    Raises:
        ConfigError: `meta.json` or `metrics.jsonl` is missing, or `meta.json` names no arm.
    """
    folder = Path(folder)
    run = Run(folder)
    try:
        _draw(run, folder / "report.png")
        picture = "![losses and time per step](report.png)"
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        picture = "No picture: matplotlib is not installed; `pip install 'epv2_plugin[report]'` brings it."
        (folder / "report.png").unlink(missing_ok=True)  # an older picture would not belong to these numbers
    sections = [_head(run), picture, _times(run), _traffic(run), _losses(run), _circumstances(run), _limits(run)]
    path = folder / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def verdict(run: Run) -> str:
    """One or two sentences: who is faster, and whether the losses agree."""
    rival = OURS if OURS in run.arms[1:] else next(iter(run.arms[1:]), None)
    if rival is None:
        return f"Only one arm ({run.baseline}) was asked for: there is nothing to compare."
    paired, base = paired_ratio(run, rival), run.baseline
    if not paired.steps:
        empty = " and ".join(arm for arm in (base, rival) if not run.timed(arm)) or "the arms together"
        time = f"No verdict on time: {empty} completed no step after the warm-up."
    elif paired.steps < MIN_PAIRS:
        time = f"No verdict on time: {paired.steps} timed steps are too few (at least {MIN_PAIRS} are needed)."
    else:
        spread = f"median step-time ratio {paired.ratio:.3f}, 95 % interval {paired.low:.3f} to {paired.high:.3f}"
        percent = 100 * abs(1 - paired.ratio)
        if not paired.decided:
            time = f"**No difference in time beyond noise** between {rival} and {base} ({spread})."
        elif paired.ratio < 1:
            time = f"**{rival} is faster by {percent:.1f} %** of {base}'s time per step ({spread})."
        else:
            time = f"**{base} is faster here**: {rival} takes {percent:.1f} % more time per step ({spread})."
    return f"{time} {_loss_sentence(run, rival)}"


def _loss_sentence(run: Run, arm: str) -> str:
    difference = loss_difference(run, arm)
    precision = str(run.meta.get("precision", "fp32"))
    tolerance = LOSS_TOLERANCE.get(precision, LOSS_TOLERANCE["fp32"])
    if difference.not_finite:
        return f"**Losses are not finite** at {len(difference.not_finite)} steps, first at {difference.not_finite[0]}."
    if not difference.steps:
        return "There is no step at which the losses can be compared."
    detail = f"largest relative difference {difference.largest:.1e} at step {difference.at_step}"
    noise = noise_difference(run, difference.steps)
    if noise is not None and noise.largest > 0:
        return _noise_sentence(arm, difference, run, noise)
    if difference.largest <= tolerance:
        return (
            f"Losses agree at each of {difference.steps} steps ({detail}, tolerance {tolerance:.0e} for {precision})."
        )
    unknown = ""
    if run.noise is not None and noise is None:
        unknown = (
            f" Whether by more than rounding is not known: {run.noise}, the yardstick, was not trained to the end."
        )
    return f"**Losses differ**: {detail}, tolerance {tolerance:.0e} for {precision}.{unknown}"


def _noise_sentence(arm: str, difference: LossDifference, run: Run, noise: LossDifference) -> str:
    detail = (
        f"{arm} and {run.baseline} differ by at most {difference.largest:.1e} (step {difference.at_step}), stock's own "
        f"{run.noise} and {run.noise_base} by {noise.largest:.1e} (step {noise.at_step})"
    )
    # Rounding grows as training goes on: a late difference of stock's does not excuse an early one of ours.
    band = _noise_band(run)
    ratios = {
        step: _relative(run.loss(arm, step), run.loss(run.baseline, step)) / band[step].largest
        for step in run.steps(arm)
        if step in band
    }
    at_step = max(ratios, key=lambda step: ratios[step])
    times = ratios[at_step]
    if round(times, 1) <= 1:  # as far apart, where ours rounds as the yardstick does
        return f"Losses agree within rounding noise at each of {difference.steps} steps: {detail}."
    at = f"{times:.1f} times the rounding noise up to step {band[at_step].up_to}"
    if times <= CHANCE:
        return f"Losses differ by {at}, which may be chance: {detail}."
    why = "" if run.meta.get("dispatch_dtype") != "fp8" else " epv2 dispatches in fp8, which rounds more."
    return f"**Losses differ by more than rounding noise** ({at}): {detail}.{why}"


class _Noise(NamedTuple):
    """The largest relative difference of the two stock runs up to a step."""

    largest: float
    up_to: int


def _noise_band(run: Run) -> dict[int, _Noise]:
    """What the losses of each step are judged by, of those at which both stock runs have a finite loss.

    The first few steps share theirs: how near two losses come at a single step is luck.
    """
    band, largest = [], _LEAST_NOISE
    for step in run.steps(run.noise or ""):
        noise = _noise_at(run, step)
        if math.isfinite(noise):
            largest = max(noise, largest)
            band.append(_Noise(largest, step))
    shared = band[:_SHARED_STEPS]
    judged = shared[-1:] * len(shared) + band[len(shared) :]
    return {own.up_to: noise for own, noise in zip(band, judged, strict=True)}


def paired_ratio(run: Run, arm: str, key: str | Callable[[dict[str, Any]], float] = "step_ms") -> Paired:
    """Compare the arm's time with the baseline's, step by step, after the warm-up."""
    ratios = []
    get = _getter(key)
    for step in run.timed(arm):
        ours, theirs = get(run.records[arm][step]), get(run.records[run.baseline].get(step, {}))
        if math.isfinite(ours) and math.isfinite(theirs) and theirs > 0:
            ratios.append(ours / theirs)
    if not ratios:
        return Paired(0, math.nan, math.nan, math.nan)
    sample = np.array(ratios)
    picks = np.random.default_rng(0).integers(0, len(sample), (RESAMPLES, len(sample)))  # seeded: same in, same out
    low, high = np.quantile(np.median(sample[picks], axis=1), [0.025, 0.975])
    return Paired(len(sample), float(np.median(sample)), float(low), float(high))


def loss_difference(run: Run, arm: str, base: str | None = None) -> LossDifference:
    """Compare the arm's losses with those of `base` (default: the baseline) at the steps that both completed."""
    base = base or run.baseline
    largest, at_step, count, not_finite = 0.0, None, 0, []
    for step in run.steps(arm):
        if step not in run.records[base]:
            continue
        ours, theirs = run.loss(arm, step), run.loss(base, step)
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            not_finite.append(step)
            continue
        count += 1
        difference = _relative(ours, theirs)
        if at_step is None or difference > largest:
            largest, at_step = difference, step
    return LossDifference(count, largest, at_step, tuple(not_finite))


def noise_difference(run: Run, steps: int | None = None) -> LossDifference | None:
    """How far stock's two dispatchers are apart, which differ only in the order in which they round their sums.

    Args:
        steps: as many steps must have been compared; None = any number.

    Returns:
        None if there is no such pair of runs, or it is shorter.
    """
    if run.noise is None or run.noise_base not in run.records:
        return None
    noise = loss_difference(run, run.noise, run.noise_base)
    return None if steps is not None and noise.steps < steps else noise


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-30)


def _getter(key: str | Callable[[dict[str, Any]], float]) -> Callable[[dict[str, Any]], float]:
    return key if callable(key) else lambda record: _number(record.get(key))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _head(run: Run) -> str:
    meta = run.meta
    lines = [f"# A/B: {meta.get('name', 'unnamed run')}", "", verdict(run)]
    parts = [
        part for part in ("expert", "pipeline", "context", "fsdp") if any(part in runs for runs in _runs(run).values())
    ]
    if len(parts) > 1:
        rows = [[arm, *(runs.get(part, NO_VALUE) for part in parts)] for arm, runs in _runs(run).items()]
        lines += ["", "Communication of each arm:", "", _table(["arm", *parts], rows)]
    wanted = max(len(run.steps(arm)) for arm in run.arms)
    for arm in run.arms:
        done = len(run.steps(arm))
        if not done:
            lines += ["", f"**Arm {arm} left no record.**"]
        elif done < wanted:
            lines += ["", f"**The run was interrupted**: arm {arm} has {done} of {wanted} steps."]
    if run.meta.get("interrupted") and all(len(run.steps(arm)) == wanted for arm in run.arms):
        lines += ["", f"**The run was interrupted** after {wanted} steps of each arm."]
    if run.unreadable:
        lines += ["", f"{run.unreadable} line(s) of metrics.jsonl could not be read and were left out."]
    return "\n".join(lines)


def _runs(run: Run) -> dict[str, dict[str, str]]:
    """What each arm runs, by kind of communication."""
    runs = run.meta.get("runs") or {}
    return {arm: runs.get(arm, {}) for arm in run.arms}


def _times(run: Run) -> str:
    rows: list[list[str]] = []
    names: list[tuple[str, str | Callable[[dict[str, Any]], float]]] = [("**step** (slowest rank)", "step_ms")]
    for phase in PHASES:
        names.append((f"{phase} forward", f"{phase}_ms"))
        names.append((f"{phase} backward", f"{phase}_backward_ms"))
        names.append((f"**{phase}**", _both(phase)))
    beside = [(title, f"{name}_ms") for name, title in BESIDE.items()]
    names += [(title, key) for title, key in beside if any(len(run.values(arm, key)) for arm in run.arms)]
    for label, key in names:
        cells = [_spread(run.values(arm, key)) for arm in run.arms]
        for arm in run.arms[1:]:
            paired = paired_ratio(run, arm, key)
            cells.append(f"{paired.ratio:.3f}" if paired.steps else NO_VALUE)
        rows.append([label, *cells])
    header = ["ms per step", *run.arms, *(f"{arm} / {run.baseline}" for arm in run.arms[1:])]
    text = [
        "## Time",
        "",
        f"Median (quartiles) over the steps after {run.warmup} warm-up steps. The last columns are the median of the "
        "steps' own ratios, because what else the machine does hits both arms of a step; two medians may come from "
        "different steps, so dividing them gives something else.",
        "",
        _table(header, rows),
    ]
    if len(run.arms) > 1:
        pairs = []
        for arm in run.arms[1:]:
            paired = paired_ratio(run, arm)
            interval = f"{paired.low:.3f} to {paired.high:.3f}" if paired.steps else NO_VALUE
            ratio = f"{paired.ratio:.3f}" if paired.steps else NO_VALUE
            pairs.append([arm, str(paired.steps), ratio, interval])
        text += [
            "",
            f"Step time relative to {run.baseline}, paired step by step (bootstrap of the median):",
            "",
            _table(["arm", "pairs", "median ratio", "95 % interval"], pairs),
        ]
    return "\n".join(text)


def _both(phase: str) -> Callable[[dict[str, Any]], float]:
    return lambda record: _number(record.get(f"{phase}_ms")) + _number(record.get(f"{phase}_backward_ms"))


def _traffic(run: Run) -> str:
    rows = []
    for arm in run.arms:
        sent, plain = (run.values(arm, key, warm=False) for key in ("sent_bytes", "undeduplicated_bytes"))
        memory, tokens = run.values(arm, "peak_mib", warm=False), run.values(arm, "tokens", warm=False)
        rate = run.values(
            arm, lambda record: 1e3 * _number(record.get("tokens")) / (_number(record.get("step_ms")) or math.nan)
        )
        factor = f"{plain.sum() / sent.sum():.2f}" if len(sent) and len(plain) and sent.sum() > 0 else NO_VALUE
        rows.append(
            [
                arm,
                f"{np.median(sent) / MIB:.3f}" if len(sent) else NO_VALUE,
                f"{np.median(plain) / MIB:.3f}" if len(plain) else NO_VALUE,
                factor,
                f"{memory.max():.0f}" if len(memory) else NO_VALUE,
                f"{np.median(tokens):,.0f}" if len(tokens) else NO_VALUE,
                f"{np.median(rate):,.0f}" if len(rate) else NO_VALUE,
            ]
        )
    header = ["arm", "sent MiB", "one copy per expert MiB", "deduplication factor"]
    header += ["peak memory MiB", "tokens", "tokens/s"]
    for part in ("pipeline", "context"):
        found = [run.values(arm, f"{part}_bytes", warm=False) for arm in run.arms]
        if any(values.any() for values in found):
            header.append(f"{part} MiB")
            for row, values in zip(rows, found, strict=True):
                row.append(f"{np.median(values) / MIB:.3f}" if len(values) else NO_VALUE)
    note = (
        "Bytes to other ranks in a step, summed over ranks, layers and directions; sent = by dispatch and combine, "
        "pipeline = between stages, context = keys, values and their gradients. The deduplication factor says "
        "how much more one copy for each token and expert would have been. Peak memory is the largest of all steps and "
        "ranks; the arms live in the same processes, so it includes the other arms' models and optimizers. "
    )
    if _on_gpu(run):
        note += "It is what torch allocated on the GPU: communication buffers, NCCL and CUDA itself come on top."
    return f"## Bytes and memory\n\n{note}\n\n{_table(header, rows)}"


def _losses(run: Run) -> str:
    rivals = run.arms[1:]
    summary = []
    compared = [(arm, loss_difference(run, arm)) for arm in rivals]
    noise = noise_difference(run)
    if noise is not None:
        compared.append((f"rounding noise: {run.noise} and {run.noise_base}", noise))
    for label, difference in compared:
        where = NO_VALUE if difference.at_step is None else str(difference.at_step)
        size = f"{difference.largest:.2e}" if difference.steps else NO_VALUE
        summary.append([label, str(difference.steps), size, where, str(len(difference.not_finite))])
    rows = []
    for step in sorted({step for arm in run.arms for step in run.records[arm]}):
        cells = [f"{run.loss(arm, step):.7f}" if step in run.records[arm] else NO_VALUE for arm in run.arms]
        for arm in rivals:
            ours, theirs = run.loss(arm, step), run.loss(run.baseline, step)
            finite = math.isfinite(ours) and math.isfinite(theirs)
            cells.append(f"{_relative(ours, theirs):.1e}" if finite else NO_VALUE)
        if noise is not None:
            cells.append(f"{_noise_at(run, step):.1e}" if math.isfinite(_noise_at(run, step)) else NO_VALUE)
        rows.append([str(step), *cells])
    text = ["## Losses", ""]
    if rivals:
        header = ["arm", "steps compared", "largest relative difference", "at step", "steps not finite"]
        text += [_table(header, summary), ""]
    said = run.meta.get("noise") or {}
    if "missing" in said:
        text += [f"Rounding noise is not known: {said['missing']}", ""]
    elif noise is not None:
        also = f", {said['also']}" if "also" in said else ""
        text += [f"Rounding noise: {said.get('why', _NOISE)}{also}.", ""]
    columns = ["step", *run.arms, *(f"{arm} difference" for arm in rivals), *(["noise"] if noise is not None else [])]
    table = _table(columns, rows)
    text += ["<details><summary>Loss of every step</summary>", "", table, "", "</details>"]
    return "\n".join(text)


def _noise_at(run: Run, step: int) -> float:
    """Relative difference of the two stock runs at a step, NaN where one of them has no finite loss."""
    return math.nan if run.noise is None else _relative(run.loss(run.noise, step), run.loss(run.noise_base, step))


def _on_gpu(run: Run) -> bool:
    return "gpu" in (run.meta.get("machine") or {})


def _circumstances(run: Run) -> str:
    meta = run.meta
    data = meta.get("data") or {}
    rows = [[key, _value(meta.get(key))] for key in ("recipe", "date", "processes", "layout", "precision")]
    parameters = meta.get("parameters")
    rows.append(["parameters", f"{parameters:,}" if isinstance(parameters, int) else _value(parameters)])
    skew = meta.get("skew")
    rows.append(
        ["routing", "the model's own" if skew is None else f"skewed: {skew:g} of the tokens go to one popular expert"]
    )
    computed = f"as computed, {_value(meta.get('precision'))}"  # "bf16" means: not cast
    rows.append(["dispatch of epv2", "fp8" if meta.get("dispatch_dtype") == "fp8" else computed])
    rows.append(["SM budget", _budget(run)])
    tokens = data.get("tokens")
    size = f"{tokens:,} tokens" if isinstance(tokens, int) else "unknown size"
    rows.append(["data", f"{_value(data.get('path'))}, {size}, digest {_value(data.get('digest'))}"])
    rows += [[f"version: {key}", _value(value)] for key, value in (meta.get("versions") or {}).items()]
    rows += [[f"machine: {key}", _value(value)] for key, value in (meta.get("machine") or {}).items()]
    return f"## Circumstances\n\n    {_value(meta.get('command'))}\n\n{_table(['what', 'value'], rows)}"


def _budget(run: Run) -> str:
    """What ran on the first rank's expert-parallel groups, as the plugin says itself."""
    asked = f"sm_budget.expert: {_value(run.meta.get('sm_budget'))}"
    text = "{backend} backend over {transport}, {mode} mode, {sms} SMs"
    kinds = [text.format_map(group) for group in run.meta.get("expert_parallel") or []]
    return "; ".join([asked, *dict.fromkeys(kinds)])


def _value(value: object) -> str:
    return "unknown" if value is None else str(value)


def _limits(run: Run) -> str:
    machine = run.meta.get("machine") or {}
    cores, processes, sharing = machine.get("cpus"), run.meta.get("processes"), machine.get("ranks per gpu", 0)
    lines = [
        "## Limits",
        "",
        "- The step time is that of the slowest rank; the times of dispatch, expert and combine are means over ranks, "
        "so the parts need not add up to the step.",
        "- The time of a stage includes waiting: a rank that arrives early in an exchange waits for the slower ones, "
        "and that wait counts as communication.",
    ]
    if any(len(run.values(arm, f"{name}_ms")) for arm in run.arms for name in BESIDE):
        lines.append(
            "- Parameter all-gathers and gradient reduce-scatters are timed on their own streams; on a GPU they run "
            "beside the rest of the step."
        )
    scope = "- The numbers hold for this model, these sizes and this machine."
    if not _on_gpu(run):
        lines.append(
            f"{scope} Processes on one host that exchange data through gloo say little about GPUs and a real network."
        )
        if isinstance(cores, int) and isinstance(processes, int) and cores < processes:
            lines.append(
                f"- {processes} ranks shared {cores} cores, so a rank's time includes time in which others ran."
            )
        return "\n".join(lines)
    lines.append(f"{scope} Stages are timed on the stream that runs the layer.")
    if sharing > 1:
        lines.append(
            f"- {sharing} ranks shared a GPU: its SMs, and its memory in the place of links between GPUs. A rank's "
            "time includes what the others took, and nothing here says how fast links are."
        )
        if not machine.get("mps"):
            lines.append("- **Without MPS the ranks took turns on the GPU: the times say nothing.**")
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    if not len(values):
        return NO_VALUE
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join([":--", *["--:"] * (len(header) - 1)]) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


OUR_COLOUR = "#00798c"
ARM_COLOURS = ("#8a8f98", "#d1495b", "#edae49", "#6a4c93")
PHASE_COLOURS = {"dispatch": "#2f6690", "expert": "#5b9279", "combine": "#e07a5f", "rest": "#d8d8d8"}


def _draw(run: Run, path: Path) -> None:
    """Left: losses of the arms and, below, their relative difference. Right: where the median step's time goes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.35, 1], height_ratios=[2.4, 1])
    losses, difference = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    times = figure.add_subplot(grid[:, 1])
    for axes in (losses, difference, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    _draw_losses(run, losses)
    _draw_differences(run, difference, losses)
    _draw_times(run, times)
    # Without the writer's name and date the file depends on the numbers alone.
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _draw_losses(run: Run, axes: Any) -> None:
    for place, arm in enumerate(run.arms):
        points = [(step, run.loss(arm, step)) for step in run.steps(arm)]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            # Equal curves lie on top of each other: the baseline is broad, the others are thin and dashed.
            style: dict[str, Any] = {"lw": 5, "alpha": 0.5} if place == 0 else {"lw": 1.6, "ls": (3 * place, (5, 3))}
            axes.plot(*zip(*points, strict=True), color=_colour(run, place), label=arm, **style)
    axes.set_title("Loss", loc="left", fontsize=11, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.tick_params(labelbottom=False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)


def place_of_zero(run: Run) -> float:
    """Where equal losses are drawn, as a logarithmic axis has no zero: below all that differ."""
    pairs = [(arm, run.baseline) for arm in run.arms[1:]]
    pairs += [(run.noise, run.noise_base)] if run.noise is not None and run.noise_base in run.records else []
    every = [_relative(run.loss(a, step), run.loss(b, step)) for a, b in pairs for step in run.steps(a)]
    smallest = min((value for value in every if 0 < value < math.inf), default=1.0)
    return min(1e-9, 10.0 ** (math.floor(math.log10(smallest)) - 1))


def _draw_differences(run: Run, axes: Any, losses: Any) -> None:
    floor = place_of_zero(run)
    for place, arm in enumerate(run.arms[1:], start=1):
        points = [(s, _relative(run.loss(arm, s), run.loss(run.baseline, s))) for s in run.steps(arm)]
        points = [(step, max(value, floor)) for step, value in points if math.isfinite(value)]
        if points:
            axes.plot(*zip(*points, strict=True), color=_colour(run, place), marker="o", ms=3, lw=0.8, label=arm)
    noise = noise_difference(run)
    if noise is not None and noise.steps:
        band = _noise_band(run)
        most = [noise.largest for noise in band.values()]
        axes.fill_between([*band], floor, most, color="#8a8f98", alpha=0.25, lw=0, label="rounding noise")
        tolerance, label = most[-1], "rounding noise of stock"
    else:
        tolerance, label = LOSS_TOLERANCE.get(str(run.meta.get("precision")), LOSS_TOLERANCE["fp32"]), "tolerance"
        axes.axhline(tolerance, color="#555555", lw=0.8, ls=":")
    axes.annotate(label, (0.995, tolerance), xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, floor / 2), max(high, tolerance * 10))
    axes.set_title(f"Relative difference from {run.baseline} (equal drawn at {floor:.0e})", loc="left", fontsize=9)
    axes.set_xlabel("step", fontsize=9)
    axes.set_xlim(losses.get_xlim())
    axes.grid(alpha=0.25)


def _draw_times(run: Run, axes: Any) -> None:
    arms = [arm for arm in run.arms if len(run.values(arm, "step_ms"))]
    totals = {arm: float(np.median(run.values(arm, "step_ms"))) for arm in arms}
    bottoms = dict.fromkeys(arms, 0.0)
    for part in (*PHASES, "rest"):
        heights = []
        for arm in arms:
            values = run.values(arm, _both(part)) if part != "rest" else np.array([totals[arm] - bottoms[arm]])
            heights.append(max(0.0, float(np.median(values))) if len(values) else 0.0)
        axes.bar(arms, heights, 0.55, bottom=[bottoms[a] for a in arms], color=PHASE_COLOURS[part], label=part)
        for arm, height in zip(arms, heights, strict=True):
            if height > 0.05 * max(totals.values()):
                colour = "black" if part == "rest" else "white"
                middle = bottoms[arm] + height / 2
                axes.annotate(f"{height:.1f}", (arm, middle), ha="center", va="center", fontsize=8, color=colour)
            bottoms[arm] += height
    for arm in arms:
        axes.annotate(
            f"{totals[arm]:.1f} ms",
            (arm, bottoms[arm]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_title("Median step, forward + backward (ms)", loc="left", fontsize=11, fontweight="bold")
    if arms:
        axes.set_ylim(0, 1.1 * max(bottoms.values()))
        axes.set_xlim(-0.6, max(len(arms), 2) - 0.4)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _colour(run: Run, place: int) -> str:
    return OUR_COLOUR if run.arms[place] == OURS else ARM_COLOURS[place % len(ARM_COLOURS)]
