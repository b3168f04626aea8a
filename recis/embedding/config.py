"""What a user says about a table: its width, its features, where rows come from, when they go.

Tables whose embedding_dim, dtype, optimizer and initializer agree share one physical store and one launch; pooling,
admission, eviction, limits and learning rates do not split a store.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from recis.embedding.admission import Admission, Always
from recis.embedding.eviction import Eviction
from recis.embedding.initializers import Initializer, Uniform
from recis.errors import ConfigError
from recis.optim.config import RowOptimizer, RowWiseAdagrad

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Tile:
    """Pooling that keeps the first n vectors of a bag as they are: [B, n, D], zeros where the bag is shorter."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"Tile: n must be at least 1; got {self.n}")


Pooling = Literal["sum", "mean", "none"] | Tile


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature of a table and how its bags become vectors.

    Attributes:
        name: key of the KeyedJaggedTensor.
        pooling: "sum" and "mean" (weighted where the batch has weights) and Tile(n) are served by an
            EmbeddingBagCollection, "none" (one vector per id) by an EmbeddingCollection. None, which is what a bare string
            in `TableConfig.features` means: the sum in the one, unpooled in the other.
    """

    name: str
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"a feature's name must be a non-empty string; got {self.name!r}")
        if self.pooling not in (None, "sum", "mean", "none") and not isinstance(self.pooling, Tile):
            raise ConfigError(
                f"feature {self.name!r}: pooling must be 'sum', 'mean', 'none' or Tile(n); got {self.pooling!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """One embedding table and the features that share it."""

    name: str
    features: tuple[str | Feature, ...]
    embedding_dim: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; optimizer state is always float32."""
    initializer: Initializer = Uniform(-0.01, 0.01)  # noqa: RUF009  frozen
    optimizer: RowOptimizer = RowWiseAdagrad(lr=0.01)  # noqa: RUF009  frozen
    admission: Admission = Always()  # noqa: RUF009  frozen
    eviction: tuple[Eviction, ...] = ()
    """Policies, applied after each step: time and norm first, then capacities in this order."""
    max_rows: int | None = None
    """A promise: an admitted id past it reads like an unadmitted one and counts as `full`."""
    unadmitted: Literal["zeros", "default_row"] = "zeros"
    """What ids without a row read: zeros, or one row that they share."""
    train_default_row: bool = False
    """Whether that row is trained; otherwise it keeps its initial value."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"a table's name must be a non-empty string; got {self.name!r}")
        where = f"table {self.name!r}"
        if isinstance(self.features, str):
            raise ConfigError(f"{where}: features must be a tuple; got the string {self.features!r}: add a comma")
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "eviction", tuple(self.eviction))
        names = [feature.name for feature in self.feature_list()]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(f"{where}: features must be distinct; these repeat: {twice}")
        if self.embedding_dim < 1:
            raise ConfigError(f"{where}: embedding_dim must be at least 1; got {self.embedding_dim}")
        if self.dtype not in _DTYPES:
            raise ConfigError(
                f"{where}: dtype must be 'float32' or 'bfloat16'; got {self.dtype!r} (float64 and integer rows do not "
                "exist: convert what reads them)"
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"{where}: max_rows must be at least 1 or None; got {self.max_rows}")
        if self.unadmitted not in ("zeros", "default_row"):
            raise ConfigError(f"{where}: unadmitted must be 'zeros' or 'default_row'; got {self.unadmitted!r}")
        if self.train_default_row and self.unadmitted != "default_row":
            raise ConfigError(f"{where}: train_default_row needs unadmitted='default_row'; got {self.unadmitted!r}")

    def feature_list(self) -> tuple[Feature, ...]:
        """The features as Feature objects."""
        return tuple(feature if isinstance(feature, Feature) else Feature(feature) for feature in self.features)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return _DTYPES[self.dtype]

    @property
    def store_key(self) -> tuple[object, ...]:
        """What must be equal for two tables to share a store: dim, dtype, optimizer and initializer.

        Of the optimizer, the rule and the layout of its state count; learning rates and the like are per table.
        """
        return (self.embedding_dim, self.dtype, self.optimizer.signature(self.embedding_dim), self.initializer)


def setting_to_json(setting: Any) -> dict[str, Any]:
    """Return a frozen setting (an optimizer, an initializer) as {"kind": class name, field: value, ...}."""
    return {"kind": type(setting).__name__, **dataclasses.asdict(setting)}
