"""Label probabilities of many prompts from one forward pass each, the start that items of a query share read once.

    probs = score_prompts(lm, prompts, groups)        [N, 4], label 1 first

    prefix  the tokens that the prompts of a group have in common, run once; its keys and values are repeated per item
    suffix  the rest, run behind them, right-padded; only the last hidden state of each row meets four rows of the head

The result does not depend on how prompts are batched, up to rounding (1e-5 in fp32). Source: label probabilities from the
first position, TaoSR1 arXiv:2508.12365 as told by others; sharing the prefix is ours.
"""

from collections.abc import Hashable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from relevance.language_model import LanguageModel
from relevance.padding import padded
from relevance.scoring import NUM_LABELS, label_logits, label_probs


@torch.no_grad()
def score_prompts(
    lm: LanguageModel, prompts: Sequence[str], groups: Sequence[Hashable] | None = None, *, batch_tokens: int = 16384
) -> Tensor:
    """Return P of the labels [N, 4], float32 on the CPU, label 1 first.

    Args:
        lm: in eval mode.
        prompts: rendered prompts.
        groups: which prompts share their start (their query ids); None shares nothing.
        batch_tokens: padded suffix tokens of a forward pass; one group may exceed it.
    """
    ids = [lm.encode(prompt) for prompt in prompts]
    members: dict[Hashable, list[int]] = {}
    for row in range(len(ids)):
        members.setdefault(row if groups is None else groups[row], []).append(row)
    out = torch.zeros(len(ids), NUM_LABELS)
    for batch in _batches(list(members.values()), ids, batch_tokens):
        rows = [row for group in batch for row in group]
        out[rows] = _score_groups(lm, [[ids[row] for row in group] for group in batch]).cpu()
    return out


def _batches(groups: list[list[int]], ids: Sequence[list[int]], batch_tokens: int) -> list[list[list[int]]]:
    """Return groups packed by length so that a batch has about batch_tokens suffix tokens."""
    shared = {id(group): _shared_length([ids[row] for row in group]) for group in groups}
    longest = {id(group): max(len(ids[row]) for row in group) - shared[id(group)] for group in groups}
    batches: list[list[list[int]]] = []
    num_rows = width = 0
    is_sharing = None  # a row without a prefix beside one with it would have a cache of padding only
    for group in sorted(groups, key=lambda group: (shared[id(group)] > 0, longest[id(group)])):
        width = max(width, longest[id(group)])
        if is_sharing != (shared[id(group)] > 0) or (num_rows + len(group)) * width > batch_tokens:
            batches.append([])
            num_rows, width, is_sharing = 0, longest[id(group)], shared[id(group)] > 0
        batches[-1].append(group)
        num_rows += len(group)
    return batches


def _shared_length(rows: Sequence[list[int]]) -> int:
    """Return how many first tokens all rows have in common; at least one token of each row is left."""
    if len(rows) == 1:
        return 0
    first, *others = rows
    common = takewhile(lambda at: all(row[at : at + 1] == first[at : at + 1] for row in others), range(len(first)))
    return min(sum(1 for _ in common), min(map(len, rows)) - 1)


def _score_groups(lm: LanguageModel, groups: Sequence[Sequence[list[int]]]) -> Tensor:
    """Return P [rows, 4] of groups of token rows."""
    shared = [_shared_length(group) for group in groups]
    prefixes = [group[0][:length] for group, length in zip(groups, shared, strict=True)]
    suffixes = [row[length:] for group, length in zip(groups, shared, strict=True) for row in group]
    owner = torch.tensor([number for number, group in enumerate(groups) for _ in group], device=lm.model.device)
    pad = lm.tokenizer.pad_token_id
    ids, mask = padded(suffixes, pad, on_left=False, device=lm.model.device)
    cache: Any = None
    if any(shared):
        prefix_ids, prefix_mask = padded(prefixes, pad, on_left=True, device=lm.model.device)
        cache = _backbone(lm)(
            input_ids=prefix_ids,
            attention_mask=prefix_mask,
            position_ids=_positions(prefix_mask),
            use_cache=True,
        ).past_key_values
        cache.reorder_cache(owner)  # one copy of its query's keys and values per item
        mask = torch.cat([prefix_mask[owner], mask], dim=1)
    positions = _positions(mask)[:, -ids.shape[1] :]
    hidden = _backbone(lm)(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    last = torch.tensor([len(row) - 1 for row in suffixes], device=hidden.device)
    return label_probs(head_logits(lm, hidden[torch.arange(len(last), device=hidden.device), last]))


def head_logits(lm: LanguageModel, hidden: Tensor) -> Tensor:
    """Return the label logits [B, 4] of final hidden states [B, H], with the base model's own soft cap and scale."""
    softcap, scale = head_options(lm.model.config)
    return label_logits(hidden, lm.model.get_output_embeddings().weight, lm.label_ids, softcap=softcap, scale=scale)


def head_options(config: Any) -> tuple[float | None, float]:
    """Return soft cap and factor of a model's logits, as its config names them."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    scale = getattr(text, "output_multiplier", None) if scale is None else scale
    scale = getattr(text, "lm_head_multiplier", None) if scale is None else scale
    if scale is None and getattr(text, "logits_scaling", None) is not None:
        scale = text.logits_scaling if text.model_type == "hyperclovax" else 1 / text.logits_scaling
    return getattr(text, "final_logit_softcapping", None), 1.0 if scale is None else float(scale)


def _backbone(lm: LanguageModel) -> Any:
    return lm.model.base_model


def _positions(mask: Tensor) -> Tensor:
    """Return positions that count the real tokens only; 0 on padding at the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)
