"""DIN: each sample's behaviour sequence, pooled by its fit to the item at hand.

    q = [target features' embeddings];  k_t = [sequence features' embeddings at position t]
    logits = MLP([pooled features, TargetAttention(q, k) per interest, dense])

Aligned sequences (item and category of the same click) are one interest: they have equal lengths in every sample. A target
and its sequence usually share a table. Source: Zhou et al. 2018, arXiv:1706.06978.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingCollection, TableConfig, TableSet
from recis.errors import ConfigError, nearest
from recis.jagged import JaggedTensor
from recis.models.attention import TargetAttention
from recis.models.inputs import DenseInput, PooledInputs
from recis.models.layers import MLP, Activation
from recis.models.synthetic import synthetic_dense, synthetic_tables

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Interest:
    """Which features of the target are matched with which sequences; both sides have the same total width."""

    target: tuple[str, ...]
    """Pooled features of the item at hand."""
    sequence: tuple[str, ...]
    """Features with pooling "none", aligned position by position."""

    def __post_init__(self) -> None:
        if not self.target or not self.sequence:
            raise ConfigError(f"Interest: target and sequence must each name a feature; got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DinConfig:
    """Tables whose sequence features have pooling "none"; every pooled feature also goes to the MLP."""

    tables: tuple[TableConfig, ...]
    interests: tuple[Interest, ...]
    dense: tuple[DenseInput, ...] = ()
    attention_hidden: tuple[int, ...] = (64, 16)
    attention_softmax: bool = True
    """Normalise the attention within a sequence; False is the paper's form, whose sum grows with the interest."""
    hidden: tuple[int, ...] = (256, 128)
    activation: Activation = nn.ReLU
    """Of both MLPs, a callable without arguments (nn.PReLU)."""
    dropout: float = 0.0
    """Of the last MLP."""
    num_tasks: int = 1
    seed: int = 0
    """Of the tables' first weights."""

    def build(self) -> "Din":
        """Return the model with fresh weights."""
        return Din(self)


class Din(nn.Module):
    """forward(batch) -> logits [B, num_tasks]."""

    def __init__(self, config: DinConfig) -> None:
        super().__init__()
        if not config.interests:
            raise ConfigError("DIN needs at least one interest; without sequences use DCN or DeepFM")
        tables = TableSet(config.tables, seed=config.seed)
        sequences = list(dict.fromkeys(name for interest in config.interests for name in interest.sequence))
        pooled = [name for name, (feature, _) in tables.features.items() if feature.pooling != "none"]
        pooled = [name for name in pooled if name not in sequences]
        self.inputs = PooledInputs(tables, config.dense, features=pooled)
        self.sequences = EmbeddingCollection(tables, features=sequences)
        self.interests = config.interests
        self.attention = nn.ModuleList(
            TargetAttention(
                self._width(interest),
                config.attention_hidden,
                softmax=config.attention_softmax,
                activation=config.activation,
            )
            for interest in config.interests
        )
        width = self.inputs.width + sum(map(self._width, config.interests))
        out = config.num_tasks
        self.mlp = MLP(width, config.hidden, out_width=out, activation=config.activation, dropout=config.dropout)

    def _width(self, interest: Interest) -> int:
        return interest_width(interest, self.inputs.widths, self.sequences.embedding_dims)

    def forward(self, batch: "Batch") -> Tensor:
        vectors = self.inputs.vectors(batch)
        sequences = self.sequences(batch.sparse)
        attended = [
            attention(torch.cat([vectors[name] for name in interest.target], dim=1), aligned(interest, sequences))
            for interest, attention in zip(self.interests, self.attention, strict=True)
        ]
        return self.mlp(torch.cat([*vectors.values(), *attended, self.inputs.dense(batch)], dim=1))


def interest_width(interest: Interest, pooled: Mapping[str, int], sequences: Mapping[str, int]) -> int:
    """Return the width of an interest's target; ConfigError where a feature is missing or its sequence has another one.

    Args:
        interest: what is matched.
        pooled, sequences: widths of the pooled and of the sequence features, by name.
    """
    for name in interest.target:
        if name not in pooled:
            raise ConfigError(f"{interest}: no pooled feature {name!r}; {nearest(name, pooled)}")
    target = sum(pooled[name] for name in interest.target)
    sequence = sum(sequences[name] for name in interest.sequence)
    if target != sequence:
        raise ConfigError(f"{interest}: both sides need one total width; target has {target}, sequence {sequence}")
    return target


def aligned(interest: Interest, sequences: dict[str, JaggedTensor]) -> JaggedTensor:
    """Return the sequences of one interest as one, vectors side by side.

    Raises:
        ValueError: they differ in the number of entries.
    """
    parts = [sequences[name] for name in interest.sequence]
    if len({part.num_values for part in parts}) > 1:
        sizes = {name: sequences[name].num_values for name in interest.sequence}
        raise ValueError(f"aligned sequences need equal lengths in every sample; entries in this batch: {sizes}")
    return parts[0].with_values(torch.cat([part.flat_values for part in parts], dim=1), parts[0].weights)


def synthetic() -> DinConfig:
    """Return a small DIN for `recis.models.synthetic.SyntheticClicks`: seconds on a laptop."""
    return DinConfig(
        tables=synthetic_tables(8, sequences=True),
        interests=(Interest(target=("item_id", "category"), sequence=("clicked_items", "clicked_categories")),),
        dense=synthetic_dense(),
        attention_hidden=(16,),
        hidden=(32, 16),
    )
