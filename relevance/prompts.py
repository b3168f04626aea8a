"""Prompts: what a model reads before it gives the label.

    header, rules, query                                shared by all items of a query, so that prefixes can be cached
    item, [context: chunk], [hint: guidance], label:\\n

Three variants: `plain`, `with_chunk` (one line more) and `guided` (one line more, training only). A chunk that is absent adds
no bytes. What is too long is cut by whole words: the chunk first, then the end of the item, never more. The wording is ours;
guidance of growing strength is after TaoSR-AGRL arXiv:2510.08048; the cap of 4,096 tokens is DyKnow-RAG's, arXiv:2510.11122.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from recis.errors import ConfigError, DataError
from relevance.data import Pair
from relevance.rules import RuleBase

HEADER = "grade the item for the query. 4 all met, 3 one wish missed or substitute, 2 mismatch, 1 unrelated."
GUIDANCE_LEVELS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """Limits of a prompt."""

    max_rules: int = 6
    max_prompt_tokens: int = 192
    max_chunk_tokens: int = 64
    has_header: bool = True
    """Start with the line that says what the labels mean; a model that is trained on one task alone can do without."""

    def __post_init__(self) -> None:
        if self.max_rules < 0 or self.max_prompt_tokens < 1 or self.max_chunk_tokens < 1:
            raise ConfigError(
                f"prompt limits must be positive (max_rules may be 0); got {self.max_rules}, {self.max_prompt_tokens}, "
                f"{self.max_chunk_tokens}"
            )


def count_words(text: str) -> int:
    """Return the number of words: what counts as tokens while there is no tokenizer."""
    return len(text.split())


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Makes the prompts of pairs."""

    rules: RuleBase
    config: PromptConfig = field(default_factory=PromptConfig)
    num_tokens: Callable[[str], int] = count_words
    """Number of tokens of a text; must not fall when a text grows."""

    def plain(self, pair: Pair) -> str:
        """Return the prompt without chunk and guidance.

        Raises:
            DataError: too long even without the item's text; names the pair.
        """
        return self._fit(pair, "", "")

    def with_chunk(self, pair: Pair) -> str:
        """Return the prompt with the pair's chunk; the plain prompt, byte for byte, where it has none."""
        return self._fit(pair, "" if pair.chunk is None else pair.chunk.text, "")

    def guided(self, pair: Pair, level: int) -> str:
        """Return the prompt with a hint of the gold steps; the plain prompt where a pair has no gold step to tell.

        The lowest levels first: see `guidance`.
        """
        return self._fit(pair, "", guidance(pair, level))

    def shared(self, pair: Pair) -> str:
        """Return the start that all items of the pair's query have in common."""
        lines = [HEADER] if self.config.has_header else []
        lines += [rule.line() for rule in self.rules.rules_for(pair, max_rules=self.config.max_rules)]
        return "\n".join([*lines, f"query: {_one_line(pair.query)}", ""])

    def _fit(self, pair: Pair, chunk: str, hint: str) -> str:
        start = self.shared(pair)
        words, chunk_words = _one_line(pair.item.title).split(), _one_line(chunk).split()
        price = f"; price {pair.item.price:g}" if pair.item.price else ""

        def prompt(num_words: int, num_chunk_words: int) -> str:
            context = f"context: {' '.join(chunk_words[:num_chunk_words])}\n" if num_chunk_words else ""
            guide = f"hint: {hint}\n" if hint else ""
            return f"{start}item: {' '.join(words[:num_words])}{price}\n{context}{guide}label:\n"

        limit = self.config.max_prompt_tokens

        def fits(text: str) -> bool:
            return self.num_tokens(text) <= limit

        kept = _most(
            len(chunk_words), lambda n: self.num_tokens(" ".join(chunk_words[:n])) <= self.config.max_chunk_tokens
        )
        whole = prompt(len(words), kept)
        if fits(whole):
            return whole
        kept = _most(kept, lambda n: fits(prompt(len(words), n)))
        if fits(prompt(len(words), kept)):
            return prompt(len(words), kept)
        num_words = _most(len(words), lambda n: fits(prompt(n, 0)))
        if not num_words or not fits(prompt(num_words, 0)):
            raise DataError(
                f"the prompt has more than {limit} tokens before the item",
                unit=f"pair {pair.id!r}",
                column="query",
                value=pair.query,
                option="raise PromptConfig.max_prompt_tokens or lower max_rules",
            )
        return prompt(num_words, 0)


def guidance(pair: Pair, level: int) -> str:
    """Return the hint of a level: 1 the category verdict, 2 also the attribute verdicts, 3 also the deciding rule's id.

    Never the label, as digit or name, and no values. Parts without gold are left out; "" where nothing is known.

    Raises:
        ValueError: a level other than 1, 2, 3.
    """
    if level not in GUIDANCE_LEVELS:
        raise ValueError(f"guidance levels are {GUIDANCE_LEVELS}; got {level}")
    if pair.steps is None:
        return ""
    parts = [] if pair.steps.category is None else [f"category {pair.steps.category}"]
    if level >= 2 and pair.steps.attributes:
        parts.append(", ".join(f"{name} {verdict}" for name, verdict in pair.steps.attributes.items()))
    if level >= 3 and pair.steps.rule is not None:
        parts.append(f"rule {pair.steps.rule}")
    return "; ".join(parts)


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """Return the largest count in 0..limit for which a falling condition holds, 0 if for none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _one_line(text: str) -> str:
    return " ".join(text.split())
