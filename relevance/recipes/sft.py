"""Supervised fine-tuning: the model learns to write the oracle's graded answers.

Answer first: the label is the first token, so scoring needs the prompt alone. `--set profile=think_first` puts it last, which
is the baseline that falls behind label-only training (TaoSR1, arXiv:2508.12365, as told by others). Cross-entropy on the
completion, AdamW, cosine, 2 epochs (P, DyKnow-RAG arXiv:2510.11122); the learning rate of the tiny model is ours.
"""

from pathlib import Path

from relevance.config import SftRun
from relevance.training_run import TrainingRun


def train(run: TrainingRun[SftRun]) -> Path:
    """Train and return the folder of the finished model."""
    return run.finish(run.train_sft())


if __name__ == "__main__":
    import sys

    from relevance.cli import main

    raise SystemExit(main(["train", "sft", *sys.argv[1:]]))
