"""Turn one Arrow batch into tensors, and find the rows that break their column's rule.

Buffers become tensors without a copy where Arrow stores what torch stores: values without nulls, also inside lists, and the
bytes of strings. Offsets are widened from int32 to int64, which copies 8 bytes per bag. A fault never yields tensors: the
reader either raises the first one or decodes the batch again without the faulty rows.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
import torch
from torch import Tensor

from recis.io.arrow_types import FAULT_KEY, WEIGHTS_KEY, list_offsets
from recis.io.columns import Column, Dense, Floats, Group, Ids, Integer, Label, Strings, Weight
from recis.io.tokens import tokenize
from recis.jagged import JaggedTensor


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one row cannot be used."""

    column: str | None
    value: object
    problem: str
    option: str | None


Faults = dict[int, Fault]  # row of the batch -> its first fault
RowOf = Callable[[np.ndarray], np.ndarray]  # positions at some level of lists -> rows of the batch


def decode(batch: pa.RecordBatch, columns: Sequence[Column]) -> tuple[dict[str, Tensor | JaggedTensor], Faults]:
    """Return the columns by name, and the faults; the columns are only to be used when there is no fault.

    Args:
        batch: arrays in the types of `arrow_types.target_type`, under the names of the columns.
        columns: what they mean.
    """
    faults: Faults = {}
    if FAULT_KEY in batch.schema.names:
        _line_faults(batch.column(FAULT_KEY), faults)
    if faults:  # the lines' other columns are nulls, which would only be reported a second time
        return {}, faults
    decoded: dict[str, Tensor | JaggedTensor] = {}
    for column in columns:
        array = batch.column(column.name)
        if isinstance(column, Ids):
            weights = batch.column(WEIGHTS_KEY + column.name) if column.weights is not None else None
            decoded[column.name] = _ids(array, column, weights, faults)
        elif isinstance(column, Floats):
            decoded[column.name] = _lists(array, column, column.depth, _same_rows, faults)
        elif isinstance(column, Strings):
            strings = _strings(array, column, faults)
            if column.tokenizer is not None and not faults:
                strings = tokenize(strings, column.tokenizer, column.max_tokens)
            decoded[column.name] = strings
        elif isinstance(column, Group | Integer):
            decoded[column.name] = _tensor(_filled(array, column.default, column.name, faults))
        else:
            decoded[column.name] = _numbers(array, column, faults)
    return decoded, faults


def _line_faults(array: pa.Array, faults: Faults) -> None:
    if array.null_count < len(array):
        for row in np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False)).tolist():
            faults[row] = Fault(**json.loads(array[row].as_py()))


def _numbers(array: pa.Array, column: Dense | Label | Weight, faults: Faults) -> Tensor:
    """float32 [B] or [B, width], checked against the rule of the kind."""
    width = column.width if isinstance(column, Dense) else 1
    default = math.nan if isinstance(column, Label) and column.optional else getattr(column, "default", None)
    values = array
    if isinstance(column, Dense) and width > 1:
        faulty_before = len(faults)
        values = _fixed_lists(array, column, faults)
        if len(faults) > faulty_before:  # positions no longer tell rows
            return torch.empty(0, width)
    values = _filled(values, default, column.name, faults, rows_per=width)
    tensor = _tensor(values)
    if isinstance(column, Label):
        low = -torch.inf if column.low is None else column.low
        high = torch.inf if column.high is None else column.high
        bad = ~((tensor >= low) & (tensor <= high) & tensor.isfinite())
        if column.optional:
            bad &= ~tensor.isnan()
        shown = f"[{'-inf' if column.low is None else column.low}, {'inf' if column.high is None else column.high}]"
        problem = f"label outside {shown}"
        option = f"set Label({column.name!r}, low=..., high=...), optional=True for missing labels"
    elif isinstance(column, Weight):
        bad, problem = ~((tensor >= 0) & tensor.isfinite()), "a weight must be finite and not negative"
        option = "put the value right in the data"
    else:
        bad, problem = ~tensor.isfinite(), "NaN or infinite in a dense column"
        option = f"set Dense({column.name!r}, nonfinite=0.0) to replace such values"
        if column.nonfinite is not None:
            tensor = torch.where(bad, torch.full_like(tensor, column.nonfinite), tensor)
            bad = torch.zeros_like(bad)
    if bool(bad.any()):
        for position in bad.nonzero()[:, 0].tolist():
            faults.setdefault(position // width, Fault(column.name, float(tensor[position]), problem, option))
    return tensor.reshape(-1, width) if width > 1 else tensor


def _fixed_lists(array: pa.Array, column: Dense, faults: Faults) -> pa.Array:
    """The numbers of lists that must all have column.width entries; null lists become the default, if there is one."""
    if array.null_count:
        row = None if column.default is None else [column.default] * column.width
        array = _filled(array, row, column.name, faults, empty=[0.0] * column.width)
    offsets = list_offsets(array)
    lengths = np.diff(offsets)
    for row in np.flatnonzero(lengths != column.width).tolist():
        option = f"set Dense({column.name!r}, width={int(lengths[row])}) or read it as Floats({column.name!r})"
        faults.setdefault(
            row, Fault(column.name, int(lengths[row]), f"a list must have {column.width} numbers", option)
        )
    return array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))


