"""A collection with a fixed vocabulary whose rows lie in FBGEMM's table-batched embedding (TBE), on the CPU.

    forward     {feature: [B, D]}, as EmbeddingBagCollection gives: an id outside the vocabulary reads zeros
    backward    updates the rows at once, by the same equation as ours: SGD, Adagrad and row-wise Adagrad in FBGEMM, Adam here

Sum and mean, weighted or not, are FBGEMM's sum with our factor per position. FBGEMM has no CPU version of Adam's update: such
tables lie in its dense TBE, whose backward fills a gradient as large as the table, of which the rows of the batch are used.
Rows come from a collection and go back to one with their optimizer state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recis.embedding import Always, EmbeddingBagCollection, Feature, HashTable, TableConfig, TableSet
from recis.errors import ConfigError, nearest
from recis.jagged import KeyedJaggedTensor
from recis.optim.config import Adam
from recis.torchrec.static_groups import FUSED, AdamGroup, FusedGroup, StaticRows, TableGroup
from recis.torchrec.vocabulary import FixedVocabulary, require_all_rows


class StaticEmbeddingBagCollection(nn.Module):
    """Pooled lookups in FBGEMM tables with a fixed set of ids.

    Attributes:
        vocabulary: the ids of each table.
        features: feature -> Feature, in output order.
    """

    def __init__(self, tables: Sequence[TableConfig], ids: Mapping[str, Tensor], *, seed: int) -> None:
        """Build tables of these ids, with the first weights that dynamic ones would draw.

        Args:
            tables: configs; their admission, eviction and max_rows have nothing to decide here.
            ids: table -> its ids [V] int64, distinct, in any order.
            seed: of the draws.

        Raises:
            ConfigError: a table that FBGEMM's CPU tables have no form for; the text names table, setting and way out.
        """
        super().__init__()
        drawn = [replace(config, admission=Always(), eviction=(), max_rows=None) for config in tables]
        table_set = TableSet(drawn, seed=seed)
        for table in table_set:
            if table.name not in ids:
                raise ConfigError(f"table {table.name!r}: no ids are given for it; {nearest(table.name, ids)}")
            table.lookup(ids[table.name], train=True, step=1)
        table_set.end_step(1)
        self._build(table_set)

    @classmethod
    def from_collection(cls, collection: EmbeddingBagCollection) -> "StaticEmbeddingBagCollection":
        """Return the rows that a collection has now as a static one, with their optimizer state.

        Raises:
            ConfigError: as the constructor, or its rows are shared by several processes.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._build(collection.table_set, collection.features)
        return made

    def _build(self, table_set: TableSet, features: Mapping[str, Feature] | None = None) -> None:
        known = {name: feature for name, (feature, _) in table_set.features.items()}
        self.features = dict(known if features is None else features)
        table_of = {name: table_set.features[name][1].name for name in self.features}
        rows = {name: _rows_of(table_set[name]) for name in dict.fromkeys(table_of.values())}
        for name, feature in self.features.items():
            if feature.pooling not in ("sum", "mean", None):
                raise ConfigError(
                    f"feature {name!r} has pooling {feature.pooling!r}; a StaticEmbeddingBagCollection serves 'sum' and 'mean'"
                )
        self.vocabulary = FixedVocabulary({name: part.ids for name, part in rows.items()}, table_of)
        groups: dict[Any, list[str]] = {}
        for name, part in rows.items():
            kind = type(part.config.optimizer)
            groups.setdefault((kind, part.config.optimizer, part.t), []).append(name)
        self.groups = nn.ModuleList()
        for (kind, _, _), names in groups.items():
            group_features = [name for table in names for name in table_of if table_of[name] == table]
            build = AdamGroup if kind is Adam else FusedGroup
            feature_tables = [names.index(table_of[name]) for name in group_features]
            self.groups.append(build([rows[name] for name in names], group_features, feature_tables))

    def forward(self, batch: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return {feature: [B, D]} float32, in the order of `features`.

        Raises:
            ValueError: ids are not int64, or a feature is missing.
        """
        if batch.values.dtype != torch.int64:
            raise ValueError(f"ids must be int64; the batch has {batch.values.dtype}: hash or cast them to int64")
        out: dict[str, Tensor] = {}
        for group in self.groups:
            assert isinstance(group, TableGroup)
            for name in group.features:
                if name not in batch.keys:
                    raise ValueError(f"the batch has no feature {name!r}; {nearest(name, batch.keys)}")
            part = batch.permute([batch.keys.index(name) for name in group.features])
            out |= group.look_up(
                part, self.vocabulary, [self.features[name].pooling == "mean" for name in group.features]
            )
        return {name: out[name] for name in self.features}

    def export(self, table: str) -> dict[str, Tensor]:
        """Return a table's rows as HashTable.export names them: ids [V], weight [V, D], state.<name> [V, width]; copies."""
        group = self._group_of(table)
        return {"ids": self.vocabulary.ids(table).clone(), **group.rows_of(table)}

    def write_into(self, table_set: TableSet) -> None:
        """Write all rows with their optimizer state and count of steps into tables of the same names.

        Raises:
            ValueError: a table has another width or optimizer; the text names table, field and both shapes.
        """
        for name in self.vocabulary.tables:
            table = table_set[name]
            table.import_rows(self.export(name))
            table.store.t[table.number] = self._group_of(name).num_steps

    def set_lr(self, table: str, lr: float) -> None:
        """Set the learning rate of a table, and of all that share its optimizer, from the next backward on."""
        self._group_of(table).set_lr(lr)

    def _group_of(self, table: str) -> TableGroup:
        for group in self.groups:
            assert isinstance(group, TableGroup)
            if table in group.tables:
                return group
        known = [name for group in self.groups if isinstance(group, TableGroup) for name in group.tables]
        raise KeyError(f"no table {table!r}; {nearest(table, known)}")


def _rows_of(table: HashTable) -> StaticRows:
    """Return what a static table starts from, or refuse by name what FBGEMM's CPU tables have no form for."""
    config, where = table.config, f"table {table.name!r}"
    optimizer: Any = config.optimizer
    require_all_rows(table)
    if config.embedding_dim % 4:
        raise ConfigError(f"{where}: FBGEMM needs an embedding_dim that is a multiple of 4; got {config.embedding_dim}")
    if config.dtype != "float32":
        raise ConfigError(f"{where}: FBGEMM's CPU tables are float32 here; got dtype {config.dtype!r}")
    if config.unadmitted != "zeros":
        raise ConfigError(
            f"{where}: ids outside the vocabulary read zeros; got unadmitted={config.unadmitted!r}: set it to 'zeros', or put "
            "one id for all others into the vocabulary"
        )
    is_adam = type(optimizer) is Adam and optimizer.bias_correction == "table"
    is_fused = type(optimizer) in FUSED and not getattr(optimizer, "momentum", 0.0)
    if not (is_adam or is_fused):
        raise ConfigError(
            f"{where}: FBGEMM's CPU tables do not run {optimizer}; they run Sgd without momentum, Adagrad, RowWiseAdagrad, and "
            "Adam with bias_correction='table'; keep other tables dynamic"
        )
    if optimizer.weight_decay:
        raise ConfigError(
            f"{where}: weight_decay={optimizer.weight_decay} is refused: FBGEMM's CPU update leaves it out for SGD without a "
            "word; set it to 0"
        )
    fields = table.export()
    states = {name.removeprefix("state."): value for name, value in fields.items() if name.startswith("state.")}
    return StaticRows(config, fields["ids"], fields["weight"], states, table.t)
