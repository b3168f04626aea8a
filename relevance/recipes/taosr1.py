"""TaoSR1 (arXiv:2508.12365): SFT, preferences, then GRPO on balanced prompts that are neither too easy nor too hard.

    SFT -> pass@N samples -> DPO -> class balance -> GRPO where 0 < right < gamma, dead groups replaced -> CumPT threshold

The order of stages, the filter and the balance are known from others' notes, most numbers are ours. In answer-first output the
outcome tells the rationale tokens nothing, so rl.rationale_weight can be lowered; no claim is made that rationales improve.
"""

from pathlib import Path

from relevance.config import TaosrRun
from relevance.engine import train_dpo, train_rl
from relevance.grader import RolloutJob
from relevance.methods import Method, group_signal, outcome_reward, outside, signal_config
from relevance.preference_stage import preference_stage
from relevance.sampling import balance_labels
from relevance.schedule import prompt_order
from relevance.training_run import TrainingRun


def train(run: TrainingRun[TaosrRun]) -> Path:
    """Train and return the folder of the finished model."""
    preferences, stage, config = run.stage("dpo/train"), run.stage("rl"), run.config
    balanced = balance_labels(run.task.train, seed=config.seed) if config.filter.balance else range(len(run.task.train))
    if not preferences.is_done:
        lm = run.start_model()
        task = run.task_of(lm)
        rows = preference_stage(run, lm, task, [task.train[place] for place in balanced], config.dpo)
        train_dpo(lm, rows, config.dpo, preferences)
    if not stage.is_done:
        lm = run.load(preferences.final)
        task = run.task_of(lm)
        ids = [task.train[place].id for place in balanced]
        method = Method(
            reward=outcome_reward(),
            signal=group_signal(signal_config(config.rl)),
            is_dead=outside(gamma=config.filter.gamma),
            refill_rounds=config.rl.refill_rounds,
        )
        job = RolloutJob(
            task=task, method=method, lm=lm, reserve=tuple(ids), has_own_head=config.engine.own_head, state=stage.state
        )
        order = prompt_order(ids, num_prompts=config.rl.max_steps * config.rl.prompts_per_step, seed=config.seed)
        train_rl(job, order, config.rl, stage)
    return run.finish(stage.final)


if __name__ == "__main__":
    import sys

    from relevance.cli import main

    raise SystemExit(main(["train", "taosr1", *sys.argv[1:]]))
