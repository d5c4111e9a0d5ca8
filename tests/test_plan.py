"""`epv2 plan`: the report's text, JSON and picture, what it takes from a configuration or recipe, and its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epv2_plugin import cli
from epv2_plugin.config import load_config
from epv2_plugin.elastic import model, network
from epv2_plugin.planning import plan, report

ROOT = Path(__file__).parent.parent
MULTINODE = str(ROOT / "configs/multinode_hybrid.yaml")
RECIPE = str(ROOT / "recipes/deepseek_v3_671b.yaml")


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no NIC and no measured rates, whatever runs the tests."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(network, "rdma_ports", lambda sysfs: [])
    monkeypatch.setenv("EPV2_CACHE", str(tmp_path / "cache"))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def planned(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> dict[str, Any]:
    path = tmp_path / "plan.json"
    code, _, err = run(capsys, *words, "--json", str(path))
    assert (code, err) == (0, "")
    document: dict[str, Any] = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    return document


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, MULTINODE)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    for ep in plan.SIZES:
        assert sum(line.split()[:1] == [f"{ep}*" if ep == 64 else str(ep)] for line in lines) == 1
    for name in plan.ASSUMABLE:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name
    assert "EP64 (8 x 8 GPUs): hybrid mode with" in out
    assert "hybrid combine: node sum" in out
    assert "direct combine: local sum" in out
    assert "EP512, EP1024, EP2048: the 256 experts get redundant copies" in out
    assert "network.rdma_gbytes_per_s, as it is" in out
    assert "NVIDIA H100, as there is no GPU here" in out
    assert "not measured" in lines[0]


def test_the_most_tokens_fit_in_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, MULTINODE, "--tokens", str((1 << 20) - 1))
    assert code == 0
    assert max(map(len, out.splitlines())) <= 120


def test_the_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = planned(capsys, tmp_path, MULTINODE)
    assert document["schema"] == plan.SCHEMA
    assert (document["asked_ep"], document["mode"], document["qps"]) == (64, "hybrid", 8)
    assert document["machine"]["nic_gbytes_per_s"] == 45
    assert {fact["name"] for fact in document["assumptions"]} == set(plan.ASSUMABLE)
    for point in document["points"]:
        assert [mode["mode"] for mode in point["modes"]] == (["hybrid", "direct"] if point["nodes"] > 1 else ["direct"])
        for mode in point["modes"]:
            assert mode["us"] == pytest.approx(mode["dispatch"]["us"] + mode["combine"]["us"])
            assert mode["metadata_bytes"] < sum(mode["sections"].values()) == mode["buffer_bytes"]
            assert mode["qps"] == (8 if point["nodes"] > 1 else 0)
    assert report.text(document) == report.text(json.loads(json.dumps(document)))


def test_auto_takes_the_faster_mode(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "plugin.yaml"
    config.write_text("network: {rdma_gbytes_per_s: 45, scale_up_gbytes_per_s: 360}\n")
    (point,) = planned(capsys, tmp_path, str(config), "--nodes", "4", "--gpus-per-node", "8")["points"]
    assert [mode["mode"] for mode in point["modes"]] == ["hybrid", "direct"]
    assert point["modes"][0]["us"] < point["modes"][1]["us"]
    # With one GPU a node hybrid sends as much and sums once more.
    words = ("--nodes", "4", "--gpus-per-node", "1", "--assume", "rdma_gbytes_per_s=400")
    (point,) = planned(capsys, tmp_path, str(config), *words)["points"]
    assert [mode["mode"] for mode in point["modes"]] == ["direct", "hybrid"]
    for mode in ("direct", "hybrid"):
        config.write_text(f"network: {{rdma_gbytes_per_s: 45}}\nexpert: {{mode: {mode}}}\nsm_budget: {{expert: 10}}\n")
        (point,) = planned(capsys, tmp_path, str(config), "--nodes", "4")["points"]
        assert point["modes"][0]["mode"] == mode
        assert {entry["num_sms"] for entry in point["modes"]} == {10}


def test_a_recipe_brings_its_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = planned(capsys, tmp_path, RECIPE, "--gpu", "H800")
    work = document["workload"]
    assert {key: work[key] for key in ("tokens", "hidden", "topk", "experts", "groups", "topk_groups", "dtype")} == {
        "tokens": 4096,
        "hidden": 7168,
        "topk": 8,
        "experts": 256,
        "groups": 8,
        "topk_groups": 4,
        "dtype": "bf16",
    }
    assert document["asked_ep"] == 64
    point = next(point for point in document["points"] if point["ep"] == 64)
    assert point["nodes_per_token"] < 4


def test_options_come_before_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "--ep",
        "16",
        "--hidden",
        "2048",
        "--topk",
        "2",
        "--experts",
        "64",
        "--tokens",
        "100",
        "--dtype",
        "fp8",
        "--groups",
        "4",
        "--topk-groups",
        "1",
    ]
    document = planned(capsys, tmp_path, RECIPE, *words)
    origin = document["workload"].pop("origin")
    assert document["workload"] == {
        "tokens": 100,
        "hidden": 2048,
        "topk": 2,
        "experts": 64,
        "groups": 4,
        "topk_groups": 1,
        "dtype": "fp8",
        "layout": "expanded",
    }
    assert origin["topk_groups"] == "--topk-groups"
    assert [point["ep"] for point in document["points"]] == [16]


def test_every_assumption_can_be_another(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    values = dict.fromkeys(plan.ASSUMABLE, 77.0)
    words = [word for name, value in values.items() for word in ("--assume", f"{name}={value:g}")]
    changed = planned(capsys, tmp_path, MULTINODE, *words)
    assert {f["name"]: (f["value"], f["source"]) for f in changed["assumptions"]} == {
        name: (value, "--assume") for name, value in values.items()
    }
    before = planned(capsys, tmp_path, MULTINODE, "--ep", "64")["points"][0]["modes"][0]
    for name in plan.ASSUMABLE:
        smallest = str(max(plan.ASSUMABLE[name], 0.1))
        after = planned(capsys, tmp_path, MULTINODE, "--ep", "64", "--assume", f"{name}={smallest}")
        assert after["points"][0]["modes"][0] != before or name == "sms", name


def test_an_nvlink_domain_of_72(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "plugin.yaml"
    config.write_text("parallel: {expert: 64}\n")
    words = ("--gpus-per-node", "64", "--ep", "8,64", "--gpu", "GB200")
    document = planned(capsys, tmp_path, str(config), *words)
    assert [point["nodes"] for point in document["points"]] == [1, 1]
    assert document["machine"]["nic_gbytes_per_s"] is None  # nothing leaves the node, so nothing had to be known
    names = {fact["name"] for fact in document["assumptions"]}
    assert set(plan.ASSUMABLE) - names == {"rdma_gbytes_per_s", "nic_messages_per_us", "network_us"}


@pytest.mark.parametrize("config", ["configs/cpu.yaml", "recipes/deepseek_v3_tiny.yaml"])
def test_sizes_that_need_an_unknown_network_are_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str
) -> None:
    document = planned(capsys, tmp_path, str(ROOT / config))
    assert [point["ep"] for point in document["points"]] == ([4, 8] if "recipes" in config else [8])
    assert document["left_out"] == [16, 32, 64, 128, 256, 512, 1024, 2048]
    text = " ".join(run(capsys, str(ROOT / config))[1].split())
    assert "EP16 to EP2048 are left out: they span nodes, and network.rdma_gbytes_per_s is not known here" in text


def test_the_rate_of_the_nics_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [network.Port(f"mlx5_{index}", 400.0) for index in range(8)]
    monkeypatch.setattr(network, "rdma_ports", lambda sysfs: ports)
    config = tmp_path / "plugin.yaml"
    config.write_text("")
    document = planned(capsys, tmp_path, str(config), "--ep", "64")
    (fact,) = (fact for fact in document["assumptions"] if fact["name"] == "rdma_gbytes_per_s")
    assert fact["value"] == pytest.approx(45)
    assert fact["source"] == "8 x 400 Gbit/s ports here over 8 GPUs, 90% of nominal"


def test_rates_measured_on_this_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model.save_rates("H100", (model.Rate(8, 140, 60, 50, 55), model.Rate(132, 34, 32, 15, 19)), "2026-11-25")
    document = planned(capsys, tmp_path, MULTINODE, "--gpu", "H100")
    (fact,) = (fact for fact in document["assumptions"] if fact["name"] == "sm_read_gbytes_per_s")
    assert (fact["value"], fact["source"]) == (140, "epv2 bench sm of 2026-11-25, 8 SMs busy")


@pytest.mark.parametrize("words", [(), ("--ep", "8"), ("--nodes", "2", "--gpus-per-node", "1")])
def test_the_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    assert run(capsys, MULTINODE, *words, "--png", str(path))[0] == 0
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert run(capsys, MULTINODE, *words, "--png", str(path))[0] == 0
    assert path.read_bytes() == first


def test_no_picture_without_matplotlib(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, MULTINODE, "--png", str(tmp_path / "plan.png"))
    assert code == 2
    assert "needs matplotlib: pip install 'epv2_plugin[report]'" in err


BARE = "backend: cuda\n"
GROUPED = (ROOT / "recipes/deepseek_v3_tiny.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (BARE, "--ep 16", "{file}: network.rdma_gbytes_per_s = 'auto': no active RDMA port with a rate in /sys/"),
        ("parallel: {expert: 16}", "", "{file}: network.rdma_gbytes_per_s = 'auto': no active RDMA port with a rate "),
        (
            BARE,
            "--nodes 2",
            "; set network.rdma_gbytes_per_s to the GB/s that one GPU reaches in one direction (or --",
        ),
        (BARE, "--gpu R9", "epv2 plan: --gpu = 'R9': SMs unknown; one of H20, H100"),
        (BARE, "--gpu A100", "epv2 plan: --gpu = 'A100': the kernels need Hopper or newer: one of H20, H100"),
        (BARE, "--gpu NVIDIA-L4", "epv2 plan: --gpu = 'NVIDIA-L4': the kernels need Hopper or newer"),
        (BARE, "--gpu R9 --assume sms=58 --ep 8", "{file}: network.scale_up_gbytes_per_s = 'auto': the bandwidth"),
        (BARE, "--ep 12", "epv2 plan: --ep = 12: at most one node of 8 GPUs, or a multiple (--gpus-per-node)"),
        ("parallel: {expert: 12}", "", "{file}: parallel.expert = 12: at most one node of 8 GPUs, or a multiple"),
        (BARE, "--ep 8 --nodes 2", "epv2 plan: --nodes = 2: not together with --ep"),
        (BARE, "--groups 4", "epv2 plan: --topk-groups = None: --groups and --topk-groups go together"),
        (BARE, "--groups 7 --topk-groups 1", "epv2 plan: --groups = 7: must divide the 256 experts"),
        (BARE, "--groups 4 --topk-groups 5", "epv2 plan: --topk-groups = 5: at most the 4 groups"),
        (BARE, "--experts 16 --groups 4 --topk-groups 1", "epv2 plan: --topk = 8: at most the 4 experts that a token"),
        (BARE, "--topk 33", "epv2 plan: --topk = 33: at most 32"),
        (BARE, "--assume speed=1", "epv2 plan: --assume = 'speed': must be one of sms, sm_read_gbytes_per_s"),
        (
            BARE,
            "--assume rdma_gbytes_per_s=0",
            "epv2 plan: --assume rdma_gbytes_per_s = 0.0: must be a number from 0.001",
        ),
        (BARE, "--assume capacity_factor=nan", "epv2 plan: --assume capacity_factor = nan: must be a number from 1 on"),
        (BARE, "--assume network_us=inf", "epv2 plan: --assume network_us = inf: must be a number from 0 on, not inf"),
        (BARE, "--assume sms=5.5", "epv2 plan: --assume sms = 5.5: must be a whole number from 4 on"),
        (BARE, "--experts 1", "epv2 plan: --experts = 1: must be 8 or more, the top-k (DeepSeek-V3's)"),
        (GROUPED, "--experts 1", "epv2 plan: --experts = 1: must be a multiple of the 4 groups (recipe's model)"),
        (
            BARE,
            "--tokens 100000000000 --ep 8",
            "epv2 plan: --tokens = 100000000000: at most 268435455 at EP8: rows",
        ),
        ("sm_budget: {expert: 133}", "--ep 8", "{file}: sm_budget.expert = 133: at most the 132 SMs of NVIDIA H100"),
        ("expert: {mode: fast}", "", "{file}: expert.mode = 'fast': must be 'auto', 'direct' or 'hybrid'"),
        ("model: {}", "", "{file}: "),
        (BARE, "--json /nowhere/plan.json", "epv2: --json = '/nowhere/plan.json': there is no folder /nowhere"),
        (BARE, "--png plan.xyz", "epv2: --png = 'plan.xyz': must end in .png"),
        (BARE, "--png /nowhere/plan.png", "epv2: --png = '/nowhere/plan.png': there is no folder /nowhere"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str, message: str
) -> None:
    file = tmp_path / "plugin.yaml"
    file.write_text(text)
    code, out, err = run(capsys, str(file), *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(("epv2: ", "epv2 plan: "))
    assert err.count("epv2:") + err.count("epv2 plan:") == 1
    assert message.format(file=file) in err


@pytest.mark.parametrize("words", ["--assume sms", "--assume sms=many", "--tokens 0", "--ep 8,0", "--ep eight"])
def test_options_are_checked(capsys: pytest.CaptureFixture[str], words: str) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", MULTINODE, *words.split()])
    assert left.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


@st.composite
def plans(draw: st.DrawFn) -> tuple[dict[str, Any], plan.Workload, list[model.Topology]]:
    groups = draw(st.integers(1, 8))
    chosen = draw(st.integers(1, groups))
    each = draw(st.integers(1, 64))
    work = plan.Workload(
        tokens=draw(st.integers(1, 1 << 15)),
        hidden=draw(st.integers(1, 1 << 14)),
        topk=draw(st.integers(1, min(32, chosen * each))),
        experts=groups * each,
        groups=groups,
        topk_groups=chosen,
        dtype=draw(st.sampled_from(["bf16", "fp8"])),
        layout=draw(st.sampled_from(["expanded", "compact"])),
        origin=dict.fromkeys(("tokens", "hidden", "experts", "groups"), "drawn"),
    )
    gpus = draw(st.integers(1, 72))
    nodes = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=3)))
    config = {
        "expert": {"mode": draw(st.sampled_from(["auto", "direct", "hybrid"]))},
        "sm_budget": {"expert": draw(st.just("auto") | st.integers(1, 132))},
        "network": {"qps": draw(st.just("auto") | st.integers(1, 64)), "rdma_gbytes_per_s": draw(st.floats(0.01, 1e4))},
    }
    return config, work, [model.Topology(count, gpus) for count in nodes]


@settings(deadline=None, max_examples=60)
@given(plans(), st.floats(1, 100))
def test_any_plan_is_a_report(drawn: tuple[dict[str, Any], plan.Workload, list[model.Topology]], factor: float) -> None:
    settings_, work, places = drawn
    config = load_config(settings_)
    machine, _, facts = plan.machine(config, "H200", places, places[0].gpus_per_node, {})
    document = plan.document("drawn.yaml", config, work, places, machine, factor, facts)
    text = report.text(json.loads(json.dumps(document, allow_nan=False)))
    assert "nan" not in text.replace("nanoseconds", "")
    for point in document["points"]:
        assert point["expert_slots"] % point["ep"] == 0
        assert all(mode["buffer_bytes"] > 0 and mode["us"] > 0 for mode in point["modes"])
