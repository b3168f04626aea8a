"""Relevance of items to queries from typed entities: an implementation of the EBRM idea (arXiv:2307.00370).

Public names, imported on first use; transformers is only needed where an encoder scores:

    Entity, Item, EntitySchema, TypeConfig                 what an item is made of
    EBRM, EBRMConfig, Scores, PackedItems                  the model and what it answers
    QEScorer, QECache, SoftLogicPool                       its three parts: scores of (query, entity), kept; the formula
    Override, Overrides, explain, verdicts                 reading and overruling a verdict
    Calibrator, EBRMFeatures                               probabilities, and columns for a ranker
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recis.ebrm.cache import QECache
    from recis.ebrm.calibrate import Calibrator
    from recis.ebrm.config import EBRMConfig
    from recis.ebrm.entities import Entity, EntitySchema, Item, TypeConfig
    from recis.ebrm.explanation import explain, verdicts
    from recis.ebrm.features import EBRMFeatures
    from recis.ebrm.model import EBRM, Scores
    from recis.ebrm.overrides import Override, Overrides
    from recis.ebrm.packed import PackedItems
    from recis.ebrm.scorer import QEScorer
    from recis.ebrm.soft_logic import SoftLogicPool

_HOME = {
    "Entity": "recis.ebrm.entities",
    "Item": "recis.ebrm.entities",
    "EntitySchema": "recis.ebrm.entities",
    "TypeConfig": "recis.ebrm.entities",
    "EBRM": "recis.ebrm.model",
    "EBRMConfig": "recis.ebrm.config",
    "Scores": "recis.ebrm.model",
    "PackedItems": "recis.ebrm.packed",
    "QEScorer": "recis.ebrm.scorer",
    "QECache": "recis.ebrm.cache",
    "SoftLogicPool": "recis.ebrm.soft_logic",
    "Override": "recis.ebrm.overrides",
    "Overrides": "recis.ebrm.overrides",
    "explain": "recis.ebrm.explanation",
    "verdicts": "recis.ebrm.explanation",
    "Calibrator": "recis.ebrm.calibrate",
    "EBRMFeatures": "recis.ebrm.features",
}

__all__ = [
    "Entity",
    "Item",
    "EntitySchema",
    "TypeConfig",
    "EBRM",
    "EBRMConfig",
    "Scores",
    "PackedItems",
    "QEScorer",
    "QECache",
    "SoftLogicPool",
    "Override",
    "Overrides",
    "explain",
    "verdicts",
    "Calibrator",
    "EBRMFeatures",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recis.ebrm' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
