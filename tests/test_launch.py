"""`python -m epv2_plugin.launch`, on a stand-in for `megatron.training` and, where installed, on the real one."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import epv2_plugin
from epv2_plugin import launch
from epv2_plugin.megatron import arguments

# Builds its flags from TransformerConfig's fields, and parses and dumps them, as Megatron-LM does since 0.16.
ARGUMENTS = """
import argparse, dataclasses, torch, typing
from megatron.core.transformer.transformer_config import TransformerConfig

def add_megatron_arguments(parser):
    group = parser.add_argument_group(title="transformer")
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    for name in ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend"):
        choices = typing.get_args(fields[name].type)
        group.add_argument("--" + name.replace("_", "-"), choices=choices, default=fields[name].default)
    parser.add_argument("--steps", type=int, default=1)
    return parser

def parse_args():
    return add_megatron_arguments(argparse.ArgumentParser(description="Megatron-LM Arguments")).parse_args()

def validate_args(args, defaults={}):
    return args

def get_device_arch_version():
    return torch.cuda.get_device_properties("cuda:0").major
"""
# Makes its process groups only where there is a device.
INITIALIZE = """
import torch

def initialize_megatron(extra_args_provider=None, allow_no_cuda=False):
    if not allow_no_cuda:
        assert torch.cuda.is_available(), "Megatron requires CUDA."
    return torch.cuda.device_count() > 0
"""
# What a training script sees when it starts, and what a dispatcher built by it runs on.
SCRIPT = """
import json, os, sys
import neighbour
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import get_device_arch_version, parse_args
from megatron.training.initialize import initialize_megatron
import epv2_plugin

if __name__ == "__main__":
    args = parse_args()
    seen = {"args": vars(args), "argv": sys.argv, "file": __file__, "path": sys.path[0]}
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=4, moe_router_topk=2,
        moe_token_dispatcher_type=args.moe_token_dispatcher_type,
        moe_flex_dispatcher_backend=args.moe_flex_dispatcher_backend,
    )
    dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=0, world_size=1)
    group = dist.group.WORLD
    groups = ProcessGroupCollection(ep=group, expt_tp=group, tp_ep=group)
    dispatcher = moe_layer.MoEFlexTokenDispatcher(4, [0, 1, 2, 3], config=config, pg_collection=groups)
    seen |= {"dispatcher": type(dispatcher).__name__, "status": epv2_plugin.status()}
    seen |= {"groups": initialize_megatron(), "architecture": get_device_arch_version()}
    print(json.dumps(seen))
    if args.steps == 0:
        raise ValueError("no steps to train")
    sys.exit(7)
