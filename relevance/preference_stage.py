"""From a start model to preference pairs: sample, pair own right with own wrong answers, fall back to the oracle.

    rows, pairs = preference_stage(run, lm, task, pairs, config)        pass@k of the samples goes to dpo/samples.json

Source: TaoSR1 arXiv:2508.12365 as told by others; limits: `preferences`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from recis.errors import DataError
from relevance.checkpoints import write_json
from relevance.config import DpoConfig
from relevance.data import Pair
from relevance.evaluate import pass_curve
from relevance.files import Preference, write_rows
from relevance.language_model import LanguageModel
from relevance.preferences import make_preferences
from relevance.ranks import is_main
from relevance.rollouts import SamplingConfig
from relevance.sampling_stage import sample_stage
from relevance.task import Task
from relevance.training_run import TrainingRun


def preference_stage(
    run: TrainingRun[Any], lm: LanguageModel, task: Task, pairs: Sequence[Pair], config: DpoConfig
) -> tuple[Preference, ...]:
    """Return preferences of labelled pairs; samples, preferences and counts are kept below the run's folder."""
    chosen = [pair for pair in pairs if pair.label is not None][: config.num_prompts]
    sampling = SamplingConfig(temperature=config.temperature, top_k=config.top_k)
    samples = sample_stage(run, lm, task, chosen, "dpo/samples", num_samples=config.num_samples, config=sampling)
    right = torch.tensor(
        [[sample.ok and sample.label == pair.label for sample in samples[pair.id]] for pair in chosen], dtype=torch.bool
    )
    oracles = {}
    for pair in chosen:
        try:
            oracles[pair.id] = run.rationale(pair)
        except DataError:  # no gold steps: counted as no_oracle
            continue
    found = make_preferences(
        chosen,
        samples,
        {pair.id: task.prompt(pair) for pair in chosen},
        oracles,
        task.read,
        config=config.limits,
        seed=run.config.seed,
    )
    curve = pass_curve(right, max_k=config.num_samples) if len(chosen) else {}
    summary = {"pass": curve, "counts": dict(found.counts), "prompts": len(chosen)}
    if is_main():
        write_rows(run.folder / "dpo" / "preferences.jsonl", found.rows)
        write_json(run.folder / "dpo" / "samples.json", summary)
    run.say(f"dpo: {len(found.rows)} preference pairs from {len(chosen)} prompts: {dict(found.counts)}")
    return found.rows
