"""Say what an edited rule file does to relevance before it is deployed: whose r changes, for which query, and by how much."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from recis.ebrm.entities import EntitySchema, Item
from recis.ebrm.model import EBRM
from recis.tagger.entities import to_entities
from recis.tagger.rules import Span

LEAST_CHANGE = 0.05  # of r; smaller ones reorder nothing that a person would see

Tag = Callable[[str], list[Span]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RelevanceChange:
    """r of one query and one item before and after."""

    query: str
    item_id: str
    before: float
    after: float


def tagged_item(item: Item, tag: Tag, schema: EntitySchema, *, types: Mapping[str, str] | None = None) -> Item:
    """Return an item with the tags of its title as entities, in place of those an earlier tagger gave; others stay.

    Raises:
        ValueError: as `to_entities`.
    """
    kept = tuple(entity for entity in item.entities if entity.source != "tagger")
    return Item(id=item.id, title=item.title, entities=kept + tuple(to_entities(tag(item.title), schema, types=types)))


def relevance_changes(
    model: EBRM,
    queries: Iterable[str],
    before: Sequence[Item],
    after: Sequence[Item],
    *,
    least: float = LEAST_CHANGE,
) -> list[RelevanceChange]:
    """Return the (query, item) pairs whose r differs by more than `least`, largest change first.

    Only items whose entities differ are scored.

    Args:
        model: overrides included.
        queries: none of them empty.
        before: items.
        after: the same items in the same order, tagged anew.
        least: change of r, 0 to 1.

    Raises:
        ValueError: the two do not hold the same items, or as `EBRM.score`.
    """
    ids = [item.id for item in before]
    if ids != [item.id for item in after]:
        raise ValueError(f"before and after must be the same items in one order; got {len(before)} and {len(after)}")
    places = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old.entities != new.entities]
    if not places:
        return []
    changes: list[RelevanceChange] = []
    for query in queries:
        old = model.score(query, [before[place] for place in places]).r
        new = model.score(query, [after[place] for place in places]).r
        changes += [
            RelevanceChange(query=query, item_id=ids[place], before=float(was), after=float(now))
            for place, was, now in zip(places, old, new, strict=True)
            if abs(now - was) > least
        ]
    return sorted(changes, key=lambda change: (-abs(change.after - change.before), change.query, change.item_id))
