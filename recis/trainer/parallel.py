"""One run over several ranks: what a step, an evaluation and a checkpoint do together that one process does alone.

    total weight (all ranks) -> per micro-batch: forward, backward -> losses, dense gradients (all ranks) -> clip -> updates

Each micro-batch belongs to a part of the step (see recis.io.feed.Split). Its random numbers come from (seed, step, part,
micro-batch) and not from a generator that runs on, and every sum over parts is added in ascending part: a run does not
depend on how many ranks the parts are dealt to.

While a micro-batch computes, the ids of the one behind it travel to their owners (`parallel.overlap`): their numbers beside
its forward, they themselves beside its backward. Their rows are read when its turn comes, after the update before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recis.distributed.batches import part_bounds, samples_of
from recis.distributed.dense import OrderedGradients, share_buffers, share_parameters, wrap_in_ddp
from recis.distributed.ranks import Ranks
from recis.distributed.tables import check_places, share_tables
from recis.distributed.travelling import Travelling
from recis.io.batch import Batch, RawBatch
from recis.optim import clip_grad_norm
from recis.trainer.build import nonfinite_features
from recis.trainer.config import TrainConfig
from recis.trainer.data import FromStart
from recis.trainer.metric_set import MetricSet
from recis.trainer.randomness import seed_everything
from recis.trainer.scoring import as_float, forward, scores_of
from recis_kernels.philox import hash64_of

if TYPE_CHECKING:
    from recis.distributed.dense_shards import DenseShards
    from recis.trainer.trainer import StepOutput, Trainer


def deal_dense(model: nn.Module, config: TrainConfig, ranks: Ranks) -> "DenseShards | None":
    """Deal a model's dense part to the ranks, if the config asks for it and there is one that trains.

    Raises:
        ConfigError: the run is to be deterministic; a model that cannot be dealt.
    """
    asked = config.parallel.deals_dense(ranks.world_size, deterministic=config.deterministic)
    if not asked or not any(value.requires_grad for value in model.parameters()):
        return None
    from recis.distributed.dense_shards import DenseShards  # its imports take a second: only where they are needed

    return DenseShards(model, ranks, unit_parameters=config.parallel.unit_parameters)


class ParallelRun:
    """The collective side of a Trainer.

    Args:
        trainer: its model is built and untrained; the tables become shared here.
        ranks: the job.
        parts: of each step, a multiple of the ranks.

    Attributes:
        reads_ahead: whether the micro-batches of the next step are wanted beside those of each step.
        following: those of the step behind the one under way; None: there is none, or it is not known.
    """

    def __init__(self, trainer: "Trainer", ranks: Ranks, parts: int) -> None:
        self._trainer, self.ranks, self.parts = trainer, ranks, parts
        self._own_parts = range(ranks.rank, parts, ranks.world_size)
        config = trainer.config
        places = config.parallel.places
        check_places(trainer.table_sets, places)
        for table_set in trainer.table_sets:
            share_tables(table_set, ranks, rows_dtype=getattr(torch, config.parallel.rows_dtype), places=places)
        if trainer.shards is None:
            share_parameters(trainer.model, ranks)
        trainable = any(value.requires_grad for value in trainer.model.parameters())
        self._ddp: Any = None
        if trainer.shards is None and not config.deterministic and ranks.world_size > 1 and trainable:
            self._ddp = wrap_in_ddp(trainer.forward, ranks)
        self._gradients: OrderedGradients | DenseShards = trainer.shards or OrderedGradients(
            list(trainer.dense_parameters.values()), ranks
        )
        self.reads_ahead = config.parallel.overlap and ranks.world_size > 1
        self.following: Sequence[Batch] | None = None
        self._asks_ahead: list[Any] = []
        ranks.link_delay_s = config.parallel.link_delay_ms / 1e3
        self._timed_until = config.parallel.timeline_steps
        ranks.timeline.is_on = self._timed_until > 0

    # ---- a step

    def train_step(self, micro_batches: Sequence[Batch]) -> "StepOutput":
        """Make one update over the micro-batches of all ranks, which have equally many."""
        from recis.trainer.trainer import StepOutput

        trainer, ranks = self._trainer, self.ranks
        config, step = trainer.config, trainer.state.step + 1
        ranks.step = step
        trainer.model.train()
        totals = self._ask_totals(micro_batches)  # they travel while the first micro-batch runs forward
        total_weight, num_samples = torch.ones(()), 0
        trainer.dense_optimizer.zero_grad()
        losses, outputs = [], []
        span = ranks.timeline.span
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            self._ask_ahead(micro_batches[number + 1] if not is_last else (self.following or [None])[0])
            seed_everything(self._seed(step, number))
            with span("forward", step=step):
                output = self._forward(batch, is_last=is_last)
                if not number:
                    total_weight, num_samples = _totals(totals.wait())
                loss = trainer.loss(output, batch) / total_weight
            losses.append(loss.detach().double().cpu())
            self._send_ahead(batch)
            with span("backward", step=step):
                self._backward(loss, is_last=is_last)
            outputs.append(output)
            trainer.metrics.update(config.score(output), batch)
        mean_loss = self._finish_backward(torch.stack(losses), micro_batches, step)
        with span("update", step=step):
            if config.clip_grad_norm is not None:
                dense = trainer.dense_parameters.values()
                squares = None if trainer.shards is None else trainer.shards.square_sum()
                clip_grad_norm(dense, trainer.collections, config.clip_grad_norm, dense_squares=squares)
            trainer.dense_optimizer.step()
            if trainer.shards is not None:
                trainer.shards.check_optimizer(trainer.dense_optimizer)
            trainer.sparse_optimizer.step()
            trainer.schedule.step()
            for collection in trainer.collections:  # counters, then eviction
                collection.end_step(step)
        trainer.advance(step, mean_loss, num_samples)
        self._note_timeline()
        return StepOutput(mean_loss, outputs)

    def _ask_ahead(self, following: Batch | None) -> None:
        """Ask for the ids of the micro-batch behind the next forward, of collections that look up batches as they come."""
        if following is not None:
            for collection in self._asks_ahead:
                collection.ask_ahead(following.sparse)

    def _send_ahead(self, batch: Batch) -> None:
        """Let the ids asked for travel; a collection that did not look its batch up is not asked again."""
        if not self.reads_ahead:
            return
        for collection in self._asks_ahead:
            collection.forget_ahead(batch.sparse)
            collection.send_ahead()
        self._asks_ahead = [one for one in self._trainer.collections if one.looked_up(batch.sparse)]

    def end_steps(self) -> None:
        """Take back what was asked for a step that will not come, and write the times of a run of few steps."""
        self.following = None
        for collection in self._trainer.collections:
            collection.forget_ahead()
        for table_set in self._trainer.table_sets:
            for store in table_set.stores:
                if store.exchange is not None:
                    store.exchange.finish()
        self._write_timeline()

    def _note_timeline(self) -> None:
        self._timed_until -= 1
        if self._timed_until == 0:
            self._write_timeline()

    def _write_timeline(self) -> None:
        timeline, out = self.ranks.timeline, self._trainer.state.run
        if timeline.is_on and out is not None:
            timeline.write(out / f"timeline-{self.ranks.rank}.json")
        timeline.is_on = False

    def _ask_totals(self, micro_batches: Sequence[Batch]) -> Travelling:
        """Send the weight and the samples of each micro-batch to all ranks, float64 [k, 2]."""
        own = [[float(batch.weights.double().sum()), float(batch.num_samples)] for batch in micro_batches]
        return self.ranks.start_all_gather(torch.tensor(own, dtype=torch.float64), "weight of the batch")

    def _seed(self, step: int, number: int) -> int:
        own = len(self._own_parts)
        part, micro_batch = self._own_parts[number % own], number // own
        mixed = 0
        for value in (self._trainer.config.seed, step, part, micro_batch):
            mixed = hash64_of(mixed ^ value)
        return mixed & (2**63 - 1)

    def _forward(self, batch: Batch, *, is_last: bool) -> Any:
        trainer = self._trainer
        run = trainer.forward
        if self._ddp is not None:
            run = self._ddp
            self._ddp.require_backward_grad_sync = is_last
        explained = nullcontext() if trainer.shards is None else trainer.shards.explained()
        with explained, trainer.autocast(batch.weights.device.type):
            return as_float(run(batch))

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        if self._trainer.shards is not None:
            self._trainer.shards.before_backward(is_last=is_last)
        loss.backward()  # row gradients collect per table
        if self._ddp is None:
            self._gradients.take()

    def _finish_backward(self, losses: Tensor, micro_batches: Sequence[Batch], step: int) -> Tensor:
        """Sum losses and dense gradients over all ranks; nothing was updated yet if a loss is not finite."""
        count, shards = losses.numel(), self._trainer.shards
        own = [losses, self._gradients.reached.double()]
        every = self.ranks.all_gather(torch.cat(own if shards is None else [*own, shards.order]), "losses")
        if shards is not None:
            shards.check_order(every[:, -1])
            every = every[:, :-1]
        mean_loss = _fold(_in_order(every[:, :count])).float()
        if not bool(torch.isfinite(mean_loss)):
            self._stop_nonfinite(mean_loss, micro_batches, step)
        if self._ddp is None:
            self._gradients.sum_up(every[:, count:].amax(0) > 0)
        return mean_loss

    def _stop_nonfinite(self, loss: Tensor, micro_batches: Sequence[Batch], step: int) -> None:
        found = [nonfinite_features(self._trainer.collections, batch) for batch in micro_batches]
        own = [f"{name} (rank {self.ranks.rank})" for names in found for name in names]
        every = [name for names in self.ranks.gather_objects(own, "what is not finite") for name in names]
        self._trainer.stop_nonfinite(float(loss), list(dict.fromkeys(every)), step)

    # ---- values of all ranks

    def metric_values(self, metrics: MetricSet) -> dict[str, float]:
        """Return the training metrics over the samples of all ranks."""
        return metrics.merged(self.ranks.gather_objects(metrics.state_dict(), "training metrics")).compute()

    def table_counters(self, tables: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """Return the counters of each table over all owners; capacities add up too."""
        own = {name: table.counters().to_dict() for name, table in tables.items()}
        every = self.ranks.gather_objects(own, "counters of the tables")
        return {
            name: {key: sum(counters[name][key] for counters in every) for key in counted}
            for name, counted in own.items()
        }

    def agree_to_stop(self) -> None:
        """Let a hook that stops one rank stop all of them, at the same step."""
        state = self._trainer.state
        stops = torch.tensor([float(state.stop_reason is not None)])
        if not bool(self.ranks.all_gather(stops, "whether to stop").any()):
            return
        reasons = self.ranks.gather_objects(state.stop_reason, "why to stop")
        state.stop_reason = next((reason for reason in reasons if reason is not None), None)

    # ---- evaluation

    def outputs(
        self, source: FromStart, *, with_loss: bool
    ) -> Iterator[tuple[RawBatch | Batch, Batch, Tensor, Tensor]]:
        """Yield each batch of data, read by all ranks, with the scores [B, T] and the summed loss of all its parts."""
        trainer = self._trainer
        share_buffers(trainer.model, self.ranks)
        trainer.model.eval()
        with torch.no_grad():
            try:
                for raw, batch in source.batches():
                    yield raw, batch, *self._scored(batch, with_loss=with_loss)
            finally:
                trainer.note_bad_rows(source.bad_rows)

    def _scored(self, batch: Batch, *, with_loss: bool) -> tuple[Tensor, Tensor]:
        trainer = self._trainer
        bounds = part_bounds(batch.num_samples, self.parts)
        losses, scores = [], []
        for part in self._own_parts:
            samples = samples_of(batch, bounds[part], bounds[part + 1])
            output = forward(trainer, samples)
            scores.append(scores_of(trainer, output))
            loss = trainer.loss(output, samples).double().cpu() if with_loss else torch.zeros(()).double()
            losses.append(loss)
        most = max(stop - start for start, stop in pairwise(bounds))
        padded = scores[0].new_zeros((len(scores), most, scores[0].shape[1]))
        for number, values in enumerate(scores):
            padded[number, : values.shape[0]] = values
        every = _in_order(self.ranks.all_gather(padded, "scores"))
        whole = [every[part, : bounds[part + 1] - bounds[part]] for part in range(self.parts)]
        loss = _fold(_in_order(self.ranks.all_gather(torch.stack(losses), "losses of the evaluation")))
        return torch.cat(whole), loss

    def share_buffers(self) -> None:
        """Give all ranks rank 0's buffers."""
        share_buffers(self._trainer.model, self.ranks)

    def close(self) -> None:
        """Let go of what holds on to the process group."""
        self._ddp = None


def _totals(gathered: Tensor) -> tuple[Tensor, int]:
    """Return the weight of the global batch, float32, and its samples, from [W, k, 2] of all ranks."""
    weight, samples = _fold(_in_order(gathered)).tolist()
    return torch.tensor(weight if weight > 0 else 1.0, dtype=torch.float32), int(samples)


def _in_order(gathered: Tensor) -> Tensor:
    """Return [W, k, ...] as [k W, ...]: micro-batch after micro-batch, in each one ascending rank, that is part."""
    return gathered.transpose(0, 1).flatten(0, 1)


def _fold(values: Tensor) -> Tensor:
    """Return the sum over the first dimension, added from first to last."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total
