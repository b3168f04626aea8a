"""The ranker of `retail_sasrec` and `retail_hstu`: a sequence encoder reads a customer's purchase lines, candidates are ranked.

    z_c = SASRec: [e_c * h, h], h = state after the last line          HSTU: [e_c * y_c, y_c], y_c = state of candidate c, put
    score_c = w x_c + MLP([x_c, z_c])                                   behind the lines at the time of the cut-off

x = the standardised dense features of the candidates, e = rows of the item table, which lines and candidates share; either x or
z may be left out for an ablation. The loss is `retail_model.list_loss`. As there, single numbers of the rows are dropped in
training, and the lists are those of `retail_snapshots`; sequences are jagged from file to score.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingCollection, TableConfig
from recis.errors import ConfigError
from recis.models.hstu import Hstu, HstuEncoder
from recis.models.layers import MLP
from recis.models.next_item import batch_times
from recis.models.sasrec import SasRec, SasRecEncoder
from recis.models.sequence_layers import with_start
from recis.recipes.retail_model import CLAMP
from recis_kernels.jagged_runs import concat_bags, split_bags

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """What a reader gets.

    Attributes:
        rows: [L, D] rows of the lines' items, offsets [B + 1], times [L] int64, ascending.
        candidates: [B, C, D].
        now: [B] int64, the time of the cut-off.
    """

    rows: Tensor
    offsets: Tensor
    times: Tensor
    candidates: Tensor
    now: Tensor


class ReaderConfig(Protocol):
    """How lines are read."""

    def build(self, width: int) -> nn.Module:
        """Return a module from Lines to a state [B, C, D] per candidate; [B, 1, D] where all share one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LastState:
    """SASRec: one state of the customer for all candidates."""

    encoder: SasRec

    def build(self, width: int) -> nn.Module:
        return _LastState(self.encoder, width)


class _LastState(nn.Module):
    def __init__(self, config: SasRec, width: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.encoder = SasRecEncoder(config, width)

    def forward(self, lines: Lines) -> Tensor:
        rows, offsets = with_start(self.start, lines.rows, lines.offsets)
        return self.encoder(rows, offsets)[offsets[1:] - 1].unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateStates:
    """HSTU: each candidate behind the lines, where it attends to them and to no other candidate."""

    encoder: Hstu

    def build(self, width: int) -> nn.Module:
        return _CandidateStates(self.encoder, width)


class _CandidateStates(nn.Module):
    def __init__(self, config: Hstu, width: int) -> None:
        super().__init__()
        self.encoder = HstuEncoder(config, width)

    def forward(self, lines: Lines) -> Tensor:
        size, count = lines.candidates.shape[:2]
        ends = torch.arange(size + 1) * count
        rows, offsets = concat_bags(lines.rows, lines.offsets, lines.candidates.flatten(0, 1), ends)
        times, _ = concat_bags(lines.times, lines.offsets, lines.now.repeat_interleave(count), ends)
        states = self.encoder(rows, offsets, times, num_targets=torch.full((size,), count))
        return split_bags(states, lines.offsets, ends, len(lines.rows))[1].view_as(lines.candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRankerConfig:
    """One table with the features `candidates` and `items`."""

    tables: tuple[TableConfig, ...]
    reader: ReaderConfig
    num_candidates: int
    mean: tuple[float, ...]
    """Of each fact and then of each feature of the customer."""
    std: tuple[float, ...]
    num_facts: int
    use_facts: bool = True
    """Whether scores read the dense features; False leaves ids and times alone."""
    use_lines: bool = True
    """Whether scores read ids and lines; False leaves the dense features alone."""
    hidden: tuple[int, ...] = (96, 48)
    dropout: float = 0.1
    id_dropout: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.use_facts or self.use_lines):
            raise ConfigError(
                "a ranker without dense features and without lines has nothing to score by; leave one of them"
            )

    def build(self) -> nn.Module:
        """Return the model with fresh weights."""
        return SequenceRanker(self)


class SequenceRanker(nn.Module):
    """forward(batch) -> scores [B, C]."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: SequenceRankerConfig) -> None:
        super().__init__()
        self.config = config
        self.rows = EmbeddingCollection(config.tables, seed=config.seed) if config.use_lines else None
        dim = 0 if self.rows is None else self.rows.embedding_dims["candidates"]
        self.register_buffer("mean", torch.tensor(config.mean))
        self.register_buffer("std", torch.tensor(config.std))
        self.reader = None if self.rows is None else config.reader.build(dim)
        width = len(config.mean) if config.use_facts else 0
        self.mlp = MLP(width + 2 * dim, config.hidden, out_width=1, activation=nn.SiLU, dropout=config.dropout)
        self.linear = nn.Linear(width, 1) if config.use_facts else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
        self.drop = nn.Dropout(config.id_dropout)

    def forward(self, batch: "Batch") -> Tensor:
        if self.linear is None:
            return self.mlp(self._ids(batch)).squeeze(2)
        dense = self._dense(batch)
        inputs = dense if self.rows is None else torch.cat([dense, self._ids(batch)], dim=2)
        return (self.linear(dense) + self.mlp(inputs)).squeeze(2)

    def _dense(self, batch: "Batch") -> Tensor:
        """Return [B, C, K], standardised."""
        config = self.config
        facts = batch.dense_feature("facts").view(batch.num_samples, config.num_candidates, config.num_facts)
        customer = batch.dense_feature("customer").unsqueeze(1).expand(-1, config.num_candidates, -1)
        return ((torch.cat([facts, customer], dim=2) - self.mean) / self.std).clamp(-CLAMP, CLAMP)

    def _ids(self, batch: "Batch") -> Tensor:
        """Return [B, C, 2 D]: candidate times state, and state."""
        assert self.rows is not None
        assert self.reader is not None
        found, config = self.rows(batch.sparse), self.config
        items, now = found["items"], batch.extras["now"]
        assert isinstance(now, Tensor)
        candidates = found["candidates"].flat_values.unflatten(0, (batch.num_samples, config.num_candidates))
        candidates = self.drop(candidates)
        offsets = items.offsets.long()
        lines = Lines(
            rows=self.drop(items.flat_values),
            offsets=offsets,
            times=batch_times(batch, "times", offsets),
            candidates=candidates,
            now=now.long(),
        )
        states = self.reader(lines)
        return torch.cat([candidates * states, states.expand_as(candidates)], dim=2)
