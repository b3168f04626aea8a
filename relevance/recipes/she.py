"""After TaoSR-SHE (arXiv:2510.07972): every reasoning step has its own reward and advantage, prompts come in stages.

    label, verdict   A of the outcome           other steps   lam * crit * z-score of the step's verdicts in the group
    verdicts         gold, then EBRM, then a reward model (here a noisy oracle); weak ones are switched off per step type
    prompts          diverse ones only; stage 1 outcome only, 2 steps, 3 steps on hard prompts

A reconstruction: the paper names stepwise rewards, a hybrid of verifiers, diversity filtering and a curriculum; every formula
and number is ours.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from relevance.checkpoints import write_json
from relevance.config import SheRun
from relevance.curriculum import STAGES, Stage, keep_diverse, stage_positions
from relevance.data import FAMILIES, Pair
from relevance.engine import train_rl
from relevance.grader import RolloutJob
from relevance.language_model import LanguageModel
from relevance.methods import Method, outcome_reward, step_signal
from relevance.ranks import is_main
from relevance.rewards import step_rewards
from relevance.rollouts import SamplingConfig
from relevance.sampling import AccuracyRange
from relevance.sampling_stage import sample_stage
from relevance.schedule import staged_order
from relevance.step_advantages import StepAdvantageConfig, masked, per_step, suffix_sum
from relevance.step_verifiers import run_verifier
from relevance.task import Task
from relevance.training_run import TrainingRun
from relevance.verify import StepVerifier

VARIANTS = {"per_step": per_step, "suffix_sum": suffix_sum, "masked": masked}
EVERYTHING = (Stage(accuracy=AccuracyRange(closed=True), reward="steps", share=1.0, families=FAMILIES),)


def train(run: TrainingRun[SheRun]) -> Path:
    """Train and return the folder of the finished model."""
    stage, config = run.stage("rl"), run.config
    if not stage.is_done:
        lm = run.start_model()
        task = run.task_of(lm)
        verifier = run_verifier(run, lm, task)
        stages = STAGES if config.she.use_curriculum else EVERYTHING
        pools = _pools(run, lm, task, verifier, stages)
        method = Method(
            reward=outcome_reward(),
            signal=step_signal(
                task.profile,
                verifier,
                StepAdvantageConfig(
                    lam=config.she.lam,
                    after_error=config.she.after_error,
                    ddof=config.rl.std_ddof,
                    eps=config.rl.std_eps,
                    limit=config.rl.advantage_clamp,
                ),
                variant=VARIANTS[config.she.variant],
                stages=stages,
            ),
            refill_rounds=config.rl.refill_rounds,
        )
        reserve = tuple(dict.fromkeys(name for pool in pools for name in pool))
        job = RolloutJob(
            task=task, method=method, lm=lm, reserve=reserve, has_own_head=config.engine.own_head, state=stage.state
        )
        order = staged_order(
            pools,
            stages,
            num_steps=config.rl.max_steps,
            prompts_per_step=config.rl.prompts_per_step,
            seed=config.seed,
        )
        train_rl(job, order, config.rl, stage)
    return run.finish(stage.final)


def _pools(
    run: TrainingRun[SheRun], lm: LanguageModel, task: Task, verifier: StepVerifier, stages: Sequence[Stage]
) -> list[list[str]]:
    """Return the prompts of each stage, from accuracies that are sampled once and kept.

    A stage that no prompt falls into takes the prompts of the stage before it, or all of them; the run says so.
    """
    config = run.config
    pairs = [pair for pair in task.train if pair.label is not None][: config.num_prompts]
    sampling = SamplingConfig(
        temperature=config.rl.temperature,
        top_k=config.rl.top_k,
        max_completion_tokens=config.rl.max_completion_tokens,
    )
    samples = sample_stage(run, lm, task, pairs, "she/samples", num_samples=config.she.num_logged, config=sampling)
    parsed = [[task.read(sample.completion, terminated=sample.ok) for sample in samples[pair.id]] for pair in pairs]
    labels = torch.tensor([[sample.label or 0 for sample in samples[pair.id]] for pair in pairs])
    flat = [answer for answers in parsed for answer in answers]
    owners: list[Pair] = [pair for pair in pairs for _ in range(config.she.num_logged)]
    verdicts = step_rewards(flat, owners, task.profile, verifier)
    kept = keep_diverse(
        labels, verdicts.view(len(pairs), config.she.num_logged, -1), min_entropy_bits=config.she.min_entropy_bits
    )
    right = torch.tensor(
        [[sample.ok and sample.label == pair.label for sample in samples[pair.id]] for pair in pairs]
    ).double()
    diverse = [number for number, is_kept in enumerate(kept.tolist()) if is_kept] or list(range(len(pairs)))
    own, accuracies = [pairs[number] for number in diverse], right.mean(1)[diverse].tolist()
    pools: list[list[str]] = []
    for number, stage in enumerate(stages):
        ids = [own[place].id for place in stage_positions(own, accuracies, stage)]
        if not ids:
            ids = pools[-1] if pools else [pair.id for pair in own]
            run.say(f"she: no prompt falls into stage {number + 1}; it takes {len(ids)} prompts of the stage before")
        pools.append(ids)
    if is_main():
        write_json(
            run.folder / "she" / "pools.json",
            {"prompts": len(pairs), "diverse": len(diverse), "stages": [len(pool) for pool in pools]},
        )
    return pools


if __name__ == "__main__":
    import sys

    from relevance.cli import main

    raise SystemExit(main(["train", "she", *sys.argv[1:]]))
