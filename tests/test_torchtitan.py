"""torchtitan by flag: an unmodified deepseek_v3 of debug size on CPU processes, stock against ours."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import epv2_plugin
from epv2_plugin import ConfigError, ElasticBuffer
from tests import harness
from tests.buffers import EmulatedBuffer, fsdp_on

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")

OURS = "epv2_plugin.torchtitan"
TIMEOUTS = '{"config": {"backend": "host", "timeouts": {"host_seconds": 60}}}'
ARGUMENTS = [
    *("--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel", "--checkpoint.enable"),
    *("--training.seq_len", "16", "--training.mixed_precision_param", "float32", "--training.disable_cuda_graphs"),
    *("--parallelism.spmd_backend", "partial_dtensor"),
]
MOE_LAYERS, STEPS = 5, 2


def _build(folder: str, overrides: list[str], *arguments: str) -> Any:
    """torchtitan's trainer as its command line makes it."""
    from torchtitan.config import ConfigManager

    words = [*ARGUMENTS, "--dump_folder", folder, "--training.steps", str(STEPS), *arguments, "--override.imports"]
    return (
        ConfigManager().parse_args([*words, "tests.titan_data.tokenizer", "tests.titan_data.text", *overrides]).build()
    )


def make_seed(rank: int, size: int, folder: str) -> list[str]:
    """torchtitan's seed checkpoint, whose weights do not depend on a layout; the names that the bridge replaced."""
    assert epv2_plugin.status()["bridge"] == []
    importlib.import_module(OURS)
    trainer = _build(folder, [f"{OURS}.collectives"], "--checkpoint.create_seed_checkpoint")
    trainer.checkpointer.save(curr_step=0, last_step=True)
    trainer.close()
    return epv2_plugin.status()["bridge"]


@contextmanager
def on_emulated_device(ours: Any) -> Iterator[None]:
    """Let backend "cuda" of dispatcher and collectives run on the emulator."""
    real = ours.dispatcher.ElasticBuffer, ours.dispatcher.resolve_backend
    ours.dispatcher.ElasticBuffer, ours.dispatcher.resolve_backend = EmulatedBuffer, lambda name: "cuda"
    try:
        with fsdp_on("emulated"):
            yield
    finally:
        ours.dispatcher.ElasticBuffer, ours.dispatcher.resolve_backend = real


class Counter:
    """Calls of a buffer, by kind."""

    def __enter__(self) -> dict[str, int]:
        self._before = ElasticBuffer.dispatch, ElasticBuffer.combine
        self.calls = {"dispatch": 0, "cached dispatch": 0, "combine": 0}
        dispatch, combine = self._before

        def count_dispatch(buffer: ElasticBuffer, *args: Any, **kwargs: Any) -> Any:
            self.calls["dispatch" if kwargs.get("handle") is None else "cached dispatch"] += 1
            return dispatch(buffer, *args, **kwargs)

        def count_combine(buffer: ElasticBuffer, *args: Any, **kwargs: Any) -> Any:
            self.calls["combine"] += 1
            return combine(buffer, *args, **kwargs)

        ElasticBuffer.dispatch, ElasticBuffer.combine = count_dispatch, count_combine  # type: ignore[method-assign]
        return self.calls

    def __exit__(self, *error: object) -> None:
        ElasticBuffer.dispatch, ElasticBuffer.combine = self._before  # type: ignore[method-assign]


def trained(
    folder: str, overrides: list[str], *arguments: str
) -> tuple[list[float], list[float], dict[str, int], list]:
    """Loss and gradient norm of each step, calls of the buffer, and the groups that ran."""
    losses, norms = [], []
    with Counter() as calls:
        trainer = _build(folder, overrides, "--checkpoint.load_only", *arguments)
        log = trainer.metrics_processor.log

        def note(step: int, loss: float, largest: float, norm: float, **rest: Any) -> None:
            losses.append(loss)
            norms.append(norm)
            log(step, loss, largest, norm, **rest)

        trainer.metrics_processor.log = note
        trainer.train()
        groups = epv2_plugin.status()["groups"]
        for part in trainer.model_parts:
            epv2_plugin.fsdp.remove(part)
        trainer.close()
    return losses, norms, calls, groups


