"""`EPHandle`: what a dispatch leaves behind for its combine, for cached dispatches and for callers that read counts."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch

from epv2_plugin.elastic.sizing import align


class Route(Protocol):
    """What a backend keeps of a routing: enough to repeat it and to reverse it. Tensors lie on its device.

    Attributes:
        topk_idx_TK: int64 `[T, K]`, as dispatched. num_max_tokens_per_rank: as agreed by the ranks.
    """

    topk_idx_TK: torch.Tensor
    num_max_tokens_per_rank: int

    @property
    def rows_per_expert(self) -> list[int]:
        """Rows of each local expert, on the host."""

    @property
    def received_per_source(self) -> torch.Tensor:
        """int32 `[P]`: rows received from each rank, one per token."""

    @property
    def received_per_expert(self) -> torch.Tensor:
        """int32 `[E_local]`: rows of each local expert."""

    @property
    def recv_src_metadata(self) -> torch.Tensor:
        """See `EPHandle`."""

    @property
    def dst_buffer_slot_idx(self) -> torch.Tensor:
        """See `EPHandle`."""


class EPHandle:
    """Routing of one dispatch. Reading a tensor of a dispatch still in flight waits for it.

    Attributes:
        do_expand: layout of the received rows: True = one per token and local expert, False = one per token and rank.
        topk_idx: int64 `[T, K]`, experts of this rank's tokens, -1 = none.
        num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: as dispatched.
        num_recv_tokens: rows in the compact layout. After `do_cpu_sync=False`: the number allocated.
        num_expanded_tokens: rows in the expanded layout, alignment gaps included; likewise.
        num_recv_tokens_per_expert_list: rows of each local expert rounded up to the alignment, on the host. Empty
            after `do_cpu_sync=False`.
    """

    def __init__(
        self,
        *,
        owner: object,
        route: Route,
        do_expand: bool,
        topk_idx: torch.Tensor,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        exact: bool,
    ):
        self._owner, self._route, self._exact = owner, route, exact
        self.do_expand = do_expand
        self.topk_idx = topk_idx
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.num_recv_tokens = num_recv_tokens
        self.num_expanded_tokens = num_expanded_tokens

    @property
    def num_rows(self) -> int:
        """Rows that dispatch returned and combine expects, in this handle's layout."""
        return self.num_expanded_tokens if self.do_expand else self.num_recv_tokens

    @cached_property
    def num_recv_tokens_per_expert_list(self) -> list[int]:
        return [align(n, self.expert_alignment) for n in self._route.rows_per_expert] if self._exact else []

    @cached_property
    def num_unaligned_recv_tokens_per_expert(self) -> torch.Tensor:
        """int32 `[E_local]`: rows of each local expert, without alignment."""
        return self._route.received_per_expert

    @cached_property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> torch.Tensor:
        """int32 `[P]`: inclusive prefix sum of the rows from each source rank; the last is the total."""
        return self._route.received_per_source.cumsum(0, dtype=torch.int32)

    @cached_property
    def psum_num_recv_tokens_per_expert(self) -> torch.Tensor:
        """int32 `[E_local]`. Compact: prefix sum (inclusive) of aligned counts. Expanded: end of each expert's rows."""
        rows = self._route.received_per_expert
        aligned = (rows + self.expert_alignment - 1) // self.expert_alignment * self.expert_alignment
        ends = aligned.cumsum(0, dtype=torch.int32)
        return ends - aligned + rows if self.do_expand else ends

    @cached_property
    def recv_src_metadata(self) -> torch.Tensor:
        """int32 `[R, 2 + K]`, R = rows really received (fewer than allocated after `do_cpu_sync=False`).

        Column 0: source rank * num_max_tokens_per_rank + source token. Column 1: source rank * K + the first top-k
        position that led here. Columns 2..: the token's rows in the expanded tensor, -1 = none (all of them in the
        compact layout).
        """
        return self._route.recv_src_metadata

    @cached_property
    def dst_buffer_slot_idx(self) -> torch.Tensor:
        """int32 `[T, K]`: which of the rows that this rank sends to that expert's rank is this token's; -1 = none."""
        return self._route.dst_buffer_slot_idx
