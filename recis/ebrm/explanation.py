"""Why an item got its relevance: every truth of the formula, what each entity contributes, and verdicts for other programs.

    r = AND_t h_t,  h_t = 1 - a_t (1 - g_t),  g_t = OR_e s_e;     dr/ds_e = AND'_t a_t OR'_e

In product logic AND' and OR' are products over the others, taken by prefixes and suffixes, not by dividing, so s = 1 and
g = 0 are exact; and r is linear in each s_e, so r' = r + (v - s_e) dr/ds_e holds for one change. For changes in several
types at once recompute: effects do not add. Float64 throughout. s_e is the value after confidence and overrides.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from recis.ebrm.calibrate import NotCalibratedError, VerdictThresholds
from recis.ebrm.entities import Entity, Item, none_id
from recis.ebrm.overrides import Matched, Override, Rule

if TYPE_CHECKING:
    from recis.ebrm.model import EBRM

Category = Literal["match", "near", "mismatch"]
Attribute = Literal["ok", "miss", "unknown"]
MIN_TRUTH = 1e-30  # what log r counts a truth of 0 as, as the kernel does


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityTruth:
    """One entity of the item: s, and what it does to r."""

    id: str
    value: str
    source: str
    conf: float
    s: float
    """After confidence and overrides."""
    slope: float
    """dr/ds."""
    r_if_0: float
    r_if_1: float
    override: str | None
    is_approximate: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeTruth:
    """One type: g_t, and the entities it comes from."""

    type: str
    g: float
    """After overrides of the type."""
    a: float
    log_h: float
    """Its share of log r: log r is their sum in product logic."""
    best: str
    """Id of the entity with the largest s."""
    entities: tuple[EntityTruth, ...]
    s_none: float
    """s of the type's none entity: low means that the query asks for something of this type."""
    is_constrained: bool
    override: str | None

    @property
    def has_value(self) -> bool:
        """Whether the item states a value."""
        return self.is_stated(0.0)

    def is_stated(self, tagger_floor: float) -> bool:
        """Whether the item states a value, not counting a tagger's whose conf is under the floor."""
        return any(
            entity.id != none_id(self.type) and (entity.source != "tagger" or entity.conf >= tagger_floor)
            for entity in self.entities
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Why a query and an item got their r. `print` shows it as a table."""

    query: str
    item_id: str
    r: float
    log_r: float
    logic: str
    types: tuple[TypeTruth, ...]
    overrides: tuple[str, ...]
    expired: tuple[str, ...]
    is_approximate: bool
    category_type: str
    thresholds: VerdictThresholds
    probability: float | None = field(default=None)

    @property
    def p(self) -> float:
        """Probability of relevance.

        Raises:
            NotCalibratedError: the model's calibrator was not fitted.
        """
        if self.probability is None:
            raise NotCalibratedError("no probability without a calibrator: call model.fit_calibrator; r needs none")
        return self.probability

    def type(self, name: str) -> TypeTruth:
        """Return what is said of a type; KeyError when there is none of that name."""
        return {truth.type: truth for truth in self.types}[name]

    def __str__(self) -> str:
        tail = "" if self.probability is None else f"  p {self.probability:.4f}"
        lines = [f"{self.query!r} against item {self.item_id!r}: r {self.r:.4f}{tail}"]
        lines.append(f"{'entity':<32}{'s':>8}{'dr/ds':>9}{'r if 0':>9}{'r if 1':>9}  from")
        for truth in self.types:
            mark = " asked for" if truth.is_constrained else ""
            rule = f" {truth.override}" if truth.override else ""
            lines.append(f"{truth.type}: g {truth.g:.4f}  a {truth.a:.2f}{mark}{rule}")
            for entity in truth.entities:
                numbers = f"{entity.s:8.4f}{entity.slope:9.4f}{entity.r_if_0:9.4f}{entity.r_if_1:9.4f}"
                notes = [entity.source, *([entity.override] if entity.override else [])]
                notes += ["approximate"] if entity.is_approximate else []
                lines.append(f"  {entity.value:<30}{numbers}  {' '.join(notes)}")
        return "\n".join(lines)


class Verdicts(NamedTuple):
    """Category (None where the schema has no such type) and one word per other type that the query asks for."""

    category: Category | None
    attributes: dict[str, Attribute]


def verdicts(explanation: Explanation, *, tagger_floor: float = 0.0) -> Verdicts:
    """Return the verdicts of an explanation: a pure function of it. Skip items that are approximate in rewards.

    Args:
        explanation: of a query and an item.
        tagger_floor: least precision of the rules behind a value. A type whose values all come from a tagger with a conf
            under it is `unknown`, never `miss`: a doubtful tag must not cost an item its reward.
    """
    cuts = explanation.thresholds
    category: Category | None = None
    attributes: dict[str, Attribute] = {}
    for truth in explanation.types:
        if truth.type == explanation.category_type:
            category = "match" if truth.g >= cuts.match else "near" if truth.g >= cuts.near else "mismatch"
        elif truth.is_constrained and not truth.is_stated(tagger_floor):
            attributes[truth.type] = "unknown"
        elif truth.is_constrained:
            attributes[truth.type] = "ok" if truth.g >= cuts.ok else "miss"
    return Verdicts(category, attributes)


def explain(
    model: "EBRM", query: str, item: Item, *, query_types: Collection[str] = (), trial: Override | None = None
) -> Explanation:
    """Explain the relevance of an item to a query, with the overrides in force.

    Scores the none entity of every type besides the item's own entities, because it tells what the query asks for.

    Args:
        model: EBRM.
        query: as typed.
        item: the item.
        query_types: types that the query's own entities are known to name; they count as constrained.
        trial: an override to be looked at before it is added: everything is as if it were in force, `overrides` excepted.

    Raises:
        ValueError: as `EBRM.score`.
        ConfigError: the trial's type is not declared.
    """
    schema = model.config.schema
    packed = model.pack([item, Item(id=f"{item.id} without entities")])
    logits, stand_ins = model.entity_logits(query, packed)
    scores = model.score(query, packed.select(np.array([0])))
    matched = model.overrides.match(scores.query, trial)
    s_of = dict(zip(packed.distinct, _sigmoid(logits.astype(np.float64)).tolist(), strict=True))
    is_stand_in = dict(zip(packed.distinct, stand_ins.tolist(), strict=True))
    slots = [_slot(entities, s_of, matched) for entities in schema.slots(item.entities)]
    relaxation = model.pool.relaxation.detach().double().tolist()
    case = Case(
        truths=[np.array([s for _, s, _ in slot]) for slot in slots],
        relaxation=[1.0 if kind.hard else a for kind, a in zip(schema.types, relaxation, strict=True)],
        rules=[_type_rule(name, slot, matched) for name, slot in zip(schema.names, slots, strict=True)],
        logic=LOGICS[model.config.logic],
    )
    r, g, h = evaluate(case)
    slopes = slopes_of(case)
    types = []
    for position, (kind, slot) in enumerate(zip(schema.types, slots, strict=True)):
        s_none = _overruled(none_id(kind.name), s_of[none_id(kind.name)], matched)
        rule = case.rules[position]
        types.append(
            TypeTruth(
                type=kind.name,
                g=g[position],
                a=case.relaxation[position],
                log_h=float(np.log(max(h[position], MIN_TRUTH))),
                best=slot[int(np.argmax(case.truths[position]))][0].id,
                entities=tuple(
                    EntityTruth(
                        id=entity.id,
                        value=entity.value,
                        source=entity.source,
                        conf=entity.conf,
                        s=s,
                        slope=float(slopes[position][place]),
                        r_if_0=forced(case, position, place, 0.0),
                        r_if_1=forced(case, position, place, 1.0),
                        override=None if entity_rule is None else entity_rule.id,
                        is_approximate=is_stand_in[entity.id],
                    )
                    for place, (entity, s, entity_rule) in enumerate(slot)
                ),
                s_none=s_none,
                is_constrained=s_none < model.thresholds.constrained or kind.name in query_types,
                override=None if rule is None else rule.id,
            )
        )
    log_r = float(np.log(max(r, MIN_TRUTH)))
    calibrator = model.calibrator
    return Explanation(
        query=scores.query,
        item_id=item.id,
        r=r,
        log_r=log_r,
        logic=model.config.logic,
        types=tuple(types),
        overrides=scores.overrides,
        expired=scores.expired,
        is_approximate=bool(scores.approximate[0]),
        category_type=model.config.category_type,
        thresholds=model.thresholds,
        probability=None if calibrator is None else float(calibrator.probability(np.array([log_r]))[0]),
    )


class Case(NamedTuple):
    """An item in numbers: s per slot, a and the acting rule per type, and the logic."""

    truths: list[np.ndarray]
    relaxation: list[float]
    rules: list[Rule | None]
    logic: "LogicRules"


class LogicRules(NamedTuple):
    """OR and AND of truths [N], and their derivatives [N]."""

    or_of: Callable[[np.ndarray], float]
    and_of: Callable[[np.ndarray], float]
    or_slopes: Callable[[np.ndarray], np.ndarray]
    and_slopes: Callable[[np.ndarray], np.ndarray]


def evaluate(case: Case) -> tuple[float, list[float], list[float]]:
    """Return r, g [T] after overrides of types, and h [T]."""
    g = [case.logic.or_of(truths) for truths in case.truths]
    g = [
        value if rule is None else float(rule.apply(np.array(value))) for value, rule in zip(g, case.rules, strict=True)
    ]
    h = [1 - a * (1 - value) for a, value in zip(case.relaxation, g, strict=True)]
    return case.logic.and_of(np.array(h)), g, h


def slopes_of(case: Case) -> list[np.ndarray]:
    """Return dr/ds per slot."""
    _, g, h = evaluate(case)
    outer = case.logic.and_slopes(np.array(h))
    slopes = []
    for position, truths in enumerate(case.truths):
        inner = case.logic.or_slopes(truths)
        if case.rules[position] is not None and case.logic.or_of(truths) != g[position]:
            inner = np.zeros_like(inner)  # the rule holds g where it is
        slopes.append(outer[position] * case.relaxation[position] * inner)
    return slopes


def forced(case: Case, position: int, place: int, s: float) -> float:
    """Return r with one s put to a value."""
    truths = [slot.copy() for slot in case.truths]
    truths[position][place] = s
    return evaluate(case._replace(truths=truths))[0]


def others_product(values: np.ndarray) -> np.ndarray:
    """Return for each place the product of all other places [N], without dividing."""
    before = np.concatenate([[1.0], np.cumprod(values)[:-1]])
    after = np.concatenate([np.cumprod(values[::-1])[::-1][1:], [1.0]])
    return before * after


def _one_at(place: int, count: int) -> np.ndarray:
    return (np.arange(count) == place).astype(np.float64)


LOGICS = {
    "product": LogicRules(
        or_of=lambda s: float(1 - np.prod(1 - s)),
        and_of=lambda h: float(np.prod(h)),
        or_slopes=lambda s: others_product(1 - s),
        and_slopes=others_product,
    ),
    "goedel": LogicRules(
        or_of=lambda s: float(s.max()),
        and_of=lambda h: float(h.min()),
        or_slopes=lambda s: _one_at(int(s.argmax()), len(s)),
        and_slopes=lambda h: _one_at(int(h.argmin()), len(h)),
    ),
    "lukasiewicz": LogicRules(
        or_of=lambda s: float(min(1.0, s.sum())),
        and_of=lambda h: float(max(0.0, 1 - (1 - h).sum())),
        or_slopes=lambda s: np.full(len(s), float(s.sum() < 1)),
        and_slopes=lambda h: np.full(len(h), float((1 - h).sum() < 1)),
    ),
}


def _slot(
    entities: tuple[Entity, ...], s_of: dict[str, float], matched: Matched
) -> list[tuple[Entity, float, Rule | None]]:
    """Return (entity, s after confidence and override, rule that acts on it) of one slot."""
    none = none_id(entities[0].type)
    s_none = _overruled(none, s_of[none], matched)
    return [
        (
            entity,
            _overruled(entity.id, entity.conf * s_of[entity.id] + (1 - entity.conf) * s_none, matched),
            matched.entities.get(entity.id),
        )
        for entity in entities
    ]


def _overruled(entity: str, s: float, matched: Matched) -> float:
    rule = matched.entities.get(entity)
    return s if rule is None else float(rule.apply(np.array(s)))


def _type_rule(name: str, slot: list[tuple[Entity, float, Rule | None]], matched: Matched) -> Rule | None:
    rule = matched.types.get(name)
    others = [entity_rule for _, _, entity_rule in slot if entity_rule is not None]
    return rule if rule is not None and rule.beats(others) else None


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logits))
