"""Small pairs and completions for the tests of relevance/."""

from relevance.data import Item, Pair, StepGold
from relevance.grammar import parse
from relevance.labels import PROFILES, AttributeVerdict, Fields, Parsed, render

COMPACT = PROFILES["compact"]


def make_pair(
    label: int | None = 4,
    *,
    id: str = "p1",
    category: str | None = "match",
    attributes: dict[str, str] | None = None,
    rule: str | None = "E01",
    has_steps: bool = True,
    negated: tuple[str, ...] = (),
    record: dict[str, str] | None = None,
    query_id: str = "q1",
    **columns,
) -> Pair:
    """Return a pair with gold steps."""
    steps = StepGold(category=category, attributes=attributes or {}, rule=rule) if has_steps else None
    item = Item(category="boots", attributes=record or {}, title="norvik red boots")
    return Pair(
        id=id, query_id=query_id, query="red boots", item_id=f"i-{id}", item=item, label=label, steps=steps, negated=negated,
        **columns,
    )  # fmt: skip


def answer(
    label: int,
    category: str = "match",
    attributes: dict[str, str] | None = None,
    rule: str = "E01",
    verdict: int | None = None,
) -> str:
    """Return a compact completion."""
    pairs = tuple(AttributeVerdict(name=name, value="x", verdict=said) for name, said in (attributes or {}).items())
    fields = Fields(category=category, attribute=pairs, rule=rule, verdict=label if verdict is None else verdict)
    return render(label, fields, COMPACT)


def read(text: str) -> Parsed:
    """Parse a compact completion."""
    return parse(text, COMPACT)
