"""Embedding lookups as torch modules: pooled per bag, or one vector per id.

    EmbeddingBagCollection   {feature: [B, D]}; Tile(n) features [B, n, D]
        sum: Σ w v;   mean: Σ w v / Σ w;   no weights = all 1;   an empty bag or Σ w = 0 gives zeros
    EmbeddingCollection      {feature: JaggedTensor of [L, D]}, lengths and weights as they came

Features of one row store are looked up together: one unique, find, insert and gather whatever their number. `model.train()`
and `model.eval()` decide whether unknown ids may earn rows. Rows are no parameters: they are trained by SparseOptimizer and
saved by the checkpoint, and add nothing to `state_dict()`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from recis.embedding.config import Feature, TableConfig, Tile
from recis.embedding.lookups import StoreLookup
from recis.embedding.pooling import gather, pool, tile
from recis.embedding.rows import Asked, RowStore
from recis.embedding.table_set import TableSet
from recis.errors import ConfigError, nearest
from recis.jagged import KeyedJaggedTensor
from recis_kernels.bag_factors import bag_factors


@dataclass(frozen=True, slots=True)
class _StorePlan:
    """How the features of one store are taken out of batches with certain keys.

    Attributes:
        store: where they are looked up.
        features: in the order they are looked up: pooled ones first, each group in the order of the batch.
        num_pooled: how many of them are summed or averaged.
        runs: (first, last + 1) ranges of batch features, joined in this order; None: the whole batch as it is.
        tables: int32 [F], their tables' numbers.
        mean: which of the pooled take the mean: bool [num_pooled], or one bool for all.
    """

    store: RowStore
    features: tuple[Feature, ...]
    num_pooled: int
    runs: tuple[tuple[int, int], ...] | None
    tables: Tensor
    mean: Tensor | bool

    def part_of(self, batch: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Return these features of the batch, in order."""
        if self.runs is None:
            return batch
        cuts = sorted({0, len(batch.keys), *(end for run in self.runs for end in run)})
        pieces = batch.split([stop - start for start, stop in pairwise(cuts)])
        return KeyedJaggedTensor.concat([pieces[cuts.index(start)] for start, _ in self.runs])


Ranges = tuple[Tensor, Tensor, Tensor]
"""ids, offsets and tables, as RowStore.lookup takes them."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ahead:
    """A batch that was asked for before its turn: per store its part, the part's offsets, and the lookup under way."""

    batch: KeyedJaggedTensor
    parts: list[tuple[KeyedJaggedTensor, Tensor, Asked]]


