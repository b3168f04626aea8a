"""The rule base: short business rules, of which those that concern a query stand in its prompt.

    base = RuleBase(rules=(Rule(id="C01", text="other kind of thing", decides=1, applies=always), ..))
    base.rules_for(pair)        at most 6, in the order of the base: the order in which rules decide

Retrieval looks at the query alone, so all items of a query share their prompt up to the item. Source: rules kept in a
knowledge base and retrieved, TaoSR-AGRL arXiv:2510.08048 as told by others; form and order are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from recis.errors import ConfigError
from relevance.data import Pair
from relevance.labels import Label

RULE_ID_FORM = "one capital letter and two or three digits"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One atomic rule."""

    id: str
    text: str
    """What the prompt says, without id and label."""
    decides: int
    """Label of a pair that this rule decides."""
    applies: Callable[[Pair], bool]
    """Whether it concerns the pair's query; looks at nothing of the item."""

    def __post_init__(self) -> None:
        digits = self.id[1:]
        if not (self.id[:1].isascii() and self.id[:1].isupper() and len(digits) in (2, 3) and digits.isdecimal()):
            raise ConfigError(f"rule {self.id!r}: an id is {RULE_ID_FORM}, such as 'A02'")
        if self.decides not in tuple(Label):
            raise ConfigError(f"rule {self.id!r}: decides must be a label, 1 to 4; got {self.decides}")
        if not self.text or "\n" in self.text:
            raise ConfigError(f"rule {self.id!r}: text must be one line; got {self.text!r}")

    def line(self) -> str:
        """Return the line of a prompt."""
        return f"{self.id} {self.text}: {self.decides}"


@dataclass(frozen=True)
class RuleBase:
    """Rules in the order in which they decide: the first that fires gives the label."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if len(self.ids) < len(self.rules):
            twice = next(rule.id for rule in self.rules if [r.id for r in self.rules].count(rule.id) > 1)
            raise ConfigError(f"rule {twice!r} is in the rule base twice")

    @cached_property
    def ids(self) -> frozenset[str]:
        """Ids of all rules, for `grammar.parse`."""
        return frozenset(rule.id for rule in self.rules)

    @cached_property
    def deciding_labels(self) -> dict[str, int]:
        """Rule id -> the label that it gives, for `data.check_pair`."""
        return {rule.id: rule.decides for rule in self.rules}

    def rules_for(self, pair: Pair, *, max_rules: int = 6) -> tuple[Rule, ...]:
        """Return the first max_rules rules that concern the pair's query."""
        found = []
        for rule in self.rules:
            if len(found) == max_rules:
                break
            if rule.applies(pair):
                found.append(rule)
        return tuple(found)


def always(pair: Pair) -> bool:
    """Return True: a rule that concerns every query."""
    return True
