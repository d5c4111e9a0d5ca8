"""Data: sequences depend on (recipe, step) alone, every window is seen once an epoch, and wrong paths are explained."""

import itertools
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epv2_plugin.config import ConfigError
from epv2_plugin.training.data import IDX_HEADER, IDX_MAGIC, STDLIB_BYTES, TokenStream, permuted
from epv2_plugin.training.recipe import Recipe, load_recipe

TINY = Path(__file__).parent.parent / "recipes" / "deepseek_v3_tiny.yaml"


def recipe_for(path: object, kind: str = "bytes", length: int = 8, **more: object) -> Recipe:
    return load_recipe(TINY, {"data.path": str(path), "data.kind": kind, "model.seq_length": length} | more)


def refused(recipe: Recipe, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TokenStream(recipe)
    assert caught.value.key == "data.path"
    assert allowed in caught.value.allowed


def write_indexed(prefix: Path, documents: list[list[int]], code: int = 8, dtype: str = "<u2") -> None:
    """A Megatron data set as its documentation describes it."""
    np.concatenate([np.array(d, dtype=dtype) for d in documents]).tofile(f"{prefix}.bin")
    lengths = np.array([len(d) for d in documents], dtype="<i4")
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype("<i8") * np.dtype(dtype).itemsize
    with open(f"{prefix}.idx", "wb") as idx:
        idx.write(IDX_HEADER.pack(IDX_MAGIC, 1, code, len(documents), len(documents) + 1))
        idx.write(lengths.tobytes() + starts.tobytes() + np.arange(len(documents) + 1, dtype="<i8").tobytes())


@given(st.integers(1, 600), st.integers(-(2**63), 2**63), st.integers(0, 1000))
def test_permuted_is_a_permutation(size, seed, epoch):
    assert sorted(permuted(position, size, seed, epoch) for position in range(size)) == list(range(size))


def test_permutations_differ_and_shuffle():
    orders = {
        (seed, epoch): [permuted(i, 1000, seed, epoch) for i in range(1000)] for seed in (0, 1) for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    for order in orders.values():
        assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.1
        assert sum(b - a == 1 for a, b in itertools.pairwise(order)) < 15


def test_permuted_works_on_more_windows_than_memory_holds():
    size = 10**15
    picks = [permuted(position, size, 3, 0) for position in range(200)]
    assert len(set(picks)) == 200
    assert all(0 <= pick < size for pick in picks)


def test_the_standard_library():
    recipe = load_recipe(TINY)
    begin = time.perf_counter()
    stream = TokenStream(recipe)
    assert time.perf_counter() - begin < 10
    assert 2**20 < stream.num_tokens <= STDLIB_BYTES
    assert "stdlib" in stream.path
    batch = stream.sequences(3)
    assert batch.shape == (recipe.train.global_batch_size, recipe.model.seq_length + 1)
    assert batch.dtype == torch.int64
    again = TokenStream(recipe)
    assert again.digest == stream.digest
    assert len(stream.digest) == 16
    assert torch.equal(again.sequences(3), batch)
    assert not torch.equal(stream.sequences(4), batch)
    assert not torch.equal(TokenStream(load_recipe(TINY, {"train.seed": 7})).sequences(3), batch)


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(tmp_path):
    text = np.random.default_rng(0).integers(0, 256, 16 * 8 + 5, dtype=np.uint8)
    (tmp_path / "text").write_bytes(text.tobytes())
    stream = TokenStream(recipe_for(tmp_path / "text"))
    assert stream.num_tokens == len(text)
    windows = {tuple(text[i * 8 : i * 8 + 9].tolist()) for i in range(16)}
    epochs = [torch.cat([stream.sequences(2 * epoch), stream.sequences(2 * epoch + 1)]).tolist() for epoch in (0, 1)]
    for epoch in epochs:
        assert {tuple(row) for row in epoch} == windows
    assert epochs[0] != epochs[1]


def test_a_single_window_may_be_smaller_than_a_batch(tmp_path):
    (tmp_path / "text").write_bytes(b"abcdefghi")
    rows = TokenStream(recipe_for(tmp_path / "text")).sequences(5)
    assert rows.tolist() == [list(b"abcdefghi")] * 8


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name, content in {"b.txt": b"BBBB", "a/z.txt": b"ZZZZ", "a/c.md": b"CCCC", "data.bin": b"\0\1\2"}.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "corpus" / ".hidden").write_bytes(b"HHHH")
    stream = TokenStream(recipe_for(tmp_path / "corpus"))
    assert bytes(stream.sequences(0)[0].tolist()) == b"CCCCZZZZB"
    assert stream.num_tokens == 12
    digest = stream.digest
    (tmp_path / "corpus" / "b.txt").write_bytes(b"BBBX")
    assert TokenStream(recipe_for(tmp_path / "corpus")).digest != digest


def test_relative_paths_are_looked_up_beside_the_recipe_then_here(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "here").mkdir()
    recipe_path = tmp_path / "recipes" / "r.yaml"
    recipe_path.write_text(TINY.read_text())
    monkeypatch.chdir(tmp_path / "here")
    changes = {"data.path": "text.txt", "model.seq_length": 8}
    with pytest.raises(ConfigError, match=r"not found: .*recipes/text.txt or .*here/text.txt"):
        TokenStream(load_recipe(recipe_path, changes))
    Path("text.txt").write_bytes(b"working folder")
    assert TokenStream(load_recipe(recipe_path, changes)).num_tokens == 14
    (tmp_path / "recipes" / "text.txt").write_bytes(b"beside the recipe")
    assert TokenStream(load_recipe(recipe_path, changes)).num_tokens == 17


def test_wrong_paths_are_explained(tmp_path):
    refused(recipe_for(tmp_path / "nothing"), "not found")
    (tmp_path / "empty").mkdir()
    refused(recipe_for(tmp_path / "empty"), "holds no text")
    (tmp_path / "short").write_bytes(b"12345678")
    refused(recipe_for(tmp_path / "short"), "needs 9 tokens for one sequence, has 8")
    (tmp_path / "zero").write_bytes(b"")
    refused(recipe_for(tmp_path / "zero"), "has 0")
    if os.geteuid() != 0:  # root reads everything
        (tmp_path / "secret").write_bytes(b"x" * 100)
        (tmp_path / "secret").chmod(0)
        refused(recipe_for(tmp_path / "secret"), "can't be read")


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")])
def test_megatron_files(tmp_path, code, dtype):
    write_indexed(tmp_path / "corpus", [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11]], code, dtype)
    for name in ("corpus", "corpus.bin", "corpus.idx"):
        stream = TokenStream(recipe_for(tmp_path / name, "megatron"))
        assert stream.num_tokens == 11
        assert stream.sequences(0)[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_megatron_files_written_by_megatron(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=np.uint16)
    for document in ([5] * 10, [6] * 7, [7] * 3):
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "corpus.idx"))
    stream = TokenStream(recipe_for(tmp_path / "corpus", "megatron", 19))
    assert stream.sequences(0)[0].tolist() == [5] * 10 + [6] * 7 + [7] * 3


