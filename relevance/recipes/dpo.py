"""Direct preference optimisation on the start model's own samples.

    -log sigmoid(beta (log pi(y+)/ref(y+) - log pi(y-)/ref(y-))),  ref = the start model

y+ is an own right answer, or the oracle's where none of the samples is right; y- an own wrong one (S, TaoSR1,
arXiv:2508.12365, as told by others). beta .1 is TRL's, 8 samples and the limits are ours. Where the chosen answers become
less likely than at the start the log says so and names the mixed loss that holds them.
"""

from pathlib import Path

from relevance.config import DpoRun
from relevance.engine import train_dpo
from relevance.preference_stage import preference_stage
from relevance.training_run import TrainingRun


def train(run: TrainingRun[DpoRun]) -> Path:
    """Train and return the folder of the finished model."""
    stage = run.stage("dpo/train")
    if not stage.is_done:
        lm = run.start_model()
        task = run.task_of(lm)
        rows = preference_stage(run, lm, task, task.train, run.config.dpo)
        train_dpo(lm, rows, run.config.dpo, stage)
    return run.finish(stage.final)


if __name__ == "__main__":
    import sys

    from relevance.cli import main

    raise SystemExit(main(["train", "dpo", *sys.argv[1:]]))
