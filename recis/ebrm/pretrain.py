"""Stage A: teach the scorer (query, entity) pairs from labels that logs give.

    L = sum_i w_i BCE(y_i, sigmoid(z_i)) / sum_i w_i          over a batch of rows (query, entity, y, w)

Rows of one pair are merged first (weights add up, y is their weighted mean): the loss is the same, and each pair is
encoded once. The loop is this file's own, not recis.trainer's: that one reads columns of ids from files and looks rows of
tables up, while here a batch is text pairs that go through a tokenizer, and there is no table.
Source of the idea, pretraining on pairs made from logs: arXiv:2307.00370; loss and merging are ours.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recis.ebrm.canonical import canonical_text
from recis.ebrm.descent import Descent, StepConfig, autocast
from recis.ebrm.entities import type_of
from recis.ebrm.fallback import TypePriors
from recis.ebrm.labels_from_logs import QERow
from recis.ebrm.model import EBRM
from recis.ebrm.resume import Progress, restore, state_of
from recis.ebrm.scorer import Pair
from recis.errors import DataError
from recis.trainer.randomness import deterministic_torch

STAGE = "pretrain"
CHUNK_BATCHES = 16  # pairs of like length are put together within so many batches
OnEpoch = Callable[[int, float], None]
"""Called with the epoch from 1 and its mean loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QETable:
    """N labelled pairs, each once."""

    pairs: tuple[Pair, ...]
    """(canonical query, entity id)."""
    y: np.ndarray
    """float32 [N] in [0, 1]."""
    w: np.ndarray
    """float32 [N], above 0."""

    def __len__(self) -> int:
        return len(self.pairs)

    def at(self, rows: Sequence[int]) -> tuple[list[Pair], Tensor, Tensor]:
        """Return pairs, y [B] and w [B] of some rows."""
        places = np.asarray(rows, np.int64)
        return [self.pairs[row] for row in rows], torch.from_numpy(self.y[places]), torch.from_numpy(self.w[places])


def merge_rows(rows: Iterable[QERow]) -> QETable:
    """Return the rows with those of one pair merged, in order of first arrival.

    Raises:
        DataError: an empty query.
    """
    sums: dict[Pair, tuple[float, float]] = {}
    canonical: dict[str, str] = {}
    for row in rows:
        query = canonical.get(row.query)
        if query is None:
            query = canonical[row.query] = canonical_text(row.query)
            if not query:
                raise DataError("qe row: the query must not be empty", value=row.query)
        weight, weighted = sums.get((query, row.entity), (0.0, 0.0))
        sums[query, row.entity] = (weight + row.w, weighted + row.w * row.y)
    weights = np.array([weight for weight, _ in sums.values()], np.float64)
    positive = np.array([weighted for _, weighted in sums.values()], np.float64)
    return QETable(
        pairs=tuple(sums),
        y=(positive / weights).clip(0, 1).astype(np.float32),
        w=weights.astype(np.float32),
    )


