"""Recall@20 and NDCG@20 of rankings of all items, for all targets and for items that were hardly or never bought before.

    group       targets that count: all items;  bought by fewer than 5 customers before the split;  new: by none
    over all    the 20 best of all items, of them those that are targets of the group
    within      the 20 best of the group's items: what the model knows of them, were the others not in the way

A customer counts in a group when at least one of its targets is in it. Cold pairs are few, so each value comes with the 95 %
interval of its mean over customers (bootstrap, seeds averaged first).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis.recipes.retail_baselines import RESAMPLES, Quality, quality, top_hits
from recis.recipes.retail_log import PurchaseLog, active_customers

FEW = 5


@dataclass(frozen=True, slots=True)
class Targets:
    """What is to be found after the split.

    Attributes:
        customers: [N] numbers of those seen before who buy after it; bought: bool [N, I].
        groups: {name: bool [I]}.
    """

    customers: np.ndarray
    bought: np.ndarray
    groups: Mapping[str, np.ndarray]

    def pairs(self, group: str) -> int:
        """Return how many (customer, item) targets a group has."""
        return int(self.bought[:, self.groups[group]].sum())


def targets_at(log: PurchaseLog, split: float) -> Targets:
    """Return the targets of the 28 days from `split` on."""
    customers = active_customers(log, split)
    buyers = np.bincount(log.before(split).pairs() % log.num_items, minlength=log.num_items)
    groups = {
        "all items": np.ones(log.num_items, dtype=bool),
        f"< {FEW} buyers before": (buyers > 0) & (buyers < FEW),
        "new items": buyers == 0,
    }
    return Targets(customers, log.window(split).bought(customers), groups)


def group_quality(scores: Tensor, targets: Targets, group: str, *, within: bool) -> Quality:
    """Return the quality [customers of the group] of scores [N, I]."""
    mask = targets.groups[group]
    wanted = targets.bought & mask
    has = wanted.any(1)
    if within:
        scores = scores.masked_fill(torch.from_numpy(~mask), -torch.inf)
    return quality(top_hits(scores[torch.from_numpy(has)], wanted[has]), wanted[has].sum(1))


def mean_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values per customer [N]; NaN for none."""
    if len(values) == 0:
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def table(rankings: Mapping[str, Sequence[Tensor]], targets: Targets) -> str:
    """Return the table of rankings {name: scores [N, I] of each seed}."""
    lines = []
    for group in targets.groups:
        num = int((targets.bought & targets.groups[group]).any(1).sum())
        lines.append(
            f"{group}: {int(targets.groups[group].sum()):,} items, {targets.pairs(group):,} pairs, {num:,} customers"
        )
        spaces = (False,) if targets.groups[group].all() else (False, True)
        head = "".join(f"{'within the group' if within else 'over all items':>44}" for within in spaces)
        lines += [f"  {'':<34}{head}", f"  {'':<34}" + f"{'Recall@20':>12}{'':>18}{'NDCG@20':>14}" * len(spaces)]
        for name, seeds in rankings.items():
            cells = [
                _cell([group_quality(scores, targets, group, within=within) for scores in seeds]) for within in spaces
            ]
            lines.append(f"  {name:<34}{''.join(cells)}")
    return "\n".join(lines)


def _cell(seeds: Sequence[Quality]) -> str:
    recall, ndcg = (np.mean([getattr(found, name) for found in seeds], axis=0) for name in ("recall", "ndcg"))
    low, high = mean_interval(recall)
    return f"{recall.mean():>12.4f}  [{low:.4f}, {high:.4f}]{ndcg.mean():>14.4f}"
