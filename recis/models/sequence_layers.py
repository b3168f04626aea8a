"""Layers over sequences of any length, never padded: attention, transformer block, positions.

    rows [L, W] of all sequences one behind the other; sequence b = rows offsets[b]:offsets[b + 1]

    attention     out_i = W_o [softmax over j of (q_i . k_j / sqrt(W / H)) v_j, per head];  j in i's sequence, j <= i if causal
    block, pre    y = x + attention(norm(x));  y = y + cross(norm(y));  out = y + feed(norm(y))
    block, post   y = norm(x + attention(x));  y = norm(y + cross(y));  out = norm(y + feed(y))
    positions     x_i + table[min(i, num_positions - 1)], i counted from the first row of the sequence, or from the last

L = positions in the batch, B = sequences, W = width, H = heads. Scores exist a tile at a time, so memory grows with L. Dropout
is on the outputs of attention and feed-forward, not on the weights, which are never stored. All take L = 0 and empty
sequences. Source: Vaswani et al. 2017, arXiv:1706.03762; without padding: `recis_kernels.jagged_attention`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recis.errors import ConfigError
from recis.models.layers import MLP, Activation, check_widths
from recis_kernels.jagged import bag_of_value
from recis_kernels.jagged_attention import jagged_attention
from recis_kernels.jagged_runs import concat_bags, gather_runs


def places(offsets: Tensor, num_rows: int) -> Tensor:
    """Return the place [L] int64 of each row in its sequence, from 0."""
    return torch.arange(num_rows, device=offsets.device) - offsets[bag_of_value(offsets, num_rows)]


def with_start(start: Tensor, rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows, offsets) with one row `start` [W] in front of every sequence."""
    num_bags = offsets.numel() - 1
    first = torch.arange(num_bags + 1, device=offsets.device)
    return concat_bags(start.to(rows.dtype).expand(num_bags, -1).contiguous(), first, rows, offsets)


def is_last(offsets: Tensor, num_rows: int) -> Tensor:
    """Return bool [L]: whether a row is the last of its sequence."""
    found = torch.zeros(num_rows, dtype=torch.bool, device=offsets.device)
    found[offsets[1:][offsets.diff() > 0] - 1] = True
    return found


class PositionEmbedding(nn.Module):
    """Adds a learned row per place to [L, W]; places from num_positions on share the last one.

    Args:
        width: W.
        num_positions: rows of the table.
        from_end: count from the last row of a sequence. Not for causal layers: a later item would move those before it.
    """

    def __init__(self, width: int, num_positions: int, *, from_end: bool = False) -> None:
        super().__init__()
        check_widths("PositionEmbedding", width, num_positions)
        self.from_end = from_end
        self.table = nn.Parameter(torch.randn(num_positions, width) * 0.02)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        place = places(offsets, rows.shape[0])
        if self.from_end:
            place = offsets.diff()[bag_of_value(offsets, rows.shape[0])] - 1 - place
        return rows + self.table[place.clamp(max=self.table.shape[0] - 1)]


class Memory(NamedTuple):
    """Keys and values [L, H, D] of sequences with these offsets [B + 1]: what attention reads."""

    keys: Tensor
    values: Tensor
    offsets: Tensor

    def append(self, more: "Memory") -> "Memory":
        """Return sequences that go on with those of `more`."""
        keys, offsets = concat_bags(self.keys, self.offsets, more.keys, more.offsets)
        values, _ = concat_bags(self.values, self.offsets, more.values, more.offsets)
        return Memory(keys, values, offsets)

    def select(self, sequences: Tensor) -> "Memory":
        """Return sequences by number [N] int64, repeats allowed."""
        lengths = self.offsets.diff()[sequences]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        starts, num_rows = self.offsets[:-1][sequences], int(offsets[-1])
        keys, values = (gather_runs(rows, starts, offsets, num_rows) for rows in (self.keys, self.values))
        return Memory(keys, values, offsets)


