"""When an id earns a row.

    Always()                      at its first sighting
    AfterSightings(n, counter)    in step s, if its sightings in earlier steps c satisfy c + 1 >= n
    WithProbability(p)            in step s, if a counter-based draw u(seed, table, id, s) < p

A sighting is one position of the id in the whole training batch of an optimizer step. Counts move at step ends only, so a
decision does not depend on how the batch was ordered or cut into micro-batches. These are the settings; the counting is
in `recis.embedding.sightings`.
Source of CountMin: Cormode and Muthukrishnan 2005, "An improved data stream summary: the count-min sketch".
"""

import math
from dataclasses import dataclass

from recis.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Exact:
    """Count sightings per id, 36 to 48 bytes each.

    Attributes:
        max_ids: most ids to keep; after a step the ones seen longest ago are forgotten (then the smaller id). None: all.
    """

    max_ids: int | None = None

    def __post_init__(self) -> None:
        if self.max_ids is not None and self.max_ids < 1:
            raise ConfigError(f"Exact: max_ids must be at least 1 or None; got {self.max_ids}")


@dataclass(frozen=True, slots=True)
class CountMin:
    """Count sightings in a sketch of fixed size: never too low, and at most eps * N too high with probability 1 - delta.

    N is the number of sightings counted so far. Ids that hold a row are not counted. A sketch cannot forget one id: after an
    eviction its old sightings still count, so the id may come back earlier than with Exact.
    """

    eps: float = 1e-4
    delta: float = 1e-2

    def __post_init__(self) -> None:
        for name, value in (("eps", self.eps), ("delta", self.delta)):
            if not 0 < value < 1:
                raise ConfigError(f"CountMin: {name} must be inside (0, 1); got {value}")

    @property
    def width(self) -> int:
        """Cells per row of the sketch: ceil(e / eps)."""
        return math.ceil(math.e / self.eps)

    @property
    def depth(self) -> int:
        """Rows of the sketch: ceil(ln 1 / delta)."""
        return math.ceil(math.log(1 / self.delta))


@dataclass(frozen=True, slots=True)
class Always:
    """An id gets a row at its first sighting."""


@dataclass(frozen=True, slots=True)
class AfterSightings:
    """An id gets a row in the first step in which it was seen n - 1 times before; n = 1 admits at once."""

    n: int
    counter: Exact | CountMin = Exact()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"AfterSightings: n must be at least 1 (admits at once); got {self.n}")


@dataclass(frozen=True, slots=True)
class WithProbability:
    """An id without a row gets one with probability p in each step it is seen; admitted once, it stays."""

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ConfigError(f"WithProbability: p must be in [0, 1]; got {self.p}")


Admission = Always | AfterSightings | WithProbability
