"""Retrieval from a state: a softmax over the items of a catalogue, whole or sampled, and the best items.

    s(h, v) = <h, v> / temperature;   loss = - log p(y | h),   p = exp s(h, y) / Z
    whole     Z = sum over the catalogue of exp s(h, v), by `recis_kernels.linear_cross_entropy`: never [T, V] in memory
    sampled   Z = exp s(h, y) + sum over drawn v != y of exp(s(h, v) - log(N p(v)))

T = states, V = items, N = draws per step with probabilities p (`recis.models.sampling`), shared by all states of the step. The
correction log(N p) makes the sampled Z right in expectation; without it popular items would be punished for being drawn often
(logQ correction: Bengio and Senecal 2008; Yi et al. 2019, doi:10.1145/3298689.3346996). The own item is always there once, so
it needs none. Item vectors are rows of dynamic tables: those of the features in `features`, side by side, looked up in each
step, so every item of the catalogue (whole), or every drawn one, earns its rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from recis.embedding import EmbeddingCollection, TableSet
from recis.errors import ConfigError
from recis.jagged import JaggedTensor
from recis.models.sampling import (
    Catalogue,
    CatalogueSampler,
    HardNegatives,
    ItemFrequency,
    PopularNegatives,
    UniformNegatives,
)
from recis_kernels.jagged import bag_of_value
from recis_kernels.linear_cross_entropy import linear_cross_entropy

IGNORED = -100
SCORES_AT_ONCE = 1 << 24  # 64 MiB of them while the best items are searched


class Softmax(Protocol):
    """How the loss of a step is made."""

    @property
    def temperature(self) -> float: ...

    def loss(self, head: "RetrievalHead", states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return sum of weights [T] * -log p(targets [T] | states [T, W]), a scalar."""
        ...


@dataclass(frozen=True, slots=True)
class FullSoftmax:
    """All items of the catalogue, exact."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self)

    def loss(self, head: "RetrievalHead", states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        places, known = head.catalogue.find(targets)
        return linear_cross_entropy(
            states,
            head.all_vectors(),
            torch.where(known, places, IGNORED),
            token_weights=weights,
            reduction="sum",
            ignore_index=IGNORED,
            temperature=self.temperature,
        )


@dataclass(frozen=True, slots=True)
class SampledSoftmax:
    """The own item and drawn ones; cost and memory are those of [T, N]."""

    negatives: UniformNegatives | PopularNegatives | HardNegatives
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self)

    def loss(self, head: "RetrievalHead", states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        assert head.sampler is not None
        assert head.frequency is not None
        places, known = head.catalogue.find(targets)
        head.frequency.observe(targets[known])
        drawn, p = head.sampler.draw(head.frequency)
        vectors = head.vectors_at(torch.cat([places, drawn])) / self.temperature
        own, others = vectors.split([len(places), len(drawn)])
        correction = (self.negatives.num * p[drawn]).log().float()
        scores = states @ others.T - correction
        scores = self.negatives.keep(scores.masked_fill(places[:, None] == drawn, -torch.inf))
        mine = (states * own).sum(1, keepdim=True)
        losses = torch.cat([mine, scores], dim=1).logsumexp(1) - mine.squeeze(1)
        return (torch.where(known, losses, 0.0) * weights).sum()


class RetrievalHead(nn.Module):
    """Item vectors and what is done with them; no parameters of its own.

    Args:
        tables: the model's tables.
        features: single-id features of an item whose rows, side by side, are its vector; the first is its id.
        catalogue: makes the items; called when first needed. They must have these features.
        softmax: of the loss.
        seed: of the draws.

    Attributes:
        width: W of item vectors and states.
        sampler, frequency: draws, and how often each item was a target; None with a whole softmax.
    """

    def __init__(
        self,
        tables: TableSet,
        features: Sequence[str],
        catalogue: Callable[[], Catalogue],
        softmax: Softmax,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.items = EmbeddingCollection(tables, features=tuple(features))
        self.width = sum(self.items.embedding_dims.values())
        self.sampler, self.frequency = None, None
        if isinstance(softmax, SampledSoftmax):
            self.sampler = CatalogueSampler(softmax.negatives, catalogue, seed=seed)
            self.frequency = ItemFrequency()
        self._make_catalogue: Callable[[], Catalogue] = catalogue
        self._catalogue: Catalogue | None = None

    @property
    def catalogue(self) -> Catalogue:
        """The items."""
        if self.sampler is not None:
            return self.sampler.catalogue
        if self._catalogue is None:
            self._catalogue = self._make_catalogue()
        return self._catalogue

    def all_vectors(self) -> Tensor:
        """Return [V, W] in the order of `catalogue.sorted_ids`."""
        return self.vectors_at(torch.arange(len(self.catalogue)))

    def vectors_at(self, places: Tensor) -> Tensor:
        """Return vectors [N, W] of items by their place in the catalogue."""
        rows = self.items(self.catalogue.select(places).sparse)
        return torch.cat([part.flat_values for part in rows.values()], dim=1)

    def loss(self, states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the softmax's loss, float32, summed by weights.

        Args:
            states: [T, W].
            targets: [T] int64, ids; one that is not in the catalogue counts nothing.
            weights: [T] float32.
        """
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 would round away differences of scores
            return self.softmax.loss(self, states.float(), targets, weights)

    def log_prob(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return exact log p(targets [T] | states [T, W]), natural log, [T]; 0 where a target is not in the catalogue."""
        places, known = self.catalogue.find(targets)
        with torch.autocast(states.device.type, enabled=False):
            return -linear_cross_entropy(
                states.float(),
                self.all_vectors(),
                torch.where(known, places, IGNORED),
                reduction="none",
                ignore_index=IGNORED,
                temperature=self.softmax.temperature,
            )

    @torch.no_grad()
    def best(self, states: Tensor, k: int, *, without: JaggedTensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (ids [B, k] int64, scores [B, k]) of the items with the highest scores for states [B, W].

        Args:
            states: [B, W].
            k: at most the size of the catalogue.
            without: B bags of ids that must not come back; where too few are left, the last scores are -inf.

        Raises:
            ConfigError: k is not in [1, V].
        """
        ids = self.catalogue.sorted_ids
        if not 1 <= k <= len(ids):
            raise ConfigError(f"k must lie in [1, {len(ids)}], the items of the catalogue; got {k}")
        with torch.autocast(states.device.type, enabled=False):
            vectors = self.all_vectors() / self.softmax.temperature
            found = []
            rows = max(1, SCORES_AT_ONCE // len(ids))
            for first in range(0, len(states), rows):
                scores = states[first : first + rows].float() @ vectors.T
                if without is not None:
                    self._strike(scores, without, first)
                found.append(scores.topk(k, dim=1))
        if not found:
            return ids.new_empty(0, k), states.new_empty(0, k)
        return torch.cat([ids[part.indices] for part in found]), torch.cat([part.values for part in found])

    def _strike(self, scores: Tensor, without: JaggedTensor, first: int) -> None:
        offsets = without.offsets.long()[first : first + len(scores) + 1]
        seen = without.flat_values[offsets[0] : offsets[-1]]
        places, known = self.catalogue.find(seen)
        bag = bag_of_value(offsets - offsets[0], len(seen))
        scores[bag[known], places[known]] = -torch.inf


def _check_temperature(softmax: FullSoftmax | SampledSoftmax) -> None:
    if not 0 < softmax.temperature < float("inf"):
        raise ConfigError(
            f"{type(softmax).__name__}: temperature must be finite and above 0; got {softmax.temperature}"
        )
