"""How often PriceRunner titles state, or contradict, what their cluster's label says; measured beside what was expected.

A constraint that titles rarely state could not be learned from them; these shares decided which constraints are asked for.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recis.ebrm.pricerunner import Task
from recis.ebrm.pricerunner_labels import LabelFacts, model_forms
from recis.ebrm.pricerunner_split import groups
from recis.ebrm.pricerunner_text import codes_match, inches, squash
from recis.ebrm.pricerunner_titles import TitleFacts

# what, of whom, expected share stated, expected share contradicted: dev and test titles of the public sample
EXPECTED = (
    ("a known brand", "all titles", 0.942, 0.006),
    ("a model or series phrase", "all titles", 0.950, None),
    ("label's model string or code", "all titles", 0.871, None),
    ("model entity agrees with the label", "all titles", 0.795, None),
    ("model entity agrees with the label", "Mobile Phones", 0.75, None),
    ("model entity agrees with the label", "CPUs", 0.71, None),
    ("model entity agrees with the label", "Digital Cameras", 0.69, None),
    ("colour", "labels with one", 0.565, 0.033),
    ("form", "labels with one", 0.683, 0.000),
    ("capacity", "labels with one", 0.803, 0.025),
    ("speed", "labels with one", 0.838, 0.065),
    ("size", "labels with one", None, None),
    ("size written as inches", "labels with one", 0.275, 0.001),
    ("lens", "labels with one", None, None),
    ("two kinds of entity or more", "all titles", 0.961, None),
)
Row = tuple[LabelFacts, TitleFacts, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """One line of the table; shares in [0, 1]."""

    what: str
    of: str
    num_titles: int
    stated: float
    contradicted: float
    expected: float | None
    expected_contradicted: float | None


def coverage(task: Task, parts: Sequence[str]) -> list[Coverage]:
    """Return one line per entry of EXPECTED, measured on the offers of some parts."""
    offers = task.catalogue.offers
    rows: list[Row] = [
        (task.facts[offers[n].cluster_id], task.titles[n], offers[n].title) for p in parts for n in task.parts[p].offers
    ]
    out = []
    for what, of, expected, expected_contradicted in EXPECTED:
        own = [row for row in rows if of == "all titles" or row[0].category == of or _has(row[0], what)]
        says = [_says(what, *row) for row in own]
        out.append(
            Coverage(
                what=what,
                of=of,
                num_titles=len(own),
                stated=_share(word == "stated" for word in says),
                contradicted=_share(word == "differs" for word in says),
                expected=expected,
                expected_contradicted=expected_contradicted,
            )
        )
    return out


def counts(task: Task) -> dict[str, tuple[float, float]]:
    """Return name -> (measured, expected) of the whole public sample with the default numbers of queries."""
    catalogue, group_of = task.catalogue, groups(task.catalogue)
    generic = catalogue.generic_titles()
    sizes = Counter(group_of[offer.cluster_id] for offer in catalogue.offers)
    out = {
        "offers": (len(catalogue.offers), 28_384),
        "clusters": (len(catalogue.labels), 10_774),
        "generic titles": (len(generic), 90),
        "share of offers with a generic title": (_share(own.title in generic for own in catalogue.offers), 0.023),
        "groups": (len(sizes), 9_670),
        "largest group, offers (under)": (max(sizes.values()), 50),
    }
    for name, expected_offers, expected_clusters in (
        ("train", 19_800, 7_500),
        ("dev", 4_500, 1_650),
        ("test", 4_100, 1_600),
    ):
        part = task.parts[name]
        out[f"{name} offers"] = (len(part.offers), expected_offers)
        out[f"{name} clusters"] = (len(part.clusters), expected_clusters)
    part = task.parts["test"]
    pairs = part.pairs
    num_queries = max(1, len(part.queries))
    out["test pairs per query"] = (len(pairs) / num_queries, 15.5)
    for grade, share, visible in ((4, 0.27, 0.79), (3, 0.11, 0.63), (2, 0.37, 0.92), (1, 0.25, 1.0)):
        out[f"test share of grade {grade}"] = (float(np.mean(pairs.grade == grade)), share)
        out[f"test visible of grade {grade}"] = (_share(pairs.visible[pairs.grade == grade].tolist()), visible)
    out["test visible"] = (float(pairs.visible.mean()), 0.87)
    out["test queries with a grade 3"] = (len(np.unique(pairs.query[pairs.grade == 3])) / num_queries, 0.25)
    for kind, share in (("model", 0.41), ("attribute", 0.56), ("series", 0.03)):
        out[f"test {kind} queries"] = (_share(query.kind == kind for query in part.queries), share)
    return out


def counts_table(found: Mapping[str, tuple[float, float]]) -> str:
    """Return the counts as text, measured beside expected."""
    return "\n".join(f"{name:40} {measured:>10.5g} {expected:>10.5g}" for name, (measured, expected) in found.items())


def coverage_table(lines: Iterable[Coverage]) -> str:
    """Return the lines as text, measured beside expected, in percent."""
    out = [f"{'what':36} {'of':16} {'titles':>7} {'stated':>7} {'(exp.)':>7} {'contra.':>8} {'(exp.)':>7}"]
    for line in lines:
        shares = (line.stated, line.expected, line.contradicted, line.expected_contradicted)
        stated, expected, contradicted, also = ("-" if share is None else f"{100 * share:.1f}" for share in shares)
        out.append(
            f"{line.what:36} {line.of:16} {line.num_titles:7} {stated:>7} {expected:>7} {contradicted:>8} {also:>7}"
        )
    return "\n".join(out)


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return float(np.mean(found)) if found else float("nan")


def _has(fact: LabelFacts, what: str) -> bool:
    return what.split()[0] in fact.secondary


def _says(what: str, fact: LabelFacts, title: TitleFacts, normal: str) -> str:
    checks: dict[str, Callable[[], str]] = {
        "a known brand": lambda: _brand(fact, title),
        "a model or series phrase": lambda: _yes(bool(title.models or title.series)),
        "label's model string or code": lambda: _yes(title.says("model", (fact.model,)) == "stated"),
        "model entity agrees with the label": lambda: _yes(_agrees(fact, title)),
        "size written as inches": lambda: _written(fact, normal),
        "two kinds of entity or more": lambda: _yes(_num_kinds(title) > 1),
    }
    return checks[what]() if what in checks else title.says(what, (fact.secondary[what],))


def _yes(hit: bool) -> str:
    return "stated" if hit else "silent"


def _brand(fact: LabelFacts, title: TitleFacts) -> str:
    return "differs" if title.says("brand", fact.brands) == "differs" else _yes(bool(title.brands))


def _agrees(fact: LabelFacts, title: TitleFacts) -> bool:
    return any(codes_match(form, squash(own)) for form in model_forms(fact.model) for own in title.models)


def _written(fact: LabelFacts, normal: str) -> str:
    written = inches(normal)
    return "stated" if fact.secondary["size"] in written else "differs" if written else "silent"


def _num_kinds(title: TitleFacts) -> int:
    kinds = {name for name, values in title.secondary.items() if values} | {name for name, _ in title.extras}
    return len(kinds) + sum(map(bool, (title.brands, title.models, title.series)))
