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
RunPass = Callable[[Tensor, Tensor, int], Tensor]
WIDTH_STEP, ROW_STEP, FEW_ROWS = 4, 64, 16
MAX_WASTE = 0.2  # of a pass's places; half of them would be padding if all texts of a batch went in one


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

    def padded(part: Tensor, own: Tensor, width: int) -> Tensor:
        return run(ids[part, :width], own)

    return passes_over(padded, rows, lengths, place, max_tokens, recompute)


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


def passes_over(run: RunPass, rows: Tensor, lengths: Tensor, place: Tensor, max_tokens: int, recompute: bool) -> Tensor:
    """Return [B, H]: run(rows of a pass, their lengths, its width) for all `rows` [U], spread by `place` [B].

    Widths are rounded up, and passes of more than FEW_ROWS rows filled up with copies of their first row, whose result is
    dropped: libraries make and keep code for every shape they meet, which with shapes of any size takes longer than the work
    and gigabytes.
    """
    own = lengths[rows]
    widths = own.add(WIDTH_STEP - 1).div(WIDTH_STEP, rounding_mode="floor").mul(WIDTH_STEP).tolist()
    outputs, order = [], []
    for batch in length_batches(widths, max_tokens=max_tokens, max_waste=MAX_WASTE):
        chosen = torch.tensor(batch, device=rows.device)
        extra = -len(batch) % (ROW_STEP if len(batch) > ROW_STEP else FEW_ROWS) if len(batch) > FEW_ROWS else 0
        full = torch.cat([chosen, chosen[:1].expand(extra)])
        given = (rows[full], own[full], max(widths[number] for number in batch))
        out = checkpoint(run, *given, use_reentrant=False) if recompute else run(*given)
        outputs.append(out[: len(batch)])
        order.append(chosen)
    position = torch.empty_like(rows)
    position[torch.cat(order)] = torch.arange(len(rows), device=rows.device)
    return torch.cat(outputs)[position[place]]
