"""recipes/fsdp2_moe.py: the same training in every layout, checkpoints between them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.harness import Pool

FILE = Path(__file__).parent.parent / "recipes" / "fsdp2_moe.py"
STEPS = 20
CONFIG = {"backend": "host", "timeouts": {"host_seconds": 20}}


def _recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fsdp2_moe", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(rank: int, size: int, ep: int, steps: int, folder: str, resume: bool) -> tuple[list[float], dict, dict]:
    """Losses, and whole gradients and weights after the last step."""
    losses, gradients, weights = [], {}, {}
    for loss, model in _recipe().train(ep, steps, folder, resume, CONFIG):
        losses.append(loss)
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        weights = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    return losses, gradients, weights


def one_process() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same model on one process, without FSDP2, buffers or meshes: every token meets its experts one by one."""
    sizes = _recipe()
    torch.manual_seed(0)
    routers, ups, downs = [], [], []
    for _ in range(2):
        routers.append(nn.Linear(sizes.HIDDEN, sizes.EXPERTS))
        ups.append((torch.randn(sizes.EXPERTS, sizes.HIDDEN, sizes.FFN) / 6).requires_grad_())
        downs.append((torch.randn(sizes.EXPERTS, sizes.FFN, sizes.HIDDEN) / 8).requires_grad_())
    embedding, head = nn.Embedding(sizes.VOCAB, sizes.HIDDEN), nn.Linear(sizes.HIDDEN, sizes.VOCAB)
    named = {"0.weight": embedding.weight}
    for layer in range(2):
        named |= {f"{layer + 1}.router.{name}": p for name, p in routers[layer].named_parameters()}
        named |= {f"{layer + 1}.experts.up": ups[layer], f"{layer + 1}.experts.down": downs[layer]}
    named |= {f"3.{name}": p for name, p in head.named_parameters()}
    optimizer, losses = torch.optim.AdamW(named.values(), lr=1e-2, foreach=False), []
    for step in range(STEPS):
        text = torch.randint(
            sizes.VOCAB, (sizes.BATCH, sizes.LENGTH + 1), generator=torch.Generator().manual_seed(step)
        )
        x = embedding(text[:, :-1].flatten())
        for router, up, down in zip(routers, ups, downs, strict=True):
            weights, idx = router(x).softmax(-1).topk(sizes.TOPK)
            outputs = torch.einsum("tkf,tkfh->tkh", F.silu(torch.einsum("th,tkhf->tkf", x, up[idx])), down[idx])
            x = x + (weights.unsqueeze(2) * outputs).sum(1)
        loss = F.cross_entropy(head(x), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in named.items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("ranks", "ep"), [(4, 2), (4, 4), (4, 1), (2, 2), (1, 1)], ids=str)
def test_every_layout_trains_as_one_process(pool: Callable[[int], Pool], tmp_path: Path, ranks: int, ep: int) -> None:
    found = pool(ranks).run(trained, ep, STEPS, str(tmp_path / "a"), False, timeout=180)
    losses, gradients = one_process()
    assert losses[-1] < losses[0]
    for got, *_ in found:
        torch.testing.assert_close(got, losses, rtol=1e-5, atol=0)
    for name, want in gradients.items():
        assert (found[0][1][name] - want).norm() <= 1e-4 * want.norm(), name


def test_the_same_layout_gives_the_same_bits_and_so_does_a_resumed_run(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    straight, again = (
        pool(4).run(trained, 2, STEPS, str(tmp_path / name), False, timeout=180) for name in ("straight", "again")
    )
    pool(4).run(trained, 2, 8, str(tmp_path / "halves"), False, timeout=180)
    resumed = pool(4).run(trained, 2, STEPS, str(tmp_path / "halves"), True, timeout=180)
    for first, second, third in zip(straight, again, resumed, strict=True):
        assert first[0] == second[0]
        assert first[0][8:] == third[0]
        assert _equal(first[1], second[1])
        assert _equal(first[2], second[2])
        assert _equal(first[2], third[2])


def test_a_checkpoint_loads_under_another_layout(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    pool(4).run(trained, 2, 8, str(tmp_path / "a"), False, timeout=180)
    losses, gradients = one_process()
    for ranks, ep in ((4, 4), (2, 1), (4, 2)):
        # Each continues from what the one before has left; the last one ends.
        stop = {(4, 4): 12, (2, 1): 16, (4, 2): STEPS}[ranks, ep]
        found = pool(ranks).run(trained, ep, stop, str(tmp_path / "a"), True, timeout=180)
        torch.testing.assert_close(found[0][0], losses[stop - len(found[0][0]) : stop], rtol=1e-5, atol=0)
    for name, want in gradients.items():
        assert (found[0][1][name] - want).norm() <= 1e-4 * want.norm(), name