def _ids(array: pa.Array, column: Ids, weights: pa.Array | None, faults: Faults) -> JaggedTensor | Tensor:
    if not pt.is_list(array.type):
        values, offsets = _single_ids(array, column, faults)
        jagged = JaggedTensor(values, offsets=offsets)
    else:
        jagged = _lists(array, column, column.depth, _same_rows, faults)
    if weights is None:
        return jagged
    start = list_offsets(weights)
    lengths = np.diff(start) if weights.null_count == 0 else weights.value_lengths().fill_null(0).to_numpy()
    wrong = np.flatnonzero(lengths != jagged.lengths.numpy())
    for row in wrong.tolist():
        problem = f"{int(jagged.lengths[row])} ids but {int(lengths[row])} weights"
        faults.setdefault(row, Fault(column.name, int(lengths[row]), problem, "give one weight per id"))
    flat = weights.flatten()
    owner = _row_of_lists(np.concatenate([[0], np.cumsum(lengths)]), _same_rows)
    if flat.null_count:
        _null_faults(flat, column.name, owner, "a null weight", "write a weight for each id", faults)
        flat = flat.fill_null(0.0)
    tensor = _tensor(flat)
    _finite_or_fault(tensor, column.name, owner, "put the weight right in the data", faults)
    return JaggedTensor(jagged.values, offsets=jagged.offsets, weights=tensor) if not faults else jagged


def _single_ids(array: pa.Array, column: Ids, faults: Faults) -> tuple[Tensor, Tensor]:
    """Values and offsets of a column with one integer per row; a null is its default list."""
    if array.null_count == 0:
        return _tensor(array), torch.arange(len(array) + 1)
    if column.default is not None and len(column.default) == 1:
        return _tensor(array.fill_null(column.default[0])), torch.arange(len(array) + 1)
    offsets = np.arange(len(array) + 1, dtype=np.int32)
    missing = array.is_null()
    lists = pa.ListArray.from_arrays(pa.array(offsets), array, mask=missing)
    filled = _filled(lists, column.default, column.name, faults, empty=[])
    start = list_offsets(filled).astype(np.int64)
    return _tensor(filled.flatten()), torch.from_numpy(start - start[0])


def _lists(array: pa.Array, column: Ids | Floats | Strings, depth: int, row_of: RowOf, faults: Faults) -> JaggedTensor:
    """`depth` levels of lists over int64, float32 or binary."""
    if array.null_count:
        default = column.default if isinstance(column.default, tuple) else None
        as_leaf = [text.encode() if isinstance(text, str) else text for text in default or ()]
        array = _filled(array, None if default is None else as_leaf, column.name, faults, row_of=row_of, empty=[])
    raw = list_offsets(array)
    offsets = raw.astype(np.int64) - raw[0]
    values = array.values.slice(int(raw[0]), int(raw[-1] - raw[0]))
    inner_row_of = _row_of_lists(offsets, row_of)
    if depth > 1:
        return JaggedTensor(_lists(values, column, depth - 1, inner_row_of, faults), offsets=torch.from_numpy(offsets))
    if values.null_count:
        replaced = column.nonfinite if isinstance(column, Floats) else None
        if replaced is not None:
            values = values.fill_null(replaced)
        elif not isinstance(column, Floats) and column.drop_nulls:
            kept = np.concatenate([[0], np.cumsum(values.is_valid().to_numpy(zero_copy_only=False))])
            offsets, values = kept[offsets].astype(np.int64), values.drop_null()
        else:
            setting = "nonfinite=0.0" if isinstance(column, Floats) else "drop_nulls=True"
            option = f"set {type(column).__name__}({column.name!r}, {setting})"
            _null_faults(values, column.name, inner_row_of, "a null inside a list", option, faults)
            return JaggedTensor(torch.zeros(len(values)), offsets=torch.from_numpy(offsets))
    if isinstance(column, Strings):
        leaf: Tensor | JaggedTensor = _bytes(values, column, inner_row_of, faults)
    else:
        leaf = _tensor(values)
        if isinstance(column, Floats):
            leaf = _finite_floats(leaf, column, inner_row_of, faults)
    return JaggedTensor(leaf, offsets=torch.from_numpy(offsets))


