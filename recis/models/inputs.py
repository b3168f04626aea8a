"""From a Batch to what the dense part of a model reads: pooled embeddings of all features and the dense columns.

flat    [B, W]      all embeddings side by side, then the dense columns
fields  [B, F, D]   one row per feature (n rows for a Tile(n) feature), where all tables share one width D
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingBagCollection, TableConfig, TableSet, Tile
from recis.errors import ConfigError

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True)
class DenseInput:
    """A dense feature that a model reads, by the name the feature engine gives it."""

    name: str
    width: int = 1

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"dense input {self.name!r}: width must be at least 1; got {self.width}")


class DenseInputs(nn.Module):
    """The columns [B, K] of some dense features of a batch, in the order given; no parameters."""

    def __init__(self, inputs: Sequence[DenseInput]) -> None:
        super().__init__()
        self.names = tuple(item.name for item in inputs)
        self.widths = tuple(item.width for item in inputs)
        self.width = sum(self.widths)
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"dense inputs must be distinct; got {self.names}")

    def forward(self, batch: "Batch") -> Tensor:
        """Return [B, K].

        Raises:
            ConfigError: the batch lacks a feature.
            ValueError: a feature has another width than the config says.
        """
        if batch.dense_keys == self.names and batch.dense_widths == self.widths:
            return batch.dense
        columns = [batch.dense_feature(name) for name in self.names]
        for name, width, column in zip(self.names, self.widths, columns, strict=True):
            if column.shape[1] != width:
                raise ValueError(f"dense feature {name!r} has width {column.shape[1]}; the model's config says {width}")
        return torch.cat(columns, dim=1) if columns else batch.dense[:, :0]


class PooledInputs(nn.Module):
    """Pooled embeddings and dense columns of a batch.

    Args:
        tables: configs, or a TableSet that other collections of the model use too.
        dense: dense features to read.
        seed: of the tables' first weights; not used with a TableSet.
        features: sparse features to read; None = all that are pooled.

    Attributes:
        embeddings: the collection.
        dense: DenseInputs.
        width: W of `flat`.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig] | TableSet,
        dense: Sequence[DenseInput] = (),
        *,
        seed: int | None = None,
        features: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.embeddings = EmbeddingBagCollection(tables, seed=seed, features=features)
        self.dense = DenseInputs(dense)
        dims = self.embeddings.embedding_dims
        if not dims:
            raise ConfigError("a model needs at least one pooled feature; its tables have none")
        self._rows = {name: _num_rows(feature.pooling) for name, feature in self.embeddings.features.items()}
        self._dims = dims
        self.widths = {name: rows * dims[name] for name, rows in self._rows.items()}
        self.width = sum(self.widths.values()) + self.dense.width

    @property
    def num_fields(self) -> int:
        """F of `fields`."""
        return sum(self._rows.values())

    def field_dim(self) -> int:
        """Return the D that all features share.

        Raises:
            ConfigError: they differ.
        """
        if len(set(self._dims.values())) > 1:
            raise ConfigError(f"this model multiplies embeddings, so all need one embedding_dim; got {self._dims}")
        return next(iter(self._dims.values()))

    def vectors(self, batch: "Batch") -> dict[str, Tensor]:
        """Return {feature: [B, width]}; Tile(n) features as n vectors side by side."""
        return {name: vector.flatten(1) for name, vector in self.embeddings(batch.sparse).items()}

    def flat(self, batch: "Batch") -> Tensor:
        """Return [B, W]: embeddings in the collection's order, then dense columns."""
        return torch.cat([*self.vectors(batch).values(), self.dense(batch)], dim=1)

    def fields(self, batch: "Batch") -> Tensor:
        """Return [B, F, D]."""
        rows = [
            vector.unsqueeze(1) if vector.ndim == 2 else vector for vector in self.embeddings(batch.sparse).values()
        ]
        return torch.cat(rows, dim=1)


def _num_rows(pooling: object) -> int:
    return pooling.n if isinstance(pooling, Tile) else 1
