"""A model that predicts the next item after every prefix of a user's sequence: an encoder and a retrieval head.

    rows     [start], then for each item its features' rows side by side        start = a learned row
    states   encoder(rows): state t has seen start and the first t items
    loss     sum over positions t of - log p(item t + 1 | state t)               softmax over a catalogue (retrieval_head)

In training forward(batch) gives that sum, weighted per sample: a scalar, because the gradients of a whole softmax are made
while its blocks of scores are at hand. Evaluated it gives [B, 2]: the exact sum of log p over a sample's items, and how many
they are. Pass `loss=next_item_loss` and `score=next_item_score` to the trainer. After training, `best` lists the items that
come next; the trainer's own metrics see one score per sample and cannot rank a catalogue, so recipes rank in `evaluate`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingCollection, TableConfig, TableSet
from recis.errors import ConfigError, nearest
from recis.jagged import JaggedTensor
from recis.models.din import Interest, aligned
from recis.models.retrieval_head import RetrievalHead, Softmax
from recis.models.sampling import Catalogue
from recis.models.sequence_layers import is_last, with_start
from recis_kernels.jagged import bag_of_value
from recis_kernels.segment import segment_sum

if TYPE_CHECKING:
    from recis.io.batch import Batch


class EncoderConfig(Protocol):
    """What makes an encoder; SasRec and Hstu are two."""

    def build(self, width: int) -> nn.Module:
        """Return a module with forward(rows [L, width], offsets [B + 1], times [L] or None) -> [L, width], causal."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NextItemConfig:
    """Tables shared by the items of the history and those of the catalogue."""

    tables: tuple[TableConfig, ...]
    history: Interest
    """`sequence`: features with pooling "none", oldest first; `target`: the catalogue's features, in the same order."""
    encoder: EncoderConfig
    softmax: Softmax
    catalogue: Callable[[], Catalogue]
    """Makes the items; its key is the first feature of `history.target`."""
    times: str | None = None
    """An extra of the batch with the time of each item of the history, int64, ascending; None: no times."""
    seed: int = 0
    """Of the tables' first weights and the draws."""

    def __post_init__(self) -> None:
        if len(self.history.target) != len(self.history.sequence):
            raise ConfigError(
                f"NextItemConfig: target and sequence must pair up feature by feature; got {self.history}"
            )

    def build(self) -> "NextItem":
        """Return the model with fresh weights."""
        return NextItem(self)


class NextItem(nn.Module):
    """forward(batch) -> scalar loss in training, [B, 2] in evaluation; see above."""

    def __init__(self, config: NextItemConfig) -> None:
        super().__init__()
        self.config = config
        tables = TableSet(config.tables, seed=config.seed)
        check_shared(tables, config.history)
        self.sequences = EmbeddingCollection(tables, features=config.history.sequence)
        self.head = RetrievalHead(tables, config.history.target, config.catalogue, config.softmax, seed=config.seed)
        width = self.head.width
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.encoder = config.encoder.build(width)

    def states(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Return (states [L + B, W], offsets [B + 1]): of each sample one state more than it has items."""
        history = aligned(self.config.history, self.sequences(batch.sparse))
        offsets = history.offsets.long()
        rows, longer = with_start(self.start, history.flat_values, offsets)
        times = (
            None if self.config.times is None else _with_first(batch_times(batch, self.config.times, offsets), offsets)
        )
        return self.encoder(rows, longer, times), longer

    def user_states(self, batch: "Batch") -> Tensor:
        """Return [B, W], the state after all items of each sample."""
        states, offsets = self.states(batch)
        return states[offsets[1:] - 1]

    def forward(self, batch: "Batch") -> Tensor:
        states, offsets = self.states(batch)
        before = states[(~is_last(offsets, len(states))).nonzero().squeeze(1)]
        targets = batch.sparse[self.config.history.sequence[0]]
        bags, ids = targets.offsets.long(), targets.flat_values
        if self.training:
            return self.head.loss(before, ids, batch.weights[bag_of_value(bags, len(ids))])
        log_prob = self.head.log_prob(before, ids)
        known = self.head.catalogue.find(ids)[1].float()
        return segment_sum(torch.stack([log_prob, known], dim=1), bags)

    def best(self, batch: "Batch", k: int, *, new_only: bool = False) -> tuple[Tensor, Tensor]:
        """Return (ids [B, k], scores [B, k]) of the items most likely next; new_only leaves out those of the history."""
        seen: JaggedTensor | None = batch.sparse[self.config.history.sequence[0]] if new_only else None
        with torch.no_grad():
            return self.head.best(self.user_states(batch), k, without=seen)


def next_item_loss(output: Tensor, batch: "Batch") -> Tensor:
    """Return the summed loss: the model's own scalar in training, else of [B, 2] the log probabilities by weight."""
    return output if output.ndim == 0 else -(output[:, 0] * batch.weights).sum()


def next_item_score(output: Tensor) -> Tensor:
    """Return [B, 1], the mean log probability of a sample's items (0 for none); of a training step its loss, [1, 1]."""
    if output.ndim == 0:
        return -output.reshape(1, 1)
    return output[:, :1] / output[:, 1:].clamp(min=1)


def check_shared(tables: TableSet, interest: Interest) -> None:
    """Raise ConfigError unless each feature of the sequence shares its table with that of the target at its place."""
    for mine, theirs in zip(interest.sequence, interest.target, strict=True):
        for name in (mine, theirs):
            if name not in tables.features:
                raise ConfigError(f"{interest}: no table has the feature {name!r}; {nearest(name, tables.features)}")
        if tables.features[mine][1] is not tables.features[theirs][1]:
            raise ConfigError(f"{interest}: {mine!r} and {theirs!r} must share a table; put both into its features")


def batch_times(batch: "Batch", name: str, offsets: Tensor) -> Tensor:
    """Return the times [L] int64 of the history's items.

    Raises:
        ConfigError: the batch has no such extra, or it is not lists of int64.
        ValueError: a sample has another number of times than items.
    """
    found = batch.extras.get(name)
    if not isinstance(found, JaggedTensor) or found.flat_values.dtype != torch.int64:
        raise ConfigError(
            f"times {name!r} must be an extra of the batch with a list of int64 per sample; got {found!r}; "
            f"{nearest(name, batch.extras)}"
        )
    if not torch.equal(found.offsets.long(), offsets):
        raise ValueError(f"times {name!r} must have one entry per item of the history; lengths differ")
    return found.flat_values


def _with_first(times: Tensor, offsets: Tensor) -> Tensor:
    """Return times [L + B] with the first time of each sequence twice; 0 for an empty one."""
    num_bags = offsets.numel() - 1
    bag = bag_of_value(offsets, len(times))
    out = times.new_zeros(len(times) + num_bags)
    out[torch.arange(len(times), device=times.device) + bag + 1] = times
    filled = offsets.diff() > 0
    out[(offsets[:-1] + torch.arange(num_bags, device=times.device))[filled]] = times[offsets[:-1][filled]]
    return out