def _finite_floats(values: Tensor, column: Floats, row_of: RowOf, faults: Faults) -> Tensor:
    if column.nonfinite is not None:
        return torch.where(values.isfinite(), values, torch.full_like(values, column.nonfinite))
    _finite_or_fault(values, column.name, row_of, f"set Floats({column.name!r}, nonfinite=0.0)", faults)
    return values


def _finite_or_fault(values: Tensor, name: str, row_of: RowOf, option: str, faults: Faults) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        positions = (~finite).nonzero()[:, 0].numpy()
        for row, position in zip(row_of(positions).tolist(), positions.tolist(), strict=True):
            faults.setdefault(row, Fault(name, float(values[position]), "NaN or infinite inside a list", option))


def _strings(array: pa.Array, column: Strings, faults: Faults) -> JaggedTensor:
    if column.depth > 0:
        return _lists(array, column, column.depth, _same_rows, faults)
    default = column.default.encode() if isinstance(column.default, str) else None
    return _bytes(_filled(array, default, column.name, faults, empty=b""), column, _same_rows, faults)


def _bytes(array: pa.Array, column: Strings, row_of: RowOf, faults: Faults) -> JaggedTensor:
    """A binary array without nulls as a byte-jagged tensor; the bytes are not copied."""
    if column.utf8:
        _utf8_faults(array, column, row_of, faults)
    raw = list_offsets(array)
    start, stop = int(raw[0]), int(raw[-1])
    data = array.buffers()[2]
    flat = pa.Array.from_buffers(pa.uint8(), stop - start, [None, data], offset=start) if stop > start else None
    values = torch.empty(0, dtype=torch.uint8) if flat is None else _tensor(flat)
    return JaggedTensor(values, offsets=torch.from_numpy(raw.astype(np.int64) - start))


def _utf8_faults(array: pa.Array, column: Strings, row_of: RowOf, faults: Faults) -> None:
    try:
        array.cast(pa.string())
    except pa.ArrowInvalid:
        for position in range(len(array)):
            try:
                array[position].as_py().decode()
            except UnicodeDecodeError:
                row = int(row_of(np.array([position]))[0])
                option = f"set Strings({column.name!r}, utf8=False) to take any bytes"
                faults.setdefault(row, Fault(column.name, array[position].as_py(), "bytes that are no UTF-8", option))


def _filled(
    array: pa.Array,
    default: object,
    name: str,
    faults: Faults,
    *,
    rows_per: int = 1,
    row_of: RowOf | None = None,
    empty: object = 0,
) -> pa.Array:
    """Replace nulls by the default; without one, note each null as a fault and go on with `empty`."""
    if array.null_count == 0:
        return array
    if default is None:
        owner = row_of or (lambda positions: positions // rows_per)
        _null_faults(
            array, name, owner, "a null, and the column has no default", f"set default=... for {name!r}", faults
        )
        default = empty
    if not (pt.is_list(array.type) or pt.is_binary(array.type)):
        return array.fill_null(pa.scalar(default, array.type))
    both = pa.concat_arrays(
        [array, pa.array([default], array.type)]
    )  # lists have no fill_null: point nulls at a last row
    places = np.arange(len(array))
    places[array.is_null().to_numpy(zero_copy_only=False)] = len(array)
    return both.take(pa.array(places))


def _null_faults(array: pa.Array, name: str, row_of: RowOf, problem: str, option: str, faults: Faults) -> None:
    positions = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
    for row in row_of(positions).tolist():
        faults.setdefault(row, Fault(name, None, problem, option))


def _row_of_lists(offsets: np.ndarray, outer: RowOf) -> RowOf:
    return lambda positions: outer(np.searchsorted(offsets, positions, side="right") - 1)


def _same_rows(positions: np.ndarray) -> np.ndarray:
    return positions


def _tensor(array: pa.Array) -> Tensor:
    """A primitive array without nulls as a tensor over the same memory."""
    return torch.from_dlpack(array)
