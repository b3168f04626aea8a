"""AUC per group, averaged: how well each user's (or query's) own rows are ordered.

    GAUC = sum_g n_g AUC_g / sum_g n_g      over groups that have both classes;   n_g = rows of g (sum of their weights)

A group is known by its int64 id and may span batches and ranks. Rows are kept (24 bytes) until `compute`, in bounded memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from recis.metrics.auc import signed_rows
from recis.metrics.exact_sum import ExactSum
from recis.metrics.metric import Metric, Rows
from recis.metrics.pairs import auc_of, close_pass, fold_groups, new_carry, packed_counts
from recis.metrics.runs import SortedRuns


@dataclass
class Gauc(Metric):
    """Row-weighted mean AUC of the groups with both classes, ties half; NaN when there is no such group."""

    memory_mib: int = 512
    """Memory for rows; beyond it sorted runs go to the temporary folder."""

    uses_weights: ClassVar[bool] = True
    uses_groups: ClassVar[bool] = True

    @property
    def key(self) -> str:
        return "gauc"

    def reset(self) -> None:
        columns = (("group", np.int64), ("score", np.float64), ("signed_weight", np.float64))
        self._runs = SortedRuns(columns, memory_mib=self.memory_mib)

    def compute(self) -> float:
        above, below = ExactSum(), ExactSum()
        for _, counts in self._counts():
            auc = auc_of(counts)
            weight = counts[:, 0] + counts[:, 1]
            both = ~np.isnan(auc)
            above.add(weight[both] * auc[both])
            below.add(weight[both])
        total = below.value()
        return above.value() / total if total else float("nan")

    def per_group(self) -> dict[str, Tensor]:
        """Return per group, [G]: `group` int64 ascending, `weight` (sum over its rows), `auc` (NaN with one class)."""
        parts = list(self._counts())
        groups = np.concatenate([groups for groups, _ in parts]) if parts else np.empty(0, np.int64)
        counts = np.concatenate([counts for _, counts in parts]) if parts else np.empty((0, 3))
        order = np.argsort(groups)
        columns = {"group": groups, "weight": counts[:, 0] + counts[:, 1], "auc": auc_of(counts)}
        return {name: torch.from_numpy(column[order]) for name, column in columns.items()}

    def _counts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (groups [G], positive weight, negative weight and wins [G, 3]), each group once."""
        if not self._runs.is_spilled:
            packed = packed_counts(*self._runs.buffered())
            if packed is not None:
                yield packed
                return
        carry, open_group = new_carry(), np.zeros(2, np.int64)
        for columns in self._runs.sorted():
            groups, counts = np.empty(len(columns[0]), np.int64), np.empty((len(columns[0]), 3))
            ended = fold_groups(*columns, carry, open_group, groups, counts)
            yield groups[:ended], counts[:ended]
        if open_group[1]:
            yield open_group[:1], close_pass(carry)[None]

    def _add(self, rows: Rows) -> None:
        self._runs.append(signed_rows(rows))

    def _merge(self, other: Self) -> None:
        self._runs.extend(other._runs)

    def _state(self) -> dict[str, Any]:
        return self._runs.export()

    def _load(self, state: Mapping[str, Any]) -> None:
        self._runs.load(dict(state))
