"""Typed spans in titles and queries: rules distilled from seeds, and a neural tagger.

RuleTagger, Rule, Span          apply a rule file
find_seeds, distil              make one from unlabelled texts and an expert
TaggerModel                     the neural tagger
to_entities                     spans as entities of recis.ebrm
TagFeatures                     spans as features of a ranker

Names are imported on first use: tagging with rules needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recis.tagger.distil import DistilConfig, distil
    from recis.tagger.entities import to_entities
    from recis.tagger.features import TagFeatures
    from recis.tagger.neural import NeuralConfig, TaggerModel
    from recis.tagger.rules import Condition, Rule, RuleFormatError, RuleSet, RuleTagger, Span
    from recis.tagger.seeds import NoSeedsError, SeedConfig, find_seeds

_HOMES = {
    "distil": ("DistilConfig", "distil"),
    "entities": ("to_entities",),
    "features": ("TagFeatures",),
    "neural": ("NeuralConfig", "TaggerModel"),
    "rules": ("Condition", "Rule", "RuleFormatError", "RuleSet", "RuleTagger", "Span"),
    "seeds": ("NoSeedsError", "SeedConfig", "find_seeds"),
}

__all__ = [
    "Condition",
    "DistilConfig",
    "NeuralConfig",
    "NoSeedsError",
    "Rule",
    "RuleFormatError",
    "RuleSet",
    "RuleTagger",
    "SeedConfig",
    "Span",
    "TagFeatures",
    "TaggerModel",
    "distil",
    "find_seeds",
    "to_entities",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"recis.tagger.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
