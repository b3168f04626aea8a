"""What the calls of one forward share: the raw batch, vocabularies, counts, and faults that are read later on a GPU.

A content fault (a logarithm of a negative number, a row that may not be cut) raises DataError. On the CPU that is at
once; on a GPU reading the flag would stall the step, so it is read at the start of the next forward and named then.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from recis.errors import DataError
from recis.features.graph import Node
from recis.features.values import Data, Value
from recis.features.vocabulary import Vocabulary
from recis.io.batch import RawBatch
from recis_kernels.bucketize import Boundaries


class Faults:
    """Flags of content faults with what to say about them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], DataError]]] = []

    def check(self, flag: Tensor, describe: Callable[[], DataError]) -> None:
        """Raise describe() if flag (bool, 0-d) is set: now on the CPU, in raise_waiting on another device."""
        if flag.device.type != "cpu":
            self._waiting.append((flag, describe))
        elif bool(flag):
            raise describe()

    def raise_waiting(self) -> None:
        """Read the flags of the forward before and raise the first that is set."""
        waiting, self._waiting = self._waiting, []
        for flag, describe in waiting:
            if bool(flag):
                raise describe()


@dataclass(slots=True)
class MissCount:
    """How often a vocabulary did not know a value; `unknown` stays a tensor until it is asked for."""

    unknown: Tensor | int = 0
    looked_up: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One forward."""

    raw: RawBatch
    columns: Mapping[str, Data]
    """The required columns, ids and offsets in int64."""
    vocabularies: Mapping[int, Vocabulary]
    """Of Vocab and Lookup nodes, by number."""
    boundaries: Mapping[int, Boundaries]
    """Of Bucketize nodes, by number."""
    misses: dict[int, MissCount]
    """Of Vocab and Lookup nodes, by number; added to."""
    faults: Faults

    def error(self, node: Node, row: int, problem: str, *, value: object = None, option: str) -> DataError:
        """Return the error of a sample: which feature, which file and row, and the way out."""
        file, unit, number = self.raw.locate(row)
        name = node.features[0]
        column = node.column if node.column is not None and node.column != name else None
        text = f"feature {name!r}: {problem}"
        return DataError(text, file=file, unit=unit, row=number, column=column or name, value=value, option=option)


Inputs = Sequence[tuple[Value, ...]]
"""For each node of a group the values that go into it."""
