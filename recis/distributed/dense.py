"""Gradients of the dense part over all ranks: added in a fixed order, or by DistributedDataParallel while backward runs.

    OrderedGradients    sum = ((g_0 + g_1) + g_2) + ...   over parts, ascending: the same bits for any number of ranks
    wrap_in_ddp         DDP whose all-reduce adds (no mean), in an order that is the backend's

Both take losses that are divided by the weight of the whole global batch, so gradients are added and never averaged.
Ordered: rank r gets the r-th chunk of every part's gradient (all-to-all), adds them, and all get all chunks (all-gather):
2 (W - 1) / W of a gradient per rank and part, as a ring all-reduce moves.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recis.distributed.ranks import Ranks


class OrderedGradients:
    """Collects the gradient of each micro-batch of a step and puts the sum over all ranks into `.grad`.

    Args:
        parameters: of the dense part, in the same order on all ranks; float32 or narrower.
        ranks: the job.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self._parameters, self._ranks = list(parameters), ranks
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._num_values = sum(self._sizes)
        self._taken: list[Tensor] = []
        self._reached = torch.zeros(len(self._parameters), dtype=torch.bool)

    def take(self) -> None:
        """Take the gradient of the micro-batch whose backward has just run, and clear it."""
        grads = [parameter.grad for parameter in self._parameters]
        reached = torch.tensor([grad is not None for grad in grads], dtype=torch.bool)
        padding = torch.zeros(self._chunk * self._ranks.world_size - self._num_values)
        pieces = [
            torch.zeros(parameter.numel()) if grad is None else grad.detach().flatten().float()
            for grad, parameter in zip(grads, self._parameters, strict=True)
        ]
        self._taken.append(torch.cat([*pieces, padding]))
        self._reached |= reached
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def reached(self) -> Tensor:
        """Which parameters had a gradient in this step, bool [number of parameters]."""
        return self._reached

    def sum_up(self, reached: Tensor) -> None:
        """Set `.grad` of the parameters that `reached`, over all ranks, says had one anywhere."""
        ranks, count = self._ranks, len(self._taken)
        # chunk c of each of my k micro-batches goes to rank c: [W, k, n]
        given = torch.stack(self._taken).view(count, ranks.world_size, self._chunk).transpose(0, 1).contiguous()
        ones = [1] * ranks.world_size
        chunks = ranks.all_to_all(given, ones, ones, "dense gradients")
        total = chunks[0, 0].clone()
        for micro_batch in range(count):  # part = rank + micro-batch * W
            for rank in range(ranks.world_size):
                if rank or micro_batch:
                    total += chunks[rank, micro_batch]
        whole = ranks.all_gather(total, "sums of dense gradients").flatten()
        pieces = whole[: self._num_values].split(self._sizes)
        for parameter, values, is_reached in zip(self._parameters, pieces, reached.tolist(), strict=True):
            parameter.grad = values.view_as(parameter).to(parameter.dtype) if is_reached else None
        self._taken = []
        self._reached.zero_()

    @property
    def _chunk(self) -> int:
        return -(-max(self._num_values, 1) // self._ranks.world_size)


def wrap_in_ddp(model: Any, ranks: Ranks) -> Any:
    """Return DDP over a model's dense parameters; gradients are added over the ranks, not averaged.

    Buffers stay as each rank has them until `share_buffers`. Call the wrapper's `no_sync()` for all but a step's last
    micro-batch.
    """
    ddp: Any = nn.parallel.DistributedDataParallel
    known = inspect.signature(ddp).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before 2.13
    wrapped = ddp(model, process_group=ranks.group, find_unused_parameters=True, **{buffers: False})
    wrapped.register_comm_hook(ranks.group, _added)
    return wrapped


def _added(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def share_parameters(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks rank 0's parameters and buffers: what a model draws from the clock or a file may differ."""
    _share([*model.parameters(), *model.buffers()], ranks, "first weights")


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks rank 0's buffers (running means and the like), before they are saved or evaluated with."""
    _share(list(model.buffers()), ranks, "buffers")


def _share(tensors: Sequence[Tensor], ranks: Ranks, what: str) -> None:
    if ranks.world_size == 1:
        return
    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            if tensor.numel():
                ranks.copy_from_0(tensor.data, f"{what} {number}")
