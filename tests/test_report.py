"""The A/B report: verdicts from made-up runs with a known answer, and runs that went wrong."""

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epv2_plugin.config import ConfigError
from epv2_plugin.training import report
from epv2_plugin.training.ab import losses_differ
from epv2_plugin.training.report import Run, loss_difference, paired_ratio, write_report

META = {
    "name": "made_up",
    "recipe": "recipes/deepseek_v3_tiny.yaml",
    "command": "epv2 ab recipes/deepseek_v3_tiny.yaml",
    "date": "2026-01-01 12:00",
    "arms": ["alltoall", "epv2"],
    "warmup_steps": 3,
    "processes": 4,
    "layout": "EP4 PP1",
    "skew": None,
    "versions": {"torch": "2.13.0"},
    "machine": {"cpus": 2},
    "dispatch_dtype": "bf16",
    "sm_budget": 8,
    "data": {"path": "stdlib", "tokens": 7000000, "digest": "0123456789abcdef"},
    "precision": "fp32",
    "parameters": 1678896,
}
Change = Callable[[dict[str, Any]], dict[str, Any] | None]


NOISE = 1e-3  # relative difference of the two stock runs at the last step


def make_run(
    folder: Path,
    *,
    speed: float = 1.0,
    jitter: float = 0.01,
    steps: int = 30,
    change: Change = lambda r: r,
    noise_steps: int = 0,
    **meta: Any,
) -> Path:
    """A run in which a step of the epv2 arm takes `speed` times the baseline's; `change` may alter or drop records."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    meta = META | meta
    (folder / "meta.json").write_text(json.dumps(meta))
    lines = []
    for step in range(steps):
        machine = rng.uniform(0.5, 2.0)  # the machine's mood, which pairing has to cancel
        for arm in meta["arms"]:
            factor = machine * (speed if arm == "epv2" else 1.0) * (1 + rng.gauss(0, jitter))
            if step < 3:
                factor *= 50  # warm-up
            record = {"arm": arm, "step": step, "loss": 5.0 * math.exp(-step / 20), "grad_norm": 1.0, "tokens": 1024}
            record |= {f"{phase}_ms": 10 * factor for phase in ("dispatch", "combine")}
            record |= {f"{phase}_backward_ms": 12 * factor for phase in ("dispatch", "combine")}
            record |= {"step_ms": 200 * factor, "expert_ms": 30 * factor, "expert_backward_ms": 60 * factor}
            record |= {"sent_bytes": 2 << 20 if arm == "epv2" else 5 << 20, "undeduplicated_bytes": 5 << 20}
            record |= {"peak_mib": 600.0}
            changed = change(record)
            if changed is not None:
                lines.append(json.dumps(changed))
        if step < noise_steps:
            drift = 1 + NOISE * (step + 1) / steps
            lines.append(json.dumps({"arm": "allgather", "step": step, "loss": 5.0 * math.exp(-step / 20) * drift}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def verdict_of(folder: Path) -> str:
    text = write_report(folder).read_text()
    return text.splitlines()[2]


def test_faster(tmp_path):
    folder = make_run(tmp_path / "run", speed=0.8)
    assert "epv2 is faster by 20." in verdict_of(folder) or "epv2 is faster by 19." in verdict_of(folder)
    assert "Losses agree at each of 30 steps" in verdict_of(folder)
    paired = paired_ratio(Run(folder), "epv2")
    assert paired.steps == 27
    assert paired.low <= paired.ratio <= paired.high < 1
    assert paired.ratio == pytest.approx(0.8, abs=0.01)


def test_slower(tmp_path):
    assert "alltoall is faster here**: epv2 takes 2" in verdict_of(make_run(tmp_path / "run", speed=1.25))


def test_no_difference(tmp_path):
    assert "No difference in time beyond noise" in verdict_of(make_run(tmp_path / "run", jitter=0.05))


def test_the_report_says_everything(tmp_path):
    folder = make_run(tmp_path / "run", speed=0.9, skew=0.5)
    text = write_report(folder).read_text()
    wanted = ["epv2 ab recipes/deepseek_v3_tiny.yaml", "0123456789abcdef", "7,000,000 tokens", "1,678,896", "EP4 PP1"]
    wanted += [
        "torch",
        "2.13.0",
        "skewed: 0.5 of the tokens",
        "dispatch forward",
        "dispatch backward",
        "combine backward",
        "expert",
    ]
    wanted += ["| epv2 | 2.000 | 5.000 | 2.50 | 600 |", "4 ranks shared 2 cores", "includes waiting", "(report.png)"]
    for words in wanted:
        assert words in text
    table = text.partition("<details>")[2].partition("</details>")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:] == [
        str(step) for step in range(30)
    ]


def test_same_input_same_files(tmp_path):
    files = []
    for name in ("one", "two"):
        folder = make_run(tmp_path / name, speed=0.95, jitter=0.05)
        write_report(folder)
        files.append(
            [
                (folder / f"report.{end}").read_bytes() if (folder / f"report.{end}").exists() else b""
                for end in ("md", "png")
            ]
        )
    assert files[0] == files[1]


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for name, arms in (("two", ["alltoall", "epv2"]), ("three", ["alltoall", "allgather", "epv2"]), ("one", ["epv2"])):
        folder = make_run(tmp_path / name, arms=arms)
        write_report(folder)
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    (folder / "report.png").write_bytes(b"an older picture")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_report(folder).read_text()
    assert "epv2_plugin[report]" in text
    assert not (folder / "report.png").exists()


@pytest.mark.parametrize(
    ("precision", "difference", "words"),
    [
        ("fp32", 5e-6, "Losses agree"),
        ("fp32", 2e-5, "**Losses differ**: largest relative difference 2.0e-05 at step 17"),
        ("bf16", 1e-2, "Losses agree"),
        ("bf16", 3e-2, "**Losses differ**"),
    ],
)
def test_losses_have_a_tolerance(tmp_path, precision, difference, words):
    def change(record):
        off = record["arm"] == "epv2" and record["step"] == 17
        return record | {"loss": record["loss"] * (1 + difference * off)}

    folder = make_run(tmp_path / "run", change=change, precision=precision)
    assert words in verdict_of(folder)
    assert loss_difference(Run(folder), "epv2").at_step == 17


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
@pytest.mark.parametrize("arms", [["epv2"], ["alltoall"], ["alltoall", "epv2"]])
def test_losses_that_are_not_finite(tmp_path, loss, arms):
    def change(record):
        return record | {"loss": loss} if record["arm"] in arms and record["step"] >= 20 else record

    assert "**Losses are not finite** at 10 steps, first at 20" in verdict_of(make_run(tmp_path / "run", change=change))


def test_an_interrupted_run(tmp_path):
    folder = make_run(tmp_path / "run", change=lambda r: None if r["arm"] == "epv2" and r["step"] >= 25 else r)
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write('{"arm": "epv2", "step": 25, "lo')
    text = write_report(folder).read_text()
    assert "**The run was interrupted**: arm epv2 has 25 of 30 steps." in text
    assert "1 line(s) of metrics.jsonl could not be read" in text
    assert "Losses agree at each of 25 steps" in text


def test_interrupted_before_the_yardstick_of_the_losses(tmp_path):
    folder = make_run(tmp_path / "run", change=lambda r: r | {"loss": r["loss"] * (1 + 1e-3 * (r["arm"] == "epv2"))})
    meta = json.loads((folder / "meta.json").read_text())
    noise = {"arm": "allgather", "base": "alltoall"}
    (folder / "meta.json").write_text(json.dumps(meta | {"interrupted": True, "noise": noise}))
    text = write_report(folder).read_text()
    assert "**The run was interrupted** after 30 steps of each arm." in text
    assert "Whether by more than rounding is not known: allgather, the yardstick, was not trained to the end" in text


def test_a_missing_arm_and_no_records_at_all(tmp_path):
    text = write_report(make_run(tmp_path / "one", change=lambda r: r if r["arm"] == "alltoall" else None)).read_text()
    assert "**Arm epv2 left no record.**" in text
    assert "No verdict on time: epv2 completed no step" in text
    text = write_report(make_run(tmp_path / "none", change=lambda r: None)).read_text()
    assert "alltoall and epv2 completed no step" in text
    assert "no step at which the losses can be compared" in text


def test_few_steps_and_one_arm(tmp_path):
    assert "2 timed steps are too few" in verdict_of(make_run(tmp_path / "few", steps=5))
    assert "completed no step after the warm-up" in verdict_of(make_run(tmp_path / "fewer", steps=2))
    assert "nothing to compare" in verdict_of(make_run(tmp_path / "one", arms=["epv2"]))


def test_a_single_process_sends_nothing(tmp_path):
    folder = make_run(tmp_path / "run", change=lambda r: r | {"sent_bytes": 0, "undeduplicated_bytes": 0})
    assert "| epv2 | 0.000 | 0.000 | - |" in write_report(folder).read_text()


def test_the_first_arm_is_the_baseline(tmp_path):
    folder = make_run(tmp_path / "run", arms=["allgather", "alltoall", "epv2"], speed=0.7)
    assert "epv2 is faster by" in verdict_of(folder)
    assert "of allgather's time per step" in verdict_of(folder)
    assert "alltoall is faster" in verdict_of(make_run(tmp_path / "stock", arms=["epv2", "alltoall"], speed=1.3))


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"meta.json.*not found"):
        write_report(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="not valid JSON"):
        write_report(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(ConfigError, match="at least one arm"):
        write_report(tmp_path)


def _drifting(factor: float) -> Change:
    """The epv2 arm's loss drifts from the baseline's by `factor` times the noise."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        drift = 1 + factor * NOISE * (record["step"] + 1) / 30 if record["arm"] == "epv2" else 1
        return record | {"loss": record["loss"] * drift}

    return change


