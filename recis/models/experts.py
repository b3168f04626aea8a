"""Experts and gates for several tasks on one input: MMoE's mixture and PLE's extraction layer.

    StackedMLP   n MLPs of one shape as one batched matrix product per layer: [n, B, in] -> [n, B, out]
    MMoE         task t reads  sum_e softmax(G_t x)_e  expert_e(x)
    CGC (PLE)    task t reads  sum_e softmax(G_t x_t)_e  over its own experts of x_t and the shared experts of x_s;
                 the shared path reads all experts, gated by x_s

T = tasks, H = width of an expert's output. Sources: Ma et al. 2018, doi:10.1145/3219819.3220007 (MMoE); Tang et al. 2020,
doi:10.1145/3383313.3412236 (PLE).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from recis.errors import ConfigError
from recis.models.layers import Activation, check_widths


class StackedMLP(nn.Module):
    """num MLPs of equal shape, each with its own weights; weights start like those of nn.Linear.

    Args:
        num: how many MLPs.
        in_width: width of each input.
        hidden: hidden widths; may be empty only with out_width.
        out_width: adds a last linear layer without activation; None ends with the last hidden one.
        activation: makes one, without arguments.
    """

    def __init__(
        self,
        num: int,
        in_width: int,
        hidden: Sequence[int],
        *,
        out_width: int | None = None,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        widths = (in_width, *hidden, *(() if out_width is None else (out_width,)))
        check_widths("StackedMLP", num, *widths)
        if len(widths) < 2:
            raise ConfigError("StackedMLP: hidden must not be empty without out_width: there would be no layer")
        self.weights = nn.ParameterList(_like_linear(num, fan_in, width, fan_in) for fan_in, width in pairwise(widths))
        self.biases = nn.ParameterList(_like_linear(num, 1, width, fan_in) for fan_in, width in pairwise(widths))
        self.activation = activation()
        self.num = num
        self.num_activated = len(hidden)
        self.out_width = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return [num, B, out_width] of x [num, B, in_width], or of x [B, in_width] that all MLPs share."""
        if x.ndim == 2:
            x = x.expand(self.num, *x.shape)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if index < self.num_activated:
                x = self.activation(x)
        return x


class MixtureOfExperts(nn.Module):
    """MMoE's shared part: x [B, in_width] -> one mixture of the experts per task [T, B, H]."""

    def __init__(
        self,
        in_width: int,
        num_tasks: int,
        num_experts: int,
        hidden: Sequence[int],
        *,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        check_widths("MixtureOfExperts", num_tasks, num_experts)
        self.experts = StackedMLP(num_experts, in_width, hidden, activation=activation)
        self.gate = nn.Linear(in_width, num_tasks * num_experts, bias=False)
        self.num_tasks = num_tasks
        self.out_width = self.experts.out_width

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).view(x.shape[0], self.num_tasks, self.experts.num).softmax(2)
        return torch.einsum("bte,ebh->tbh", gates, self.experts(x))


class CgcLayer(nn.Module):
    """One extraction layer of PLE (customised gate control): (tasks [T, B, W], shared [B, W]) -> the same with H for W.

    Args:
        in_width: W.
        num_tasks: T.
        own_experts: experts of each task that no other task reads.
        shared_experts: experts that all tasks read.
        hidden: hidden widths of an expert; the last is H.
        is_last: leave out the shared path, which nothing reads after the last layer; its output is then the input.
        activation: of the experts.
    """

    def __init__(
        self,
        in_width: int,
        num_tasks: int,
        *,
        own_experts: int,
        shared_experts: int,
        hidden: Sequence[int],
        is_last: bool = False,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        check_widths("CgcLayer", num_tasks, own_experts, shared_experts)
        self.own = StackedMLP(num_tasks * own_experts, in_width, hidden, activation=activation)
        self.shared = StackedMLP(shared_experts, in_width, hidden, activation=activation)
        self.task_gates = _like_linear(num_tasks, in_width, own_experts + shared_experts, in_width)
        all_experts = num_tasks * own_experts + shared_experts
        self.shared_gate = None if is_last else nn.Linear(in_width, all_experts, bias=False)
        self.num_tasks, self.own_experts = num_tasks, own_experts
        self.out_width = self.own.out_width

    def forward(self, tasks: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        of_shared = self.shared(shared)
        of_own = self.own(tasks.repeat_interleave(self.own_experts, dim=0, output_size=self.own.num))
        own_by_task = of_own.unflatten(0, (self.num_tasks, self.own_experts))
        read = torch.cat([own_by_task, of_shared.expand(self.num_tasks, *of_shared.shape)], dim=1)
        gates = torch.bmm(tasks, self.task_gates).softmax(2)
        next_tasks = torch.einsum("tbe,tebh->tbh", gates, read)
        if self.shared_gate is None:
            return next_tasks, shared
        shared_gates = self.shared_gate(shared).softmax(1)
        next_shared = torch.einsum("be,ebh->bh", shared_gates, torch.cat([of_own, of_shared]))
        return next_tasks, next_shared


def _like_linear(num: int, rows: int, columns: int, fan_in: int) -> nn.Parameter:
    """Return [num, rows, columns], uniform within 1 / sqrt(fan_in): what nn.Linear starts from."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(num, rows, columns).uniform_(-bound, bound))
