"""Negatives for retrieval: how often an item is seen, which items are drawn, and what the softmax must correct for.

    candidates of a batch = its own B items (in-batch) + N items drawn from a catalogue, shared by all samples
    expected count of item j among them = B q(j) + N p(j)      q = share of the training stream, p = the sampler's probability
    corrected logit = <u, v_j> / temperature - log(expected count)

Without the correction popular items are punished for being drawn often ("logQ correction", Yi et al. 2019,
doi:10.1145/3298689.3346996; mixed negatives: Yang et al. 2020, doi:10.1145/3366424.3386195). q comes from streaming counts in
a count-min sketch of fixed size. Draws are counter-based (Philox): the only state is how many were made, a buffer in the
model's `state_dict()`, so a resumed run draws on as if nothing had happened.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from recis.errors import ConfigError
from recis.jagged import KeyedJaggedTensor
from recis_kernels.philox import table_key, words

if TYPE_CHECKING:
    from recis.io.batch import Batch

_MULTIPLIERS = (-7046029254386353131, -4417276706812531889)  # odd, from splitmix64 and xxHash
_WIDTH_BITS = 18


class ItemFrequency(nn.Module):
    """Counts of ids in the training stream: a count-min sketch, 2 rows of 2^18 int64 (4 MiB), never below the truth."""

    counts: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(len(_MULTIPLIERS), 1 << _WIDTH_BITS, dtype=torch.int64))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    def observe(self, ids: Tensor) -> None:
        """Count one sighting of each of ids [N] int64."""
        for row, cells in zip(self.counts, self._cells(ids), strict=True):
            row.index_add_(0, cells, torch.ones_like(cells))
        self.total += ids.numel()

    def count(self, ids: Tensor) -> Tensor:
        """Return how often each of ids [N] was seen, int64 [N]: at least the truth."""
        return torch.stack([row[cells] for row, cells in zip(self.counts, self._cells(ids), strict=True)]).amin(0)

    def share(self, ids: Tensor) -> Tensor:
        """Return the share [N] float32 of the stream that each id had; an unseen one counts as seen once."""
        return self.count(ids).clamp(min=1) / self.total.clamp(min=1)

    @staticmethod
    def _cells(ids: Tensor) -> list[Tensor]:
        return [((ids * multiplier) >> (64 - _WIDTH_BITS)) & ((1 << _WIDTH_BITS) - 1) for multiplier in _MULTIPLIERS]


class Negatives(Protocol):
    """Which catalogue items are drawn for a batch, and which of them a sample keeps."""

    @property
    def num(self) -> int:
        """Items drawn per batch, with replacement."""
        ...

    def probabilities(self, counts: Tensor) -> Tensor:
        """Return p [M] float64, summing to 1, of catalogue items with these stream counts [M]."""
        ...

    def keep(self, logits: Tensor) -> Tensor:
        """Return the columns of corrected logits [B, num] that each sample keeps as negatives."""
        ...


@dataclass(frozen=True, slots=True)
class UniformNegatives:
    """Every catalogue item is equally likely."""

    num: int

    def __post_init__(self) -> None:
        _check_num(self)

    def probabilities(self, counts: Tensor) -> Tensor:
        return torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)

    def keep(self, logits: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True, slots=True)
class PopularNegatives:
    """Likely as (1 + count)^power of the training stream; 0.75 as in word2vec. Cost: one pass over the catalogue per step."""

    num: int
    power: float = 0.75

    def __post_init__(self) -> None:
        _check_num(self)
        if not 0 <= self.power < float("inf"):
            raise ConfigError(f"PopularNegatives: power must be finite and not negative; got {self.power}")

    def probabilities(self, counts: Tensor) -> Tensor:
        weights = (1.0 + counts.double()) ** self.power
        return weights / weights.sum()

    def keep(self, logits: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True, slots=True)
class HardNegatives:
    """Draw a pool, then keep for each sample the `num_kept` items that its user tower now ranks highest.

    What is kept are the largest terms of the pool's softmax, so the loss is close to that of the whole pool, and its gradient
    to that of the mistakes.
    """

    num_kept: int
    pool: UniformNegatives | PopularNegatives

    def __post_init__(self) -> None:
        if not 1 <= self.num_kept <= self.pool.num:
            raise ConfigError(
                f"HardNegatives: num_kept must lie in [1, {self.pool.num}], its pool; got {self.num_kept}"
            )

    @property
    def num(self) -> int:
        return self.pool.num

    def probabilities(self, counts: Tensor) -> Tensor:
        return self.pool.probabilities(counts)

    def keep(self, logits: Tensor) -> Tensor:
        return logits.topk(self.num_kept, dim=1).values


class Catalogue:
    """Items that can be drawn: their ids and features.

    Args:
        items: one row per item; what the item tower reads.
        key: the sparse feature that is the item's id, exactly one per row, all different.
    """

    def __init__(self, items: "Batch", key: str) -> None:
        ids = one_id_per_row(items.sparse, key)
        if len(ids) == 0:
            raise ConfigError("a catalogue needs at least one item")
        self.sorted_ids, order = ids.sort()
        if bool((self.sorted_ids[1:] == self.sorted_ids[:-1]).any()):
            twice = int(self.sorted_ids[1:][self.sorted_ids[1:] == self.sorted_ids[:-1]][0])
            raise ConfigError(f"catalogue: item {twice} is there twice; give each item once")
        self._items, self._order = items, order

    def __len__(self) -> int:
        return len(self.sorted_ids)

    def select(self, index: Tensor) -> "Batch":
        """Return items by their place [N] in `sorted_ids`, repeats allowed, without labels."""
        rows = self._order[index]
        return replace(
            self._items,
            sparse=take_samples(self._items.sparse, rows),
            dense=self._items.dense[rows],
            labels=self._items.labels.new_empty(len(rows), 0),
            label_mask=None,
            label_weights=None,
            weights=self._items.weights.new_ones(len(rows)),
            group_ids=None,
            extras={},
            num_samples=len(rows),
        )

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (place in `sorted_ids`, whether it is there) of ids [N]; the place of an absent one means nothing."""
        place = torch.searchsorted(self.sorted_ids, ids).clamp(max=len(self) - 1)
        return place, self.sorted_ids[place] == ids


