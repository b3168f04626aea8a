"""The loss of supervised fine-tuning: cross-entropy per completion token, with weights for the label and for the prompt.

    loss = sum over tokens w_t CE_t / number of completion tokens        w = 1; the label's token and the prompt have their own

With weights 1 and 0 it is the plain completion loss. A model from random weights needs both: one label token among twenty of
rationale, behind a prompt whose words it has never had to predict, leaves it at the most frequent label for thousands of rows.
Predicting the prompt teaches it to look from an item's words back to the query's: grading is made of that. Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

IGNORED = -100
PARTS = ("label", "rationale", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeights:
    """Weights of the tokens of a row; a rationale's token has 1."""

    label: float = 1.0
    prompt: float = 0.0
    is_label_last: bool = False
    """The label is the last token before the eos instead of the first of the completion."""


def label_places(labels: Tensor, *, is_label_last: bool = False) -> Tensor:
    """Return which tokens are labels, bool [B, L]: the first completion token of each row, or the last before the eos.

    Args:
        labels: [B, L] int64, IGNORED outside the completion, which ends in the eos.
        is_label_last: see `TokenWeights`.
    """
    is_completion = labels != IGNORED
    if not is_label_last:
        return is_completion & (is_completion.cumsum(1) == 1)
    return is_completion & (is_completion.flip(1).cumsum(1).flip(1) == 2)


class RelevanceSFTTrainer(SFTTrainer):
    """SFT through our head: weighted tokens only, and a loss without the metrics that need every logit."""

    def __init__(self, *args: Any, weights: TokenWeights | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weights = weights or TokenWeights()
        self._parts: list[Tensor] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted cross-entropy per completion token of the whole batch."""
        labels, own = inputs["labels"], self.weights
        is_label = label_places(labels, is_label_last=own.is_label_last)
        is_rationale = (labels != IGNORED) & ~is_label
        is_prompt = (inputs["attention_mask"] == 1) & (labels == IGNORED)
        asked = inputs["input_ids"].masked_fill(~is_prompt, IGNORED) if own.prompt else labels
        asked = torch.where(labels != IGNORED, labels, asked)
        outputs = model(**{**inputs, "labels": asked, "use_cache": False}, fused_lm_head=True)
        places = (is_label[:, 1:], is_rationale[:, 1:], is_prompt[:, 1:])
        sums = torch.stack([-(outputs.log_probs * place).sum() for place in places])
        counts = torch.stack([place.sum() for place in places])
        self._parts.append(torch.stack([sums.detach(), counts.to(sums.dtype)]))
        weights = sums.new_tensor([own.label, 1.0, own.prompt])
        count = counts[:2].sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = (weights * sums).sum() / count.to(sums.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what Trainer has, tokens under TRL's name, and the plain cross-entropy of each part over all ranks' rows."""
        logs["num_tokens"] = self.state.num_input_tokens_seen
        if self._parts:
            of_ranks: Any = self.accelerator.gather(torch.stack(self._parts).sum(0)[None])
            sums, counts = of_ranks.sum(0)
            logs |= mean_parts(sums.tolist(), counts.tolist(), has_prompt=bool(self.weights.prompt))
            self._parts.clear()
        super(SFTTrainer, self).log(logs)  # with a start time Trainer would mix its speeds into every line


def mean_parts(sums: Sequence[float], counts: Sequence[float], *, has_prompt: bool) -> dict[str, float]:
    """Return "cross_entropy/label" and so on; a part without tokens, or not asked for, is left out."""
    return {
        f"cross_entropy/{name}": total / count
        for name, total, count in zip(PARTS, sums, counts, strict=True)
        if count and (has_prompt or name != "prompt")
    }
