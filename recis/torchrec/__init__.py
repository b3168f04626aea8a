"""What recis and TorchRec can hand each other.

    jagged_to_torchrec, jagged_from_torchrec                       one feature without a copy; a batch has methods for it
    DynamicEmbeddingBagCollection, DynamicEmbeddingCollection      dynamic tables inside a DistributedModelParallel
    to_torchrec, from_torchrec, Exported, FixedVocabulary          a collection as TorchRec's, with fixed ids, and back
    fill_shards                                                    that one's rows for a DistributedModelParallel
    StaticEmbeddingBagCollection                                   fixed ids in FBGEMM's CPU tables

Names are imported on first use and need TorchRec then; importing this package needs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recis.jagged.keyed import TORCHREC_EXTRA

if TYPE_CHECKING:
    from recis.torchrec.dynamic import DynamicEmbeddingBagCollection, DynamicEmbeddingCollection
    from recis.torchrec.export import Exported, from_torchrec, to_torchrec
    from recis.torchrec.jagged import jagged_from_torchrec, jagged_to_torchrec
    from recis.torchrec.shards import fill_shards
    from recis.torchrec.static import StaticEmbeddingBagCollection
    from recis.torchrec.vocabulary import FixedVocabulary

_HOME = {
    "DynamicEmbeddingBagCollection": "dynamic",
    "DynamicEmbeddingCollection": "dynamic",
    "Exported": "export",
    "FixedVocabulary": "vocabulary",
    "StaticEmbeddingBagCollection": "static",
    "fill_shards": "shards",
    "from_torchrec": "export",
    "jagged_from_torchrec": "jagged",
    "jagged_to_torchrec": "jagged",
    "to_torchrec": "export",
}

__all__ = [
    "DynamicEmbeddingBagCollection",
    "DynamicEmbeddingCollection",
    "Exported",
    "FixedVocabulary",
    "StaticEmbeddingBagCollection",
    "fill_shards",
    "from_torchrec",
    "jagged_from_torchrec",
    "jagged_to_torchrec",
    "to_torchrec",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recis.torchrec' has no attribute {name!r}; it has: {', '.join(__all__)}")
    try:
        return getattr(import_module(f"recis.torchrec.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"recis.torchrec.{name} needs TorchRec ({error}): {TORCHREC_EXTRA}") from error
