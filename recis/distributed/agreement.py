"""What owners decide together about tables they share: one norm, one capacity, one clock.

Each function is a collective, and its result depends on the rows of all ranks alone, not on who holds them: a run over any
number of ranks clips and evicts alike.
"""

import math

import numpy as np
import torch
from torch import Tensor

from recis.distributed.ranks import Ranks
from recis.embedding.eviction import lowest

_BITS = 36  # of each of two limbs: 2**27 rows of them add up in an int64


def sum_of_squares(ranks: Ranks, squares: Tensor, what: str) -> Tensor:
    """Return the sum over all ranks of squares [N] float64, finite and not negative, a float64 scalar.

        q = floor(s 2**(72 - e)) with 2**e above the largest s;   sum = Σ q in whole numbers, times 2**(e - 72)

    Whole numbers add to the same sum in any order; what the floor loses is 2**-72 of the largest per row.
    """
    largest = squares.max() if squares.numel() else torch.zeros((), dtype=torch.float64)
    largest = float(ranks.largest(largest.double().reshape(1), what))
    if largest == 0 or not math.isfinite(largest):
        return torch.tensor(largest, dtype=torch.float64)
    _, exponent = math.frexp(largest)
    scaled = np.ldexp(squares.double().cpu().numpy(), _BITS - exponent)  # below 2**36
    high = np.floor(scaled)
    low = np.floor(np.ldexp(scaled - high, _BITS))
    limbs = torch.tensor([int(high.astype(np.int64).sum()), int(low.astype(np.int64).sum())])
    summed = ranks.total(limbs, what)
    whole = (int(summed[0]) << _BITS) + int(summed[1])
    return torch.tensor(math.ldexp(whole, exponent - 2 * _BITS), dtype=torch.float64)


def lowest_of_all(ranks: Ranks, scores: Tensor, last_seen: Tensor, ids: Tensor, num_rows: int, what: str) -> Tensor:
    """Return which of this rank's candidates [N] are among the num_rows lowest of all ranks' by (score, last_seen, id).

    Args:
        scores: [N] int or float.  last_seen, ids: [N] int. The rank's own num_rows lowest, or all it has: none of its other
            rows can be among the lowest of all.

    Returns:
        bool [N].
    """
    if ranks.world_size == 1:
        picked = torch.zeros(ids.numel(), dtype=torch.bool)
        picked[lowest(scores, last_seen, ids, num_rows)] = True
        return picked
    whole = not scores.is_floating_point()
    bits = scores.long() if whole else scores.double().view(torch.int64)
    rows = torch.stack([bits, last_seen.long(), ids.long()], dim=1)
    gathered = ranks.gather_rows(rows, what)
    first = sum(part.shape[0] for part in gathered[: ranks.rank])
    every = torch.cat(gathered)
    keys = every[:, 0] if whole else every[:, 0].contiguous().view(torch.float64)
    chosen = torch.zeros(every.shape[0], dtype=torch.bool)
    chosen[lowest(keys, every[:, 1], every[:, 2], num_rows)] = True
    return chosen[first : first + ids.numel()]
