"""Hand the spans of a title to EBRM: each becomes an entity of its schema."""

from collections.abc import Iterable, Mapping

from recis.ebrm.entities import Entity, EntitySchema
from recis.tagger.rules import Span


def to_entities(spans: Iterable[Span], schema: EntitySchema, *, types: Mapping[str, str] | None = None) -> list[Entity]:
    """Return one entity per span, source "tagger", conf of the span.

    Args:
        spans: what a tagger gave for one title.
        schema: EBRM's types; its rules make the values canonical.
        types: tagger type -> type of the schema; None when both have the same names.

    Raises:
        ValueError: a span's type is not in the table, or leads outside the schema.
    """
    found: list[Entity] = []
    for span in spans:
        name = span.type if types is None else types.get(span.type)
        if name is None or name not in schema:
            known = list(types) if types is not None else list(schema.names)
            raise ValueError(
                f"span {span.surface!r}: type {span.type!r} leads to no type of the schema; there are {known}"
            )
        found.append(schema.entity(name, span.surface, source="tagger", conf=span.conf))
    return found
