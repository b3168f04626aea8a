"""What the service answers, without HTTP: JSON objects in, JSON objects out.

    score     one query against items of the catalogue (by id) or items of the request
    explain   one pair, entity by entity; with a trial override, as if that were in force
    override  add, remove, list, audit
    find      items of the catalogue by words of their title

What a caller got wrong is a BadRequestError, one line that names the thing, the rule and the value. Everything else that is
raised is a fault of the service or its model. A model is not made for several threads: call from one at a time.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from recis.ebrm.canonical import canonical_text
from recis.ebrm.entities import Item, check_keys
from recis.ebrm.explanation import EntityTruth, Explanation, TypeTruth, explain, verdicts
from recis.ebrm.model import EBRM
from recis.ebrm.overrides import REPLACES, Rule
from recis.ebrm.packed import PackedItems
from recis.ebrm.service_requests import (
    MAX_TEXT_CHARS,
    BadRequestError,
    callers_fault,
    check,
    read_item,
    read_object,
    read_override,
    read_text,
    shown,
)
from recis.errors import ConfigError

MAX_FOUND = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Limits of the service."""

    encode_timeout_ms: float | None = 50.0
    """Longest time a request spends on the encoder; what is late gets a stand-in and is flagged approximate."""
    max_query_chars: int = 2048
    max_items: int = 5000
    max_body_bytes: int = 16 * 2**20
    body_timeout_s: float = 10.0
    """Longest time a client takes to send a body."""
    max_waiting: int = 256
    """Requests that wait for the model at a time; more are refused with 503."""

    def __post_init__(self) -> None:
        for name in ("max_query_chars", "max_items", "max_body_bytes", "max_waiting", "body_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; got {getattr(self, name)}")


