"""Passes of a tower over a batch: distinct texts only, of like length, each pass within a number of token places.

    B texts -> distinct ones -> length_batches -> passes -> pooled states, put back to [B, H]

A ranker's batch of some thousand samples names some hundred items, a few of them often. With `recompute` a pass keeps its
inputs alone and computes its activations again in the backward pass, so the memory of training is that of one pass, however
large the ranker's batch is; it costs one more forward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recis.towers.batching import length_batches

Run = Callable[[Tensor, Tensor], Tensor]


def in_passes(run: Run, ids: Tensor, lengths: Tensor, *, max_tokens: int, recompute: bool) -> Tensor:
    """Return run's rows [B, H] of padded token ids [B, T] with lengths [B], computed in passes.

    The lengths are read on the host: on a GPU the step waits for them. With dropout, texts that are equal share one draw.

    Args:
        run: (ids [b, t], lengths [b]) -> [b, H].
        ids: what stands behind a text's length is not looked at.
        max_tokens: b * t of a pass; a longer text is a pass of its own.
        recompute: see above.
    """
    rows, place = distinct_rows(ids, lengths)
    return passes_over(
        lambda part, own: run(ids[part, : int(own.max())], own), rows, lengths, place, max_tokens, recompute
    )


def distinct_rows(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the number of one text of each kind [U], the kind of each text [B])."""
    behind = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
    keys = torch.cat([lengths[:, None], ids.masked_fill(behind, 0)], dim=1)
    _, place = torch.unique(keys, dim=0, return_inverse=True)
    return first_of_each(place), place


def first_of_each(place: Tensor) -> Tensor:
    """Return the first position of each of the numbers 0..U - 1 in `place` [B]."""
    num = int(place.max()) + 1 if len(place) else 0
    positions = torch.arange(len(place), device=place.device)
    return positions.new_full((num,), len(place)).scatter_reduce(0, place, positions, "amin")


def passes_over(run: Run, rows: Tensor, lengths: Tensor, place: Tensor, max_tokens: int, recompute: bool) -> Tensor:
    """Return [B, H]: run(rows of a pass, their lengths) for all `rows` [U], spread by `place` [B]; lengths [B] of all texts."""
    own = lengths[rows]
    outputs, order = [], []
    for batch in length_batches(own.tolist(), max_tokens=max_tokens, max_waste=0.5):
        chosen = torch.tensor(batch, device=rows.device)
        given = (rows[chosen], own[chosen])
        outputs.append(checkpoint(run, *given, use_reentrant=False) if recompute else run(*given))
        order.append(chosen)
    position = torch.empty_like(rows)
    position[torch.cat(order)] = torch.arange(len(rows), device=rows.device)
    return torch.cat(outputs)[position[place]]
