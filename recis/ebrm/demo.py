"""`recis ebrm demo`: EBRM on a generated catalogue beside other models, one score explained, one overruled, and the page.

    train   EBRM; a QI cross-encoder and a bi-encoder on the same small encoder, labels, epochs and batches
    table   their figures on test queries, with BM25 and hand rules
    explain a pair that EBRM is unsure of; then overrule one entity: r as the explanation predicted, and as measured
    serve   the model with the catalogue, until Ctrl-C

The catalogue is made up and its labels follow from the same structure as the hand rules, so those are hard to beat here.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from recis.ebrm.baselines import bm25_scores, hand_rule_scores
from recis.ebrm.composed_queries import ComposeConfig
from recis.ebrm.datasets import EvalSet, TrainingSet, synthetic_eval, synthetic_set
from recis.ebrm.descent import StepConfig, fast_precision
from recis.ebrm.evaluate import evaluate, metrics_table
from recis.ebrm.explanation import Explanation, explain
from recis.ebrm.files import write_rows
from recis.ebrm.log_rows import Mentions
from recis.ebrm.model import EBRM
from recis.ebrm.overrides import Override
from recis.ebrm.pairs import score_pairs
from recis.ebrm.runs import FRESH_LR, PRETRAIN_BATCH_PAIRS, RunConfig, fit_model, save_run
from recis.ebrm.scorer import QEScorer
from recis.ebrm.synthetic import SyntheticConfig, make_data
from recis.ebrm.text_models import (
    ITEM_TOKENS,
    BiEncoder,
    bi_encoder_scores,
    cross_encoder_scores,
    fit_bi_encoder,
    fit_cross_encoder,
)
from recis.ebrm.train import QIConfig
from recis.errors import ConfigError

if TYPE_CHECKING:
    from recis.ebrm.encoder import EncoderScorer

COLUMNS = ("roc_auc", "pr_auc", "ndcg@10", "visible.roc_auc")
ITEMS_NAME = "items.jsonl"
OWNER = "demo"
TOLERANCE = 1e-6
SHOWN = 0.01  # a single refused value can take r to 0 anywhere: that shows nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """How much the demo makes and trains."""

    catalogue: SyntheticConfig = field(default_factory=SyntheticConfig)
    composed: ComposeConfig = field(default_factory=ComposeConfig)
    pretrain_epochs: int = 1
    epochs: int = 1
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Overruled:
    """An override, tried and then added."""

    rule: Override
    before: float
    predicted: float
    """r + (value - s) dr/ds, from the explanation alone."""
    measured: float
    """r that the model gives with the rule in force."""


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo and, unless told not to, serve its model."""
    if args.out.exists() and any(args.out.iterdir()):
        raise ConfigError(f"--out {args.out} is not empty; give a new folder")
    sizes = {"num_queries": args.queries} if args.queries else {}
    config = DemoConfig(catalogue=SyntheticConfig(**sizes, seed=args.seed), epochs=args.epochs, seed=args.seed)
    overruled = demo(config, args.out, say=lambda line: print(line, flush=True))
    if abs(overruled.predicted - overruled.measured) > TOLERANCE:
        return 1
    if not args.serve:
        print(f"recis ebrm serve --model {args.out} --items {args.out / ITEMS_NAME} shows it in a browser")
        return 0
    from recis.cli import main

    return main(["ebrm", "serve", "--model", str(args.out), "--items", str(args.out / ITEMS_NAME), *_port(args)])


def _port(args: argparse.Namespace) -> list[str]:
    return ["--port", str(args.port)]


def demo(config: DemoConfig, out: Path, *, say: Callable[[str], None] = lambda _: None) -> Overruled:
    """Train, compare, explain and overrule; write the model, its manifest and the catalogue into a folder.

    Raises:
        ConfigError: transformers or tokenizers is not installed.
    """
    made = make_data(config.catalogue)
    data, test = synthetic_set(made, composed=config.composed), synthetic_eval(made, "test")
    say(
        f"generated catalogue: {len(made.items):,} items, {len(made.queries):,} queries, {len(data.train):,} labelled pairs"
    )
    run = run_config(config)
    say("EBRM")
    trained = fit_model(data, run, say=say)
    save_run(trained, data, run, out)
    write_rows(out / ITEMS_NAME, (item.to_json() for item in made.items), generator=made.config.generator())
    scores = baseline_scores(data, test)
    scores |= text_model_scores(data, test, run, say)
    model = trained.model
    scores["EBRM"], num_calls = score_pairs(model, test.pairs)
    num_queries = len(np.unique(test.pairs.query))
    say("")
    say(f"{num_queries} test queries, {len(test.pairs):,} pairs; a model saw neither the queries nor their labels")
    say(metrics_table({name: evaluate(test.truth, own) for name, own in scores.items()}, names=COLUMNS))
    say(
        f"EBRM encoded {num_calls / num_queries:.0f} (query, entity) pairs a query, a cross-encoder reads "
        f"{len(test.pairs) / num_queries:.0f} (query, item) pairs; asked again, EBRM encodes none"
    )
    return explain_and_overrule(EBRM.load(out), test, say)


