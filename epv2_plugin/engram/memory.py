"""A trainable n-gram memory, each rank with its share of the rows.

Legend: B sequences, S positions, L tables (n-gram orders x heads), D values of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from epv2_plugin.elastic import ElasticBuffer, engram
from epv2_plugin.elastic.quant import per_token_cast_to_fp8
from epv2_plugin.engram.hashing import NgramHash

_FP8 = torch.float8_e4m3fn
_BLOCK_ROWS = 4096  # rows that are initialized from one seed


class ShardedNgramMemory(torch.nn.Module):
    """Rows for the n-grams that end at every token, from a table spread over the ranks of `buffer`.

    Every rank makes it with the same arguments and calls it equally often. The table starts with the same values on any
    number of ranks. Gradients arrive summed over all ranks in `weight.grad`, sparse; an optimizer of this package then
    changes only the rows touched. Leave `weight` out of whatever else averages, shards or casts parameters (DDP, FSDP,
    `module.to(dtype)` does so by itself).

    Args:
        buffer: of the group that shares the table; a buffer holds one table.
        hashing: which rows belong to a token.
        row_dim: D. Output is `[B, S, L * D]`, or `[B, S, D]` with `combine="sum"`.
        dtype: of the rows as they are fetched: fp32, bf16, fp16, or e4m3 with a scale for every 128 values.
        combine: "concat" of the tables' rows, or their "sum", which runs in fp32.
        output_dtype: default: `dtype`, bf16 for e4m3.
        init_std: standard deviation of the initial values.
        seed: of the initial values.
        gradient_scale: see `elastic.engram.fetch`.
        num_sms: see `ElasticBuffer.engram_write`.

    Attributes:
        weight: fp32 `[rows of this rank, D]`, what is trained; for dtype fp32 the buffer's own memory.
        first_row: of this rank. num_rows: of the table, without those that only make the ranks' shares equal.

    Raises:
        ValueError: an argument is out of range. BufferSizeError: the buffer was made for less.
        CommunicationError: from the write of the initial values.
    """

    def __init__(
        self,
        buffer: ElasticBuffer,
        hashing: NgramHash,
        row_dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        combine: Literal["concat", "sum"] = "concat",
        output_dtype: torch.dtype | None = None,
        init_std: float = 0.02,
        seed: int = 0,
        gradient_scale: float = 1.0,
        num_sms: int = 0,
    ):
        super().__init__()
        if row_dim < 1:
            raise ValueError(f"row_dim = {row_dim}: must be 1 or more")
        if combine not in ("concat", "sum"):
            raise ValueError(f"combine = {combine!r}: must be 'concat' or 'sum'")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, _FP8):
            raise ValueError(f"dtype = {dtype}: must be torch.float32, bfloat16, float16 or float8_e4m3fn")
        if init_std < 0:
            raise ValueError(f"init_std = {init_std}: must be 0 or more")
        self.buffer, self.hashing, self.row_dim, self.dtype, self.combine = buffer, hashing, row_dim, dtype, combine
        self.output_dtype = output_dtype or (torch.bfloat16 if dtype == _FP8 else dtype)
        self.init_std, self.seed, self.gradient_scale, self.num_sms = init_std, seed, gradient_scale, num_sms
        self.num_rows = hashing.num_rows
        share = -(-self.num_rows // buffer.num_ranks)
        self.first_row = share * buffer.rank_idx
        values = torch.zeros(share, row_dim, device=buffer.device, dtype=torch.float32)
        self._initialize(values)
        buffer.engram_write(*self._rounded(values), num_sms=num_sms)
        self.weight = torch.nn.Parameter(buffer.engram_storage[0] if dtype == torch.float32 else values)
        self.register_load_state_dict_post_hook(lambda module, _: module.publish())

    def _initialize(self, values: torch.Tensor) -> None:
        end = min(self.first_row + values.shape[0], self.num_rows)
        for block in range(self.first_row // _BLOCK_ROWS, -(-end // _BLOCK_ROWS)):
            generator = torch.Generator().manual_seed((self.seed << 32) + block)
            drawn = torch.randn(_BLOCK_ROWS, self.row_dim, generator=generator) * self.init_std
            begin = block * _BLOCK_ROWS
            low, high = max(begin, self.first_row), min(begin + _BLOCK_ROWS, end)
            if low < high:
                values[low - self.first_row : high - self.first_row] = drawn[low - begin : high - begin]

    def _rounded(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return per_token_cast_to_fp8(values) if self.dtype == _FP8 else (values.to(self.dtype), None)

    def _apply(self, fn: Callable, recurse: bool = True) -> ShardedNgramMemory:
        # The table stays what and where the buffer has it: a model's `.bfloat16()` would end the fp32 training of rows.
        self.hashing._apply(fn, recurse)
        return self

    def forward(self, tokens: torch.Tensor, history: torch.Tensor | None = None) -> torch.Tensor:
        """Rows for `tokens` `[B, S]`; arguments as `NgramHash.forward`, result as the class says."""
        return self.prefetch(tokens, history)()

    def prefetch(self, tokens: torch.Tensor, history: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        """Start to fetch and return at once; the hook waits and returns what `forward` does.

        Rows depend on tokens only: start this before the layers that come before the memory.
        """
        with self.buffer._counting_refusals("engram_fetch"):
            rows_BSL = self.hashing(tokens, history)
        output = torch.float32 if self.combine == "sum" else self.output_dtype
        hook = engram.fetch(
            self.buffer, self.weight, rows_BSL.flatten(), dtype=output, gradient_scale=self.gradient_scale
        )
        batch, length, tables = rows_BSL.shape

        def finish() -> torch.Tensor:
            if self.combine == "concat":
                return hook().view(batch, length, tables * self.row_dim)
            return hook().view(batch, length, tables, self.row_dim).sum(2).to(self.output_dtype)

        return finish

    @torch.no_grad()
    def assign(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Set some rows of this rank, for all ranks' fetches that start afterwards. Every rank calls it.

        Args:
            rows: int64 `[U]`, each at most once, counted from `first_row`; may be empty. values: fp32 `[U, D]`.
        """
        self.buffer.engram_update(rows, *self._rounded(values))
        if self.dtype != torch.float32:
            self.weight.index_copy_(0, rows, values)

    @torch.no_grad()
    def publish(self) -> None:
        """Let all ranks' fetches that start afterwards see `weight` as it is now. Every rank calls it.

        Needed after a change of `weight` other than by `assign`, an optimizer of this package, or `load_state_dict`.
        """
        self.buffer.engram_write(*self._rounded(self.weight.detach()), num_sms=self.num_sms)

    def get_extra_state(self) -> dict[str, Any]:
        """Which rows a checkpoint holds, and how they are found."""
        return {"first_row": self.first_row, "num_rows": self.num_rows, "hashing": self.hashing.describe()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of other rows.

        Raises:
            ValueError: it has another hash or another part of the table.
        """
        ours = self.get_extra_state()
        if state["hashing"] != ours["hashing"]:
            raise ValueError(f"the checkpoint's rows are hashed by {state['hashing']}, here by {ours['hashing']}")
        if state["first_row"] != self.first_row:
            raise ValueError(
                f"the checkpoint begins with row {state['first_row']}, this rank with {self.first_row}: "
                "engram.reshard_memory makes one that fits from those of all ranks"
            )
