"""Labels of (query, entity) pairs from queries and click logs alone: stage A of training.

    mention         the query names e -> 1; it names another value of e's type -> 0                        w = 1
    clicks          per query and type, see `click_rows`                                                   w = min(1, n / 100)
    unconstrained   clicks spread over all values of a type -> all of them 1                               w = 0.5
    free            the query names no value of the type -> values of its candidates 1                     w = 0.5
    none            the query constrains the type -> share of relevant pairs among items that state no value, w = 1
                    else 1                                                                                 w = 0.5

Of a type that shoppers always mean, such as the category, silence frees nothing: "smeg fab5" wants a fridge. Its values get
rows from mentions and clicks alone.

Without the rows of free types a scorer sees real values almost only where they are refused, and learns that a brand, asked
for or not, is refused.

No label of a (query, item) pair is used, but for the shares of the last rule, which come from the train part. The rules and
their thresholds are this project's; that such labels can be had from logs is the idea of arXiv:2307.00370.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from recis.ebrm.entities import none_id, type_of
from recis.errors import DataError

SOURCES = ("mention", "clicks", "human")
MIN_CLICKS, MIN_SHARE, MIN_LIFT = 5, 0.30, 2.0
MIN_RIVAL_SHARE, MIN_IMPRESSIONS, MAX_RATE_RATIO, QUANTILE = 0.50, 20, 0.35, 0.95
PRIOR_MEAN, PRIOR_STRENGTH = 0.05, 20.0
MAX_SPREAD_SHARE, MIN_ENTROPY = 0.30, 0.80
FULL_WEIGHT_IMPRESSIONS, WEAK_WEIGHT = 100, 0.5
MAX_OTHERS, MAX_FREE = 6, 3  # values per query and type: more teach little and cost a pass of the encoder each


@dataclass(frozen=True, slots=True, kw_only=True)
class QERow:
    """One labelled (query, entity) pair."""

    query: str
    entity: str
    """Entity id."""
    y: float
    """Whether a shopper who typed the query accepts the entity; a soft label in [0, 1]."""
    w: float = 1.0
    """Weight, above 0."""
    src: str = "human"

    def __post_init__(self) -> None:
        if not 0 <= self.y <= 1:
            raise DataError(f"qe row {self.query!r}, {self.entity!r}: y must lie in [0, 1]", value=self.y)
        if not 0 < self.w < math.inf:
            raise DataError(
                f"qe row {self.query!r}, {self.entity!r}: w must be above 0 and finite",
                value=self.w,
                option="drop the row",
            )
        if self.src not in SOURCES:
            raise DataError(f"qe row {self.query!r}: src must be one of {', '.join(SOURCES)}", value=self.src)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityClicks:
    """What the log says of one value of a type under one query."""

    entity: str
    impressions: int
    clicks: int
    background_share: float
    """Share of the value's clicks among all clicks in the leaf category, whatever the query, in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.clicks <= self.impressions:
            raise DataError(
                f"entity {self.entity!r}: clicks must lie in [0, impressions]", value=(self.clicks, self.impressions)
            )

    @property
    def rate(self) -> float:
        """Clicks per impression; 0 without impressions."""
        return self.clicks / self.impressions if self.impressions else 0.0

    @property
    def highest_rate(self) -> float:
        """95th percentile of the rate's posterior, Beta(1 + c, 19 + n - c)."""
        a = PRIOR_MEAN * PRIOR_STRENGTH + self.clicks
        b = (1 - PRIOR_MEAN) * PRIOR_STRENGTH + self.impressions - self.clicks
        return beta_quantile(QUANTILE, a, b)


def mention_rows(query: str, mentioned: Mapping[str, Iterable[str]], candidates: Iterable[str]) -> list[QERow]:
    """Return positives for what a query names and hard negatives for other values of those types.

    Args:
        query: text.
        mentioned: type -> entity ids that the query names, in any spelling.
        candidates: entity ids that negatives are taken from, such as those of the query's items; `none` ids are left out.
    """
    named = {kind: tuple(dict.fromkeys(ids)) for kind, ids in mentioned.items()}
    rows = [QERow(query=query, entity=entity, y=1.0, src="mention") for ids in named.values() for entity in ids]
    for entity in dict.fromkeys(candidates):
        kind = type_of(entity)
        if named.get(kind) and entity not in named[kind] and entity != none_id(kind):
            rows.append(QERow(query=query, entity=entity, y=0.0, src="mention"))
    return rows


def free_rows(
    query: str, mentioned: Iterable[str], candidates: Iterable[str], always_meant: Iterable[str] = ()
) -> list[QERow]:
    """Return weak positives for values of types that a query names nothing of.

    Args:
        query: text.
        mentioned: types that the query names a value of.
        candidates: entity ids, such as those of the query's items; `none` ids are left out, `none_rows` has them.
        always_meant: types that are never free.
    """
    named = {*mentioned, *always_meant}
    free = [e for e in dict.fromkeys(candidates) if type_of(e) not in named and e != none_id(type_of(e))]
    return [QERow(query=query, entity=entity, y=1.0, w=WEAK_WEIGHT, src="mention") for entity in free]


