"""A trace: the ids of many samples, feature by feature, as a training run would look them up.

    FILE.parquet    one row per sample, one list<int64> column per feature (an int64 column is lists of one id); `record`
                    also notes the model's tables in the file's metadata
    FILE.npy        int64 ids [L] of one feature, with FILE.lengths.npy [samples] beside it; mapped, not loaded

Read step by step: memory is that of one step, however long the trace.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from recis.distributed.shape import ModelShape, plain_shape, shape_from_json
from recis.errors import ConfigError, DataError, nearest

METADATA_KEY = b"recis.trace"
_READ_SAMPLES = 65_536


@dataclass(frozen=True, slots=True)
class TraceStep:
    """The ids of the samples of one step.

    Attributes:
        values: feature -> int64 ids, sample after sample.
        offsets: feature -> int64 [B + 1].
        num_samples: B.
    """

    values: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]
    num_samples: int


class TraceWriter:
    """Writes a trace with its tables.

    Args:
        path: Parquet file to write.
        shape: of the model whose ids these are.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: Path, shape: ModelShape) -> None:
        self._features = tuple(shape.features)
        note = {METADATA_KEY: json.dumps(shape.to_json()).encode()}
        self._schema = pa.schema([(name, pa.list_(pa.int64())) for name in self._features], metadata=note)
        try:
            self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        except OSError as error:
            raise DataError(f"cannot be written ({error})", file=str(path), option="name another --trace") from error

    def write(self, values: Mapping[str, Tensor], offsets: Mapping[str, Tensor]) -> None:
        """Write samples: ids [L] and offsets [B + 1] of every feature."""
        arrays = [
            pa.ListArray.from_arrays(
                pa.array(offsets[name].to(torch.int32).numpy()), pa.array(values[name].long().numpy())
            )
            for name in self._features
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        """Write the end of the file."""
        self._writer.close()

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Trace:
    """A trace on disk.

    Args:
        path: FILE.parquet, or FILE.npy with FILE.lengths.npy.
        columns: of a Parquet file, the features to replay; None: all it has.
        dim: row width of tables that the file says nothing of.

    Attributes:
        shape: tables and lookups: as noted in the file, else one table per feature.
        num_samples: in the file.
        is_noted: whether the file says what its tables are.

    Raises:
        DataError: no such file, no columns, ids that are not int64, no samples.
    """

    def __init__(self, path: Path, *, columns: Sequence[str] | None = None, dim: int = 16) -> None:
        self.path = path
        if dim < 1:
            raise ConfigError(f"--dim must be at least 1; got {dim}")
        if not path.is_file():
            raise DataError("no such file", file=str(path), option="write one with recis simulate --record RECIPE")
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None
        self.is_noted = False
        if path.suffix == ".npy":
            if columns is not None:
                raise ConfigError(f"--columns {','.join(columns)}: {path} has one feature, named 'ids'; leave it out")
            self._arrays = _arrays(path)
            self.shape = plain_shape(("ids",), dim=dim)
            self.num_samples = len(self._arrays[1])
        else:
            file = _opened(path)
            noted = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
            self._names = _features_of(path, file.schema_arrow, columns)
            self.num_samples = file.metadata.num_rows
            if noted is None or columns is not None:
                self.shape = plain_shape(self._names, dim=dim)
            else:
                self.is_noted, self.shape = True, _noted(path, noted, self._names)
        if self.num_samples == 0:
            raise DataError("the trace is empty", file=str(path), option="record more steps")

    def steps(self, num_samples: int) -> Iterator[TraceStep]:
        """Yield steps of num_samples samples until fewer are left.

        Raises:
            DataError: an id is missing, or the file is damaged.
        """
        if self._arrays is not None:
            yield from _array_steps(*self._arrays, num_samples)
            return
        waiting: list[pa.RecordBatch] = []
        have = 0
        for batch in self._batches(min(num_samples, _READ_SAMPLES)):
            waiting.append(batch)
            have += batch.num_rows
            while have >= num_samples:
                table = pa.Table.from_batches(waiting)
                yield self._step(table.slice(0, num_samples))
                rest = table.slice(num_samples)
                waiting, have = rest.to_batches(), rest.num_rows

    def _batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        try:
            yield from _opened(self.path).iter_batches(batch_size=rows, columns=list(self._names))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot be read: {error}", file=str(self.path)) from error

    def _step(self, table: pa.Table) -> TraceStep:
        values: dict[str, Tensor] = {}
        offsets: dict[str, Tensor] = {}
        for name in self._names:
            column: Any = table[name].combine_chunks()
            if column.null_count and not _is_list(column.type):
                raise self._missing(name)
            bounds = np.zeros(len(column) + 1, np.int64)
            if _is_list(column.type):
                lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
                np.cumsum(lengths, out=bounds[1:])
                ids = column.flatten()
            else:
                ids, bounds = column, np.arange(len(column) + 1)
            if ids.null_count:
                raise self._missing(name)
            values[name] = torch.from_numpy(np.array(ids.to_numpy(zero_copy_only=False)))
            offsets[name] = torch.from_numpy(bounds)
        return TraceStep(values, offsets, table.num_rows)

    def _missing(self, name: str) -> DataError:
        return DataError("an id is missing (null)", file=str(self.path), column=name, option="leave such ids out")


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"is no Parquet file: {error}", file=str(path), option="give Parquet, or FILE.npy") from error


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _features_of(path: Path, schema: pa.Schema, columns: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(schema.names if columns is None else columns)
    if not names:
        raise DataError("the trace has no columns", file=str(path), option="one list<int64> column per feature")
    for name in names:
        if name not in schema.names:
            raise DataError(f"no such column; {nearest(name, schema.names)}", file=str(path), column=name)
        kind = schema.field(name).type
        inner = kind.value_type if _is_list(kind) else kind
        if inner != pa.int64():
            raise DataError(
                f"ids must be int64 or lists of int64; got {kind}",
                file=str(path),
                column=name,
                option="hash or cast them, or name the id columns with --columns",
            )
    return names


def _noted(path: Path, note: bytes, names: tuple[str, ...]) -> ModelShape:
    try:
        value = json.loads(note)
    except ValueError as error:
        raise DataError(f"its note of tables is no JSON ({error})", file=str(path), option="record it again") from error
    shape = shape_from_json(value)
    if set(shape.features) != set(names):
        raise DataError(f"its note names the features {sorted(shape.features)}, its columns are {sorted(names)}")
    return shape


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    beside = path.with_suffix(".lengths.npy")
    if not beside.is_file():
        raise DataError(f"needs the lengths beside it, {beside.name}: int64 [samples]", file=str(path))
    found = []
    for file in (path, beside):
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"is no array: {error}", file=str(file)) from error
        if array.ndim != 1 or array.dtype != np.int64:
            raise DataError(f"ids and lengths must be int64, 1-D; got {array.dtype} {array.shape}", file=str(file))
        found.append(array)
    ids, lengths = found
    if len(lengths) and (int(lengths.min()) < 0 or int(lengths.sum()) != len(ids)):
        raise DataError(
            f"lengths must not be negative and sum to the {len(ids)} ids; the sum is {lengths.sum()}", file=str(beside)
        )
    return ids, lengths


def _array_steps(ids: np.ndarray, lengths: np.ndarray, num_samples: int) -> Iterator[TraceStep]:
    first = 0
    for start in range(0, len(lengths) - num_samples + 1, num_samples):
        bounds = np.zeros(num_samples + 1, np.int64)
        np.cumsum(lengths[start : start + num_samples], out=bounds[1:])
        stop = first + int(bounds[-1])
        values = torch.from_numpy(np.array(ids[first:stop]))
        yield TraceStep({"ids": values}, {"ids": torch.from_numpy(bounds)}, num_samples)
        first = stop
