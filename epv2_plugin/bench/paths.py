"""What `epv2 bench ep` compares: the plugin, the stock all-to-all and `deep_ep`, on the same tokens and routing.

A path takes a batch to the experts and what they made of it back, in four stages: dispatch, what else it takes before
expert GEMMs can start (`to_experts`), what it takes after they end (`from_experts`), and combine.

Legend: T tokens of a rank, H hidden, K top-k, E experts, L local experts, P ranks, R received rows (one per token and
rank), N rows in expert order (one per token and local expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist

from epv2_plugin.elastic import model
from epv2_plugin.elastic.quant import per_token_cast_back, per_token_cast_to_fp8

ROUNDING = 2 * 2**-8 * 1.02  # bf16 rounds once on the rank of the experts, once at the end; each by at most 2^-8
POPULAR_SHARE = 0.2  # of the tokens go to expert 0 under skewed routing


@dataclass(frozen=True)
class Setup:
    """What is measured. `sms`: budgets to go through, (0,) on the host. `seed`: of tokens and routing."""

    ranks: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: str  # of dispatch: "bf16" or "fp8"
    layout: str  # "expanded" or "compact"
    routing: str  # "uniform" or "skewed"
    zero_copy: bool  # also measured: experts write into the window
    unsummed: bool  # also measured: expert rows travel as they are
    cast_before: bool  # also measured: rows are e4m3 before the clock starts
    iterations: int
    backend: str  # "cuda" or "host"
    sms: tuple[int, ...]
    seed: int = 0

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks

    @property
    def shape(self) -> model.Shape:
        """For the analytic model."""
        return model.Shape(
            self.tokens,
            self.hidden,
            self.topk,
            self.experts,
            self.ranks,
            fp8=self.dtype == "fp8",
            expanded=self.layout == "expanded",
        )


@dataclass(frozen=True)
class Batch:
    """One rank's input: bf16 `[T, H]`, int64 `[T, K]` and fp32 `[T, K]`."""

    x_TH: torch.Tensor
    topk_idx_TK: torch.Tensor
    topk_weights_TK: torch.Tensor

    @cached_property
    def fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens as e4m3 and scales."""
        return per_token_cast_to_fp8(self.x_TH)


def make_batch(setup: Setup, rank: int, number: int, device: torch.device) -> Batch:
    """Batch `number` of `rank`: the same on every rank that asks."""
    random = torch.Generator(device).manual_seed((setup.seed << 40) + (number << 16) + rank)
    x_TH = torch.randn(setup.tokens, setup.hidden, generator=random, device=device).to(torch.bfloat16)
    scores_TE = torch.rand(setup.tokens, setup.experts, generator=random, device=device)
    if setup.routing == "skewed":
        popular_T = torch.randperm(setup.tokens, generator=random, device=device)[: popular_tokens(setup)]
        scores_TE[:, 0] = -1.0
        scores_TE[popular_T, 0] = 2.0
    topk_idx_TK = scores_TE.topk(setup.topk, dim=1).indices
    weights_TK = torch.rand(setup.tokens, setup.topk, generator=random, device=device)
    return Batch(x_TH, topk_idx_TK, weights_TK)


def popular_tokens(setup: Setup) -> int:
    """Tokens of each rank that go to expert 0 under skewed routing."""
    return round(POPULAR_SHARE * setup.tokens)


def pairs_by_rows(setup: Setup, topk_idx_TK: torch.Tensor) -> torch.Tensor:
    """int64 `[P, K + 1]`: of how many tokens each rank holds 0, 1, ... K experts."""
    rank_TK = topk_idx_TK.cpu() // setup.local_experts
    held_TP = torch.zeros(len(rank_TK), setup.ranks, dtype=torch.int64)
    held_TP.scatter_add_(1, rank_TK, torch.ones_like(rank_TK))
    return torch.stack([torch.bincount(held_T, minlength=setup.topk + 1) for held_T in held_TP.t()])


@dataclass(frozen=True)
class Received:
    """Rows in expert order, ready for a grouped GEMM: data `[N, H]` (e4m3 with scales, or bf16), weights `[N]`.

    `counts`: rows of each local expert.
    """

    data: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor
    counts: list[int]


class Path(Protocol):
    """One way to the experts and back; calls come in the order of a batch, each on every rank.

    Attributes:
        name, sends: for the report. fp8: rows arrive as e4m3. ordered: rows of an expert come by (source, token).
        budgets: SMs to be measured with; (0,) = not its own choice. ceiling: no kernel may launch more CTAs than that.
    """

    name: str
    sends: str
    fp8: bool
    ordered: bool
    budgets: tuple[int, ...]
    ceiling: bool

    def dispatch(self, batch: Batch, sms: int) -> None: ...
    def to_experts(self) -> Received: ...
    def place(self, y_NH: torch.Tensor) -> torch.Tensor:
        """The experts' output where they would have written it; not part of any stage."""

    def from_experts(self, y_NH: torch.Tensor) -> None: ...
    def combine(self, sms: int) -> torch.Tensor: ...


