"""Vocabularies of Vocab and Lookup ops: read once when the engine is built, identified by a hash of their content.

The table of strings and the table of integers are each built when a column of that kind first asks for it. A line ends
with LF or CR LF; the last one need not end.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recis.errors import ConfigError
from recis.features.ops import Lookup, Vocab
from recis.jagged import JaggedTensor
from recis_kernels.vocab_lookup import IdVocab, StringVocab, id_vocab, string_vocab


class Vocabulary:
    """Entries in order, what each maps to, and what everything else maps to.

    Args:
        name: for messages.
        entries: byte-jagged, one bag per entry.
        indices: int64 [E] what the entries map to; None = their number.
        unknown: what a value maps to that is no entry.
    """

    def __init__(self, name: str, entries: JaggedTensor, indices: Tensor | None, unknown: int) -> None:
        self.name = name
        self.entries = entries
        self.indices = indices
        self.unknown = unknown

    @cached_property
    def strings(self) -> StringVocab:
        """The table that string columns are looked up in."""
        try:
            return string_vocab(self.entries.flat_values, self.entries.offsets)
        except ValueError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    @cached_property
    def ids(self) -> IdVocab:
        """The table that id columns are looked up in; ConfigError where an entry is no int64."""
        numbers = [self._integer(number, text) for number, text in enumerate(self.entries.to_strings())]
        try:
            return id_vocab(torch.tensor(numbers, dtype=torch.int64))
        except ValueError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    def _integer(self, number: int, text: bytes) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ConfigError(
                f"{self.name}: entry {number} is {text!r}, no integer, but the column holds ids"
            ) from None
        if not -(2**63) <= value < 2**63:
            raise ConfigError(f"{self.name}: entry {number} is {value}, outside int64")
        return value

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the entries and their ends."""
        ends = self.entries.offsets.numpy().astype("<i8").tobytes()
        return hashlib.sha256(ends + self.entries.flat_values.numpy().tobytes()).hexdigest()

    def indices_of(self, entries: Tensor) -> Tensor:
        """Return what entry numbers (-1 = unknown) map to, int64 of the same shape."""
        mapped = entries
        if self.indices is not None and self.indices.numel():
            mapped = self.indices.to(entries.device)[entries.clamp(min=0)]
        return torch.where(entries >= 0, mapped, self.unknown)


def open_vocabulary(op: Vocab | Lookup) -> Vocabulary:
    """Return the vocabulary of an op.

    Raises:
        ConfigError: the file cannot be read or is not UTF-8.
    """
    if isinstance(op, Vocab):
        return Vocabulary(f"vocabulary {op.path}", _read_lines(op.path), None, op.unknown)
    entries = JaggedTensor.from_strings([str(key) for key, _ in op.pairs])
    indices = torch.tensor([index for _, index in op.pairs], dtype=torch.int64)
    return Vocabulary("Lookup map", entries, indices, op.unknown)


def _read_lines(path: str) -> JaggedTensor:
    import fsspec  # here, because only this op reads a file, and it may lie on any store

    try:
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read()  # type: ignore[union-attr]
    except OSError as error:
        raise ConfigError(f"vocabulary {path}: cannot be read: {error}") from None
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        raise ConfigError(f"vocabulary {path}: line {line} is not UTF-8; convert the file") from None
    if data and not data.endswith(b"\n"):
        data += b"\n"
    characters = np.frombuffer(data, dtype=np.uint8)
    line_ends = np.flatnonzero(characters == ord("\n"))
    return _cut(characters, np.concatenate([[0], line_ends + 1]))


def _cut(characters: np.ndarray, ends: np.ndarray) -> JaggedTensor:
    """Return the lines between ends as bags, without their line ends."""
    keep = characters != ord("\n")
    keep[:-1] &= ~((characters[:-1] == ord("\r")) & (characters[1:] == ord("\n")))
    before = np.concatenate([[0], np.cumsum(keep)])
    return JaggedTensor(torch.from_numpy(characters[keep].copy()), offsets=torch.from_numpy(before[ends]))


def digests(ops: Sequence[Vocab | Lookup], vocabularies: Sequence[Vocabulary]) -> dict[str, str]:
    """Return {path: digest} of the vocabularies that come from files."""
    return {op.path: one.digest for op, one in zip(ops, vocabularies, strict=True) if isinstance(op, Vocab)}
