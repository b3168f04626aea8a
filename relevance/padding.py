"""Token rows of different lengths as one padded tensor with its mask."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, on_left: bool, device: Any) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, L] int64 of token rows; L is at least 1."""
    side = "left" if on_left else "right"
    tokens = [torch.tensor(list(row), dtype=torch.int64) for row in rows]
    ids = pad_sequence(tokens, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True, padding_side=side)
    if not ids.shape[1]:
        ids, mask = ids.new_full((len(rows), 1), pad_id), mask.new_zeros(len(rows), 1)
    return ids.to(device), mask.to(device)
