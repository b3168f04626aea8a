"""Where the first weights of a row come from: a pure function of (seed, table name, id, column).

    Constant(value)                    w = value
    Uniform(low, high)                 w = mid + s * half, s in [-1, 1)
    Normal(mean, std)                  w = mean + std * z
    TruncatedNormal(std, bound)        w = std * z, z redrawn while |w| > bound

The draws are counter-based (Philox, see `recis_kernels.philox`), so a row starts with the same bytes whatever the order of
ids, the device, the number of threads or ranks, and whether the id was evicted before.
"""

import math
from dataclasses import dataclass

from recis.errors import ConfigError
from recis_kernels.row_init import InitKind, InitSpec


@dataclass(frozen=True, slots=True)
class Constant:
    """Every weight starts as `value`."""

    value: float = 0.0

    def __post_init__(self) -> None:
        _require_finite("Constant", value=self.value)

    def spec(self) -> InitSpec:
        """Return the parameters the kernel takes."""
        return InitSpec(InitKind.CONSTANT, self.value)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Weights start uniform in [low, high), on a grid of 2**-23 of the range."""

    low: float = -0.01
    high: float = 0.01

    def __post_init__(self) -> None:
        _require_finite("Uniform", low=self.low, high=self.high)
        if self.low > self.high:
            raise ConfigError(f"Uniform: low must not be above high; got low={self.low}, high={self.high}")

    def spec(self) -> InitSpec:
        """Return the parameters the kernel takes."""
        return InitSpec(InitKind.UNIFORM, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Normal:
    """Weights start normal with this mean and standard deviation."""

    mean: float = 0.0
    std: float = 0.01

    def __post_init__(self) -> None:
        _require_finite("Normal", mean=self.mean, std=self.std)
        if self.std < 0:
            raise ConfigError(f"Normal: std must not be negative; got {self.std}")

    def spec(self) -> InitSpec:
        """Return the parameters the kernel takes."""
        return InitSpec(InitKind.NORMAL, self.mean, self.std)


@dataclass(frozen=True, slots=True)
class TruncatedNormal:
    """Weights start normal around 0, redrawn while further out than `bound` (None: 2 * std); the 8th draw is clamped."""

    std: float = 0.01
    bound: float | None = None

    def __post_init__(self) -> None:
        _require_finite("TruncatedNormal", std=self.std, bound=self.limit)
        if not (self.std > 0 and self.limit > 0):
            raise ConfigError(f"TruncatedNormal: std and bound must be above 0; got {self.std} and {self.bound}")

    @property
    def limit(self) -> float:
        """The bound in force."""
        return 2 * self.std if self.bound is None else self.bound

    def spec(self) -> InitSpec:
        """Return the parameters the kernel takes."""
        return InitSpec(InitKind.TRUNCATED_NORMAL, 0.0, self.std, self.limit)


Initializer = Constant | Uniform | Normal | TruncatedNormal


def _require_finite(kind: str, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ConfigError(f"{kind}: {name} must be finite; got {value}")
