"""The tasks of quality_ebrm: data, budget and gold, made once per process."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from recis.ebrm.datasets import (
    EvalSet,
    TrainingSet,
    synthetic_eval,
    synthetic_set,
    task_eval,
    task_set,
)
from recis.ebrm.descent import StepConfig, fast_precision
from recis.ebrm.entities import Entity
from recis.ebrm.log_rows import Mentions
from recis.ebrm.pricerunner import build_task
from recis.ebrm.pricerunner_qe import accepts
from recis.ebrm.pricerunner_queries import Constraints, parse_query
from recis.ebrm.runs import PRETRAIN_BATCH_PAIRS
from recis.ebrm.scorer import QEScorer
from recis.ebrm.synthetic import SyntheticConfig, make_data
from recis.ebrm.train import QIConfig


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every trained row of a task gets."""

    scorer: str
    lr: float
    pretrain_epochs: int
    epochs: int
    queries: dict[str, int] = field(default_factory=dict)
    """Part -> queries that are used."""
    stage_a_batch: int = PRETRAIN_BATCH_PAIRS

    def pretraining(self, seed: int) -> StepConfig:
        return StepConfig(
            epochs=self.pretrain_epochs,
            lr=self.lr,
            batch_pairs=self.stage_a_batch,
            precision=fast_precision(),
            seed=seed,
        )

    def training(self, seed: int) -> QIConfig:
        return QIConfig(
            epochs=self.epochs,
            lr=self.lr,
            batch_pairs=self.qi_batch,
            precision=fast_precision(),
            eval_every_steps=10_000,
            seed=seed,
        )

    qi_batch: int = 256


@dataclass(frozen=True, kw_only=True)
class QualityTask:
    """One task: what to learn from, what to be measured on, and the gold of its (query, entity) pairs."""

    name: str
    budget: Budget
    data: TrainingSet
    dev: EvalSet
    test: EvalSet
    accepts: Callable[[int, Entity], bool]
    """Place of a test query, entity -> gold. For evaluation alone."""
    read: Callable[[str], Constraints]
    """Query -> what its text constrains, by dictionary: for the hand rules."""

    def scorer(self, seed: int) -> QEScorer:
        if self.budget.scorer == "small":
            return QEScorer.small(self.data.corpus(), seed=seed, spellings=self.data.schema.spellings())
        return QEScorer.minilm(seed=seed, spellings=self.data.schema.spellings())

    @cached_property
    def gold_qe(self) -> tuple[list[tuple[int, Entity]], np.ndarray, np.ndarray]:
        """Distinct (query, entity) pairs of the test candidates, without `none`; their types [N], gold labels [N]."""
        found: dict[tuple[int, str], Entity] = {}
        for query, item in zip(self.test.pairs.query.tolist(), self.test.pairs.item.tolist(), strict=True):
            found |= {(query, entity.id): entity for entity in self.test.pairs.items[item].entities}
        pairs = [(query, entity) for (query, _), entity in found.items()]
        labels = np.array([self.accepts(query, entity) for query, entity in pairs], dtype=np.int64)
        return pairs, np.array([entity.type for _, entity in pairs]), labels


def generated(_: str | None, budget: Budget | None = None, config: SyntheticConfig | None = None) -> QualityTask:
    """The default generated catalogue, data seed 0; the seeds of a row are those of its training."""
    made = make_data(config or SyntheticConfig())
    data = synthetic_set(made)
    test = synthetic_eval(made, "test")

    return QualityTask(
        name="generated",
        budget=budget or Budget(scorer="small", lr=1e-3, pretrain_epochs=1, epochs=2),
        data=data,
        dev=synthetic_eval(made, "dev"),
        test=test,
        accepts=lambda query, entity: bool(made.gold_qe(query, entity)),
        read=Mentions(data.schema, data.train.items).values,
    )


# two epochs of stage A: after one, some seeds have not learned yet what equal pieces mean (QE ROC-AUC .83 against .97)
PRICERUNNER = Budget(
    scorer="small", lr=1e-3, pretrain_epochs=2, epochs=2, queries={"train": 1000, "dev": 150, "test": 500}
)


def pricerunner(folder: str | None, budget: Budget = PRICERUNNER) -> QualityTask:
    """The first queries of each part of the PriceRunner task."""
    if folder is None:
        raise SystemExit("RECIS_DATA must name the folder with pricerunner/offers.parquet")
    path = next(Path(folder, "pricerunner").glob("*.parquet"))
    task = build_task(path, num_queries=budget.queries)
    data, test = task_set(task), task.parts["test"]
    return QualityTask(
        name="pricerunner",
        budget=budget,
        data=data,
        dev=task_eval(task, task.parts["dev"]),
        test=task_eval(task, test),
        accepts=lambda query, entity: accepts(test.queries[query].constraints, entity),
        read=partial(parse_query, known=task.dictionaries),
    )


def pricerunner_minilm(folder: str | None) -> QualityTask:
    """The same with MiniLM for an encoder, and fewer train queries: a step of it costs 25 times as much."""
    task = pricerunner(
        folder,
        replace(PRICERUNNER, scorer="minilm", lr=5e-5, queries={"train": 800, "dev": 200, "test": 500}),
    )
    return replace(task, name="pricerunner_minilm")


TASKS: dict[str, Callable[[str | None], QualityTask]] = {
    "generated": generated,
    "pricerunner": pricerunner,
    "pricerunner_minilm": pricerunner_minilm,
}
