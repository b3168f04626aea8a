"""Guided replay inside a trainer: sample failing groups' worst rollouts again under guidance, keep what sampled them.

    batch, graded = replay_failing(trainer, batch, graded, numbers)

Behaviour log-probs of a guided row are those under its guided prompt; the policy is trained under the plain one. Those of plain
rows stay NaN, and the loss fills them with the policy's own, so their ratio is exactly 1. Which groups fire is decided over the
groups of all ranks; all ranks sample the same number of rows, or none. Source: after TaoSR-AGRL arXiv:2510.08048; trigger, rows
and levels: `replay`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from relevance.methods import Graded
from relevance.padding import padded
from relevance.replay import overwrite_rows, plan, tau_at
from relevance.tally import Count, Highest, Number, mean_of

if TYPE_CHECKING:
    from relevance.trainer import RelevanceGRPOTrainer


def replay_failing(
    trainer: "RelevanceGRPOTrainer", batch: dict[str, Any], graded: Graded, numbers: dict[str, Number]
) -> tuple[dict[str, Any], Graded]:
    """Sample the worst rollouts of failing groups again under guidance, and keep what sampled them."""
    config = trainer.job.method.replay
    assert config is not None
    tau = tau_at(trainer.state.global_step, trainer.state.max_steps, config)
    correct = graded.grouped(graded.rewards.correct)
    accuracies = trainer.gather(correct.double().mean(1).to(trainer.accelerator.device)).to(correct.device)
    first = trainer.accelerator.process_index * len(correct)
    rewards = graded.grouped(graded.rewards.total)
    chosen = plan(rewards, correct, tau=tau, config=config, accuracies=accuracies, first=first)
    numbers |= {"replay/tau": Highest(tau), "replay/groups": Count(float(len(chosen.groups)))}
    open_groups = torch.arange(len(chosen.groups))
    for level in range(config.start_level, config.start_level + config.max_levels):
        per_group = chosen.rollouts.shape[1]
        num_rows = trainer.most_of_ranks(len(open_groups) * per_group)
        if not num_rows:
            break
        rows = (chosen.groups[open_groups, None] * graded.group_size + chosen.rollouts[open_groups]).flatten()
        batch, graded = _replay_rows(trainer, batch, graded, rows, num_rows, level)
        failed = ~graded.rewards.correct[rows].view(-1, per_group).any(1)
        open_groups = open_groups[failed]
    guided = graded.is_guided
    numbers["replay/share"] = mean_of(guided)
    if bool(guided.any()):
        numbers["replay/accuracy"] = mean_of(graded.rewards.correct[guided])
    return batch, graded


def _replay_rows(
    trainer: "RelevanceGRPOTrainer", batch: dict[str, Any], graded: Graded, rows: Tensor, num_rows: int, level: int
) -> tuple[dict[str, Any], Graded]:
    names = [graded.pairs[row].id for row in rows.tolist()]
    # ranks with fewer rows fill up with copies: what gathers inside TRL needs equal numbers everywhere
    filled = names + [graded.pairs[0].id] * (num_rows - len(names))
    prompts = [trainer.job.task.guided(trainer.job.task.by_id[name], level) for name in filled]
    trainer.rollouts_per_prompt = 1
    try:
        prompt_ids, completion_ids, _, texts, _, _, _, _ = trainer._generate(prompts)
    finally:
        trainer.rollouts_per_prompt = None
    trainer.generated_tokens += sum(map(len, completion_ids))
    pad, device = trainer.job.lm.tokenizer.pad_token_id, trainer.accelerator.device
    ids, mask = padded(completion_ids, pad, on_left=False, device=device)
    guided = _log_probs_under(trainer, prompt_ids, ids, mask)
    kept = len(names)
    width_before = batch["completion_ids"].shape[1]
    batch = dict(batch)
    device_rows = rows.to(ids.device)
    batch["completion_ids"] = overwrite_rows(batch["completion_ids"], ids[:kept], device_rows, pad=pad)
    batch["completion_mask"] = overwrite_rows(batch["completion_mask"], mask[:kept], device_rows, pad=0)
    # NaN = the policy's own log-probs, filled in by the loss: the ratio of a plain row is exactly 1
    old = batch.get("old_per_token_logps")
    if old is None:
        old = torch.full((len(graded.pairs), width_before), torch.nan, device=ids.device)
    batch["old_per_token_logps"] = _nan_padded(old, guided[:kept], device_rows, batch["completion_mask"])
    if "importance_sampling_ratio" in batch:
        ones = torch.ones_like(batch["importance_sampling_ratio"][: len(rows)])
        batch["importance_sampling_ratio"] = overwrite_rows(
            batch["importance_sampling_ratio"], ones, device_rows, pad=1.0
        )
    if trainer.beta != 0.0:
        batch["ref_per_token_logps"] = _reference_log_probs(trainer, batch)
    batch["num_items_in_batch"] = trainer.gather(batch["completion_mask"].sum()).sum()
    if not kept:  # this rank only kept the others company
        return batch, graded
    fresh = trainer.grader.grade([str(text) for text in texts[:kept]], completion_ids[:kept], names, is_guided=True)
    return batch, graded.with_rows(rows.tolist(), fresh)


@torch.no_grad()
def _log_probs_under(
    trainer: "RelevanceGRPOTrainer", prompt_ids: Sequence[Sequence[int]], ids: Tensor, mask: Tensor
) -> Tensor:
    """Return the policy's log-probs [N, C] of completions behind other prompts."""
    pad, device = trainer.job.lm.tokenizer.pad_token_id, trainer.accelerator.device
    prompts, prompt_mask = padded(prompt_ids, pad, on_left=True, device=device)
    whole, whole_mask = torch.cat([prompts, ids], dim=1), torch.cat([prompt_mask, mask], dim=1)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, whole, whole_mask, ids.shape[1], batch_size=trainer.args.per_device_train_batch_size
    )
    return logps


@torch.no_grad()
def _reference_log_probs(trainer: "RelevanceGRPOTrainer", batch: Mapping[str, Tensor]) -> Tensor:
    """Return the reference model's log-probs [B, C] of a batch under its plain prompts."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width, rows = batch["completion_ids"].shape[1], trainer.args.per_device_train_batch_size
    if trainer.ref_model is not None:
        return trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, mask, width, batch_size=rows)[0]
    from trl.trainer.utils import use_adapter

    policy = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, batch_size=rows)[0]


def _nan_padded(old: Tensor, guided: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """Return behaviour log-probs [B, C] with guided rows in; new columns of plain rows stay to be filled."""
    out = torch.full(mask.shape, torch.nan, device=old.device)
    out[:, : old.shape[1]] = old
    out[rows] = 0.0
    out[rows, : guided.shape[1]] = guided.float()
    return out