class SequenceAttention(nn.Module):
    """Multi-head softmax attention of rows [L, W] over the memory of their sequence.

    Args:
        width: of rows in and out; a multiple of num_heads.
        num_heads: heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads("SequenceAttention", width, num_heads)
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def remember(self, rows: Tensor, offsets: Tensor) -> Memory:
        """Return keys and values of rows [L, W]."""
        keys, values = (linear(rows).unflatten(1, (self.num_heads, -1)) for linear in (self.key, self.value))
        return Memory(keys, values, offsets)

    def forward(self, rows: Tensor, offsets: Tensor, memory: Memory, *, causal: bool = False) -> Tensor:
        """Return [L, W]; the last row of a sequence stands at the last key of its memory when causal."""
        query = self.query(rows).unflatten(1, (self.num_heads, -1))
        found = jagged_attention(query, memory.keys, memory.values, offsets, key_offsets=memory.offsets, causal=causal)
        return self.out(found.flatten(1))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if asked for, and a feed-forward net: [L, W] -> [L, W].

    Args:
        width: of the rows.
        num_heads: of both attentions.
        hidden: width inside the feed-forward net.
        dropout: probability on each part's output, and inside the feed-forward net.
        activation: of the feed-forward net.
        norm_first: layer norms in front of the parts ("pre") or behind the sums ("post").
        cross: whether rows also attend to a memory.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        activation: Activation = nn.ReLU,
        norm_first: bool = True,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = SequenceAttention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.cross = SequenceAttention(width, num_heads) if cross else None
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.feed = MLP(width, (hidden,), out_width=width, activation=activation, dropout=dropout)
        self.feed_norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, rows: Tensor, offsets: Tensor, *, causal: bool, memory: Memory | None = None) -> Tensor:
        """Return [L, W]; `memory` is what `cross` reads."""
        return self.extend(rows, offsets, None, causal=causal, memory=memory)[0]

    def extend(
        self,
        rows: Tensor,
        offsets: Tensor,
        past: Memory | None,
        *,
        causal: bool = True,
        memory: Memory | None = None,
        memory_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """Return (out [L, W], past with these rows) for rows that come behind those in `past`.

        Args:
            rows: [L, W].
            offsets: [B + 1] int64 of rows and of past.
            past: keys and values of earlier rows of the same sequences; None: there are none.
            causal: a row sees itself and those before it only.
            memory: what `cross` reads.
            memory_offsets: which rows read which sequence of the memory; None: as offsets.

        Raises:
            ValueError: the block has cross-attention and there is no memory.
        """
        seen = self.attention_norm(rows) if self.norm_first else rows
        own = self.attention.remember(seen, offsets)
        past = own if past is None else past.append(own)
        rows = rows + self.drop(self.attention(seen, offsets, past, causal=causal))
        rows = rows if self.norm_first else self.attention_norm(rows)
        if self.cross is not None and self.cross_norm is not None:
            if memory is None:
                raise ValueError("a block with cross-attention needs a memory; give memory=")
            seen = self.cross_norm(rows) if self.norm_first else rows
            rows = rows + self.drop(self.cross(seen, offsets if memory_offsets is None else memory_offsets, memory))
            rows = rows if self.norm_first else self.cross_norm(rows)
        if self.norm_first:
            return rows + self.drop(self.feed(self.feed_norm(rows))), past
        return self.feed_norm(rows + self.drop(self.feed(rows))), past


def check_heads(owner: str, width: int, num_heads: int) -> None:
    """Raise ConfigError unless width is a multiple of num_heads."""
    check_widths(owner, width, num_heads)
    if width % num_heads:
        raise ConfigError(f"{owner}: width must be a multiple of num_heads; got {width} and {num_heads}")


def check_dropout(owner: str, dropout: float) -> None:
    """Raise ConfigError unless dropout lies in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"{owner}: dropout must lie in [0, 1); got {dropout}")
