"""BST: a transformer over a user's behaviour and the item at hand together, then an MLP.

    x = [history's vectors, oldest first; the target's vector] + row by distance from the target
    y = post-norm blocks(x), every position sees every other
    logits = MLP([pooled features, y of the target, mean of y over the history, dense])     per interest

The paper joins the outputs of a fixed number of positions; sequences here have any length, so the history's outputs enter as
their mean (zeros for an empty history) and the target's apart. Its leaky ReLU and one block are the defaults. Source: Chen et
al. 2019, arXiv:1905.06874.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingCollection, TableConfig, TableSet
from recis.errors import ConfigError
from recis.models.din import Interest, aligned, interest_width
from recis.models.inputs import DenseInput, PooledInputs
from recis.models.layers import MLP, Activation, check_widths
from recis.models.sequence_layers import PositionEmbedding, TransformerBlock, check_dropout, is_last
from recis.models.synthetic import synthetic_dense, synthetic_tables
from recis_kernels.jagged_runs import concat_bags
from recis_kernels.segment import segment_mean

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class BstConfig:
    """Tables whose sequence features have pooling "none"; every pooled feature also goes to the MLP."""

    tables: tuple[TableConfig, ...]
    interests: tuple[Interest, ...]
    dense: tuple[DenseInput, ...] = ()
    num_layers: int = 1
    num_heads: int = 4
    """Divides the width of each interest."""
    feed_hidden: int | None = None
    """Width inside the feed-forward nets; None: four times that of the interest."""
    num_positions: int = 64
    """Distances from the target with a row of their own; farther ones share the last."""
    hidden: tuple[int, ...] = (256, 128)
    activation: Activation = nn.LeakyReLU
    """Of the blocks and the last MLP, a callable without arguments."""
    dropout: float = 0.1
    """Of the blocks and the last MLP."""
    num_tasks: int = 1
    seed: int = 0
    """Of the tables' first weights."""

    def __post_init__(self) -> None:
        if not self.interests:
            raise ConfigError("BST needs at least one interest; without sequences use DCN or DeepFM")
        check_widths("BST", self.num_layers, self.num_heads, self.num_positions, self.feed_hidden or 1)
        check_dropout("BST", self.dropout)

    def build(self) -> "Bst":
        """Return the model with fresh weights."""
        return Bst(self)


class BehaviourTransformer(nn.Module):
    """([B, W] targets, rows [L, W] of histories) -> [B, 2 W]: the target's output, the mean of the history's.

    Args:
        width: W.
        config: layers, heads and positions.
    """

    def __init__(self, width: int, config: BstConfig) -> None:
        super().__init__()
        self.distances = PositionEmbedding(width, config.num_positions, from_end=True)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width,
                config.num_heads,
                config.feed_hidden or 4 * width,
                dropout=config.dropout,
                activation=config.activation,
                norm_first=False,
            )
            for _ in range(config.num_layers)
        )

    def forward(self, target: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Return [B, 2 W]; offsets [B + 1] are the histories'."""
        one_each = torch.arange(target.shape[0] + 1, device=offsets.device)
        joined, longer = concat_bags(rows, offsets, target, one_each)
        joined = self.distances(joined, longer)
        for block in self.blocks:
            joined = block(joined, longer, causal=False)
        last = is_last(longer, joined.shape[0])
        return torch.cat([joined[last], segment_mean(joined[~last], offsets)], dim=1)


class Bst(nn.Module):
    """forward(batch) -> logits [B, num_tasks]."""

    def __init__(self, config: BstConfig) -> None:
        super().__init__()
        tables = TableSet(config.tables, seed=config.seed)
        sequences = list(dict.fromkeys(name for interest in config.interests for name in interest.sequence))
        pooled = [name for name, (feature, _) in tables.features.items() if feature.pooling != "none"]
        pooled = [name for name in pooled if name not in sequences]
        self.inputs = PooledInputs(tables, config.dense, features=pooled)
        self.sequences = EmbeddingCollection(tables, features=sequences)
        self.interests = config.interests
        widths = [
            interest_width(interest, self.inputs.widths, self.sequences.embedding_dims) for interest in config.interests
        ]
        self.behaviour = nn.ModuleList(BehaviourTransformer(width, config) for width in widths)
        self.mlp = MLP(
            self.inputs.width + 2 * sum(widths),
            config.hidden,
            out_width=config.num_tasks,
            activation=config.activation,
            dropout=config.dropout,
        )

    def forward(self, batch: "Batch") -> Tensor:
        vectors = self.inputs.vectors(batch)
        sequences = self.sequences(batch.sparse)
        found = []
        for interest, behaviour in zip(self.interests, self.behaviour, strict=True):
            history = aligned(interest, sequences)
            target = torch.cat([vectors[name] for name in interest.target], dim=1)
            found.append(behaviour(target, history.flat_values, history.offsets.long()))
        return self.mlp(torch.cat([*vectors.values(), *found, self.inputs.dense(batch)], dim=1))


def synthetic() -> BstConfig:
    """Return a small BST for `recis.models.synthetic.SyntheticClicks`: seconds on a laptop."""
    return BstConfig(
        tables=synthetic_tables(8, sequences=True),
        interests=(Interest(target=("item_id", "category"), sequence=("clicked_items", "clicked_categories")),),
        dense=synthetic_dense(),
        num_heads=2,
        feed_hidden=32,
        num_positions=16,
        hidden=(32, 16),
        dropout=0.0,
    )
