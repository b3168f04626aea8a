"""Look at what index tensors hold, where `checks()` asks for it: offsets that ascend, numbers inside their range.

Kernels trust contents, because to look is a host sync on a GPU. Inside `checks()` every look costs a few; outside, and while
torch.compile traces, the functions `check_...` return at once. `require_offsets` always looks. Forms (shape, dtype) are
free to look at, and ops always do.
"""

import torch
from torch import Tensor

from recis_kernels.dispatch import checks_enabled


def is_asked() -> bool:
    """Return whether contents are to be looked at here."""
    return not torch.compiler.is_compiling() and checks_enabled()


def check_offsets(offsets: Tensor, num_values: int | None, *, whole: bool = False, name: str = "offsets") -> None:
    """Raise ValueError unless offsets [B + 1] ascend within 0..num_values; whole: from 0 to num_values.

    num_values None: nothing is known about where they end.
    """
    if is_asked():
        require_offsets(offsets, num_values, whole=whole, name=name)


def require_offsets(offsets: Tensor, num_values: int | None, *, whole: bool = False, name: str = "offsets") -> None:
    """Do check_offsets whether or not it is asked for; one host sync on a GPU."""
    if whole:
        rule = "from 0" if num_values is None else f"from 0 to {num_values}"
    else:
        rule = "from at least 0" if num_values is None else f"within 0..{num_values}"
    ends = offsets.detach().cpu()
    first, last = int(ends[0]), int(ends[-1])
    is_whole = first == 0 and (num_values is None or last == num_values)
    if first < 0 or (num_values is not None and last > num_values) or (whole and not is_whole):
        raise ValueError(f"{name} must ascend {rule}; they go from {first} to {last}")
    falls = (ends[1:] < ends[:-1]).nonzero()
    if falls.numel():
        at = int(falls[0])
        raise ValueError(
            f"{name} must ascend {rule}; {name}[{at}] is {int(ends[at])} and {name}[{at + 1}] is {int(ends[at + 1])}"
        )


def check_range(name: str, values: Tensor | None, low: int, high: int | None) -> None:
    """Raise ValueError unless all values, if any, lie in low..high; high None: are at least low."""
    if values is None or not is_asked() or values.numel() == 0:
        return
    least, most = int(values.min()), int(values.max())
    if high is None and least < low:
        raise ValueError(f"{name} must be at least {low}; got {least}")
    if high is not None and (least < low or most > high):
        raise ValueError(f"{name} must lie in {low}..{high}; got {least}..{most}")


def check_distinct(name: str, values: Tensor) -> None:
    """Raise ValueError unless the values that are at least 0 differ from each other."""
    if not is_asked():
        return
    found, counts = values[values >= 0].unique(return_counts=True)
    twins = found[counts > 1]
    if twins.numel():
        raise ValueError(f"{name} must be distinct; {int(twins[0])} stands more than once")


def check_runs(starts: Tensor, offsets: Tensor, num_rows: int) -> None:
    """Raise ValueError unless runs starts[r] .. starts[r] + size - 1 lie in 0..num_rows - 1 and none overlaps another.

    offsets [R + 1] give the sizes and have been checked.
    """
    if not is_asked():
        return
    sizes = offsets.diff().to(torch.int64)
    outside = ((starts < 0) | (starts > num_rows - sizes)).nonzero()
    if outside.numel():
        run = int(outside[0])
        raise ValueError(
            f"runs must lie within 0..{num_rows}; starts[{run}] is {int(starts[run])}, and {int(sizes[run])} rows long"
        )
    order = torch.where(sizes > 0, starts, num_rows).argsort()
    stops = (starts + sizes)[order][:-1]
    late = ((starts[order][1:] < stops) & (sizes[order][1:] > 0)).nonzero()
    if late.numel():
        one, other = order[int(late[0])], order[int(late[0]) + 1]
        raise ValueError(
            f"runs must not overlap; starts[{int(one)}] is {int(starts[one])}, {int(sizes[one])} rows long, "
            f"and starts[{int(other)}] is {int(starts[other])}"
        )