class _Collection(nn.Module):
    """What both collections share: the tables, and a plan per layout of batch keys."""

    def __init__(
        self,
        tables: Sequence[TableConfig] | TableSet,
        *,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        process_group: Any = None,
        deterministic: bool = True,
        features: Sequence[str] | None = None,
    ) -> None:
        """Build the tables, or share those of a TableSet.

        Args:
            tables: configs, or a TableSet that other collections use too.
            seed: of the tables' random draws; needed with configs, and taken from a TableSet.
            device: where rows lie.
            process_group: None; rows shared by several processes come with the distributed part.
            deterministic: see TableSet.
            features: names to serve, in output order; None: all that fit this kind of collection. A bare name fits both;
                of a TableSet it goes to the EmbeddingBagCollection unless it is named here.

        Raises:
            ConfigError: a feature is unknown, or pooled in a way this collection does not serve.
        """
        super().__init__()
        if process_group is not None:
            raise ConfigError("process_group: this release holds all rows in one process; leave it None")
        if isinstance(tables, TableSet):
            self.table_set = tables
        else:
            if seed is None:
                raise ConfigError(f"{type(self).__name__}: give seed=; first weights are drawn from it")
            self.table_set = TableSet(tables, seed=seed, device=device, deterministic=deterministic)
        shared = isinstance(tables, TableSet)
        self.features: dict[str, Feature] = self._chosen(features, shared=shared)
        self._plans: dict[tuple[str, ...], tuple[_StorePlan, ...]] = {}
        self._ahead: list[_Ahead] = []
        self._latest: KeyedJaggedTensor | None = None

    def _chosen(self, names: Sequence[str] | None, *, shared: bool) -> dict[str, Feature]:
        known = {name: feature for name, (feature, _) in self.table_set.features.items()}
        if names is None:
            names = [name for name, feature in known.items() if self._takes(feature, shared=shared)]
            if shared and not names and known:
                raise ConfigError(f"{type(self).__name__}: no feature of these tables is pooled for it; {self._wanted}")
            if not shared and len(names) < len(known):
                other = next(feature for name, feature in known.items() if name not in names)
                raise ConfigError(f"feature {other.name!r} has pooling {other.pooling!r}; {self._wanted}")
        for name in names:
            if name not in known:
                raise ConfigError(f"no table has the feature {name!r}; {nearest(name, known)}")
            if not self._serves(known[name]):
                raise ConfigError(f"feature {name!r} has pooling {known[name].pooling!r}; {self._wanted}")
        return {name: known[name] for name in names}

    _wanted = ""
    _serves_bare = True

    @staticmethod
    def _serves(feature: Feature) -> bool:
        raise NotImplementedError("a collection says which poolings it serves")

    def _takes(self, feature: Feature, *, shared: bool) -> bool:
        """Whether the feature is served without being named: of a shared set, a bare one goes to the pooled side."""
        return self._serves(feature) and (not shared or feature.pooling is not None or self._serves_bare)

    @property
    def embedding_dims(self) -> dict[str, int]:
        """Width D of each feature, in output order."""
        return {name: self.table_set.features[name][1].config.embedding_dim for name in self.features}

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.table_set!r}, features={list(self.features)}"

    def end_step(self, step: int) -> None:
        """End optimizer step `step` for all tables of the set, see TableSet.end_step."""
        self.table_set.end_step(step)

    def _plan(self, keys: tuple[str, ...]) -> tuple[_StorePlan, ...]:
        plan = self._plans.get(keys)
        if plan is None:
            for name in self.features:
                if name not in keys:
                    raise ValueError(f"the batch has no feature {name!r}; {nearest(name, keys)}")
            plan = self._plans[keys] = tuple(self._plan_store(store, keys) for store in self._stores())
        return plan

    def _stores(self) -> list[RowStore]:
        needed = {id(self.table_set.features[name][1].store) for name in self.features}
        return [store for store in self.table_set.stores if id(store) in needed]

    def _plan_store(self, store: RowStore, keys: tuple[str, ...]) -> _StorePlan:
        mine = [k for k in keys if k in self.features and self.table_set.features[k][1].store is store]
        pooled = [name for name in mine if self._is_summed(self.features[name])]
        order = pooled + [name for name in mine if name not in set(pooled)]
        places = [keys.index(name) for name in order]
        runs = None
        if places != list(range(len(keys))):
            numbered = groupby(enumerate(places), key=lambda pair: pair[1] - pair[0])
            joined = [[place for _, place in group] for _, group in numbered]
            runs = tuple((run[0], run[-1] + 1) for run in joined)
        mean = [self.features[name].pooling == "mean" for name in pooled]
        return _StorePlan(
            store=store,
            features=tuple(self.features[name] for name in order),
            num_pooled=len(pooled),
            runs=runs,
            tables=torch.tensor([self.table_set.features[name][1].number for name in order], dtype=torch.int32).to(
                store.device
            ),
            mean=torch.tensor(mean).to(store.device) if len(set(mean)) > 1 else bool(mean and mean[0]),
        )

    @staticmethod
    def _is_summed(feature: Feature) -> bool:
        return not isinstance(feature.pooling, Tile)

    def forward(self, batch: KeyedJaggedTensor) -> dict[str, Any]:
        """Look up the batch; see the subclass."""
        if torch.compiler.is_compiling():
            return _outside_graph(self, batch)
        return self._look_up(batch)

    def _look_up(self, batch: KeyedJaggedTensor) -> dict[str, Any]:
        if batch.values.dtype != torch.int64:
            raise ValueError(f"ids must be int64; the batch has {batch.values.dtype}: hash or cast them to int64")
        out: dict[str, Any] = {}
        ahead = next((one for one in self._ahead if one.batch is batch), None)
        if ahead is not None:
            self._ahead.remove(ahead)
        for place, plan in enumerate(self._plan(batch.keys)):
            if plan.store.exchange is not None:
                self._latest = batch
            if ahead is not None:
                part, offsets, asked = ahead.parts[place]
                found = asked.look_up(train=self.training, source=self)
            else:
                part, offsets, ranges = self._cut(plan, batch)
                found = plan.store.lookup(ranges, train=self.training, source=self)
            out |= self._outputs(plan, part, offsets, found)
        return {name: out[name] for name in self.features}

    @staticmethod
    def _cut(plan: _StorePlan, batch: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, Tensor, Ranges]:
        """Return the part of the batch that a store looks up, its offsets as int64, and what the store is asked."""
        part = plan.part_of(batch)
        offsets = part.offsets if part.offsets.dtype == torch.int64 else part.offsets.long()
        starts = offsets[:: part.stride] if part.stride else offsets.new_zeros(len(plan.features) + 1)
        ids = part.values
        if not plan.store.is_padded and offsets[-1] < ids.numel():  # on a GPU to look is to wait: offsets end there
            ids = ids[: offsets[-1]]
        return part, offsets, (ids, starts, plan.tables)

    # ---- rows that ranks share: a batch's ids may travel before its turn comes

    def looked_up(self, batch: KeyedJaggedTensor) -> bool:
        """Whether this very batch was the last to be looked up in tables that ranks share."""
        return self._latest is batch

    def ask_ahead(self, batch: KeyedJaggedTensor) -> None:
        """Say that this very batch will be looked up soon: the numbers of its ids start to travel, no table is read.

        Every rank must say so of its own, and every table be shared (recis.distributed.tables).
        """
        parts = []
        for plan in self._plan(batch.keys):
            assert plan.store.exchange is not None
            part, offsets, ranges = self._cut(plan, batch)
            parts.append((part, offsets, plan.store.exchange.ask(ranges)))
        self._ahead.append(_Ahead(batch, parts))

    def send_ahead(self) -> None:
        """Let the ids of such batches travel, once their numbers are there; every rank must."""
        for ahead in self._ahead:
            for _, _, asked in ahead.parts:
                asked.start_ids()

    def forget_ahead(self, batch: KeyedJaggedTensor | None = None) -> None:
        """Give up what was asked for a batch that was not looked up (None: for any); every rank must."""
        for ahead in [one for one in self._ahead if batch is None or one.batch is batch]:
            self._ahead.remove(ahead)
            for _, _, asked in ahead.parts:
                asked.drop()

    def _outputs(
        self, plan: _StorePlan, part: KeyedJaggedTensor, offsets: Tensor, found: StoreLookup
    ) -> dict[str, Any]:
        raise NotImplementedError("a collection says what its lookups become")


