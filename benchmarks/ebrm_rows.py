"""The rows of quality_ebrm: each scores dev and test of a task, and is measured alike.

F1 is taken at the threshold that is best on dev; probabilities are a logistic calibration of dev's scores, so that ECE and F1
compare rankings, not the habits of a loss.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from ebrm_ablations import MAX_TITLE_TOKENS, fit_mean_of_logits, mean_of_logits_scores, with_titles
from ebrm_tasks import QualityTask
from torch import Tensor

from recis.ebrm import EBRM, EBRMConfig
from recis.ebrm.baselines import bm25_scores, hand_rule_accept, hand_rule_scores, minilm_scores
from recis.ebrm.config import COMPARED, Logic
from recis.ebrm.datasets import EvalSet
from recis.ebrm.descent import autocast, fast_precision
from recis.ebrm.encode import encode
from recis.ebrm.entities import type_of, value_of
from recis.ebrm.evaluate import best_threshold, evaluate, qe_roc_auc
from recis.ebrm.pairs import score_pairs
from recis.ebrm.pretrain import pretrain
from recis.ebrm.runs import schema_of
from recis.ebrm.scorer import Pair, QEScorer
from recis.ebrm.text_models import (
    ITEM_TOKENS,
    BiEncoder,
    bi_encoder_scores,
    cross_encoder_scores,
    fit_bi_encoder,
    fit_cross_encoder,
)
from recis.ebrm.train import train

if TYPE_CHECKING:
    from recis.ebrm.encoder import EncoderScorer


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    title: str
    run: Callable[[QualityTask, int], dict[str, Any]]
    """Task, seed -> figures."""
    is_trained: bool = True
    fits: Callable[[QualityTask], bool] = lambda task: True

    def settings(self, task: QualityTask) -> dict[str, Any]:
        """What decides the figures besides the seed and the code."""
        return {"budget": asdict(task.budget) if self.is_trained else {"queries": task.budget.queries}}


def measured(task: QualityTask, dev: np.ndarray, test: np.ndarray, **more: Any) -> dict[str, Any]:
    """Return metrics of test scores, calibrated and cut on dev's; the scores themselves, for differences of two rows."""
    threshold = best_threshold(dev, task.dev.truth.label)
    p = _platt(dev, task.dev.truth.label, test)
    metrics = evaluate(task.test.truth, test, probabilities=p, threshold=threshold)
    return {
        "metrics": {name: round(value, 5) for name, value in metrics.items()},
        "dev_roc_auc": round(evaluate(task.dev.truth, dev)["roc_auc"], 5),
        "scores": test,
        **more,
    }


def _platt(dev: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return logistic probabilities of test scores, fitted on dev; scores are standardised first."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = dev.mean(), dev.std() + 1e-12
    model = LogisticRegression(C=1e3).fit(((dev - mean) / scale)[:, None], labels)
    return model.predict_proba(((test - mean) / scale)[:, None])[:, 1]


def _both(task: QualityTask, score: Callable[[EvalSet], np.ndarray], **more: Any) -> dict[str, Any]:
    return measured(task, score(task.dev), score(task.test), **more)


def _of(part: EvalSet, score: Callable[..., np.ndarray]) -> np.ndarray:
    return score(part.pairs.queries, part.texts, part.pairs.query, part.pairs.item)


def bm25(task: QualityTask, seed: int) -> dict[str, Any]:
    return _both(task, lambda part: _of(part, bm25_scores))


def minilm(task: QualityTask, seed: int) -> dict[str, Any]:
    return _both(task, lambda part: _of(part, minilm_scores))


def hand_rules(task: QualityTask, seed: int) -> dict[str, Any]:
    """Constraints read from the query, product logic over rules of acceptance; and the rules' own QE ROC-AUC."""

    def log_r(part: EvalSet) -> np.ndarray:
        entities = {place: item.entities for place, item in enumerate(part.pairs.items)}
        pairs = part.pairs
        return hand_rule_scores(pairs.queries, entities, task.data.schema, task.read, pairs.query, pairs.item)

    pairs, types, labels = task.gold_qe
    wanted = [task.read(query) for query in task.test.pairs.queries]
    s = np.array([hand_rule_accept(wanted[query], entity) for query, entity in pairs])
    return _both(task, log_r, qe_roc_auc=_rounded(qe_roc_auc(types, s, labels)))


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items() if value == value}  # a type of one class has none


