"""`trl.GRPOTrainer` with our rewards, advantages per token, refill of dead groups, guided replay and two prompts per query.

    inputs --variants--> TRL generates and scores --> replay --> signal --> refill --> advantages, masks --> TRL's loss

TRL 1.16.0 calls the underscore methods that are overridden here; another version is refused on import, and
tests/relevance/test_trl_contract.py holds what they rely on. Each group lies whole on one rank (rows per rank are a multiple
of G), so all group maths is local; whatever gathers is called by all ranks alike, and what is logged is that of all ranks.
Source: hooks, TRL 1.16.0; maths, `methods`.
"""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer

from recis.errors import ConfigError, RecisError
from relevance.checkpoints import mark_complete
from relevance.grader import Grader, RolloutJob, batch_numbers
from relevance.guided_rollouts import replay_failing
from relevance.methods import Graded, Progress, Signal
from relevance.padding import padded
from relevance.ranks import wait_for_all
from relevance.refill import PromptReserve, replace_groups
from relevance.rewards import Rewards
from relevance.steps import step_ids
from relevance.tally import Count, Highest, Number, mean_of, merged
from relevance.token_head import use_token_head
from relevance.two_groups import transfer_term

TRL_VERSION = "1.16.0"
if trl.__version__ != TRL_VERSION:
    raise ImportError(
        f"relevance.trainer overrides private methods of trl {TRL_VERSION}; installed is {trl.__version__}: "
        f"pip install trl=={TRL_VERSION}"
    )
BAD_STEP_WINDOW = 100


class NonFiniteLoss(RecisError, RuntimeError):
    """Two losses or rewards that are not finite within BAD_STEP_WINDOW steps."""


