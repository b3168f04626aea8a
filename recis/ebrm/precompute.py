"""Score queries x entities ahead of time into a cache folder: in batches, and to be started again wherever it ended.

What is in the cache already is not scored again, so starting again is going on: after a kill at most the queries since the
last flush are scored twice. The cache belongs to one model version; scores of another are refused when it is opened.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from recis.ebrm.canonical import canonical_text
from recis.ebrm.entities import Item
from recis.ebrm.model import EBRM
from recis.errors import ConfigError

FLUSH_PAIRS = 20_000
MAX_SEGMENTS = 16  # a lookup asks each segment: past this many they are merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Precomputed:
    """What a run did."""

    num_queries: int
    num_pairs: int
    """Distinct (query, entity) pairs that were asked for."""
    num_encoded: int
    """Pairs that were not in the cache and went through the encoder."""
    num_failed: int
    """Pairs that the encoder failed on; they are not in the cache."""


def precompute(
    model: EBRM,
    queries: Sequence[str],
    items: Sequence[Item],
    *,
    candidates: Mapping[str, Sequence[int]] | None = None,
    flush_pairs: int = FLUSH_PAIRS,
    on_flush: Callable[[int, int], None] | None = None,
) -> Precomputed:
    """Score queries x the entities of their candidates, `none` entities included, into the model's cache folder.

    Args:
        model: with a cache that was opened in a folder.
        queries: the most important ones first; equal ones count once.
        items: the catalogue.
        candidates: query as given -> places of its candidates in items; None, or a query that is not in it: all items.
        flush_pairs: a segment is written when at least so many pairs were asked for.
        on_flush: told how many queries are done and how many pairs were encoded so far.

    Raises:
        ConfigError: the cache is not in a folder, or flush_pairs is below 1.
        ValueError: an empty query, and as `EBRM.score`.
        CacheVersionError: the model's weights have changed since the cache was opened.
    """
    if model.cache.folder is None:
        raise ConfigError("precompute needs a cache in a folder: call model.open_cache(folder) first")
    if flush_pairs < 1:
        raise ConfigError(f"flush_pairs must be at least 1; got {flush_pairs}")
    wanted = {canonical_text(query): query for query in reversed(queries)}
    whole = model.pack(_union(items))
    failed_before = model.counts.failed_pairs + model.counts.late_pairs
    num_pairs = num_encoded = waiting = done = num_flushes = 0
    batch = []
    for text in dict.fromkeys(map(canonical_text, queries)):
        places = None if candidates is None else candidates.get(wanted[text])
        packed = whole if places is None else model.pack(_union([items[place] for place in places]))
        batch.append((text, packed))
        num_pairs += len(packed.distinct)
        waiting += len(packed.distinct)
        done += 1
        if waiting >= flush_pairs or done == len(wanted):
            num_encoded += sum(scores.encoder_calls for scores in model.score_many(batch))
            model.cache.flush()
            num_flushes += 1
            if num_flushes % MAX_SEGMENTS == 0:
                model.cache.compact()
            batch, waiting = [], 0
            if on_flush is not None:
                on_flush(done, num_encoded)
    model.cache.compact()
    failed = model.counts.failed_pairs + model.counts.late_pairs - failed_before
    return Precomputed(num_queries=done, num_pairs=num_pairs, num_encoded=num_encoded, num_failed=failed)


def _union(items: Sequence[Item]) -> list[Item]:
    """Return one item that holds every entity of the items, and one that holds none: pooling them costs nothing."""
    entities = {entity.id: entity for item in items for entity in item.entities}
    return [Item(id="all entities", entities=tuple(entities.values())), Item(id="none entities")]
