"""From tokens to rows: suffix n-grams hashed by several heads, as "Conditional Memory via Scalable Lookup" describes.

arXiv 2601.07372, section 2.2: token ids are mapped to canonical ones; for every position, the n-gram that ends there is
hashed by multiplication and exclusive or; each head has a table of its own, of a prime number of rows, so that n-grams
that collide in one head differ in another.

Legend: B sequences, S positions, L tables (n-gram orders x heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# These bases decide primality for every number below 3.3e24 (Sorenson and Webster, 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


class NgramHash(torch.nn.Module):
    """Rows of the tables of all n-gram orders and heads, which lie one after the other in one large table.

    Args:
        table_sizes: rows of a head's table for each order; each gets a prime of its own from there upwards.
        orders: lengths of the n-grams, ascending.
        heads: hash heads of each order.
        pad_id: stands before the first token of a sequence.
        token_map: int64 `[vocabulary]`, canonical id of each token ("tokenizer compression"); None = as they are.
        seed: of the multipliers. Layers with memories of their own should differ in it.

    Attributes:
        sizes: rows of each table `[L]`, by order, then head. num_tables: L. num_rows: their sum.

    Raises:
        ValueError: an argument is out of range.
    """

    multipliers: torch.Tensor
    offsets: torch.Tensor
    moduli: torch.Tensor
    token_map: torch.Tensor | None

    def __init__(
        self,
        table_sizes: Sequence[int],
        *,
        orders: Sequence[int] = (2, 3),
        heads: int = 8,
        pad_id: int = 0,
        token_map: torch.Tensor | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not orders or list(orders) != sorted(set(orders)) or orders[0] < 1:
            raise ValueError(f"orders = {list(orders)}: must be ascending, each 1 or more")
        if len(table_sizes) != len(orders) or min(table_sizes) < 2:
            raise ValueError(
                f"table_sizes = {list(table_sizes)}: must be {len(orders)} (one per order), each 2 or more"
            )
        if heads < 1:
            raise ValueError(f"heads = {heads}: must be 1 or more")
        if token_map is not None and (token_map.dtype != torch.int64 or token_map.dim() != 1 or not len(token_map)):
            raise ValueError(
                f"token_map is {token_map.dtype} {list(token_map.shape)}: must be torch.int64 [vocabulary]"
            )
        self.orders, self.heads, self.pad_id, self.seed = tuple(orders), heads, pad_id, seed
        self.table_sizes = tuple(table_sizes)
        self.sizes = self._primes()
        self.num_tables, self.num_rows = len(self.sizes), sum(self.sizes)
        generator = torch.Generator().manual_seed(seed)
        odd = torch.randint(-(1 << 62), 1 << 62, (self.orders[-1],), generator=generator) * 2 + 1
        sizes = torch.tensor(self.sizes)
        # Recomputed from the arguments, so not part of a checkpoint.
        self.register_buffer("multipliers", odd, persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("moduli", sizes, persistent=False)
        self.register_buffer("token_map", token_map, persistent=False)

    def _primes(self) -> list[int]:
        taken: set[int] = set()
        sizes = []
        for size in self.table_sizes:
            for _ in range(self.heads):
                while size in taken or not is_prime(size):
                    size += 1
                taken.add(size)
                sizes.append(size)
        return sizes

    def describe(self) -> dict[str, Any]:
        """What decides the row of an n-gram; memories can share rows only where this is equal."""
        mapped = None if self.token_map is None else [len(self.token_map), int(self.token_map.sum())]
        return {
            "orders": list(self.orders),
            "sizes": list(self.sizes),
            "pad_id": self.pad_id,
            "seed": self.seed,
            "token_map": mapped,
        }

    def forward(self, tokens: torch.Tensor, history: torch.Tensor | None = None) -> torch.Tensor:
        """int64 rows `[B, S, L]` for `tokens` `[B, S]` (int32 or int64).

        Args:
            history: `[B, X]`, what stands before `tokens`: of a sequence that is decoded step by step or cut into
                pieces. Only the last max(orders) - 1 matter; where there are fewer, `pad_id` stands before them.

        Raises:
            TypeError, ValueError: wrong dtype or shape, or an id outside `token_map`.
        """
        reach = self.orders[-1] - 1
        parts = [self._canonical("tokens", tokens)]
        batch, length = tokens.shape
        if history is not None:
            if history.dim() != 2 or history.shape[0] != batch:
                raise ValueError(f"history has shape {list(history.shape)}: must be [{batch}, any]")
            parts.insert(0, self._canonical("history", history[:, max(history.shape[1] - reach, 0) :]))
        missing = reach - (parts[0].shape[1] if history is not None else 0)
        pad = self._canonical("pad_id", torch.tensor([[self.pad_id]], device=tokens.device))
        parts.insert(0, pad.expand(batch, missing))
        context = torch.cat(parts, dim=1)
        mixes, mix = [], torch.zeros_like(tokens, dtype=torch.int64)
        for back in range(self.orders[-1]):
            # Products wrap around at 64 bits: all bits of every token reach the remainder below.
            mix = mix ^ (context[:, reach - back :][:, :length] * self.multipliers[back])
            if back + 1 in self.orders:
                mixes.append(mix)
        mix_BSL = torch.stack(mixes, dim=2).repeat_interleave(self.heads, dim=2)
        return mix_BSL.remainder(self.moduli) + self.offsets

    def _canonical(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {tokens.dtype}: must be torch.int32 or torch.int64")
        if tokens.dim() != 2:
            raise ValueError(f"{name} has shape {list(tokens.shape)}: must be [sequences, positions]")
        if self.token_map is None:
            return tokens.to(torch.int64)
        if tokens.numel() and tokens.device.type == "cpu":
            smallest, largest = (int(v) for v in tokens.aminmax())
            if smallest < 0 or largest >= len(self.token_map):
                bad = largest if largest >= len(self.token_map) else smallest
                raise ValueError(f"{name} has id {bad}: token_map has ids 0..{len(self.token_map) - 1}")
        return self.token_map[tokens]


def is_prime(number: int) -> bool:
    """Whether `number` is a prime (Miller and Rabin's test, exact for 64 bits)."""
    for prime in _WITNESSES:
        if number % prime == 0:
            return number == prime
    if number < 2:
        return False
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in _WITNESSES:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True