BF16 = {"precision": "bf16", "noise": {"arm": "allgather", "base": "alltoall"}}


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.5, "Losses agree within rounding noise at each of 30 steps: epv2 and alltoall differ by at most 5.0e-04"),
        (1.5, "Losses differ by 1.5 times the rounding noise up to step"),
        (4.0, "**Losses differ by more than rounding noise** (4.0 times the rounding noise up to step"),
    ],
)
def test_bf16_losses_are_judged_by_the_noise_of_two_stock_runs(tmp_path, factor, words):
    folder = make_run(tmp_path / "run", change=_drifting(factor), noise_steps=30, **BF16)
    assert words in verdict_of(folder)
    text = (folder / "report.md").read_text()
    assert "stock's own allgather and alltoall by 1.0e-03 (step 29)" in text
    assert "| rounding noise: allgather and alltoall | 30 | 1.00e-03 | 29 | 0 |" in text
    assert "| step | alltoall | epv2 | epv2 difference | noise |" in text
    # A yardstick is no arm: it has no time and no traffic.
    assert "allgather" not in text.partition("## Losses")[0].partition("## Time")[2]


def test_an_early_difference_is_not_excused_by_late_noise(tmp_path):
    """Stock's two runs drift apart by 1e-3 in 30 steps, 1.3e-4 in the first four; ours is 5e-4 off from the start."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | {"loss": record["loss"] * (1 + NOISE / 2 * (record["arm"] == "epv2"))}

    said = verdict_of(make_run(tmp_path / "run", change=change, noise_steps=30, **BF16))
    assert "more than rounding noise** (3.8 times the rounding noise up to step 3)" in said


def test_luck_at_one_step_is_no_verdict(tmp_path):
    """Stock's two runs happen to meet at the first step, where ours is as far off as they are at the third."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if record["step"] == 0:
            return record | {"loss": 6.0 * (1 + NOISE / 10 * (record["arm"] == "epv2"))}
        return record

    said = verdict_of(make_run(tmp_path / "run", change=change, noise_steps=30, **BF16))
    assert "Losses agree within rounding noise" in said


