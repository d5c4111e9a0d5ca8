"""What dispatch and combine must return, computed in one process by plain loops over every rank's inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One dispatch and combine among `len(tokens)` ranks."""

    tokens: tuple[int, ...]
    hidden: int = 16
    local_experts: int = 2
    topk: int = 2
    dtype: str = "fp32"
    scales: str = ""  # "", "fp32" or "ue8m0": FP8 rows
    expand: bool = True
    alignment: int = 1
    zero_padding: bool = False
    masked: float = 0.0
    one_expert: bool = False
    weights: bool = True
    biases: int = 0
    exact: bool = True
    max_tokens: int = 0
    multiple_reduction: bool = True
    overlap: bool = False
    col_major: bool = False
    seed: int = 0
    per_node: int = 0  # ranks of a node; 0 = all are in one
    hybrid: bool = False  # between nodes sums of a node's ranks travel

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def experts(self) -> int:
        return self.ranks * self.local_experts

    def for_cuda(self) -> Case:
        """This case with what the cuda backend wants: rows of multiples of 16 bytes, a limit of tokens, top-k <= 32."""
        step = 16 if self.scales else 16 // DTYPES[self.dtype].itemsize
        return replace(
            self,
            hidden=-(-self.hidden // step) * step,
            max_tokens=self.max_tokens or max(1, *self.tokens),
            topk=min(self.topk, 32),
        )


@dataclass
class Inputs:
    """One rank's inputs; `y[t, k]` is what the expert at position k makes of token t."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    y: torch.Tensor
    biases: list[torch.Tensor] = field(default_factory=list)

    def to(self, device: torch.device) -> Inputs:
        """The same on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        tensors = (self.x.to(device), scales, *(t.to(device) for t in (self.topk_idx, self.topk_weights, self.y)))
        return Inputs(*tensors, [bias.to(device) for bias in self.biases])


def inputs(case: Case, rank: int) -> Inputs:
    """Rank `rank`'s inputs, a function of the case alone."""
    gen = torch.Generator().manual_seed(case.seed * 1000 + rank)
    tokens, hidden, topk = case.tokens[rank], case.hidden, case.topk
    dtype = DTYPES[case.dtype]
    x = torch.randn(tokens, hidden, generator=gen).to(dtype)
    scales = None
    if case.scales:
        x = torch.randn(tokens, hidden, generator=gen).to(torch.float8_e4m3fn)
        blocks = -(-hidden // 128)
        if case.scales == "fp32":
            scales = torch.rand(tokens, blocks, generator=gen)
        else:
            scales = torch.randint(0, 2**31 - 1, (tokens, -(-blocks // 4)), generator=gen, dtype=torch.int32)
    order = torch.rand(tokens, case.experts, generator=gen).argsort(1)
    topk_idx = order[:, :topk].contiguous()
    if case.one_expert:
        topk_idx[:] = -1
        topk_idx[:, -1] = case.experts - 1
    topk_idx[torch.rand(tokens, topk, generator=gen) < case.masked] = -1
    weights = torch.rand(tokens, topk, generator=gen)
    y = torch.randn(tokens, topk, hidden, generator=gen).to(dtype)
    biases = [torch.randn(tokens, hidden, generator=gen).to(dtype) for _ in range(case.biases)]
    return Inputs(x, scales, topk_idx, weights, y, biases)


def expected(case: Case, rank: int) -> dict[str, Any]:
    """Everything that rank `rank` must get back."""
    every = [inputs(case, r) for r in range(case.ranks)]
    first = rank * case.local_experts
    mine_range = range(first, first + case.local_experts)
    rows = [
        (source, token)
        for source, mine in enumerate(every)
        for token in range(case.tokens[source])
        if any(e in mine_range for e in mine.topk_idx[token].tolist())
    ]
    limit = case.max_tokens or max(case.tokens)
    per_source = [sum(s == source for s, _ in rows) for source in range(case.ranks)]
    local = [
        [e - first if first <= e < first + case.local_experts else -1 for e in every[s].topk_idx[t].tolist()]
        for s, t in rows
    ]
    per_expert = [sum(idx.count(e) for idx in local) for e in range(case.local_experts)]
    aligned = [-(-n // case.alignment) * case.alignment for n in per_expert]
    starts = [sum(aligned[:e]) for e in range(case.local_experts)]
    place: dict[tuple[int, int], int] = {}  # (row, top-k position) -> expanded row
    for expert in range(case.local_experts):
        at = starts[expert]
        for row, idx in enumerate(local):
            for position, e in enumerate(idx):
                if e == expert:
                    place[row, position] = at
                    at += 1
    metadata = []
    for row, (source, token) in enumerate(rows):
        lead = next(k for k in range(case.topk) if local[row][k] >= 0)
        positions = [place.get((row, k), -1) if case.expand else -1 for k in range(case.topk)]
        metadata.append([source * limit + token, source * case.topk + lead, *positions])
    out: dict[str, Any] = {
        "per_expert": per_expert,
        "aligned": aligned if case.exact else [],
        "psum_rank": torch.tensor(per_source).cumsum(0).tolist(),
        "psum_expert": [s + n for s, n in zip(starts, per_expert, strict=True)]
        if case.expand
        else torch.tensor(aligned).cumsum(0).tolist(),
        "metadata": metadata,
        "place": place,
        "rows": rows,
        "local": local,
        "num_expanded": sum(aligned),
    }

    def gather(tensors: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Output row -> value, for the layout of the case; alignment gaps are left out."""
        if not case.expand:
            return {row: tensors[s][t] for row, (s, t) in enumerate(rows)}
        return {at: tensors[rows[row][0]][rows[row][1]] for (row, _), at in place.items()}

    out["x"] = gather([m.x for m in every])
    out["scales"] = gather([m.scales for m in every]) if case.scales else {}
    if case.expand:
        out["weights"] = {at: every[rows[r][0]].topk_weights[rows[r][1], k] for (r, k), at in place.items()}
    else:
        out["weights"] = {
            row: torch.where(torch.tensor(local[row]) >= 0, every[s].topk_weights[t], 0.0)
            for row, (s, t) in enumerate(rows)
        }
    out["combined"] = _combined(case, every[rank], rank)
    out["combined_weights"] = every[rank].topk_weights.masked_fill(every[rank].topk_idx < 0, 0.0)
    out["sent_rows"] = sum(
        len({e // case.local_experts for e in every[rank].topk_idx[t].tolist() if e >= 0} - {rank})
        for t in range(case.tokens[rank])
    )
    return out


def _combined(case: Case, mine: Inputs, owner: int) -> torch.Tensor:
    """Sums of `y` in fp32 in top-k order, rounded once per rank, and in hybrid mode per node of others, on the way."""
    dtype = DTYPES[case.dtype]
    per_node = case.per_node if case.hybrid else 0
    result = torch.zeros(mine.y.shape[0], case.hidden)
    for token in range(mine.y.shape[0]):
        total = sum((b[token].float() for b in mine.biases), torch.zeros(case.hidden))
        experts = mine.topk_idx[token].tolist()
        ranks = [e // case.local_experts if e >= 0 else -1 for e in experts]
        whole = case.expand and not case.multiple_reduction  # every row travels as it is
        nodes: dict[int, torch.Tensor] = {}
        for position, rank in enumerate(ranks):
            if rank < 0 or not (whole or rank not in ranks[position + 1 :]):
                continue
            same = [position] if whole else [k for k in range(case.topk) if ranks[k] == rank]
            if case.expand:
                partial = torch.zeros(case.hidden)
                for k in same:
                    partial += mine.y[token, k].float()
            else:
                partial = mine.y[token, same[0]].float()
            partial = partial.to(dtype).float()
            if not per_node or rank // per_node == owner // per_node:
                total += partial
                continue
            node = rank // per_node
            nodes[node] = nodes[node] + partial if node in nodes else partial
            if not any(r >= 0 and r // per_node == node for r in ranks[position + 1 :]):
                total += nodes[node].to(dtype).float()
        result[token] = total
    return result.to(dtype)
