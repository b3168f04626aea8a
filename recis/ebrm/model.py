"""EBRM: an item's relevance to a query, from cached scores of (query, entity) pairs and a soft-logic formula.

    score   query -> row of the cache -> logits of all candidates' entities at once -> what is missing is scored, once each
            -> overrides -> soft logic

An implementation of the EBRM idea (arXiv:2307.00370): the split into (query, entity) scores by a cross-encoder, soft logic
and the cache are the paper's; entity types, formula, relaxation, none entities, overrides and cache layout are ours.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from recis.ebrm.cache import QECache, hash_query, round_logits
from recis.ebrm.calibrate import Calibrator, NotCalibratedError, VerdictThresholds, fit_calibrator
from recis.ebrm.canonical import canonical_text
from recis.ebrm.comparators import Comparators
from recis.ebrm.config import EBRMConfig
from recis.ebrm.encode import DONE, FAILED, LATE, encode
from recis.ebrm.entities import Item, OnUnknown, type_of
from recis.ebrm.fallback import Fallback, TypePriors
from recis.ebrm.overrides import Overrides
from recis.ebrm.overrule import pool_items
from recis.ebrm.packed import PackedItems, pack
from recis.ebrm.persist import CACHE_NAME, load_model, save_model
from recis.ebrm.scorer import Pair, QEScorer
from recis.ebrm.soft_logic import SoftLogicOutput, SoftLogicPool

VERSION_CHARS = 12


@dataclass(kw_only=True, slots=True)
class Counts:
    """What went by since the model was made; a service exports it."""

    clamped_logits: int = 0
    """Infinite logits that were taken as +-12."""
    dropped_entities: int = 0
    """Of undeclared types, with on_unknown="drop"."""
    failed_pairs: int = 0
    late_pairs: int = 0
    """Not encoded in time."""
    encoder_calls: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a query makes of I items.

    Attributes:
        query: canonical.
        item_ids: I of them, in the order asked for.
        types: names of the T types.
        r: [I] float32, relevance in [0, 1]; not a probability.
        log_r: [I] float32.
        log_g: [I, T] float32, log truth of each type.
        approximate: [I] bool: the item has no entity, or one that matters was neither cached nor scored in time.
        encoder_calls: pairs really encoded for this request; in a batch, those of requests before it are not counted again.
        overrides: ids of the rules that fired.
        expired: ids of rules that would have, had they not expired.
        is_empty_query: nothing was asked, so r is 0.
        calibrator: of the model; None while it is not fitted.
    """

    query: str
    item_ids: tuple[str, ...]
    types: tuple[str, ...]
    r: np.ndarray
    log_r: np.ndarray
    log_g: np.ndarray
    approximate: np.ndarray
    encoder_calls: int
    overrides: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    is_empty_query: bool = False
    calibrator: Calibrator | None = None

    @property
    def p(self) -> np.ndarray:
        """Probability of relevance [I] float64.

        Raises:
            NotCalibratedError: the model's calibrator was not fitted.
        """
        if self.calibrator is None:
            raise NotCalibratedError("no probability without a calibrator: call model.fit_calibrator; r needs none")
        return self.calibrator.probability(self.log_r)


@dataclass(kw_only=True, slots=True)
class _Request:
    """A query and its items on their way: logits [U], which of them are stand-ins, and what was encoded."""

    query: str
    items: PackedItems
    query_hash: int
    logits: np.ndarray
    missing: np.ndarray
    approximate: np.ndarray | None = None
    calls: int = 0
    pairs: list[Pair] = field(default_factory=list)


