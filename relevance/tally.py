"""Numbers for the log that ranks can add up: each keeps what it is made of until all are together.

    own = {"accuracy": mean_of(correct), "tokens/generated": Count(812.0), "fault/empty": Share(3.0, rows=64)}
    merged([own, of rank 1, ..])         {"accuracy": 0.5, "tokens/generated": 1603.0, ..} as one process would have logged

A mean of means is another number where ranks have different counts, as for the accuracy of a rare label. Source of the spread:
Chan, Golub & LeVeque 1983, pairwise update.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class Number(ABC):
    """One number of one rank."""

    @abstractmethod
    def __add__(self, other: Any) -> "Number":
        """Return the number of both ranks, which are of one kind."""

    @abstractmethod
    def value(self, num_ranks: int) -> float:
        """Return what is logged."""


@dataclass(frozen=True, slots=True)
class Count(Number):
    """So many of them."""

    total: float

    def __add__(self, other: "Count") -> "Count":
        """Return the sum."""
        return Count(self.total + other.total)

    def value(self, num_ranks: int) -> float:
        """Return how many there are on all ranks."""
        return self.total


@dataclass(frozen=True, slots=True)
class Highest(Number):
    """The largest, or what is equal everywhere."""

    most: float

    def __add__(self, other: "Highest") -> "Highest":
        """Return the larger one."""
        return Highest(max(self.most, other.most))

    def value(self, num_ranks: int) -> float:
        """Return the largest of all ranks."""
        return self.most


@dataclass(frozen=True, slots=True)
class Share(Number):
    """So many of a rank's rows; a rank that found none may leave it out, since all have as many rows."""

    total: float
    rows: int

    def __add__(self, other: "Share") -> "Share":
        """Return the sum over the same rows per rank."""
        return Share(self.total + other.total, self.rows)

    def value(self, num_ranks: int) -> float:
        """Return the share of all rows."""
        return self.total / (self.rows * num_ranks)


@dataclass(frozen=True, slots=True)
class Mean(Number):
    """A mean over what is known."""

    total: float
    count: float

    def __add__(self, other: "Mean") -> "Mean":
        """Return the mean over both."""
        return Mean(self.total + other.total, self.count + other.count)

    def value(self, num_ranks: int) -> float:
        """Return the mean, NaN over nothing."""
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Spread(Number):
    """A standard deviation over what is known, of the population."""

    count: float
    mean: float
    squares: float
    """Sum of the squared distances from the mean."""

    def __add__(self, other: "Spread") -> "Spread":
        """Return the deviation over both."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        return Spread(
            count,
            self.mean + apart * other.count / count,
            self.squares + other.squares + apart * apart * self.count * other.count / count,
        )

    def value(self, num_ranks: int) -> float:
        """Return the deviation, NaN over nothing."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan


def mean_of(values: Tensor) -> Mean:
    """Return the mean of the values that are not NaN."""
    known = _known(values)
    return Mean(float(known.sum()), float(len(known)))


def spread_of(values: Tensor) -> Spread:
    """Return the standard deviation of the values that are not NaN."""
    known = _known(values)
    if not len(known):
        return Spread(0.0, 0.0, 0.0)
    mean = known.mean()
    return Spread(float(len(known)), float(mean), float((known - mean).square().sum()))


def merged(ranks: Sequence[Mapping[str, Number]]) -> dict[str, float]:
    """Return what is logged of all ranks' numbers; a name that a rank lacks has nothing to add there."""
    sums: dict[str, Number] = {}
    for numbers in ranks:
        for name, number in numbers.items():
            sums[name] = sums[name] + number if name in sums else number
    return {name: number.value(len(ranks)) for name, number in sums.items()}


def _known(values: Tensor) -> Tensor:
    flat = values.detach().double().flatten()
    return flat[~flat.isnan()]
