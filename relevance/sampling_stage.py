"""Sample completions of many pairs into a file, chunk by chunk, so that a stopped run goes on.

    samples = sample_stage(run, lm, task, pairs, "dpo/samples", num_samples=8, config=SamplingConfig())

Each chunk is appended whole and has its own seed; what a kill cut off is sampled again with the same draws.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recis.errors import DataError
from relevance.data import Pair
from relevance.files import Sample, from_json
from relevance.language_model import LanguageModel
from relevance.ranks import main_first
from relevance.rollouts import SamplingConfig, sample_completions
from relevance.task import Task
from relevance.training_run import TrainingRun

CHUNK = 32


def sample_stage(
    run: TrainingRun[Any],
    lm: LanguageModel,
    task: Task,
    pairs: Sequence[Pair],
    name: str,
    *,
    num_samples: int,
    config: SamplingConfig,
) -> Mapping[str, list[Sample]]:
    """Return pair id -> samples.

    Args:
        run: its folder and time limit.
        lm: in eval mode.
        task: with the model's template.
        pairs: what to sample for; the same list on every start of the run.
        name: of the file below the run's folder, without suffix.
        num_samples: of each pair.
        config: how.

    Raises:
        OutOfTime: the time limit came first.
    """
    path = run.folder / f"{name}.jsonl"
    with main_first():  # the others read what rank 0 has sampled
        return _sampled(run, lm, task, pairs, name, path, num_samples=num_samples, config=config)


def _sampled(
    run: TrainingRun[Any],
    lm: LanguageModel,
    task: Task,
    pairs: Sequence[Pair],
    name: str,
    path: Path,
    *,
    num_samples: int,
    config: SamplingConfig,
) -> Mapping[str, list[Sample]]:
    from relevance.engine import Limits

    path.parent.mkdir(parents=True, exist_ok=True)
    done = _read_chunks(path, num_samples)
    limits = Limits(deadline=run.deadline)
    chunks = [pairs[first : first + CHUNK] for first in range(0, len(pairs), CHUNK)]
    for number, chunk in enumerate(chunks):
        if all(pair.id in done for pair in chunk):
            continue
        limits.check(name)
        prompts = [task.prompt(pair) for pair in chunk]
        found = sample_completions(
            lm, prompts, num_samples=num_samples, config=config, seed=run.config.seed * 10_007 + number
        )
        lines = []
        for pair, completions in zip(chunk, found, strict=True):
            done[pair.id] = []
            for k, completion in enumerate(completions):
                parsed = task.read(completion.text, terminated=completion.terminated)
                sample = Sample(
                    id=pair.id,
                    k=k,
                    completion=completion.text,
                    completion_ids=completion.ids,
                    label=None if parsed.label is None else int(parsed.label),
                    ok=parsed.ok,
                )
                done[pair.id].append(sample)
                lines.append(json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        if number % 10 == 9:
            run.say(f"{name}: {number + 1} of {len(chunks)} chunks sampled")
    return {pair.id: done[pair.id] for pair in pairs}


def _read_chunks(path: Path, num_samples: int) -> dict[str, list[Sample]]:
    """Return the pairs of a file whose samples are all there."""
    if not path.exists():
        return {}
    found: dict[str, list[Sample]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            sample = from_json(Sample, json.loads(line))
        except (ValueError, DataError):
            continue  # the line that a kill cut off
        samples = found.setdefault(sample.id, [])
        if sample.k == len(samples):
            samples.append(sample)
    return {name: samples for name, samples in found.items() if len(samples) == num_samples}
