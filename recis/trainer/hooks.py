"""What happens beside training: plain objects with any of these methods, called in the order they are given.

    on_train_start(state)    on_step_end(state)    on_evaluate_end(state)    on_checkpoint(state)    on_train_end(state)

`state` is the run's RunState. A hook reads it and acts on its own things; to end training it sets `state.stop_reason`.
Of several ranks each calls its own hooks at the same steps; one with `rank_0_only = True` is called on rank 0 alone. Where the
dense part is dealt to them (`parallel.shard_dense`), one with `reads_weights = True` finds the model's weights whole.
An evaluation that falls on a step comes before that step's on_step_end, a checkpoint after all other hooks.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recis.errors import ConfigError, nearest
from recis.trainer.config import Monitor
from recis.trainer.log import MetricsLog
from recis.trainer.metric_set import MetricSet
from recis.trainer.state import RunState

if TYPE_CHECKING:
    from recis.trainer.parallel import ParallelRun

EVENTS = ("on_train_start", "on_step_end", "on_evaluate_end", "on_checkpoint", "on_train_end")


def call_hooks(hooks: Iterable[Any], event: str, state: RunState) -> None:
    """Call `event` of every hook that has it."""
    for hook in hooks:
        method = getattr(hook, event, None)
        if method is not None:
            method(state)


def check_hooks(hooks: Sequence[Any]) -> None:
    """Raise ConfigError for an object that has none of the events: it would never be called."""
    for hook in hooks:
        if not any(hasattr(hook, event) for event in EVENTS):
            raise ConfigError(f"hook {hook!r} has none of {', '.join(EVENTS)}; give it one, or leave it out")


class Logger:
    """Writes a line of training values every `every_steps`, and one per evaluation.

    The tables' counters are in each line, so that nothing rejected or full stays unseen.

    Args:
        log: where to.
        metrics: training metrics; each line takes their value since the line before.
        together: gives values over all ranks of a job; None: this process has seen all samples.
        clock: seconds, rising; for tests.
    """

    def __init__(
        self,
        log: MetricsLog,
        *,
        every_steps: int,
        metrics: MetricSet,
        together: "ParallelRun | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._together = together
        self._log = log
        self._every_steps = every_steps
        self._metrics = metrics
        self._clock = clock
        self._since = (0.0, 0)

    def on_train_start(self, state: RunState) -> None:
        self._since = (self._clock() - state.evaluation_s, state.samples)

    def on_step_end(self, state: RunState) -> None:
        if state.step % self._every_steps:
            return
        now = self._clock() - state.evaluation_s
        begun, samples = self._since
        if self._together is None:
            values = self._metrics.compute()
            counters = {name: table.counters().to_dict() for name, table in state.tables.items()}
        else:
            values, counters = self._together.metric_values(self._metrics), self._together.table_counters(state.tables)
        self._log.write(
            {
                "kind": "train",
                "step": state.step,
                "loss": float(state.window_loss) / max(state.window_steps, 1),
                **values,
                "samples": state.samples,
                "samples_per_s": (state.samples - samples) / max(now - begun, 1e-9),
                "tables": counters,
            }
        )
        self._metrics.reset()
        state.window_loss.zero_()
        state.window_steps = 0
        self._since = (now, state.samples)

    def on_evaluate_end(self, state: RunState) -> None:
        self._log.write({"kind": "eval", "step": state.step, **state.metrics})

    def on_train_end(self, state: RunState) -> None:
        self._log.close()


class EarlyStop:
    """Keeps the best value of the monitored metric and ends training when it has not been beaten for long enough."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def on_train_start(self, state: RunState) -> None:
        self._stop_if_due(state)  # a run that was stopped is not trained further when it is resumed

    def on_evaluate_end(self, state: RunState) -> None:
        monitor = self._monitor
        if monitor.metric not in state.metrics:
            raise ConfigError(
                f"monitor: no metric {monitor.metric!r} in the evaluation, which gives {', '.join(state.metrics)}"
            )
        value = state.metrics[monitor.metric]
        if monitor.is_better(value, state.best):
            state.best, state.best_step, state.bad_evals = value, state.step, 0
            return
        state.bad_evals += 1
        self._stop_if_due(state)

    def _stop_if_due(self, state: RunState) -> None:
        monitor = self._monitor
        if monitor.patience_evals is not None and state.bad_evals >= monitor.patience_evals:
            state.stop_reason = (
                f"{monitor.metric} has not beaten {state.best} of step {state.best_step} "
                f"in {state.bad_evals} evaluations"
            )


