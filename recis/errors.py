"""What the product raises when a person can put the cause right, and how a name is suggested.

Every class here is an ordinary exception whose text is one clear line: the thing, the rule, the value and the way out.
The commands print that line and keep the traceback for `--debug`; anything else that escapes is a fault of ours.

    RecisError ── ConfigError (a ValueError)      a setting breaks a rule: found when objects are built
               ├─ DataError (a ValueError)        a file or a value in it cannot be used: found while reading
               └─ CheckpointError (a RuntimeError) a checkpoint is damaged, of another version or of other tables
"""

from collections.abc import Iterable
from difflib import get_close_matches


class RecisError(Exception):
    """Base of the errors whose text alone tells the user what to do."""


class ConfigError(RecisError, ValueError):
    """A setting that breaks a rule; raised while configs, readers and models are built."""


class CheckpointError(RecisError, RuntimeError):
    """A checkpoint that cannot be used as asked: damaged, incomplete, newer, or made for other tables."""


class DataError(RecisError, ValueError):
    """Input that cannot be used, with the place it was found at.

    The fields that are known come first in the text, in a fixed order, so that logs can be searched:
    `clicks.parquet, row group 3, row 17, column 'price', value nan: NaN in a dense column; give Dense(nonfinite=0.0)`.

    Attributes:
        problem: what is wrong, in words.
        file: path as the user gave it, or as found below it.
        unit: unit of work inside the file, in words ("row group 3", "stripe 0", "bytes 0:67108864").
        row: row number from 0 inside the unit (inside the batch where there is no unit).
        column: name of the column or feature.
        value: the offending value, shortened to 80 characters in the text.
        option: the setting that would accept the input, or another way out.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        unit: str | None = None,
        row: int | None = None,
        column: str | None = None,
        value: object = None,
        option: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = file
        self.unit = unit
        self.row = row
        self.column = column
        self.value = value
        self.option = option
        super().__init__(self._text())

    def _text(self) -> str:
        place = [part for part in (self.file, self.unit) if part is not None]
        if self.row is not None:
            place.append(f"row {self.row}")
        if self.column is not None:
            place.append(f"column {self.column!r}")
        if self.value is not None:
            shown = repr(self.value)
            place.append(f"value {shown if len(shown) <= 80 else shown[:77] + '...'}")
        text = f"{', '.join(place)}: {self.problem}" if place else self.problem
        return f"{text}; {self.option}" if self.option else text


def nearest(name: str, names: Iterable[str], *, limit: int = 3) -> str:
    """Return the end of a sentence that suggests what `name` was meant to be.

    Gives "did you mean 'a' or 'b'?" with at most `limit` near names, else the names there are (at most 12 of them).
    """
    known = sorted(set(names))
    close = get_close_matches(name, known, n=limit, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    if not known:
        return "there are none"
    shown = ", ".join(map(repr, known[:12]))
    return f"there are {shown}" + (f" and {len(known) - 12} more" if len(known) > 12 else "")
