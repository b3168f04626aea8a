"""HSTU: pointwise SiLU attention over a user's actions, with learned biases by relative position and by time difference.

    [u, v, q, k] = silu(W_1 norm(x) + b_1)
    a_i = sum over j <= i of silu(q_i . k_j / sqrt(D) + position[i - j] + time[bucket(t_i - t_j)]) / N v_j
    out = x + W_2 (norm(a) * u) + b_2

Weights are not normalised over a sequence, so how often something was seen stays visible. N is a constant: were it the
length, a later item would change what came before it. Time buckets grow by powers of two of `time_unit`. Layers of
normalisation stand as in the paper's public description; what it leaves open is ours: the scale 1 / sqrt(D), the buckets, and
the clipped position table. Source: Zhai et al. 2024, arXiv:2402.17152.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recis.errors import ConfigError
from recis.models.layers import check_widths
from recis.models.next_item import NextItemConfig
from recis.models.retrieval_head import SampledSoftmax
from recis.models.sampling import UniformNegatives
from recis.models.sequence_layers import check_dropout
from recis.models.synthetic_sequences import ITEM, TIMES, sequence_catalogue, sequence_tables
from recis_kernels.attention_inputs import TimeBias
from recis_kernels.hstu_attention import hstu_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Hstu:
    """An encoder of sequences for NextItemConfig; reads times where there are some."""

    num_layers: int = 2
    num_heads: int = 2
    head_width: int = 16
    """Of queries and keys, and of values: all heads together may be wider than the rows."""
    divisor: int = 200
    """N above: about the length of a usual long sequence."""
    num_distances: int = 128
    """Relative positions with a bias of their own; farther ones share the last."""
    time_unit: int = 1
    """Bucket 0 holds differences below it, bucket t those below time_unit * 2^t, in the unit of the times."""
    num_time_buckets: int = 24
    dropout: float = 0.2

    def __post_init__(self) -> None:
        check_widths("Hstu", self.num_layers, self.num_heads, self.head_width, self.divisor, self.num_distances)
        check_widths("Hstu", self.time_unit, self.num_time_buckets)
        check_dropout("Hstu", self.dropout)
        if self.time_unit << self.num_time_buckets >= 2**63:
            raise ConfigError(
                f"Hstu: time_unit * 2^num_time_buckets must be below 2^63; got {self.time_unit} and {self.num_time_buckets}"
            )

    def build(self, width: int) -> nn.Module:
        """Return the encoder of item vectors of that width, with fresh weights."""
        return HstuEncoder(self, width)


class RelativeBias(nn.Module):
    """The two bias tables of one layer, zero at first.

    Attributes:
        position: [H, 2 M - 1], by position of query minus position of key.
        time: [H, T], by bucket of the time between them.
    """

    boundaries: Tensor

    def __init__(self, num_heads: int, num_distances: int, time_unit: int, num_time_buckets: int) -> None:
        super().__init__()
        check_widths("RelativeBias", num_heads, num_distances, time_unit, num_time_buckets)
        self.position = nn.Parameter(torch.zeros(num_heads, 2 * num_distances - 1))
        self.time = nn.Parameter(torch.zeros(num_heads, num_time_buckets))
        powers = time_unit << torch.arange(num_time_buckets - 1)
        self.register_buffer("boundaries", powers, persistent=False)

    def between(self, query_times: Tensor, key_times: Tensor | None = None) -> TimeBias:
        """Return the bias between rows at these times [L] int64."""
        return TimeBias(table=self.time, boundaries=self.boundaries, query_times=query_times, key_times=key_times)


class HstuLayer(nn.Module):
    """[L, W] -> [L, W], the three lines above.

    Args:
        width: W of the rows.
        num_heads, head_width: H heads of D numbers.
        bias: the tables of this layer.
        divisor: N.
        dropout: on what is added to the rows.
    """

    def __init__(
        self, width: int, num_heads: int, head_width: int, *, bias: RelativeBias, divisor: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.head_width, self.divisor = num_heads, head_width, divisor
        inner = num_heads * head_width
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 4 * inner)
        self.bias = bias
        self.mixed_norm = nn.LayerNorm(inner)
        self.out = nn.Linear(inner, width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, rows: Tensor, offsets: Tensor, times: Tensor | None = None, *, num_targets: Tensor | None = None
    ) -> Tensor:
        """Return [L, W].

        Args:
            rows: [L, W].
            offsets: [B + 1] int64.
            times: [L] int64, or None for no bias by time.
            num_targets: [B] int64, how many last rows of each sequence are candidates that do not see each other.
        """
        gate, value, query, key = F.silu(self.project(self.norm(rows))).chunk(4, dim=1)
        query, key, value = (part.unflatten(1, (self.num_heads, self.head_width)) for part in (query, key, value))
        mixed = hstu_attention(
            query,
            key,
            value,
            offsets,
            max_length=self.divisor,
            causal=True,
            num_targets=num_targets,
            position_bias=self.bias.position,
            time=None if times is None else self.bias.between(times),
        )
        return rows + self.drop(self.out(self.mixed_norm(mixed.flatten(1)) * gate))


class HstuEncoder(nn.Module):
    """forward(rows [L, W], offsets [B + 1], times [L] or None) -> [L, W]; row i has seen the rows up to i."""

    def __init__(self, config: Hstu, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            HstuLayer(
                width,
                config.num_heads,
                config.head_width,
                bias=RelativeBias(config.num_heads, config.num_distances, config.time_unit, config.num_time_buckets),
                divisor=config.divisor,
                dropout=config.dropout,
            )
            for _ in range(config.num_layers)
        )
        self.drop = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, rows: Tensor, offsets: Tensor, times: Tensor | None = None, *, num_targets: Tensor | None = None
    ) -> Tensor:
        rows = self.drop(rows)
        for layer in self.layers:
            rows = layer(rows, offsets, times, num_targets=num_targets)
        return self.norm(rows)


def synthetic() -> NextItemConfig:
    """Return a small HSTU for `recis.models.synthetic_sequences.SyntheticSequences`: seconds on a laptop."""
    return NextItemConfig(
        tables=sequence_tables(16),
        history=ITEM,
        times=TIMES,
        encoder=Hstu(num_layers=1, num_heads=2, head_width=8, divisor=16, num_distances=16, dropout=0.1),
        softmax=SampledSoftmax(UniformNegatives(40)),
        catalogue=sequence_catalogue,
    )
