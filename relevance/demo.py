"""`relevance demo`: SFT and a short run after TaoSR-AGRL on the generated catalogue, before and after side by side.

Everything is made here: catalogue, tokenizer, model. Sized for less than six minutes on two CPU cores; a run that was stopped
goes on. What it shows is that training moves the numbers, not how far a real model gets.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recis.errors import ConfigError
from relevance.data import Pair
from relevance.evaluate import label_metrics
from relevance.files import Score
from relevance.judge import judge
from relevance.serve import Scorer
from relevance.training_run import FINAL, RUN_NAME, open_run

SETTINGS = (
    "catalog.num_train=24000",  # each pair once: a copy of a pair teaches less than a new one, and pairs cost nothing here
    "catalog.num_dev=160",
    "catalog.num_test=320",
    "catalog.label_mix=0.2,0.3,0.1,0.4",  # a majority of .4 is sooner left than one of .5
    "prompt.max_rules=0",
    "prompt.has_header=false",
    "model.num_layers=3",
    "model.hidden_size=128",
    "model.vocab_size=1280",
    "sft.num_epochs=1",
    "sft.learning_rate=2e-3",
    "sft.micro_rows=16",
    "sft.batch_rows=16",
    "sft.label_weight=10",
    "sft.prompt_weight=0.2",
    "rl.max_steps=12",
    "rl.learning_rate=1e-4",
    "rl.max_completion_tokens=56",
    "rl.refill_rounds=1",
    "engine.sample_every=0",
    "engine.save_steps=500",
)
SHOWN = (
    ("macro_f1", "macro-F1 of labels"),
    ("accuracy", "accuracy of labels"),
    ("tier_macro_f1", "macro-F1 of tiers"),
    ("parse_rate", "answers without a fault"),
    ("rule_adherence", "answers that break no hard rule"),
    ("hallucination_rate", "verdict differs from label"),
    ("step_category", "category step right"),
    ("step_attribute", "attribute step right"),
    ("step_rule", "deciding rule right"),
)


def run_demo(out: Path, *, settings: Sequence[str] = (), say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, measure before and after, print the table and three judgements, and return both reports.

    Raises:
        ConfigError: `out` holds something else.
    """
    from relevance.recipes import recipe_function

    if out.exists() and any(out.iterdir()) and not (out / RUN_NAME).exists():
        raise ConfigError(f"--out {out}: the folder is not empty and holds no demo; name another one")
    say("demo: SFT on generated pairs, then reinforcement after TaoSR-AGRL; all of it is made here")
    run = open_run("agrl", out=out, settings=[*SETTINGS, *settings], resume=(out / RUN_NAME).exists(), say=say)
    recipe_function("agrl")(run)
    pairs = list(run.task.test)
    before, after = _scorer(out / "sft" / FINAL, out), Scorer.load(out / FINAL)
    reports = {
        name: judge(scorer, pairs, num_texts=64, num_bootstrap=200)
        for name, scorer in (("before", before), ("after", after))
    }
    always = majority(pairs)
    say(
        f"\n{'on ' + str(len(pairs)) + ' test pairs':<34}{'always ' + str(always['label']):>10}{'SFT':>10}{'+ AGRL':>10}"
    )
    for key, title in SHOWN:
        least = f"{always[key]:.3f}" if key in always else ""
        say(f"{title:<34}{least:>10}{reports['before'][key]:>10.3f}{reports['after'][key]:>10.3f}")
    examples = _examples(pairs)
    say("\nthree judgements of the trained model")
    for pair, score in zip(examples, after.score(examples, rationale=True), strict=True):
        say(judgement(pair, score))
    say(f"\nmodel: {out / FINAL}\ncurves: {out / 'curves.html'}")
    return reports


def majority(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return what the most frequent label of the pairs gets by itself: "label", "accuracy" and "macro_f1"."""
    gold = np.array([pair.label for pair in pairs])
    label = int(np.bincount(gold).argmax())
    metrics = label_metrics(gold, np.full_like(gold, label))
    return {"label": label, "accuracy": metrics["accuracy"], "macro_f1": metrics["macro_f1"]}


def judgement(pair: Pair, score: Score) -> str:
    """Return an example as text."""
    probs = ", ".join(f"{label}: {p:.2f}" for label, p in zip((1, 2, 3, 4), score.p, strict=True))
    return (
        f"\n  query      {pair.query}\n  item       {pair.item.title}, price {pair.item.price:g}\n"
        f"  says       {score.label} ({score.tier}); P {probs}\n  gold       {pair.label}\n  because    {score.rationale}"
    )


def _scorer(path: Path, out: Path) -> Scorer:
    """Return the scorer of the SFT stage, which was not finished on its own: it is asked as the final model is."""
    final = Scorer.load(out / FINAL)
    start = Scorer.load(path)
    return Scorer(lm=start.lm, task=final.task, b_cum=final.b_cum, model=start.model, settings=final.settings)


def _examples(pairs: Sequence[Pair]) -> list[Pair]:
    """Return three pairs of different labels, hard ones where there are any."""
    chosen: list[Pair] = []
    for label in (4, 2, 1):
        found = [pair for pair in pairs if pair.label == label]
        chosen += sorted(found, key=lambda pair: pair.family == "plain")[:1]
    return chosen
