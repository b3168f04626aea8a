"""Features: declarative chains of ops on columns, run by one engine in training, evaluation and prediction.

engine = FeatureEngine([
    FeatureSpec(name="item", kind="sparse", source="item_id", ops=(Hash("farm"),)),
    FeatureSpec(name="price", kind="dense", ops=(Log(), Normalize(2.0, 0.5))),
    FeatureSpec(name="click", kind="label"),
])
batch = engine.forward(raw)
"""

from recis.features.engine import FeatureEngine
from recis.features.ops import (
    Bucketize,
    Clip,
    Cross,
    Dedup,
    Flatten,
    Hash,
    LastN,
    Log,
    Lookup,
    MinMax,
    Mod,
    MultiHash,
    Normalize,
    Op,
    Sequence,
    TimeWindow,
    Truncate,
    Vocab,
)
from recis.features.run import MissCount
from recis.features.spec import FeatureSpec

__all__ = [
    "FeatureEngine",
    "FeatureSpec",
    "MissCount",
    "Op",
    "Hash",
    "Mod",
    "Bucketize",
    "Cross",
    "MultiHash",
    "Vocab",
    "Lookup",
    "Truncate",
    "Flatten",
    "Sequence",
    "LastN",
    "Dedup",
    "TimeWindow",
    "Log",
    "Normalize",
    "MinMax",
    "Clip",
]
