"""Run a model over data without training it: the outputs, scores and losses of its batches."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recis.io.batch import Batch, RawBatch
from recis.trainer.data import FromStart
from recis.trainer.metric_set import MetricSet
from recis_kernels import calibration

if TYPE_CHECKING:
    from recis.trainer.trainer import Trainer

Read = RawBatch | Batch


def measure(trainer: "Trainer", source: FromStart) -> tuple[int, dict[str, float]]:
    """Return how many samples the data has, and mean loss and metrics on them."""
    metrics = MetricSet(trainer.config.metrics, trainer.tasks)
    loss_sum = torch.zeros((), dtype=torch.float64)
    weight_sum = torch.zeros((), dtype=torch.float64)
    num_samples = 0
    for _, batch, scores, loss in scored(trainer, source, with_loss=True):
        loss_sum += loss
        weight_sum += batch.weights.sum().double().cpu()
        metrics.update(scores, batch)
        num_samples += batch.num_samples
    return num_samples, {"loss": float(loss_sum / weight_sum), **metrics.compute()}


def scored(
    trainer: "Trainer", source: FromStart, *, with_loss: bool = False
) -> Iterator[tuple[Read, Batch, Tensor, Tensor]]:
    """Yield each batch as it was read, as features, its scores [B, T] and, if asked for, its summed loss, float64."""
    if trainer.parallel is not None:
        yield from trainer.parallel.outputs(source, with_loss=with_loss)
        return
    none = torch.zeros((), dtype=torch.float64)
    trainer.model.eval()
    with torch.no_grad():
        try:
            for raw, batch in source.batches():
                output = forward(trainer, batch)
                loss = trainer.loss(output, batch).double().cpu() if with_loss else none
                yield raw, batch, scores_of(trainer, output), loss
        finally:
            trainer.note_bad_rows(source.bad_rows)


def forward(trainer: "Trainer", batch: Batch) -> Any:
    """Return the model's output for a batch, with the run's choices and in its types."""
    with calibration.use(trainer.choices), trainer.autocast(batch.weights.device.type):
        output = trainer.forward(batch)
    return as_float(output)


def scores_of(trainer: "Trainer", output: Any) -> Tensor:
    """Return what metrics and predictions see of an output, [B, T] float32."""
    scores = trainer.config.score(output).float()
    return scores.unsqueeze(1) if scores.ndim == 1 else scores


def as_float(output: Any) -> Any:
    """Return logits of an autocast model in float32; outputs of other kinds as they are."""
    return output.float() if isinstance(output, Tensor) and output.dtype == torch.bfloat16 else output
