"""One feature of a batch as a jagged tensor, and the checks that both jagged classes share.

    bag b is values[offsets[b]:offsets[b + 1]];   values [L] ids, [L, D] vectors, or a jagged tensor (nested lists)

A string column is *byte-jagged*: values are uint8 [bytes] and a bag is one string; a list of strings per sample is a
jagged tensor over such a column. Weights [L] belong to the entries of their own level.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from recis_kernels.dispatch import checks_enabled
from recis_kernels.jagged import (
    jagged_to_padded,
    lengths_to_offsets,
    offsets_to_lengths,
    padded_to_jagged,
    trimmed_lengths,
)
from recis_kernels.ragged_truncate import ragged_take as _take


class JaggedTensor:
    """One feature of a batch: B bags of values.

    Args:
        values: [L] ids or bytes, [L, D] vectors, or a JaggedTensor with L bags (nested lists, outermost level first).
        lengths: [B] int64 or int32, bag sizes.
        offsets: [B + 1] of the same, from 0. Give either; the other is derived when asked for.
        weights: [L] floating point, one per entry of values, or None.

    Raises:
        ValueError: neither lengths nor offsets is given, a shape or dtype is wrong, offsets do not start at 0 or end
            past the values (on the CPU; on a GPU only under `recis_kernels.checks()`).
    """

    __slots__ = ("_lengths", "_offsets", "values", "weights")

    values: "Tensor | JaggedTensor"
    weights: Tensor | None

    def __init__(
        self,
        values: "Tensor | JaggedTensor",
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        if isinstance(values, Tensor):
            if values.ndim not in (1, 2):
                raise ValueError(f"values must be [L] or [L, D]; got shape {tuple(values.shape)}")
        elif not isinstance(values, JaggedTensor):
            raise ValueError(f"values must be a Tensor or a JaggedTensor; got {type(values).__name__}")
        check_bags(_num_entries(values), lengths, offsets, weights)
        self._set(values, lengths, offsets, weights)

    @classmethod
    def _trusted(cls, values, *, lengths=None, offsets=None, weights=None) -> "JaggedTensor":
        new = object.__new__(cls)
        new._set(values, lengths, offsets, weights)
        return new

    def _set(self, values, lengths, offsets, weights) -> None:
        for name, field in (("values", values), ("weights", weights), ("_lengths", lengths), ("_offsets", offsets)):
            object.__setattr__(self, name, field)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"JaggedTensor is immutable: build a new one instead of setting {name!r}")

    def __getstate__(self) -> tuple:
        return self.values, self._lengths, self._offsets, self.weights

    def __setstate__(self, state: tuple) -> None:
        self._set(*state)

    @property
    def lengths(self) -> Tensor:
        """Bag sizes [B]."""
        if self._lengths is None:
            object.__setattr__(self, "_lengths", offsets_to_lengths(self.offsets))
        return self._lengths  # type: ignore[return-value]

    @property
    def offsets(self) -> Tensor:
        """Bag boundaries [B + 1], from 0."""
        if self._offsets is None:
            object.__setattr__(self, "_offsets", derive_offsets(self._lengths, _num_entries(self.values)))
        return self._offsets  # type: ignore[return-value]

    @property
    def num_bags(self) -> int:
        """B, known without reading any tensor."""
        return self._lengths.numel() if self._lengths is not None else self._offsets.numel() - 1  # type: ignore[union-attr]

    @property
    def num_values(self) -> int:
        """L: entries of values at this level (inner bags, when nested)."""
        return _num_entries(self.values)

    @property
    def is_nested(self) -> bool:
        """Whether values is itself jagged."""
        return isinstance(self.values, JaggedTensor)

    @property
    def is_strings(self) -> bool:
        """Whether this level is byte-jagged: uint8 values, one string per bag."""
        return isinstance(self.values, Tensor) and self.values.dtype == torch.uint8 and self.values.ndim == 1

    @property
    def inner(self) -> "JaggedTensor":
        """The next level of a nested tensor; ValueError where there is none."""
        if isinstance(self.values, Tensor):
            raise ValueError(f"{self!r} is not nested: it has no inner level")
        return self.values

    @property
    def flat_values(self) -> Tensor:
        """The innermost values tensor."""
        return self.values if isinstance(self.values, Tensor) else self.values.flat_values

    @property
    def device(self) -> torch.device:
        """Device of the innermost values."""
        return self.flat_values.device

    def __len__(self) -> int:
        return self.num_bags

    def __repr__(self) -> str:
        values = (
            f"{self.values.dtype} {list(self.values.shape)}" if isinstance(self.values, Tensor) else repr(self.values)
        )
        weighted = "" if self.weights is None else ", weighted"
        return f"JaggedTensor({self.num_bags} bags of {values}{weighted})"

    def with_values(self, values: "Tensor | JaggedTensor", weights: Tensor | None = None) -> "JaggedTensor":
        """Return the same bags over other values [L, ...]; weights are the given ones."""
        if _num_entries(values) != self.num_values:
            raise ValueError(f"these bags hold {self.num_values} entries; the new values have {_num_entries(values)}")
        return JaggedTensor._trusted(values, lengths=self._lengths, offsets=self._offsets, weights=weights)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "JaggedTensor":
        """Return this on another device (itself where nothing has to move)."""
        moved = [move(field, device, non_blocking) for field in (self._lengths, self._offsets, self.weights)]
        values = self.values.to(device, non_blocking=non_blocking)
        return JaggedTensor._trusted(values, lengths=moved[0], offsets=moved[1], weights=moved[2])

    def to_padded(self, *, max_length: int | None = None, fill: float = 0) -> Tensor:
        """Return rows [B, T] or [B, T, D]; longer bags keep their first T entries, shorter ones end in `fill`.

        max_length = None takes the longest bag, which reads the lengths (a synchronisation on a GPU). Differentiable.

        Raises:
            ValueError: values is nested (pad `.values`, the inner level, instead).
        """
        if not isinstance(self.values, Tensor):
            raise ValueError("to_padded needs plain values; this is nested: pad its inner level, `.values`, instead")
        if max_length is None:
            max_length = int(self.lengths.max()) if self.num_bags else 0
        return jagged_to_padded(self.values, self.offsets, max_length, fill=fill)

    @staticmethod
    def from_padded(x: Tensor, *, invalid: int | None = None) -> "JaggedTensor":
        """Return the rows of x [B, T] or [B, T, D] as bags.

        Trims trailing entries equal to `invalid` (inner ones stay); None keeps all T of every row. Differentiable in x.
        """
        if x.ndim not in (2, 3):
            raise ValueError(f"from_padded needs [B, T] or [B, T, D]; got shape {tuple(x.shape)}")
        num_rows, num_columns = x.shape[:2]
        if invalid is None:
            offsets = torch.arange(num_rows + 1, device=x.device) * num_columns
            return JaggedTensor._trusted(x.reshape(num_rows * num_columns, *x.shape[2:]), offsets=offsets)
        lengths = trimmed_lengths(x, invalid)
        offsets = lengths_to_offsets(lengths)
        values = padded_to_jagged(x, offsets, int(offsets[-1]))
        return JaggedTensor._trusted(values, lengths=lengths, offsets=offsets)

    @staticmethod
    def from_strings(strings: Sequence[str | bytes]) -> "JaggedTensor":
        """Return the byte-jagged column of these strings (str as UTF-8): uint8 values, one bag per string."""
        encoded = [text.encode() if isinstance(text, str) else bytes(text) for text in strings]
        joined = b"".join(encoded)
        values = torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        return JaggedTensor(values, lengths=torch.tensor([len(text) for text in encoded], dtype=torch.int64))

    @staticmethod
    def from_lists(
        rows: Sequence[Sequence[Any]],
        *,
        weights: Sequence[Sequence[float]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> "JaggedTensor":
        """Return the jagged tensor of lists, nested as deep as they are; str and bytes entries become byte-jagged.

        dtype None: int64 when every entry is an int (or there is none), else float32. `weights` is shaped as rows.
        """
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        flat = [entry for row in rows for entry in row]
        if flat and isinstance(flat[0], str | bytes):
            values: Tensor | JaggedTensor = JaggedTensor.from_strings(flat)
        elif flat and isinstance(flat[0], Sequence):
            values = JaggedTensor.from_lists(flat, dtype=dtype)
        else:
            values = torch.tensor(flat, dtype=dtype or (torch.float32 if _has_float(flat) else torch.int64))
        flat_weights = None
        if weights is not None:
            if [len(row) for row in weights] != [len(row) for row in rows]:
                raise ValueError("weights must have one number per entry of each row")
            flat_weights = torch.tensor([weight for row in weights for weight in row], dtype=torch.float32)
        return JaggedTensor(values, lengths=lengths, weights=flat_weights)

    def to_lists(self) -> list[list[Any]]:
        """Return the bags as Python lists (strings come back as lists of their bytes; see to_strings)."""
        entries = self.values.tolist() if isinstance(self.values, Tensor) else self.values.to_lists()
        return [entries[start:stop] for start, stop in pairwise(self.offsets.tolist())]

    def to_strings(self) -> list[bytes]:
        """Return the strings of a byte-jagged column."""
        if not self.is_strings:
            raise ValueError(f"to_strings needs uint8 values [bytes]; this is {self!r}")
        joined = self.flat_values.cpu().numpy().tobytes()
        return [joined[start:stop] for start, stop in pairwise(self.offsets.tolist())]


def ragged_take(offsets: Tensor, dropped: Tensor, picks: Tensor | JaggedTensor) -> JaggedTensor:
    """Map picks inside truncated rows back to flat indices: offsets[r] + dropped[r] + pick.

    Args:
        offsets: [B + 1] of the rows before truncation.
        dropped: [B] entries cut from the head of each row (`Truncate` with drop="left"; zeros for "right").
        picks: [B, K], or B bags, of positions in the truncated rows.

    Returns:
        B bags of flat indices, int64; picks past the end of their row, and negative ones (the usual padding), are gone.

    Raises:
        ValueError: shapes disagree.
    """
    if isinstance(picks, Tensor):
        if picks.ndim != 2:
            raise ValueError(f"picks must be [B, K] or jagged; got shape {tuple(picks.shape)}")
        picks = JaggedTensor.from_padded(picks)
    if not isinstance(picks.values, Tensor) or picks.values.ndim != 1:
        raise ValueError(f"picks must hold flat positions; got {picks!r}")
    indices, new_offsets = _take(offsets, dropped, picks.values, picks.offsets)
    return JaggedTensor._trusted(indices, offsets=new_offsets)


def check_bags(
    num_values: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    *,
    exact: bool = False,
) -> None:
    """Raise ValueError unless the fields fit together; exact: the offsets must end at num_values, not before."""
    if lengths is None and offsets is None:
        raise ValueError("give lengths [B] or offsets [B + 1]")
    for name, field in (("lengths", lengths), ("offsets", offsets)):
        if field is not None and (field.ndim != 1 or field.dtype not in (torch.int64, torch.int32)):
            raise ValueError(f"{name} must be 1-D int64 or int32; got {describe(field)}")
    if offsets is not None and offsets.numel() == 0:
        raise ValueError("offsets must be [B + 1]; an empty batch has the offsets [0]")
    if lengths is not None and offsets is not None and offsets.numel() != lengths.numel() + 1:
        raise ValueError(f"{lengths.numel()} lengths need {lengths.numel() + 1} offsets; got {offsets.numel()}")
    if weights is not None and (weights.shape != (num_values,) or not weights.is_floating_point()):
        raise ValueError(f"weights must be floating point [{num_values}], one per entry; got {describe(weights)}")
    if offsets is not None:
        check_ends(offsets, num_values, exact=exact)
    if lengths is not None and checks_enabled():
        if lengths.numel() and int(lengths.min()) < 0:
            bag = int(lengths.argmin())
            raise ValueError(f"lengths must not be negative; bag {bag} has {int(lengths[bag])}")
        check_ends(lengths_to_offsets(lengths), num_values, exact=exact)
        if offsets is not None and not torch.equal(offsets.diff(), lengths):
            raise ValueError("lengths and offsets disagree; give one of them")


def check_ends(offsets: Tensor, num_values: int, *, exact: bool) -> None:
    """Raise ValueError unless offsets start at 0 and stay inside the values.

    On the CPU this reads two numbers, about 2 us and no synchronisation, because a loop over wrong offsets would read
    foreign memory. On a GPU nothing is read, unless checks are on; then all of it is, on any device.
    """
    if torch.compiler.is_compiling() or not (checks_enabled() or offsets.device.type == "cpu"):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"offsets must start at 0; they start at {first}: subtract it and cut values to match")
    if last > num_values or last < 0 or (exact and last != num_values):
        raise ValueError(f"offsets end at {last}, but there are {num_values} values")
    if checks_enabled() and bool((offsets.diff() < 0).any()):
        bag = int((offsets.diff() < 0).nonzero()[0])
        raise ValueError(f"offsets must not descend; bag {bag} is {offsets[bag : bag + 2].tolist()}")


def derive_offsets(lengths: Tensor, num_values: int, *, exact: bool = False) -> Tensor:
    """Return the offsets of lengths [B], checked like given ones."""
    offsets = lengths_to_offsets(lengths)
    check_ends(offsets, num_values, exact=exact)
    return offsets


def move(field: Tensor | None, device: torch.device | str, non_blocking: bool) -> Tensor | None:
    """Return the tensor, if there is one, on the device."""
    return None if field is None else field.to(device, non_blocking=non_blocking)


def describe(field: object) -> str:
    """Return a tensor's shape and dtype, or the type of what is not a tensor, for messages."""
    return f"{tuple(field.shape)} {field.dtype}" if isinstance(field, Tensor) else type(field).__name__


def _num_entries(values: "Tensor | JaggedTensor") -> int:
    return values.shape[0] if isinstance(values, Tensor) else values.num_bags


def _has_float(entries: list[Any]) -> bool:
    return any(isinstance(entry, float) for entry in entries)