"""
REAL = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="this megatron-core has no megatron.training"
)
FLEX = ["--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "epv2"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a Megatron-LM checkout: `megatron/training` beside the script."""
    root = tmp_path_factory.mktemp("megatron_lm")
    training = root / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").touch()
    (training / "arguments.py").write_text(ARGUMENTS)
    (training / "initialize.py").write_text(INITIALIZE)
    (root / "neighbour.py").touch()
    (root / "pretrain.py").write_text(SCRIPT)
    (root / "good.yaml").write_text("parallel: {expert: 1}\n")
    (root / "bad.yaml").write_text("paralel: {expert: 1}\n")
    return root


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """`start(*argv, **env)`: the launcher as a process of its own, ended with the test at the latest."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore", "RANK": "0"}
    processes: list[subprocess.Popen] = []

    def start(*argv: str, **env: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "epv2_plugin.launch", *argv]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, cwd=tmp_path, env=environment | env, stdout=pipe, stderr=pipe, text=True)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_script_runs_with_plugin_enabled(checkout: Path, tmp_path: Path, start: Callable[..., subprocess.Popen]):
    # Started together: importing Megatron is nearly all of the time.
    script = str(checkout / "pretrain.py")
    config = str(checkout / "good.yaml")
    runs = {
        "plugin": start(script, *FLEX, "--epv2-config", config, STORE=str(tmp_path / "a")),
        "raises": start(script, *FLEX, "--steps=0", STORE=str(tmp_path / "b"), RANK="1"),
        "help": start(script, "--help"),
        "other": start(script, f"--epv2-config={config}", "--moe-token-dispatcher-type=oops"),
    }
    out = {name: (*run.communicate(timeout=300), run.returncode) for name, run in runs.items()}

    stdout, stderr, code = out["plugin"]
    assert code == 7, stderr
    seen = json.loads(stdout)
    assert seen["argv"] == [script, *FLEX, "--epv2-config", config]
    assert (seen["file"], seen["path"]) == (script, str(checkout))
    assert seen["args"]["epv2_config"] == config
    assert seen["args"]["moe_flex_dispatcher_backend"] == "epv2"
    assert seen["dispatcher"] == "EpTokenDispatcher"
    assert seen["status"]["enabled"]
    assert seen["status"]["config"] == config
    assert "megatron.core.transformer.moe.moe_layer.MoEFlexTokenDispatcher" in seen["status"]["replaced"]
    assert (seen["groups"], seen["architecture"]) == (True, 10)  # though there is no device
    assert f"enabled (configuration: {config})" in stderr
    assert "EP group of 1 ranks" in stderr
    assert "dispatcher is stock" not in stderr
    assert "no CUDA device: Megatron-LM needs --distributed-backend gloo here" in stderr

    stdout, stderr, code = out["raises"]
    assert code == 1
    assert stderr.rstrip().endswith("ValueError: no steps to train")
    assert f'File "{script}", line' in stderr
    assert "every key has its default" not in stderr  # rank 0 says it for all
    seen = json.loads(stdout)
    assert seen["args"]["epv2_config"] is None
    assert seen["status"]["config"] == "<defaults>"

    stdout, stderr, code = out["help"]
    assert code == 0, stderr
    assert "Megatron-LM Arguments" in stdout
    assert "epv2:\n  --epv2-config PATH" in stdout
    assert ",epv2}" in stdout
    assert "every key has its default" in stderr
    assert "dispatcher is stock (Megatron-LM's default dispatcher); to use the plugin's: --moe-token" in stderr

    _, stderr, code = out["other"]
    assert code == 2  # Megatron-LM's parser judges its own flags
    assert "invalid choice: 'oops'" in stderr
    assert "dispatcher is stock (--moe-token-dispatcher-type oops)" in stderr


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the launcher sets for its process, put back: `sys.argv`, `sys.path` and the logger."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    logger = logging.getLogger("epv2_plugin")
    state = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, logger.level = state


@pytest.mark.parametrize(
    ("message", "argv"),
    [
        ("no script given", []),
        ("the first argument must be the script's path, got '--steps'", ["--steps", "3", "pretrain.py"]),
        ("no such script: missing.py", ["missing.py"]),
        ("epv2: bad.yaml: paralel = ", ["pretrain.py", "--epv2-config", "bad.yaml"]),
        ("nowhere.yaml: (file) = 'nowhere.yaml': can't be read", ["pretrain.py", "--epv2-config=nowhere.yaml"]),
        ("expected one argument", ["pretrain.py", *FLEX, "--epv2-config"]),
    ],
)
@pytest.mark.usefixtures("_restored")
def test_mistakes_end_with_one_line(
    checkout: Path, message: str, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(checkout)
    with pytest.raises(SystemExit) as ended:
        launch.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not epv2_plugin.status()["enabled"]


@pytest.mark.usefixtures("_restored")
def test_one_process_of_a_machine_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        launch.main(["missing.py"])
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_restored")
def test_says_what_is_needed_without_megatron_training(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        launch.main([str(checkout / "pretrain.py")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("epv2: no megatron.training: run a script of")


@REAL
def test_flags_in_the_real_parser(tmp_path: Path, start: Callable[..., subprocess.Popen]):
    script = tmp_path / "script.py"
    script.write_text(
        "import json\n"
        "from megatron.training.arguments import parse_args\n"
        "args = parse_args()\n"
        "print(json.dumps([args.epv2_config, args.moe_flex_dispatcher_backend]))\n"
    )
    config = tmp_path / "empty.yaml"
    config.touch()
    run = start(str(script), *FLEX, f"--epv2-config={config}")
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1]) == [str(config), "epv2"]


# A mixture of experts, as small as Megatron-LM allows.
MODEL = """
    --transformer-impl local --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64
    --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 8 --train-iters 2 --lr 1e-3 --num-experts 8
    --moe-router-topk 2 --mock-data --tokenizer-type NullTokenizer --vocab-size 511 --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --distributed-backend gloo