def test_megatron_files_that_are_wrong(tmp_path):
    refused(recipe_for(tmp_path / "none", "megatron"), "not found")
    write_indexed(tmp_path / "big", [[1, 2, 256, 4, 5, 6, 7, 8, 9]])
    refused(recipe_for(tmp_path / "big", "megatron"), "holds token 256, must be 0 to 255")
    TokenStream(recipe_for(tmp_path / "big", "megatron", **{"model.vocab_size": 257}))
    write_indexed(tmp_path / "minus", [[1, 2, -3, 4, 5, 6, 7, 8, 9]], 4, "<i4")
    refused(recipe_for(tmp_path / "minus", "megatron"), "holds token -3")
    write_indexed(tmp_path / "cut", [[1] * 20])
    (tmp_path / "cut.bin").write_bytes(b"\1\0" * 19)
    refused(recipe_for(tmp_path / "cut", "megatron"), "lists 20 tokens, but cut.bin holds 19")
    (tmp_path / "cut.bin").write_bytes(b"\1\0" * 19 + b"\1")
    refused(recipe_for(tmp_path / "cut", "megatron"), "not whole tokens")
    index = (tmp_path / "big.idx").read_bytes()
    for content, reason in (
        (b"not an index", "is not the index of a Megatron data set"),
        (b"", "is not the index of a Megatron data set"),
        (index[:9] + struct.pack("<Q", 2) + index[17:], "index version 2"),
        (index[:17] + b"\7" + index[18:], "dtype code 7"),
        (index[:34], "lists 0 tokens"),
    ):
        (tmp_path / "big.idx").write_bytes(content)
        refused(recipe_for(tmp_path / "big", "megatron"), reason)