def ebrm(
    *,
    pretraining: bool = True,
    logic: Logic = "product",
    learn_relaxation: bool = True,
    fast: bool = False,
    none_accepted: bool = False,
) -> Callable[[QualityTask, int], dict[str, Any]]:
    """Return the run of an EBRM with one thing changed."""

    def run(task: QualityTask, seed: int) -> dict[str, Any]:
        scorer: QEScorer = task.scorer(seed)
        if none_accepted:
            scorer = NoneAccepted(scorer)
        schema = schema_of(task.data.schema, fast=fast)
        config = EBRMConfig(schema=schema, logic=logic, learn_relaxation=learn_relaxation)
        return _run_ebrm(task, seed, scorer, config, pretraining=pretraining)

    return run


def _run_ebrm(
    task: QualityTask, seed: int, scorer: QEScorer, config: EBRMConfig, *, pretraining: bool
) -> dict[str, Any]:
    model = EBRM(config, scorer)
    if pretraining:
        pretrain(model, task.data.qe_rows, task.budget.pretraining(seed))
    before = _qe_auc(task, model) if pretraining else None
    train(model, task.data.train, task.data.dev, task.data.qe_rows, task.budget.training(seed))
    with _fast_inference():
        dev, _ = score_pairs(model, task.dev.pairs)
        test, cold = score_pairs(model, task.test.pairs)
        _, warm = score_pairs(model, task.test.pairs)
    num_queries = len(np.unique(task.test.pairs.query))
    relaxation = dict(zip(config.schema.names, model.pool.relaxation.tolist(), strict=True))
    return measured(
        task,
        dev,
        test,
        qe_roc_auc=_qe_auc(task, model),
        qe_roc_auc_after_stage_a=before,
        encoder_calls_per_query={"cold": round(cold / num_queries, 1), "warm": warm / num_queries},
        relaxation={name: round(value, 3) for name, value in relaxation.items()},
    )


def _qe_auc(task: QualityTask, model: EBRM) -> dict[str, float]:
    pairs, types, labels = task.gold_qe
    texts = [(task.test.pairs.queries[query], entity.id) for query, entity in pairs]
    from recis.ebrm.canonical import canonical_text

    distinct = dict.fromkeys((canonical_text(query), entity) for query, entity in texts)
    compared = {kind.name for kind in model.config.schema.types if kind.scorer == "comparator"}
    encoded = [pair for pair in distinct if type_of(pair[1]) not in compared]
    matched = [pair for pair in distinct if type_of(pair[1]) in compared]
    with _fast_inference(), torch.inference_mode():
        logits = dict(zip(encoded, encode(model.scorer, encoded, batch_pairs=256).logits.tolist(), strict=True))
        if matched:
            logits |= dict(zip(matched, model.comparators(matched).tolist(), strict=True))
    z = np.array([logits[canonical_text(query), entity] for query, entity in texts])
    return _rounded(qe_roc_auc(types, z, labels))


def _fast_inference() -> AbstractContextManager[object]:
    return autocast(torch.device("cpu"), fast_precision())


class NoneAccepted(QEScorer):
    """A scorer that accepts every `none`: what leaving out the types that an item does not state comes to."""

    def __init__(self, scorer: QEScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, pairs: "list[Pair]") -> Tensor:  # type: ignore[override]
        logits = self.scorer(pairs)
        is_none = torch.tensor([value_of(entity) == "none" for _, entity in pairs], dtype=torch.bool)
        return torch.where(is_none, torch.full_like(logits, 12.0), logits)


def mean_of_logits(task: QualityTask, seed: int) -> dict[str, Any]:
    """No logic: the mean of an item's entity logits, fitted to the labels."""
    model = fit_mean_of_logits(task, seed, _as_steps(task, seed))
    with _fast_inference():
        dev, test = (mean_of_logits_scores(model, task, part.pairs) for part in (task.dev, task.test))
    return measured(task, dev, test)


