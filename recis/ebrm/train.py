"""Stage B: train scorer, comparators and relaxation on labelled (query, item) pairs, and stay true to stage A.

    L = mean BCE(y, r) + lambda mean_w BCE_QE          lambda falls linearly from 0.1 to 0.02

The second term keeps s meaningful: the labels of pairs see s through the formula only, which leaves it free to drift.
A step takes whole queries until 256 pairs are full, so that candidates share entities: each distinct (query, entity) pair
of the step is encoded once. a_t has a rate and a clip of its own, and is put back onto [0, 1] after every step.

The loop is this file's own, not recis.trainer's: see recis.ebrm.pretrain.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis.ebrm.descent import Descent, StepConfig
from recis.ebrm.evaluate import roc_auc
from recis.ebrm.labels_from_logs import QERow
from recis.ebrm.model import EBRM
from recis.ebrm.pairs import QIPairs, score_pairs
from recis.ebrm.pretrain import QETable, batches, merge_rows, qe_loss, seeded
from recis.ebrm.soft_logic import relevance_loss
from recis.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class QIConfig(StepConfig):
    """Settings of stage B; those of the steps are StepConfig's."""

    qe_weight: float = 0.1
    """lambda at the first step."""
    qe_weight_end: float = 0.02
    """lambda at the last step."""
    qe_batch_pairs: int = 128
    """Stage A rows per step."""
    eval_every_steps: int = 500
    """Steps between measures on dev; there is one at the end too."""
    dev_queries: int = 300
    """Dev queries that each measure uses; the calibrator is fitted on all."""

    def __post_init__(self) -> None:
        super(
            QIConfig, self
        ).__post_init__()  # slots: a bare super() would look for the class before its slots were made
        if not (self.qe_weight >= 0 and self.qe_weight_end >= 0):
            raise ConfigError(f"qe_weight must be at least 0; got {self.qe_weight} to {self.qe_weight_end}")
        if min(self.qe_batch_pairs, self.eval_every_steps, self.dev_queries) < 1:
            raise ConfigError(
                "qe_batch_pairs, eval_every_steps and dev_queries must be at least 1; got "
                f"{self.qe_batch_pairs}, {self.eval_every_steps}, {self.dev_queries}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Where training stood at a measure on dev."""

    step: int
    loss: float
    """Mean since the measure before."""
    dev_roc_auc: float


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """How a training went: all measures, and the one whose weights were kept."""

    measures: tuple[Measure, ...]
    best: Measure


def stage_b_loss(
    log_r: Tensor, labels: Tensor, qe_logits: Tensor, qe_y: Tensor, qe_w: Tensor, qe_weight: float
) -> Tensor:
    """Return the loss of a step, scalar: log_r [P], labels [P] of pairs; logits, y, w [B] of stage A rows, B may be 0."""
    loss = relevance_loss(log_r, labels).mean()
    return loss + qe_weight * qe_loss(qe_logits, qe_y, qe_w) if qe_logits.numel() else loss


def qe_weight_at(step: int, num_steps: int, config: QIConfig) -> float:
    """Return lambda at a step from 0."""
    done = step / max(1, num_steps - 1)
    return config.qe_weight + (config.qe_weight_end - config.qe_weight) * done


def train(
    model: EBRM,
    pairs: QIPairs,
    dev: QIPairs,
    qe_rows: Iterable[QERow],
    config: QIConfig,
    *,
    on_measure: Callable[[Measure], None] | None = None,
) -> History:
    """Train a model in place; the weights of the best measure stay (the first of equals), and the calibrator is fitted.

    The same pairs, rows, weights and config give the same weights. The model is in evaluation mode afterwards.

    Args:
        model: pretrained or not.
        pairs: to train on.
        dev: to choose the step and to fit the calibrator on.
        qe_rows: stage A's; none leaves the second term out.
        config: settings.
        on_measure: told of each measure.

    Raises:
        DataError: no pairs, or a dev part without both labels.
        ValueError: a loss or gradient that is not finite.
    """
    if not len(pairs) or not config.epochs:
        raise DataError(
            f"training needs at least one labelled (query, item) pair and one epoch; got {len(pairs)}, {config.epochs}"
        )
    shown = dev.first_queries(config.dev_queries)
    for part in (shown, dev):
        if not (part.label.any() and (part.label == 0).any()):
            raise DataError(
                f"dev needs relevant and irrelevant pairs; got {int(part.label.sum())} relevant of {len(part)}"
            )
    with seeded(config.seed, model.pool.relaxation.device):
        history, kept = _run(model, pairs, shown, merge_rows(qe_rows), config, on_measure)
    model.load_state_dict(kept)
    log_r, _ = score_pairs(model, dev)
    model.fit_calibrator(log_r, dev.label)
    return history


def _run(
    model: EBRM,
    pairs: QIPairs,
    dev: QIPairs,
    table: QETable,
    config: QIConfig,
    on_measure: Callable[[Measure], None] | None,
) -> tuple[History, dict[str, Tensor]]:
    """Run all steps; return the measures and the weights of the best one."""
    rng = random.Random(config.seed)
    epochs = [list(query_batches(pairs, config.batch_pairs, rng)) for _ in range(config.epochs)]
    steps = [rows for epoch in epochs for rows in epoch]
    small = [model.comparators.parameters(), [model.pool.relaxation]]
    descent = Descent(model.scorer.parameters(), small, config, len(steps))
    rows_of_a = _forever(table, config.qe_batch_pairs, rng)
    measures: list[Measure] = []
    losses: list[float] = []
    best: Measure | None = None
    kept: dict[str, Tensor] = {}
    for step, rows in enumerate(steps, 1):
        model.train()
        weight = qe_weight_at(step - 1, len(steps), config)
        losses.append(descent.step(_loss(model, pairs, rows, table, next(rows_of_a), weight)))
        model.pool.project_()
        model.eval()
        if step % config.eval_every_steps and step < len(steps):
            continue
        log_r, _ = score_pairs(model, dev)
        measure = Measure(step=step, loss=float(np.mean(losses)), dev_roc_auc=roc_auc(log_r, dev.label))
        losses = []
        measures.append(measure)
        if on_measure is not None:
            on_measure(measure)
        if best is None or measure.dev_roc_auc > best.dev_roc_auc:
            best, kept = measure, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert best is not None  # the last step is always measured, and there is one
    return History(measures=tuple(measures), best=best), kept


def _loss(
    model: EBRM, pairs: QIPairs, rows: np.ndarray, table: QETable, qe_rows: list[int], qe_weight: float
) -> Tensor:
    places = zip(pairs.query[rows].tolist(), pairs.item[rows].tolist(), strict=True)
    own = [(pairs.queries[query], pairs.items[item]) for query, item in places]
    log_r = model([query for query, _ in own], [item for _, item in own]).log_r
    labels = torch.from_numpy(pairs.label[rows].astype(np.float32)).to(log_r.device)
    qe_pairs, y, w = table.at(qe_rows)
    logits = model.qe_logits(qe_pairs)
    return stage_b_loss(log_r, labels, logits, y.to(logits.device), w.to(logits.device), qe_weight)


def query_batches(pairs: QIPairs, batch_pairs: int, rng: random.Random) -> Iterator[np.ndarray]:
    """Yield the rows of one epoch: queries in random order, a query's pairs side by side, cut every `batch_pairs`."""
    groups = [rows for _, rows in pairs.by_query()]
    rng.shuffle(groups)
    order = np.concatenate(groups)
    for first in range(0, len(order), batch_pairs):
        yield order[first : first + batch_pairs]


def _forever(table: QETable, batch_pairs: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield batches of stage A rows, epoch after epoch; empty ones where there are no rows."""
    while True:
        yield from batches(table, batch_pairs, rng) if len(table) else [[]]
