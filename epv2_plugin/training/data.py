"""Training tokens: bytes of text, or Megatron's `.bin/.idx` files, as sequences that depend on (recipe, step) only.

The corpus is one long row of tokens, cut into windows of `seq_length` tokens (plus the one that the last position has
to predict). Every epoch visits every window once, in an order that a keyed permutation gives window by window, so
that no list of windows is ever built and any step can be asked for directly, which is what resuming needs.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from epv2_plugin.training.recipe import Recipe
from epv2_plugin.training.titan_recipe import TitanRecipe

AnyRecipe = Recipe | TitanRecipe
MIB = 1 << 20
STDLIB_BYTES = 8 * MIB
FOLDER_BYTES = 1024 * MIB  # a folder is held in memory by each process; a single file is memory-mapped
DIGEST_BYTES = 64 * MIB
SCANNED_TOKENS = 16 * MIB  # checked against the vocabulary at start; the rest is checked as it is drawn

# Parts of the standard library that distributions package apart or leave out, that differ from machine to machine,
# or that are tables written by a program rather than text.
STDLIB_LEFT_OUT = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site",
        "site-packages",
        "sysconfig",
        "test",
        "tests",
        "tkinter",
        "turtle",
        "turtledemo",
        "venv",
    }
)

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, number of document bounds
IDX_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class TokenStream:
    """The training data of a recipe.

    Attributes:
        num_tokens: tokens in the corpus.
        digest: 16 hex digits that name the content: SHA-256 of its length and its first 64 MiB.
        path: what was read, for reports.

    Raises:
        ConfigError: nothing there, unreadable, not of the stated kind, or shorter than one sequence.
    """

    def __init__(self, recipe: AnyRecipe):
        self._recipe = recipe
        self._tokens_N, self.path = _megatron(recipe) if recipe.data.kind == "megatron" else _bytes(recipe)
        self.num_tokens = len(self._tokens_N)
        self._num_windows = (self.num_tokens - 1) // recipe.model.seq_length
        if self._num_windows < 1:
            needed = recipe.model.seq_length + 1
            raise recipe.fail("data.path", f"needs {needed} tokens for one sequence, has {self.num_tokens}")
        self._check_vocabulary(self._tokens_N[:SCANNED_TOKENS])
        itemsize = self._tokens_N.dtype.itemsize
        digest = hashlib.sha256(f"{self._tokens_N.dtype.str} {self.num_tokens}\n".encode())
        digest.update(np.ascontiguousarray(self._tokens_N[: DIGEST_BYTES // itemsize]).data)
        self.digest = digest.hexdigest()[:16]

    def sequences(self, step: int) -> torch.Tensor:
        """The global batch of `step` (from 0): int64 `[global_batch_size, seq_length + 1]`.

        Columns `[:-1]` are the inputs and `[1:]` the labels.

        Raises:
            ConfigError: a token of a `.bin` file is not below `model.vocab_size`.
        """
        length, rows = self._recipe.model.seq_length, self._recipe.train.global_batch_size
        batch = np.empty((rows, length + 1), dtype=np.int64)
        for row in range(rows):
            epoch, position = divmod(step * rows + row, self._num_windows)
            window = permuted(position, self._num_windows, self._recipe.train.seed, epoch)
            batch[row] = self._tokens_N[window * length : (window + 1) * length + 1]
        self._check_vocabulary(batch)
        return torch.from_numpy(batch)

    def _check_vocabulary(self, tokens: np.ndarray) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._recipe.model.vocab_size:
            bad, limit = (low if low < 0 else high), self._recipe.model.vocab_size
            raise self._recipe.fail(
                "data.path", f"holds token {bad}, must be 0 to {limit - 1} (model.vocab_size {limit})"
            )


def permuted(position: int, size: int, seed: int, epoch: int) -> int:
    """Element `position` of a permutation of `range(size)` that `seed` and `epoch` choose, in constant memory.

    A four-round Feistel network permutes the next even power of two; values that fall outside `range(size)` are sent
    through it again (at most four times on average) until they fall inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in _round_keys(seed, epoch):
            left, right = right, left ^ (_mix(right ^ key) & mask)
        position = left << half | right
        if position < size:
            return position


def _round_keys(seed: int, epoch: int) -> tuple[int, int, int, int]:
    first = _mix(_mix(seed & _WORD) ^ (epoch & _WORD))
    return first, _mix(first + 1), _mix(first + 2), _mix(first + 3)


_WORD = (1 << 64) - 1


