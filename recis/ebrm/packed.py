"""Items laid out for scoring: their distinct entities by vocabulary number, and slots that refer to them.

    distinct   [U]   entity ids, each once, ascending by number: what is looked up in a row of the cache, and encoded
    entity_of  [E]   entities of all slots of all items, as places in `distinct`
    slots            T per item, one per type in schema order, none of them empty: slot_offsets [I * T + 1]

Packing loops over items in Python, once. Scoring a packed catalogue, or a selection of it, does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recis.ebrm.entities import EntitySchema, Item, OnUnknown, none_id, type_of
from recis.ebrm.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedItems:
    """Items as arrays. Made by `pack` (or `EBRM.pack`); valid for one schema and one vocabulary.

    Attributes:
        item_ids: ids of the I items.
        schema: of the slots.
        vocabulary: that `numbers` refer to.
        distinct: entity ids [U].
        numbers: [U] uint32, ascending.
        type_of: [U] int64, type id of each distinct entity.
        entity_of: [E] int64, places in distinct.
        slot_offsets: [I * T + 1] int64.
        confidence: [E] float32, or None where every conf is 1.
        none_of: [T] int64, the place of each type's none entity in distinct; -1 where it is not needed.
        is_bare: [I] bool, items that came without any entity.
        num_dropped: entities of undeclared types that were left out.
    """

    item_ids: tuple[str, ...]
    schema: EntitySchema
    vocabulary: Vocabulary
    distinct: tuple[str, ...]
    numbers: np.ndarray
    type_of: np.ndarray
    entity_of: np.ndarray
    slot_offsets: np.ndarray
    confidence: np.ndarray | None
    none_of: np.ndarray
    is_bare: np.ndarray
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.item_ids)

    def select(self, places: np.ndarray) -> "PackedItems":
        """Return the items at some places [J], in that order, without a loop over what they hold.

        Raises:
            ValueError: a place is outside 0 to I - 1.
        """
        places = np.asarray(places, np.int64)
        if len(places) and (places.min() < 0 or places.max() >= len(self)):
            raise ValueError(f"places must be 0 to {len(self) - 1}; got {places.min()} to {places.max()}")
        width = len(self.schema.types)
        slots = (places[:, None] * width + np.arange(width)).ravel()
        lengths = np.diff(self.slot_offsets)[slots]
        slot_offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        entities = np.repeat(self.slot_offsets[slots] - slot_offsets[:-1], lengths) + np.arange(slot_offsets[-1])
        used = np.zeros(len(self.distinct), bool)
        used[self.entity_of[entities]] = True
        used[self.none_of[self.none_of >= 0]] = True
        kept = np.flatnonzero(used)
        new_place = np.cumsum(used) - 1
        return PackedItems(
            item_ids=tuple(self.item_ids[place] for place in places),
            schema=self.schema,
            vocabulary=self.vocabulary,
            distinct=tuple(self.distinct[place] for place in kept),
            numbers=self.numbers[kept],
            type_of=self.type_of[kept],
            entity_of=new_place[self.entity_of[entities]],
            slot_offsets=slot_offsets,
            confidence=None if self.confidence is None else self.confidence[entities],
            none_of=np.where(self.none_of >= 0, new_place[self.none_of], -1),
            is_bare=self.is_bare[places],
        )


def pack(
    items: Sequence[Item], schema: EntitySchema, vocabulary: Vocabulary, *, on_unknown: OnUnknown = "raise"
) -> PackedItems:
    """Lay items out for scoring; new entities get numbers in the vocabulary.

    Raises:
        ValueError: two items with one id and different entities.
        ConfigError: an entity of an undeclared type, with on_unknown="raise".
    """
    ids: list[str] = []
    lengths: list[int] = []
    conf: list[float] = []
    bare: list[bool] = []
    known: dict[str, Item] = {}
    num_dropped = 0
    for item in items:
        if known.setdefault(item.id, item).entities != item.entities:
            raise ValueError(f"item {item.id!r} comes twice with different entities in one request; give each id once")
        num_dropped += schema.count_unknown(item.entities) if on_unknown == "drop" else 0
        slots = schema.slots(item.entities, on_unknown=on_unknown)
        bare.append(not any(not entity.is_none for slot in slots for entity in slot))
        for slot in slots:
            lengths.append(len(slot))
            for entity in slot:
                ids.append(entity.id)
                conf.append(entity.conf)
    confidence = np.array(conf, np.float32)
    unsure = bool((confidence < 1).any())
    nones = [none_id(name) for name in schema.names] if unsure else []  # what an unsure entity is mixed with
    numbers, first, inverse = np.unique(vocabulary.numbers([*ids, *nones]), return_index=True, return_inverse=True)
    distinct = [[*ids, *nones][place] for place in first]
    width = len(schema.types)
    return PackedItems(
        item_ids=tuple(item.id for item in items),
        schema=schema,
        vocabulary=vocabulary,
        distinct=tuple(distinct),
        numbers=numbers,
        type_of=np.array([schema.position(type_of(entity)) for entity in distinct], np.int64),
        entity_of=inverse[: len(ids)].astype(np.int64),
        slot_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        confidence=confidence if unsure else None,
        none_of=inverse[len(ids) :].astype(np.int64) if unsure else np.full(width, -1, np.int64),
        is_bare=np.array(bare, bool),
        num_dropped=num_dropped,
    )