def run_config(config: DemoConfig) -> RunConfig:
    """Return the settings of the demo's EBRM."""
    precision = fast_precision()
    shared: dict[str, Any] = {"lr": FRESH_LR, "precision": precision, "seed": config.seed}
    return RunConfig(
        pretrain=StepConfig(epochs=config.pretrain_epochs, batch_pairs=PRETRAIN_BATCH_PAIRS, **shared),
        train=QIConfig(epochs=config.epochs, **shared),
        seed=config.seed,
    )


def baseline_scores(data: TrainingSet, test: EvalSet) -> dict[str, np.ndarray]:
    """Return scores [P] of models without training."""
    pairs = test.pairs
    read = Mentions(data.schema, data.train.items).values
    entities = {place: item.entities for place, item in enumerate(pairs.items)}
    return {
        "BM25": bm25_scores(pairs.queries, test.texts, pairs.query, pairs.item),
        "hand rules": hand_rule_scores(pairs.queries, entities, data.schema, read, pairs.query, pairs.item),
    }


def text_model_scores(
    data: TrainingSet, test: EvalSet, run: RunConfig, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Return scores [P] of a QI cross-encoder and a bi-encoder with EBRM's encoder, stage A pairs and budget."""
    assert run.pretrain is not None
    steps = StepConfig(
        epochs=run.train.epochs,
        lr=run.train.lr,
        batch_pairs=run.train.batch_pairs,
        precision=run.train.precision,
        seed=run.seed,
    )

    def tell(epoch: int, loss: float) -> None:
        say(f"  epoch {epoch}: loss {loss:.4f}")

    corpus, spellings = data.corpus(), data.schema.spellings()
    cross = cast("EncoderScorer", QEScorer.small(corpus, seed=run.seed, max_tokens=ITEM_TOKENS, spellings=spellings))
    say("QI cross-encoder, first on stage A's pairs, then on the labelled pairs")
    fit_cross_encoder(cross, data.train, data.texts, steps, qe_rows=data.qe_rows, pretrain=run.pretrain, on_epoch=tell)
    bi = BiEncoder(
        cast("EncoderScorer", QEScorer.small(corpus, seed=run.seed, max_tokens=ITEM_TOKENS, spellings=spellings))
    )
    say("bi-encoder")
    fit_bi_encoder(bi, data.train, data.texts, steps, on_epoch=tell)
    return {
        "QI cross-encoder": cross_encoder_scores(cross, test.pairs, test.texts),
        "bi-encoder": bi_encoder_scores(bi, test.pairs, test.texts),
    }


def explain_and_overrule(model: EBRM, test: EvalSet, say: Callable[[str], None]) -> Overruled:
    """Explain the test pair whose r is closest to a half, and set its most telling entity to the other side."""
    pairs = test.pairs.first_queries(20)
    log_r, _ = score_pairs(model, pairs)
    row = int(np.argmin(np.abs(np.exp(log_r) - 0.5)))
    query, item = pairs.queries[int(pairs.query[row])], pairs.items[int(pairs.item[row])]
    before = explain(model, query, item)
    say(f"\nwhy: {item.title!r}\n{before}")
    rule, predicted = _most_telling(before)
    model.overrides.add(rule)
    measured = float(model.score(query, [item]).r[0])
    say(
        f"\noverride by {rule.owner!r}: {rule.entity} is {'accepted' if rule.value else 'refused'} for {query!r}\n"
        f"r {before.r:.6f} -> predicted {predicted:.6f}, measured {measured:.6f}"
    )
    return Overruled(rule=rule, before=before.r, predicted=predicted, measured=measured)


def _most_telling(told: Explanation) -> tuple[Override, float]:
    """Return the override of one entity to 0 or 1 that moves r most but not to 0, and the r that the explanation predicts."""
    moves = [
        (abs((value - entity.s) * entity.slope), value, entity)
        for own in told.types
        for entity in own.entities
        for value in (0.0, 1.0)
        if value or entity.r_if_0 > SHOWN
    ]
    _, value, entity = max(moves, key=lambda move: move[0])
    rule = Override(
        query=told.query, entity=entity.id, op="set", value=value, owner=OWNER, reason="shows an intervention"
    )
    return rule, told.r + (value - entity.s) * entity.slope
