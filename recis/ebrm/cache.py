"""Logits of (query, entity) pairs, kept: immutable segments on disk, a bounded delta in memory, tombstones for failures.

    key     64-bit blake2b of the canonical query, number of the entity in the vocabulary, version of the model
    value   fp16 logit, clamped to +-12; `round_logits` is applied when a pair is first scored too, so that an answer is
            the same bit for bit whether it was cached or not

`flush` writes the delta as a segment, `compact` merges all segments and the delta into one. Both make the new segment
appear by one rename, and only then delete what it replaces: a kill at any instant loses the delta at most. One process
writes to a cache folder; any number may read the segments it has opened.
"""

import hashlib
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from recis.ebrm.segment import (
    TMP_PREFIX,
    CacheCorruptError,
    CacheVersionError,
    Rows,
    Segment,
    merge_rows,
    open_segment,
    remove_segment,
    write_segment,
)
from recis.ebrm.vocabulary import Vocabulary
from recis.errors import ConfigError

MAX_LOGIT = 12.0
SEGMENTS_NAME, VOCABULARY_NAME = "segments", "vocabulary.txt"
DEFAULT_DELTA_PAIRS = 5_000_000


class Row(NamedTuple):
    """Entity numbers [N] uint32, ascending, and their logits [N] float16."""

    entities: np.ndarray
    logits: np.ndarray


class CacheStore(Protocol):
    """What an adapter (Redis, LMDB) has to offer."""

    def get_row(self, query_hash: int) -> Row:
        """Return all pairs of a query."""
        ...

    def put(self, query_hash: int, entities: np.ndarray, logits: np.ndarray) -> None:
        """Keep pairs of a query."""
        ...

    def flush(self) -> None:
        """Make what was put survive this process."""
        ...


def hash_query(canonical_query: str) -> int:
    """Return the 64-bit blake2b of a canonical query."""
    return int.from_bytes(hashlib.blake2b(canonical_query.encode(), digest_size=8).digest(), "little")


def round_logits(logits: np.ndarray) -> np.ndarray:
    """Return logits clamped to +-12 and rounded to what the cache holds, as float32."""
    return np.clip(logits, -MAX_LOGIT, MAX_LOGIT).astype(np.float16).astype(np.float32)


