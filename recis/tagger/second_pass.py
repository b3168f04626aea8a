"""Distil once more with an expert that has learnt from the first pool, and keep the better of the two rule sets.

    P(type | span) = softmax over types of the mean log p(word | template with span) of the type's words

The expert's masked language model is trained on the pool's spans by cross-entropy of that, through templates that say
what the texts are; then seeds are asked for anew and rules grown from an empty pool. Source of the second pass:
arXiv:2210.02768; templates, loss and choice are ours.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from recis.tagger.distil import DistilConfig, Distilled, distil
from recis.tagger.experts import MaskedLMExpert
from recis.tagger.pool import PoolEntry
from recis.tagger.rules import RuleSet, RuleTagger
from recis.tagger.seeds import NoSeedsError, SeedConfig, find_seeds
from recis.tagger.text import TOKENIZER, Text

TASK_TEMPLATES: dict[str, str] = {
    "T1": "in this product title , {span} is the {mask} . {text}",
    "T2": "{text} . the {mask} of this product is {span} .",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """How the expert learns from a pool."""

    epochs: int = 3
    batch_size: int = 16
    lr: float = 1e-5
    clip: float = 1.0
    max_spans: int = 5000
    """Spans of the pool that are learnt, drawn by the seed: a pool of a large catalogue says the same many times."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.max_spans < 1:
            raise ValueError(
                "epochs, batch_size and max_spans must be at least 1; "
                f"got {self.epochs}, {self.batch_size}, {self.max_spans}"
            )


def tune_expert(
    expert: MaskedLMExpert,
    texts: Sequence[Text],
    text_ids: Sequence[str],
    entries: Sequence[PoolEntry],
    config: TuneConfig | None = None,
    *,
    templates: Mapping[str, str] = TASK_TEMPLATES,
) -> MaskedLMExpert:
    """Return an expert that asks through `templates` with a model trained on the pool; the one given stays as it is.

    Raises:
        ValueError: the pool is empty, or holds a text or a type that is not known.
    """
    config = config or TuneConfig()
    number_of = {text_id: number for number, text_id in enumerate(text_ids)}
    for entry in entries:
        if entry.text_id not in number_of or entry.type not in expert.types:
            raise ValueError(f"pool entry {entry}: its text or its type is not known; types are {sorted(expert.types)}")
    if not entries:
        raise ValueError("an expert cannot learn from an empty pool")
    tuned = expert.copy(templates)
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    drawn = list(entries) if len(entries) <= config.max_spans else rng.sample(list(entries), config.max_spans)
    names = sorted(tuned.types)
    optimizer = torch.optim.AdamW(tuned.model.parameters(), lr=config.lr)
    tuned.model.train()
    for _ in range(config.epochs):
        rng.shuffle(drawn)
        for at in range(0, len(drawn), config.batch_size):
            some = drawn[at : at + config.batch_size]
            asked = [
                (texts[number_of[entry.text_id]], (entry.start, entry.end), rng.choice(sorted(templates)))
                for entry in some
            ]
            scores = tuned.log_probs(asked)
            wanted = torch.tensor([names.index(entry.type) for entry in some])
            loss = torch.nn.functional.cross_entropy(torch.stack([scores[name] for name in names], dim=1), wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned.model.parameters(), config.clip)
            optimizer.step()
    tuned.model.eval()
    return tuned.renewed()


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoPasses:
    """Both results, how good each is, and which one is kept."""

    first: Distilled
    second: Distilled | None
    """None when the tuned expert gave no seeds."""
    values: tuple[float, float]
    """By dev F1 or pool agreement, first and second; -1 for a second that is not there."""

    @property
    def kept(self) -> Distilled:
        """The better of both; the first on a tie."""
        return self.second if self.second is not None and self.values[1] > self.values[0] else self.first


def second_pass(
    first: Distilled,
    expert: MaskedLMExpert,
    texts: Sequence[Text],
    text_ids: Sequence[str],
    phrases: Sequence[str],
    *,
    tune: TuneConfig | None = None,
    seeds: SeedConfig | None = None,
    config: DistilConfig | None = None,
    tokenizer: str = TOKENIZER,
    measure: Callable[[RuleSet], float] | None = None,
) -> TwoPasses:
    """Tune the expert on the first pool, find seeds and distil anew from an empty pool.

    measure: value of a rule set, e.g. F1 on dev; without it the rules' agreement with their own pool.

    Raises:
        ValueError: as `tune_expert`.
    """
    types = first.rules.schema
    tuned = tune_expert(expert, texts, text_ids, first.pool.entries, tune)
    try:
        found = find_seeds(texts, phrases, tuned, types, seeds)
    except NoSeedsError:
        return TwoPasses(first=first, second=None, values=(_value(first, texts, text_ids, measure), -1.0))
    human = tuple(rule for rule in first.rules.rules if rule.source == "human")
    second = distil(
        texts,
        text_ids,
        types,
        (*human, *found.rules),
        config,
        tokenizer=tokenizer,
        dictionaries=first.rules.dictionaries,
    )
    values = _value(first, texts, text_ids, measure), _value(second, texts, text_ids, measure)
    return TwoPasses(first=first, second=second, values=values)


def _value(
    result: Distilled, texts: Sequence[Text], text_ids: Sequence[str], measure: Callable[[RuleSet], float] | None
) -> float:
    return pool_agreement(result, texts, text_ids) if measure is None else measure(result.rules)


def pool_agreement(result: Distilled, texts: Sequence[Text], text_ids: Sequence[str]) -> float:
    """Return the F1 of the spans that all exported rules give together against the pool that they grew one by one."""
    pool = {(entry.text_id, entry.start, entry.end, entry.type) for entry in result.pool.entries}
    tagger = RuleTagger(result.rules)
    given = {
        (text_id, span.start, span.end, span.type)
        for text_id, text in zip(text_ids, texts, strict=True)
        for span in tagger.tag_text(text)
    }
    return 2 * len(pool & given) / max(1, len(pool) + len(given))
