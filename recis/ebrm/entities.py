"""Typed entities: what an item says about itself, with one id per meaning.

    id = "<type>:<canonical value>"        brand:nike, colour:black (also from "Schwarz"), capacity:1024gb (also from "1 TB")

A schema declares the types. `EntitySchema.entity` makes canonical entities; `EntitySchema.slots` groups an item's entities
by type: one slot per declared type, duplicates merged, and the pseudo-entity `<type>:none` where the item states no value.
Leaving such a type out instead would let an unbranded item pass every brand query.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from recis.ebrm.canonical import UNITS, canonical_number, canonical_text
from recis.errors import ConfigError, DataError

Kind = Literal["text", "code", "number"]
ScorerName = Literal["encoder", "comparator"]
Source = Literal["catalog", "tagger", "rule", "synthetic"]
OnUnknown = Literal["raise", "drop"]
KINDS, SCORERS = ("text", "code", "number"), ("encoder", "comparator")
SOURCES = ("catalog", "tagger", "rule", "synthetic")
NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entity:
    """One value of one type. Make it with `EntitySchema.entity`, which canonicalises."""

    type: str
    value: str
    """Canonical value, or a canonical surface of it."""
    id: str
    """"<type>:<canonical value>": what is scored and cached."""
    source: Source = "catalog"
    conf: float = 1.0
    """How sure the source is that the item has this value, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0.0 < self.conf <= 1.0:
            raise ConfigError(
                f"entity {self.id!r}: conf must be in (0, 1]; got {self.conf}: leave out what is not believed"
            )
        if self.source not in SOURCES:
            raise ConfigError(f"entity {self.id!r}: source must be one of {SOURCES}; got {self.source!r}")
        if not self.id.startswith(f"{self.type}:") or len(self.id) <= len(self.type) + 1:
            raise ConfigError(
                f"entity {self.id!r}: an id is '<type>:<canonical value>' of type {self.type!r}; EntitySchema.entity makes it"
            )

    @property
    def is_none(self) -> bool:
        """Whether this stands for "the item states no value"."""
        return self.id == none_id(self.type)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return {"type": self.type, "value": self.value, "id": self.id, "source": self.source, "conf": self.conf}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An item of the catalogue: what a query is scored against."""

    id: str
    entities: tuple[Entity, ...] = ()
    title: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the item as one object of an items file."""
        return {"id": self.id, "title": self.title, "entities": [entity.to_json() for entity in self.entities]}


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeConfig:
    """A declared entity type."""

    name: str
    kind: Kind = "text"
    """How values are canonicalised, and which comparator can score them."""
    scorer: ScorerName = "encoder"
    """Who scores: the encoder, or the comparator of a code or number type."""
    hard: bool = False
    """Freeze the relaxation a_t at 1: a contradiction of this type always vetoes."""
    synonyms: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Other spelling -> value; both are canonicalised."""
    units: tuple[str, ...] = ()
    """Of a number type: base units its values have ("gb", "cm"), so that a comparator knows which number in a query is
    meant; () takes the unit of the value, and lets no query constrain the none entity."""

    def __post_init__(self) -> None:
        if not self.name or self.name != canonical_text(self.name) or ":" in self.name or " " in self.name:
            raise ConfigError(f"type name must be lower case without blanks and ':'; got {self.name!r}")
        if self.kind not in KINDS or self.scorer not in SCORERS:
            raise ConfigError(
                f"type {self.name!r}: kind is one of {KINDS} and scorer one of {SCORERS}; got {self.kind!r}, {self.scorer!r}"
            )
        if self.scorer == "comparator" and self.kind == "text":
            raise ConfigError(
                f"type {self.name!r}: only codes and numbers have a comparator; a text needs scorer='encoder'"
            )
        bases = {base for base, _ in UNITS.values()}
        if set(self.units) - bases or (self.units and self.kind != "number"):
            raise ConfigError(
                f"type {self.name!r}: units are of number types and among {sorted(bases)}; got {self.units} of a {self.kind}"
            )
        form = canonical_number if self.kind == "number" else canonical_text
        canonical = {form(surface): form(value) for surface, value in self.synonyms.items()}
        chained = sorted(value for value in canonical.values() if canonical.get(value, value) != value)
        if chained:
            raise ConfigError(f"type {self.name!r}: synonyms must lead to a value in one step; {chained[0]!r} leads on")
        object.__setattr__(self, "synonyms", canonical)

    def canonical(self, value: str) -> str:
        """Return the canonical value: text or number form, then the synonym table."""
        form = canonical_number(value) if self.kind == "number" else canonical_text(value)
        return self.synonyms.get(form, form)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        fields = {"name": self.name, "kind": self.kind, "scorer": self.scorer, "hard": self.hard}
        return fields | {"synonyms": dict(sorted(self.synonyms.items())), "units": list(self.units)}


@dataclass(frozen=True, kw_only=True, slots=True)
class EntitySchema:
    """The declared types, in a fixed order: their positions are type ids."""

    types: tuple[TypeConfig, ...]
    _positions: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        positions = {config.name: position for position, config in enumerate(self.types)}
        if not self.types or len(positions) < len(self.types):
            raise ConfigError(f"a schema needs at least one type, each once; got {[t.name for t in self.types]}")
        object.__setattr__(self, "_positions", positions)

    def __hash__(self) -> int:
        return hash(self.types)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the types, in schema order."""
        return tuple(config.name for config in self.types)

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def position(self, name: str) -> int:
        """Return the type id of a type.

        Raises:
            ConfigError: the type is not declared; all declared ones are listed.
        """
        if name not in self._positions:
            raise ConfigError(f"unknown entity type {name!r}; declared are {', '.join(self.names)}")
        return self._positions[name]

    def type(self, name: str) -> TypeConfig:
        """Return the config of a type; raises as `position`."""
        return self.types[self.position(name)]

    def canonical(self, type: str, value: str) -> str:
        """Return the canonical value of a text of this type."""
        return self.type(type).canonical(value)

    def entity(self, type: str, value: str, *, source: Source = "catalog", conf: float = 1.0) -> Entity:
        """Return the canonical entity of a value.

        Raises:
            ConfigError: unknown type, an empty value, conf outside (0, 1], unknown source.
        """
        canonical = self.canonical(type, value)
        if not canonical:
            raise ConfigError(
                f"entity of type {type!r}: a value must not be empty; leave the type out, it counts as none"
            )
        return Entity(type=type, value=canonical, id=f"{type}:{canonical}", source=source, conf=conf)

    def none(self, type: str) -> Entity:
        """Return the pseudo-entity of an item that states no value of a type."""
        self.position(type)
        return Entity(type=type, value=NONE, id=none_id(type))

    def slots(self, entities: Iterable[Entity], *, on_unknown: OnUnknown = "raise") -> tuple[tuple[Entity, ...], ...]:
        """Return one tuple of entities per declared type, in schema order, none of them empty.

        Within a type duplicates by id are merged, keeping the first one's place and the largest conf: product OR is not
        idempotent. A type without a real value holds its none entity. Entities of undeclared types are refused, or left
        out with on_unknown="drop" (`count_unknown` counts them).

        Raises:
            ConfigError: an entity of an undeclared type, with on_unknown="raise".
        """
        found: list[dict[str, Entity]] = [{} for _ in self.types]
        for entity in entities:
            if entity.type not in self._positions and on_unknown == "drop":
                continue
            slot = found[self.position(entity.type)]
            known = slot.get(entity.id)
            if not entity.is_none and (known is None or entity.conf > known.conf):
                slot[entity.id] = entity
        return tuple(
            tuple(slot.values()) if slot else (self.none(config.name),)
            for slot, config in zip(found, self.types, strict=True)
        )

    def spellings(self) -> dict[str, tuple[str, ...]]:
        """Return entity id -> its other spellings, of every value that synonyms lead to."""
        found: dict[str, list[str]] = {}
        for config in self.types:
            for surface, value in config.synonyms.items():
                found.setdefault(f"{config.name}:{value}", []).append(surface)
        return {entity: tuple(sorted(surfaces)) for entity, surfaces in sorted(found.items())}

    def count_unknown(self, entities: Iterable[Entity]) -> int:
        """Return how many entities are of undeclared types."""
        return sum(entity.type not in self._positions for entity in entities)

    def to_json(self) -> dict[str, Any]:
        """Return the schema as a JSON object."""
        return {"types": [config.to_json() for config in self.types]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "EntitySchema":
        """Return the schema that `to_json` wrote.

        Raises:
            ConfigError: a value breaks a rule.
            DataError: unknown or missing keys.
        """
        check_keys(data, required=("types",), what="schema")
        for entry in data["types"]:
            check_keys(entry, required=("name",), optional=("kind", "scorer", "hard", "synonyms", "units"), what="type")
        return EntitySchema(
            types=tuple(TypeConfig(**entry | {"units": tuple(entry.get("units", ()))}) for entry in data["types"])
        )


def none_id(type: str) -> str:
    """Return the id of a type's pseudo-entity."""
    return f"{type}:{NONE}"


def type_of(entity_id: str) -> str:
    """Return the type that an entity id names."""
    return entity_id.partition(":")[0]


def value_of(entity_id: str) -> str:
    """Return the canonical value that an entity id names."""
    return entity_id.partition(":")[2]


def item_from_json(data: Mapping[str, Any], schema: EntitySchema, *, on_unknown: OnUnknown = "raise") -> Item:
    """Return the item of one object of an items file; ids are made anew from type and value.

    Raises:
        DataError: unknown or missing keys, or an id that is not the canonical one of its value.
        ConfigError: an undeclared type (unless dropped), conf outside (0, 1], unknown source.
    """
    check_keys(data, required=("id",), optional=("title", "entities"), what="item")
    entities = []
    for entry in data.get("entities", ()):
        check_keys(entry, required=("type", "value"), optional=("id", "source", "conf"), what="entity")
        if entry["type"] not in schema and on_unknown == "drop":
            continue
        entity = schema.entity(
            entry["type"], entry["value"], source=entry.get("source", "catalog"), conf=entry.get("conf", 1.0)
        )
        if entry.get("id", entity.id) != entity.id:
            raise DataError(f"entity id must be {entity.id!r} for this value", value=entry["id"], option="leave id out")
        entities.append(entity)
    return Item(id=data["id"], title=data.get("title", ""), entities=tuple(entities))


def check_keys(data: Mapping[str, Any], *, required: Iterable[str], optional: Iterable[str] = (), what: str) -> None:
    """Refuse an object of a file with unknown or missing keys.

    Raises:
        DataError: names the keys.
    """
    needed = set(required)
    unknown, missing = sorted(set(data) - needed - set(optional)), sorted(needed - set(data))
    if unknown or missing:
        known = ", ".join(sorted(needed | set(optional)))
        raise DataError(f"{what}: unknown keys {unknown}, missing keys {missing}", option=f"keys are {known}")
