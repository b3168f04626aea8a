"""Gold rationales by template, to learn the answer format from.

    oracle(pair, find_profile("compact"))      "3<category>match</category><attribute>colour=red:miss</attribute>.."

The facts come from the gold steps alone; wordings are drawn by the pair's id, at least four per block of free text. The papers
let a large model write these; templates, and that they are true by construction, are ours.
"""

import hashlib
from collections.abc import Sequence

from recis.errors import DataError
from relevance.data import Pair, gold_fields
from relevance.labels import MAX_TEXT, Fields, Label, Profile, render

_QUERY = ("asks for: {query}", "the wish is {query}", "wanted: {query}", "somebody looks for {query}")
_ITEM = ("offers: {title}", "the item is {title}", "sold here: {title}", "this is {title}")
_WHY = {
    4: ("all wishes are met", "nothing is missed", "it fits in every point", "no wish is open"),
    3: ("one wish is missed or open", "close, with one gap", "it nearly fits", "a small gap remains"),
    2: ("a main wish is not met", "it fails where it counts", "near, but wrong", "the gap is too large"),
    1: ("this is another kind of thing", "unrelated", "nothing in common", "another kind of item"),
}
_CONTEXT = {
    "adopt": ("the note adds a fact", "taken from the note", "the note helps", "the note is right"),
    "partial": ("one part of the note is right", "half of the note holds", "only a part is used", "the note is mixed"),
    "ignore": ("the note does not help", "the note is not used", "the note is left aside", "not from the note"),
}


def oracle(pair: Pair, profile: Profile, *, with_chunk: bool = False) -> str:
    """Return the gold completion of a pair, without the eos.

    Args:
        pair: with a label; with gold steps if the profile has blocks that need them.
        profile: the blocks.
        with_chunk: the prompt shows the pair's chunk; without it `context` is "none".

    Raises:
        DataError: the label, the steps or the chunk's decision that the profile needs are missing; names the pair.
    """
    if pair.label is None:
        raise _missing(pair, "label")
    steps = None if pair.steps is None else gold_fields(pair.steps)
    for tag in ("category", "attribute", "rule"):
        if tag in profile.tags and (steps is None or getattr(steps, tag) is None):
            raise _missing(pair, f"steps.{tag}")
    fields = Fields(
        query=_text(_say(_QUERY, pair, "query").format(query=pair.query)),
        item=_text(_say(_ITEM, pair, "item").format(title=pair.item.title)),
        category=None if steps is None else steps.category,
        attribute=None if steps is None else steps.attribute,
        rule=None if steps is None else steps.rule,
        context=_context(pair, with_chunk) if "context" in profile.tags else None,
        why=_say(_WHY[pair.label], pair, "why"),
        verdict=pair.label,
    )
    return render(Label(pair.label), fields, profile)


def _context(pair: Pair, with_chunk: bool) -> tuple[str, str | None]:
    if not with_chunk or pair.chunk is None:
        return "none", None
    decision = pair.chunk.decision
    if decision not in _CONTEXT:
        raise _missing(pair, "chunk.decision")
    return decision, _say(_CONTEXT[decision], pair, "context")


def _say(wordings: Sequence[str], pair: Pair, block: str) -> str:
    """Return one of the wordings, by pair and block."""
    digest = hashlib.blake2b(f"{pair.id}|{block}".encode(), digest_size=4).digest()
    return wordings[int.from_bytes(digest, "big") % len(wordings)]


def _text(text: str) -> str:
    """Return what may stand in a block of free text."""
    return " ".join(text.replace("<", " ").replace(">", " ").replace("\ufffd", " ").split())[:MAX_TEXT]


def _missing(pair: Pair, column: str) -> DataError:
    return DataError(
        "the oracle needs it", unit=f"pair {pair.id!r}", column=column, option="give it, or use another profile"
    )
