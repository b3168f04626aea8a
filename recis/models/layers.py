"""Small layers that click models are made of: MLP, factorization machine, cross network, dot interaction.

    MLP          x -> activation(norm(W x + b)), dropout, ... and, with out_width, a last plain W x + b
    FM           1/2 sum_d [(sum_f v_f)^2 - sum_f v_f^2]_d  =  sum over pairs f < g of <v_f, v_g>
    CrossNet     x' = x0 * (W x + b) + x, per layer; W full [width, width], or U V with rank r
    Dot          all <v_f, v_g>, f > g

B = samples, F = fields (one embedding each), D = width of a field. All take B = 0. Sources: Rendle 2010 (FM); Wang et al. 2021,
arXiv:2008.13535 (DCN-V2); Naumov et al. 2019, arXiv:1906.00091 (DLRM).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from recis.errors import ConfigError

Activation = Callable[[], nn.Module]
Norm = Callable[[int], nn.Module]


class MLP(nn.Sequential):
    """Fully connected layers [B, in_width] -> [B, last width].

    Args:
        in_width: width of the input, at least 1.
        hidden: width of each hidden layer; may be empty.
        out_width: adds a last linear layer without norm, activation and dropout; None ends with the last hidden one.
        activation: makes one, without arguments (nn.ReLU).
        norm: makes one from a width (nn.LayerNorm), placed before the activation; None = none. Batch norm needs more than one
            row in training and breaks the equality of accumulated and big batches.
        dropout: probability in [0, 1) of zeroing a hidden value in training.

    Attributes:
        out_width: width of the output.
    """

    def __init__(
        self,
        in_width: int,
        hidden: Sequence[int],
        *,
        out_width: int | None = None,
        activation: Activation = nn.ReLU,
        norm: Norm | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths("MLP", in_width, *hidden, *(() if out_width is None else (out_width,)))
        if not 0 <= dropout < 1:
            raise ConfigError(f"MLP: dropout must lie in [0, 1); got {dropout}")
        width = in_width
        for next_width in hidden:
            self.append(nn.Linear(width, next_width))
            if norm is not None:
                self.append(norm(next_width))
            self.append(activation())
            if dropout > 0:
                self.append(nn.Dropout(dropout))
            width = next_width
        if out_width is not None:
            self.append(nn.Linear(width, out_width))
        self.out_width = width if out_width is None else out_width


class FactorizationMachine(nn.Module):
    """Second-order term of a factorization machine: fields [B, F, D] -> [B, 1]. Cost F D per sample, not F^2 D."""

    def forward(self, fields: Tensor) -> Tensor:
        fields = fields.float()  # squares of sums lose too much in bfloat16
        return 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1, keepdim=True)


class CrossNet(nn.Module):
    """DCN-V2's explicit crosses: [B, width] -> [B, width], x' = x0 * (W x + b) + x in each layer.

    Args:
        width: width of input and output.
        num_layers: crosses; l layers reach degree l + 1.
        rank: W = U V with U [width, rank], V [rank, width]; None keeps W full.
    """

    def __init__(self, width: int, num_layers: int, *, rank: int | None = None) -> None:
        super().__init__()
        check_widths("CrossNet", width, num_layers, *(() if rank is None else (rank,)))

        def matrix() -> nn.Module:
            if rank is None:
                return nn.Linear(width, width)
            return nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))

        self.layers = nn.ModuleList(matrix() for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = torch.addcmul(x, first, layer(x).to(x.dtype))
        return x


class DotInteraction(nn.Module):
    """All dot products of two different fields: [B, F, D] -> [B, F (F - 1) / 2], ordered (1,0), (2,0), (2,1), (3,0), ..."""

    below_diagonal: Tensor

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        check_widths("DotInteraction", num_fields)
        rows, columns = torch.tril_indices(num_fields, num_fields, offset=-1)
        self.register_buffer("below_diagonal", rows * num_fields + columns, persistent=False)
        self.out_width = len(self.below_diagonal)

    def forward(self, fields: Tensor) -> Tensor:
        products = torch.bmm(fields, fields.transpose(1, 2))
        return products.flatten(1).index_select(1, self.below_diagonal)


def check_widths(owner: str, *widths: int) -> None:
    """Raise ConfigError unless every width is a whole number of at least 1."""
    for width in widths:
        if not isinstance(width, int) or width < 1:
            raise ConfigError(
                f"{owner}: widths and counts must be whole numbers of at least 1; got {width!r} in {widths}"
            )
