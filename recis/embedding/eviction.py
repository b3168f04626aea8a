"""Which rows a table gives up after an optimizer step, and in what order.

    TtlSteps(n)          rows with step - last_seen >= n
    TtlSeconds(n)        rows with clock - last_seen_s >= n, one clock reading per step
    LruCapacity(rows)    lowest last_seen, until `rows` are left
    LfuCapacity(rows)    lowest count, until `rows` are left
    MinNorm(l2, every)   rows whose weight has an L2 norm below l2, every `every_steps` steps
    ByScore(fn, rows)    lowest fn(RowMeta), until `rows` are left

Ties: the older last_seen goes first, then the smaller signed id, so a decision depends on the rows alone and not on where
they lie. Of several policies of one table those by time and norm run first, then those by capacity in the order given.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recis.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RowMeta:
    """What a score may look at, one entry per row of the table, in ascending order of the id.

    Attributes:
        ids: int64 [N].  last_seen: int32 [N], step of the last training sighting.  count: int32 [N], training sightings
            since the row was made.  norm: float64 [N], L2 norm of the weight.
    """

    ids: Tensor
    last_seen: Tensor
    count: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True)
class TtlSteps:
    """Give up rows that no training step has seen for n steps: last seen in step 3, n = 4, gone after step 7."""

    n: int

    def __post_init__(self) -> None:
        _require_positive("TtlSteps", n=self.n)


@dataclass(frozen=True, slots=True)
class TtlSeconds:
    """Give up rows last seen n seconds of the table set's clock ago, or more."""

    n: int

    def __post_init__(self) -> None:
        _require_positive("TtlSeconds", n=self.n)


@dataclass(frozen=True, slots=True)
class LruCapacity:
    """Keep the `rows` most recently seen rows."""

    rows: int

    def __post_init__(self) -> None:
        _require_positive("LruCapacity", rows=self.rows)


@dataclass(frozen=True, slots=True)
class LfuCapacity:
    """Keep the `rows` most often seen rows."""

    rows: int

    def __post_init__(self) -> None:
        _require_positive("LfuCapacity", rows=self.rows)


@dataclass(frozen=True, slots=True)
class MinNorm:
    """Give up rows with an L2 norm below `l2`, after every `every_steps`-th step."""

    l2: float
    every_steps: int

    def __post_init__(self) -> None:
        _require_positive("MinNorm", every_steps=self.every_steps)
        if not self.l2 > 0:
            raise ConfigError(f"MinNorm: l2 must be above 0; got {self.l2}")


@dataclass(frozen=True, slots=True)
class ByScore:
    """Keep the `rows` rows that `fn(RowMeta) -> Tensor [N]` scores highest; fn is a module-level function."""

    fn: Callable[[RowMeta], Tensor]
    rows: int

    def __post_init__(self) -> None:
        _require_positive("ByScore", rows=self.rows)


Eviction = TtlSteps | TtlSeconds | LruCapacity | LfuCapacity | MinNorm | ByScore
CAPACITY_POLICIES = (LruCapacity, LfuCapacity, ByScore)


def lowest(scores: Tensor, last_seen: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Return the indices of the num_rows lowest entries by (score, last_seen, id), int64 [num_rows].

    A partial selection on the score keeps the three-key sort to the rows that tie at the border: O(N) plus that sort.
    Scores of NaN count as lowest: a row that cannot be scored is not worth its place.
    """
    total = scores.numel()
    if num_rows >= total:
        return torch.arange(total, device=scores.device)
    if num_rows <= 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    if scores.is_floating_point():
        scores = torch.nan_to_num(scores.double(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    border = scores.kthvalue(num_rows).values
    below = (scores < border).nonzero().squeeze(1)
    tied = (scores == border).nonzero().squeeze(1)
    missing = num_rows - below.numel()
    if missing < tied.numel():
        tied = tied[ids[tied].argsort(stable=True)]
        tied = tied[last_seen[tied].argsort(stable=True)][:missing]
    return torch.cat([below, tied])


def _require_positive(kind: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{kind}: {name} must be at least 1; got {value}")
