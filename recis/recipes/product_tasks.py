"""Instructions made of product records: six tasks, several templates each, and how an answer is read back.

    caption      attributes, half of them as text and all as side features -> the title
    category     title and four categories -> the letter of the right one
    extract      title -> "brand = x ; colour = y", attributes in the order of the title's source
    question     title and an attribute -> its value, or `unknown` where the title's product has none (15 to 20 %)
    complete     the first half of a title -> the rest
    correct      a title with a slip in one word -> the title

Tasks and templates are after what PUMGPT's authors describe (arXiv:2308.09568); the words are ours.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recis.ebrm.synthetic_words import with_typo
from recis.recipes.product_records import CATEGORY, Record, attribute_names

UNKNOWN = "unknown"
LETTERS = ("a", "b", "c", "d")
UNKNOWN_SHARE = 0.18
TEMPLATES = {
    "caption": (
        "write the title of a product with {facts}",
        "product facts : {facts} . what is its title ?",
        "{facts} . make a title of this",
    ),
    "category": (
        "title : {title} . which category ? {options}",
        "{title} . choose one of {options}",
        "{options} . to which of these belongs : {title}",
    ),
    "extract": (
        "list the attributes of : {title}",
        "title : {title} . attributes ?",
        "what does this title say of the product ? {title}",
    ),
    "question": (
        "title : {title} . what is the {name} ?",
        "{name} of : {title}",
        "tell the {name} of this product : {title}",
    ),
    "complete": ("go on : {title}", "complete the title : {title}", "what follows after : {title}"),
    "correct": ("correct : {title}", "put the spelling right : {title}", "there is a slip in : {title}"),
}
TASKS = tuple(TEMPLATES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and its answer."""

    task: str
    record: Record
    prompt: str
    answer: str
    side: tuple[str, ...] = ()
    """Entities "<attribute>:<value>" that the decoder sees as side features; none of them is in the prompt's task as text."""
    name: str = ""
    """The attribute that a question asks for."""


def make_samples(records: Sequence[Record], *, per_record: int, seed: int) -> list[Sample]:
    """Return `per_record` samples of each record, tasks in turn, as a function of seed.

    A record without attributes (PriceRunner) is asked for its category, completion and correction alone.
    """
    rng = random.Random(seed)
    categories = {
        source: tuple(sorted({record.category for record in records if record.source == source}))
        for source in {record.source for record in records}
    }
    names = attribute_names(records)
    samples = []
    for number, record in enumerate(records):
        tasks = TASKS if record.attributes else ("category", "complete", "correct")
        for turn in range(per_record):
            task = tasks[(number + turn) % len(tasks)]
            samples.append(make_sample(task, record, categories[record.source], names.get(record.source, ()), rng))
    rng.shuffle(samples)
    return samples


def make_sample(
    task: str, record: Record, categories: Sequence[str], names: Sequence[str], rng: random.Random
) -> Sample:
    """Return a sample of one task; `names` are the attributes a question may ask for."""
    template = rng.choice(TEMPLATES[task])
    return _MAKERS[task](record, template, categories, names, rng)


def _caption(
    record: Record, template: str, categories: Sequence[str], names: Sequence[str], rng: random.Random
) -> Sample:
    pairs = [(CATEGORY, record.category), *_pairs(record)]
    shown = sorted(rng.sample(range(len(pairs)), (len(pairs) + 1) // 2))
    facts = " ; ".join(f"{pairs[at][0]} = {pairs[at][1]}" for at in shown)
    return Sample(
        task="caption",
        record=record,
        prompt=template.format(facts=facts),
        answer=record.title,
        side=tuple(f"{name}:{record.normalised(value)}" for name, value in pairs),
    )


def _category(
    record: Record, template: str, categories: Sequence[str], names: Sequence[str], rng: random.Random
) -> Sample:
    others = [category for category in categories if category != record.category]
    options = [record.category, *rng.sample(others, min(len(LETTERS) - 1, len(others)))]
    rng.shuffle(options)
    listed = " ".join(f"{letter} ) {option}" for letter, option in zip(LETTERS, options, strict=False))
    answer = LETTERS[options.index(record.category)]
    return Sample(
        task="category", record=record, prompt=template.format(title=record.title, options=listed), answer=answer
    )


def _extract(
    record: Record, template: str, categories: Sequence[str], names: Sequence[str], rng: random.Random
) -> Sample:
    answer = " ; ".join(f"{name} = {record.normalised(value)}" for name, value in _pairs(record))
    return Sample(task="extract", record=record, prompt=template.format(title=record.title), answer=answer)


def _question(
    record: Record, template: str, categories: Sequence[str], names: Sequence[str], rng: random.Random
) -> Sample:
    absent = [name for name in names if name not in record.attributes]
    if absent and rng.random() < UNKNOWN_SHARE:
        name, answer = rng.choice(absent), UNKNOWN
    else:
        name = rng.choice(sorted(record.attributes))
        answer = " or ".join(record.normalised(value) for value in record.attributes[name])
    prompt = template.format(title=record.title, name=name)
    return Sample(task="question", record=record, prompt=prompt, answer=answer, name=name)


def _complete(
    record: Record, template: str, categories: Sequence[str], names: Sequence[str], rng: random.Random
) -> Sample:
    words = record.title.split()
    middle = max(1, len(words) // 2)
    prompt = template.format(title=" ".join(words[:middle]))
    return Sample(task="complete", record=record, prompt=prompt, answer=" ".join(words[middle:]) or UNKNOWN)


def _correct(
    record: Record, template: str, categories: Sequence[str], names: Sequence[str], rng: random.Random
) -> Sample:
    words = record.title.split()
    at = rng.randrange(len(words))
    words[at] = with_typo(words[at], rng)
    return Sample(task="correct", record=record, prompt=template.format(title=" ".join(words)), answer=record.title)


def _pairs(record: Record) -> list[tuple[str, str]]:
    return [(name, value) for name, values in record.attributes.items() for value in values]


_MAKERS: dict[str, Callable[..., Sample]] = {
    "caption": _caption,
    "category": _category,
    "extract": _extract,
    "question": _question,
    "complete": _complete,
    "correct": _correct,
}


def read_attributes(answer: str) -> list[tuple[str, str]]:
    """Return the (name, value) pairs of an extraction's answer in order; parts without `=` are left out."""
    found = []
    for part in answer.split(";"):
        name, equals, value = part.partition("=")
        if equals and name.strip() and value.strip():
            found.append((" ".join(name.split()), " ".join(value.split())))
    return found
