"""Pool the logits of packed items, with the overrides of a query.

Rules of entities act on s after confidence is mixed in, rules of types on g. A logit of +-inf stands for s of 1 and 0. A g
that was overruled is written back as one entity of its slot with s = g and the others with s = 0, which gives g in every
logic. A rule on a none entity changes what unsure entities are mixed with too.
"""

from typing import NamedTuple

import numpy as np
import torch

from recis.ebrm.overrides import Matched, Rule
from recis.ebrm.packed import PackedItems
from recis.ebrm.soft_logic import SoftLogicPool


class Pooled(NamedTuple):
    """log r [I], log g [I, T] float32, and the ids of the rules that fired."""

    log_r: np.ndarray
    log_g: np.ndarray
    fired: tuple[str, ...]


class _Layout(NamedTuple):
    """Per occurrence: logits and confidence [E]; per slot: logits of none [S]. Confidence may be None."""

    logits: np.ndarray
    confidence: np.ndarray | None
    none_logits: np.ndarray | None


def pool_items(pool: SoftLogicPool, items: PackedItems, logits: np.ndarray, matched: Matched) -> Pooled:
    """Pool the logits [U] of the items' distinct entities."""
    if not matched.entities and not matched.types:
        log_r, log_g = _combine(pool, items, _layout(items, logits))
        return Pooled(log_r, log_g, ())
    places = {items.distinct[place]: place for place in _places(items, matched)}
    fired = {entity: matched.entities[entity] for entity in places if entity in matched.entities}
    logits = logits.astype(np.float64)
    for entity, rule in fired.items():
        if places[entity] in items.none_of:
            logits[places[entity]] = _logit(rule.apply(_sigmoid(logits[places[entity]])))
    layout = _overrule_entities(items, _layout(items, logits), {places[name]: rule for name, rule in fired.items()})
    acting = {
        rule.id
        for name, rule in fired.items()
        if (items.entity_of == places[name]).any() or places[name] in items.none_of
    }
    log_r, log_g = _combine(pool, items, layout)
    types = {items.schema.position(name): rule for name, rule in matched.types.items()}
    layout, ruled = _overrule_types(items, layout, log_g, types, {places[name]: rule for name, rule in fired.items()})
    if ruled:
        log_r, log_g = _combine(pool, items, layout)
    return Pooled(log_r, log_g, tuple(sorted(acting | ruled, key=lambda name: int(name[1:]))))


def _places(items: PackedItems, matched: Matched) -> list[int]:
    """Return the places in `distinct` of the entities that rules name, as far as the items have them."""
    numbers = [items.vocabulary.known(entity) for entity in matched.entities]
    known = np.array([number for number in numbers if number is not None], np.uint32)
    places = items.numbers.searchsorted(known)
    return [
        int(place)
        for place, number in zip(places, known, strict=True)
        if place < len(items.numbers) and items.numbers[place] == number
    ]


def _layout(items: PackedItems, logits: np.ndarray) -> _Layout:
    none = None if items.confidence is None else np.tile(logits[items.none_of], len(items))
    return _Layout(logits[items.entity_of], items.confidence, none)


def _overrule_entities(items: PackedItems, layout: _Layout, rules: dict[int, Rule]) -> _Layout:
    logits = layout.logits.copy()
    confidence = None if layout.confidence is None else layout.confidence.copy()
    slot_of = np.repeat(np.arange(len(items.slot_offsets) - 1), np.diff(items.slot_offsets))
    for place, rule in rules.items():
        at = np.flatnonzero(items.entity_of == place)
        score = _sigmoid(layout.logits[at])
        if confidence is not None and layout.none_logits is not None:
            score = confidence[at] * score + (1 - confidence[at]) * _sigmoid(layout.none_logits[slot_of[at]])
            confidence[at] = 1
        # a none entity has the rule in its logit already; to apply it twice changes nothing
        logits[at] = _logit(rule.apply(score))
    return _Layout(logits, confidence, layout.none_logits)


def _overrule_types(
    items: PackedItems, layout: _Layout, log_g: np.ndarray, types: dict[int, Rule], entities: dict[int, Rule]
) -> tuple[_Layout, set[str]]:
    width = len(items.schema.types)
    logits, fired = layout.logits.copy(), set()
    confidence = None if layout.confidence is None else layout.confidence.copy()
    slot_of = np.repeat(np.arange(len(items.slot_offsets) - 1), np.diff(items.slot_offsets))
    for position, rule in types.items():
        acts = np.ones(len(items), bool)
        for place, other in entities.items():
            if not rule.beats((other,)):
                acts[slot_of[items.entity_of == place] // width] &= items.type_of[place] != position
        slots = np.flatnonzero(acts) * width + position
        if not len(slots):
            continue
        fired.add(rule.id)
        inside = np.zeros(len(items.slot_offsets) - 1, bool)
        inside[slots] = True
        overruled = inside[slot_of]
        logits[overruled] = -np.inf
        logits[items.slot_offsets[slots]] = _logit(rule.apply(np.exp(log_g[acts, position].astype(np.float64))))
        if confidence is not None:
            confidence[overruled] = 1
    return _Layout(logits, confidence, layout.none_logits), fired


@torch.inference_mode()
def _combine(pool: SoftLogicPool, items: PackedItems, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    num_items, width = len(items), len(items.schema.types)
    device = pool.relaxation.device

    def tensor(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array.astype(np.float32, copy=False)).to(device)

    logits = tensor(layout.logits)
    assert logits is not None
    out = pool.combine(
        logits,
        torch.arange(width, device=device).repeat(num_items),
        torch.from_numpy(items.slot_offsets).to(device),
        torch.arange(0, num_items * width + 1, width, device=device),
        confidence=tensor(layout.confidence),
        none_logits=tensor(layout.none_logits),
    )
    return out.log_r.cpu().numpy(), out.log_g.reshape(num_items, width).cpu().numpy()


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def _logit(scores: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(scores) - np.log1p(-np.asarray(scores))
