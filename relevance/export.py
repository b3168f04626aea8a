"""Scores of a model as columns and soft targets of a recis ranker.

    export(scorer, pairs, "teacher.parquet")      query_id, item_id, log p_1 .. log p_4, expected grade, entropy, tier
    distillation_loss(student_logits, labels, teacher_logp, w=.5, temperature=2)

    loss = (1 - w) CE(y) + w T^2 KL(p_teacher^(1/T) || p_student at T)

A teacher that has seen a pair's label knows more than it will know when the ranker serves; so export refuses queries that the
model was trained on unless the caller says that this is meant. Source: distillation, arXiv:1503.02531; columns and the
refusal are ours.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recis.errors import DataError
from relevance.data import Pair
from relevance.scoring import TIERS, cumpt
from relevance.serve import Scorer

MIN_LOG = -20.0
COLUMNS = ("log_p_1", "log_p_2", "log_p_3", "log_p_4", "expected_grade", "entropy")


def teacher_columns(probs: Tensor) -> Tensor:
    """Return the dense columns [N, 6] float32 of label probabilities [N, 4]: four logs (floor -20), grade, entropy in nats."""
    logs = probs.double().log().clamp(min=MIN_LOG)
    grade = probs.double() @ torch.arange(1.0, 5.0, dtype=torch.float64)
    entropy = torch.special.entr(probs.double()).sum(1)
    return torch.cat([logs, grade[:, None], entropy[:, None]], dim=1).float()


def export(scorer: Scorer, pairs: Sequence[Pair], out: str | Path, *, allow_leak: bool = False) -> int:
    """Write teacher columns as Parquet, keyed by query and item, and return the number of rows.

    Args:
        scorer: the teacher.
        pairs: to score.
        out: .parquet.
        allow_leak: also for queries that the model was trained on.

    Raises:
        DataError: a query that the model was trained on, or no pairs.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not pairs:
        raise DataError("there is no pair to export")
    seen = set(scorer.settings.get("train_queries", ()))
    leaked = [pair for pair in pairs if sha256(pair.query.encode()).hexdigest()[:16] in seen]
    if leaked and not allow_leak:
        raise DataError(
            f"{len(leaked)} of {len(pairs)} pairs have queries that the model was trained on: its scores there are better than "
            "those that the ranker will be served",
            unit=f"pair {leaked[0].id!r}",
            option="export with a model that never saw them (5-fold cross-fitting for train pairs), or --allow-leak",
        )
    probs = scorer.probs(pairs)
    table = {
        "query_id": [pair.query_id for pair in pairs],
        "item_id": [pair.item_id for pair in pairs],
        **dict(zip(COLUMNS, teacher_columns(probs).T.numpy(), strict=True)),
        "tier": [TIERS[number] for number in cumpt(probs, scorer.b_cum).tolist()],
        "label": pa.array([pair.label for pair in pairs], type=pa.int64()),
    }
    pq.write_table(pa.table(table), out)
    return len(pairs)


def folds_by_query(pairs: Sequence[Pair], *, num_folds: int = 5) -> np.ndarray:
    """Return the fold [N] of each pair, whole queries together, by a hash of the query: for cross-fitting a teacher."""
    return np.array([int(sha256(pair.query.encode()).hexdigest()[:8], 16) % num_folds for pair in pairs])


def distillation_loss(
    student_logits: Tensor, labels: Tensor, teacher_logp: Tensor, *, w: float = 0.5, temperature: float = 2.0
) -> Tensor:
    """Return the mean loss of a student that learns from labels and a teacher.

    Args:
        student_logits: [B, 4], label 1 first.
        labels: [B] int64, 1 to 4.
        teacher_logp: [B, 4] log-probabilities of the teacher.
        w: weight of the teacher, in [0, 1].
        temperature: of both sides; T^2 keeps the gradient's size.

    Raises:
        ValueError: w or temperature out of range, or shapes differ.
    """
    if not 0 <= w <= 1 or not temperature > 0 or student_logits.shape != teacher_logp.shape:
        raise ValueError(
            f"distillation needs w in [0, 1], temperature above 0 and equal shapes; got {w}, {temperature}, "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logp.shape)}"
        )
    teacher = F.log_softmax(teacher_logp / temperature, dim=1)
    student = F.log_softmax(student_logits / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - w) * F.cross_entropy(student_logits, labels - 1) + w * temperature**2 * divergence
