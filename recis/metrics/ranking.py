"""Metrics of ranked lists: one list per group (query or user), rows in descending order of score.

    Recall@k  = relevant rows in the top k / min(k, relevant rows)        mean over groups
    NDCG@k    = DCG@k / DCG@k of the best order                           mean over groups
    DCG@k     = sum over ranks r <= k of (2^rel - 1) / log2(r + 1)
    HitRate@k = share of groups with a relevant row in the top k
    MRR       = mean over groups of 1 / rank of the first relevant row

A row is relevant when its label is above 0; groups without a relevant row have no value and count in no mean. A group may
span batches and ranks. Ties in score keep input order: the order of update calls in one process. Where two merged ranks both
hold rows of one group, tied rows go by their number on their own rank, then by label, least relevant first, so that merging
in any order gives the same. Rows are kept (32 bytes) until `compute`, in bounded memory except that one whole group is held
at a time.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from recis.errors import ConfigError
from recis.metrics.exact_sum import ExactSum
from recis.metrics.metric import Metric, Rows
from recis.metrics.runs import Columns, SortedRuns

MAX_GAIN_LABEL = 1000.0  # 2^1000 is near the end of float64


@dataclass
class _RankingMetric(Metric):
    """Keeps (group, -score, row number, label), so that sorting puts each group's rows in rank order."""

    memory_mib: int = field(default=512, kw_only=True)
    """Memory for rows; beyond it sorted runs go to the temporary folder."""

    uses_groups: ClassVar[bool] = True

    def reset(self) -> None:
        columns = (("group", np.int64), ("minus_score", np.float64), ("number", np.int64), ("label", np.float64))
        self._runs = SortedRuns(columns, memory_mib=self.memory_mib)
        self._next_number = 0

    def compute(self) -> float:
        total, num_groups = ExactSum(), 0
        for groups, _, _, labels in self._whole_groups():
            starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
            ranks = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups)))) + 1
            relevant = np.add.reduceat((labels > 0).astype(np.int64), starts)
            values = self._values(ranks, labels, starts, relevant)[relevant > 0]
            total.add(values)
            num_groups += len(values)
        return total.value() / num_groups if num_groups else math.nan

    @abstractmethod
    def _values(self, ranks: np.ndarray, labels: np.ndarray, starts: np.ndarray, relevant: np.ndarray) -> np.ndarray:
        """Return each group's value [G]; rows [N] in rank order, ranks from 1, starts [G], relevant rows per group [G]."""

    def _whole_groups(self) -> Iterator[Columns]:
        """Yield sorted rows so that no group is cut."""
        held: Columns | None = None
        for rows in self._runs.sorted():
            columns = rows if held is None else tuple(np.concatenate(pair) for pair in zip(held, rows, strict=True))
            last = (
                int(np.searchsorted(columns[0], columns[0][-1])) if len(columns[0]) else 0
            )  # the last group may go on
            if last:
                yield tuple(column[:last] for column in columns)
            held = tuple(column[last:] for column in columns)
        if held is not None and len(held[0]):
            yield held

    def _check_labels(self, label: np.ndarray) -> None:
        bad = ~((label >= 0) & (label <= MAX_GAIN_LABEL))
        rule = f"a relevance must lie in [0, {MAX_GAIN_LABEL:g}]"
        self._refuse(bad, "label", label, rule, "map it in the data")

    def _add(self, rows: Rows) -> None:
        assert rows.group is not None
        numbers = np.arange(self._next_number, self._next_number + rows.score.size)
        self._next_number += rows.score.size
        self._runs.append((rows.group.copy(), 0.0 - rows.score, numbers, rows.label.astype(np.float64)))

    def _merge(self, other: Self) -> None:
        self._runs.extend(other._runs)
        self._next_number = max(self._next_number, other._next_number)

    def _state(self) -> dict[str, Any]:
        return {"next_number": self._next_number, **self._runs.export()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._runs.load(dict(state))
        self._next_number = int(state["next_number"])


@dataclass
class _TopK(_RankingMetric):
    k: int
    """Length of the list that is looked at."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"{type(self).__name__}: k must be at least 1; got {self.k}")
        self.reset()


@dataclass
class Recall(_TopK):
    """Relevant rows in the top k over min(k, relevant rows), mean over groups that have one."""

    @property
    def key(self) -> str:
        return f"recall@{self.k}"

    def _values(self, ranks: np.ndarray, labels: np.ndarray, starts: np.ndarray, relevant: np.ndarray) -> np.ndarray:
        hits = np.add.reduceat(((labels > 0) & (ranks <= self.k)).astype(np.int64), starts)
        return hits / np.minimum(self.k, relevant.clip(min=1))


@dataclass
class Ndcg(_TopK):
    """Discounted gain of the top k over that of the best order, mean over groups that have a relevant row."""

    @property
    def key(self) -> str:
        return f"ndcg@{self.k}"

    def _values(self, ranks: np.ndarray, labels: np.ndarray, starts: np.ndarray, relevant: np.ndarray) -> np.ndarray:
        group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(ranks))))
        best = labels[np.lexsort((-labels, group))]
        discount = np.where(ranks <= self.k, 1.0 / np.log2(ranks + 1.0), 0.0)
        gained = np.add.reduceat((np.exp2(labels) - 1.0) * discount, starts)
        possible = np.add.reduceat((np.exp2(best) - 1.0) * discount, starts)
        return np.divide(gained, possible, out=np.zeros(len(starts)), where=possible > 0)


@dataclass
class HitRate(_TopK):
    """Share of groups, among those with a relevant row, that have one in the top k."""

    @property
    def key(self) -> str:
        return f"hit_rate@{self.k}"

    def _values(self, ranks: np.ndarray, labels: np.ndarray, starts: np.ndarray, relevant: np.ndarray) -> np.ndarray:
        return np.logical_or.reduceat((labels > 0) & (ranks <= self.k), starts).astype(np.float64)


@dataclass
class Mrr(_RankingMetric):
    """Mean of 1 / rank of the first relevant row, over groups that have one."""

    @property
    def key(self) -> str:
        return "mrr"

    def _values(self, ranks: np.ndarray, labels: np.ndarray, starts: np.ndarray, relevant: np.ndarray) -> np.ndarray:
        return np.maximum.reduceat(np.where(labels > 0, 1.0 / ranks, 0.0), starts)
