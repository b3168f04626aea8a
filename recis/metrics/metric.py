"""What every metric is: update, merge, compute, save; and the checks that all inputs pass first.

    update(scores [N], labels [N], weights [N] | None, groups [N] | None)    any number of times, N = 0 included
    merge(other)      as if the other's rows had been seen here; any order, any split gives the same bytes
    compute()         the value so far, a float; NaN where the definition has none (no rows, one class)
    state_dict()      tensors and JSON values; load_state_dict of it restores equal bytes

A metric is a dataclass: its fields are its settings, its rows are not fields. So `Recall(k=20)` compares, prints and
serialises as its settings alone, and `fresh()` gives an empty one. Accumulation is float64 or wider throughout.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from recis.errors import DataError


@dataclass
class Metric(ABC):
    """Base of all metrics; see the file's text for the contract."""

    uses_weights: ClassVar[bool] = False
    """Whether update takes weights; without them every row counts 1."""
    uses_groups: ClassVar[bool] = False
    """Whether update needs groups: int64 ids of the query or user of each row."""
    binary_labels: ClassVar[bool] = True
    """Whether labels must be 0 or 1."""
    probabilities: ClassVar[bool] = False
    """Whether scores must lie in [0, 1]; else any number that is not NaN will do."""

    def __post_init__(self) -> None:
        self.reset()

    @property
    @abstractmethod
    def key(self) -> str:
        """Name of the value in logs and JSON, flat snake case ("recall@20")."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all rows."""

    @abstractmethod
    def compute(self) -> float:
        """Return the value over all rows so far."""

    @abstractmethod
    def _add(self, rows: "Rows") -> None: ...

    @abstractmethod
    def _merge(self, other: Any) -> None: ...

    @abstractmethod
    def _state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load(self, state: Mapping[str, Any]) -> None: ...

    def update(
        self,
        scores: Tensor | np.ndarray,
        labels: Tensor | np.ndarray,
        weights: Tensor | np.ndarray | None = None,
        groups: Tensor | np.ndarray | None = None,
    ) -> None:
        """Take N more rows; tensors on a GPU are copied to the CPU.

        Args:
            scores: [N] floating point; higher = more relevant, a probability where the metric needs one.
            labels: [N]; 0 or 1, or whatever range the metric states.
            weights: [N] finite, >= 0; None = all 1. A row of weight 0 counts for nothing.
            groups: [N] int64 ids.

        Raises:
            DataError: a score is NaN or outside its range, a label or a weight outside its range: row and value named.
            ValueError: lengths differ, groups are missing, or weights are given to a metric that has no use for them.
        """
        self._add(self._check(scores, labels, weights, groups))

    def merge(self, other: Self) -> None:
        """Take all rows of another metric with equal settings, which stays as it is.

        Raises:
            ValueError: the other is this very metric, of another kind, or has other settings.
        """
        if other is self:
            raise ValueError(f"cannot merge {self!r} into itself: its rows would count twice")
        if type(other) is not type(self) or other._settings() != self._settings():
            raise ValueError(f"cannot merge {other!r} into {self!r}: both must have the same kind and settings")
        self._merge(other)

    def fresh(self) -> Self:
        """Return an empty metric with the same settings."""
        return replace(self)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and JSON values that hold all rows; equal rows in any order give equal bytes."""
        return {"kind": type(self).__name__, "settings": self._settings(), **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all rows by those of a state_dict.

        Raises:
            ValueError: it belongs to a metric of another kind or with other settings.
        """
        if state.get("kind") != type(self).__name__ or state.get("settings") != self._settings():
            raise ValueError(
                f"state of {state.get('kind')} with {state.get('settings')} does not fit {self!r}; "
                "give the metric the settings it was saved with"
            )
        self._load(state)

    def _settings(self) -> dict[str, Any]:
        """Settings that change the value; how much memory may be used does not."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "memory_mib"}

    def _check(self, scores: Any, labels: Any, weights: Any, groups: Any) -> "Rows":
        score = _column(scores, "scores", torch.float64)
        label = _column(labels, "labels", None)
        if label.size != score.size:
            raise ValueError(f"{self.key}: {score.size} scores need as many labels; got {label.size}")
        self._refuse(np.isnan(score), "score", score, "a score must be a number", "look for NaN in the model's output")
        if self.probabilities:
            outside = (score < 0) | (score > 1)
            self._refuse(outside, "score", score, "a score must be a probability in [0, 1]", "apply sigmoid to logits")
        self._check_labels(label)
        weight = None
        if weights is not None:
            if not self.uses_weights:
                raise ValueError(f"{self.key} has no weighted form: call update without weights")
            weight = _column(weights, "weights", torch.float64)
            if weight.size != score.size:
                raise ValueError(f"{self.key}: {score.size} scores need as many weights; got {weight.size}")
            bad = ~((weight >= 0) & (weight < np.inf))
            self._refuse(bad, "weight", weight, "a weight must be finite and not negative", "use 0 to leave a row out")
        group = None
        if self.uses_groups:
            if groups is None:
                raise ValueError(f"{self.key} needs groups: pass int64 ids of the query or user of each row")
            if torch.as_tensor(groups).is_floating_point():
                raise ValueError(f"{self.key}: groups must be integers; got {torch.as_tensor(groups).dtype}")
            group = _column(groups, "groups", torch.int64)
            if group.size != score.size:
                raise ValueError(f"{self.key}: {score.size} scores need as many groups; got {group.size}")
        owns_score = score.ctypes.data != torch.as_tensor(scores).data_ptr()
        return Rows(score=score, owns_score=owns_score, label=label, weight=weight, group=group)

    def _check_labels(self, label: np.ndarray) -> None:
        if self.binary_labels:
            bad, rule = (label != 0) & (label != 1), "a label must be 0 or 1"
        else:
            bad, rule = ~((label >= 0) & (label <= 1)), "a label must lie in [0, 1]"
        self._refuse(bad, "label", label, rule, "map it in the data, or give the row weight 0 and a legal label")

    def _refuse(self, bad: np.ndarray, column: str, values: np.ndarray, rule: str, way_out: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            raise DataError(f"{self.key}: {rule}", row=row, column=column, value=float(values[row]), option=way_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Checked input of one update: N rows of equal length, numpy arrays that may share memory with the caller's."""

    score: np.ndarray
    """[N] float64, no NaN."""
    owns_score: bool
    """Whether score is a copy already."""
    label: np.ndarray
    """[N] float32 or float64."""
    weight: np.ndarray | None
    """[N] float64 or None = all 1."""
    group: np.ndarray | None
    """[N] int64 where the metric uses groups."""

    def weights(self) -> np.ndarray:
        """Return the weights [N], ones where none were given."""
        return np.ones(self.score.size) if self.weight is None else self.weight


def _column(values: Any, name: str, dtype: torch.dtype | None) -> np.ndarray:
    """Return values [N] as a numpy array of a type, None = float64, or float32 where it is that already."""
    tensor = torch.as_tensor(values).detach()
    if tensor.ndim != 1:
        raise ValueError(f"{name} must be 1-D [N]; got shape {tuple(tensor.shape)}; take one task at a time")
    dtype = dtype or (torch.float32 if tensor.dtype == torch.float32 else torch.float64)
    return tensor.to(device="cpu", dtype=dtype).contiguous().numpy()
