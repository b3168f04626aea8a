"""A customer's past and the shop's past at a cut-off, as matrices; and the strong hand rule on them.

    history of u, i    H[u, i] = sum over lines of exp(-age / 90 days)
    popularity of i    share[i] = customers who bought i in the last 30 days / the largest such number
    item-kNN           S[i, j] = customers who bought both / sqrt(customers of i * customers of j), S[i, i] = 0;  knn = H S
    hand rule          H[u, i] * (0.2 + share[i]) + 0.02 * knn[u, i]

U customers, I items, P distinct pairs (customer, item). Matrices are float32 [U, I] (59 MB on the public file); everything
is computed once, when first asked for.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from recis.recipes.retail_log import WINDOW_DAYS, PurchaseLog

RULE_DECAY_DAYS = 90.0
RULE_POPULARITY_DAYS = 30.0
RULE_FLOOR = 0.2
RULE_KNN_WEIGHT = 0.02


class History:
    """All purchases before a cut-off; it holds no later line, so nothing computed from it can read one.

    Args:
        log: any log; its lines before `cutoff` are taken.
        cutoff: days since 1970.

    Attributes:
        lines: those lines.
        age: [N] days from each line to the cut-off, above 0.
        keys: [P] int64, customer * I + item of the distinct pairs, ascending.
        pair: [N] index of each line's pair.

    Raises:
        ValueError: nothing was bought before the cut-off.
    """

    def __init__(self, log: PurchaseLog, cutoff: float) -> None:
        self.lines = log.before(cutoff)
        if len(self.lines) == 0:
            raise ValueError(f"no purchase lies before the cut-off {cutoff} (days since 1970)")
        self.cutoff = cutoff
        self.age = cutoff - self.lines.day
        self.keys, self.pair = np.unique(self.lines.customer * log.num_items + self.lines.item, return_inverse=True)
        self.num_customers = log.num_customers
        self.num_items = log.num_items

    # ---- one value per pair [P]

    def pair_sum(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Return the sum of a value per line [N] over each pair's lines; the number of lines for None."""
        return np.bincount(self.pair, weights=weights, minlength=len(self.keys)).astype(np.float64)

    @cached_property
    def first_age(self) -> np.ndarray:
        """Days since the pair's first line."""
        age = np.zeros(len(self.keys))
        np.maximum.at(age, self.pair, self.age)
        return age

    @cached_property
    def last_age(self) -> np.ndarray:
        """Days since the pair's last line."""
        age = np.full(len(self.keys), np.inf)
        np.minimum.at(age, self.pair, self.age)
        return age

    def matrix(self, values: np.ndarray) -> Tensor:
        """Return float32 [U, I] with a value per pair [P], 0 elsewhere."""
        table = torch.zeros(self.num_customers * self.num_items)
        table[torch.from_numpy(self.keys)] = torch.from_numpy(values.astype(np.float32))
        return table.view(self.num_customers, self.num_items)

    # ---- matrices

    @cached_property
    def owned(self) -> Tensor:
        """[U, I], 1 where the customer ever bought the item."""
        return self.matrix(np.ones(len(self.keys)))

    @cached_property
    def decayed(self) -> Tensor:
        """[U, I], H above."""
        return self.matrix(self.pair_sum(np.exp(-self.age / RULE_DECAY_DAYS)))

    def bought_within(self, days: float, *, until: float = 0.0) -> Tensor:
        """Return [U, I], 1 where the customer has a line of the item whose age lies in (until, days]."""
        lines = (self.age > until) & (self.age <= days)
        return self.matrix(np.bincount(self.pair[lines], minlength=len(self.keys)) > 0)

    def buyers(self, days: float, *, until: float = 0.0) -> np.ndarray:
        """Return [I], customers with a line of the item whose age lies in (until, days]."""
        lines = (self.age > until) & (self.age <= days)
        items = self.keys[np.unique(self.pair[lines])] % self.num_items
        return np.bincount(items, minlength=self.num_items).astype(np.float64)

    @cached_property
    def popularity(self) -> np.ndarray:
        """[I], share above."""
        buyers = self.buyers(RULE_POPULARITY_DAYS)
        return buyers / max(buyers.max(), 1.0)

    @cached_property
    def similarity(self) -> Tensor:
        """[I, I], S above."""
        return cosine(self.owned)

    def knn(self, customers: np.ndarray) -> Tensor:
        """Return item-kNN scores [len(customers), I]."""
        return self.decayed[torch.from_numpy(customers)] @ self.similarity

    def rule(self, customers: np.ndarray) -> Tensor:
        """Return the hand rule's scores [len(customers), I]."""
        weight = torch.from_numpy(RULE_FLOOR + self.popularity).float()
        return self.decayed[torch.from_numpy(customers)] * weight + RULE_KNN_WEIGHT * self.knn(customers)

    def active(self) -> Tensor:
        """Return bool [U]: who bought anything in the last 28 days."""
        found = torch.zeros(self.num_customers, dtype=torch.bool)
        found[torch.from_numpy(self.lines.customer[self.age <= WINDOW_DAYS])] = True
        return found


def cosine(owned: Tensor) -> Tensor:
    """Return [I, I] cosine of the columns of a 0/1 matrix [U, I], with a diagonal of zeros."""
    both = owned.T @ owned
    scale = both.diagonal().clamp(min=1).rsqrt()
    return (both * scale * scale[:, None]).fill_diagonal_(0)