"""


@REAL
def test_the_real_one_keeps_queues_and_starts_without_a_device(tmp_path: Path, start: Callable[..., subprocess.Popen]):
    judged = tmp_path / "judged.py"
    judged.write_text(
        "import os\n"
        "from megatron.training import arguments\n"
        "arguments.get_device_arch_version = lambda: 9\n"
        "arguments.parse_and_validate_args()\n"
        "print('queues', os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])\n"
    )
    started = tmp_path / "started.py"
    started.write_text(
        "from megatron.core import parallel_state\n"
        "from megatron.core.datasets import utils\n"
        "from megatron.training import initialize_megatron\n"
        "from megatron.training.arguments import parse_and_validate_args\n"
        "utils.compile_helpers = lambda: None  # a package has them compiled, and no Makefile\n"
        "parse_and_validate_args()\n"
        "initialize_megatron()\n"
        "print('stages', parallel_state.get_pipeline_model_parallel_world_size())\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = ("--context-parallel-size", "2")
    runs = [
        start(str(judged), *MODEL.split(), *FLEX, *context, CUDA_DEVICE_MAX_CONNECTIONS="24", WORLD_SIZE="2"),
        start(str(started), *MODEL.split(), *FLEX, WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port)),
    ]
    (queues, kept, _), (stages, said, _) = ((*run.communicate(timeout=300), run.returncode) for run in runs)
    assert "queues 24" in queues.splitlines(), kept
    assert "kept at 24, which the plugin's transfers need" in kept
    assert "stages 1" in stages.splitlines(), said


@pytest.mark.parametrize(
    ("argv", "config", "dispatcher"),
    [
        ([], None, "Megatron-LM's default dispatcher"),
        ([*FLEX, "--epv2-config", "a.yaml", "--lr", "-1"], "a.yaml", ""),
        (["--epv2-config=a.yaml", "--data-path", "0.5", "x"], "a.yaml", "Megatron-LM's default dispatcher"),
        (["--moe-token-dispatcher-type=flex"], None, "--moe-token-dispatcher-type flex"),
        ([*FLEX[2:]], None, "--moe-flex-dispatcher-backend epv2"),
        (
            [*FLEX, "--moe-token-dispatcher-type", "alltoall"],
            None,
            f"--moe-token-dispatcher-type alltoall {FLEX[2]} epv2",
        ),
        (["--yaml-cfg", "model.yaml", "--distributed-backend", "gloo"], None, ""),
    ],
)
def test_command_line_is_read_before_megatron_does(argv: list[str], config: str | None, dispatcher: str):
    backend = "gloo" if "gloo" in argv else ""
    assert arguments.read(argv) == arguments.Selection(config, dispatcher, backend)


# What it demands of the environment as Megatron-LM does, and how it judges the rest.
JUDGE = """
import os

def validate_args(args, defaults={}):
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1", "require CUDA_DEVICE_MAX_CONNECTIONS to 1"
    assert os.getpid() and os.getenv("RANK") == "0"
    assert args.lr > 0, "lr"
    args.defaults, args.seen = defaults, actual()
    return args
