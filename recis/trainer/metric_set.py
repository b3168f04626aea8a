"""The metrics of a run: one copy per task, fed with what the model scores.

Keys are the metric's own ("auc"), with the task before it ("click.auc") when there are several. A masked label is left
out, a task weight multiplies the sample weight.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from torch import Tensor

from recis.errors import ConfigError
from recis.io.batch import Batch
from recis.metrics.metric import Metric


class MetricSet:
    """Empty copies of `metrics` for each of `tasks`.

    Raises:
        ConfigError: two metrics have one key.
    """

    def __init__(self, metrics: Sequence[Metric], tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        keys = [metric.key for metric in metrics]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"metrics: two of them are called {key!r}; keep one")
        self._metrics = {
            (f"{task}.{metric.key}" if len(tasks) > 1 else metric.key): (index, metric.fresh())
            for index, task in enumerate(tasks)
            for metric in metrics
        }

    def update(self, scores: Tensor, batch: Batch) -> None:
        """Add a batch: scores [B, T] (or [B] with one task).

        Raises:
            ConfigError: scores do not have one column per task.
        """
        if not self._metrics:
            return
        scores = scores.detach().float()
        scores = scores.unsqueeze(1) if scores.ndim == 1 else scores
        if scores.shape != (batch.num_samples, len(self.tasks)) or batch.labels.shape != scores.shape:
            raise ConfigError(
                f"metrics need scores and labels [B, T] with T = {len(self.tasks)} tasks; got scores "
                f"{tuple(scores.shape)}, labels {tuple(batch.labels.shape)}; name the tasks, or give a `score` function"
            )
        for index, metric in self._metrics.values():
            _update(metric, scores, batch, index)

    def compute(self) -> dict[str, float]:
        """Return all values by key; NaN where a metric has none."""
        return {key: metric.compute() for key, (_, metric) in self._metrics.items()}

    def merged(self, states: Sequence[Mapping[str, Any]]) -> "MetricSet":
        """Return new metrics over the rows of all `states`, which `state_dict` of sets like this one returned."""
        merged = copy(self)
        merged._metrics = {key: (index, metric.fresh()) for key, (index, metric) in self._metrics.items()}
        for state in states:
            if set(state) != set(self._metrics):
                raise ConfigError(f"saved metrics are {sorted(state)}, this run has {sorted(self._metrics)}")
            for key, (_, metric) in merged._metrics.items():
                part = metric.fresh()
                part.load_state_dict(state[key])
                metric.merge(part)
        return merged

    def reset(self) -> None:
        """Forget all rows."""
        for _, metric in self._metrics.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every metric by key."""
        return {key: metric.state_dict() for key, (_, metric) in self._metrics.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what state_dict returned; ConfigError when it is of other metrics."""
        if set(state) != set(self._metrics):
            raise ConfigError(f"saved metrics are {sorted(state)}, this run has {sorted(self._metrics)}")
        for key, (_, metric) in self._metrics.items():
            metric.load_state_dict(state[key])


def _update(metric: Metric, scores: Tensor, batch: Batch, task: int) -> None:
    scores, labels, weights, groups = scores[:, task], batch.labels[:, task], batch.weights, batch.group_ids
    if batch.label_weights is not None:
        weights = weights * batch.label_weights[:, task]
    if batch.label_mask is not None:
        keep = batch.label_mask[:, task]
        scores, labels, weights = scores[keep], labels[keep], weights[keep]
        groups = None if groups is None else groups[keep]
    metric.update(scores, labels, weights if metric.uses_weights else None, groups if metric.uses_groups else None)