class QECache:
    """Cached logits of one model version. `QECache(model_version=...)` lives in memory, `QECache.open` in a folder.

    Attributes:
        model_version: of the scorer whose logits these are.
        vocabulary: entity ids <-> numbers.
        evicted_pairs: pairs the delta dropped because it was full.
        damaged: errors of the segments that were left out (`open(on_corrupt="skip")`).
    """

    def __init__(
        self,
        *,
        model_version: str,
        max_delta_pairs: int = DEFAULT_DELTA_PAIRS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_delta_pairs < 1:
            raise ConfigError(f"max_delta_pairs must be at least 1; got {max_delta_pairs}")
        self.model_version = model_version
        self.max_delta_pairs = max_delta_pairs
        self.vocabulary = Vocabulary()
        self.evicted_pairs = 0
        self.damaged: tuple[CacheCorruptError, ...] = ()
        self.folder: Path | None = None
        self._clock = clock
        self._segments: list[Segment] = []  # oldest first
        self._delta: OrderedDict[int, Row] = OrderedDict()  # least recently used first
        self._delta_pairs = 0
        self._tombstones: dict[int, dict[int, float]] = {}  # query hash -> entity -> when to try again

    @staticmethod
    def open(
        folder: str | Path,
        *,
        model_version: str,
        rebuild: bool = False,
        on_corrupt: Literal["raise", "skip"] = "raise",
        verify: bool = True,
        max_delta_pairs: int = DEFAULT_DELTA_PAIRS,
        clock: Callable[[], float] = time.monotonic,
    ) -> "QECache":
        """Open the cache of a folder, or start one.

        Args:
            folder: of the cache; made when absent.
            model_version: what the segments must have been written by.
            rebuild: start empty: what the folder holds is deleted, whatever its version.
            on_corrupt: "skip" leaves damaged segments out and lists them in `damaged`; the others stay usable.
            verify: compare the sha256 of every segment (about a second per GB).
            max_delta_pairs: pairs that the delta holds.
            clock: seconds, for tombstones.

        Raises:
            CacheVersionError: a segment of another model version, vocabulary or format.
            CacheCorruptError: a damaged segment, with on_corrupt="raise".
        """
        cache = QECache(model_version=model_version, max_delta_pairs=max_delta_pairs, clock=clock)
        cache.folder = Path(folder)
        segments = cache.folder / SEGMENTS_NAME
        if rebuild:
            shutil.rmtree(segments, ignore_errors=True)
            (cache.folder / VOCABULARY_NAME).unlink(missing_ok=True)
        segments.mkdir(parents=True, exist_ok=True)
        cache.vocabulary = Vocabulary.read(cache.folder / VOCABULARY_NAME)
        cache._read_segments(segments, on_corrupt, verify)
        return cache

    @property
    def num_pairs(self) -> int:
        """Pairs in segments and delta; a pair that is in several counts each time."""
        return sum(segment.rows.num_pairs for segment in self._segments) + self._delta_pairs

    @property
    def num_bytes(self) -> int:
        """Bytes of the segments' arrays."""
        return sum(6 * segment.rows.num_pairs + 16 * len(segment.rows.query_hash) for segment in self._segments)

    def get_row(self, query_hash: int) -> Row:
        """Return all pairs of a query, entities ascending. Counts as a use of the delta's row."""
        parts = [Row(*segment.rows.row(query_hash)) for segment in self._segments]
        if query_hash in self._delta:
            self._delta.move_to_end(query_hash)
            parts.append(self._delta[query_hash])
        parts = [part for part in parts if len(part.entities)]
        if len(parts) == 1:
            return parts[0]
        return _merge(parts)

    def lookup(self, query_hash: int, entities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits [N] float32 and found [N] bool of some entities [N] uint32; a logit that is absent is 0."""
        row = self.get_row(query_hash)
        if not len(row.entities) or not len(entities):
            return np.zeros(len(entities), np.float32), np.zeros(len(entities), bool)
        places = np.minimum(row.entities.searchsorted(entities), len(row.entities) - 1)
        found = row.entities[places] == entities
        return np.where(found, row.logits[places], 0).astype(np.float32), found

    def put(self, query_hash: int, entities: np.ndarray, logits: np.ndarray) -> None:
        """Keep logits [N] of entities [N] of a query in the delta; a pair that is there already is replaced.

        Raises:
            ValueError: a logit is NaN or infinite: neither is ever kept.
        """
        if not np.isfinite(logits).all():
            raise ValueError(f"logits must be finite to be cached; got {logits[~np.isfinite(logits)][:3]}")
        if not len(entities):
            return
        new = Row(np.asarray(entities, np.uint32), round_logits(logits).astype(np.float16))
        old = self._delta.pop(query_hash, None)
        row = _merge([new] if old is None else [old, new])
        self._delta_pairs += len(row.entities) - (0 if old is None else len(old.entities))
        self._delta[query_hash] = row
        while self._delta_pairs > self.max_delta_pairs:
            _, dropped = self._delta.popitem(last=False)
            self._delta_pairs -= len(dropped.entities)
            self.evicted_pairs += len(dropped.entities)

    def bury(self, query_hash: int, entities: np.ndarray, retry_after_s: float) -> None:
        """Keep tombstones: these pairs failed or timed out and are not to be scored again for a while. Memory only."""
        graves = self._tombstones.setdefault(query_hash, {})
        until = self._clock() + retry_after_s
        graves.update(dict.fromkeys(map(int, entities), until))

    def buried(self, query_hash: int, entities: np.ndarray) -> np.ndarray:
        """Return [N] bool: whether a pair has a tombstone whose time is not over. Those over are forgotten."""
        graves = self._tombstones.get(query_hash)
        if graves is None:
            return np.zeros(len(entities), bool)
        now = self._clock()
        for entity in [entity for entity, until in graves.items() if until <= now]:
            del graves[entity]
        if not graves:
            del self._tombstones[query_hash]
        return np.isin(entities, np.fromiter(graves, dtype=np.uint32, count=len(graves)))

    def clear(self, model_version: str) -> None:
        """Forget everything of a cache in memory, for the logits of another model version.

        Raises:
            CacheVersionError: the cache lives in a folder; open it again with rebuild=True.
        """
        if self.folder is not None:
            raise CacheVersionError(
                f"the cache {self.folder} is of model version {self.model_version}, the model is {model_version}; "
                "open it with rebuild=True"
            )
        self.model_version = model_version
        self._delta.clear()
        self._delta_pairs = 0
        self._tombstones.clear()

    def flush(self) -> None:
        """Write the delta as one more segment; in memory this does nothing."""
        if self.folder is not None and self._delta:
            self._write([self._delta_rows()], replaced=[])

    def compact(self) -> None:
        """Merge all segments and the delta into one segment; in memory this does nothing.

        Damaged segments that were left out stay where they are: delete them by hand once they are of no use.
        """
        if self.folder is None or (len(self._segments) <= 1 and not self._delta):
            return
        parts = [segment.rows for segment in self._segments]
        self._write([*parts, self._delta_rows()] if self._delta else parts, replaced=list(self._segments))

    def _delta_rows(self) -> Rows:
        hashes = sorted(self._delta)
        rows = [self._delta[query] for query in hashes]
        lengths = [len(row.entities) for row in rows]
        return Rows(
            query_hash=np.array(hashes, np.uint64),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            entity=np.concatenate([row.entities for row in rows]),
            logit=np.concatenate([row.logits for row in rows]),
        )

    def _write(self, parts: list[Rows], replaced: list[Segment]) -> None:
        assert self.folder is not None
        self.vocabulary.save(self.folder / VOCABULARY_NAME)  # before the segment: its numbers must have names
        parent = self.folder / SEGMENTS_NAME
        taken = [int(path.name) for path in parent.iterdir() if path.name.isdigit()]
        folder = write_segment(
            parent,
            f"{max(taken, default=0) + 1:06d}",
            parts[0] if len(parts) == 1 else merge_rows(parts),
            model_version=self.model_version,
            vocabulary_count=len(self.vocabulary),
            vocabulary_sha256=self.vocabulary.digest(len(self.vocabulary)),
            replaces=[segment.folder.name for segment in replaced],
        )
        kept = [segment for segment in self._segments if segment not in replaced]
        self._segments = [*kept, open_segment(folder, verify=False)]
        self._delta.clear()
        self._delta_pairs = 0
        for segment in replaced:
            remove_segment(segment.folder)

    def _read_segments(self, parent: Path, on_corrupt: str, verify: bool) -> None:
        for left_over in parent.glob(f"{TMP_PREFIX}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        found, damaged = [], []
        for folder in sorted(path for path in parent.iterdir() if path.name.isdigit()):
            try:
                found.append(open_segment(folder, verify=verify))
            except CacheCorruptError as error:
                if on_corrupt == "raise":
                    raise
                damaged.append(error)
        replaced = {name for segment in found for name in segment.manifest["replaces"]}
        for segment in found:
            if segment.folder.name in replaced:  # a kill between the rename and the deletion
                remove_segment(segment.folder)
            else:
                self._check_version(segment)
                self._segments.append(segment)
        self.damaged = tuple(damaged)

    def _check_version(self, segment: Segment) -> None:
        manifest = segment.manifest
        if manifest["model_version"] != self.model_version:
            raise CacheVersionError(
                f"cache segment {segment.folder} is of model version {manifest['model_version']}, the model is "
                f"{self.model_version}; open the cache with rebuild=True to start empty"
            )
        count, want = manifest["vocabulary_count"], manifest["vocabulary_sha256"]
        have = self.vocabulary.digest(count) if count <= len(self.vocabulary) else f"only {len(self.vocabulary)} ids"
        if have != want:
            raise CacheVersionError(
                f"cache segment {segment.folder} was written against vocabulary {want[:12]} of {count} ids, the folder's "
                f"is {have[:12]}; open the cache with rebuild=True to start empty"
            )


def _merge(parts: list[Row]) -> Row:
    """Return one ascending row; of an entity in several parts the last logit stays."""
    if not parts:
        return Row(np.zeros(0, np.uint32), np.zeros(0, np.float16))
    entities = np.concatenate([part.entities for part in parts])
    logits = np.concatenate([part.logits for part in parts])
    order = np.argsort(entities, kind="stable")
    entities, logits = entities[order], logits[order]
    last = np.ones(len(entities), dtype=bool)
    last[:-1] = entities[1:] != entities[:-1]
    return Row(entities[last], logits[last])
