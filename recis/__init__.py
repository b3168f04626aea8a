"""Train large sparse recommendation and relevance models in PyTorch.

Public names, imported on first use, so that `import recis` costs nothing:

    JaggedTensor, KeyedJaggedTensor                               features of variable length
    TableConfig, Feature, TableSet                                dynamic embedding tables
    EmbeddingBagCollection, EmbeddingCollection                   lookups inside any nn.Module
    SparseOptimizer                                               one torch optimizer for all rows
    TrainConfig, Trainer                                          a run
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recis.embedding import EmbeddingBagCollection, EmbeddingCollection, Feature, TableConfig, TableSet
    from recis.jagged import JaggedTensor, KeyedJaggedTensor
    from recis.optim import SparseOptimizer
    from recis.trainer import TrainConfig, Trainer

_HOME = {
    "JaggedTensor": "recis.jagged",
    "KeyedJaggedTensor": "recis.jagged",
    "TableConfig": "recis.embedding",
    "Feature": "recis.embedding",
    "TableSet": "recis.embedding",
    "EmbeddingBagCollection": "recis.embedding",
    "EmbeddingCollection": "recis.embedding",
    "SparseOptimizer": "recis.optim",
    "TrainConfig": "recis.trainer",
    "Trainer": "recis.trainer",
}

__all__ = [
    "EmbeddingBagCollection",
    "EmbeddingCollection",
    "Feature",
    "JaggedTensor",
    "KeyedJaggedTensor",
    "SparseOptimizer",
    "TableConfig",
    "TableSet",
    "TrainConfig",
    "Trainer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recis' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
