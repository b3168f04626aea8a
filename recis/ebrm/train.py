"""Stage B: train scorer, comparators and relaxation on labelled (query, item) pairs, and stay true to stage A.

    L = mean BCE(y, r) + lambda mean_w BCE_QE          lambda falls linearly from 0.1 to 0.02

The second term keeps s meaningful: the labels of pairs see s through the formula only, which leaves it free to drift.
A step takes whole queries until 256 pairs are full, so that candidates share entities: each distinct (query, entity) pair
of the step is encoded once. a_t has a rate and a clip of its own, and is put back onto [0, 1] after every step.

The loop is this file's own, not recis.trainer's: see recis.ebrm.pretrain.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis.ebrm.descent import Descent, StepConfig, autocast
from recis.ebrm.evaluate import roc_auc
from recis.ebrm.labels_from_logs import QERow
from recis.ebrm.model import EBRM
from recis.ebrm.pairs import QIPairs, score_pairs
from recis.ebrm.pretrain import QETable, batches, merge_rows, qe_loss, seeded
from recis.ebrm.resume import Progress, restore, state_of
from recis.ebrm.soft_logic import relevance_loss
from recis.errors import ConfigError, DataError

STAGE = "train"


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
    progress: Progress | None = None,
) -> History:
    """Train a model in place; the weights of the best measure stay (the first of equals), and the calibrator is fitted.

    The same pairs, rows, weights and config give the same weights. The model is in evaluation mode afterwards.
    At the precision bf16 dev is scored with it too; the model that stays scores in fp32.

    Args:
        model: pretrained or not.
        pairs: to train on.
        dev: to choose the step and to fit the calibrator on.
        qe_rows: stage A's; none leaves the second term out.
        config: settings.
        on_measure: told of each measure.
        progress: where the stage "train" is kept and goes on from; None keeps nothing.

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
    device = model.pool.relaxation.device
    run = _Run(model, pairs, shown, merge_rows(qe_rows), config, on_measure, progress or Progress())
    with seeded(config.seed, device):
        kept = run.to_the_end()
    model.load_state_dict(kept)
    if config.precision != "fp32":
        model.cache.clear(model.version)  # dev was scored in bf16 with these very weights
    log_r, _ = score_pairs(model, dev)
    model.fit_calibrator(log_r, dev.label)
    return History(measures=tuple(run.measures), best=max(run.measures, key=lambda measure: measure.dev_roc_auc))


class _Run:
    """All steps of a stage, and what is known after each: measures, losses since the last one, the best weights."""

    def __init__(
        self,
        model: EBRM,
        pairs: QIPairs,
        dev: QIPairs,
        table: QETable,
        config: QIConfig,
        on_measure: Callable[[Measure], None] | None,
        progress: Progress,
    ) -> None:
        self.model, self.pairs, self.dev, self.table, self.config = model, pairs, dev, table, config
        self.on_measure, self.progress = on_measure, progress
        rng = random.Random(config.seed)
        epochs = [list(query_batches(pairs, config.batch_pairs, rng)) for _ in range(config.epochs)]
        self.steps = [rows for epoch in epochs for rows in epoch]
        self.rows_of_a = _forever(table, config.qe_batch_pairs, rng)
        small = [model.comparators.parameters(), [model.pool.relaxation]]
        self.descent = Descent(model.scorer.parameters(), small, config, len(self.steps))
        self.measures: list[Measure] = []
        self.losses: list[float] = []
        self.kept: dict[str, Tensor] = {}

    def to_the_end(self) -> dict[str, Tensor]:
        """Run the steps that are left; return the weights of the best measure."""
        done = self._restore()
        for step, rows in enumerate(self.steps, 1):
            qe_rows = next(self.rows_of_a)
            if step <= done:
                continue
            self._step(step, rows, qe_rows)
            is_last = step == len(self.steps)
            if is_last or step % self.config.eval_every_steps == 0:
                self._measure(step)
            if is_last or self.progress.is_due():
                self.progress.save(STAGE, self._state(step))
        self.model.eval()
        return self.kept

    def _step(self, step: int, rows: np.ndarray, qe_rows: list[int]) -> None:
        model, config = self.model, self.config
        model.train()
        weight = qe_weight_at(step - 1, len(self.steps), config)
        with autocast(model.pool.relaxation.device, config.precision):
            loss = _loss(model, self.pairs, rows, self.table, qe_rows, weight)
        self.losses.append(self.descent.step(loss))
        model.pool.project_()

    def _measure(self, step: int) -> None:
        self.model.eval()
        with autocast(self.model.pool.relaxation.device, self.config.precision):
            log_r, _ = score_pairs(self.model, self.dev)
        measure = Measure(step=step, loss=float(np.mean(self.losses)), dev_roc_auc=roc_auc(log_r, self.dev.label))
        if not self.measures or measure.dev_roc_auc > max(m.dev_roc_auc for m in self.measures):
            self.kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.losses = []
        self.measures.append(measure)
        if self.on_measure is not None:
            self.on_measure(measure)

    def _state(self, step: int) -> dict[str, Any]:
        own = {"measures": [asdict(m) for m in self.measures], "losses": self.losses, "kept": self.kept}
        return state_of(self.model, self.descent, step) | own

    def _restore(self) -> int:
        state = self.progress.load(STAGE)
        if state is None:
            return 0
        self.measures = [Measure(**m) for m in state["measures"]]
        self.losses, self.kept = state["losses"], state["kept"]
        return restore(state, self.model, self.descent)


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
