"""The verifiers of a run's reasoning steps, in their order, weak ones switched off per step type.

    verifier = run_verifier(run, lm, task)         Hybrid(gold, ebrm, rm), checked on held-out answers of the start model

Every verifier but gold is held against gold verdicts on dev answers; below the limit a step type is switched off, with a
warning and an entry in she/verifiers.json. Source: a hybrid of offline verifier and reward model, TaoSR-SHE arXiv:2510.07972;
the check is ours, and the reward model of the offline default is a noisy oracle.
"""

import json
from collections.abc import Mapping
from typing import Any

from recis.errors import ConfigError
from relevance.checkpoints import write_json
from relevance.config import SheRun
from relevance.language_model import LanguageModel
from relevance.ranks import is_main
from relevance.rollouts import GREEDY
from relevance.sampling_stage import sample_stage
from relevance.task import Task
from relevance.training_run import TrainingRun
from relevance.verify import Hybrid, StepVerifier, balanced_accuracy, gold_verdicts, noisy_oracle, weak_steps

NUM_CHECKED = 256


def run_verifier(run: TrainingRun[SheRun], lm: LanguageModel, task: Task) -> Hybrid:
    """Return the run's verifier.

    Raises:
        ConfigError: a reward model is asked for and the task has no true steps to make its stand-in from, or the EBRM run
            cannot be used.
    """
    config = run.config.she
    known: dict[str, StepVerifier] = {"gold": gold_verdicts}
    if "ebrm" in config.verifiers:
        from relevance.ebrm_verifier import load_verifier

        known["ebrm"] = load_verifier(str(config.ebrm_run), [*task.train, *task.dev])
    if "rm" in config.verifiers:
        if not task.hidden_steps:
            raise ConfigError(
                "she.verifiers: the reward model of the offline default is a noisy oracle, which needs the generated task; "
                "with --data set she.verifiers=gold, or ebrm"
            )
        known["rm"] = noisy_oracle(task.hidden_steps, accuracy=config.rm_accuracy, seed=run.config.seed)
    chosen = {name: known[name] for name in config.verifiers}
    off, measured = _weak(run, lm, task, chosen)
    if is_main():
        write_json(run.folder / "she" / "verifiers.json", measured)
    return Hybrid(verifiers=chosen, switched_off=off)


def _weak(
    run: TrainingRun[SheRun], lm: LanguageModel, task: Task, verifiers: Mapping[str, StepVerifier]
) -> tuple[frozenset[tuple[str, str]], dict[str, Any]]:
    """Return (verifier, step) pairs below the limit, and the balanced accuracy of all."""
    others = {name: verifier for name, verifier in verifiers.items() if name != "gold"}
    pairs = [pair for pair in task.dev if pair.steps is not None][:NUM_CHECKED]
    if not others or not pairs:
        return frozenset(), {}
    samples = sample_stage(run, lm, task, pairs, "she/held_out", num_samples=1, config=GREEDY)
    parsed = [task.read(samples[pair.id][0].completion) for pair in pairs]
    truth = gold_verdicts(parsed, pairs, task.profile)
    off, measured = set(), {}
    for name, verifier in others.items():
        said = verifier(parsed, pairs, task.profile)
        weak = weak_steps(name, said, truth, task.profile, min_balanced_accuracy=run.config.she.min_balanced_accuracy)
        off |= {(name, step) for step in weak}
        numbers = {
            step: balanced_accuracy(said[:, column], truth[:, column]) for column, step in enumerate(task.profile.steps)
        }
        measured[name] = {step: value for step, value in numbers.items() if value == value}
        if weak:
            run.say(f"she: verifier {name} is switched off for {json.dumps(weak)}")
    return frozenset(off), measured