def test_fp8_dispatch_is_named_where_losses_differ(tmp_path):
    folder = make_run(
        tmp_path / "run", change=_drifting(4.0), noise_steps=30, dispatch_dtype="fp8", sm_budget="auto", **BF16
    )
    assert "epv2 dispatches in fp8, which rounds more" in verdict_of(folder)


def test_the_other_dispatcher_may_be_an_arm(tmp_path):
    folder = make_run(tmp_path / "run", change=_drifting(0.5), arms=["alltoall", "allgather", "epv2"], **BF16)
    assert "tolerance 2e-02 for bf16" in verdict_of(folder)  # equal losses measure no noise
    text = (folder / "report.md").read_text()
    assert "| rounding noise: allgather and alltoall | 30 | 0.00e+00 |" in text


def test_a_yardstick_that_stock_refuses_is_named(tmp_path):
    noise = BF16["noise"] | {"missing": "r.yaml: megatron = {}: Megatron refuses this model"}
    folder = make_run(tmp_path / "run", precision="bf16", noise=noise)
    assert "tolerance 2e-02 for bf16" in verdict_of(folder)
    assert "Rounding noise is not known: r.yaml: megatron" in (folder / "report.md").read_text()


def test_what_runs_beside_the_step_and_another_yardstick(tmp_path):
    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | {"all_gather_ms": 7.0 if record["arm"] == "epv2" else 14.0, "reduce_scatter_ms": 9.0}

    noise = BF16["noise"] | {"why": "two layouts", "also": "and two kernels"}
    text = write_report(make_run(tmp_path / "run", change=change, noise_steps=30, precision="bf16", noise=noise))
    lines = text.read_text().splitlines()
    row = "| parameter all-gathers | 14.00 (14.00 to 14.00) | 7.00 (7.00 to 7.00) | 0.500 |"
    assert row in lines
    assert any(line.startswith("| gradient reduce-scatters | 9.00") for line in lines)
    assert "Rounding noise: two layouts, and two kernels." in lines
    assert any("on their own streams" in line for line in lines)
    plain = write_report(make_run(tmp_path / "plain")).read_text()
    assert "all-gathers" not in plain