def qe_loss(logits: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Return the weighted mean of the cross-entropies of labels y [B] in [0, 1] with logits [B]; scalar."""
    return (w * F.binary_cross_entropy_with_logits(logits, y, reduction="none")).sum() / w.sum()


def type_priors(table: QETable) -> TypePriors:
    """Return per type the logit of the weighted mean of y, which stands in where the encoder fails."""
    weight, positive = dict[str, float](), dict[str, float]()
    for (_, entity), y, w in zip(table.pairs, table.y.tolist(), table.w.tolist(), strict=True):
        name = type_of(entity)
        weight[name] = weight.get(name, 0.0) + w
        positive[name] = positive.get(name, 0.0) + w * y
    smooth = {name: (positive[name] + 0.5) / (weight[name] + 1.0) for name in sorted(weight)}
    return TypePriors({name: math.log(p / (1 - p)) for name, p in smooth.items()})


def pretrain(
    model: EBRM,
    rows: Iterable[QERow],
    config: StepConfig,
    *,
    on_epoch: OnEpoch | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train the model's scorer and comparators in place, set its fallback to the types' priors; return a loss per epoch.

    The same rows, weights and config give the same weights. The model is in evaluation mode afterwards. `progress` keeps
    where it stands, and goes on from there.

    Raises:
        DataError: no rows, or an empty query.
        ConfigError: an entity of an undeclared type.
        ValueError: a loss or gradient that is not finite.
    """
    table = merge_rows(rows)
    for _, entity in table.pairs:
        model.config.schema.position(type_of(entity))
    small = [model.comparators.parameters()]
    losses = fit(model, model.qe_logits, table, config, small=small, on_epoch=on_epoch, progress=progress)
    model.fallback = type_priors(table)
    return losses


def fit(
    module: nn.Module,
    score: Callable[[Sequence[Pair]], Tensor],
    table: QETable,
    config: StepConfig,
    *,
    small: Sequence[Iterable[nn.Parameter]] = (),
    on_epoch: OnEpoch | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Fit `score`, which gives logits from the module's weights, to a table; return the mean loss of each epoch.

    Args:
        module: its parameters that are not in `small` get config.lr; put into train mode meanwhile.
        score: pairs [B] -> logits [B].
        table: what to learn.
        config: of the steps.
        small: groups with a clip of their own and config.small_lr.
        on_epoch: told of each epoch.
        progress: where the stage "pretrain" is kept and goes on from; None keeps nothing.

    Raises:
        DataError: the table is empty.
        ValueError: a loss or gradient that is not finite.
    """
    if not len(table):
        raise DataError("training needs at least one labelled (query, entity) pair; got none")
    groups = [list(group) for group in small]
    apart = {id(parameter) for group in groups for parameter in group}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in apart and parameter.requires_grad]
    rng = random.Random(config.seed)
    steps_per_epoch = math.ceil(len(table) / config.batch_pairs)
    descent = Descent(rest, groups, config, config.epochs * steps_per_epoch)
    losses: list[float] = []
    total, step = 0.0, 0
    device = next(module.parameters()).device
    progress = progress or Progress()
    module.train()
    with seeded(config.seed, device):
        kept = progress.load(STAGE)
        done = 0
        if kept is not None:
            done = restore(kept, module, descent)
            losses, total = kept["losses"], kept["total"]
        for epoch in range(1, config.epochs + 1):
            for rows in batches(table, config.batch_pairs, rng):
                step += 1
                if step <= done:
                    continue
                pairs, y, w = table.at(rows)
                with autocast(device, config.precision):
                    logits = score(pairs)
                total += len(rows) * descent.step(qe_loss(logits, y.to(logits.device), w.to(logits.device)))
                if progress.is_due() and step % steps_per_epoch:
                    progress.save(STAGE, state_of(module, descent, step) | {"losses": losses, "total": total})
            if step > done:
                losses.append(total / len(table))
                total = 0.0
                progress.save(STAGE, state_of(module, descent, step) | {"losses": losses, "total": total})
                if on_epoch is not None:
                    on_epoch(epoch, losses[-1])
    module.eval()
    return losses


def batches(table: QETable, batch_pairs: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield the rows of one epoch in batches: shuffled, put by length within chunks, and the batches shuffled again."""
    order = list(range(len(table)))
    rng.shuffle(order)
    lengths = [len(query) + len(entity) for query, entity in table.pairs]
    cut: list[list[int]] = []
    for first in range(0, len(order), CHUNK_BATCHES * batch_pairs):
        near = sorted(order[first : first + CHUNK_BATCHES * batch_pairs], key=lengths.__getitem__)
        cut += [near[start : start + batch_pairs] for start in range(0, len(near), batch_pairs)]
    rng.shuffle(cut)
    yield from cut


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let torch draw from a seed, on a CPU by deterministic algorithms; its generators are as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), deterministic_torch(device.type == "cpu"):
        torch.manual_seed(seed)
        yield
