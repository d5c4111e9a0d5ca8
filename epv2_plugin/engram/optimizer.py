"""Optimizers of `ShardedNgramMemory`: each rank updates the rows that it owns and that any rank fetched, no others.

Legend: U rows touched, D values of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from epv2_plugin.engram.memory import ShardedNgramMemory


class _RowOptimizer(torch.optim.Optimizer):
    """`step` is a collective operation: every rank calls it, even where it has nothing to change."""

    def __init__(self, memories: ShardedNgramMemory | Iterable[ShardedNgramMemory], defaults: dict[str, Any]):
        memories = [memories] if isinstance(memories, ShardedNgramMemory) else list(memories)
        for memory in memories:
            if not isinstance(memory, ShardedNgramMemory):
                raise TypeError(f"memories must be ShardedNgramMemory, got {type(memory).__name__}")
        if defaults["lr"] < 0 or defaults["eps"] < 0:
            raise ValueError(f"lr = {defaults['lr']}, eps = {defaults['eps']}: must be 0 or more")
        super().__init__([memory.weight for memory in memories], defaults)
        self._memories = memories

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that `weight.grad` names, and let all ranks see them.

        Raises:
            ValueError: a gradient is not sparse. CommunicationError: a fetch that started before has failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [(group, weight) for group in self.param_groups for weight in group["params"]]
        for memory, (group, weight) in zip(self._memories, parameters, strict=True):
            state = self.state[weight]
            if not state:
                state.update(step=0, first_row=memory.first_row, num_rows=memory.num_rows, **self._new_state(weight))
            state["step"] += 1
            rows, gradients = _rows_of(weight)
            memory.assign(rows, self._updated(state, group, rows, weight.index_select(0, rows), gradients))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: the state is of other rows than this rank's.
        """
        for index, state in state_dict["state"].items():
            if state and state["first_row"] != self._memories[index].first_row:
                raise ValueError(
                    f"the state begins with row {state['first_row']}, this rank with "
                    f"{self._memories[index].first_row}: engram.reshard_optimizer makes one that fits from those of "
                    "all ranks"
                )
        super().load_state_dict(state_dict)

    def _new_state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _updated(
        self,
        state: dict[str, Any],
        group: dict[str, Any],
        rows_U: torch.Tensor,
        values_UD: torch.Tensor,
        gradients_UD: torch.Tensor,
    ) -> torch.Tensor:
        raise NotImplementedError


class RowwiseAdagrad(_RowOptimizer):
    """Adagrad with one accumulator a row: the mean of its squared gradients; 4 bytes of state for a row.

    Args:
        memories: one or more. lr, eps: as in Adagrad.
    """

    def __init__(
        self, memories: ShardedNgramMemory | Iterable[ShardedNgramMemory], lr: float = 1e-2, eps: float = 1e-10
    ):
        super().__init__(memories, {"lr": lr, "eps": eps})

    def _new_state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": weight.new_zeros(weight.shape[0])}

    def _updated(
        self,
        state: dict[str, Any],
        group: dict[str, Any],
        rows_U: torch.Tensor,
        values_UD: torch.Tensor,
        gradients_UD: torch.Tensor,
    ) -> torch.Tensor:
        sum_U = state["sum"].index_select(0, rows_U) + gradients_UD.square().mean(1)
        state["sum"].index_copy_(0, rows_U, sum_U)
        return values_UD - group["lr"] * gradients_UD / (sum_U.sqrt() + group["eps"]).unsqueeze(1)


class SparseAdam(_RowOptimizer):
    """Adam whose moments change where a row has a gradient only, as `torch.optim.SparseAdam`; no weight decay.

    DeepSeek's Engram trains its tables so, with five times the learning rate of the rest (arXiv 2601.07372).

    Args:
        memories: one or more. lr, betas, eps: as in Adam.
    """

    def __init__(
        self,
        memories: ShardedNgramMemory | Iterable[ShardedNgramMemory],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas = {betas}: must be 0 or more and below 1")
        super().__init__(memories, {"lr": lr, "betas": betas, "eps": eps})

    def _new_state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: weight.new_zeros(weight.shape) for name in ("exp_avg", "exp_avg_sq")}

    def _updated(
        self,
        state: dict[str, Any],
        group: dict[str, Any],
        rows_U: torch.Tensor,
        values_UD: torch.Tensor,
        gradients_UD: torch.Tensor,
    ) -> torch.Tensor:
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].index_select(0, rows_U).lerp_(gradients_UD, 1 - beta1)
        second = state["exp_avg_sq"].index_select(0, rows_U).lerp_(gradients_UD.square(), 1 - beta2)
        state["exp_avg"].index_copy_(0, rows_U, first)
        state["exp_avg_sq"].index_copy_(0, rows_U, second)
        step_size = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        return values_UD - step_size * first / (second.sqrt() + group["eps"])


def _rows_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows with a gradient, ascending, and their gradients."""
    gradient = weight.grad
    if gradient is None:
        return torch.empty(0, dtype=torch.int64, device=weight.device), weight.new_empty(0, weight.shape[1])
    if not gradient.is_sparse:
        raise ValueError("weight.grad is dense: the gradient of a ShardedNgramMemory is sparse, by rows")
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()
