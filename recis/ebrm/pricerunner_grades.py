"""Grades of (query, cluster) pairs of the PriceRunner task, and whether a title lets anybody see the grade.

    1  another category
    4  the query's own cluster, or all constraints met
    2  brand, model or series differs, or two secondary constraints do
    3  exactly one secondary constraint differs and nothing else
    0  no grade: the label lacks a brand or a secondary value that the query constrains; the pair is dropped

Grades come from labels. Visible: for grade 4 the title states every constraint, for 2 and 3 it states a value that differs
in a constraint that the label misses; other categories are always visible, the category is an input of every model.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from recis.ebrm.pricerunner_labels import SECONDARY, LabelFacts
from recis.ebrm.pricerunner_queries import Constraints
from recis.ebrm.pricerunner_text import noun_of, squash
from recis.ebrm.pricerunner_titles import TitleFacts

DROPPED, OTHER_CATEGORY, CONTRADICTED, NEARLY, MET = 0, 1, 2, 3, 4
_MISSING = -1


class GradeTable:
    """The label facts of C clusters as numbers, so that one query is graded against all of them at once."""

    def __init__(self, clusters: Sequence[int], facts: Mapping[int, LabelFacts]) -> None:
        self.clusters = np.array(clusters, dtype=np.int64)
        own = [facts[cluster] for cluster in clusters]
        self._codes: dict[str, dict[str, int]] = {}
        self._columns = {
            "category": self._column("category", [noun_of(fact.category) for fact in own])[:, None],
            "model": self._column("model", [squash(fact.model) for fact in own])[:, None],
            "series": self._column("series", [fact.series for fact in own])[:, None],
            "brand": np.stack(
                [
                    self._column("brand", [fact.brands[n] if n < len(fact.brands) else None for fact in own])
                    for n in (0, 1)
                ],
                axis=1,
            ),
        }
        for name in SECONDARY:
            self._columns[name] = self._column(name, [fact.secondary.get(name) for fact in own])[:, None]

    def _column(self, name: str, values: Sequence[str | None]) -> np.ndarray:
        codes = self._codes.setdefault(name, {})
        return np.array([_MISSING if not v else codes.setdefault(v, len(codes)) for v in values], dtype=np.int64)

    def grades(self, constraints: Constraints, own_cluster: int | None) -> np.ndarray:
        """Return int8 [C], 0 where a pair has no grade.

        Args:
            constraints: with "category".
            own_cluster: the cluster that the query was drawn from; None for a query that was not drawn.
        """
        unmet = {name: ~self._meets(name, values) for name, values in constraints.items()}
        num_secondary = sum((unmet[name].astype(np.int64) for name in SECONDARY if name in unmet), np.int64(0))
        hard = np.zeros(len(self.clusters), dtype=bool)
        for name in ("brand", "model", "series"):
            hard |= unmet.get(name, False)
        out = np.select([hard | (num_secondary > 1), num_secondary == 1], [CONTRADICTED, NEARLY], MET).astype(np.int8)
        for name in ("brand", *SECONDARY):
            if name in constraints:
                out[(self._columns[name] == _MISSING).all(1)] = DROPPED
        out[unmet["category"]] = OTHER_CATEGORY
        if own_cluster is not None:
            out[self.clusters == own_cluster] = MET
        return out

    def _meets(self, name: str, values: Sequence[str]) -> np.ndarray:
        codes = self._codes.get(name, {})
        wanted = [codes.get(squash(value) if name == "model" else value, _MISSING - 1) for value in values]
        column = self._columns[name]
        out = np.zeros(len(column), dtype=bool)
        for code in wanted:
            out |= (column == code).any(1)
        return out


def grade(constraints: Constraints, fact: LabelFacts) -> int:
    """Return the grade of one cluster for a query that was not drawn from it; 0 when the pair has none."""
    return int(GradeTable([0], {0: fact}).grades(constraints, None)[0])


def is_visible(constraints: Constraints, value: int, fact: LabelFacts, title: TitleFacts) -> bool:
    """Return whether the title alone shows why the pair has this grade."""
    if value == OTHER_CATEGORY:
        return True
    named = {name: values for name, values in constraints.items() if name != "category"}
    if value == MET:
        return all(title.says(name, values) == "stated" for name, values in named.items())
    return any(title.says(name, values) == "differs" for name, values in named.items() if _differs(name, values, fact))


def _differs(name: str, values: Sequence[str], fact: LabelFacts) -> bool:
    """Return whether a label misses a constraint."""
    if name == "model":
        return squash(fact.model) not in {squash(value) for value in values}
    own = {"brand": fact.brands, "series": (fact.series,)}.get(name, (fact.secondary.get(name),))
    return not set(own) & set(values)