def _mix(word: int) -> int:
    """A bijection of 64-bit words in which every input bit changes about half of the output (multiply, xor-shift)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ word >> 32) * 0xD6E8FEB86659FD93) & _WORD
    word = ((word ^ word >> 32) * 0xD6E8FEB86659FD93) & _WORD
    return word ^ word >> 32


def _bytes(recipe: AnyRecipe) -> tuple[np.ndarray, str]:
    """Every byte is a token; the files of a folder follow one another in the order of their relative paths."""
    if recipe.data.path == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        tokens = _concatenate(recipe, _stdlib_files(root), STDLIB_BYTES, truncate=True)
        if not len(tokens):
            raise recipe.fail("data.path", f"no standard-library sources in {root}; name a file or folder of text")
        return tokens, f"stdlib (Python {'.'.join(map(str, sys.version_info[:3]))})"
    path = _resolve(recipe, recipe.data.path)
    if path.is_dir():
        files = sorted((f for f in _walk(recipe, path)), key=lambda f: f.relative_to(path).as_posix())
        tokens = _concatenate(recipe, iter(files), FOLDER_BYTES, truncate=False, only_text=True)
        if not len(tokens):
            raise recipe.fail("data.path", f"the folder {path} holds no text")
        return tokens, str(path)
    return _map(recipe, path, np.dtype(np.uint8)), str(path)


def _stdlib_files(root: Path) -> Iterator[Path]:
    """The `.py` files of the standard library that every installation of this Python version has, by relative path."""
    files = []
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = [f for f in folders if f not in STDLIB_LEFT_OUT and (here.parts or f in sys.stdlib_module_names)]
        for name in names:
            module = name.removesuffix(".py")
            if name == module or module in STDLIB_LEFT_OUT or module.startswith("_sysconfigdata"):
                continue
            if here.parts or module in sys.stdlib_module_names:  # leaves out what a distribution put at the top
                files.append(here / name)
    return (root / file for file in sorted(files, key=lambda f: f.as_posix()))


def _walk(recipe: AnyRecipe, root: Path) -> Iterator[Path]:
    """Regular files below `root`, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise recipe.fail("data.path", f"{error.filename} can't be read: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        yield from (
            Path(folder) / name for name in names if not name.startswith(".") and (Path(folder) / name).is_file()
        )


def _concatenate(
    recipe: AnyRecipe, files: Iterator[Path], limit: int, *, truncate: bool, only_text: bool = False
) -> np.ndarray:
    """The bytes of `files`, uint8 `[N]`, N at most `limit`: cut there if `truncate`, else refused."""
    content = bytearray()
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise recipe.fail("data.path", f"{file} can't be read: {error.strerror}") from None
        if only_text and b"\0" in data[:8192]:
            continue
        content += data
        if len(content) > limit:
            if not truncate:
                allowed = f"a folder may hold at most {limit // MIB} MiB of text; make it one file or .bin/.idx"
                raise recipe.fail("data.path", allowed)
            del content[limit:]
            break
    return np.frombuffer(content, dtype=np.uint8)


def _megatron(recipe: AnyRecipe) -> tuple[np.ndarray, str]:
    """The tokens of a Megatron indexed data set, all documents in a row, in the dtype of the file."""
    prefix = recipe.data.path
    prefix = prefix[: -len(".bin")] if prefix.endswith((".bin", ".idx")) else prefix
    bin_path, idx_path = _resolve(recipe, prefix + ".bin"), _resolve(recipe, prefix + ".idx")
    try:
        with open(idx_path, "rb") as idx:
            header = idx.read(IDX_HEADER.size)
            if len(header) < IDX_HEADER.size or not header.startswith(IDX_MAGIC):
                raise recipe.fail("data.path", f"{idx_path} is not the index of a Megatron data set")
            _, version, code, num_sequences, _ = IDX_HEADER.unpack(header)
            if version != 1:
                raise recipe.fail("data.path", f"{idx_path} has index version {version}, must be 1")
            if code not in IDX_DTYPES:
                raise recipe.fail("data.path", f"{idx_path} has dtype code {code}, integers are {sorted(IDX_DTYPES)}")
            lengths = np.fromfile(idx, dtype="<i4", count=num_sequences)
    except OSError as error:
        raise recipe.fail("data.path", f"{idx_path} can't be read: {error.strerror}") from None
    tokens = _map(recipe, bin_path, np.dtype(IDX_DTYPES[code]).newbyteorder("<"))
    if len(lengths) != num_sequences or int(lengths.sum(dtype=np.int64)) != len(tokens):
        listed = int(lengths.sum(dtype=np.int64))
        raise recipe.fail("data.path", f"{idx_path} lists {listed} tokens, but {bin_path.name} holds {len(tokens)}")
    return tokens, str(bin_path)


def _map(recipe: AnyRecipe, path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a read-only memory-mapped array `[N]`."""
    try:
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise recipe.fail("data.path", f"{path} has {size} bytes, not whole tokens of {dtype.name}")
        if size == 0:
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise recipe.fail("data.path", f"{path} can't be read: {error.strerror}") from None


def _resolve(recipe: AnyRecipe, name: str) -> Path:
    """An existing path: relative names are looked up beside the recipe first, then in the working directory."""
    path = Path(name).expanduser()
    candidates = [path] if path.is_absolute() else [Path(recipe.source).parent / path, Path.cwd() / path]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    looked = " or ".join(dict.fromkeys(str(c) for c in candidates))
    raise recipe.fail("data.path", f"not found: {looked}")