class Checkpoint:
    """Saves every `every_steps`, at each new best evaluation, and at the end.

    A run that the data ends is evaluated after its last step was perhaps saved: then that step is saved once more.
    """

    def __init__(self, *, every_steps: int | None, save: Callable[[], None]) -> None:
        self._every_steps = every_steps
        self._save = save
        self._saved: tuple[int, int | None] | None = None

    def on_train_start(self, state: RunState) -> None:
        self._saved = (state.step, state.last_eval_step) if state.checkpoint is not None else None

    def on_step_end(self, state: RunState) -> None:
        due = self._every_steps is not None and state.step % self._every_steps == 0
        if due or state.best_step == state.step:
            self._save_once(state)

    def on_train_end(self, state: RunState) -> None:
        self._save_once(state)

    def _save_once(self, state: RunState) -> None:
        now = (state.step, state.last_eval_step)
        if self._saved != now:
            self._save()
            self._saved = now


class Evict:
    """Every `every_steps`, frees the rows of the named tables that no step has seen for `older_than_steps`.

    For a purge that the tables themselves do not carry as a policy, such as one per day of data.
    """

    def __init__(self, tables: Sequence[str], *, every_steps: int, older_than_steps: int) -> None:
        if every_steps < 1 or older_than_steps < 1:
            raise ConfigError(
                f"Evict: every_steps and older_than_steps must be at least 1; got {every_steps}, {older_than_steps}"
            )
        self.tables = tuple(tables)
        self.every_steps = every_steps
        self.older_than_steps = older_than_steps

    def on_train_start(self, state: RunState) -> None:
        for name in self.tables:
            if name not in state.tables:
                raise ConfigError(f"Evict: no table {name!r}; {nearest(name, state.tables)}")

    def on_step_end(self, state: RunState) -> None:
        if state.step % self.every_steps == 0:
            for name in self.tables:
                state.tables[name].evict_older_than(state.step - self.older_than_steps + 1)


class TensorBoard:
    """Writes loss and evaluation values as TensorBoard events. Needs the extra `tb`.

    Args:
        folder: where the event files go.
        every_steps: steps between two losses.
    """

    rank_0_only = True

    def __init__(self, folder: Path | str, *, every_steps: int = 50) -> None:
        self.folder = str(folder)
        self.every_steps = every_steps
        self._writer: Any = None

    def on_train_start(self, state: RunState) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f'{error}: TensorBoard needs an extra; run `pip install "recis[tb]"`') from error
        purge_step = state.step + 1 if state.step else None  # events after the checkpoint are those of the killed run
        self._writer = SummaryWriter(self.folder, purge_step=purge_step)

    def on_step_end(self, state: RunState) -> None:
        if state.step % self.every_steps == 0:
            self._writer.add_scalar("train/loss", state.loss, state.step)

    def on_evaluate_end(self, state: RunState) -> None:
        for name, value in state.metrics.items():
            self._writer.add_scalar(f"eval/{name}", value, state.step)

    def on_train_end(self, state: RunState) -> None:
        self._writer.close()


class Profiler:
    """Records `num_steps` steps after `after_steps` with torch's profiler into `folder/trace.json` (Chrome's format)."""

    rank_0_only = True

    def __init__(self, folder: Path | str, *, after_steps: int = 10, num_steps: int = 5) -> None:
        self.folder = Path(folder)
        self.after_steps = after_steps
        self.num_steps = num_steps
        self._profile: Any = None
        self._first_step = 0

    def on_train_start(self, state: RunState) -> None:
        self._first_step = state.step
        if self.after_steps == 0:
            self._start()

    def on_step_end(self, state: RunState) -> None:
        done = state.step - self._first_step
        if done == self.after_steps:
            self._start()
        elif done == self.after_steps + self.num_steps:
            self._finish()

    def on_train_end(self, state: RunState) -> None:
        self._finish()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.__enter__()

    def _finish(self) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.folder / "trace.json"))
            self._profile = None