def test_too_short_a_noise_run_is_no_yardstick(tmp_path):
    folder = make_run(tmp_path / "run", change=_drifting(4.0), noise_steps=12, **BF16)
    assert "tolerance 2e-02 for bf16" in verdict_of(folder)
    assert "| rounding noise: allgather and alltoall | 12 |" in (folder / "report.md").read_text()


@pytest.mark.parametrize("mps", [True, False])
def test_a_shared_gpu_is_described(tmp_path, mps):
    machine = {"cpus": 16, "gpu": "NVIDIA H200, 132 SMs", "gpus": 1, "ranks per gpu": 4, "mps": mps, "nccl": "2.30.7"}
    ran = {"backend": "cuda", "transport": "nccl lsa", "mode": "direct", "sms": 8, "qps": 0, "ranks": [0, 1, 2, 3]}
    folder = make_run(tmp_path / "run", machine=machine, expert_parallel=[ran])
    text = write_report(folder).read_text()
    assert "| SM budget | sm_budget.expert: 8; cuda backend over nccl lsa, direct mode, 8 SMs |" in text
    assert "| machine: gpu | NVIDIA H200, 132 SMs |" in text
    assert "| machine: ranks per gpu | 4 |" in text
    assert "4 ranks shared a GPU" in text
    assert ("Without MPS the ranks took turns" in text) is not mps
    assert "communication buffers, NCCL and CUDA itself come on top" in text
    assert "gloo" not in text


def test_the_table_divides_as_the_verdict_does(tmp_path: Path) -> None:
    """The machine's mood makes the ratio of two medians something else than the median of the steps' ratios."""
    slow = {3 + 2 * n for n in range(14)}  # of 27 steps the baseline takes 14 alone, the rival the other 13

    def change(record: dict[str, Any]) -> dict[str, Any]:
        alone = (record["step"] in slow) == (record["arm"] == "alltoall")
        times = {key: value * (4 if alone else 1) for key, value in record.items() if key.endswith("_ms")}
        return record | times

    folder = make_run(tmp_path / "run", change=change)
    text = write_report(folder).read_text()
    ratio = f"{paired_ratio(Run(folder), 'epv2').ratio:.3f}"
    (step,) = (line for line in text.splitlines() if line.startswith("| **step**"))
    assert step.endswith(f" | {ratio} |")
    assert f"median step-time ratio {ratio}" in text
    assert "of the steps' own ratios" in text


def test_the_dispatch_dtype_is_what_travels(tmp_path: Path) -> None:
    for given, precision, said in (("bf16", "fp32", "as computed, fp32"), ("fp8", "bf16", "fp8")):
        folder = make_run(tmp_path / given, dispatch_dtype=given, precision=precision)
        assert f"| dispatch of epv2 | {said} |" in write_report(folder).read_text()


@pytest.mark.parametrize(("apart", "floor"), [([0.0, 0.0], 1e-9), ([0.0, 7e-11], 1e-12), ([3e-8, 2e-7], 1e-9)])
def test_only_equal_losses_are_drawn_as_equal(tmp_path: Path, apart: list[float], floor: float) -> None:
    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | {"loss": 1 + apart[record["step"]] * (record["arm"] == "epv2")}

    run = Run(make_run(tmp_path / "run", steps=2, change=change))
    assert report.place_of_zero(run) == pytest.approx(floor)


def test_losses_that_differ_ask_for_a_yardstick():
    base = [5.0, 4.0, 3.0]
    assert not losses_differ([base, [5.0, 4.0, 3.00002]], "fp32")
    assert losses_differ([base, base, [5.0, 4.0002, 3.0]], "fp32")
    assert losses_differ([base, [5.0, 4.0002]], "fp32")  # stopped early
    assert not losses_differ([base, [5.0, 4.0002, 3.0]], "bf16")
    assert not losses_differ([base], "fp32")
