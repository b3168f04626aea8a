"""Dynamic embedding tables: rows for an open-ended id vocabulary, and the modules that look them up.

TableConfig, Feature, Tile                       what a table is
EmbeddingBagCollection, EmbeddingCollection      {feature: [B, D]} and {feature: JaggedTensor of [L, D]}
TableSet, HashTable, TableCounters               the tables behind them
Constant, Uniform, Normal, TruncatedNormal       first weights
Always, AfterSightings, WithProbability          when an id earns a row; counted by Exact or CountMin
TtlSteps, TtlSeconds, LruCapacity, LfuCapacity, MinNorm, ByScore    when it loses it
"""

from recis.embedding.admission import Admission, AfterSightings, Always, CountMin, Exact, WithProbability
from recis.embedding.collection import EmbeddingBagCollection, EmbeddingCollection
from recis.embedding.config import Feature, Pooling, TableConfig, Tile
from recis.embedding.counters import TableCounters
from recis.embedding.eviction import (
    ByScore,
    Eviction,
    LfuCapacity,
    LruCapacity,
    MinNorm,
    RowMeta,
    TtlSeconds,
    TtlSteps,
)
from recis.embedding.initializers import Constant, Initializer, Normal, TruncatedNormal, Uniform
from recis.embedding.rows import RowStore
from recis.embedding.snapshot import TableSnapshot
from recis.embedding.table import HashTable
from recis.embedding.table_set import TableSet

__all__ = [
    "TableConfig",
    "Feature",
    "Pooling",
    "Tile",
    "EmbeddingBagCollection",
    "EmbeddingCollection",
    "TableSet",
    "HashTable",
    "TableCounters",
    "RowStore",
    "TableSnapshot",
    "Initializer",
    "Constant",
    "Uniform",
    "Normal",
    "TruncatedNormal",
    "Admission",
    "Always",
    "AfterSightings",
    "Exact",
    "CountMin",
    "WithProbability",
    "Eviction",
    "TtlSteps",
    "TtlSeconds",
    "LruCapacity",
    "LfuCapacity",
    "MinNorm",
    "ByScore",
    "RowMeta",
]