class Service:
    """A model and a catalogue, ready to answer.

    Args:
        model: EBRM. Its config's encode_timeout_ms becomes that of `config`.
        items: the catalogue; laid out once.
        config: ServeConfig.

    Attributes:
        scored_items, approximate_items: since the start.

    Raises:
        ValueError: two items of one id.
        ConfigError: an entity type that the model does not declare.
    """

    def __init__(self, model: EBRM, items: Sequence[Item], config: ServeConfig) -> None:
        self.model = model
        self.config = config
        self.scored_items = 0
        self.approximate_items = 0
        self._started = time.monotonic()
        self._items = list(items)
        self._places = {item.id: place for place, item in enumerate(self._items)}
        if len(self._places) < len(self._items):
            raise ConfigError(
                f"the catalogue has {len(self._items) - len(self._places)} item ids twice; give each once"
            )
        self._titles = [f"{item.id} {item.title}".casefold() for item in self._items]
        model.config = replace(model.config, encode_timeout_ms=config.encode_timeout_ms)
        self._packed = model.pack(self._items)

    def health(self) -> dict[str, Any]:
        """Return what the service is made of."""
        return {
            "status": "ok",
            "model_version": self.model.version,
            "types": list(self.model.config.schema.names),
            "logic": self.model.config.logic,
            "is_calibrated": self.model.calibrator is not None,
            "num_items": len(self._items),
            "num_overrides": len(self.model.overrides),
            "cached_pairs": self.model.cache.num_pairs,
            "damaged_segments": len(self.model.cache.damaged),
            "uptime_s": round(time.monotonic() - self._started, 3),
        }

    def counters(self) -> dict[str, float]:
        """Return what was counted since the model was made, by the names of the metrics."""
        counts = self.model.counts
        return {
            "scored_items_total": self.scored_items,
            "approximate_items_total": self.approximate_items,
            "encoder_pairs_total": counts.encoder_calls,
            "late_pairs_total": counts.late_pairs,
            "failed_pairs_total": counts.failed_pairs,
            "clamped_logits_total": counts.clamped_logits,
            "dropped_entities_total": counts.dropped_entities,
            "truncated_pairs_total": self.model.scorer.truncated_pairs,
            "evicted_pairs_total": self.model.cache.evicted_pairs,
        }

    def gauges(self) -> dict[str, float]:
        """Return sizes, by the names of the metrics."""
        return {
            "cached_pairs": self.model.cache.num_pairs,
            "known_entities": len(self.model.cache.vocabulary),
            "catalogue_items": len(self._items),
            "overrides_in_force": len(self.model.overrides),
            "uptime_seconds": time.monotonic() - self._started,
        }

    def find(self, words: str, limit: int = 50) -> dict[str, Any]:
        """Return the first `limit` catalogue items whose id and title hold every word, and how many there are."""
        wanted = words.casefold().split()
        found = [place for place, text in enumerate(self._titles) if all(word in text for word in wanted)]
        shown = [self._items[place] for place in found[: min(max(limit, 1), MAX_FOUND)]]
        return {"num_found": len(found), "items": [{"id": item.id, "title": item.title} for item in shown]}

    def score(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Score {"query", "item_ids" | "items", "on_unknown"?, "with_types"?}; one list per column, in the order asked for.

        Raises:
            BadRequestError: a key, the query or an item breaks a rule.
        """
        with callers_fault():
            check_keys(
                data, required=("query",), optional=("items", "item_ids", "on_unknown", "with_types"), what="score"
            )
            query = self._query(data)
            with_types = data.get("with_types", False)
            check(isinstance(with_types, bool), "with_types must be true or false", with_types)
            packed, num_dropped = self._packed_of(data)
        scores = self.model.score(query, packed)
        self.scored_items += len(packed)
        self.approximate_items += int(scores.approximate.sum())
        answer = {
            "query": scores.query,
            "model_version": self.model.version,
            "item_ids": list(scores.item_ids),
            "r": scores.r.tolist(),
            "log_r": scores.log_r.tolist(),
            "p": None if scores.calibrator is None else scores.p.tolist(),
            "approximate": scores.approximate.tolist(),
            "encoder_calls": scores.encoder_calls,
            "overrides": list(scores.overrides),
            "expired": list(scores.expired),
            "dropped_entities": num_dropped,
        }
        return answer | ({"types": list(scores.types), "log_g": scores.log_g.tolist()} if with_types else {})

    def explain(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Explain {"query", "item_id" | "item", "trial"?}; a trial is an override in the form of `add`, owner left out.

        Raises:
            BadRequestError: as `score`.
        """
        with callers_fault():
            check_keys(data, required=("query",), optional=("item", "item_id", "trial"), what="explain")
            query = self._query(data)
            item = self._item_of(data)
            trial = (
                None if data.get("trial") is None else read_override({"owner": "trial"} | read_object(data, "trial"))
            )
            self.model.overrides.match(query, trial)
        return explanation_json(explain(self.model, query, item, trial=trial), title=item.title)

    def add(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Add an override {"match": {..}, "op", "value", "owner", "reason"?, "expires"?}, a line of a rules file.

        The answer's `replaces` lists the rules in force with the same match: from now on the new one acts in their place.

        Raises:
            BadRequestError: it breaks a rule.
        """
        with callers_fault():
            override = read_override(data)
            self.model.overrides.match("", override)  # refuses an undeclared type before anything is written
        return rule_json(self.model.overrides.add(override))

    def remove(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Remove the override {"version", "owner", "reason"?}: a line of the file says so.

        Raises:
            BadRequestError: there is no such rule in force, or no owner.
        """
        with callers_fault():
            check_keys(data, required=("version", "owner"), optional=("reason",), what="remove")
            version = data["version"]
            versions = [rule.version for rule in self.model.overrides.rules()]
            known = type(version) is int and version in versions  # not a bool, which is an int too
            check(known, "version must be that of an override that was not removed", version)
            owner, reason = (
                read_text(data, "owner", MAX_TEXT_CHARS),
                read_text(data, "reason", MAX_TEXT_CHARS, default=""),
            )
            check(bool(owner.strip()), "owner must say who removes the rule", owner)
        self.model.overrides.remove(version, owner=owner, reason=reason)
        return {"removed": f"o{version}"}

    def overrides(self) -> dict[str, Any]:
        """Return the rules that were not removed, oldest first, and which of them have expired."""
        rules = self.model.overrides
        return {
            "overrides": [rule_json(rule) for rule in rules.rules()],
            "expired": [rule.id for rule in rules.expired()],
        }

    def audit(self, since: str | None = None) -> list[dict[str, Any]]:
        """Return the lines of the overrides file.

        Raises:
            BadRequestError: since is no ISO date or time.
        """
        try:
            start = None if since is None else datetime.fromisoformat(since)
        except ValueError as error:
            raise BadRequestError(
                f"since must be an ISO date or time like 2026-11-29T12:00:00+00:00; got {since!r}"
            ) from error
        return self.model.overrides.audit(start)

    def close(self) -> None:
        """Write what the cache of a folder has not written yet."""
        self.model.cache.flush()

    def _query(self, data: Mapping[str, Any]) -> str:
        query = read_text(data, "query", self.config.max_query_chars)
        check(bool(canonical_text(query)), "query must not be empty or white space only", query)
        return query

    def _packed_of(self, data: Mapping[str, Any]) -> tuple[PackedItems, int]:
        """Return the items that a request names or brings, and how many entities were dropped."""
        key, entries = self._list_of(data)
        on_unknown = data.get("on_unknown", "raise")
        check(on_unknown in ("raise", "drop"), "on_unknown must be raise or drop", on_unknown)
        if key == "item_ids":
            return self._packed.select(self._all_places(entries)), 0
        items, num_dropped, schema = [], 0, self.model.config.schema
        for number, entry in enumerate(entries):
            item, dropped = read_item(entry, f"items[{number}]", schema, on_unknown=on_unknown)
            items.append(item)
            num_dropped += dropped
        packed = self.model.pack(items)
        self.model.counts.dropped_entities += num_dropped
        return packed, num_dropped

    def _list_of(self, data: Mapping[str, Any]) -> tuple[str, list[Any]]:
        given = [key for key in ("items", "item_ids") if key in data]
        check(len(given) == 1, "give one of items and item_ids", given)
        entries = data[given[0]]
        check(isinstance(entries, list), f"{given[0]} must be a list", type(entries).__name__)
        check(len(entries) <= self.config.max_items, f"at most {self.config.max_items} items a request", len(entries))
        return given[0], entries

    def _item_of(self, data: Mapping[str, Any]) -> Item:
        given = [key for key in ("item", "item_id") if key in data]
        check(len(given) == 1, "give one of item and item_id", given)
        if given == ["item_id"]:
            return self._items[self._place(data["item_id"])]
        return read_item(data["item"], "item", self.model.config.schema)[0]

    def _all_places(self, item_ids: list[Any]) -> np.ndarray:
        try:
            return np.fromiter(map(self._places.__getitem__, item_ids), np.int64, len(item_ids))
        except (KeyError, TypeError):  # one is unknown, or no text: say which
            return np.array([self._place(item_id) for item_id in item_ids], np.int64)

    def _place(self, item_id: object) -> int:
        place = self._places.get(item_id) if isinstance(item_id, str) else None
        if place is None:
            raise BadRequestError(f"no item {shown(item_id)} in the catalogue; GET items?words=... lists what there is")
        return place


def rule_json(rule: Rule) -> dict[str, Any]:
    """Return a rule, with what was noted when it was added, as a JSON object."""
    flags = [flag for flag in rule.flags if not flag.startswith(REPLACES)]
    replaces = [flag.removeprefix(REPLACES) for flag in rule.flags if flag.startswith(REPLACES)]
    noted = {"id": rule.id, "version": rule.version, "time": rule.time, "flags": flags, "replaces": replaces}
    return noted | rule.override.to_json()


def explanation_json(explanation: Explanation, *, title: str = "") -> dict[str, Any]:
    """Return an explanation, with its verdicts, as a JSON object."""
    words = verdicts(explanation)
    return {
        "query": explanation.query,
        "item_id": explanation.item_id,
        "title": title,
        "r": explanation.r,
        "log_r": explanation.log_r,
        "p": explanation.probability,
        "logic": explanation.logic,
        "types": [_type_json(truth, explanation.r) for truth in explanation.types],
        "overrides": list(explanation.overrides),
        "expired": list(explanation.expired),
        "is_approximate": explanation.is_approximate,
        "verdicts": {"category": words.category, "attributes": words.attributes},
    }


def _type_json(truth: TypeTruth, r: float) -> dict[str, Any]:
    names = ("type", "g", "a", "log_h", "best", "s_none", "is_constrained", "has_value", "override")
    plain = {name: getattr(truth, name) for name in names}
    return plain | {"entities": [_entity_json(entity, r) for entity in truth.entities]}


def _entity_json(entity: EntityTruth, r: float) -> dict[str, Any]:
    """Return what is said of an entity; `gives` is what r would lose with s = 0, `costs` what it would gain with s = 1."""
    return asdict(entity) | {"gives": r - entity.r_if_0, "costs": entity.r_if_1 - r}
