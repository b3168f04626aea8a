"""Plain GRPO, the baseline that the other recipes are measured against.

    J = mean over tokens of min(rho A, clip(rho) A) - kl_coef k3,  A = (R - mean) / (std + eps) in the group

Outcome reward, no filter, no balance, no refill. `--set reward.kind=shaped --set reward.gated=false` is the process-reward
baseline. Source: GRPO arXiv:2402.03300; knobs: `config.RlConfig`.
"""

from pathlib import Path

from relevance.config import GrpoRun
from relevance.engine import train_rl
from relevance.grader import RolloutJob
from relevance.methods import Method, group_signal, outcome_reward, outside, shaped_reward, signal_config
from relevance.schedule import prompt_order
from relevance.training_run import TrainingRun


def train(run: TrainingRun[GrpoRun]) -> Path:
    """Train and return the folder of the finished model."""
    stage, config = run.stage("rl"), run.config
    if not stage.is_done:
        lm = run.start_model()
        task = run.task_of(lm)
        ids = [pair.id for pair in task.train if pair.label is not None]
        reward = shaped_reward(config.reward) if config.reward.kind == "shaped" else outcome_reward(config.reward)
        method = Method(
            reward=reward,
            signal=group_signal(signal_config(config.rl)),
            is_dead=outside(),
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

    raise SystemExit(main(["train", "grpo", *sys.argv[1:]]))