class ElasticPath:
    """`ElasticBuffer` of the plugin or of deep_ep, which has the same calls.

    Args:
        ours: the plugin's: it casts to e4m3 on the way, and deep_ep's input is cast before the clock starts, as the
            plugin's is with `cast_before`.
        zero_copy: experts write into the window; expanded layout only.
    """

    def __init__(
        self,
        name: str,
        buffer: Any,
        setup: Setup,
        *,
        ours: bool = True,
        zero_copy: bool = False,
        cast_before: bool = False,
    ):
        self.name, self._buffer, self._setup, self._zero_copy = name, buffer, setup, zero_copy
        self.fp8, self.ordered, self.ceiling, self.budgets = setup.dtype == "fp8", ours, ours, setup.sms
        self._expanded, self._fuse_cast = setup.layout == "expanded", ours and self.fp8 and not cast_before
        cast = "cast included" if self._fuse_cast else "cast before"
        self.sends = f"fp8 rows, {cast}" if self.fp8 else "bf16 rows"
        self._handle: Any = None

    def dispatch(self, batch: Batch, sms: int) -> None:
        x = batch.fp8 if self.fp8 and not self._fuse_cast else batch.x_TH
        options = {"use_fp8": True} if self._fuse_cast else {}
        self._rows, self._idx_RK, self._weights, self._handle, _ = self._buffer.dispatch(
            x,
            topk_idx=batch.topk_idx_TK,
            topk_weights=batch.topk_weights_TK,
            num_experts=self._setup.experts,
            do_expand=self._expanded,
            num_sms=sms,
            **options,
        )

    def to_experts(self) -> Received:
        data, scales = self._rows if isinstance(self._rows, tuple) else (self._rows, None)
        counts = list(self._handle.num_recv_tokens_per_expert_list)
        if self._expanded:
            return Received(data, scales, self._weights, counts)
        flat = self._idx_RK.flatten()
        entries = (flat >= 0).nonzero().squeeze(1)
        entries = entries[flat[entries].argsort(stable=True)]
        self._row_N = entries // self._idx_RK.shape[1]
        data = data.view(torch.uint8)[self._row_N].view(data.dtype) if self.fp8 else data.index_select(0, self._row_N)
        scales = None if scales is None else scales.index_select(0, self._row_N)
        return Received(data, scales, self._weights.flatten()[entries], counts)

    def place(self, y_NH: torch.Tensor) -> torch.Tensor:
        if not self._zero_copy:
            return y_NH
        return self._buffer.get_combine_buffer(self._handle, y_NH.shape[1], y_NH.dtype).copy_(y_NH)

    def from_experts(self, y_NH: torch.Tensor) -> None:
        self._y = y_NH
        if self._expanded:
            return
        total_RH = y_NH.new_zeros(self._idx_RK.shape[0], y_NH.shape[1], dtype=torch.float32)
        self._y = total_RH.index_add_(0, self._row_N, y_NH.float()).to(y_NH.dtype)

    def combine(self, sms: int) -> torch.Tensor:
        combined_TH, _, _ = self._buffer.combine(self._y, self._handle, num_sms=sms)
        return combined_TH


class StockPath:
    """What Megatron's `alltoall` dispatcher does: permute, all-to-all of a bf16 row per (token, expert), permute."""

    name, sends, fp8, ordered, ceiling = "all-to-all", "bf16 rows", False, True, False
    budgets: tuple[int, ...] = (0,)

    def __init__(self, group: dist.ProcessGroup, setup: Setup):
        self._group, self._setup = group, setup

    def _exchange(self, rows: torch.Tensor, receive: list[int], send: list[int]) -> torch.Tensor:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(out, rows, receive, send, group=self._group)
        return out

    def dispatch(self, batch: Batch, sms: int) -> None:
        setup = self._setup
        expert = batch.topk_idx_TK.flatten()
        counts_PL = torch.bincount(expert, minlength=setup.experts).view(setup.ranks, setup.local_experts)
        self._counts_PL = torch.empty_like(counts_PL)  # by source
        dist.all_to_all_single(self._counts_PL, counts_PL, group=self._group)
        order = expert.argsort(stable=True)
        self._token, self._num_tokens = order // setup.topk, len(batch.x_TH)
        self._send, self._receive = counts_PL.sum(1).tolist(), self._counts_PL.sum(1).tolist()
        self._rows = self._exchange(batch.x_TH.index_select(0, self._token), self._receive, self._send)
        weights = batch.topk_weights_TK.flatten().index_select(0, order)
        self._weights = self._exchange(weights, self._receive, self._send)

    def to_experts(self) -> Received:
        expert_L = torch.arange(self._setup.local_experts, device=self._rows.device)
        expert_N = expert_L.repeat(self._setup.ranks).repeat_interleave(self._counts_PL.flatten())
        self._order_N = expert_N.argsort(stable=True)
        data, weights = (t.index_select(0, self._order_N) for t in (self._rows, self._weights))
        return Received(data, None, weights, self._counts_PL.sum(0).tolist())

    def place(self, y_NH: torch.Tensor) -> torch.Tensor:
        return y_NH

    def from_experts(self, y_NH: torch.Tensor) -> None:
        self._y = torch.empty_like(y_NH).index_copy_(0, self._order_N, y_NH)

    def combine(self, sms: int) -> torch.Tensor:
        rows = self._exchange(self._y, self._send, self._receive)
        total_TH = rows.new_zeros(self._num_tokens, rows.shape[1], dtype=torch.float32)
        return total_TH.index_add_(0, self._token, rows.float()).to(rows.dtype)


