"""After TaoSR-AGRL (arXiv:2510.08048): rule-aware reward, and guided replay of prompts that the model keeps failing.

    R = gate * (.6 label + .2 category + .2 F1 of attributes);  gate = 0 for a fault or a broken hard rule
    a group with accuracy <= tau: half of its rollouts are sampled again under a prompt that tells gold steps, never the label

A reconstruction: the paper states dense rewards over several dimensions, rule adherence and guidance on demand; formula,
weights, trigger, levels and annealing are ours. Guided rows are trained under the plain prompt, against what sampled them.
"""

from pathlib import Path

from relevance.config import AgrlRun
from relevance.data import check_missing
from relevance.engine import train_rl
from relevance.grader import RolloutJob
from relevance.methods import Method, group_signal, shaped_reward, signal_config
from relevance.schedule import prompt_order
from relevance.training_run import TrainingRun


def train(run: TrainingRun[AgrlRun]) -> Path:
    """Train and return the folder of the finished model."""
    stage, config = run.stage("rl"), run.config
    if not stage.is_done:
        check_missing(run.task.train, ["label", "category", "attributes"], max_missing=config.max_missing)
        lm = run.start_model()
        task = run.task_of(lm)
        ids = [pair.id for pair in task.train if pair.label is not None]
        method = Method(
            reward=shaped_reward(config.reward),
            signal=group_signal(signal_config(config.rl, shared_baseline=config.replay.shared_baseline)),
            replay=config.replay,
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

    raise SystemExit(main(["train", "agrl", *sys.argv[1:]]))
