"""What a table must remember between two checkpoints so that a delta can say it.

A delta holds rows touched by training since its base, which the rows' own last_seen tells, and two things it does not:
ids that lost their row, and rows written by hand with an old last_seen.
"""

import torch
from torch import Tensor


class ChangeLog:
    """Ids removed and ids written by hand since a base; nothing is kept before the first `start`.

    Attributes:
        started: whether there is a base.
    """

    def __init__(self) -> None:
        self.started = False
        self._removed: list[Tensor] = []
        self._written: list[Tensor] = []

    def start(self) -> None:
        """Begin a new base: what was logged so far is in it."""
        self.started = True
        self._removed, self._written = [], []

    def removed(self, ids: Tensor) -> None:
        """Log ids [N] whose row went, by eviction or by hand."""
        if self.started and ids.numel():
            self._removed.append(ids)

    def written(self, ids: Tensor) -> None:
        """Log ids [N] whose row was written by hand."""
        if self.started and ids.numel():
            self._written.append(ids)

    def tombstones(self) -> Tensor:
        """Return the removed ids, ascending int64, each once."""
        self._removed = [_distinct(self._removed)]
        return self._removed[0]

    def hand_written(self) -> Tensor:
        """Return the ids written by hand, ascending int64, each once."""
        self._written = [_distinct(self._written)]
        return self._written[0]

    def load(self, removed: Tensor, written: Tensor) -> None:
        """Continue a log as it was."""
        self.started = True
        self._removed, self._written = [removed], [written]


def _distinct(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).unique() if parts else torch.empty(0, dtype=torch.int64)
