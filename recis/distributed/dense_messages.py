"""What FSDP2 sends, as collectives of the job: named, timed, and with the one error that says which rank is lost."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recis.distributed.ranks import Ranks
from recis.distributed.travelling import Travelling


class Gather:
    """FSDP2's all-gather of a unit's weights.

    Args:
        ranks: the job.
        note: is called before each.
    """

    def __init__(self, ranks: Ranks, note: Callable[[], None] = lambda: None) -> None:
        self._ranks, self._note = ranks, note

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for a message."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self._note()
        with self._ranks.named("dense weights"):
            work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=True)
        return work if async_op else _waited(self._ranks, output_tensor, work, "dense weights")


class Reduce(Gather):
    """FSDP2's reduce-scatter of a unit's gradients."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        with self._ranks.named("dense gradients"):
            work = dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=True)
        return work if async_op else _waited(self._ranks, output_tensor, work, "dense gradients")


def _waited(ranks: Ranks, taken: Tensor, work: Any, what: str) -> None:
    Travelling(ranks, taken, work, what).wait()
