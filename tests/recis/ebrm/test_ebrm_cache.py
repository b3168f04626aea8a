"""The cache: against a dict under any order of operations and kills; damage, versions, tombstones, rounding."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from recis.ebrm.cache import QECache, hash_query, round_logits
from recis.ebrm.segment import CacheCorruptError, CacheVersionError, merge_rows
from recis.ebrm.vocabulary import Vocabulary
from recis.errors import ConfigError

VERSION = "0123456789ab"
HASH = 0xCB2A3EDE8D39B8E  # of "black smeg fridge": a kept cache must be found again by later versions


def put(cache: QECache, query: int, logits: dict[str, float]) -> None:
    cache.put(query, cache.vocabulary.numbers(logits), np.array(list(logits.values()), np.float32))


def contents(cache: QECache, query: int) -> dict[str, float]:
    row = cache.get_row(query)
    assert (np.diff(row.entities.astype(np.int64)) > 0).all()
    return {cache.vocabulary.ids[number]: float(logit) for number, logit in zip(*row, strict=True)}


def segments(folder) -> list:
    return sorted((folder / "segments").iterdir())


class CacheMachine(RuleBasedStateMachine):
    """A cache in a folder against two dicts: what is stored, and what a kill leaves of it."""

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.cache = QECache.open(self.folder, model_version=VERSION)
        self.stored: dict[tuple[int, str], float] = {}
        self.durable: dict[tuple[int, str], float] = {}

    @rule(
        query=st.integers(0, 3),
        logits=st.dictionaries(st.sampled_from([f"brand:{n}" for n in range(6)]), st.floats(-15, 15), max_size=4),
    )
    def put_pairs(self, query, logits):
        put(self.cache, query, logits)
        for entity, logit in logits.items():
            self.stored[query, entity] = float(np.float16(min(12.0, max(-12.0, np.float32(logit)))))

    @rule()
    def flush(self):
        self.cache.flush()
        self.durable = dict(self.stored)

    @rule()
    def compact(self):
        self.cache.compact()
        assert len(segments(self.folder)) <= 1
        self.durable = dict(self.stored)

    @rule()
    def kill(self):
        self.cache = QECache.open(self.folder, model_version=VERSION)
        self.stored = dict(self.durable)

    @rule()
    def kill_before_the_rename(self):
        (self.folder / "segments" / ".tmp-000009-aa").mkdir()
        self.kill()

    @invariant()
    def holds_what_was_stored(self):
        for query in range(4):
            want = {entity: logit for (other, entity), logit in self.stored.items() if other == query}
            assert contents(self.cache, query) == want
            names = [f"brand:{n}" for n in range(6)]
            logits, found = self.cache.lookup(query, self.cache.vocabulary.numbers(names))
            assert found.tolist() == [name in want for name in names]
            assert logits.tolist() == [want.get(name, 0.0) for name in names]

    def teardown(self):
        shutil.rmtree(self.folder)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_a_kill_between_rename_and_deletion_loses_nothing(tmp_path):
    cache = QECache.open(tmp_path, model_version=VERSION)
    for logit in (1.0, 2.0):
        put(cache, 7, {"brand:lg": logit, f"brand:{logit}": 0.5})
        cache.flush()
    old = [shutil.copytree(folder, tmp_path / folder.name) for folder in segments(tmp_path)]
    cache.compact()
    for folder in old:
        shutil.move(folder, tmp_path / "segments" / folder.name)
    again = QECache.open(tmp_path, model_version=VERSION)
    assert contents(again, 7) == {"brand:lg": 2.0, "brand:1.0": 0.5, "brand:2.0": 0.5}
    assert [folder.name for folder in segments(tmp_path)] == ["000003"]


def test_cold_and_warm_logits_are_equal_bits():
    cache, logits = QECache(model_version=VERSION), np.array([0.1, -3.14159, 20.0, -20.0], np.float32)
    entities = np.arange(4, dtype=np.uint32)
    cache.put(1, entities, logits)
    warm, found = cache.lookup(1, entities)
    assert found.all()
    assert warm.tobytes() == round_logits(logits).tobytes()
    assert round_logits(logits).tolist() == [0.0999755859375, -3.140625, 12.0, -12.0]


def test_the_delta_forgets_the_least_recently_used_query():
    cache = QECache(model_version=VERSION, max_delta_pairs=3)
    for query in (1, 2, 3):
        put(cache, query, {"a:x": query})
    contents(cache, 1)  # used
    put(cache, 4, {"a:x": 4.0})
    assert [bool(contents(cache, query)) for query in (1, 2, 3, 4)] == [True, False, True, True]
    assert cache.evicted_pairs == 1
    put(cache, 5, {f"a:{n}": 1.0 for n in range(4)})  # a row above the limit is not kept
    assert cache.num_pairs == 0
    with pytest.raises(ConfigError, match="max_delta_pairs"):
        QECache(model_version=VERSION, max_delta_pairs=0)


def test_tombstones_end():
    now = [100.0]
    cache = QECache(model_version=VERSION, clock=lambda: now[0])
    entities = np.array([3, 5], np.uint32)
    cache.bury(9, entities[:1], retry_after_s=30)
    assert cache.buried(9, entities).tolist() == [True, False]
    assert cache.buried(8, entities).tolist() == [False, False]
    now[0] = 129.9
    assert cache.buried(9, entities).tolist() == [True, False]
    now[0] = 130.0
    assert cache.buried(9, entities).tolist() == [False, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_only_numbers_are_kept(bad):
    with pytest.raises(ValueError, match="must be finite"):
        QECache(model_version=VERSION).put(1, np.array([0, 1], np.uint32), np.array([0.0, bad]))


def two_segments(folder) -> QECache:
    cache = QECache.open(folder, model_version=VERSION)
    for query in (1, 2):
        put(cache, query, {"a:x": float(query), "a:y": 0.5})
        cache.flush()
    return cache


@pytest.mark.parametrize("name", ["query_hash.npy", "offsets.npy", "entity.npy", "logit.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_segment_is_named_and_the_other_is_usable(tmp_path, name, damage):
    two_segments(tmp_path)
    path = segments(tmp_path)[0] / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-1 if name != "manifest.json" else 2] ^= 1
        path.write_bytes(content)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(CacheCorruptError, match=r"segments/000001"):
        QECache.open(tmp_path, model_version=VERSION)
    cache = QECache.open(tmp_path, model_version=VERSION, on_corrupt="skip")
    assert len(cache.damaged) == 1
    assert contents(cache, 1) == {}
    assert contents(cache, 2) == {"a:x": 2.0, "a:y": 0.5}
    put(cache, 1, {"a:x": 1.0})
    cache.compact()
    assert len(segments(tmp_path)) == 2  # the damaged one stays for a person to look at


def test_sizes_are_checked_without_hashes_too(tmp_path):
    two_segments(tmp_path)
    np.save(segments(tmp_path)[0] / "logit.npy", np.zeros(1, np.float16))
    with pytest.raises(CacheCorruptError, match=r"logit.npy must be \[2\] float16"):
        QECache.open(tmp_path, model_version=VERSION, verify=False)


def test_other_versions_are_refused_and_rebuilt(tmp_path):
    two_segments(tmp_path)
    with pytest.raises(CacheVersionError, match=r"version 0123456789ab, the model is ba9876543210"):
        QECache.open(tmp_path, model_version="ba9876543210")
    cache = QECache.open(tmp_path, model_version="ba9876543210", rebuild=True)
    assert (cache.num_pairs, len(cache.vocabulary), segments(tmp_path)) == (0, 0, [])
    with pytest.raises(CacheVersionError, match="open it with rebuild=True"):
        cache.clear("000000000000")


def test_other_vocabularies_and_formats_are_refused(tmp_path):
    two_segments(tmp_path)
    (tmp_path / "vocabulary.txt").write_text("a:y\na:x\n")
    with pytest.raises(CacheVersionError, match=r"written against vocabulary .* of 2 ids"):
        QECache.open(tmp_path, model_version=VERSION)
    (tmp_path / "vocabulary.txt").write_text("a:x\n")
    with pytest.raises(CacheVersionError, match="only 1 ids"):
        QECache.open(tmp_path, model_version=VERSION)
    (tmp_path / "vocabulary.txt").write_text("a:x\na:y\na:torn")
    assert QECache.open(tmp_path, model_version=VERSION).vocabulary.ids == ["a:x", "a:y"]
    manifest = segments(tmp_path)[1] / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    with pytest.raises(CacheVersionError, match="has format 2; this version reads format 1"):
        QECache.open(tmp_path, model_version=VERSION)


def test_sizes_on_disk(tmp_path):
    cache = QECache.open(tmp_path, model_version=VERSION)
    for query in range(10):
        put(cache, query, {f"a:{n}": 1.0 for n in range(100)})
    cache.compact()
    assert cache.num_pairs == 1000
    assert cache.num_bytes == 6 * 1000 + 16 * 10
    arrays = sum(path.stat().st_size - 128 for path in segments(tmp_path)[0].glob("*.npy"))
    assert arrays == cache.num_bytes + 8


def test_memory_caches_write_nothing_and_hashes_are_stable():
    cache = QECache(model_version=VERSION)
    put(cache, 1, {"a:x": 1.0})
    cache.flush()
    cache.compact()
    assert contents(cache, 1) == {"a:x": 1.0}
    cache.clear("ba9876543210")
    assert cache.num_pairs == 0
    assert merge_rows([]).num_pairs == 0
    assert hash_query("black smeg fridge") == HASH
    with pytest.raises(ValueError, match="without line breaks"):
        Vocabulary().numbers(["a:x\ny"])
