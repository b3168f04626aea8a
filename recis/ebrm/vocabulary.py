"""Entity ids <-> numbers: uint32, given in order of arrival, kept in a text file that only grows.

The cache stores numbers. A number means the same id for ever, so a segment names the first N lines it was written against
by their count and hash.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from recis.ebrm.segment import CacheCorruptError

MAX_ENTITIES = 2**32 - 1


class Vocabulary:
    """Entity id -> number, by order of arrival. Attributes: ids (the list of all)."""

    def __init__(self, ids: Sequence[str] = ()) -> None:
        self.ids = list(ids)
        self._numbers = {entity: number for number, entity in enumerate(self.ids)}
        self._saved = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, entity: object) -> bool:
        return entity in self._numbers

    def numbers(self, entities: Iterable[str]) -> np.ndarray:
        """Return the numbers [N] uint32 of entity ids; new ones get the next numbers.

        Raises:
            ValueError: there are 2^32 - 1 entities already, or an id has a line break.
        """
        numbers = []
        for entity in entities:
            number = self._numbers.get(entity)
            if number is None:
                number = self._add(entity)
            numbers.append(number)
        return np.array(numbers, dtype=np.uint32)

    def known(self, entity: str) -> int | None:
        """Return the number of an id, or None."""
        return self._numbers.get(entity)

    def digest(self, count: int) -> str:
        """Return the sha256 of the first `count` ids."""
        digest = hashlib.sha256()
        for entity in self.ids[:count]:
            digest.update(entity.encode() + b"\n")
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Append the ids that the file lacks, and fsync it. The file must be the one that `read` read, or be absent."""
        new = self.ids[self._saved :]
        if not new and path.exists():
            return
        with path.open("ab") as stream:
            stream.write("".join(f"{entity}\n" for entity in new).encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._saved = len(self.ids)

    @staticmethod
    def read(path: Path) -> "Vocabulary":
        """Return the vocabulary of a file; empty where there is none. A torn last line is cut off, in the file too.

        Raises:
            CacheCorruptError: it is no UTF-8.
        """
        if not path.exists():
            return Vocabulary()
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # a kill while it grew: no segment refers to that line yet
            os.truncate(path, len(whole))
        try:
            ids = whole.decode().split("\n")[:-1]
        except UnicodeDecodeError as error:
            raise CacheCorruptError(
                f"cache vocabulary {path}: not UTF-8 at byte {error.start}, so the numbers of its segments mean nothing; "
                "open the cache with rebuild=True to start empty"
            ) from error
        vocabulary = Vocabulary(ids)
        vocabulary._saved = len(vocabulary.ids)
        return vocabulary

    def _add(self, entity: str) -> int:
        number = len(self.ids)
        if number >= MAX_ENTITIES or "\n" in entity:
            raise ValueError(f"entity {entity!r} cannot be numbered: at most {MAX_ENTITIES} ids, without line breaks")
        self.ids.append(entity)
        self._numbers[entity] = number
        return number
