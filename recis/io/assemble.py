"""Make the micro-batches of one step from the slices that lanes gave, in a worker thread.

A row that breaks its column's rule raises, or is left out and noted (`on_bad_row="skip"`): it keeps its place in the order,
so leaving rows out moves no other row into another batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from recis.errors import DataError
from recis.io.arrow_types import ROW_KEY, UNIT_KEY
from recis.io.batch import RawBatch, RowOrigin
from recis.io.columns import Column
from recis.io.decode import Fault, decode
from recis.io.shuffle import join


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that was left out, and why."""

    file: str
    unit: str
    row: int
    column: str | None
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What all batches of a source have in common."""

    columns: tuple[Column, ...]
    schema: pa.Schema
    places: Sequence[tuple[str, str]]
    skip_bad_rows: bool


Made = tuple[RawBatch, list[BadRow]]


def assemble(
    slices: Sequence[pa.RecordBatch], recipe: Recipe, *, micro_batches: int, micro_batch_size: int
) -> list[Made]:
    """Return the micro-batches of a step, each with the rows left out of it.

    Args:
        slices: the step's rows on this rank, lane after lane.
        recipe: how to decode them.
        micro_batches: how many to make; the last ones may be empty.
        micro_batch_size: most rows of each.

    Raises:
        DataError: a row breaks its column's rule, and rows are not to be skipped.
    """
    whole = join(slices, recipe.schema)
    made = []
    for number in range(micro_batches):
        part = whole.slice(number * micro_batch_size, micro_batch_size)
        made.append(_micro_batch(part, recipe, ends_step=number == micro_batches - 1))
    return made


def assemble_parts(
    parts: Sequence[Sequence[pa.RecordBatch]], recipe: Recipe, *, micro_batches: int, micro_batch_size: int
) -> list[Made]:
    """Return the micro-batches of a step's parts: the first one of each part, then the second of each, and so on.

    Args:
        parts: the rows of each part on this rank, lane after lane; the rest as in `assemble`, which one part equals.

    Raises:
        DataError: as assemble.
    """
    made = [assemble(part, recipe, micro_batches=micro_batches, micro_batch_size=micro_batch_size) for part in parts]
    if len(made) == 1:
        return made[0]
    mixed = [made[part][number] for number in range(micro_batches) for part in range(len(parts))]
    last = len(mixed) - 1
    return [(replace(batch, ends_step=place == last), bad) for place, (batch, bad) in enumerate(mixed)]


def _micro_batch(part: pa.RecordBatch, recipe: Recipe, *, ends_step: bool) -> Made:
    columns, faults = decode(part, recipe.columns)
    bad: list[BadRow] = []
    while faults:
        if not recipe.skip_bad_rows:
            row = min(faults)
            raise _error(part, row, faults[row], recipe)
        bad += [_bad_row(part, row, faults[row], recipe) for row in sorted(faults)]
        keep = np.ones(part.num_rows, dtype=bool)
        keep[list(faults)] = False
        part = part.filter(pa.array(keep))
        columns, faults = decode(part, recipe.columns)  # a line that could not be parsed may have hidden other faults
    units, rows = (torch.from_dlpack(part.column(key)) for key in (UNIT_KEY, ROW_KEY))
    origin = RowOrigin(units=recipe.places, unit=units, row=rows)
    return RawBatch(columns=columns, num_samples=part.num_rows, origin=origin, ends_step=ends_step), bad


def _place(part: pa.RecordBatch, row: int, recipe: Recipe) -> tuple[str, str, int]:
    file, unit = recipe.places[part.column(UNIT_KEY)[row].as_py()]
    return file, unit, part.column(ROW_KEY)[row].as_py()


def _error(part: pa.RecordBatch, row: int, fault: Fault, recipe: Recipe) -> DataError:
    file, unit, number = _place(part, row, recipe)
    option = f"{fault.option or 'put it right'}, or set on_bad_row='skip' to leave such rows out"
    return DataError(
        fault.problem, file=file, unit=unit, row=number, column=fault.column, value=fault.value, option=option
    )


def _bad_row(part: pa.RecordBatch, row: int, fault: Fault, recipe: Recipe) -> BadRow:
    file, unit, number = _place(part, row, recipe)
    return BadRow(file=file, unit=unit, row=number, column=fault.column, problem=fault.problem)
