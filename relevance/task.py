"""A grading task: pairs by part, how their prompts are written, and how answers to them are read.

    task = catalog_task(CatalogConfig(num_train=800), profile="compact")
    task = file_task("pairs.jsonl", profile="compact")             JSON lines or Parquet, parts by the column split
    task.prompt(pair), task.read("3<category>..")

The model never sees more of a task than `prompt`; rewards and metrics never read a completion but by `read`. Source: ours.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from recis.errors import ConfigError, DataError
from relevance.catalog import CatalogConfig, make_catalog
from relevance.data import SPLITS, Pair, StepGold
from relevance.files import read_pairs
from relevance.grammar import parse
from relevance.labels import Parsed, Profile, find_profile
from relevance.prompts import PromptConfig, Prompts
from relevance.rules import RuleBase


def as_it_is(prompt: str) -> str:
    """Return the prompt: models without a chat template read it as it is."""
    return prompt


@dataclass(frozen=True, kw_only=True)
class Task:
    """Pairs with their prompts and the grammar of their answers."""

    train: tuple[Pair, ...]
    dev: tuple[Pair, ...]
    test: tuple[Pair, ...]
    prompts: Prompts
    profile: Profile
    rule_ids: Container[str] | None = None
    """Ids that an answer may name; None checks their form alone."""
    hidden_steps: Mapping[str, StepGold] = field(default_factory=dict)
    """Pair id -> true steps of generated pairs, also where training may not see them; for measuring and a noisy oracle."""
    render: Callable[[str], str] = as_it_is
    """Wraps a prompt in the model's chat template."""
    with_chunk: bool = False
    """Whether prompts show the pair's chunk."""

    @cached_property
    def by_id(self) -> dict[str, Pair]:
        """All pairs of all parts."""
        return {pair.id: pair for pair in (*self.train, *self.dev, *self.test)}

    def part(self, name: str) -> tuple[Pair, ...]:
        """Return the pairs of "train", "dev" or "test".

        Raises:
            DataError: the part has no pairs.
        """
        pairs = {"train": self.train, "dev": self.dev, "test": self.test}[name]
        if not pairs:
            raise DataError(f"the data has no {name} pairs", column="split", option=f"mark some pairs split={name!r}")
        return pairs

    def prompt(self, pair: Pair, *, with_chunk: bool | None = None) -> str:
        """Return the text that the model reads before it answers; None takes the task's own `with_chunk`."""
        shows_chunk = self.with_chunk if with_chunk is None else with_chunk
        return self.render(self.prompts.with_chunk(pair) if shows_chunk else self.prompts.plain(pair))

    def guided(self, pair: Pair, level: int) -> str:
        """Return the prompt with guidance; for replay during training only."""
        return self.render(self.prompts.guided(pair, level))

    def read(self, text: str, *, terminated: bool = True) -> Parsed:
        """Return a completion as parsed with the task's profile and rule ids."""
        return parse(text, self.profile, terminated=terminated, rule_ids=self.rule_ids)

    def counting(self, num_tokens: Callable[[str], int]) -> "Task":
        """Return the task with prompts whose limits count a tokenizer's tokens."""
        return replace(self, prompts=replace(self.prompts, num_tokens=num_tokens))


def catalog_task(
    config: CatalogConfig, *, profile: str, prompt: PromptConfig | None = None, with_chunk: bool | None = None
) -> Task:
    """Return the generated task; prompts show chunks where the catalogue has them, unless with_chunk says otherwise."""
    catalog = make_catalog(config)
    return Task(
        train=catalog.train,
        dev=catalog.dev,
        test=catalog.test,
        prompts=Prompts(rules=catalog.rules, config=prompt or PromptConfig()),
        profile=find_profile(profile),
        rule_ids=catalog.rules.ids,
        hidden_steps=catalog.hidden_steps,
        with_chunk=config.with_chunks if with_chunk is None else with_chunk,
    )


def file_task(
    path: str | Path,
    *,
    profile: str,
    prompt: PromptConfig | None = None,
    rules: RuleBase | None = None,
    with_chunk: bool = False,
) -> Task:
    """Return the task of the user's own pairs.

    Args:
        path: .jsonl or .parquet, see `files.read_pairs`.
        profile: blocks of an answer; those that need gold steps need them in the file.
        prompt: limits of a prompt.
        rules: the rule base; None has none, and any well-formed id may be named.
        with_chunk: show the chunks.

    Raises:
        ConfigError: no such file.
        DataError: as `read_pairs`.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--data {path}: no such file; give pairs as .jsonl or .parquet")
    base = rules or RuleBase(())
    pairs = read_pairs(path, deciding_labels=base.deciding_labels if base.rules else None)
    return pair_task(pairs, profile=profile, prompt=prompt, rules=base, with_chunk=with_chunk)


def pair_task(
    pairs: Sequence[Pair],
    *,
    profile: str,
    prompt: PromptConfig | None = None,
    rules: RuleBase | None = None,
    with_chunk: bool = False,
) -> Task:
    """Return the task of checked pairs; their column `split` says which part each belongs to."""
    base = rules or RuleBase(())
    train, dev, test = (tuple(pair for pair in pairs if pair.split == name) for name in SPLITS)
    return Task(
        train=train,
        dev=dev,
        test=test,
        prompts=Prompts(rules=base, config=prompt or PromptConfig()),
        profile=find_profile(profile),
        rule_ids=base.ids if base.rules else None,
        with_chunk=with_chunk,
    )
