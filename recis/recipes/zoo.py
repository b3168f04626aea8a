"""Every model of `recis.models` on its synthetic log: `recis train recis.recipes.zoo:dlrm`, seconds each, no data needed.

The click log's best possible AUC is about .847; 128 steps on 32,768 samples come within .05 to .1 of it. In the sequences of
SASRec, HSTU and seq2seq the next item can be told about 7 times in 10. Use these as a start for a
recipe of your own: replace `SyntheticClicks` by a DataConfig with features, and the small config by yours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis.errors import ConfigError
from recis.io import Batch
from recis.metrics import Calibration, ExactAuc, Gauc, LogLoss, Ne
from recis.models import bst as bst_model
from recis.models import dcn as dcn_model
from recis.models import deepfm as deepfm_model
from recis.models import din as din_model
from recis.models import dlrm as dlrm_model
from recis.models import hstu as hstu_model
from recis.models import multitask, two_tower
from recis.models import sasrec as sasrec_model
from recis.models import seq2seq as seq2seq_model
from recis.models.losses import binary_loss, softmax_loss
from recis.models.next_item import NextItem, next_item_loss, next_item_score
from recis.models.synthetic import SyntheticClicks
from recis.models.synthetic_sequences import SyntheticSequences
from recis.trainer import DenseAdamW, TrainConfig, Trainer


def dlrm(*, data: str | None, out: Path, num_samples: int = 32_768, seed: int = 0) -> TrainConfig:
    """Return a run of the small DLRM; data must be None, out is not read."""
    return _run("dlrm", dlrm_model.synthetic(), data, num_samples, seed)


def deepfm(*, data: str | None, out: Path, num_samples: int = 32_768, seed: int = 0) -> TrainConfig:
    """Return a run of the small DeepFM; as dlrm."""
    return _run("deepfm", deepfm_model.synthetic(), data, num_samples, seed)


def dcn(*, data: str | None, out: Path, num_samples: int = 32_768, seed: int = 0) -> TrainConfig:
    """Return a run of the small DCN-V2; as dlrm."""
    return _run("dcn", dcn_model.synthetic(), data, num_samples, seed)


def din(*, data: str | None, out: Path, num_samples: int = 32_768, seed: int = 0) -> TrainConfig:
    """Return a run of the small DIN; as dlrm."""
    return _run("din", din_model.synthetic(), data, num_samples, seed)


def mmoe(*, data: str | None, out: Path, num_samples: int = 32_768, seed: int = 0) -> TrainConfig:
    """Return a run of the small MMoE on two tasks; as dlrm."""
    return _run("mmoe", multitask.synthetic_mmoe(), data, num_samples, seed, tasks=("click", "like"))


def ple(*, data: str | None, out: Path, num_samples: int = 32_768, seed: int = 0) -> TrainConfig:
    """Return a run of the small PLE on two tasks; as dlrm."""
    return _run("ple", multitask.synthetic_ple(), data, num_samples, seed, tasks=("click", "like"))


def two_towers(*, data: str | None, out: Path, num_samples: int = 32_768, seed: int = 0) -> TrainConfig:
    """Return a run of the small two-tower model, trained on clicks by softmax; as dlrm."""
    model = two_tower.synthetic()
    return _run("two_towers", model, data, num_samples, seed, loss=softmax_loss, score=two_tower.positive_score)


def bst(*, data: str | None, out: Path, num_samples: int = 32_768, seed: int = 0) -> TrainConfig:
    """Return a run of the small BST; as dlrm."""
    return _run("bst", bst_model.synthetic(), data, num_samples, seed)


def sasrec(*, data: str | None, out: Path, num_samples: int = 16_384, seed: int = 0) -> TrainConfig:
    """Return a run of the small SASRec on synthetic sequences; data must be None, out is not read."""
    return _sequences("sasrec", sasrec_model.synthetic(), next_item_hits, data, num_samples, seed)


def hstu(*, data: str | None, out: Path, num_samples: int = 16_384, seed: int = 0) -> TrainConfig:
    """Return a run of the small HSTU with a sampled softmax; as sasrec."""
    return _sequences("hstu", hstu_model.synthetic(), next_item_hits, data, num_samples, seed)


def seq2seq(*, data: str | None, out: Path, num_samples: int = 16_384, seed: int = 0) -> TrainConfig:
    """Return a run of the small seq2seq; as sasrec."""
    return _sequences("seq2seq", seq2seq_model.synthetic(), first_written_hits, data, num_samples, seed, lr=1e-2)


def next_item_hits(trainer: Trainer) -> dict[str, float]:
    """Return hit@1: how often the item that a NextItem model ranks first is the next one; about .7 is possible."""
    model = trainer.model
    assert isinstance(model, NextItem)
    return _hit_rate(trainer, lambda batch: model.best(batch, 1)[0][:, 0])


def first_written_hits(trainer: Trainer) -> dict[str, float]:
    """Return hit@1: how often the first item that a Seq2Seq writes is the next one, where there is one."""
    model = trainer.model
    assert isinstance(model, seq2seq_model.Seq2Seq)
    return _hit_rate(trainer, lambda batch: model.write(batch, max_items=1).ids[:, 0, 0])


def _hit_rate(trainer: Trainer, first_of: Callable[[Batch], Tensor]) -> dict[str, float]:
    trainer.model.eval()
    hits = []
    for batch in SyntheticSequences(num_samples=2048, batch_size=512, seed=2 * trainer.config.seed + 1):
        following = batch.sparse["next_items"]
        some = following.lengths > 0
        hits.append(first_of(batch)[some] == following.flat_values[following.offsets[:-1][some]])
    return {"hit@1": float(torch.cat(hits).float().mean())}


def _sequences(
    name: str,
    model: Any,
    evaluate: Callable[[Trainer], dict[str, float]],
    data: str | None,
    num_samples: int,
    seed: int,
    *,
    lr: float = 3e-3,
) -> TrainConfig:
    _refuse(name, data)
    return TrainConfig(
        name=name,
        model=model,
        train_data=SyntheticSequences(num_samples=num_samples, seed=2 * seed),
        eval_data=SyntheticSequences(num_samples=2048, batch_size=512, seed=2 * seed + 1),
        loss=next_item_loss,
        score=next_item_score,
        evaluate=evaluate,
        dense_optimizer=DenseAdamW(lr=lr),
        seed=seed,
    )


def _refuse(name: str, data: str | None) -> None:
    if data is not None:
        raise ConfigError(f"recipe {name!r} makes its own data and cannot read {data}; leave --data out")


def _run(
    name: str,
    model: Any,
    data: str | None,
    num_samples: int,
    seed: int,
    *,
    tasks: tuple[str, ...] = ("click",),
    loss: Callable[[Any, Any], Tensor] = binary_loss,
    score: Callable[[Any], Tensor] = torch.sigmoid,
) -> TrainConfig:
    _refuse(name, data)
    return TrainConfig(
        name=name,
        model=model,
        train_data=SyntheticClicks(num_samples=num_samples, num_tasks=len(tasks), seed=2 * seed),
        eval_data=SyntheticClicks(num_samples=4096, batch_size=1024, num_tasks=len(tasks), seed=2 * seed + 1),
        tasks=tasks,
        loss=loss,
        score=score,
        metrics=(ExactAuc(), Gauc(), LogLoss(), Ne(), Calibration()),
        dense_optimizer=DenseAdamW(lr=0.01),
        seed=seed,
    )
