"""Two towers for retrieval: a user vector and an item vector whose product ranks items.

    u = norm(MLP_user([user features]));   v = norm(MLP_item([item features]));   logit = <u, v> / temperature

In training the other items of the batch (and items drawn from a catalogue) are negatives of a softmax, each logit corrected
by the log of its expected number among the candidates (`recis.models.sampling`):

    output [B, 1 + B + N]: column 0 the sample's own item, then the batch's items, then drawn ones;
                           -inf where one of them is the sample's own item again

so `recis.models.losses.softmax_loss` is -log softmax of column 0, and a sample whose label is 0 only lends its item as a
negative. Evaluated, the output is the plain logit [B, 1] (whose softmax loss says nothing: it is 0). Pass
`score=positive_score` to the trainer: metrics then see column 0 in both. Negatives come from the micro-batch, so accumulation
is not the big batch here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recis.embedding import TableConfig, TableSet
from recis.errors import ConfigError
from recis.models.inputs import DenseInput, PooledInputs
from recis.models.layers import MLP
from recis.models.sampling import (
    Catalogue,
    CatalogueSampler,
    HardNegatives,
    ItemFrequency,
    PopularNegatives,
    UniformNegatives,
    one_id_per_row,
)
from recis.models.synthetic import SyntheticClicks, synthetic_tables

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """What one side reads, and its MLP."""

    features: tuple[str, ...]
    """Pooled sparse features."""
    dense: tuple[DenseInput, ...] = ()
    hidden: tuple[int, ...] = (128,)
    """Hidden widths; a last linear layer to the common width follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTowerConfig:
    """Tables of both towers; one table may serve both (items and the user's history of items)."""

    tables: tuple[TableConfig, ...]
    user: Tower
    item: Tower
    item_key: str
    """The item tower's feature that is the item's id: exactly one per sample."""
    out_width: int = 64
    """Width of user and item vectors."""
    temperature: float = 0.05
    normalize: bool = True
    """Scale vectors to length 1, so that the product is a cosine."""
    negatives: UniformNegatives | PopularNegatives | HardNegatives | None = None
    """Items drawn for every step besides those of the batch; None: in-batch only."""
    catalogue: Callable[[], Catalogue] | None = None
    """Makes the items to draw from."""
    seed: int = 0
    """Of the tables' first weights and the draws."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"TwoTower: temperature must be finite and above 0; got {self.temperature}")
        if (self.negatives is None) != (self.catalogue is None):
            raise ConfigError("TwoTower: negatives are drawn from a catalogue: give both, or neither for in-batch only")
        if self.item_key not in self.item.features:
            raise ConfigError(
                f"TwoTower: item_key {self.item_key!r} must be a feature of the item tower; it reads {self.item}"
            )
        both = set(self.user.features) & set(self.item.features)
        if both:
            raise ConfigError(f"TwoTower: {sorted(both)} cannot be in both towers; an item's vector knows no user")

    def build(self) -> "TwoTower":
        """Return the model with fresh weights."""
        return TwoTower(self)


class TwoTower(nn.Module):
    """forward(batch) -> [B, 1 + B + N] corrected logits in training, [B, 1] in evaluation."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.config = config
        tables = TableSet(config.tables, seed=config.seed)
        self.user_inputs = PooledInputs(tables, config.user.dense, features=config.user.features)
        self.item_inputs = PooledInputs(tables, config.item.dense, features=config.item.features)
        self.user_mlp = MLP(self.user_inputs.width, config.user.hidden, out_width=config.out_width)
        self.item_mlp = MLP(self.item_inputs.width, config.item.hidden, out_width=config.out_width)
        self.frequency = ItemFrequency()
        self.sampler = None
        if config.negatives is not None and config.catalogue is not None:
            self.sampler = CatalogueSampler(config.negatives, config.catalogue, seed=config.seed)

    def user_vectors(self, batch: "Batch") -> Tensor:
        """Return u [B, out_width]; reads only user features."""
        return self._vectors(self.user_mlp(self.user_inputs.flat(batch)))

    def item_vectors(self, batch: "Batch") -> Tensor:
        """Return v [B, out_width]; reads only item features."""
        return self._vectors(self.item_mlp(self.item_inputs.flat(batch)))

    def _vectors(self, out: Tensor) -> Tensor:
        out = out.float()
        return F.normalize(out, dim=1) if self.config.normalize else out

    def _products(self, users: Tensor, items: Tensor) -> Tensor:
        """Return every <u, v> / temperature [B, N] in float32: bfloat16 would round away what the temperature spreads."""
        with torch.autocast(users.device.type, enabled=False):
            return users @ items.T / self.config.temperature

    def forward(self, batch: "Batch") -> Tensor:
        users, items = self.user_vectors(batch), self.item_vectors(batch)
        own = (users * items).sum(1, keepdim=True) / self.config.temperature
        if not self.training:
            return own
        ids = one_id_per_row(batch.sparse, self.config.item_key)
        self.frequency.observe(ids)
        expected = len(ids) * self.frequency.share(ids)
        drawn = None
        if self.sampler is not None:
            places, p = self.sampler.draw(self.frequency)
            num = self.sampler.negatives.num
            place, known = self.sampler.catalogue.find(ids)
            expected = expected + num * torch.where(known, p[place], 0.0).float()
            drawn = self._drawn(users, ids, places, len(ids), num * p[places].float())
        correction = expected.log()
        others = self._products(users, items) - correction
        others = others.masked_fill(ids[:, None] == ids, -torch.inf)
        columns = [own - correction[:, None], others]
        return torch.cat([*columns, drawn] if drawn is not None else columns, dim=1)

    def _drawn(self, users: Tensor, ids: Tensor, places: Tensor, num_samples: int, expected: Tensor) -> Tensor:
        """Return corrected logits [B, kept] of the drawn items, -inf where one is the sample's own."""
        assert self.sampler is not None
        catalogue = self.sampler.catalogue
        drawn_ids = catalogue.sorted_ids[places]
        expected = expected + num_samples * self.frequency.share(drawn_ids)
        logits = self._products(users, self.item_vectors(catalogue.select(places))) - expected.log()
        return self.sampler.negatives.keep(logits.masked_fill(ids[:, None] == drawn_ids, -torch.inf))


def positive_score(output: Tensor) -> Tensor:
    """Return sigmoid of column 0 [B, 1] of a TwoTower's output: what metrics and predictions read."""
    return output[:, :1].sigmoid()


def synthetic_catalogue() -> Catalogue:
    """Return the items of SyntheticClicks."""
    return Catalogue(SyntheticClicks().items(), "item_id")


def synthetic() -> TwoTowerConfig:
    """Return small towers for `recis.models.synthetic.SyntheticClicks` with drawn negatives: seconds on a laptop."""
    return TwoTowerConfig(
        tables=synthetic_tables(8),
        user=Tower(
            features=("user_id", "clicked_items", "clicked_categories"), dense=(DenseInput("profile", 2),), hidden=(32,)
        ),
        item=Tower(features=("item_id", "category"), dense=(DenseInput("price"),), hidden=(32,)),
        item_key="item_id",
        out_width=16,
        temperature=0.2,
        negatives=UniformNegatives(50),
        catalogue=synthetic_catalogue,
    )