class EmbeddingBagCollection(_Collection):
    """Pooled lookups: {feature: [B, D]} float32, Tile(n) features [B, n, D], in the order of `features`.

    Attributes:
        table_set: the tables, shared with other collections when a TableSet was given.
        features: name -> Feature.
    """

    _wanted = (
        "an EmbeddingBagCollection serves 'sum', 'mean' and Tile(n); an EmbeddingCollection on the same TableSet 'none'"
    )

    @staticmethod
    def _serves(feature: Feature) -> bool:
        return feature.pooling != "none"

    def _outputs(
        self, plan: _StorePlan, part: KeyedJaggedTensor, offsets: Tensor, found: StoreLookup
    ) -> dict[str, Any]:
        out: dict[str, Any] = {}
        stride, num_pooled = part.stride, plan.num_pooled
        if num_pooled:
            bags = offsets[: num_pooled * stride + 1]
            factors = bag_factors(bags, part.weights, plan.mean, num_positions=found.inverse.numel())
            pooled = pool(found, bags, stride, factors)
            pooled = pooled.view(num_pooled, stride, pooled.shape[1]).unbind(0)
            out = {feature.name: bag for feature, bag in zip(plan.features, pooled, strict=False)}
        for place, feature in enumerate(plan.features[num_pooled:], start=num_pooled):
            assert isinstance(feature.pooling, Tile)
            bags = offsets[place * stride : (place + 1) * stride + 1]
            out[feature.name] = tile(found, bags, feature.pooling.n, part.weights)
        return out


class EmbeddingCollection(_Collection):
    """Unpooled lookups: {feature: JaggedTensor of [L, D] float32}, in the order of `features`.

    Attributes: as EmbeddingBagCollection.
    """

    _wanted = "an EmbeddingCollection serves 'none'; an EmbeddingBagCollection on the same TableSet all other poolings"
    _serves_bare = False

    @staticmethod
    def _serves(feature: Feature) -> bool:
        return feature.pooling in ("none", None)

    def _outputs(
        self, plan: _StorePlan, part: KeyedJaggedTensor, offsets: Tensor, found: StoreLookup
    ) -> dict[str, Any]:
        rows = gather(found, offsets, part.stride)
        ends = part.offset_per_key
        vectors = rows.split([stop - start for start, stop in pairwise(ends)])
        return {
            name: part[name].with_values(values, part[name].weights)
            for name, values in zip(part.keys, vectors, strict=True)
        }


@_disable_dynamo  # what torch.optim uses: torch.compiler.disable would import the compiler (seconds) for everyone
def _outside_graph(collection: _Collection, batch: KeyedJaggedTensor) -> dict[str, Any]:
    """Look up outside a compiled graph: rows are found by loops over memory that a tracer cannot see into."""
    return collection._look_up(batch)