class CatalogueSampler(nn.Module):
    """Draws catalogue items for each training step.

    Args:
        negatives: which items are likely.
        catalogue: makes the catalogue; called at the first draw, so that a model loaded to predict needs none.
        seed: of the draws.

    Attributes:
        num_draws: [1] int64, steps drawn so far: a buffer, and the whole state.
    """

    num_draws: Tensor

    def __init__(self, negatives: Negatives, catalogue: Callable[[], Catalogue], *, seed: int) -> None:
        super().__init__()
        self.negatives = negatives
        self.key = table_key(seed, "negatives")
        self.register_buffer("num_draws", torch.zeros(1, dtype=torch.int64))
        self._make_catalogue = catalogue
        self._catalogue: Catalogue | None = None

    @property
    def catalogue(self) -> Catalogue:
        """The items that can be drawn."""
        if self._catalogue is None:
            self._catalogue = self._make_catalogue()
        return self._catalogue

    def draw(self, frequency: ItemFrequency) -> tuple[Tensor, Tensor]:
        """Return (places [N] in the catalogue of the drawn items, probabilities p [M] float64 of all items)."""
        p = self.negatives.probabilities(frequency.count(self.catalogue.sorted_ids))
        random = words(self.num_draws, 2 * self.negatives.num, self.num_draws.new_tensor([self.key]), 0).view(-1, 2)
        uniform = ((random[:, 0] >> 5 << 26) + (random[:, 1] >> 6)).double() * 2**-53  # 53 bits, in [0, 1)
        self.num_draws += 1
        steps = p.cumsum(0)
        places = torch.searchsorted(steps, uniform * steps[-1], right=True)
        return places.clamp(max=len(p) - 1), p


def one_id_per_row(sparse: KeyedJaggedTensor, key: str) -> Tensor:
    """Return the ids [B] of a feature with exactly one id per sample.

    Raises:
        ValueError: it has another number of ids. (That no sample has two and another none is not read.)
    """
    feature = sparse[key]
    if feature.num_values != sparse.stride:
        raise ValueError(
            f"feature {key!r} must have one id in each of {sparse.stride} samples; it has {feature.num_values}"
        )
    return feature.flat_values


def take_samples(sparse: KeyedJaggedTensor, rows: Tensor) -> KeyedJaggedTensor:
    """Return samples rows [N] of all features, in that order, repeats allowed."""
    num_keys = len(sparse.keys)
    bags = (torch.arange(num_keys, device=rows.device)[:, None] * sparse.stride + rows).flatten()
    lengths = sparse.lengths[bags]
    ends = lengths.cumsum(0)
    num_values = int(ends[-1]) if len(ends) else 0
    shift = sparse.offsets[:-1][bags] - (ends - lengths)
    source = torch.arange(num_values, device=rows.device) + shift.repeat_interleave(lengths, output_size=num_values)
    return KeyedJaggedTensor(
        sparse.keys,
        sparse.values[source],
        lengths=lengths,
        weights=None if sparse.weights is None else sparse.weights[source],
        stride=len(rows),
    )


def _check_num(negatives: UniformNegatives | PopularNegatives) -> None:
    if negatives.num < 1:
        raise ConfigError(f"{type(negatives).__name__}: num must be at least 1; got {negatives.num}")