# ---- what must come out ---------------------------------------------------------------------------------------------


class WrongResult(RuntimeError):
    """A path returned something else than the reference, or launched more than its budget."""


def _factor(expert: torch.Tensor) -> torch.Tensor:
    """What expert `expert` multiplies its rows by; any two neighbours differ."""
    return (1 + expert % 4) / 4


def expert_output(received: Received, first_expert: int) -> torch.Tensor:
    """bf16 `[N, H]`: stand-ins for experts, each a factor of its own, times the router's weight."""
    counts = torch.tensor(received.counts, device=received.data.device)
    expert_N = torch.arange(first_expert, first_expert + len(counts), device=counts.device).repeat_interleave(counts)
    if received.scales is None:
        x_NH = received.data.float()
    else:
        x_NH = per_token_cast_back(received.data, received.scales, torch.float32)
    return (x_NH * _factor(expert_N).unsqueeze(1) * received.weights.unsqueeze(1)).to(torch.bfloat16)


def check_received(path: Path, received: Received, batches: list[Batch], setup: Setup, rank: int) -> None:
    """Compare rows in expert order, bit for bit, with a plain gather from every rank's batch.

    Raises:
        WrongResult: they differ.
    """
    idx = torch.cat([batch.topk_idx_TK for batch in batches]).flatten() - rank * setup.local_experts
    entries = ((idx >= 0) & (idx < setup.local_experts)).nonzero().squeeze(1)
    entries = entries[idx[entries].argsort(stable=True)]
    counts = torch.bincount(idx[entries], minlength=setup.local_experts).tolist()
    if received.counts != counts:
        raise WrongResult(f"{path.name}: rows per local expert of rank {rank} are {received.counts}, not {counts}")
    if not path.ordered:
        return  # what combine makes of the rows tells
    row_N = entries // setup.topk
    weights = torch.cat([batch.topk_weights_TK for batch in batches]).flatten()[entries]
    parts: list[tuple[str, torch.Tensor | None, torch.Tensor]] = [("weights", received.weights, weights)]
    if path.fp8:
        data, scales = (torch.cat(part) for part in zip(*(batch.fp8 for batch in batches), strict=True))
        parts.append(("scales", received.scales, scales[row_N]))
        parts.append(("rows", received.data.view(torch.uint8), data.view(torch.uint8)[row_N]))
    else:
        x = torch.cat([batch.x_TH for batch in batches])
        parts.append(("rows", received.data.view(torch.int16), x.view(torch.int16)[row_N]))
    for what, got, wanted in parts:
        if got is None or got.shape != wanted.shape or not torch.equal(got, wanted):
            raise WrongResult(f"{path.name}: dispatch to rank {rank} returned wrong {what}")


def check_combined(path: Path, combined_TH: torch.Tensor, batch: Batch, rank: int) -> None:
    """Compare a combined batch with fp32 sums over its experts; bf16 may round each rank's part and the result.

    Raises:
        WrongResult: they differ by more.
    """
    x_TH = per_token_cast_back(*batch.fp8, torch.float32) if path.fp8 else batch.x_TH.float()
    total_TH, size_TH = torch.zeros_like(x_TH), torch.zeros_like(x_TH)
    for expert_T, weight_T in zip(batch.topk_idx_TK.t(), batch.topk_weights_TK.t(), strict=True):
        y_TH = (x_TH * _factor(expert_T).unsqueeze(1) * weight_T.unsqueeze(1)).to(torch.bfloat16).float()
        total_TH += y_TH
        size_TH += y_TH.abs()
    difference_TH = (combined_TH.float() - total_TH).abs()
    wrong_TH = ~(difference_TH <= size_TH * ROUNDING)  # a NaN is wrong, too
    if wrong_TH.any():
        token, column = wrong_TH.nonzero()[0].tolist()
        raise WrongResult(
            f"{path.name}: combine on rank {rank} is wrong in {int(wrong_TH.sum())} of {wrong_TH.numel()} values, "
            f"first [{token}, {column}] = {float(combined_TH[token, column]):g}, not {float(total_TH[token, column]):g}"
        )