def arms(rank: int, size: int, folder: str) -> dict[str, Any]:
    """The same training by several ways, one after the other."""
    ours = importlib.import_module(OURS)
    Path(folder, "plugin.yaml").write_text("backend: host\ntimeouts: {host_seconds: 60}\n")
    expert = [f'{OURS}.token_dispatcher={{"config": "{folder}/plugin.yaml"}}']
    every = [*expert, f"{OURS}.activation_checkpoint", f"{OURS}.collectives={TIMEOUTS}"]
    cuda = [*expert, f"{OURS}.activation_checkpoint", f'{OURS}.collectives={{"config": "{folder}/plugin.yaml"}}']
    two = ("--training.local_batch_size", "1", "--parallelism.expert_parallel_degree", "2")
    found = {
        "stock": trained(folder, [], *two),
        "ours": trained(folder, every, *two),
        "ep 1": trained(folder, every, "--training.local_batch_size", "1"),
    }
    Path(folder, "cuda.yaml").write_text(
        "backend: cuda\nexpert: {max_tokens_per_rank: 16}\nsm_budget: {fsdp: 2}\ntimeouts: {host_seconds: 60}\n"
    )
    with on_emulated_device(ours):
        found["emulated"] = trained(folder, [name.replace("plugin.yaml", "cuda.yaml") for name in cuda], *two)
    assert len(ours.dispatcher._held) == 0, "handles outlived their training"
    Path(folder, "plugin.yaml").write_text("parallel: {expert: 4}\n")
    with pytest.raises(ConfigError, match=r"plugin.yaml: parallel.expert = 4: torchtitan was started with 2"):
        trained(folder, expert, *two)
    with pytest.raises(
        ConfigError, match=r"expert\.layout = 'compact': torchtitan's experts take rows in expert order"
    ):
        trained(folder, [f'{OURS}.token_dispatcher={{"config": {{"expert": {{"layout": "compact"}}}}}}'], *two)
    ours.release()
    return found


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a seed checkpoint."""
    folder = str(tmp_path_factory.mktemp("titan"))
    (bridge,) = harness.run(1, make_seed, folder, timeout=240)
    assert "torchtitan.tools.utils.device_type" in bridge
    return folder


def test_an_unmodified_model_trains_by_flag(seeded: str) -> None:
    results = harness.run(4, arms, seeded, timeout=600)
    for found in results:
        stock, ours, single = (found[name] for name in ("stock", "ours", "ep 1"))
        assert len(stock[0]) == STEPS
        # Experts compute in bf16, whatever torchtitan is told; tokens are summed in another order than stock's.
        for arm in (ours, single):
            torch.testing.assert_close(arm[0], stock[0], rtol=2e-5, atol=0)
            torch.testing.assert_close(arm[1], stock[1], rtol=2e-3, atol=0)
        per_step = {name: calls / STEPS for name, calls in ours[2].items()}
        assert per_step == {"dispatch": MOE_LAYERS, "cached dispatch": MOE_LAYERS, "combine": 2 * MOE_LAYERS}
        assert stock[2]["dispatch"] == single[2]["dispatch"] == 0
        assert stock[3] == []
        primitives = [(group["primitive"], len(group["ranks"])) for group in ours[3]]
        assert primitives == [("fsdp", 4), ("fsdp", 2), ("expert", 2)]
        emulated = found["emulated"]
        assert emulated[:3] == ours[:3]  # the bits of another run on another device
        groups = [group for group in emulated[3] if group["backend"] == "cuda"]
        assert [(group["primitive"], len(group["ranks"])) for group in groups] == primitives
        assert all(group["transport"] == "emulated" and group["sent_bytes"] > 0 for group in groups)
        assert [group["sms"] for group in groups if group["primitive"] == "fsdp"] == [2, 2]


def refused(rank: int, size: int) -> None:
    """What can't run here is said when the override is."""
    ours = importlib.import_module(OURS)
    for override in (ours.token_dispatcher, ours.collectives):
        with pytest.raises(ConfigError, match="backend = 'cuda': the cuda backend needs a CUDA device"):
            override(None, config={"backend": "cuda"})
    with on_emulated_device(ours), pytest.raises(ConfigError, match="max_tokens_per_rank = 'auto': the cuda backend"):
        ours.token_dispatcher(None, config={"backend": "cuda"})


