"""The ranker of `online_retail`: target attention over a customer's items on dynamic tables, joined with dense features.

    e_c = row of candidate c;  k_t = row of own item t + row of its age                     one table for both kinds of items
    a_ct = softmax_t (e_c W k_t / sqrt(D));  p_c = sum_t a_ct k_t                           DIN's pooling, as matrix products
    score_c = w x_c + MLP([x_c, e_c * p_c, p_c])                                            x = standardised dense features

    loss = - sum_b 1 / min(20, n_b) sum over bought c of log softmax(score_b)_c             n_b = items the customer buys

B lists of C candidates, T own items, D wide rows. Rows alone would mostly remember what sold in the training windows, so
id vectors are dropped whole with a high probability in training and enter only through their products and pooled history.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingCollection, TableConfig
from recis.models.layers import MLP

if TYPE_CHECKING:
    from recis.io.batch import Batch

TOP = 20
CLAMP = 5.0  # standard deviations a feature may lie from its mean


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerConfig:
    """A table with the features `candidates` and `history`, one with `history_age`, of equal width."""

    tables: tuple[TableConfig, ...]
    num_candidates: int
    mean: tuple[float, ...]
    """Of each fact and then of each feature of the customer."""
    std: tuple[float, ...]
    num_facts: int
    history_items: int
    hidden: tuple[int, ...] = (96, 48)
    dropout: float = 0.1
    id_dropout: float = 0.3
    seed: int = 0

    def build(self) -> nn.Module:
        """Return the model with fresh weights."""
        return Ranker(self)


class Ranker(nn.Module):
    """forward(batch) -> scores [B, C]."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.config = config
        self.rows = EmbeddingCollection(config.tables, seed=config.seed)
        dim = self.rows.embedding_dims["candidates"]
        self.register_buffer("mean", torch.tensor(config.mean))
        self.register_buffer("std", torch.tensor(config.std))
        width = len(config.mean)
        self.query = nn.Linear(dim, dim)
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        self.mlp = MLP(width + 2 * dim, config.hidden, out_width=1, activation=nn.SiLU, dropout=config.dropout)
        self.drop = nn.Dropout(config.id_dropout)

    def forward(self, batch: "Batch") -> Tensor:
        size, config = batch.num_samples, self.config
        facts = batch.dense_feature("facts").view(size, config.num_candidates, config.num_facts)
        customer = batch.dense_feature("customer").unsqueeze(1).expand(-1, config.num_candidates, -1)
        dense = ((torch.cat([facts, customer], dim=2) - self.mean) / self.std).clamp(-CLAMP, CLAMP)
        ids = self._ids(batch)
        return (self.linear(dense) + self.mlp(torch.cat([dense, ids], dim=2))).squeeze(2)

    def _ids(self, batch: "Batch") -> Tensor:
        """Return [B, C, 2 D]: candidate times pooled history, and pooled history."""
        rows, config = self.rows(batch.sparse), self.config
        candidates = rows["candidates"].flat_values.unflatten(0, (batch.num_samples, config.num_candidates))
        items, ages = rows["history"], rows["history_age"]
        keys = items.with_values(items.flat_values + ages.flat_values).to_padded(max_length=config.history_items)
        positions = torch.arange(config.history_items, device=keys.device)
        absent = positions >= items.lengths.unsqueeze(1)
        candidates, keys = self.drop(candidates), self.drop(keys)
        scores = self.query(candidates) @ keys.transpose(1, 2) / math.sqrt(keys.shape[2])
        weights = scores.masked_fill(absent.unsqueeze(1), -1e9).softmax(dim=2)
        pooled = weights @ keys
        return torch.cat([candidates * pooled, pooled], dim=2)


def list_loss(scores: Tensor, batch: "Batch") -> Tensor:
    """Return the loss above, summed over lists [B, C] by their weights."""
    bought, count = batch.extras["bought"], batch.extras["num_bought"]
    assert isinstance(bought, Tensor)
    assert isinstance(count, Tensor)
    per_list = (scores.log_softmax(dim=1) * bought).sum(1) / count.clamp(1, TOP)
    return -(per_list * batch.weights).sum()


def same(scores: Tensor) -> Tensor:
    """Return the scores as they are: they order a list and are no probabilities."""
    return scores
