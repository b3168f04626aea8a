"""Train a model: one optimizer step, the loop around it, evaluation, prediction, and the run that can be resumed.

    trainer = Trainer(config, out);  metrics = trainer.train()
    Trainer(config, out, resume=True)      goes on behind the newest whole checkpoint as if nothing had happened

The order of a step is that of `train_step`. After it come, in this order: an evaluation if one is due, the hooks, a
checkpoint if one is due. Equal configs give equal bytes, whether or not a run was killed and resumed on its way.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from recis.checkpoint import Loaded, latest, list_checkpoints
from recis.distributed.ranks import Ranks
from recis.errors import ConfigError, RecisError
from recis.features import FeatureEngine
from recis.io.assemble import BadRow
from recis.io.batch import Batch, RawBatch
from recis.io.config import DataConfig
from recis.optim import SparseOptimizer, clip_grad_norm
from recis.optim.schedule import build_schedule
from recis.trainer import persist, scoring
from recis.trainer.build import (
    all_tables,
    build_model,
    dense_parameters,
    dense_state,
    find_collections,
    nonfinite_features,
    table_sets,
)
from recis.trainer.config import TrainConfig
from recis.trainer.data import UNTIL_STOPPED, FromStart, Share, StepStream
from recis.trainer.hooks import Checkpoint, EarlyStop, Logger, call_hooks, check_hooks
from recis.trainer.log import MetricsLog
from recis.trainer.metric_set import MetricSet
from recis.trainer.parallel import ParallelRun, deal_dense
from recis.trainer.progress import Progress
from recis.trainer.randomness import deterministic_note, deterministic_torch, seed_everything
from recis.trainer.run_folder import RunFolder
from recis.trainer.scoring import as_float
from recis.trainer.serialize import to_json
from recis.trainer.state import RunState
from recis_kernels import calibration


class NonFiniteLossError(RecisError):
    """The loss is NaN or infinite; nothing was updated in that step."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gave: the weighted mean loss (a scalar on the model's device) and the model's outputs."""

    loss: Tensor
    outputs: list[Any]