def test_what_can_not_run_is_refused_at_once() -> None:
    harness.run(1, refused, timeout=120)


def uneven_emulated(rank: int, size: int) -> None:
    ours = importlib.import_module(OURS)
    with on_emulated_device(ours):
        uneven(rank, size, {"backend": "cuda", "expert": {"max_tokens_per_rank": 9}})


def uneven(rank: int, size: int, config: dict[str, Any]) -> None:
    """The dispatcher alone: other numbers of tokens on every rank, none on one; values and gradients."""
    ours = importlib.import_module(OURS)
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    experts, top_k, hidden = 2 * size, 3, 8
    stock = AllToAllTokenDispatcher.Config(num_experts=experts, top_k=top_k)
    config = ours.token_dispatcher(stock, config={**config, "timeouts": {"host_seconds": 20}})
    mine, local = config.build(), config.build()
    mine.wire_meshes(ep_mesh=init_device_mesh("cpu", (size,), mesh_dim_names=("ep",)))
    local.wire_meshes(ep_mesh=None)
    gen = torch.Generator().manual_seed(rank)
    count = [5, 0, 9][rank]
    weights = torch.randn(experts, hidden, hidden, generator=torch.Generator().manual_seed(9)) * 0.3
    x = torch.randn(count, hidden, generator=gen)
    scores = torch.rand(count, top_k, generator=gen)
    chosen = torch.rand(count, experts, generator=gen).argsort(1)[:, :top_k].contiguous()
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    results = []
    for one, own in ((local, weights), (mine, weights[2 * rank :][:2])):
        inputs = [x.clone().requires_grad_(), scores.clone().requires_grad_()]
        rows, per_expert, metadata = one.dispatch(*inputs, chosen, counts)
        parts = rows.split(per_expert.tolist())
        out = torch.cat([(part @ weight).tanh() for part, weight in zip(parts, own, strict=True)])
        result = one.combine(out, metadata, inputs[0])
        (result * torch.arange(hidden)).square().sum().backward()
        results.append([result.detach(), *(each.grad for each in inputs)])
        del rows, per_expert, metadata, out, result, parts
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(ours.dispatcher._held) == 0
    ours.release()
    dist.barrier()


def test_uneven_tokens() -> None:
    harness.run(3, uneven, {}, timeout=240)
    harness.run(3, uneven_emulated, timeout=240)


@pytest.mark.parametrize("missing", ["everything", "override"])
def test_a_version_without_the_seams_gets_nothing_installed(tmp_path: Path, missing: str) -> None:
    package = tmp_path / "torchtitan"
    package.mkdir()
    if missing == "everything":
        (package / "__init__.py").touch()
    else:  # the real one, but for the override mechanism
        real = Path(str(importlib.util.find_spec("torchtitan").origin)).parent  # type: ignore[union-attr]
        package.rmdir()
        package.symlink_to(real)
    program = """
import sys, torch, torchtitan
if sys.argv[1] == "override":
    import torchtitan.config
    del torchtitan.config.derive
import epv2_plugin, torch.distributed.fsdp._fully_shard._fsdp_collectives as before
function = before._get_gradient_divide_factors
try:
    import epv2_plugin.torchtitan
except ImportError as error:
    print(error)
assert before._get_gradient_divide_factors is function
assert epv2_plugin.status()["bridge"] == [], epv2_plugin.status()
"""
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", program, missing], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "epv2_plugin needs torchtitan 0.3.0, this is" in done.stdout
