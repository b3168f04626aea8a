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
    from recis.ebrm.entities import Entity, EntitySchema, Item, TypeConfig

_HOME = {
    "Entity": "recis.ebrm.entities",
    "Item": "recis.ebrm.entities",
    "EntitySchema": "recis.ebrm.entities",
    "TypeConfig": "recis.ebrm.entities",
}

__all__ = ["Entity", "EntitySchema", "Item", "TypeConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recis.ebrm' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
