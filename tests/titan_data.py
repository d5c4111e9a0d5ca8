"""torchtitan's tokenizer and text for tests, by its override flag: the wheel has neither.

    --override.imports tests.titan_data.tokenizer tests.titan_data.text

The batch of a step is the same whatever the number of data-parallel ranks, which take their part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.config import override
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader


class Tokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return list(str(args[0]).encode())

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return bytes(args[0]).decode()

    def get_vocab_size(self) -> int:
        return 256


class Text(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **kwargs: Any
    ):
        self._rank, self._shape, self._step = dp_rank, (dp_world_size * local_batch_size, seq_len + 1), 0
        self._local = local_batch_size

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            # A narrow range of values: something to learn.
            random = torch.Generator().manual_seed(self._step)
            text = torch.randint(32, self._shape, generator=random)[self._rank * self._local :][: self._local]
            self._step += 1
            positions = torch.arange(text.shape[1] - 1).expand(self._local, -1)
            yield {"input": text[:, :-1].contiguous(), "positions": positions}, text[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict.get("step", 0)


@override(target=HuggingFaceTokenizer.Config)
def tokenizer(config: HuggingFaceTokenizer.Config) -> Tokenizer.Config:
    return Tokenizer.Config()


@override(target=HuggingFaceTextDataLoader.Config)
def text(config: HuggingFaceTextDataLoader.Config) -> Text.Config:
    return Text.Config()
