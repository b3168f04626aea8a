"""Replace dead groups of a generation batch by fresh ones, and where fresh prompts come from.

    reserve = PromptReserve(num_prompts=6000, seed=0, rank=0, num_ranks=2)
    reserve.take(3)                                      positions, no prompt twice before all were taken
    merged = replace_groups(batch, fresh, dead, group_size=8, pad_id=0)

A batch is the dict that TRL's `_generate_and_score_completions` returns: prompts padded on the left, completions on the
right. TRL has no refill; the rule is after TaoSR1 arXiv:2508.12365 (train where 0 < right < all), the mechanics are ours.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from relevance.replay import overwrite_rows

_PROMPT = ("prompt_ids", "prompt_mask")
_COMPLETION = (
    "completion_ids",
    "completion_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)


class PromptReserve:
    """Fresh prompts of one rank: a seeded permutation that is disjoint between ranks, gone through again and again."""

    def __init__(self, *, num_prompts: int, seed: int = 0, rank: int = 0, num_ranks: int = 1) -> None:
        self.num_prompts = num_prompts
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.taken = 0
        """How many were taken; what a checkpoint keeps."""

    def take(self, count: int) -> list[int]:
        """Return the next positions.

        Raises:
            ValueError: this rank's share of the prompts is empty.
        """
        size = len(range(self.rank, self.num_prompts, self.num_ranks))
        if not size:
            raise ValueError(f"{self.num_prompts} prompts leave none for rank {self.rank} of {self.num_ranks}")
        found = []
        while len(found) < count:
            epoch, place = divmod(self.taken, size)
            order = np.random.Generator(np.random.Philox([self.seed, epoch])).permutation(self.num_prompts)
            share = order[self.rank :: self.num_ranks][place : place + count - len(found)]
            found.extend(share.tolist())
            self.taken += len(share)
        return found


def replace_groups(
    batch: Mapping[str, Tensor], fresh: Mapping[str, Tensor], dead: Tensor, *, group_size: int, pad_id: int
) -> dict[str, Tensor]:
    """Return the batch with rows of `fresh` in its dead groups, all padded to the larger widths.

    Args:
        batch: tensors with B rows; what is 0-d or has other names is left as it is.
        fresh: as many groups as there are entries in `dead`.
        dead: [N] int64, groups that are replaced.
        group_size: G.
        pad_id: of tokens.

    Raises:
        ValueError: the numbers of groups differ.
    """
    rows = (dead[:, None] * group_size + torch.arange(group_size, device=dead.device)).flatten()
    out = dict(batch)
    for name in _PROMPT + _COMPLETION:
        if name in batch:
            pad = float(pad_id) if name.endswith("_ids") else 0.0
            out[name] = overwrite_rows(batch[name], fresh[name], rows, pad=pad, on_left=name in _PROMPT)
    return out
