"""The segment table of a hash index on both sides of a GPU: addresses and slot counts on the host, exact counts there.

Loops and kernels read one row per segment (columns of `hash_probe`). On the CPU there is one table. On a GPU the kernels
own a copy and count in it, and the host must not wait to know whether an insert fits. It keeps a bound instead:

    live + dead <= counts of the last reading + ids inserted since it began

A reading copies the table to pinned memory behind the work already queued and is looked at once it has arrived, usually a
step later. So a step waits for the GPU only when the bound says that a segment might be full.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_kernels import hash_probe as probe


class SegmentTable:
    """Rows of int64 [num_segments, COLUMNS], doubling their room as segments are added.

    Args:
        device: where the kernels run.
        mirrored: keep a copy for kernels apart from the host's table; what a GPU needs, and tests ask for on the CPU.
    """

    def __init__(self, device: torch.device, *, mirrored: bool) -> None:
        self.device = device
        self.mirrored = mirrored
        self.num_segments = 0
        self._rows = torch.zeros(0, probe.COLUMNS, dtype=torch.int64)
        self._copy = torch.zeros(0, probe.COLUMNS, dtype=torch.int64, device=device)
        self._since = np.zeros(0, dtype=np.int64)  # ids inserted since the counts in _rows were right
        self._reading: tuple[Tensor, Any, np.ndarray] | None = None

    @property
    def host(self) -> Tensor:
        """The host's table; on a GPU its counts are those of the last reading."""
        return self._rows[: self.num_segments]

    @property
    def kernels(self) -> Tensor:
        """The table that kernels read and count in."""
        if not self.mirrored:
            return self.host
        have = len(self._copy)
        if have < self.num_segments:
            self._copy = torch.cat((self._copy, self._rows[have : self.num_segments].to(self.device)))
            self._reading = None
        return self._copy

    def add(self) -> int:
        """Add a row of zeros and return its number."""
        segment = self.num_segments
        if segment == len(self._rows):  # room for as many again, so that n segments cost O(n)
            more = max(segment, 8)
            self._rows = torch.cat((self._rows, torch.zeros(more, probe.COLUMNS, dtype=torch.int64)))
            self._since = np.concatenate((self._since, np.zeros(more, dtype=np.int64)))
        self.num_segments += 1
        return segment

    def pull(self) -> Tensor:
        """Return the host's table after making its counts exact: one host sync on a GPU."""
        if self.mirrored:
            have = len(self._copy)
            self._rows[:have] = self._copy.cpu()
            self._since[:] = 0
            self._reading = None
        return self.host

    def push(self) -> None:
        """Give the kernels the host's table, whose counts the caller has pulled and whose rows it has changed."""
        if self.mirrored:
            self._copy = self.host.to(self.device, copy=True)  # kernels under way may still read the old one
            self._reading = None

    def note_inserts(self, segments: np.ndarray, most: np.ndarray | int) -> None:
        """Say that each of these segments is about to take at most so many new ids."""
        self._since[segments] += most

    def bounds(self) -> np.ndarray:
        """Return an upper bound of live + dead of each segment, int64 [num_segments]; exact on the CPU."""
        self._take_reading()
        rows = self.host.numpy()
        return rows[:, probe.LIVE] + rows[:, probe.DEAD] + self._since[: self.num_segments]

    def start_reading(self) -> None:
        """Queue a copy of the kernels' table to the host, unless one is under way."""
        if not self.mirrored or self._reading is not None:
            return
        is_cuda = self.device.type == "cuda"
        arriving = torch.empty(self._copy.shape, dtype=torch.int64, pin_memory=is_cuda)
        arriving.copy_(self._copy, non_blocking=True)
        arrived = None
        if is_cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))
        self._reading = (arriving, arrived, self._since.copy())

    def _take_reading(self) -> None:
        if self._reading is None:
            return
        arriving, arrived, included = self._reading
        if arrived is None or arrived.query():
            self._rows[: len(arriving)] = arriving
            self._since[: len(included)] -= included
            self._reading = None