def title_entity(task: QualityTask, seed: int) -> dict[str, Any]:
    """EBRM with the title as one more entity of each item."""
    told = with_titles(task)
    scorer = cast("EncoderScorer", told.scorer(seed))
    scorer.max_tokens = MAX_TITLE_TOKENS
    return _run_ebrm(told, seed, scorer, EBRMConfig(schema=told.data.schema), pretraining=True)


def cross_encoder(*, stage_a: bool) -> Callable[[QualityTask, int], dict[str, Any]]:
    """Return the run of a QI cross-encoder, its stage A pairs read first or not."""

    def run(task: QualityTask, seed: int) -> dict[str, Any]:
        encoder = cast("EncoderScorer", task.scorer(seed))
        encoder.max_tokens = ITEM_TOKENS
        fit_cross_encoder(
            encoder,
            task.data.train,
            _train_texts(task),
            _as_steps(task, seed),
            qe_rows=task.data.qe_rows,
            pretrain=task.budget.pretraining(seed) if stage_a else None,
        )
        with _fast_inference():
            dev, test = (cross_encoder_scores(encoder, part.pairs, part.texts) for part in (task.dev, task.test))
        num_queries = len(np.unique(task.test.pairs.query))
        calls = round(len(task.test.pairs) / num_queries, 1)
        return measured(task, dev, test, encoder_calls_per_query={"cold": calls, "warm": calls})

    return run


def bi_encoder(task: QualityTask, seed: int) -> dict[str, Any]:
    """The same encoder, tuned as a bi-encoder."""
    encoder = cast("EncoderScorer", task.scorer(seed))
    encoder.max_tokens = ITEM_TOKENS
    model = BiEncoder(encoder)
    fit_bi_encoder(model, task.data.train, _train_texts(task), _as_steps(task, seed))
    with _fast_inference():
        dev, test = (bi_encoder_scores(model, part.pairs, part.texts) for part in (task.dev, task.test))
    return measured(task, dev, test)


def _as_steps(task: QualityTask, seed: int) -> Any:
    from recis.ebrm.descent import StepConfig

    own = task.budget.training(seed)
    names = ("epochs", "lr", "batch_pairs", "precision", "seed")
    return StepConfig(**{name: getattr(own, name) for name in names})


def _train_texts(task: QualityTask) -> list[str]:
    return list(task.data.texts)


def _has_comparable(task: QualityTask) -> bool:
    return any(kind.name in COMPARED and kind.kind != "text" for kind in task.data.schema.types)


ROWS: dict[str, Row] = {
    "bm25": Row(title="BM25", run=bm25, is_trained=False),
    "minilm": Row(title="bi-encoder, MiniLM untuned", run=minilm, is_trained=False),
    "hand_rules": Row(title="hand rules + product logic", run=hand_rules, is_trained=False),
    "ebrm": Row(title="EBRM", run=ebrm()),
    "cross_encoder": Row(title="QI cross-encoder", run=cross_encoder(stage_a=False)),
    "ebrm_no_pretraining": Row(title="EBRM, no pretraining", run=ebrm(pretraining=False)),
    "cross_encoder_stage_a": Row(title="QI cross-encoder, stage A pairs first", run=cross_encoder(stage_a=True)),
    "bi_encoder": Row(title="bi-encoder, tuned", run=bi_encoder),
    "ebrm_fast": Row(title="EBRM fast (comparators)", run=ebrm(fast=True), fits=_has_comparable),
    "ebrm_goedel": Row(title="EBRM, Goedel", run=ebrm(logic="goedel")),
    "ebrm_lukasiewicz": Row(title="EBRM, Lukasiewicz", run=ebrm(logic="lukasiewicz")),
    "ebrm_no_none": Row(title="EBRM, every none accepted", run=ebrm(none_accepted=True)),
    "mean_of_logits": Row(title="mean of logits, no logic", run=mean_of_logits),
    "ebrm_title": Row(title="EBRM, title as an entity", run=title_entity),
    "ebrm_fixed_relaxation": Row(title="EBRM, a_t = 1", run=ebrm(learn_relaxation=False)),
}