"""


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A stand-in for `megatron.training.arguments`, whose `validate_args` `initialize` has by name."""
    module, user = (types.ModuleType(f"megatron.training.{name}") for name in ("arguments", "initialize"))
    module.add_megatron_arguments = lambda parser: parser  # type: ignore[attr-defined]
    module.actual = lambda: os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]  # type: ignore[attr-defined]
    exec(JUDGE, vars(module))
    user.validate_args = module.validate_args  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.training", types.ModuleType("megatron.training"))
    for each in (module, user):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    monkeypatch.setenv("RANK", "0")
    yield module
    arguments.uninstall()


def test_parser_is_restored(judge: types.ModuleType):
    module, user = judge, sys.modules["megatron.training.initialize"]
    stock = module.add_megatron_arguments, module.validate_args
    arguments.install(epv2_plugin.PluginConfig())
    arguments.install(epv2_plugin.PluginConfig())
    names = ("arguments.add_megatron_arguments", "arguments.validate_args", "initialize.validate_args")
    assert arguments.replaced() == tuple(f"megatron.training.{name}" for name in names)
    args = module.add_megatron_arguments(argparse.ArgumentParser()).parse_args(["--epv2-config", "a.yaml"])
    assert args.epv2_config == "a.yaml"
    assert user.validate_args is module.validate_args is not stock[1]  # type: ignore[attr-defined]
    arguments.uninstall()
    assert (module.add_megatron_arguments, module.validate_args) == stock
    assert user.validate_args is stock[1]  # type: ignore[attr-defined]
    assert arguments.replaced() == ()


def _arguments(tensor: int, pipeline: int, context: int, **given: object) -> argparse.Namespace:
    sizes = {"tensor": tensor, "pipeline": pipeline}
    named = {f"{name}_model_parallel_size": size for name, size in sizes.items()}
    return argparse.Namespace(**{**named, "context_parallel_size": context, "lr": 1.0, "rank": 0, **given})


@pytest.mark.parametrize(("tensor", "pipeline", "context"), [(1, 1, 2), (2, 2, 1), (2, 2, 2)])
def test_queues_are_kept_for_transfers(
    judge: types.ModuleType, tensor: int, pipeline: int, context: int, caplog: pytest.LogCaptureFixture
):
    arguments.install(epv2_plugin.PluginConfig())
    with caplog.at_level(logging.INFO, "epv2_plugin"):
        args = judge.validate_args(_arguments(tensor, pipeline, context), {"a": 1})
    assert (args.defaults, args.seen) == ({"a": 1}, "32")
    assert "wants CUDA_DEVICE_MAX_CONNECTIONS=1 before Blackwell" in caplog.text
    assert "kept at 32" in caplog.text
    with pytest.raises(AssertionError, match="lr"):
        judge.validate_args(_arguments(tensor, pipeline, context, lr=0))
    assert judge.os is os


@pytest.mark.parametrize(
    ("sizes", "config", "queues", "given"),
    [
        ((1, 1, 2), {}, "", {}),
        ((1, 1, 2), {}, "9", {}),
        ((1, 1, 2), {"context": {"kv_exchange": "stock"}}, "32", {}),
        ((2, 2, 1), {"pipeline": {"transport": "stock"}}, "32", {}),
        ((2, 1, 1), {}, "32", {}),
        ((1, 2, 1), {}, "32", {}),
        ((2, 2, 2), {}, "32", {"use_torch_fsdp2": True}),
        ((2, 2, 2), {}, "32", {"use_megatron_fsdp": True}),
        ((2, 2, 2), {}, "32", {"overlap_moe_expert_parallel_comm": True}),
        ((2, 2, 2), {}, "32", {"architecture": 10}),
    ],
)
def test_otherwise_megatron_judges_queues(
    judge: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int, int],
    config: dict[str, Any],
    queues: str,
    given: dict[str, Any],
):
    arguments.install(epv2_plugin.load_config(config))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    monkeypatch.setattr(judge, "get_device_arch_version", lambda: given.get("architecture", 9), raising=False)
    with pytest.raises(AssertionError, match="require CUDA_DEVICE_MAX_CONNECTIONS to 1"):
        judge.validate_args(_arguments(*sizes, **given))