def thinned(candidates: Iterable[str], mentioned: Mapping[str, Iterable[str]], rng: random.Random) -> list[str]:
    """Return named candidates, and of each type at most MAX_OTHERS others, MAX_FREE where the query names none; any order."""
    named = {entity for ids in mentioned.values() for entity in ids}
    others: dict[str, list[str]] = {}
    kept = []
    for entity in dict.fromkeys(candidates):
        if entity in named:
            kept.append(entity)
        else:
            others.setdefault(type_of(entity), []).append(entity)
    for kind, ids in others.items():
        count = MAX_OTHERS if mentioned.get(kind) else MAX_FREE
        kept += ids if len(ids) <= count else rng.sample(ids, count)
    return kept


def click_rows(query: str, values: Sequence[EntityClicks]) -> list[QERow]:
    """Return the labels that clicks give the values of one type under one query; undecided values give no row.

    share = c / sum c,  lift = share / background share
    positive   c >= 5, share >= 0.30, lift >= 2
    negative   another value has share >= 0.50, n >= 20, and the 95th percentile of Beta(1 + c, 19 + n - c) is below
               0.35 of the best value's raw rate
    all weak positives   no share reaches 0.3 and the entropy of the shares is above 0.8 of its maximum
    """
    total = sum(value.clicks for value in values)
    if not total:
        return []
    shares = [value.clicks / total for value in values]
    if max(shares) < MAX_SPREAD_SHARE and _normalised_entropy(shares) > MIN_ENTROPY:
        return [
            QERow(query=query, entity=v.entity, y=1.0, w=WEAK_WEIGHT, src="clicks") for v in values if v.impressions
        ]
    best = max(range(len(values)), key=lambda at: shares[at])
    rows = []
    for at, value in enumerate(values):
        lift = shares[at] / value.background_share if value.background_share > 0 else math.inf
        positive = value.clicks >= MIN_CLICKS and shares[at] >= MIN_SHARE and lift >= MIN_LIFT
        has_rival = best != at and shares[best] >= MIN_RIVAL_SHARE and value.impressions >= MIN_IMPRESSIONS
        negative = has_rival and value.highest_rate < MAX_RATE_RATIO * values[best].rate
        if positive or negative:
            w = min(1.0, value.impressions / FULL_WEIGHT_IMPRESSIONS)
            rows.append(QERow(query=query, entity=value.entity, y=float(positive), w=w, src="clicks"))
    return rows


def none_rows(
    query: str,
    constrained: Iterable[str],
    types: Iterable[str],
    shares: Mapping[str, float],
    always_meant: Iterable[str] = (),
) -> list[QERow]:
    """Return a row for `<type>:none` of each type.

    Args:
        query: text.
        constrained: types that the query constrains.
        types: all types.
        shares: type -> share of relevant pairs among items that state no value while the query constrains the type, from
            `none_shares`; a constrained type that is not in it gives no row.
        always_meant: types that are constrained whether the query names them or not.
    """
    asked = {*constrained, *always_meant}
    rows = []
    for kind in types:
        if kind not in asked:
            rows.append(QERow(query=query, entity=none_id(kind), y=1.0, w=WEAK_WEIGHT, src="mention"))
        elif kind in shares:
            rows.append(QERow(query=query, entity=none_id(kind), y=shares[kind], src="mention"))
    return rows


def none_shares(pairs: Iterable[tuple[Iterable[str], Iterable[str], int]]) -> dict[str, float]:
    """Return type -> share of relevant train pairs among those whose query constrains the type and whose item states none.

    Args:
        pairs: constrained types, types that the item states, 1 for a relevant pair; of the train part alone.
    """
    counts: dict[str, tuple[int, int]] = {}
    for constrained, stated, label in pairs:
        for kind in set(constrained) - set(stated):
            num, relevant = counts.get(kind, (0, 0))
            counts[kind] = (num + 1, relevant + int(label))
    return {kind: relevant / num for kind, (num, relevant) in sorted(counts.items())}


def _normalised_entropy(shares: Sequence[float]) -> float:
    if len(shares) < 2:
        return 0.0
    return -sum(share * math.log(share) for share in shares if share > 0) / math.log(len(shares))


@lru_cache(maxsize=1 << 16)
def beta_quantile(p: float, a: float, b: float) -> float:
    """Return the x with P(Beta(a, b) <= x) = p, to about 1e-12, by bisection.

    Raises:
        ValueError: p outside (0, 1), or a or b not above 0.
    """
    if not 0 < p < 1 or a <= 0 or b <= 0:
        raise ValueError(f"beta_quantile needs p in (0, 1) and a, b above 0; got {p}, {a}, {b}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if beta_cdf(middle, a, b) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return P(Beta(a, b) <= x): the regularised incomplete beta function, by its continued fraction.

    Source of the fraction: DLMF 8.17.22; it converges fast for x < (a + 1) / (a + b + 2), else the complement is taken.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction = 1.0
    for m in range(_fraction_terms(a, b), 0, -1):  # from the innermost term outwards
        half = m // 2
        if m % 2:
            d = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            d = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        fraction = 1 + d / fraction
    return math.exp(log_front) / (a * fraction)


def _fraction_terms(a: float, b: float) -> int:
    return 60 + 4 * math.isqrt(math.ceil(max(a, b)))  # terms shrink after about sqrt(max(a, b)) of them
