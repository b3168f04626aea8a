"""What a sample says of a table's ids: how many are distinct, how skewed they are, how many there will be.

    distinct(n) ~ n^b        b from the second half of the sample (Heaps' law); 1 at most, 0 at least
    count of the k-th most frequent ~ k^-s

A whole epoch is no sample: its distinct ids are the rows.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class IdStatistics:
    """What a sample says of one table.

    Attributes:
        samples: of the sample.  positions: ids in it.
        distinct_half, distinct: distinct ids in its first half, in all of it.
        zipf: exponent s of counts ~ rank^-s over the most frequent ids; nan where there are too few.
        most: share of all positions that the most frequent id has.
    """

    samples: int
    positions: int
    distinct_half: int
    distinct: int
    zipf: float
    most: float

    def rows_at(self, samples: int) -> tuple[int, str]:
        """Return distinct ids in `samples` samples, and how that came."""
        if samples <= self.samples + 1 or not self.distinct:  # halves leave one of an odd number out
            return self.distinct, f"{self.distinct:,} distinct ids in the sample, which is all of the data"
        growth = math.log2(self.distinct / self.distinct_half) if self.distinct_half else 1.0
        growth = min(1.0, max(0.0, growth))
        rows = math.ceil(self.distinct * (samples / self.samples) ** growth)
        return rows, (
            f"{self.distinct:,} distinct ids in {self.samples:,} samples ({self.distinct_half:,} in half) x "
            f"({samples:,} / {self.samples:,})^{growth:.2f} = {rows:,}"
        )


def statistics_of(first_half: np.ndarray, second_half: np.ndarray, samples: int) -> IdStatistics:
    """Return the statistics of a table's ids, given in two halves of the sample."""
    ids, counts = np.unique(np.concatenate([first_half, second_half]), return_counts=True)
    counts = np.sort(counts)[::-1]
    positions = int(counts.sum())
    return IdStatistics(
        samples=samples,
        positions=positions,
        distinct_half=np.unique(first_half).size,
        distinct=ids.size,
        zipf=zipf_exponent(counts),
        most=float(counts[0]) / positions if positions else 0.0,
    )


def zipf_exponent(counts: np.ndarray) -> float:
    """Return s of the least-squares line log count = a - s log rank through counts in falling order, seen twice or more."""
    head = counts[counts >= 2][:1000]
    if head.size < 10:
        return math.nan
    slope, _ = np.polyfit(np.log(np.arange(1, head.size + 1)), np.log(head), 1)
    return float(-slope)