class EBRM(nn.Module):
    """Scorer, comparators, pool, cache and overrides of one model.

    Attributes:
        config: EBRMConfig.
        scorer, comparators, pool: its parts with weights.
        cache: QECache; in memory unless one is opened (`open_cache`).
        overrides: Overrides; in memory unless the model was loaded from a folder.
        calibrator, accept: of relevance, and of grades >= 3; None until fitted.
        thresholds: VerdictThresholds.
        fallback: gives logits where the encoder cannot.
        counts: Counts.
    """

    def __init__(self, config: EBRMConfig, scorer: QEScorer) -> None:
        super().__init__()
        self.config = config
        self.scorer = scorer
        schema = config.schema
        self.comparators = Comparators(schema)
        self.pool = SoftLogicPool(
            schema.names,
            logic=config.logic,
            learn_relaxation=config.learn_relaxation,
            hard=[kind.name for kind in schema.types if kind.hard],
        )
        self.calibrator: Calibrator | None = None
        self.accept: Calibrator | None = None
        self.thresholds = VerdictThresholds()
        self.fallback: Fallback = TypePriors()
        self.counts = Counts()
        self._compared = np.array([kind.scorer == "comparator" for kind in schema.types])
        self._weights = [*scorer.parameters(), *scorer.buffers(), *self.comparators.parameters()]
        self._stamp = self._weight_stamp()
        self._model_version = self._hash_version()
        self.cache = QECache(model_version=self._model_version, max_delta_pairs=config.max_delta_pairs)
        self.overrides = Overrides(schema, is_known=self.has_entity)

    @property
    def version(self) -> str:
        """First 12 hex of the sha256 over weights, tokenizer, comparators and schema: what a cached score belongs to.

        When a weight has changed since the last use it is computed anew and the cache is emptied; a cache in a folder
        refuses that with CacheVersionError. Change weights through torch (optimizers, load_state_dict, in-place ops).
        """
        stamp = self._weight_stamp()
        if stamp != self._stamp:
            version = self._hash_version()
            if version != self.cache.model_version:
                self.cache.clear(version)
            self._model_version, self._stamp = version, stamp
        return self._model_version

    def has_entity(self, entity: str) -> bool:
        """Return whether some item or cached pair had this entity."""
        return entity in self.cache.vocabulary

    def open_cache(
        self, folder: str | Path, *, rebuild: bool = False, on_corrupt: Literal["raise", "skip"] = "raise"
    ) -> None:
        """Use the cache of a folder from now on. Items packed before must be packed again. Raises as QECache.open."""
        self.cache = QECache.open(
            folder,
            model_version=self.version,
            rebuild=rebuild,
            on_corrupt=on_corrupt,
            max_delta_pairs=self.config.max_delta_pairs,
        )

    def pack(self, items: Sequence[Item], *, on_unknown: OnUnknown = "raise") -> PackedItems:
        """Lay items out for scoring: once for a catalogue, or per request. Raises as recis.ebrm.packed.pack."""
        packed = pack(items, self.config.schema, self.cache.vocabulary, on_unknown=on_unknown)
        self.counts.dropped_entities += packed.num_dropped
        return packed

    def score(self, query: str, items: Sequence[Item] | PackedItems, *, on_unknown: OnUnknown = "raise") -> Scores:
        """Score items for a query.

        Raises:
            ValueError: an empty query, an unknown entity type (unless dropped), one item id with different entities, a NaN
                logit (named), items packed for another schema or cache.
            CacheVersionError: the weights are not those the cache in a folder belongs to.
        """
        return self.score_many([(query, items)], on_unknown=on_unknown)[0]

    def score_many(
        self,
        requests: Sequence[tuple[str, Sequence[Item] | PackedItems]],
        *,
        on_empty: Literal["raise", "skip"] = "raise",
        on_unknown: OnUnknown = "raise",
    ) -> list[Scores]:
        """Score many requests; what is not cached is encoded together, each distinct pair once.

        An empty query is refused, or with on_empty="skip" gives r = 0 and the flag is_empty_query. Raises as `score`.
        """
        self.version  # noqa: B018  # a changed weight empties the cache here
        opened = [self._open(query, items, on_empty, on_unknown) for query, items in requests]
        self._fill([request for request in opened if len(request.missing)])
        return [self._finish(request) for request in opened]

    def entity_logits(self, query: str, items: PackedItems) -> tuple[np.ndarray, np.ndarray]:
        """Return logits [U] float32 of packed items' distinct entities, before overrides, and which are stand-ins [U] bool.

        Raises as `score`.
        """
        self.version  # noqa: B018  # a changed weight empties the cache here
        request = self._open(query, items, "raise", "raise")
        self._fill([request] if len(request.missing) else [])
        flags = request.approximate if request.approximate is not None else np.zeros(len(items.distinct), bool)
        return request.logits, flags

    def save(self, folder: str | Path) -> None:
        """Write the model; see recis.ebrm.persist."""
        save_model(self, Path(folder))

    @staticmethod
    def load(
        folder: str | Path, *, rebuild_cache: bool = False, on_corrupt: Literal["raise", "skip"] = "raise"
    ) -> "EBRM":
        """Return the model of a folder in evaluation mode, with its overrides, and with its cache where it has one.

        Raises:
            ConfigError: there is no model, or it is damaged.
            CacheVersionError, CacheCorruptError: as QECache.open, of `folder/cache`.
        """
        model = load_model(Path(folder), EBRM)
        if (Path(folder) / CACHE_NAME).is_dir():
            model.open_cache(Path(folder) / CACHE_NAME, rebuild=rebuild_cache, on_corrupt=on_corrupt)
        return model

    def forward(self, queries: Sequence[str], items: Sequence[Item]) -> SoftLogicOutput:
        """Score query [I] against item [I], pair by pair, differentiably and without the cache: for training.

        Each distinct (query, entity) pair is scored once. log_g is [I * T].
        """
        schema = self.config.schema
        places: dict[Pair, int] = {}
        of_entity: list[int] = []
        of_none: list[int] = []
        conf: list[float] = []
        lengths: list[int] = []
        unsure = any(entity.conf < 1 for item in items for entity in item.entities)
        for text, item in zip(queries, items, strict=True):
            query = canonical_text(text)
            for slot in schema.slots(item.entities):
                lengths.append(len(slot))
                for entity in slot:
                    of_entity.append(places.setdefault((query, entity.id), len(places)))
                    conf.append(entity.conf)
                if unsure:
                    of_none.append(places.setdefault((query, schema.none(slot[0].type).id), len(places)))
        logits = self.qe_logits(list(places))
        device = logits.device
        return self.pool(
            logits[torch.tensor(of_entity, dtype=torch.int64, device=device)],
            torch.arange(len(schema.types), device=device).repeat(len(items)),
            torch.tensor([0, *lengths], device=device).cumsum(0),
            torch.arange(len(items) + 1, device=device) * len(schema.types),
            confidence=torch.tensor(conf, device=device) if unsure else None,
            none_logits=logits[torch.tensor(of_none, dtype=torch.int64, device=device)] if unsure else None,
        )

    def qe_logits(self, pairs: Sequence[Pair]) -> Tensor:
        """Return logits [P] of pairs (canonical query, entity id), by scorer or comparator; differentiable, not cached."""
        schema = self.config.schema
        compared = [bool(self._compared[schema.position(type_of(entity))]) for _, entity in pairs]
        groups = ([place for place, flag in enumerate(compared) if flag is wanted] for wanted in (False, True))
        encoded, matched = groups
        parts = []
        if encoded:
            parts.append(self.scorer([pairs[place] for place in encoded]))
        if matched:
            parts.append(self.comparators([pairs[place] for place in matched]))
        if not parts:
            return self.pool.relaxation.new_zeros(0)
        joined = torch.cat([part.to(parts[0].device) for part in parts])
        order = torch.tensor([*encoded, *matched], device=joined.device).argsort()
        return joined[order]

    def fit_calibrator(self, log_r: np.ndarray, labels: np.ndarray) -> Calibrator:
        """Fit and keep the calibrator on log r [N] and labels [N] of development pairs. Raises as fit_calibrator."""
        self.calibrator = fit_calibrator(log_r, labels)
        return self.calibrator

    def _weight_stamp(self) -> int:
        return sum(tensor._version for tensor in self._weights)

    def _hash_version(self) -> str:
        digest = hashlib.sha256(repr(self.config.schema.to_json()).encode())
        self.scorer.update_hash(digest)
        digest.update(self.comparators.logits.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:VERSION_CHARS]

    def _open(self, text: str, items: Sequence[Item] | PackedItems, on_empty: str, on_unknown: OnUnknown) -> _Request:
        query = canonical_text(text)
        if not query and on_empty != "skip":
            raise ValueError(f"query must not be empty or white space only; got {text!r}")
        packed = items if isinstance(items, PackedItems) else self.pack(items, on_unknown=on_unknown)
        if packed.vocabulary is not self.cache.vocabulary or packed.schema != self.config.schema:
            raise ValueError("these items were packed for another cache or schema: pack them again with model.pack")
        if not query:
            nothing = np.zeros(0, np.int64)
            return _Request(query="", items=packed, query_hash=0, logits=np.zeros(0, np.float32), missing=nothing)
        query_hash = hash_query(query)
        logits, found = self.cache.lookup(query_hash, packed.numbers)
        missing = np.flatnonzero(~found)
        return _Request(query=query, items=packed, query_hash=query_hash, logits=logits, missing=missing)

    def _fill(self, requests: list[_Request]) -> None:
        """Score what is missing, keep it, and give stand-ins for what could not be scored."""
        if not requests:
            return
        wanted: dict[Pair, None] = {}
        for request in requests:
            blocked = self.cache.buried(request.query_hash, request.items.numbers[request.missing])
            fresh = [(request.query, request.items.distinct[place]) for place in request.missing[~blocked]]
            request.pairs = [pair for pair in fresh if pair not in wanted]
            wanted.update(dict.fromkeys(fresh))
        scored, encoded = self._score_pairs(list(wanted))
        for request in requests:
            names = [request.items.distinct[place] for place in request.missing]
            known = np.array([(request.query, name) in scored for name in names], bool)
            values = np.array([scored.get((request.query, name), 0.0) for name in names], np.float32)
            numbers = request.items.numbers[request.missing]
            self.cache.put(request.query_hash, numbers[known], values[known])
            if not known.all():
                lost = [place for place in np.flatnonzero(~known) if (request.query, names[place]) in wanted]
                self.cache.bury(request.query_hash, numbers[lost], self.config.retry_after_s)
                values[~known] = self.fallback(request.query, [names[place] for place in np.flatnonzero(~known)])
                request.approximate = np.zeros(len(request.items.distinct), bool)
                request.approximate[request.missing[~known]] = True
            request.logits[request.missing] = values
            request.calls = sum(pair in encoded for pair in request.pairs)

    def _score_pairs(self, pairs: list[Pair]) -> tuple[dict[Pair, float], set[Pair]]:
        """Return rounded logits of the pairs that could be scored, and which of them were encoded."""
        schema = self.config.schema
        compared = [pair for pair in pairs if self._compared[schema.position(type_of(pair[1]))]]
        encoded = [pair for pair in pairs if not self._compared[schema.position(type_of(pair[1]))]]
        timeout_ms = self.config.encode_timeout_ms
        result = encode(
            self.scorer,
            encoded,
            batch_pairs=self.config.encode_batch_pairs,
            timeout_s=None if timeout_ms is None else timeout_ms / 1e3,
            clock=time.monotonic,
        )
        with torch.inference_mode():
            matches = self.comparators(compared).cpu().numpy() if compared else np.zeros(0, np.float32)
        done = np.flatnonzero(result.state == DONE)
        names = [*compared, *(encoded[place] for place in done)]
        logits = np.concatenate([matches, result.logits[done]])
        broken = np.flatnonzero(np.isnan(logits))
        if len(broken):
            query, entity = names[broken[0]]
            raise ValueError(f"the logit of query {query!r}, entity {entity!r} is NaN: the scorer's weights are broken")
        self.counts.clamped_logits += int(np.isinf(logits).sum())
        self.counts.failed_pairs += int((result.state == FAILED).sum())
        self.counts.late_pairs += int((result.state == LATE).sum())
        self.counts.encoder_calls += result.calls
        rounded = round_logits(logits)
        return dict(zip(names, rounded.tolist(), strict=True)), {encoded[place] for place in done}

    def _finish(self, request: _Request) -> Scores:
        items, types = request.items, self.config.schema.names
        if not request.query:
            zeros, lowest = np.zeros(len(items), np.float32), np.full(len(items), -np.inf, np.float32)
            return Scores(
                query="",
                item_ids=items.item_ids,
                types=types,
                r=zeros,
                log_r=lowest,
                log_g=np.full((len(items), len(types)), -np.inf, np.float32),
                approximate=np.zeros(len(items), bool),
                encoder_calls=0,
                is_empty_query=True,
                calibrator=self.calibrator,
            )
        matched = self.overrides.match(request.query)
        pooled = pool_items(self.pool, items, request.logits, matched)
        approximate = items.is_bare
        if request.approximate is not None:
            approximate = approximate | _any_per_item(items, request.approximate)
        return Scores(
            query=request.query,
            item_ids=items.item_ids,
            types=types,
            r=np.exp(pooled.log_r),
            log_r=pooled.log_r,
            log_g=pooled.log_g,
            approximate=approximate,
            encoder_calls=request.calls,
            overrides=pooled.fired,
            expired=matched.expired,
            calibrator=self.calibrator,
        )


def _any_per_item(items: PackedItems, flags: np.ndarray) -> np.ndarray:
    """Return [I] bool: whether one of an item's entities, or a none entity that it is mixed with, is flagged [U]."""
    ends = items.slot_offsets[:: len(items.schema.types)]
    item_of = np.repeat(np.arange(len(items)), np.diff(ends))
    flagged = np.bincount(item_of, weights=flags[items.entity_of], minlength=len(items)) > 0
    if items.confidence is not None and flags[items.none_of].any():
        unsure = np.bincount(item_of, weights=items.confidence < 1, minlength=len(items)) > 0
        flagged |= unsure
    return flagged
