"""EmbeddingTower and TableTower: vectors that another job made, by id, as a dense feature.

    ids [B] -> row of a mapped file [B, D] -> projection (if asked for) -> [B, width]

EmbeddingTower leaves the vectors in the file: they cost no memory of their own and do not train. TableTower puts them into a
dynamic table, where they train like any row, grow new ids, and go into checkpoints. Both know the version of the vectors and
take up a newer one by `refresh`, whole or not at all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingBagCollection, TableConfig
from recis.errors import ConfigError, DataError, nearest
from recis.jagged import JaggedTensor
from recis.towers.vector_files import VectorFile, open_vectors

if TYPE_CHECKING:
    from recis.io.batch import Batch

_CHUNK = 1 << 16  # rows that are in memory at once while a table is filled


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingTowerConfig:
    """Vectors in a file, and the column of ids they are read by."""

    name: str
    """Of the dense feature it makes."""
    column: str
    """Ids, one per sample: an entry of batch.extras, else a sparse feature."""
    path: str
    """See recis.towers.vector_files."""
    ids_path: str | None = None
    """.npy of ids for a plain .npy of vectors; None there: row number = id."""
    out_width: int | None = None
    """Width of a trained projection; None: the vectors as they are."""
    width: int | None = None
    """Width the vectors must have; None: any."""
    version: str | None = None
    """Version the vectors must have, as TextTower.version() says it; None: any."""
    missing: Literal["zeros", "error"] = "zeros"
    """What an id without a vector gives: zeros, counted in `num_missing`, or an error."""
    seed: int = 0
    """Of the projection's weights."""

    def __post_init__(self) -> None:
        if self.missing not in ("zeros", "error"):
            raise ConfigError(
                f"embedding tower {self.name!r}: missing must be 'zeros' or 'error'; got {self.missing!r}"
            )

    def build(self) -> "EmbeddingTower":
        """Return the tower with its file open."""
        return EmbeddingTower(self)


class EmbeddingTower(nn.Module):
    """forward(batch) -> [B, width] float32.

    Attributes:
        file: the open vectors.
        width: of the output.
        num_missing: positions so far that had no vector.

    Raises:
        VectorFileError: see open_vectors.
    """

    def __init__(self, config: EmbeddingTowerConfig) -> None:
        super().__init__()
        self.config, self.name = config, config.name
        self.file = self._open(Path(config.path), config.width, config.version)
        self.num_missing = 0
        self.width = self.file.width if config.out_width is None else config.out_width
        self.projection: nn.Module = nn.Identity()
        if config.out_width is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.projection = nn.Linear(self.file.width, config.out_width)

    @property
    def version(self) -> str:
        """Version of the vectors that are read now."""
        return self.file.version

    def refresh(self, path: str | Path | None = None, *, version: str | None = None) -> None:
        """Read from a newer file from now on (None: the same path, written anew). If it cannot be used the old one stays.

        Raises:
            VectorFileError: as when opened first, and when its width is another.
        """
        self.file = self._open(Path(self.file.path if path is None else path), self.file.width, version)

    def forward(self, batch: "Batch") -> Tensor:
        """Return [B, width].

        Raises:
            ConfigError: the batch has no such ids.
            DataError: an id has no vector, under missing="error".
        """
        ids = one_id_per_sample(batch, self.config.column, self.name)
        vectors, found = self.file.read(ids.cpu())
        num_missing = int((~found).sum())
        if num_missing and self.config.missing == "error":
            row = int((~found).nonzero()[0])
            raise DataError(
                f"{num_missing} of {len(ids)} ids have no vector in {self.file.path}",
                row=row,
                column=self.config.column,
                value=int(ids[row]),
                option='missing="zeros" counts them',
            )
        self.num_missing += num_missing
        return self.projection(vectors.to(ids.device)).float()

    def _open(self, path: Path, width: int | None, version: str | None) -> VectorFile:
        return open_vectors(path, ids=self.config.ids_path, width=width, version=version)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTowerConfig:
    """Vectors in a dynamic table with one pooled feature."""

    name: str
    """Of the dense feature it makes."""
    table: TableConfig
    """Its one feature names the ids in batch.sparse; its optimizer trains the vectors, lr=0 keeps them."""
    path: str
    """What the table is filled from at first; see recis.towers.vector_files."""
    ids_path: str | None = None
    version: str | None = None
    seed: int = 0
    """Of the rows of ids that have no vector."""

    def __post_init__(self) -> None:
        if len(self.table.features) != 1:
            raise ConfigError(f"table tower {self.name!r}: its table serves one feature; got {self.table.features}")

    def build(self) -> "TableTower":
        """Return the tower with its table filled."""
        return TableTower(self)


class TableTower(nn.Module):
    """forward(batch) -> [B, embedding_dim]. Attributes: width, version, collection. Raises VectorFileError."""

    def __init__(self, config: TableTowerConfig) -> None:
        super().__init__()
        self.config, self.name = config, config.name
        self.width = config.table.embedding_dim
        file = open_vectors(config.path, ids=config.ids_path, width=self.width, version=config.version)
        self.collection = EmbeddingBagCollection((config.table,), seed=config.seed)
        self.version = ""
        self._fill(file)

    def refresh(self, path: str | Path | None = None, *, version: str | None = None) -> None:
        """Replace the vectors of all ids of a file; other rows stay. Checked whole before the table is touched."""
        target = self.config.path if path is None else path
        self._fill(open_vectors(target, ids=self.config.ids_path, width=self.width, version=version))

    def forward(self, batch: "Batch") -> Tensor:
        """Return [B, embedding_dim]."""
        return next(iter(self.collection(batch.sparse).values())).float()

    def _fill(self, file: VectorFile) -> None:
        table = self.collection.table_set.tables[self.config.table.name]
        ids = torch.arange(len(file.vectors)) if file.ids is None else file.ids
        table.reserve(len(ids))
        for first in range(0, len(ids), _CHUNK):
            part = ids[first : first + _CHUNK]
            table.insert(part, file.read(part)[0])
        self.version = file.version


def one_id_per_sample(batch: "Batch", column: str, tower: str) -> Tensor:
    """Return int64 [B] of an entry of batch.extras, or else of a sparse feature, with one id in each sample.

    Raises:
        ConfigError: there is no such column, or it does not hold one integer per sample.
        DataError: a sample has none or several.
    """
    found = batch.extras.get(column)
    if found is None and column in batch.sparse.keys:
        found = batch.sparse[column]
    if found is None:
        known = [*batch.extras, *batch.sparse.keys]
        raise ConfigError(f"embedding tower {tower!r}: the batch has no ids {column!r}; {nearest(column, known)}")
    ids = found.flat_values if isinstance(found, JaggedTensor) else found.reshape(-1)
    if len(ids) != batch.num_samples or ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"embedding tower {tower!r}: {column!r} must hold one integer id per sample; got {len(ids)} {ids.dtype} for "
            f"{batch.num_samples} samples"
        )
    if isinstance(found, JaggedTensor) and found.device.type == "cpu" and bool((found.lengths != 1).any()):
        row = int((found.lengths != 1).nonzero()[0])
        raise DataError(
            f"an embedding tower reads one id per sample; this one has {int(found.lengths[row])}",
            row=row,
            column=column,
        )
    return ids.long()
