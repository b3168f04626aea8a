"""Rules by which a person overrules scores: an append-only JSONL file with versions and a sha256 chain.

An entity override acts on s of an entity, a type override on g of a type, both after the cache, so cached values stay
clean. For one entity or type of one query one rule acts: exact query beats regex beats any query, then entity beats type,
then the later version. Expired rules are skipped and listed. `remove` appends a line too: the file tells the whole story.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recis.ebrm.canonical import canonical_text
from recis.ebrm.entities import EntitySchema, check_keys, type_of, value_of
from recis.errors import ConfigError, DataError

_BOUNDS = {"set": (True, True), "min": (True, False), "max": (False, True)}  # op -> bounded from below, from above
OPS = tuple(_BOUNDS)
_ANY, _REGEX, _EXACT = 0, 1, 2
UNKNOWN_ENTITY, REPLACES = "unknown_entity", "replaces:"  # flags of a rule
_FIRST_LINK = "0" * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """One rule. Without query and query_regex it holds for every query."""

    op: str
    """set: the value replaces the score; min: at least the value; max: at most the value."""
    value: float
    owner: str
    query: str | None = None
    query_regex: str | None = None
    """Searched for in the canonical query, so in lower case."""
    entity: str | None = None
    """An entity id; its value is canonicalised by the schema when the rule is added."""
    type: str | None = None
    reason: str = ""
    expires: str | None = None
    """ISO date, the last day (UTC) on which the rule holds; None: for ever."""

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ConfigError(f"override: op must be one of {', '.join(OPS)}; got {self.op!r}")
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not number or math.isnan(self.value) or not 0 <= self.value <= 1:
            raise ConfigError(f"override: value must be in [0, 1]; got {self.value!r}")
        if not self.owner.strip():
            raise ConfigError("override: owner must say who answers for the rule; got an empty one")
        if (self.entity is None) == (self.type is None):
            raise ConfigError(f"override: give one of entity and type; got {self.entity!r} and {self.type!r}")
        if self.query is not None and self.query_regex is not None:
            raise ConfigError("override: give query or query_regex, not both; neither means every query")
        if self.query is not None and not canonical_text(self.query):
            raise ConfigError("override: query must not be empty; leave it out for every query")
        try:
            re.compile(self.query_regex or "")
        except re.error as error:
            raise ConfigError(
                f"override: query_regex {self.query_regex!r} is no regular expression: {error}"
            ) from error
        try:
            date.fromisoformat(self.expires or "2000-01-01")
        except ValueError as error:
            raise ConfigError(f"override: expires must be an ISO date like 2027-01-31; got {self.expires!r}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the rule as one object of a rules file."""
        names = ("query", "query_regex", "entity", "type")
        match = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        plain = {"match": match, "op": self.op, "value": self.value, "owner": self.owner, "reason": self.reason}
        return plain | ({} if self.expires is None else {"expires": self.expires})

    def acts_on(self, other: "Override") -> bool:
        """Return whether it is for the same queries and the same entity or type as another: one of the two acts."""
        names = ("query", "query_regex", "entity", "type")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Override":
        """Return the rule that `to_json` wrote; unknown or missing keys are a DataError, broken rules a ConfigError."""
        check_keys(data, required=("match", "op", "value", "owner"), optional=("reason", "expires"), what="override")
        names = ("query", "query_regex", "entity", "type")
        check_keys(data["match"], required=(), optional=names, what="override's match")
        return Override(**data["match"], **{name: value for name, value in data.items() if name != "match"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """An override in force: its version, which is its id, and what the file says of it."""

    version: int
    override: Override
    time: str
    flags: tuple[str, ...] = ()
    """"unknown_entity": no item has had this entity when the rule was added. "replaces:o1": that rule, of the same query and
    entity or type, was in force then; both stay, the later one acts."""
    pattern: "re.Pattern[str] | None" = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """What a response names it by: "o<version>"."""
        return f"o{self.version}"

    def rank(self) -> tuple[int, int, int]:
        """Return what decides between rules of one entity or type: the larger wins."""
        rule = self.override
        query = _EXACT if rule.query is not None else _REGEX if rule.query_regex is not None else _ANY
        return query, int(rule.entity is not None), self.version

    def is_expired(self, today: date) -> bool:
        """Return whether its last day is over."""
        return self.override.expires is not None and date.fromisoformat(self.override.expires) < today

    def matches(self, query: str) -> bool:
        """Return whether it holds for a canonical query."""
        if self.override.query is not None:
            return self.override.query == query
        return self.pattern is None or self.pattern.search(query) is not None

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores that it makes of scores."""
        low, high = _BOUNDS[self.override.op]
        value = float(self.override.value)
        return np.clip(scores, value if low else 0.0, value if high else 1.0)

    def beats(self, others: Iterable["Rule"]) -> bool:
        """Return whether it, a rule of a type, acts although rules of entities in the type's slot fired too."""
        return all(self.rank() > other.rank() for other in others)


class Matched(NamedTuple):
    """The rules that hold for a query: the winner per entity id and per type, and the ids of expired ones that would."""

    entities: dict[str, Rule]
    types: dict[str, Rule]
    expired: tuple[str, ...]


def no_match() -> Matched:
    """Return what a query without overrides gets."""
    return Matched({}, {}, ())


class Overrides:
    """The overrides of a model.

    Args:
        schema: declares the types and canonicalises values.
        path: the JSONL file; None keeps the rules in memory.
        is_known: whether an entity id has been seen; a rule for one that has not is accepted and flagged.
        now: the time, for expiry and for the file.

    Raises:
        DataError: a line of the file cannot be read, breaks the chain, or has a rule that breaks the rules.
    """

    def __init__(
        self,
        schema: EntitySchema,
        path: str | Path | None = None,
        *,
        is_known: Callable[[str], bool] = lambda _: True,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = None if path is None else Path(path)
        self._schema, self._is_known, self._now = schema, is_known, now
        self._records: list[dict[str, Any]] = []
        self._rules: dict[int, Rule] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._rules)

    @property
    def version(self) -> int:
        """Of the last line: 0 before the first."""
        return len(self._records)

    def rules(self) -> tuple[Rule, ...]:
        """Return the rules that were not removed, oldest first; expired ones too."""
        return tuple(self._rules.values())

    def expired(self) -> tuple[Rule, ...]:
        """Return the rules whose last day is over."""
        today = self._now().date()
        return tuple(rule for rule in self._rules.values() if rule.is_expired(today))

    def add(self, override: Override) -> Rule:
        """Append a rule and return it as it is in force; its flags name the rules of the same match that it replaces.

        Raises:
            ConfigError: its type is not declared (also that of its entity).
        """
        override = self._canonical(override)
        flags = () if override.entity is None or self._is_known(override.entity) else (UNKNOWN_ENTITY,)
        same = [rule for rule in self._rules.values() if rule.override.acts_on(override)]
        gone = self.expired() if same else ()
        flags += tuple(f"{REPLACES}{rule.id}" for rule in same if rule not in gone)
        record = self._append({"action": "add", "rule": override.to_json(), "flags": list(flags)})
        return self._enact(record)

    def remove(self, version: int, *, owner: str, reason: str = "") -> None:
        """Append that a rule no longer holds.

        Raises:
            ConfigError: there is no such rule in force, or no owner.
        """
        if version not in self._rules:
            raise ConfigError(f"there is no override of version {version} in force; there are {sorted(self._rules)}")
        if not owner.strip():
            raise ConfigError("override: owner must say who removes the rule; got an empty one")
        self._enact(self._append({"action": "remove", "removes": version, "owner": owner, "reason": reason}))

    def match(self, query: str, trial: Override | None = None) -> Matched:
        """Return the rules that hold for a canonical query.

        Args:
            query: canonical.
            trial: a rule that counts as if it had just been added; nothing is kept of it. Raises as `add`.
        """
        rules = list(self._rules.values())
        if trial is not None:
            rules.append(self._rule(self.version + 1, self._canonical(trial)))
        if not rules:
            return no_match()
        today = self._now().date()
        entities: dict[str, Rule] = {}
        types: dict[str, Rule] = {}
        expired = []
        for rule in rules:
            if not rule.matches(query):
                continue
            if rule.is_expired(today):
                expired.append(rule.id)
                continue
            winners, key = (
                (entities, rule.override.entity) if rule.override.entity is not None else (types, rule.override.type)
            )
            assert key is not None
            if key not in winners or rule.rank() > winners[key].rank():
                winners[key] = rule
        return Matched(entities, types, tuple(expired))

    def audit(self, since: str | datetime | None = None) -> list[dict[str, Any]]:
        """Return the lines of the file, oldest first: who added or removed what, when, and the chain.

        Args:
            since: only lines from this time on: ISO date or time (UTC where it says no zone).
        """
        if since is None:
            return [dict(record) for record in self._records]
        start = datetime.fromisoformat(since) if isinstance(since, str) else since
        start = start if start.tzinfo else start.replace(tzinfo=UTC)
        return [dict(record) for record in self._records if datetime.fromisoformat(record["time"]) >= start]

    def _canonical(self, override: Override) -> Override:
        changes: dict[str, Any] = {}
        if override.type is not None:
            self._schema.position(override.type)
        if override.entity is not None:
            kind, value = type_of(override.entity), value_of(override.entity)
            changes["entity"] = self._schema.entity(kind, value).id
        if override.query is not None:
            changes["query"] = canonical_text(override.query)
        fields = {name: getattr(override, name) for name in override.__dataclass_fields__}
        return Override(**fields | changes)

    def _append(self, content: dict[str, Any]) -> dict[str, Any]:
        previous = self._records[-1]["sha256"] if self._records else _FIRST_LINK
        record = {"version": self.version + 1, "time": self._now().isoformat(), **content, "previous": previous}
        record["sha256"] = link_of(record)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, sort_keys=True) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        return record

    def _enact(self, record: dict[str, Any]) -> Any:
        self._records.append(record)
        if record["action"] == "remove":
            del self._rules[record["removes"]]
            return None
        rule = self._rule(
            record["version"], Override.from_json(record["rule"]), time=record["time"], flags=tuple(record["flags"])
        )
        self._rules[rule.version] = rule
        return rule

    @staticmethod
    def _rule(version: int, override: Override, *, time: str = "", flags: tuple[str, ...] = ()) -> Rule:
        pattern = None if override.query_regex is None else re.compile(override.query_regex)
        return Rule(version=version, override=override, time=time, flags=flags, pattern=pattern)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # a kill while a line was written: that rule was never acknowledged
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1]):
            try:
                record = json.loads(line)
                previous = self._records[-1]["sha256"] if self._records else _FIRST_LINK
                intact = record["previous"] == previous and record["sha256"] == link_of(record)
                intact = intact and record["version"] == number + 1
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"cannot be read ({error})", file=str(path), row=number) from error
            if not intact:
                raise DataError(
                    "the sha256 chain of overrides breaks here: the file was edited or cut",
                    file=str(path),
                    row=number,
                    option="restore the file; rules are added and removed by the commands only",
                )
            self._enact(record)


def link_of(record: Mapping[str, Any]) -> str:
    """Return the sha256 of a line of the file, over all its other keys; they include the previous line's."""
    plain = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