class RelevanceGRPOTrainer(GRPOTrainer):
    """GRPO with a `Method`; dataset rows have `prompt`, `pair_id` and, for two prompts, `prompt_ctx`."""

    def __init__(self, job: RolloutJob, *, args: GRPOConfig, train_dataset: Any, **options: Any) -> None:
        rows = args.per_device_train_batch_size * int(args.steps_per_generation or args.gradient_accumulation_steps)
        group_size = int(args.num_generations or 0)
        if group_size < 2 or rows % group_size:
            raise ConfigError(
                f"a rank generates {rows} rows (per_device_rows x accumulation), which must be a multiple of "
                f"num_generations, at least 2; got {group_size}: each group has to lie whole on one rank"
            )
        if job.method.has_two_prompts and group_size % 2:
            raise ConfigError(f"two prompts per query need an even num_generations; got {group_size}")
        self.job = job
        self.grader = Grader(job, group_size)
        super().__init__(
            model=job.lm.model,
            reward_funcs=self.grader,  # type: ignore[arg-type]
            args=args,
            train_dataset=train_dataset,
            processing_class=job.lm.tokenizer,
            **options,
        )
        if job.has_own_head:
            for model in (self.model, self.ref_model):
                if model is not None:
                    use_token_head(_base_of(model), temperature=self.temperature)
        ranks = self.accelerator.num_processes
        if job.method.refill_rounds and len(job.reserve) < ranks:
            raise ConfigError(
                f"{len(job.reserve)} prompts to refill dead groups from leave none for some of {ranks} ranks: give more "
                "prompts, or set rl.refill_rounds=0"
            )
        self.reserve = PromptReserve(
            num_prompts=len(job.reserve),
            seed=args.seed,
            rank=self.accelerator.process_index,
            num_ranks=ranks,
        )
        self.last_graded: Graded | None = None
        self.last_signal: Signal | None = None
        self.rollouts_per_prompt: int | None = None
        self._fill_old: dict[str, Tensor] | None = None
        self._bad_steps: list[int] = []
        self.generated_tokens = 0
        self._seconds: dict[str, float] = {}

    @property
    def is_training(self) -> bool:
        """Whether the policy is in train mode: evaluation is TRL's own."""
        return bool(self.model is not None and self.model.training)

    # ---- generation

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        # a vLLM server keeps one of every num_generations prompts; rows of ours may differ within a group
        count = self.rollouts_per_prompt or num_generations
        start = time.perf_counter()
        out = super()._generate_single_turn(prompt_ids, images, multimodal_fields, count, has_tool_images)
        self._add_seconds("generate", time.perf_counter() - start)
        return out

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.is_training:
            return super()._generate_and_score_completions(inputs)
        method, size = self.job.method, self.grader.group_size
        numbers: dict[str, Number] = {}
        self.generated_tokens = 0
        batch, graded = self._rollout(inputs)
        if method.replay is not None:
            batch, graded = replay_failing(self, batch, graded, numbers)
        batch, graded, signal, dead = self._refill(batch, graded, numbers)
        batch["advantages"] = _as_wide(signal.advantages, batch["completion_ids"]).to(self.accelerator.device)
        if signal.transfer is not None:
            weight = signal.transfer.clone()
            if dead is not None:
                weight = weight.masked_fill(dead.repeat_interleave(size), 0.0)
            batch.update(self._transfer_inputs(graded, weight))
        if dead is not None:
            self._mask_dead(batch, dead)
        self.last_graded, self.last_signal = graded, signal
        self._log_batch(graded, signal, batch, numbers)
        return batch

    def _rollout(self, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], Graded]:
        """Generate and grade one rollout per input row."""
        rows = inputs
        if self.job.method.has_two_prompts:
            size = self.grader.group_size
            rows = [
                {**row, "prompt": row["prompt_ctx"]} if place % size >= size // 2 else row
                for place, row in enumerate(inputs)
            ]
            self.rollouts_per_prompt = size // 2
        try:
            batch = super()._generate_and_score_completions(rows)
        finally:
            self.rollouts_per_prompt = None
        assert self.grader.last is not None
        self.generated_tokens += sum(map(len, self.grader.last.ids))
        return batch, self.grader.last

    def _row_of(self, pair_id: str) -> dict[str, Any]:
        pair, task = self.job.task.by_id[pair_id], self.job.task
        if not self.job.method.has_two_prompts:
            return {"prompt": task.prompt(pair), "pair_id": pair_id}
        plain, shown = task.prompt(pair, with_chunk=False), task.prompt(pair, with_chunk=True)
        return {"prompt": plain, "prompt_ctx": shown, "pair_id": pair_id}

    # ---- refill

    def _signal(self, graded: Graded) -> Signal:
        progress = Progress(
            step=self.state.global_step, num_steps=self.state.max_steps, mean_over_ranks=self._mean_over_ranks
        )
        return self.job.method.signal(graded, self._step_ids(graded), progress)

    def _refill(
        self, batch: dict[str, Any], graded: Graded, numbers: dict[str, Number]
    ) -> tuple[dict[str, Any], Graded, Signal, Tensor | None]:
        """Replace dead groups by fresh prompts; returns which are still dead, None where the method keeps them."""
        method, size = self.job.method, self.grader.group_size
        signal = self._signal(graded)
        dead = self._dead(graded, signal)
        numbers["groups/dead"] = mean_of(dead)
        if not method.refill_rounds:
            return batch, graded, signal, None
        refilled = 0
        for _ in range(method.refill_rounds):
            places = dead.nonzero().flatten()
            count = self.most_of_ranks(len(places))
            if not count:
                break
            names = [self.job.reserve[place] for place in self.reserve.take(count)]
            inputs = [self._row_of(name) for name in names for _ in range(size)]
            fresh, fresh_graded = self._rollout(inputs)
            if "old_per_token_logps" in batch and "old_per_token_logps" not in fresh:
                fresh["old_per_token_logps"] = torch.full_like(fresh["completion_mask"], torch.nan, dtype=torch.float32)
            is_dead = self._dead(fresh_graded, self._signal(fresh_graded))
            alive = (~is_dead).nonzero().flatten()[: len(places)]
            target = places[: len(alive)]
            refilled += len(alive)
            batch, graded = self._put_groups(batch, graded, fresh, fresh_graded, alive, target)
            signal = self._signal(graded)
            dead = self._dead(graded, signal)
        numbers |= {
            "groups/refilled": Count(float(refilled)),
            "groups/dropped": Count(float(dead.sum())),
        }
        return batch, graded, signal, dead

    def _put_groups(
        self,
        batch: dict[str, Any],
        graded: Graded,
        fresh: dict[str, Any],
        fresh_graded: Graded,
        alive: Tensor,
        target: Tensor,
    ) -> tuple[dict[str, Any], Graded]:
        size, device = self.grader.group_size, self.accelerator.device
        rows = (alive[:, None] * size + torch.arange(size)).flatten()
        place = (target[:, None] * size + torch.arange(size)).flatten()
        taken = {
            name: value[rows.to(device)] if isinstance(value, Tensor) and value.ndim else value
            for name, value in fresh.items()
        }
        pad = self.job.lm.tokenizer.pad_token_id
        batch = replace_groups(batch, taken, target.to(device), group_size=size, pad_id=pad)
        batch["num_items_in_batch"] = self.gather(batch["completion_mask"].sum()).sum()
        kept = rows.tolist()
        part = Rewards(
            total=fresh_graded.rewards.total[rows],
            parts={name: value[rows] for name, value in fresh_graded.rewards.parts.items()},
            correct=fresh_graded.rewards.correct[rows],
        )
        chosen = Graded(
            pairs=tuple(fresh_graded.pairs[row] for row in kept),
            texts=tuple(fresh_graded.texts[row] for row in kept),
            ids=tuple(fresh_graded.ids[row] for row in kept),
            parsed=tuple(fresh_graded.parsed[row] for row in kept),
            rewards=part,
            group_size=size,
            is_guided=fresh_graded.is_guided[rows],
        )
        return batch, graded.with_rows(place.tolist(), chosen)

    def _dead(self, graded: Graded, signal: Signal) -> Tensor:
        rule = self.job.method.is_dead
        return signal.is_silent(graded.group_size) if rule is None else rule(graded)

    def _mask_dead(self, batch: dict[str, Any], dead: Tensor) -> None:
        """Take dead groups out of the loss and of its denominators, leaving attention as it is."""
        alive = (~dead).repeat_interleave(self.grader.group_size).to(batch["completion_mask"].device)
        mask = batch["completion_mask"] * alive[:, None].to(batch["completion_mask"].dtype)
        counts = self.gather(torch.stack([mask.sum(), alive.sum(), torch.tensor(len(alive), device=alive.device)]))
        tokens, living, rows = counts.view(-1, 3).sum(0)
        if int(living) == int(rows):
            return
        batch["tool_mask"] = torch.ones_like(batch["completion_mask"]) * alive[:, None]
        batch["num_items_in_batch"] = tokens
        if not int(living):
            warnings.warn(f"step {self.state.global_step}: every group is dead; the step teaches nothing", stacklevel=2)
        elif self.loss_type in ("grpo", "dr_grpo"):  # they divide by rows, dead ones included
            batch["loss_scale"] = rows / living

    def most_of_ranks(self, count: int) -> int:
        """Return the largest count of all ranks; they all generate as many rows, or none does."""
        return int(self.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows of all ranks, one behind the other."""
        return cast(Tensor, self.accelerator.gather(values))

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        return self.gather(value.to(self.accelerator.device).view(1)).mean().to(value)

    # ---- loss

    def _transfer_inputs(self, graded: Graded, weight: Tensor) -> dict[str, Tensor]:
        """Return the prompts with the chunk of every row, and the weight of each row in the transfer term."""
        task, lm = self.job.task, self.job.lm
        prompts = [lm.encode(task.prompt(pair, with_chunk=True)) for pair in graded.pairs]
        ids, mask = padded(prompts, lm.tokenizer.pad_token_id, on_left=True, device=self.accelerator.device)
        return {"lx_weight": weight.to(ids.device), "lx_prompt_ids": ids, "lx_prompt_mask": mask}

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if self._fill_old is not None:  # plain rows of a replayed batch: their behaviour is the policy itself
            old = self._fill_old["old_per_token_logps"]
            self._fill_old["old_per_token_logps"] = torch.where(old.isnan(), found[0].detach(), old)
            self._fill_old = None
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        start = time.perf_counter()
        inputs = dict(inputs)
        self._fill_old = inputs if "old_per_token_logps" in inputs and self.is_training else None
        loss = super()._compute_loss(model, inputs)
        if "loss_scale" in inputs:
            loss = loss * inputs["loss_scale"]
        if "lx_weight" in inputs:
            loss = loss - self._transfer_loss(model, inputs)
        self._add_seconds("forward", time.perf_counter() - start)
        return self._checked(loss)

    def _transfer_loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return .5 * lx_coef * lx of a micro-batch, for accumulation; TRL's mean over 2n rows halves l0 and l1 likewise."""
        weight = inputs["lx_weight"]
        rows = weight.nonzero().flatten()
        if not len(rows):  # one row of weight 0, or collectives of sharded models would hang
            rows = torch.zeros(1, dtype=torch.int64, device=weight.device)
        completion, mask = inputs["completion_ids"][rows], inputs["completion_mask"][rows]
        ids = torch.cat([inputs["lx_prompt_ids"][rows], completion], dim=1)
        whole_mask = torch.cat([inputs["lx_prompt_mask"][rows], mask], dim=1)
        logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, whole_mask, completion.shape[1])
        lx = transfer_term(logps, mask, weight[rows]) / (len(weight) / 2)
        self._metrics["train"]["lx"].append(float(self._mean_over_ranks(lx.detach())))
        scale = float(inputs["loss_scale"]) if "loss_scale" in inputs else 1.0
        return 0.5 * self.job.method.lx_coef * lx * scale / self.current_gradient_accumulation_steps

    def _checked(self, loss: Tensor) -> Tensor:
        """Return the loss, or a zero for one that is not finite; the second within a window stops the run."""
        is_bad = self.gather((~loss.detach().isfinite()).view(1)).any()
        if not bool(is_bad):
            return loss
        step = self.state.global_step
        recent = [at for at in self._bad_steps if step - at <= BAD_STEP_WINDOW]
        self._bad_steps = [*recent, step]
        dump = Path(str(self.args.output_dir)) / f"non-finite-step-{step}.pt"
        graded = self.last_graded
        if self.accelerator.is_main_process and graded is not None:
            torch.save({"texts": graded.texts, "pairs": [p.id for p in graded.pairs], "loss": loss.detach()}, dump)
        if recent and recent[-1] != step:
            raise NonFiniteLoss(
                f"step {step}: the loss is not finite, as at step {recent[-1]}; texts in {dump}; go on from the last "
                f"checkpoint in {self.args.output_dir} with a lower learning rate or max_grad_norm"
            )
        warnings.warn(f"step {step}: the loss is not finite; micro-batch skipped, texts in {dump}", stacklevel=2)
        self._metrics["train"]["skipped"].append(1.0)
        return _zero_of(self.model)

    # ---- log and checkpoint

    def _step_ids(self, graded: Graded) -> Tensor:
        """Return the step of each token [B, C], padded to the longest completion of the batch; -1 on padding."""
        profile, lm = self.job.task.profile, self.job.lm
        rows = [
            step_ids(lm.token_bytes(ids), parsed, profile)
            for ids, parsed in zip(graded.ids, graded.parsed, strict=True)
        ]
        return pad_sequence(rows, batch_first=True, padding_value=-1)

    def _log_batch(
        self, graded: Graded, signal: Signal, batch: Mapping[str, Any], numbers: Mapping[str, Number]
    ) -> None:
        own = dict(numbers) | dict(signal.numbers) | batch_numbers(graded, signal.advantages)
        own["seconds/reward"] = Highest(self.grader.seconds)
        self.grader.seconds = 0.0
        own["tokens/generated"] = Count(float(self.generated_tokens))
        own["tokens/wasted"] = Count(float(self.generated_tokens - sum(map(len, graded.ids))))
        mask = batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]
        own["tokens/trained"] = Count(float(mask.sum()))
        for name, value in merged(gather_object([own])).items():
            self._metrics["train"][name].append(value)

    def _add_seconds(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add phase times; TRL adds and averages the rest."""
        for phase, seconds in self._seconds.items():
            logs[f"seconds/{phase}"] = seconds
        self._seconds.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        wait_for_all()  # each rank writes its own random state
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            state = {"reserve_taken": self.reserve.taken, "bad_steps": self._bad_steps, **(self.job.state or {})}
            mark_complete(folder, state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state that `_save_checkpoint` wrote."""
        self.reserve.taken = int(state["reserve_taken"])
        self._bad_steps = [int(step) for step in state["bad_steps"]]


def _as_wide(advantages: Tensor, completion_ids: Tensor) -> Tensor:
    """Return advantages [B] as they are, [B, C] with zeros up to the width of the padded completions."""
    if advantages.ndim == 1:
        return advantages
    return torch.nn.functional.pad(advantages, (0, completion_ids.shape[1] - advantages.shape[1]))


def _zero_of(model: Any) -> Tensor:
    """Return a 0 that gives every trained weight the gradient 0, which the reducers of DDP wait for.

    The graph of the bad loss is left alone: 0 times NaN is NaN. FSDP2 has gathered weights for that graph; they are let go, and
    each rank's own part stands for the weight.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    return torch.stack([part.nan_to_num().sum() * 0.0 for part in own]).sum()


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
