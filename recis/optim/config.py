"""What a table's `optimizer` can be: seven row optimizers as frozen values, with torch's argument names.

The equations are at the head of `recis_kernels/row_rules.py`. A config says which rule runs, which state vectors a row
carries and what they start from; learning rate and the other numbers become the table's param group, where schedules and
the user change them between steps. So tables that differ only in those numbers still share one row store.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal

from torch import Tensor

from recis.errors import ConfigError
from recis_kernels.row_rules import (
    ADAGRAD,
    ADAM,
    ADAMW,
    ADAMW_TF,
    FTRL,
    ROW_STEPS,
    ROW_WISE_ADAGRAD,
    SGD,
    SGD_MOMENTUM,
    UpdateRule,
)

StateSpec = tuple[tuple[str, int], ...]
_FIXED = ("h0", "bias_correction")  # what rows are laid out or filled by: not in the param group, cannot change


@cache
def group_names(optimizer: type["RowOptimizer"]) -> tuple[str, ...]:
    """Return the fields of an optimizer's config that may change between steps."""
    return tuple(field.name for field in fields(optimizer) if field.name not in _FIXED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptimizer:
    """Base of the configs; not used itself.

    Raises:
        ConfigError: a number outside its range; the text names optimizer, field, rule and value.
    """

    lr: float

    def __post_init__(self) -> None:
        self._need("lr", self.lr >= 0, "at least 0")

    @property
    def rule(self) -> UpdateRule:
        """The equation that runs."""
        raise NotImplementedError(f"{type(self).__name__} is a base; use one of the optimizers of recis.optim")

    def state_spec(self, dim: int) -> StateSpec:
        """Return (name, width) of each state vector of a row of `dim` weights, in row order."""
        spec = tuple((name, dim) for name in self.rule.states)
        return (*spec, (ROW_STEPS, 1)) if self.rule.row_steps else spec

    def initial_state(self) -> tuple[float, ...]:
        """Return what each state vector of state_spec starts from."""
        return (0.0,) * len(self.state_spec(1))

    def signature(self, dim: int) -> tuple[object, ...]:
        """Return what must be equal for two tables to share a store: rule, state vectors and their first values."""
        return (self.rule.name, self.state_spec(dim), self.initial_state())

    def param_group(self) -> dict[str, Any]:
        """Return the numbers that may change between steps, under torch's names."""
        return {name: getattr(self, name) for name in group_names(type(self))}

    def scalars(self, group: Mapping[str, Any], t: int) -> tuple[float, ...]:
        """Return the columns `self.rule.scalars` from a param group as it stands, for optimizer step t of the table.

        Raises:
            ConfigError: a value in the group breaks the rules of this optimizer.
        """
        changed = replace(self, **{name: _plain(group[name]) for name in self.param_group()})
        if changed.rule != self.rule:
            raise ConfigError(
                f"{type(self).__name__}: the rows were laid out for {self.rule.name!r}, the param group now asks for "
                f"{changed.rule.name!r}; set momentum in the TableConfig, not in the param group"
            )
        return changed._numbers(t)

    def _numbers(self, t: int) -> tuple[float, ...]:
        raise NotImplementedError

    def _need(self, field: str, holds: bool, rule: str) -> None:
        value = getattr(self, field)
        if not (holds and all(math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,)))):
            raise ConfigError(f"{type(self).__name__}: {field} must be {rule}; got {value}")


def _plain(value: Any) -> Any:
    """Return the number in a one-element tensor (torch allows lr to be one); anything else as it is."""
    return value.item() if isinstance(value, Tensor) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd(RowOptimizer):
    """Stochastic gradient descent; with momentum a row carries m [D]."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        RowOptimizer.__post_init__(self)
        self._need("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._need("weight_decay", self.weight_decay >= 0, "at least 0")

    @property
    def rule(self) -> UpdateRule:
        return SGD_MOMENTUM if self.momentum > 0 else SGD

    def _numbers(self, t: int) -> tuple[float, ...]:
        plain = (self.lr, self.weight_decay)
        return (*plain, self.momentum) if self.momentum > 0 else plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad(RowOptimizer):
    """Adagrad with one accumulator h per weight, which starts at h0."""

    eps: float = 1e-10
    weight_decay: float = 0.0
    h0: float = 0.0

    def __post_init__(self) -> None:
        RowOptimizer.__post_init__(self)
        self._need("weight_decay", self.weight_decay >= 0, "at least 0")
        self._need("h0", self.h0 >= 0, "at least 0")
        self._need("eps", self.eps > 0 or (self.eps == 0 and self.h0 > 0), "above 0, or 0 with h0 above 0")

    @property
    def rule(self) -> UpdateRule:
        return ADAGRAD

    def initial_state(self) -> tuple[float, ...]:
        return (self.h0,)

    def _numbers(self, t: int) -> tuple[float, ...]:
        return (self.lr, self.weight_decay, self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWiseAdagrad(Adagrad):
    """Adagrad with one accumulator per row, fed with the mean of g squared (FBGEMM's form): 4 bytes of state."""

    eps: float = 1e-8

    @property
    def rule(self) -> UpdateRule:
        return ROW_WISE_ADAGRAD

    def state_spec(self, dim: int) -> StateSpec:
        return (("h", 1),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(RowOptimizer):
    """Adam; weight decay is added to the gradient.

    bias_correction: "table" counts t in optimizer steps of the table, as torch does for a dense tensor; "row" counts the
    row's own updates, so a rare id starts with full steps; it costs one more float of state per row.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: Literal["table", "row"] = "table"

    def __post_init__(self) -> None:
        RowOptimizer.__post_init__(self)
        self._need("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._need("eps", self.eps > 0, "above 0")
        self._need("weight_decay", self.weight_decay >= 0, "at least 0")
        if self.bias_correction not in ("table", "row"):
            raise ConfigError(
                f"{type(self).__name__}: bias_correction must be 'table' or 'row'; got {self.bias_correction!r}"
            )

    @property
    def rule(self) -> UpdateRule:
        return self._with_steps(ADAM)

    def _with_steps(self, rule: UpdateRule) -> UpdateRule:
        return replace(rule, row_steps=self.bias_correction == "row")

    def _numbers(self, t: int) -> tuple[float, ...]:
        return (self.lr, *self.betas, self.eps, self.weight_decay, float(t))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: w shrinks by lr times weight_decay, as torch.optim.AdamW."""

    weight_decay: float = 0.01

    @property
    def rule(self) -> UpdateRule:
        return self._with_steps(ADAMW)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWTF(Adam):
    """TensorFlow's AdamW: w shrinks by weight_decay (not times lr); eps stands beside the uncorrected root."""

    weight_decay: float = 0.01

    @property
    def rule(self) -> UpdateRule:
        return self._with_steps(ADAMW_TF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ftrl(RowOptimizer):
    """FTRL-proximal: l1 sets weights to exactly 0.

    w is a function of n and z: a new row's first update keeps its initial weights only as far as they entered z.
    """

    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        self._need("lr", self.lr > 0, "above 0 (FTRL divides by it; start a warm-up above 0)")
        self._need("beta", self.beta >= 0, "at least 0")
        self._need("l1", self.l1 >= 0, "at least 0")
        self._need("l2", self.l2 >= 0, "at least 0")

    @property
    def rule(self) -> UpdateRule:
        return FTRL

    def _numbers(self, t: int) -> tuple[float, ...]:
        return (self.lr, self.beta, self.l1, self.l2)