class Trainer:
    """One run.

    Args:
        config: what to run.
        out: the run's folder; None keeps nothing.
        resume: go on with the run in `out`.
        quiet: print no progress.
        ranks: the processes that train together; None: this one alone. All of them build equal trainers.
        clock: seconds since 1970, for the manifest; for tests.

    Attributes:
        model: the module that is trained.
        collections: its embedding collections.
        tables: their tables by name.
        state: where the run stands (see RunState).
        ranks: the processes that train together.
        parallel: what they do together; None where this process does all.
        shards: the dense part dealt to them (`parallel.shard_dense`); None where every process has all of it.
        choices: what the kernels choose by: the built-in table in deterministic mode, else this machine's; of a resumed
            run the one in its checkpoint.

    Raises:
        ConfigError: `out` holds something else, or a run with another config; a setting that does not fit the model.
        CheckpointError: no checkpoint of the run is whole, or one does not fit the model.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path | None = None,
        *,
        resume: bool = False,
        quiet: bool = False,
        ranks: Ranks | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if resume and out is None:
            raise ConfigError("resume needs the folder of the run; give out")
        self.config = config
        self.clock = clock
        check_hooks(config.hooks)
        self.config_text = json.dumps(to_json(config), indent=1, allow_nan=False) + "\n"
        self.ranks = Ranks() if ranks is None else ranks
        has_folder = out is not None and self.ranks.rank == 0
        self._folder = RunFolder(out, self.config_text, resume=resume) if out is not None and has_folder else None
        try:
            self._build(out, resume=resume, quiet=quiet or self.ranks.rank > 0)
        except BaseException:
            if self._folder is not None:
                self._folder.close()
            raise

    def _build(self, out: Path | None, *, resume: bool, quiet: bool) -> None:
        config = self.config
        seed_everything(config.seed)
        self.choices = calibration.BUILT_IN if config.deterministic else calibration.current()
        self.model = build_model(config)
        dense_state(self.model)  # refuses, before any work, what a checkpoint could not hold
        self.collections = find_collections(self.model)
        self.table_sets = table_sets(self.collections)
        for table_set in self.table_sets:
            table_set.set_deterministic(config.deterministic)
        self.tables = all_tables(self.table_sets)
        self.shards = deal_dense(self.model, config, self.ranks)
        self.dense_parameters = dense_parameters(self.model) if self.shards is None else self.shards.parameters
        self.forward = torch.compile(self.model) if config.compile_dense else self.model
        self.engine = FeatureEngine(config.features) if config.features else None
        self.loss = config.loss
        own_names = ("label",) if self.engine is None else self.engine.label_keys
        self.tasks = config.tasks or own_names
        self.metrics = MetricSet(config.metrics, self.tasks)
        self.dense_optimizer = config.dense_optimizer.build(self.dense_parameters.values())
        self.sparse_optimizer = SparseOptimizer(self.collections)
        self.schedule = build_schedule(config.schedule, (self.dense_optimizer, self.sparse_optimizer))
        self.state = RunState(max_steps=config.max_steps, run=out, model=self.model, tables=self.tables)
        self.stream: StepStream | None = None
        self.reader_state: Any = None
        self._bad_rows: dict[BadRow, None] = {}
        self._eval_data = None if config.eval_data is None else FromStart(config.eval_data, self.engine)
        parts = config.parallel.parts_over(self.ranks.world_size)
        self.parallel = ParallelRun(self, self.ranks, parts) if parts > 1 else None
        self._saver = None if out is None else persist.make_saver(config, out, self.ranks)
        self._log = MetricsLog(None if self._folder is None else self._folder.log_path)  # rank 0's
        self._hooks = self._make_hooks(quiet)
        if resume and out is not None:
            self._resume(out)
        if self.state.checkpoint is None and config.init_from is not None:
            persist.start_from(self, config.init_from)

    def train_step(self, micro_batches: Sequence[Batch]) -> StepOutput:
        """Make one optimizer update, in the order it happens, and return its loss and outputs.

        Raises:
            NonFiniteLossError: before anything is updated.
        """
        with calibration.use(self.choices):
            if self.parallel is not None:
                return self.parallel.train_step(micro_batches)
            return self._train_step(micro_batches)

    def _train_step(self, micro_batches: Sequence[Batch]) -> StepOutput:
        config, step = self.config, self.state.step + 1
        self.model.train()
        total_weight = torch.stack([batch.weights.sum() for batch in micro_batches]).sum()
        total_weight = torch.where(total_weight > 0, total_weight, 1.0)  # nothing but empty batches: no gradient
        self.dense_optimizer.zero_grad()
        losses, outputs = [], []
        for batch in micro_batches:
            with self.autocast(batch.weights.device.type):
                output = self.forward(batch)
            output = as_float(output)
            loss = self.loss(output, batch) / total_weight
            self._require_finite(loss, batch, step)
            loss.backward()  # row gradients collect per table
            losses.append(loss.detach())
            outputs.append(output)
            self.metrics.update(config.score(output), batch)
        if config.clip_grad_norm is not None:
            clip_grad_norm(self.dense_parameters.values(), self.collections, config.clip_grad_norm)
        self.dense_optimizer.step()
        self.sparse_optimizer.step()
        self.schedule.step()
        for collection in self.collections:  # counters, then eviction
            collection.end_step(step)
        mean_loss = torch.stack(losses).sum()
        self.advance(step, mean_loss, sum(batch.num_samples for batch in micro_batches))
        return StepOutput(mean_loss, outputs)

    def train(self) -> dict[str, float]:
        """Train to the end of the run and return the values of the last evaluation.

        Ends after `max_steps` updates, at the end of the data, or when a hook says so. The last state is evaluated and
        saved. A run that had ended before returns at once.
        """
        config, state = self.config, self.state
        try:
            with deterministic_torch(config.deterministic):
                self._open_stream()
                self._call_hooks("on_train_start")
                for micro_batches in self._steps():
                    self.train_step(micro_batches)
                    every = config.eval_every_steps
                    if self._finished() or (every is not None and state.step % every == 0):
                        self._evaluate_now()
                    self._call_hooks("on_step_end")
                    if self.parallel is not None and config.hooks:
                        self.parallel.agree_to_stop()
                    self._note_checkpoint(wait=False)
                if self.parallel is not None:
                    self.parallel.end_steps()
                if state.last_eval_step != state.step:
                    self._evaluate_now()
                self._call_hooks("on_train_end")
                self._note_checkpoint(wait=True)
            if config.after is not None:
                with self.whole_weights():
                    config.after(self, state.run if self.ranks.rank == 0 else None)
                self.ranks.meet("the end of what follows training")  # rank 0 may do much more than the others
        except BaseException:
            self._abandon()
            raise
        self.close()
        return dict(state.metrics)

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Return loss and metrics over data from its start (None: the config's eval_data); trains nothing.

        Raises:
            ConfigError: there is no data to evaluate on.
        """
        return self.measure(data)[1]

    def measure(self, data: Any = None) -> tuple[int, dict[str, float]]:
        """Return how many samples data has, and what evaluate returns. Raises as evaluate."""
        source = self._eval_data if data is None else FromStart(data, self.engine)
        if source is None:
            raise ConfigError("nothing to evaluate on: give data, or set eval_data in the TrainConfig")
        return scoring.measure(self, source)

    def scored(self, data: Any) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch of data with its scores [B, T], in the order of its rows (files sorted by path)."""
        for _, batch, scores, _ in scoring.scored(self, FromStart(data, self.engine)):
            yield batch, scores

    def predict(self, data: Any) -> Iterator[Tensor]:
        """Yield the scores [B, T] of data, batch by batch in the order of its rows (files sorted by path).

        Columns of labels and weights need not be there.
        """
        for _, scores in self.predict_raw(data):
            yield scores

    def predict_raw(self, data: Any) -> Iterator[tuple[RawBatch | Batch, Tensor]]:
        """Yield what predict yields beside the batch as it was read, which says where its rows came from."""
        for raw, _, scores, _ in scoring.scored(self, FromStart(data, self.engine, labels=False)):
            yield raw, scores

    @property
    def bad_rows(self) -> tuple[BadRow, ...]:
        """Input rows that were left out so far (`on_bad_row="skip"`), each once; of each reading the first 1000."""
        rows = () if self.stream is None else self.stream.bad_rows
        return tuple(dict.fromkeys((*self._bad_rows, *rows)))

    def load(self, path: Path) -> Loaded:
        """Load the weights of a checkpoint, or of the newest whole one of a run: for evaluation and prediction."""
        return persist.load_weights(self, path)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Return a context in which `model` has its whole weights; every rank enters it. Nothing where nothing is dealt."""
        return nullcontext() if self.shards is None else self.shards.whole()

    def best_checkpoint(self) -> Path | None:
        """Return the folder of the best checkpoint so far; None where nothing was monitored or kept."""
        if self.state.run is None or self.state.best_step is None:
            return None
        found = [path for path in list_checkpoints(self.state.run) if path.name.endswith(f"{self.state.best_step:09d}")]
        return found[0] if found else None

    def close(self) -> None:
        """Finish a save under way, close files and threads, and let other processes into the run folder."""
        try:
            if self._saver is not None:
                self._saver.close()
        finally:
            if self.stream is not None:
                self._bad_rows.update(dict.fromkeys(self.stream.bad_rows))
                self.stream.close()
                self.stream = None
            self._log.close()
            if self._folder is not None:
                self._folder.close()
            if self.parallel is not None:
                self.parallel.close()

    def _abandon(self) -> None:
        """Close after a failure; a save that other ranks take part in may never end and is left alone."""
        if self._saver is not None and self.ranks.world_size > 1:
            self._saver = None
        self.close()

    # ---- the loop's parts

    def _steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step that is left; none is taken from the reader beyond the last."""
        assert self.stream is not None
        if self._finished():
            return
        if self.parallel is not None and self.parallel.reads_ahead:
            left = None if self.config.max_steps is None else self.config.max_steps - self.state.step
            for micro_batches, following in self.stream.steps_ahead(left):
                self.parallel.following = following
                yield micro_batches
                if self._finished():
                    return
            return
        for micro_batches in self.stream.steps():
            yield micro_batches
            if self._finished():
                return

    def _finished(self) -> bool:
        max_steps = self.config.max_steps
        return self.state.stop_reason is not None or (max_steps is not None and self.state.step >= max_steps)

    def _open_stream(self) -> None:
        config = self.config
        epochs = config.epochs
        if epochs is None and config.max_steps is not None and not _moves_on(config.train_data):
            epochs = UNTIL_STOPPED
        self.stream = StepStream(
            config.train_data,
            self.engine,
            micro_batches=config.accumulate_steps,
            epochs=epochs,
            share=Share(self.ranks.rank, self.ranks.world_size, config.parallel.parts_over(self.ranks.world_size)),
        )
        if self.reader_state is not None:
            self.stream.load_state_dict(self.reader_state)

    def advance(self, step: int, loss: Tensor, num_samples: int) -> None:
        """Note that a step has been made."""
        state = self.state
        state.step = step
        state.samples += num_samples
        state.loss_tensor = loss
        state.window_loss = loss.double() + state.window_loss  # stays on the loss's device: no wait for the step's end
        state.window_steps += 1

    def _evaluate_now(self) -> None:
        """Evaluate what the config asks for, if it asks, and tell the hooks."""
        state, metrics = self.state, {}
        if self._eval_data is None and self.config.evaluate is None:
            return
        begun = time.monotonic()
        if self._eval_data is not None:
            metrics.update(self.evaluate())
        if self.config.evaluate is not None:
            with self.whole_weights():
                metrics.update(self.config.evaluate(self))
        state.evaluation_s += time.monotonic() - begun
        state.last_eval_step = state.step
        state.metrics = metrics
        self._call_hooks("on_evaluate_end")

    def note_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Remember rows that a reading left out."""
        self._bad_rows.update(dict.fromkeys(rows))

    def autocast(self, device: str) -> torch.autocast:
        """Return the context in which the model runs."""
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.bf16_autocast)

    def _require_finite(self, loss: Tensor, batch: Batch, step: int) -> None:
        if bool(torch.isfinite(loss)):
            return
        self.stop_nonfinite(float(loss.detach()), nonfinite_features(self.collections, batch), step)

    def stop_nonfinite(self, loss: float, found: Sequence[str], step: int) -> NoReturn:
        """Raise NonFiniteLossError, naming what of the input is not finite."""
        self._note_checkpoint(wait=True)
        where = f"not finite: {', '.join(found)}" if found else "rows, dense features and labels are finite"
        kept = self.state.checkpoint
        raise NonFiniteLossError(
            f"step {step}: the loss is {loss}; {where}; nothing was updated. "
            f"Last good checkpoint: {kept if kept is not None else 'none'}; lower the learning rate or set clip_grad_norm"
        )

    # ---- the run folder

    def _call_hooks(self, event: str) -> None:
        """Tell the hooks; where weights are dealt, those of the config that say `reads_weights` find them whole."""
        together = event != "on_checkpoint"  # a rank hears of that when its own writer is done
        reads = any(hasattr(hook, event) and getattr(hook, "reads_weights", False) for hook in self.config.hooks)
        with self.whole_weights() if together and reads else nullcontext():
            call_hooks(self._hooks, event, self.state)

    def _make_hooks(self, quiet: bool) -> list[Any]:
        config = self.config
        hooks: list[Any] = []
        if config.monitor is not None:
            hooks.append(EarlyStop(config.monitor))
        hooks.append(
            Logger(self._log, every_steps=config.log_every_steps, metrics=self.metrics, together=self.parallel)
        )
        if not quiet:
            note = deterministic_note() if config.deterministic and self.tables else None
            hooks.append(Progress(every_steps=config.log_every_steps, note=note))
        hooks += [hook for hook in config.hooks if self.ranks.rank == 0 or not getattr(hook, "rank_0_only", False)]
        if self._saver is not None:
            hooks.append(Checkpoint(every_steps=config.save_every_steps, save=self._save))
        return hooks

    def _save(self) -> None:
        assert self._saver is not None
        self._note_checkpoint(wait=True)
        self._log.sync()
        protect = () if self.state.best_step is None else (self.state.best_step,)
        base = persist.base_of_next(self.state.checkpoint, self.state.step, self.config.delta_saves)
        self._note(self._saver.save(persist.boundary(self), protect=protect, base=base))

    def _note_checkpoint(self, *, wait: bool) -> None:
        """Tell the hooks when a checkpoint has become whole."""
        if self._saver is not None:
            self._note(self._saver.wait() if wait else self._saver.poll())

    def _note(self, whole: Path | None) -> None:
        if whole is not None:
            self.state.checkpoint = whole
            self._call_hooks("on_checkpoint")

    def _resume(self, run: Path) -> None:
        newest = self.ranks.on_rank_0(lambda: latest(run), "which checkpoint is the newest whole one")
        if newest is not None:
            self.reader_state = persist.restore(self, newest)
            self._finish_rotation()
        self._log.cut_back(self.state.step, self.state.last_eval_step)

    def _finish_rotation(self) -> None:
        """Delete what the killed process had no time to, but never the checkpoint that this one goes on from."""
        state = self.state
        if self._saver is not None and self.ranks.rank == 0:
            self._saver.rotate([step for step in (state.step, state.best_step) if step is not None])


def _moves_on(data: Any) -> bool:
    """Whether data is read in windows or as it arrives: going over it again would never reach what comes next."""
    return isinstance(data, DataConfig) and (data.window is not None or data.follow is not None)
