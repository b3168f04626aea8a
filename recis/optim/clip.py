"""One gradient norm over dense parameters and embedding rows, and the factor that brings it down to a limit.

    norm^2 = sum over dense gradients of g^2  +  sum over distinct touched rows of (sum of the row's gradients)^2
    factor = min(1, max_norm / (norm + 1e-6))

A row that occurs at several positions counts with its summed gradient, as it would in a dense [num_rows, D] parameter. Dense
gradients are scaled in place; for rows the factor is left in the pending lookups and multiplied in the update's own pass.

With rows on a GPU norm and factor stay there and nothing waits. A norm that is not finite then makes all dense gradients 0,
leaves all rows as they are, and is named a step later.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recis.errors import ConfigError, RecisError
from recis.optim.stores import describe_rows, shortened, stores_of
from recis_kernels.row_grads import PendingLookup, merge_lookups, row_square_sums


class NonFiniteNorm(RecisError):
    """The gradient norm is NaN or infinite; nothing was scaled."""


@torch.no_grad()
def clip_grad_norm(
    dense_parameters: Iterable[Tensor],
    sparse: nn.Module | Iterable[Any],
    max_norm: float,
    *,
    skip_nonfinite: bool = False,
    dense_squares: Tensor | None = None,
) -> Tensor:
    """Scale all gradients so that their joint norm is at most max_norm; return the norm before, a float64 scalar.

    Args:
        dense_parameters: with `.grad` where backward reached them.
        sparse: a model, collections or table sets whose pending row gradients count; may be empty.
        max_norm: above 0.
        skip_nonfinite: leave rows whose gradient is not finite out of the norm, as SparseOptimizer then leaves them
            out of the update.
        dense_squares: the sum of squares of all dense gradients, a float64 scalar, where this process has shards of them
            (recis.distributed.dense_shards); None: they are all here.

    Raises:
        ConfigError: max_norm is not above 0.
        NonFiniteNorm: a gradient is NaN or infinite; the text names rows by table and id. With rows on a GPU a later
            `end_step` of their tables raises it.
    """
    if not max_norm > 0:
        raise ConfigError(f"clip_grad_norm: max_norm must be above 0; got {max_norm}")
    grads = [parameter.grad for parameter in dense_parameters if parameter.grad is not None]
    stores = [store for store in stores_of(sparse) if store.pending() or store.exchange is not None]
    if any(store.is_padded for store in stores):
        return _clip_on_device(grads, stores, max_norm, skip_nonfinite, dense_squares)
    total = torch.zeros((), dtype=torch.float64) if dense_squares is None else dense_squares.clone()
    for grad in grads if dense_squares is None else ():
        total += grad.double().square().sum().cpu()
    if not bool(total.isfinite()):
        raise NonFiniteNorm(f"clip_grad_norm: the norm of the dense gradients is {float(total)}; {_WAY_OUT}")
    pending = []
    for store in stores:
        lookups = store.pending()
        total += _square_norm(store, lookups, skip_nonfinite)
        pending += lookups
    norm = total.sqrt()
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    for grad in grads:
        grad.mul_(factor)
    for lookup in pending:
        lookup.scale *= factor
    return norm


_WAY_OUT = "nothing was changed. Lower the learning rate, or look for the feature with torch.autograd.detect_anomaly"


def _square_norm(store: Any, lookups: list[PendingLookup], skip_nonfinite: bool) -> Tensor:
    """Return the squared norm of a store's summed row gradients, a float64 scalar."""
    if not lookups:  # of rows shared with others, none of which lies here
        return store.exchange.sum_of_squares(torch.zeros(0, dtype=torch.float64))
    merged = merge_lookups(lookups)
    norms = row_square_sums(merged, store.layout.dim)
    bad = (~norms.isfinite()).nonzero().squeeze(1)
    if bad.numel():
        if not skip_nonfinite:
            places = shortened(describe_rows(store, merged, bad))
            raise NonFiniteNorm(f"clip_grad_norm: a gradient is not finite: {places}; {_WAY_OUT}")
        norms = norms[norms.isfinite()]
    if store.exchange is not None:
        return store.exchange.sum_of_squares(norms)
    # Sorted, because merged rows come by row number, which a resumed run does not share: the sum must not depend on it.
    return (norms if len(lookups) == 1 else norms.sort().values).sum()


def _clip_on_device(
    grads: list[Tensor], stores: list[Any], max_norm: float, skip_nonfinite: bool, dense_squares: Tensor | None
) -> Tensor:
    """Do clip_grad_norm without a host sync; the norm lies on the first store's device."""
    first = stores[0]
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    if dense_squares is not None:
        total += dense_squares.to(first.device)
    for grad in grads if dense_squares is None else ():
        total += grad.double().square().sum().to(first.device, non_blocking=True)
    rows: list[tuple[Any, PendingLookup, Tensor]] = []
    for store in stores:
        merged = merge_lookups(store.pending())
        norms = row_square_sums(merged, store.layout.dim)
        rows.append((store, PendingLookup(merged.rows, merged.table_of_row, merged.counts), ~norms.isfinite()))
        norms = torch.where(norms.isfinite(), norms, 0) if skip_nonfinite else norms
        total += norms.sum().to(first.device, non_blocking=True)
    norm = total.sqrt()
    is_finite = norm.isfinite()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.copy_(torch.where(is_finite, grad * factor, 0))
    scale = torch.where(is_finite, factor, torch.nan)  # a row whose gradient is NaN is left as it is
    for store in stores:
        of_store = scale.to(store.device, non_blocking=True)
        for lookup in store.pending():
            is_one = not isinstance(lookup.scale, Tensor) and lookup.scale == 1
            lookup.scale = of_store if is_one else lookup.scale * of_store
    step = first.step

    def explain(_: int) -> Exception:
        bad = [(store, lookup, is_bad.nonzero().squeeze(1)) for store, lookup, is_bad in rows if not skip_nonfinite]
        places = [place for store, lookup, at in bad for place in describe_rows(store, lookup, at, step)]
        where = shortened(places) if places else f"in the dense part or too large, step {step}"
        return NonFiniteNorm(
            f"clip_grad_norm: a gradient is not finite: {where}; dense gradients were set to 0 and rows left as they "
            "were. Lower the learning rate, or look for the feature with torch.autograd.detect_anomaly"
        )

    first.faults.ask((~is_finite).long(), explain)
    return norm
